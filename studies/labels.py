"""Where the labels of a plot go, so that none lies on another, on a dot or on a line.

A box is an array (left, top, right, bottom) of pixels. Labels are placed one after the other, each
at the first free place around its dot.
"""
import numpy as np

HEIGHT = 22                                                # pixels of a line of text


def overlap(a, b):
    """Do two boxes (left, top, right, bottom) share a pixel?"""
    begins = (a[:2] < b[2:]).all()
    ends = (b[:2] < a[2:]).all()
    return begins and ends


def square(x, y, radius):
    """The box around a pixel."""
    return np.array([x - radius, y - radius, x + radius, y + radius])


def boxes_along(start, end):
    """Small boxes that cover a line between two pixels."""
    start = np.array(start)
    end = np.array(end)
    count = 1 + int(np.abs(end - start).max() // 4)
    return [square(*(start + (end - start) * i / count), 3) for i in range(count + 1)]


def places_around(x, y, width):
    """Boxes for a text of a width around the pixel (x, y): beside it, then above and below, then
    askew, and then all of these further away."""
    sides = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1))
    half = np.array([width, HEIGHT]) / 2
    for away in range(10, 140, 10):
        for side in sides:
            middle = np.array([x, y]) + np.array(side) * (half + away)
            yield np.concatenate([middle - half, middle + half])


def placed(labels, taken, size):
    """A box for each label (x, y, width of its text): the first place around the pixel (x, y) that
    lies in the picture and overlaps none of the boxes that are taken, nor another label. Where no
    place is left, the last one that was tried."""
    picture = np.array([0, 0, *size])
    taken = list(taken)
    boxes = []
    for x, y, width in labels:
        for box in places_around(x, y, width):
            inside = (box[:2] >= picture[:2]).all() and (box[2:] <= picture[2:]).all()
            if inside and not any(overlap(box, other) for other in taken):
                break
        boxes.append(box)
        taken.append(box)
    return boxes
