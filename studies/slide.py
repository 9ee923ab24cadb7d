"""The two pictures of `python -m studies.plane`: points and what their victims learn from them; and
the way of a picture in boxes and arrows."""
import numpy as np
import torch
from PIL import Image

from studies.drawing import LINE, blank, draw_dot, height_of, width_of, write

STRONG = ("#0072b2", "#d55e00")                            # points of the two classes,
PALE = ((204, 227, 240), (247, 223, 204))                  # and what a victim takes for them
SIDE = 400                                                 # pixels of a panel
REACH = 1.3                                                # coordinates go from -REACH to REACH


def ground_of(victim, count=100):
    """The ground of a panel: what the victim answers at count x count places, in pale colours."""
    place = torch.linspace(-REACH, REACH, count)
    y, x = torch.meshgrid(-place, place, indexing="ij")
    places = torch.stack([x, y], dim=-1)
    scores = victim(places.view(-1, 2, 1, 1))
    answers = scores.argmax(1).view(count, count)
    colours = torch.tensor(PALE, dtype=torch.uint8)
    ground = Image.fromarray(colours[answers].numpy())
    return ground.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def panel(points, labels, victim, lines):
    """Points of one kind, on what the victim that learned from them answers everywhere."""
    canvas, draw = blank(SIDE + 20, SIDE + 20 + 2 * LINE)
    left = 10
    top = 10 + 2 * LINE                                    # above it are the lines of text
    canvas.paste(ground_of(victim), (left, top))
    shown = points.flatten(1)[:600]
    for (x, y), label in zip(shown.tolist(), labels.tolist()):
        if max(abs(x), abs(y)) < REACH:
            across = left + SIDE * (x / REACH + 1) / 2
            down = top + SIDE * (1 - y / REACH) / 2
            draw_dot(draw, across, down, 2, STRONG[label])
    for i, line in enumerate(lines):
        write(draw, (left, 6 + LINE * i), line)
    return canvas


def draw_panels(drawn, found, labels, rows, path):
    """Six kinds of points of one seed, with the numbers of all: a table of `plane.summary`.
    They stand in two rows of three."""
    panels = []
    for name in drawn:
        points, victim, _ = found[name]
        accuracy, along, off = rows[name]
        lines = f"{name}: {accuracy} %", f"moved {along} along, {off} off"
        panels.append(panel(points, labels, victim, lines))
    width, height = panels[0].size
    canvas, _ = blank(3 * width, 2 * height)
    for i, picture in enumerate(panels):
        row, column = divmod(i, 3)
        canvas.paste(picture, (column * width, row * height))
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
    """Level and upright lines through these pixels, with a head at the last one."""
    draw.line(pixels, fill="black", width=2)
    before, tip = np.array(pixels[-2:], dtype=float)
    way = tip - before
    ahead = way / np.abs(way).max()
    aside = np.array([ahead[1], -ahead[0]])
    behind = tip - 12 * ahead
    one = behind + 6 * aside
    other = behind - 6 * aside
    draw.polygon([*tip, *one, *other], fill="black")


def arrow_between(draw, start, end, text=""):
    """An arrow from one box to the next in the same row, and what happens there below it."""
    *_, right, _ = edges(start)
    left, *_ = edges(end)
    y = BOXES[start][1]
    arrow(draw, [(right, y), (left, y)])
    write(draw, ((left + right) / 2, y + 2 * LINE), text, anchor="ma")


def draw_way(draw):
    """The arrows from a picture to what its victim learns."""
    arrow_between(draw, "picture", "UE", "its owner adds\na perturbation")
    arrow_between(draw, "UE", "noisy", "noise up to\nlevel 100")
    arrow_between(draw, "noisy", "x0", "the U-Net has learned\nother pictures")
    arrow_between(draw, "x0", "mean")
    arrow_between(draw, "mean", "LE", "at level 0")
    arrow_between(draw, "LE", "victim")


def draw_pulls(draw):
    """Two distances, in a frame, of the UE and the predicted picture; they pull the next x_s."""
    left, _, right, _ = edges("perceptual")
    frame_left = left - 20
    frame_right = right + 20
    frame_bottom = 212
    draw.rounded_rectangle((frame_left, 8, frame_right, frame_bottom), 8, "#f4f4f4")
    _, top, *_ = edges("UE")                               # as of x0 and of mean
    ue, _, _ = BOXES["UE"]
    arrow(draw, [(ue, top), (ue, 110), (frame_left, 110)])
    x0, _, _ = BOXES["x0"]
    arrow(draw, [(x0, top), (x0, frame_bottom)])
    mean, _, _ = BOXES["mean"]
    for name, shift in (("pixel", 15), ("perceptual", -15)):
        _, y, _ = BOXES[name]
        _, _, right, _ = edges(name)
        x = mean + shift
        arrow(draw, [(right, y), (x, y), (x, top)])
    write(draw, (mean + 24, 100), "two pulls\ntowards the UE")


def draw_loop(draw):
    """The arrow below all boxes, from the next x_s back to the noisy UE."""
    begin, _, _ = BOXES["mean"]
    end, _, _ = BOXES["noisy"]
    _, _, _, bottom = edges("mean")
    arrow(draw, [(begin, bottom), (begin, 420), (end, 420), (end, bottom)])
    write(draw, ((begin + end) / 2, 426), "again, from level to level", anchor="ma")


def draw_pipeline(path):
    """A picture of the whole of it."""
    canvas, draw = blank(1620, 460)
    draw_way(draw)
    draw_pulls(draw)
    draw_loop(draw)
    for name, (x, y, text) in BOXES.items():
        draw.rounded_rectangle(edges(name), 8, FILLS.get(name, "white"), "black", 2)
        write(draw, (x, y), text, anchor="mm")
    canvas.save(path)
