"""Your own images, and unlearnable examples that somebody else has made: the story on these.

    python -m studies.own --data my_photos
    python -m studies.own ddpm --data my_photos
    python -m studies.own --data cifar10 --root cifar-10-binary.tar.gz --published perturbation.pt

--data DIR         a folder of class folders with images; or with train, test and perhaps validation
                   of these, by their usual names; or with protected, unprotected, test and perhaps
                   original and validation. Only the networks (ddpm) need no classes where the
                   sampler needs no perceptual distance, as by default
--published FILE   UEs, or perturbations, of the first training images: .pt, .npy, .npz, or a folder
                   of 0.png, 1.png, ...; their row of the table is `published`
--unprotected DIR  class folders from which the U-Net learns, where all training images are
                   protected; or `test`, the test images
--root FILE        with --data cifar10: the archive, the folder that was in it, or a .zip of that

All other options are those of `train.py`. Images are cropped to their central square and resized;
of several frames the first is taken. Of a folder, which is divided in proportion to --images, all
images are used, each class divided alike.
"""
import io
import os
import sys
import tarfile
import tempfile
import zipfile
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace

if not __package__:
    print("expected `python -m studies.own`, from the project's folder", file=sys.stderr)
    sys.exit(2)

import torch

import le
import train
from attacks import PROTECTIONS, Protection
from train import CIFAR10_CLASSES, CIFAR10_FILES, DATASETS, SHAPES, divided
from unet import BadInput, said
from studies.files import listed
from studies.folders import (check_sizes, class_of, classes_in, divided_by_class, divisions, folder,
                             in_classes, say_divisions, say_what_is_missing, without_classes)
from studies.published import (add_published, check_classes_left, has_originals, is_published,
                               published_folders, theirs, without_originals)

BUILT_IN = ("shapes", "cifar10")


# -- CIFAR-10, unpacked or in a zip ----------------------------------------------------------------

def unpacked(root):
    """{name: bytes} of the files of the official archive that are in a folder or in a zip."""
    found = {}
    if root.is_dir():
        for path in sorted(root.rglob("*")):
            if path.name in CIFAR10_FILES and path.is_file():
                found[path.name] = path.read_bytes()
        return found
    try:
        with zipfile.ZipFile(root) as archive:
            for member in archive.infolist():
                name = Path(member.filename).name
                if name in CIFAR10_FILES and member.file_size < 1e8:
                    found[name] = archive.read(member)
    except Exception as error:                             # zipfile and zlib raise several kinds
        raise BadInput(f"--root {root}: not a whole .zip ({said(error)})") from None
    return found


@contextmanager
def as_archive(root):
    """Within, a path to a .tar of what is in a folder or in a zip; or the path as it is."""
    if not (Path(root).is_dir() or zipfile.is_zipfile(root)):
        yield root
        return
    files = unpacked(Path(root))
    missing = [name for name in CIFAR10_FILES if name not in files]
    if missing:
        raise BadInput(f"--root {root}: without {listed(missing)}; expected the files of the "
                       "binary version, cifar-10-binary.tar.gz")
    with tempfile.TemporaryDirectory() as folder_for_it:
        path = Path(folder_for_it, "cifar-10.tar")
        with tarfile.open(path, "w") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        try:
            yield path
        except BadInput as error:
            raise BadInput(str(error).replace(str(path), str(root))) from None


def cifar10(root):
    """What `train.cifar10` reads, from an archive, a folder or a zip."""
    with as_archive(root) as archive:
        return train.cifar10(archive)


def photographs(c):
    """An entry of DATASETS: `train.photographs`, likewise."""
    with as_archive(c.root) as archive:
        return train.photographs(SimpleNamespace(**vars(c) | dict(root=archive)))


# -- Folders ---------------------------------------------------------------------------------------

def given_division(root, path, size, classes, limit):
    """(images, labels) of the validation or test images that a folder brings along; None, with a
    line that says so, where they lie in no folders of these classes."""
    names = {class_of(file, path) for file in in_classes(path)}
    if names & set(classes):
        return folder(path, size, classes, limit)[:2]
    there = listed(sorted(names)) or "none"
    print(f"{root}: {path.name} left out, as its folders, {there}, are no classes of the training "
          f"images: {listed(classes)}")
    return None


def source(c, root):
    """(images, labels) to be divided, the class names, and the sets that the data bring along."""
    if root == "shapes":
        return train.shapes(sum(c.images.values()), c.seed, c.size), SHAPES, {}
    if root == "cifar10":
        pool, test = cifar10(c.root)
        return pool, CIFAR10_CLASSES, divided(*test, dict(test=min(c.images["test"], len(test[0]))))
    known = divisions(root)
    say_divisions(root, known)
    pool = known.get("train", Path(root))
    images, labels, _ = folder(pool, c.size)
    classes, sets = classes_in(pool), {}
    for name in ("validation", "test"):
        if name in known:
            sets[name] = given_division(root, known[name], c.size, classes, c.limit)
    sets = {name: part for name, part in sets.items() if part}
    return (images, labels), classes, sets


def whose_for_the_unet(c, images, labels, classes, sets, left, published, unprotected):
    """(images, labels) from which the U-Net learns, beside UEs of the training images: those that
    are left, all test images, or a folder's."""
    if not unprotected:
        check_classes_left(published, labels, left)
        return images[left], labels[left]
    if unprotected != "test":
        return folder(unprotected, c.size, classes)[:2]
    if "test" not in sets:
        raise BadInput(f"--unprotected test: {c.data} has no test set; expected a folder")
    given = sets.pop("test")
    return cifar10(c.root)[1] if c.data == "cifar10" else given


def whole_sets(c, root, published, unprotected):
    """(images, labels) to be divided, the class names, and the sets that are there, those that are
    protected among them."""
    if root not in BUILT_IN and is_published(root):
        sets, classes = published_folders(Path(root), c.size, c.limit)
        return sets.pop("unprotected"), classes, sets
    (images, labels), classes, sets = source(c, root)
    if not published:
        return (images, labels), classes, sets
    left = add_published(c, sets, images, labels, published)
    pool = whose_for_the_unet(c, images, labels, classes, sets, left, published, unprotected)
    return pool, classes, sets


def require_classes(root):
    """Raise BadInput where the perceptual distance has no classes to learn."""
    known = divisions(root)
    if len(classes_in(known.get("unprotected", known.get("train", root)))) < 2:
        raise BadInput(f"--data {root}: expected two or more folders of images, a class each, for "
                       "the perceptual distance; or --sampler.perceptual_weight 0")


def of_a_folder(c, root, published, unprotected, only_networks):
    """An entry of DATASETS: the sets in a folder, or of other data with published UEs."""
    if only_networks and root not in BUILT_IN and not published:
        if not c.sampler["perceptual_weight"] or c.vgg_weights:
            return {"unprotected": without_classes(root, c.size, c.limit)}, ("images",)
        require_classes(root)
    (images, labels), classes, sets = whole_sets(c, root, published, unprotected)
    counts = {name: n for name, n in c.images.items() if name not in sets}
    if root in BUILT_IN and not unprotected:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(c.seed))
        sets |= divided(images[order], labels[order], counts)
    else:
        sets |= divided_by_class(images, labels, counts, c.seed, c.limit)
    if not c.limit:
        say_what_is_missing(root, sets, classes)
    if not only_networks:
        check_sizes(root, sets)
    return sets, classes


# -- Command line ----------------------------------------------------------------------------------

def options_of(argv):
    """The options that are of this file alone, and the other arguments."""
    parser = le.Parser(prog="studies.own", allow_abbrev=False, add_help=False)
    for option in ("data", "published", "unprotected", "out"):
        parser.add_argument(f"--{option}", default="")
    return parser.parse_known_args(argv)


def check(options, protected):
    """Raise BadInput where these options do not go together."""
    data = options.data
    if data not in DATASETS and not Path(data).is_dir():
        raise BadInput(f"--data {data}: expected {', '.join(DATASETS)} or an existing folder")
    if options.published and (protected or data in DATASETS and data not in BUILT_IN):
        raise BadInput("--published: expected a --data that is not protected yet, "
                       f"{', '.join(BUILT_IN)} or a folder")
    if options.published and not Path(options.published).exists():
        raise BadInput(f"--published {options.published}: no such file or folder")
    if options.unprotected and not options.published:
        raise BadInput("--unprotected: expected --published beside it")
    if options.unprotected not in ("", "test") and not Path(options.unprotected).is_dir():
        raise BadInput(f"--unprotected {options.unprotected}: expected test or a folder")


@contextmanager
def entries(argv):
    """Within, DATASETS and PROTECTIONS know what these arguments of `studies.own` name; gives the
    arguments of `train.py` that go with them. Raises BadInput, naming an option."""
    options, others = options_of(argv)
    if options.data in DATASETS and Path(options.data).is_dir():
        print(f"--data {options.data}: the built-in data; for the folder beside it, --data "
              f"{os.path.join('.', options.data)}")
    options.data = data = options.data or "shapes"
    protected = data not in DATASETS and Path(data).is_dir() and is_published(data)
    check(options, protected)
    before = dict(DATASETS), dict(PROTECTIONS)
    name = data if data in DATASETS else str(Path(data).resolve())
    if data not in DATASETS or options.published:
        DATASETS[name] = partial(of_a_folder, root=data, published=options.published,
                                 unprotected=options.unprotected,
                                 only_networks=others[:1] == ["ddpm"])
    elif data == "cifar10":
        DATASETS[name] = photographs
    arguments = [*others, "--data", name]
    if options.published or protected:
        PROTECTIONS["published"] = Protection(theirs)
        if not any(word.partition("=")[0] == "--protections" for word in others):
            arguments += ["--protections", "published"]
    try:
        if options.out:
            arguments += ["--out", options.out]
        elif options.published:
            with redirect_stdout(io.StringIO()):           # it says so again
                run = train.parse(arguments)[1].run
            arguments += ["--out", f"{run}-{Path(options.published).stem}"]
        yield arguments
    finally:
        for entries_now, entries_then in zip((DATASETS, PROTECTIONS), before):
            entries_now.clear()
            entries_now.update(entries_then)


def main(argv=None):
    given = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(given):
        print(__doc__)
        sys.exit()
    data = options_of(given)[0].data
    is_folder = data not in ("", *DATASETS)
    with le.one_line_errors("studies.own"):
        with entries(given) as arguments:
            if is_folder and is_published(data) and not has_originals(data):
                without_originals(arguments)
            elif argv is None:
                sys.argv[1:] = arguments                   # a command, which may use all cores
                train.main()
            else:
                train.main(arguments)


if __name__ == "__main__":
    main()
