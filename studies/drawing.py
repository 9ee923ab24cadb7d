"""Pictures of images in rows, and plots, by Pillow.

`grid` puts images beside one another, `plot` joins points by lines, and `plot_columns` and
`plot_rows` draw a table of accuracies, such as a scenario's, in one of two ways.
"""
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from le import as_bytes

# Told apart by the colour-blind (Okabe & Ito)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
LINES = "#dddddd"


def blank(width, height):
    """A white picture, and what draws on it."""
    canvas = Image.new("RGB", (width, height), "white")
    return canvas, ImageDraw.Draw(canvas)


def grid(path, rows, titles=(), zoom=2, margin=130, gap=4):
    """A picture of rows of images of one size, (text, [(3, H, W), ...]) each, under titles."""
    height, width = [zoom * side for side in rows[0][1][0].shape[1:]]
    header = 16 if titles else 0
    across = width + gap
    down = height + gap
    columns = max(len(images) for _, images in rows)
    canvas, draw = blank(margin + columns * across, header + len(rows) * down + gap)
    for j, title in enumerate(titles):
        draw.text((margin + j * across, 2), title, fill="black")
    for i, (text, images) in enumerate(rows):
        top = header + gap + i * down
        draw.text((6, top + height // 2 - 6), text, fill="black")
        for j, image in enumerate(images):
            pixels = as_bytes(image).permute(1, 2, 0)
            picture = Image.fromarray(pixels.numpy())
            picture = picture.resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(picture, (margin + j * across, top))
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
        left = axes.place(axes.xs[0], y)
        right = axes.place(axes.xs[1], y)
        draw.line((*left, *right), fill=LINES)
        draw.text((6, left[1] - 6), f"{y + 0.0:.4g}", fill="black")
    for x, text in marks.items():
        across, bottom = axes.place(x, axes.ys[0])
        draw.text((across - 8, bottom + 6), text, fill="black")


def overlap(a, b):
    """Do two boxes (left, top, right, bottom) share a pixel?"""
    begins = (a[:2] < b[2:]).all()
    ends = (b[:2] < a[2:]).all()
    return begins and ends


def draw_dot(draw, x, y, radius, colour):
    """A filled circle around the pixel (x, y)."""
    corner = x - radius, y - radius
    opposite = x + radius, y + radius
    draw.ellipse((*corner, *opposite), fill=colour)


def draw_point(draw, axes, point, colour, taken):
    """A dot with its spread, and its text where none of the boxes that are taken is."""
    x, y, spread, text = point
    top = axes.place(x, y + spread)
    bottom = axes.place(x, y - spread)
    draw.line((*bottom, *top), fill=colour)
    x, y = axes.place(x, y)
    draw_dot(draw, x, y, 3, colour)
    left = x + 7
    right = left + draw.textlength(text)
    box = np.array([left, y - 6, right, y + 6])
    while text and any(overlap(box, other) for other in taken):
        box += (0, 12, 0, 12)                              # below the text that is there already
    taken.append(box)
    draw.text(tuple(box[:2]), text, fill=colour)


def plot(series, x_label, y_label, y_range, marks=None, size=(900, 520)):
    """A picture of series (name, [(x, y, spread of y, text), ...]), their points joined by lines.
    Marks of the x axis are {x: text}, by default round numbers."""
    canvas, draw = blank(*size)
    width, height = size
    left = 50
    right = width - 190                                    # beside it are the names
    top = 30
    bottom = height - 50
    xs = []
    for _, points in series:
        xs += [x for x, *_ in points]
    low = min(xs)
    high = max(max(xs), low + 1e-9)
    axes = Axes((low, high), y_range, (left, right), (bottom, top))
    if marks is None:
        marks = {x: f"{x:.4g}" for x in round_steps(low, high)}
    draw_axes(draw, axes, marks)
    draw.text((left, height - 20), x_label, fill="black")
    draw.text((6, 6), y_label, fill="black")
    taken = []
    for i, (name, points) in enumerate(series):
        colour = COLOURS[i % len(COLOURS)]
        draw.text((right + 20, top + 16 * i), name, fill=colour)
        draw.line([axes.place(x, y) for x, y, *_ in points], fill=colour, width=2)
        for point in points:
            draw_point(draw, axes, point, colour, taken)
    return canvas


def accuracy_in(text):
    """(mean, spread) in a text such as 97.1 ± 0.8; None if it is something else, as 0.96 is."""
    found = re.fullmatch(r"(\d+\.\d)(?: ± (\d+\.\d))?", text)
    return found and (float(found[1]), float(found[2] or 0))


def with_accuracies(rows):
    """The first column of a table [{column: text}], and those others that have an accuracy."""
    first, *columns = rows[0]
    return first, [column for column in columns if any(accuracy_in(row[column]) for row in rows)]


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


def draw_row_axes(draw, axes, rows, names, right):
    """A line at each fifth of 100 %, and what each row and each colour is."""
    for accuracy in range(0, 101, 20):
        x, _ = axes.place(accuracy, 0)
        draw.line((x, 40, x, 60 + 24 * len(rows)), fill=LINES)
        draw.text((x - 6, 24), str(accuracy), fill="black")
    for i, row in enumerate(rows):
        name = next(iter(row.values()))
        draw.text((6, 44 + 24 * i), str(name), fill="black")
    for j, name in enumerate(names):
        colour = COLOURS[j % len(COLOURS)]
        draw.text((right + 30, 44 + 24 * j), name, fill=colour)


def draw_accuracy(draw, axes, place, accuracy, colour):
    """A dot for the mean, and a line for the spread."""
    mean, spread = accuracy
    x, y = axes.place(mean, place)
    low, _ = axes.place(mean - spread, place)
    high, _ = axes.place(mean + spread, place)
    draw.line((low, y, high, y), fill=colour, width=2)
    draw_dot(draw, x, y, 4, colour)


def plot_rows(rows, title, left=180, right=720):
    """The same where rows have names: a line of dots for each row, in a colour for each column."""
    _, columns = with_accuracies(rows)
    most = max(len(rows), len(columns))
    canvas, draw = blank(right + 180, 60 + 24 * most)
    bottom = 50 + 24 * len(rows)
    axes = Axes((0, 100), (0, len(rows)), (left, right), (50, bottom))
    draw.text((6, 6), title, fill="black")
    draw_row_axes(draw, axes, rows, columns, right)
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
