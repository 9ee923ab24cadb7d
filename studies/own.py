"""Your own images, and unlearnable examples that somebody else has made: the story on these.

    python -m studies.own --data my_photos
    python -m studies.own ddpm --data my_photos --sampler.perceptual_weight 0
    python -m studies.own --data cifar10 --root cifar-10-binary.tar.gz --published perturbation.pt

--data DIR         a folder of class folders with images, or with train/ and test/ of these, or with
                   protected/, unprotected/, test/ and perhaps original/; only the networks (ddpm)
                   need no classes where the sampler needs no perceptual distance
--published FILE   UEs, or perturbations, of the first training images: .pt, .npy, .npz, or a folder
                   of 0.png, 1.png, ...; their row of the table is `published`
--unprotected DIR  class folders from which the U-Net learns, where all training images are
                   protected; or `test`, the test images

All other options are those of `train.py`. Images are cropped to their central square and resized.
"""
import os
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageOps

import le
import train
from attacks import PROTECTIONS, Protection, publish
from train import CIFAR10_CLASSES, DATASETS, SHAPES, divided
from unet import BadInput
from studies.files import (IMAGES, channels_second, described, image_files, images_of, open_image,
                           pixels_of, read_arrays, writes_last)


# -- Folders ---------------------------------------------------------------------------------------

def spaced(n, count):
    """`count` of the places 0 to n - 1, evenly spaced: of a folder, which is in the order of its
    classes, some of each."""
    return [i * (n - 1) // max(1, count - 1) for i in range(count)]


def fitted_pixels(file, size):
    """An image file as a tensor (3, size, size) in [0, 1]: its central square, resized."""
    image = open_image(file).convert("RGB")
    return pixels_of(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))


def folder(root, size, classes=(), limit=0):
    """Images (N, 3, size, size) in [0, 1], their labels (N,) and files, from a folder a class.

    N is at most the limit, where there is one. Raises BadInput if there are fewer than two classes,
    or others than the given ones, or a file cannot be read.
    """
    found, left_out = image_files(root)
    files = [file for file in found if file.parent != Path(root)]
    names = [file.relative_to(root).parts[0] for file in files]
    left_out += [file for file in found if file.parent == Path(root)]
    if left_out:
        print(f"{root}: {len(left_out)} files that are no images of a class are left out: "
              f"{', '.join(map(str, left_out[:3]))}{' ...' * (len(left_out) > 3)}")
    if len(set(names)) < 2 or not set(names) <= set(classes or names):
        raise BadInput(f"{root}: expected two or more folders of images, a class each, "
                       f"{('named ' + ', '.join(classes)) if classes else ', '.join(IMAGES)}")
    places = spaced(len(files), min(len(files), limit or len(files)))
    images = torch.stack([fitted_pixels(files[i], size) for i in places])
    classes = classes or sorted(set(names))
    labels = torch.tensor([classes.index(names[i]) for i in places])
    return images, labels, [files[i] for i in places]


def classes_in(*folders):
    """The names of the classes that have a folder in one of these."""
    return sorted({file.relative_to(root).parts[0] for root in folders
                   for file in image_files(root)[0] if file.parent != root})


def without_classes(root, size, limit):
    """All images (N, 3, size, size) under a folder, and labels (N,) of one class."""
    files = image_files(root)[0]
    if not files:
        raise BadInput(f"{root}: no images; expected {', '.join(IMAGES)}")
    places = spaced(len(files), min(len(files), limit or len(files)))
    images = torch.stack([fitted_pixels(files[i], size) for i in places])
    return images, torch.zeros(len(images), dtype=torch.long)


def in_proportion(counts, n):
    """Counts of these proportions, one at least of each, into which n images can be divided."""
    whole = sum(counts.values())
    found = {name: max(1, count * n // whole) for name, count in counts.items()}
    largest = max(found, key=found.get)                    # it gives what the smallest were given
    found[largest] = max(1, found[largest] - max(0, sum(found.values()) - n))
    return found


def source(c, root):
    """(images, labels) to be divided, the class names, and the sets that the data bring along."""
    if root == "shapes":
        return train.shapes(sum(c.images.values()), c.seed, c.size), SHAPES, {}
    if root == "cifar10":
        pool, test = train.cifar10(c.root)
        return pool, CIFAR10_CLASSES, divided(*test, dict(test=min(c.images["test"], len(test[0]))))
    root = Path(root)
    if not {"train", "test"} <= set(os.listdir(root)):
        classes = classes_in(root)
        return folder(root, c.size)[:2], classes, {}
    classes = classes_in(root / "train", root / "test")
    test = folder(root / "test", c.size, classes, c.limit)[:2]
    return folder(root / "train", c.size, classes)[:2], classes, {"test": test}


def is_published(root):
    """Is it a folder of three sets, or four with the originals, of which one is protected?"""
    return all((Path(root) / name).is_dir() for name in ("protected", "unprotected", "test"))


def of_a_folder(c, root, published, unprotected, only_networks):
    """An entry of DATASETS: the sets in a folder, or of other data with published UEs."""
    if only_networks and not c.sampler["perceptual_weight"]:
        return {"unprotected": without_classes(root, c.size, c.limit)}, ("images",)
    if is_published(root):
        sets, classes = published_folders(Path(root), c.size, c.limit)
        counts = {name: c.images[name] for name in ("unprotected", "validation")}
        images, labels = sets.pop("unprotected")
    else:
        (images, labels), classes, sets = source(c, root)
        if published:
            images, labels = add_published(c, sets, images, labels, classes, published, unprotected)
        counts = {name: n for name, n in c.images.items() if name not in sets}
    if root not in ("shapes", "cifar10") or unprotected:
        counts = in_proportion(counts, len(labels))
        counts = {name: min(n, c.limit or n) for name, n in counts.items()}
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(c.seed))
    sets |= divided(images[order], labels[order], counts)
    if min(len(labels) for _, labels in sets.values()) < 2 and not only_networks:
        raise BadInput(f"--data {root}: expected two or more images in each of the four sets")
    return sets, classes


# -- What somebody else has protected --------------------------------------------------------------

def theirs(images, labels, victim, *, epsilon, seed, report, ue):
    """The protection `published`: the unlearnable examples that are there already."""
    return ue


def enter(ue):
    """Make these UEs what the protection `published` gives."""
    PROTECTIONS["published"] = Protection(partial(theirs, ue=ue))


def published_folders(root, size, limit):
    """The sets in such a folder and the class names. Without `original`, whose names are those of
    `protected`, the protected images themselves are unknown: a set that is None."""
    classes = classes_in(root / "protected", root / "unprotected", root / "test")
    sets = {"unprotected": folder(root / "unprotected", size, classes)[:2],
            "test": folder(root / "test", size, classes, limit)[:2]}
    ue, labels, files = folder(root / "protected", size, classes, limit)
    enter(ue)
    sets["protected"] = ue, labels
    if (root / "original").is_dir():
        originals, _, others = folder(root / "original", size, classes, limit)
        here = [file.relative_to(root / "protected").with_suffix("") for file in files]
        there = [file.relative_to(root / "original").with_suffix("") for file in others]
        if here != there:
            raise BadInput(f"{root}/original: expected the names of protected; they differ in "
                           f"{min(set(here) ^ set(there), default='how many have one name')}")
        sets["protected"] = originals, labels
    return sets, classes


def add_published(c, sets, images, labels, classes, published, unprotected):
    """Enter the published UEs, and their originals, of the training set, among the sets; returns
    the images and labels from which the other sets may be taken."""
    ue, places, left = published_images(c, Path(published), images, labels)
    own = labels[places]
    if len(own.unique()) < 2:
        raise BadInput(f"--published {published}: its {len(ue)} images are of one class")
    enter(ue)
    sets["protected"] = images[places], own
    if unprotected == "test":
        if "test" not in sets:
            raise BadInput(f"--unprotected test: {c.data} has no test set; expected a folder")
        return all_tests(c, sets)
    if unprotected:
        return folder(unprotected, c.size, classes)[:2]
    known, every = len(labels[left].unique()), len(labels.unique())
    if known < every:
        raise BadInput(f"--published {published}: the {len(left)} training images that are not "
                       f"protected are of {known} of {every} classes; expected --unprotected "
                       "FOLDER of classes, or --unprotected test beside it")
    return images[left], labels[left]


def all_tests(c, sets):
    """All test images there are, which are divided among the other sets."""
    given = sets.pop("test")
    return train.cifar10(c.root)[1] if c.data == "cifar10" else given


def published_images(c, path, images, labels):
    """The UEs (N, 3, H, W) that --published holds: a folder of 0.png, 1.png, ...; an array of
    images; or one of perturbations, an image's or a class's each. Then the places in the training
    set of their originals, the first, or, where noise is of a class, some of each; and the places
    of those that are not protected.

    Raises BadInput if it is none of these, with what was found.
    """
    classes = 1 + int(labels.max())
    arrays = {"": numbered(path, images.shape[1:])} if path.is_dir() else read_arrays(path)
    for array in arrays.values():
        noise = perturbation_of(array, writes_last(path))
        ue = images_of(array, writes_last(path)) if noise is None else noise
        if ue is not None and ue.shape[1:] == images.shape[1:]:
            break
    else:
        found = "; ".join(f"{key} {described(array)}".strip() for key, array in arrays.items())
        raise BadInput(f"{path}: {found}; expected images of {tuple(images.shape[1:])} in 8 bits "
                       "or [0, 1], or their perturbation, of less than 0.25 in these units")
    class_wise = noise is not None and len(noise) == classes
    counts = c.images if c.data == "cifar10" else in_proportion(c.images, len(images))
    n = counts["protected"] if class_wise else len(ue)
    if n > len(images):
        raise BadInput(f"{path}: {n} images, but the training set of {c.data} has {len(images)}")
    protected = spaced(len(images), n) if class_wise else range(n)
    left = sorted(set(range(len(images))) - set(protected))
    places = [protected[i] for i in spaced(n, min(n, c.limit or n))]
    own = images[places]
    if noise is not None:
        return publish(own, noise[labels[places] if class_wise else places]), places, left
    ue = ue[places]
    apart, strangers = [(ue - other).abs().mean() for other in (own, own.roll(1, 0))]
    if n > 1 and apart > 0.7 * strangers:
        raise BadInput(f"{path}: its images are not the first of the training set of {c.data}, in "
                       f"its order: they differ by {255 * apart:.0f}/255 on average")
    return ue, places, left


def numbered(path, shape):
    """The images (N, 3, H, W) of this shape in a folder of 0.png, 1.png, ..., as an array."""
    files = {file.stem: file for file in image_files(path)[0] if file.parent == path}
    places = [str(i) for i in range(len(files))]
    if not files or set(files) != set(places):
        raise BadInput(f"{path}: expected 0.png, 1.png, ..., in the training set's order; "
                       f"there is no {min(set(places) - set(files), default=0)}")
    found = [pixels_of(open_image(files[i])) for i in places]
    for i, pixels in zip(places, found):
        if pixels.shape != shape:
            raise BadInput(f"{files[i]}: {tuple(pixels.shape)}, expected the size of the "
                           f"originals, {tuple(shape)}")
    return torch.stack(found).numpy()


def perturbation_of(array, last):
    """The perturbation (M, 3, H, W) that an array holds, in [0, 1] units or as int8; else None."""
    x = channels_second(array, last)
    if x is None or not (x.dtype == torch.int8 or x.is_floating_point()):
        return None
    x = x / 255 if x.dtype == torch.int8 else x.float()
    return x if x.abs().max() < 0.25 else None


def without_originals(arguments):
    """The story where nobody knows the protected images: what UEs and LEs teach, in a row."""
    with le.one_line_errors("studies.own"):
        stage, c = train.parse(arguments)
        if set(c.protections) != {"published"}:
            raise BadInput(f"--protections {','.join(c.protections)}: there are no originals; "
                           "expected published alone")
        train.claim(c)
        sets, _ = train.load_data(c)
        distance = train.train_vgg(c, sets)
        net = train.train_ddpm(c, sets)
        if stage == "ddpm":
            return
        ue, _ = sets["protected"]
        learnable = train.make_learnable(c, "published", ue, net, distance)
        kind = train.kind_of(c, "published")
        row = dict(protection="published",
                   ue=train.train_victim(c, kind, "published-ue", ue, sets),
                   le=train.train_victim(c, kind, "published-le", learnable, sets))
        print(f"\n{train.table([row])}")


# -- Command line ----------------------------------------------------------------------------------

def parser_of(program, description):
    parser = le.Parser(prog=program, description=description, allow_abbrev=False, add_help=False)
    for option in ("data", "published", "unprotected", "out"):
        parser.add_argument(f"--{option}", default="")
    return parser


@contextmanager
def entries(argv):
    """Within, DATASETS and PROTECTIONS know what these arguments of `studies.own` name; gives the
    arguments of `train.py` that go with them. Raises BadInput, naming an option."""
    options, others = parser_of("studies.own", "").parse_known_args(argv)
    data = options.data or "shapes"
    before = dict(DATASETS), dict(PROTECTIONS)
    known = data in DATASETS and not (data == "shapes" and Path("shapes").is_dir() and False)
    if not known and not Path(data).is_dir():
        raise BadInput(f"--data {data}: expected shapes, cifar10 or an existing folder")
    protected = not known and is_published(data)
    if options.published and protected:
        raise BadInput("--published: expected a --data that is not protected yet")
    if options.unprotected and not options.published:
        raise BadInput("--unprotected: expected --published beside it")
    name = data if known else str(Path(data).resolve())
    if not known or options.published:
        DATASETS[name] = partial(of_a_folder, root=data, published=options.published,
                                 unprotected=options.unprotected,
                                 only_networks=others[:1] == ["ddpm"])
    arguments = [*others, "--data", name]
    if options.published or protected:
        PROTECTIONS["published"] = Protection(theirs)
        if not any(word.partition("=")[0] == "--protections" for word in others):
            arguments += ["--protections", "published"]
    if options.out:
        arguments += ["--out", options.out]
    elif options.published:
        run = train.parse(arguments)[1].run
        arguments += ["--out", f"{run}-{Path(options.published).stem}"]
    try:
        yield arguments
    finally:
        for entries_now, entries_then in zip((DATASETS, PROTECTIONS), before):
            entries_now.clear()
            entries_now.update(entries_then)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        sys.exit()
    with le.one_line_errors("studies.own"):
        with entries(argv) as arguments:
            data = Path(parser_of("studies.own", "").parse_known_args(argv)[0].data)
            if is_published(data) and not (data / "original").is_dir():
                without_originals(arguments)
            else:
                train.main(arguments)


if __name__ == "__main__":
    main()
