"""Pictures of images in rows, and plots, by Pillow.

`grid` puts images beside one another, `plot` joins points by lines, and `plot_columns` and
`plot_rows` draw a table of accuracies, such as a scenario's, in one of two ways. Letters are large
enough for a projector, and margins are as wide as what is written in them.
"""
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unet import as_bytes
from studies.labels import boxes_along, placed, square

# Told apart by the colour-blind (Okabe & Ito)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
LINES = "#dddddd"
FONT = ImageFont.load_default(size=20)
LINE = 26                                                  # pixels from one line to the next
EDGE = 8                                                   # and from what is written to the edge


def blank(width, height):
    """A white picture, and what draws on it."""
    canvas = Image.new("RGB", (round(width), round(height)), "white")
    return canvas, ImageDraw.Draw(canvas)


def number(value):
    """A value in four digits at most; -0 is 0."""
    return f"{value + 0.0:.4g}"


def write(draw, place, text, fill="black", anchor="la"):
    """Text, of one line or more; the anchor la means that its left top corner is at the place."""
    align = "center" if anchor[0] == "m" else "left"
    draw.text(place, text, fill=fill, font=FONT, anchor=anchor, align=align)


def width_of(texts):
    """Pixels that the longest line of some texts takes."""
    lines = [line for text in texts for line in str(text).split("\n")]
    return max(map(FONT.getlength, lines), default=0)


def height_of(texts):
    """Pixels that the lines of the highest of some texts take."""
    counts = [str(text).count("\n") + 1 for text in texts]
    return LINE * max(counts, default=0)


def wrapped(text, width):
    """The text with as many words in a line as the width has room for."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and width_of([longer]) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def enlarged(image, width, height):
    """An image (3, H, W) in [0, 1] as a picture of this size, whose pixels stay squares."""
    pixels = as_bytes(image).permute(1, 2, 0)
    picture = Image.fromarray(pixels.numpy())
    return picture.resize((width, height), Image.Resampling.NEAREST)


def grid(path, rows, titles=(), notes=(), zoom=0, gap=4):
    """A picture of rows of images of one size, (text, [(3, H, W), ...]) each, under titles; below
    them rows of notes, (text, [text, ...]) each. Unless `zoom` says how many pixels become of one,
    an image becomes about 96 pixels high."""
    _, first = rows[0]
    _, pixels_down, pixels_across = first[0].shape
    zoom = zoom or max(1, 96 // pixels_down)
    height = zoom * pixels_down
    width = zoom * pixels_across
    below = [note for _, row in notes for note in row]
    across = max(width, width_of([*titles, *below]) + gap) + gap
    down = max(height, LINE) + gap
    columns = max(len(images) for _, images in rows)
    margin = width_of([text for text, _ in [*rows, *notes]]) + 3 * EDGE
    header = height_of(titles) + gap
    bottom = header + len(rows) * down + gap
    canvas, draw = blank(margin + columns * across, bottom + len(notes) * LINE + EDGE)
    for j, title in enumerate(titles):
        write(draw, (margin + j * across, gap), title)
    for i, (text, images) in enumerate(rows):
        top = header + i * down
        write(draw, (EDGE, top + height // 2), text, anchor="lm")
        for j, image in enumerate(images):
            left = round(margin + j * across)
            canvas.paste(enlarged(image, width, height), (left, top))
    for i, (text, row) in enumerate(notes):
        top = bottom + i * LINE
        write(draw, (EDGE, top), text)
        for j, note in enumerate(row):
            write(draw, (margin + j * across, top), note)
    canvas.save(path)


def round_steps(low, high):
    """Round numbers from low to high, at most eight of them."""
    power = 10 ** np.floor(np.log10(max(high - low, 1e-9)))
    for finer in (0.1, 0.2, 0.5, 1, 2):
        step = finer * power
        first = np.ceil(low / step)
        last = np.floor(high / step)
        if last - first < 8:
            return step * np.arange(first, last + 1)
    return np.array([low, high])


@dataclass(frozen=True)
class Axes:
    """The lowest and highest values of x and of y, and the pixels of a picture where they lie."""
    xs: tuple
    ys: tuple
    across: tuple
    down: tuple

    def place(self, x, y):
        """The pixel of a point; what is too high or too low lies on the edge."""
        across = np.interp(x, self.xs, self.across)
        down = np.interp(y, self.ys, self.down)
        return across.item(), down.item()


def draw_axes(draw, axes, marks):
    """Lines at round values of y, and marks of the x axis, {x: text}."""
    for y in round_steps(*axes.ys):
        _, down = axes.place(axes.xs[0], y)
        left, right = axes.across
        draw.line((left, down, right, down), fill=LINES)
        write(draw, (left - EDGE, down), number(y), anchor="rm")
    for x, text in marks.items():
        across, bottom = axes.place(x, axes.ys[0])
        write(draw, (across, bottom + EDGE), text, anchor="ma")


def draw_dot(draw, x, y, radius, colour):
    """A filled circle around the pixel (x, y)."""
    draw.ellipse(tuple(square(x, y, radius)), fill=colour)


def draw_label(draw, label, box, text, colour):
    """The text in its box; a thin line leads to it where it is not beside its pixel (x, y)."""
    x, y, _ = label
    nearest = np.clip((x, y), box[:2], box[2:])
    if np.abs(nearest - (x, y)).max() > 12:
        draw.line((x, y, *nearest), fill=colour)
    left, top, _, bottom = box
    write(draw, (left, (top + bottom) / 2), text, colour, "lm")


def draw_series(draw, axes, points, colour):
    """Points joined by lines, a dot with its spread each. What these take, as boxes."""
    taken = []
    places = [axes.place(x, y) for x, y, *_ in points]
    lines = list(zip(places, places[1:]))
    for x, y, spread, _ in points:
        bottom = axes.place(x, y - spread)
        top = axes.place(x, y + spread)
        lines.append((bottom, top))
    for start, end in lines:
        draw.line((*start, *end), fill=colour, width=2)
        taken += boxes_along(start, end)
    for place in places:
        draw_dot(draw, *place, 4, colour)
        taken.append(square(*place, 10))
    return taken


def draw_names(draw, names, left, top):
    """What each colour is, a line each."""
    for i, name in enumerate(names):
        write(draw, (left, top + LINE * i), name, COLOURS[i % len(COLOURS)])


def plot(series, x_label, y_label, y_range, marks=None, size=(1000, 600)):
    """A picture of series (name, [(x, y, spread of y, text), ...]), their points joined by lines.
    Marks of the x axis are {x: text}, by default round numbers."""
    canvas, draw = blank(*size)
    width, height = size
    title = wrapped(y_label, width - 2 * EDGE)
    names = [name for name, _ in series]
    top = height_of([title]) + 3 * EDGE
    bottom = height - 2 * LINE - 3 * EDGE
    left = width_of([number(y) for y in round_steps(*y_range)]) + 3 * EDGE
    right = width - width_of(names) - 6 * EDGE             # beside it are the names
    xs = [x for _, points in series for x, *_ in points]
    low = min(xs)
    high = max(max(xs), low + 1e-9)
    axes = Axes((low, high), y_range, (left, right), (bottom, top))
    if marks is None:
        marks = {x: f"{x:.4g}" for x in round_steps(low, high)}
    draw_axes(draw, axes, marks)
    write(draw, (left, height - LINE - EDGE), x_label)
    write(draw, (EDGE, EDGE), title)
    draw_names(draw, names, right + 4 * EDGE, top)
    names_bottom = top + height_of(["\n".join(names)])
    taken = [np.array([right + 3 * EDGE, top, width, names_bottom])]
    labels = []
    texts = []
    for i, (_, points) in enumerate(series):
        colour = COLOURS[i % len(COLOURS)]
        taken += draw_series(draw, axes, points, colour)
        for x, y, _, text in points:
            if text:
                labels.append((*axes.place(x, y), width_of([text])))
                texts.append((text, colour))
    for label, text, box in zip(labels, texts, placed(labels, taken, size)):
        draw_label(draw, label, box, *text)
    return canvas


def accuracy_in(text):
    """(mean, spread) in a text such as 97.1 ± 0.8; None if it is something else, as 0.96 is."""
    found = re.fullmatch(r"(\d+\.\d)(?: ± (\d+\.\d))?", text)
    return found and (float(found[1]), float(found[2] or 0))


def with_accuracies(rows):
    """The first column of a table [{column: text}], and those others that have an accuracy."""
    first, *others = rows[0]
    columns = [column for column in others if any(accuracy_in(row[column]) for row in rows)]
    return first, columns


def plot_columns(rows, title, size=(900, 520)):
    """A picture of a table of accuracies [{column: text}]: a line for each column, row by row."""
    first, columns = with_accuracies(rows)
    series = []
    for column in columns:
        points = []
        for i, row in enumerate(rows):
            if found := accuracy_in(row[column]):
                points.append((i, *found, ""))
        series.append((column, points))
    marks = {i: str(row[first]) for i, row in enumerate(rows)}
    return plot(series, first, title, (0, 100), marks, size)


def draw_row_axes(draw, axes, names):
    """A line at each fifth of 100 %, and the name of each row."""
    for accuracy in range(0, 101, 20):
        x, top = axes.place(accuracy, 0)
        draw.line((x, top - LINE, x, axes.down[1]), fill=LINES)
        write(draw, (x, top - LINE), str(accuracy), anchor="md")
    for i, name in enumerate(names):
        _, y = axes.place(0, i)
        write(draw, (EDGE, y), name, anchor="lm")


def draw_accuracy(draw, axes, place, accuracy, colour):
    """A dot for the mean, and a line for the spread."""
    mean, spread = accuracy
    x, y = axes.place(mean, place)
    low, _ = axes.place(mean - spread, place)
    high, _ = axes.place(mean + spread, place)
    draw.line((low, y, high, y), fill=colour, width=2)
    draw_dot(draw, x, y, 5, colour)


def plot_rows(rows, title, length=560, step=34):
    """The same where rows have names: a line of dots for each row, in a colour for each column.
    Pixels: `length` of 100 %, `step` from row to row."""
    first, columns = with_accuracies(rows)
    names = [str(row[first]) for row in rows]
    left = width_of(names) + 4 * EDGE
    right = left + length
    width = right + width_of(columns) + 7 * EDGE
    title = wrapped(title, width - 2 * EDGE)
    top = height_of([title]) + 2 * LINE + 3 * EDGE
    bottom = top + step * len(rows)
    canvas, draw = blank(width, max(bottom, top + LINE * len(columns)))
    axes = Axes((0, 100), (0, len(rows)), (left, right), (top, bottom))
    write(draw, (EDGE, EDGE), title)
    draw_row_axes(draw, axes, names)
    draw_names(draw, columns, right + 5 * EDGE, top - LINE / 2)
    for j, column in enumerate(columns):
        colour = COLOURS[j % len(COLOURS)]
        for i, row in enumerate(rows):
            found = accuracy_in(row[column])
            if found:
                draw_accuracy(draw, axes, i, found, colour)
    return canvas


def beside(pictures):
    """Pictures of one size, from left to right."""
    width, height = pictures[0].size
    canvas, _ = blank(width * len(pictures), height)
    for i, picture in enumerate(pictures):
        canvas.paste(picture, (i * width, 0))
    return canvas
