"""Folders of images as data: which of them are classes, which are divisions, who gets how many.

Nothing is guessed in silence: what is taken for what is printed, and what could be two things is
refused, in one line.
"""
import re
from pathlib import Path

import torch
from PIL import Image, ImageOps

from unet import BadInput
from studies.files import IMAGES, image_files, listed, open_image, pixels_of, say_frames


# -- Which folder is what --------------------------------------------------------------------------

# What divisions are called, in any case, alone or as in `test_set` and `train-images`
DIVISIONS = {"train": ("train", "training"), "test": ("test", "testing"),
             "validation": ("val", "valid", "validation", "dev", "development", "eval")}
# Those of a folder in which somebody has protected images
PUBLISHED = ("protected", "unprotected", "original")


def division_of(name):
    """The division that a folder of this name is, or ""."""
    word = re.sub(r"[-_ ]?(set|data|images|split)$", "", name.lower())
    found = [division for division, names in DIVISIONS.items() if word in names]
    return found[0] if found else word if word in PUBLISHED else ""


def folders_in(root):
    """The folders in a folder, but for hidden ones, sorted."""
    return sorted(path for path in Path(root).iterdir() if path.is_dir() and path.name[0] != ".")


def in_classes(root):
    """The images under a folder that lie in a folder of it; the class is the first part."""
    return [file for file in image_files(root)[0] if file.parent != Path(root)]


def class_of(file, root):
    return file.relative_to(root).parts[0]


def classes_in(root):
    """The names of the classes that have images in this folder. Raises BadInput where these look
    like divisions: all of them hold the same folders."""
    inner = {}
    for file in in_classes(root):
        names = inner.setdefault(class_of(file, root), set())
        if file.parent.parent != Path(root):
            names.add(file.parent.name)
    shared = set.intersection(*inner.values()) if len(inner) > 1 else ()
    if len(shared) > 1:
        raise BadInput(f"{root}: {listed(sorted(inner))} all hold {listed(sorted(shared))}, so "
                       "which are the classes? Expected a folder a class, or train, validation "
                       "and test of these")
    return sorted(inner)


def beside(root, found):
    """The folders that hold images and are none of those found."""
    others = [path for path in folders_in(root) if path not in found.values()]
    return [path for path in others if image_files(path)[0]]


def divisions(root):
    """{division: its folder}, of train, validation and test, or of protected, unprotected, original
    and these; nothing where the folders are classes. Raises BadInput where it is not clear."""
    found = {}
    for path in folders_in(root):
        name = division_of(path.name)
        if name in found:
            raise BadInput(f"{root}: {found[name].name} and {path.name} would both be {name}; "
                           "expected one of them")
        found |= {name: path} if name else {}
    others = beside(root, found)
    if may_be_classes(found, others):
        return {}
    needed = ("unprotected", "test") if "protected" in found else ("train",)
    missing = [name for name in needed if name not in found]
    if missing or others and len(found) == 1:
        names = ", ".join(path.name for path in found.values())
        raise BadInput(f"{root}: {names}, but no {' or '.join(missing or ['test'])}; expected "
                       "divisions of which all are there, or classes with other names")
    return found


def say_divisions(root, found):
    """Say what is taken for what, and what for nothing."""
    if found:
        names = [f"{path.name} is taken for {name}" for name, path in found.items()]
        names += [f"{path.name} is left out" for path in beside(root, found)]
        print(f"{root}: {', '.join(names)}")


def may_be_classes(found, others):
    """Whether folders with the names of divisions are classes, such as train, car and bus, as they
    hold no folders of classes themselves."""
    if {"test", "validation"} & set(found) or any(in_classes(path) for path in found.values()):
        return False
    return bool(others) or set(found) != {"train"}


def pictures(root, files, size, limit):
    """Images (N, 3, size, size) in [0, 1], their central squares, and the files; N is at most the
    limit, where there is one. What cannot be read is skipped, with a line that says so."""
    images, used, skipped, frames = [], [], [], []
    for place in spaced(len(files), min(len(files), limit or len(files))):
        try:
            image = open_image(files[place])
        except BadInput as error:
            skipped.append(error)
            continue
        frames += [files[place]] * (image.info["frames"] > 1)
        square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
        images.append(pixels_of(square))
        used.append(files[place])
    if skipped:
        print(f"{root}: {len(skipped)} skipped: {listed(skipped)}")
    say_frames(frames)
    if not images:
        raise BadInput(f"{root}: no images; expected {', '.join(IMAGES)}")
    return torch.stack(images), used


def folder(root, size, classes=(), limit=0):
    """Images (N, 3, size, size) in [0, 1], their labels (N,) and files, from a folder a class.

    Raises BadInput if there are fewer than two classes, or others than the given ones.
    """
    found, left_out = image_files(root)
    left_out += [file for file in found if file.parent == Path(root)]
    if left_out:
        print(f"{root}: {len(left_out)} that are no images of a class are left out: "
              f"{listed(left_out)}")
    files = in_classes(root)
    names = {class_of(file, root) for file in files}
    if len(names) < 2 or not names <= set(classes or names):
        only = f"two or more of {listed(classes)}" if classes else "two or more, a class each"
        raise BadInput(f"{root}: its folders of images are {listed(sorted(names)) or 'none'}; "
                       f"expected {only}; `ddpm` alone needs no classes")
    images, used = pictures(root, files, size, limit)
    classes = list(classes or classes_in(root))
    labels = torch.tensor([classes.index(class_of(file, root)) for file in used])
    return images, labels, used


def without_classes(root, size, limit):
    """All images (N, 3, size, size) under a folder, of its training division if it has some, and
    labels (N,) of one class."""
    known = divisions(root)
    say_divisions(root, known)
    root = known.get("unprotected", known.get("train", root))
    images, _ = pictures(root, image_files(root)[0], size, limit)
    print(f"{root}: all {len(images)} images, whatever folder they are in, for the U-Net")
    return images, torch.zeros(len(images), dtype=torch.long)


# -- Who gets how many -----------------------------------------------------------------------------

def spaced(n, count):
    """`count` of the places 0 to n - 1, evenly spaced: of a folder, which is in the order of its
    classes, some of each."""
    return [i * (n - 1) // max(1, count - 1) for i in range(count)]


def in_proportion(counts, n):
    """n images, divided in these proportions, at least one for each where there are as many:
    in_proportion(dict(a=60, b=30, c=10), 10) is dict(a=6, b=3, c=1)."""
    whole, largest = sum(counts.values()), max(counts, key=counts.get)
    found = {name: max(1, count * n // whole) for name, count in counts.items()}
    found[largest] += n - sum(found.values())              # what is left over, or too much
    return found


def of_a_small_class(counts, n, before):
    """The same of fewer images than sets: one for the largest set, and for those that have got the
    least of their share of the images before, {set: how many}."""
    largest = max(counts, key=counts.get)
    shares = {name: before[name] / count for name, count in counts.items() if name != largest}
    first = [largest, *sorted(shares, key=shares.get)][:n]
    return {name: int(name in first) for name in counts}


def divided_by_class(images, labels, counts, seed, limit=0):
    """{set: (images, labels)} in these proportions, of each class; by the seed, in its order. Each
    set is at most the limit, where there is one."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    places = {name: [] for name in counts}
    for label in labels.unique():
        own = order[labels[order] == label]
        if len(own) < len(counts):
            before = {name: len(found) for name, found in places.items()}
            share = of_a_small_class(counts, len(own), before)
        else:
            share = in_proportion(counts, len(own))
        for name, part in zip(counts, own.split(list(share.values()))):
            places[name] += part.tolist()
    rank, sets = order.argsort(), {}
    for name, found in places.items():
        chosen = torch.tensor(found, dtype=torch.long)
        chosen = chosen[spaced(len(chosen), min(len(chosen), limit or len(chosen)))]
        chosen = chosen[rank[chosen].argsort()]            # the seed's order
        sets[name] = images[chosen], labels[chosen]
    return sets


def say_what_is_missing(root, sets, classes):
    """Say which class has no image in which set."""
    for name, (_, labels) in sets.items():
        present = set(labels.tolist())
        missing = [classes[k] for k in range(len(classes)) if k not in present]
        if missing:
            print(f"{root}: {name} has no image of {listed(missing)}: too few for every set")


def check_sizes(root, sets):
    """Raise BadInput, naming an option, where a set has next to nothing."""
    whole = sum(len(labels) for _, labels in sets.values())
    for name, (_, labels) in sets.items():
        if len(labels) < 2:
            raise BadInput(f"--data {root}: {len(labels)} of {whole} images for {name}; expected "
                           f"two or more in each set: more images, or a larger --images.{name}")
