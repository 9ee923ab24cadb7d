"""The two pictures of `python -m studies.plane`: points and what their victims learn from them; and
the way of a picture in boxes and arrows."""
import torch
from PIL import Image

from studies.drawing import LINE, blank, draw_dot, height_of, width_of, write

STRONG = ("#0072b2", "#d55e00")                            # points of the two classes,
PALE = ((204, 227, 240), (247, 223, 204))                  # and what a victim takes for them
SIDE, REACH = 400, 1.3                                     # of a panel: pixels, and coordinates


def panel(points, labels, victim, lines):
    """Points of one kind, on what the victim that learned from them answers everywhere."""
    canvas, draw = blank(SIDE + 20, SIDE + 20 + 2 * LINE)
    place = torch.linspace(-REACH, REACH, 100)
    y, x = torch.meshgrid(-place, place, indexing="ij")
    answers = victim(torch.stack([x, y], dim=-1).view(-1, 2, 1, 1)).argmax(1)
    pixels = torch.tensor(PALE, dtype=torch.uint8)[answers.view(100, 100)]
    ground = Image.fromarray(pixels.numpy()).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    canvas.paste(ground, (10, 10 + 2 * LINE))
    for (x, y), label in zip(points.flatten(1).tolist()[:600], labels.tolist()):
        if max(abs(x), abs(y)) < REACH:
            across = 10 + SIDE * (x / REACH + 1) / 2
            down = 10 + 2 * LINE + SIDE * (1 - y / REACH) / 2
            draw_dot(draw, across, down, 2, STRONG[label])
    for i, line in enumerate(lines):
        write(draw, (10, 6 + LINE * i), line)
    return canvas


def draw_panels(drawn, found, labels, rows, path):
    """Six kinds of points of one seed, with the numbers of all: a table of `plane.summary`."""
    panels = []
    for name in drawn:
        points, victim, _ = found[name]
        accuracy, along, off = rows[name]
        lines = f"{name}: {accuracy} %", f"moved {along} along, {off} off"
        panels.append(panel(points, labels, victim, lines))
    width, height = panels[0].size
    canvas, _ = blank(3 * width, 2 * height)
    for i, picture in enumerate(panels):
        canvas.paste(picture, (i % 3 * width, i // 3 * height))
    canvas.save(path)


BOXES = {                                                  # place of the middle, and the text
    "picture": (90, 300, "picture"),
    "UE": (310, 300, "unlearnable\nexample (UE)"),
    "noisy": (560, 300, "noisy UE\nx_t"),
    "x0": (800, 300, "predicted\npicture x_0"),
    "mean": (1060, 300, "next x_s,\na bit less noisy"),
    "LE": (1320, 300, "learnable\nexample (LE)"),
    "victim": (1540, 300, "victim\nlearns"),
    "pixel": (800, 60, "pixel distance to the UE\n(at high levels of noise)"),
    "perceptual": (800, 160, "perceptual distance to the UE\n(at low levels)")}
FILLS = {"pixel": "#cce3f0", "perceptual": "#cce3f0", "UE": "#f7dfcc", "LE": "#cceee0"}


def edges(name):
    """Left, top, right and bottom of a box."""
    x, y, text = BOXES[name]
    half_width = width_of([text]) / 2 + 12
    half_height = height_of([text]) / 2 + 12
    return x - half_width, y - half_height, x + half_width, y + half_height


def arrow(draw, pixels):
    """A line through these pixels, with a head at the last one."""
    draw.line(pixels, fill="black", width=2)
    (x0, y0), (x, y) = pixels[-2:]
    length = max(abs(x - x0), abs(y - y0))
    ahead_x = (x - x0) / length
    ahead_y = (y - y0) / length
    behind_x = x - 12 * ahead_x
    behind_y = y - 12 * ahead_y
    one = behind_x + 6 * ahead_y, behind_y - 6 * ahead_x
    other = behind_x - 6 * ahead_y, behind_y + 6 * ahead_x
    draw.polygon([(x, y), one, other], fill="black")


def arrow_between(draw, start, end, text=""):
    """An arrow from one box to the next in the same row, and what happens there below it."""
    *_, right, _ = edges(start)
    left, *_ = edges(end)
    y = BOXES[start][1]
    arrow(draw, [(right, y), (left, y)])
    write(draw, ((left + right) / 2, y + 2 * LINE), text, anchor="ma")


def draw_pipeline(path):
    """A picture of the whole of it."""
    canvas, draw = blank(1620, 460)
    arrow_between(draw, "picture", "UE", "its owner adds\na perturbation")
    arrow_between(draw, "UE", "noisy", "noise up to\nlevel 100")
    arrow_between(draw, "noisy", "x0", "the U-Net has learned\nother pictures")
    arrow_between(draw, "x0", "mean")
    arrow_between(draw, "mean", "LE", "at level 0")
    arrow_between(draw, "LE", "victim")
    left, _, right, _ = edges("perceptual")
    frame = left - 20, 8, right + 20, 212                  # both distances are between these two
    draw.rounded_rectangle(frame, 8, "#f4f4f4")
    _, top, *_ = edges("UE")
    x, _, _ = BOXES["UE"]
    arrow(draw, [(x, top), (x, 110), (frame[0], 110)])
    x, _, _ = BOXES["x0"]
    arrow(draw, [(x, top), (x, frame[3])])
    for name, shift in (("pixel", 15), ("perceptual", -15)):
        _, y, _ = BOXES[name]
        *_, right, _ = edges(name)
        x = BOXES["mean"][0] + shift
        arrow(draw, [(right, y), (x, y), (x, top)])
    write(draw, (BOXES["mean"][0] + 24, 100), "two pulls\ntowards the UE")
    begin, _, _ = BOXES["mean"]
    end, _, _ = BOXES["noisy"]
    _, _, _, bottom = edges("mean")
    arrow(draw, [(begin, bottom), (begin, 420), (end, 420), (end, bottom)])
    write(draw, ((begin + end) / 2, 426), "again, from level to level", anchor="ma")
    for name, (x, y, text) in BOXES.items():
        draw.rounded_rectangle(edges(name), 8, FILLS.get(name, "white"), "black", 2)
        write(draw, (x, y), text, anchor="mm")
    canvas.save(path)
