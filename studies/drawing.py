"""Pictures of images in rows, and plots, by Pillow."""
import re

import numpy as np
from PIL import Image, ImageDraw

from le import as_bytes

# Told apart by the colour-blind (Okabe & Ito)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def grid(path, rows, titles=(), zoom=2, margin=130, gap=4):
    """A picture of rows of images of one size, (text, [(3, H, W), ...]) each, under titles."""
    height, width = [zoom * side for side in rows[0][1][0].shape[1:]]
    header = 16 if titles else 0
    columns = max(len(images) for _, images in rows)
    size = (margin + columns * (width + gap), header + len(rows) * (height + gap) + gap)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for j, title in enumerate(titles):
        draw.text((margin + j * (width + gap), 2), title, fill="black")
    for i, (text, images) in enumerate(rows):
        top = header + gap + i * (height + gap)
        draw.text((6, top + height // 2 - 6), text, fill="black")
        for j, image in enumerate(images):
            pixels = Image.fromarray(as_bytes(image).permute(1, 2, 0).numpy())
            pixels = pixels.resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(pixels, (margin + j * (width + gap), top))
    canvas.save(path)


def round_steps(low, high):
    """Round numbers from low to high, at most eight of them."""
    step = 10 ** np.floor(np.log10(max(high - low, 1e-9)))
    for finer in (0.1, 0.2, 0.5, 1, 2):
        marks = np.arange(np.ceil(low / (finer * step)), np.floor(high / (finer * step)) + 1)
        if len(marks) <= 8:
            return marks * finer * step
    return np.array([low, high])


def plot(series, x_label, y_label, y_range, marks=None, size=(900, 520)):
    """A picture of series (name, [(x, y, spread of y, text), ...]), their points joined by lines.
    Marks of the x axis are {x: text}, by default round numbers."""
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    left, right, top, bottom = 50, size[0] - 190, 30, size[1] - 50
    xs = [x for _, points in series for x, *_ in points]
    low, high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = y_range

    def place(x, y):
        across = (x - low) / (high - low)
        up = (min(max(y, y_low), y_high) - y_low) / (y_high - y_low)
        return left + across * (right - left), bottom - up * (bottom - top)
    for y in round_steps(y_low, y_high):
        draw.line((*place(low, y), *place(high, y)), fill="#dddddd")
        draw.text((6, place(low, y)[1] - 6), f"{y + 0.0:.4g}", fill="black")
    for x, text in (marks or {x: f"{x:.4g}" for x in round_steps(low, high)}).items():
        draw.text((place(x, y_low)[0] - 8, bottom + 6), text, fill="black")
    draw.text((left, size[1] - 20), x_label, fill="black")
    draw.text((6, 6), y_label, fill="black")
    taken = []
    for i, (name, points) in enumerate(series):
        colour = COLOURS[i % len(COLOURS)]
        draw.text((right + 20, top + 16 * i), name, fill=colour)
        draw.line([place(x, y) for x, y, *_ in points], fill=colour, width=2)
        for x, y, spread, text in points:
            draw.line((*place(x, y - spread), *place(x, y + spread)), fill=colour)
            x, y = place(x, y)
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
            box = np.array([x + 7, y - 6, x + 7 + draw.textlength(text), y + 6])
            while text and any((box[:2] < b[2:]).all() and (b[:2] < box[2:]).all() for b in taken):
                box += (0, 12, 0, 12)                      # below the label that is there already
            taken.append(box)
            draw.text(tuple(box[:2]), text, fill=colour)
    return canvas


def accuracy_in(text):
    """(mean, spread) in a text such as 97.1 ± 0.8; None if it is something else."""
    found = re.fullmatch(r"([\d.]+)(?: ± ([\d.]+))?", text)
    return found and (float(found[1]), float(found[2] or 0))


def plot_columns(rows, title, size=(900, 520)):
    """A picture of a table of accuracies [{column: text}]: a line for each column, row by row."""
    first, *columns = rows[0]
    series = []
    for column in columns:
        found = [(i, accuracy_in(row[column])) for i, row in enumerate(rows)]
        points = [(i, *accuracy, "") for i, accuracy in found if accuracy]
        if points:
            series.append((column, points))
    marks = {i: str(row[first]) for i, row in enumerate(rows)}
    return plot(series, first, title, (0, 100), marks, size)


def plot_rows(rows, title, margin=180, across=540):
    """The same where rows have names: a line of dots for each row, in a colour for each column."""
    first, *columns = rows[0]
    columns = [column for column in columns if any(accuracy_in(row[column]) for row in rows)]
    height = 60 + 24 * max(len(rows), len(columns))
    canvas = Image.new("RGB", (margin + across + 180, height), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((6, 6), title, fill="black")
    for accuracy in range(0, 101, 20):
        x = margin + across * accuracy / 100
        draw.line((x, 40, x, canvas.height - 10), fill="#dddddd")
        draw.text((x - 6, 24), str(accuracy), fill="black")
    for i, row in enumerate(rows):
        draw.text((6, 44 + 24 * i), str(row[first]), fill="black")
    for j, column in enumerate(columns):
        colour = COLOURS[j % len(COLOURS)]
        draw.text((margin + across + 30, 44 + 24 * j), column, fill=colour)
        for i, row in enumerate(rows):
            y = 50 + 24 * i
            if found := accuracy_in(row[column]):
                low, x, high = [margin + across * value / 100 for value in
                                (found[0] - found[1], found[0], found[0] + found[1])]
                draw.line((low, y, high, y), fill=colour, width=2)
                draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
    return canvas


def beside(pictures):
    """Pictures of one size, from left to right."""
    width, height = pictures[0].size
    canvas = Image.new("RGB", (width * len(pictures), height))
    for i, picture in enumerate(pictures):
        canvas.paste(picture, (i * width, 0))
    return canvas
