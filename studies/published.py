"""Unlearnable examples that somebody else has made, as the protection `published`: those in a file,
of the first images of the training set, or those in a folder, beside their originals if these are
known."""
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import le
import train
from attacks import PROTECTIONS, Protection, publish
from unet import BadInput, as_bytes
from studies.files import (all_described, channels_second, image_files, images_of, open_image,
                           pixels_of, read_arrays, writes_last)
from studies.folders import (classes_in, divisions, folder, in_proportion, say_divisions,
                             spaced)


def theirs(images, labels, victim, *, epsilon, seed, report, ue):
    """The protection `published`: the unlearnable examples that are there already."""
    return dict(images=as_bytes(ue).cpu())


def enter(ue):
    """Make these UEs what the protection `published` gives."""
    PROTECTIONS["published"] = Protection(partial(theirs, ue=ue))


# -- In folders ------------------------------------------------------------------------------------

def is_published(root):
    """Is it a folder of three sets, or more, of which one is protected?"""
    return "protected" in divisions(root)


def has_originals(root):
    return "original" in divisions(root)


def published_folders(root, size, limit):
    """The sets in such a folder, of which `unprotected` is still to be divided, and the class
    names. Without `original` the UEs stand where the protected images would."""
    known = divisions(root)
    say_divisions(root, known)
    classes = sorted({name for path in known.values() for name in classes_in(path)})
    sets = {"unprotected": folder(known["unprotected"], size, classes)[:2]}
    for name in ("validation", "test"):
        if name in known:
            sets[name] = folder(known[name], size, classes, limit)[:2]
    ue, labels, files = folder(known["protected"], size, classes, limit)
    enter(ue)
    sets["protected"] = ue, labels
    if "original" not in known:
        print(f"{root}: no originals, so nobody knows the protected images but as UEs")
        return sets, classes
    originals, _, others = folder(known["original"], size, classes)
    places = pairs(files, known["protected"], others, known["original"])
    wrong = out_of_place(ue, places, originals)
    if wrong:
        raise BadInput(f"{files[wrong[0]]}: shows what {others[wrong[1]]} does, not "
                       f"{others[places[wrong[0]]]}, which has its name")
    sets["protected"] = originals[places], labels
    return sets, classes


def pairs(files, protected, others, original):
    """The place of each protected file's original among the others: the file of its name, of its
    name without .png, as an LE of a.jpg is a.jpg.png, or of its name with another ending."""
    there = {file.relative_to(original): place for place, file in enumerate(others)}
    endings = {}
    for name, place in there.items():
        endings.setdefault(name.with_suffix(""), []).append(place)
    places = []
    for file in files:
        name = file.relative_to(protected)
        base = name.with_suffix("")
        found = [there[known] for known in (name, base) if known in there][:1]
        found = found or endings.get(base, [])
        if len(found) != 1:
            raise BadInput(f"{file}: {len(found)} files in {original} have its name; expected one, "
                           f"such as {original / name}")
        places += found
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise BadInput(f"{protected}: two files are of {others[twice]}; expected one of each")
    return places


# -- In the order of the training set --------------------------------------------------------------

def looks(images):
    """What images look like from afar, at any brightness and contrast: (N, 192)."""
    small = F.adaptive_avg_pool2d(images, 8).flatten(1)
    small = small - small.mean(1, keepdim=True)
    return small / (small.std(1, keepdim=True) + 0.02)


def out_of_place(ue, places, images):
    """The first UE that looks like another image than that of its place, and the other's place;
    None if all are in place, or so few are not that it may be chance."""
    theirs_look, look, places = looks(ue), looks(images), torch.as_tensor(places)
    own = (theirs_look - look[places]).abs().mean(1)
    strangers = (theirs_look - look[places].roll(max(1, len(ue) // 2), 0)).abs().mean(1)
    neighbours = (theirs_look - look[(places + 1) % len(look)]).abs().mean(1)
    suspicious = (own > 0.5 * torch.minimum(strangers, neighbours)).nonzero()[:, 0]
    wrong, looked_at = [], suspicious[:200].tolist()
    for i in looked_at:
        apart = (look - theirs_look[i]).abs().mean(1)
        if apart.min() < 0.7 * own[i]:
            wrong.append((i, apart.argmin().item()))
    certain = len(wrong) > 0.1 * len(looked_at) and len(suspicious) > 0.01 * len(ue)
    return wrong[0] if certain else None


def add_published(c, sets, images, labels, published):
    """Enter the published UEs, and their originals, of the training set, among the sets; returns
    the places of the training images that are not protected."""
    ue, places, left = published_images(c, Path(published), images, labels)
    own = labels[places]
    if len(own.unique()) < 2:
        raise BadInput(f"--published {published}: its {len(ue)} images are of one class")
    enter(ue)
    sets["protected"] = images[places], own
    return left


def check_classes_left(published, labels, left):
    """Raise BadInput where no image of some class is left for the U-Net."""
    known, every = len(labels[left].unique()), len(labels.unique())
    if known < every:
        raise BadInput(f"--published {published}: the {len(left)} training images that are not "
                       f"protected are of {known} of {every} classes; expected --unprotected "
                       "FOLDER of classes, or --unprotected test beside it")


def what_fits(path, shape):
    """(key, UEs or None, perturbation or None) of the array in a file, or of the images in a
    folder, that fits images of this shape. Raises BadInput, with what was found, unless one does.
    """
    arrays = {"": numbered(path, shape)} if path.is_dir() else read_arrays(path)
    fits = []
    for key, array in arrays.items():
        noise = perturbation_of(array, writes_last(path))
        ue = images_of(array, writes_last(path)) if noise is None else None
        found = ue if noise is None else noise
        if found is not None and found.shape[1:] == shape:
            fits.append((key, ue, noise))
    if len(fits) != 1:
        number = f"{len(fits)} arrays that could be it" if fits else "nothing that fits"
        raise BadInput(f"{path}: {number} in {all_described(arrays)}; expected images of "
                       f"{tuple(shape)} in 8 bits or [0, 1], or their perturbation, of less than "
                       "0.25 in these units")
    return fits[0]


def published_images(c, path, images, labels):
    """The UEs (N, 3, H, W) that --published holds: a folder of 0.png, 1.png, ...; an array of
    images; or one of perturbations, an image's or a class's each. Then the places in the training
    set of their originals, the first, or, where noise is of a class, some of each; and the places
    of those that are not protected.

    Raises BadInput if it is none of these, or if an image is not in its place.
    """
    key, ue, noise = what_fits(path, images.shape[1:])
    given, classes = len(ue if noise is None else noise), 1 + int(labels.max())
    class_wise = noise is not None and given == classes
    counts = c.images if c.data == "cifar10" else in_proportion(c.images, len(images))
    n = counts["protected"] if class_wise else given
    if n > len(images):
        raise BadInput(f"{path}: {n} images, but the training set of {c.data} has {len(images)}")
    whose = f"the {classes} classes" if class_wise else f"the first {n} training images, in order"
    kind = "UEs" if noise is None else "perturbations"
    print(f"{f'{path}: {key}'.rstrip(': ')}: {given} {kind}, of {whose}")
    protected = spaced(len(images), n) if class_wise else range(n)
    left = sorted(set(range(len(images))) - set(protected))
    if noise is None:
        check_order(c, path, ue, images)
    places = [protected[i] for i in spaced(n, min(n, c.limit or n))]
    if noise is not None:
        own = noise[labels[places] if class_wise else places]
        return publish(images[places], own), places, left
    return ue[places], places, left


def check_order(c, path, ue, images):
    """Raise BadInput, naming the first of them, where UEs are not of the first training images."""
    wrong = out_of_place(ue, range(len(ue)), images)
    if wrong:
        raise BadInput(f"{path}: image {wrong[0]}, the first out of place, looks like training "
                       f"image {wrong[1]}; expected the first of {c.data}, in its order")
    own = images[:len(ue)]
    apart, strangers = [(ue - other).abs().mean() for other in (own, own.roll(1, 0))]
    if len(ue) > 1 and apart > 0.7 * strangers:
        raise BadInput(f"{path}: its images are not the first of the training set of {c.data}, in "
                       f"its order: they differ by {255 * apart:.0f}/255 on average")


def numbered(path, shape):
    """The images (N, 3, H, W) of this shape in a folder of 0.png, 1.png, ..., as an array."""
    files = [file for file in image_files(path)[0] if file.parent == path]
    by_number = {int(file.stem): file for file in files if file.stem.isdecimal()}
    missing = set(range(len(files))) - set(by_number)
    if not files or missing:
        raise BadInput(f"{path}: expected 0.png, 1.png, ..., in the training set's order; of "
                       f"{len(files)} images none is number {min(missing, default=0)}")
    found = []
    for _, file in sorted(by_number.items()):
        found.append(pixels_of(open_image(file)))
        if found[-1].shape != shape:
            raise BadInput(f"{file}: {tuple(found[-1].shape)}, expected the size of the "
                           f"originals, {tuple(shape)}")
    return torch.stack(found).numpy()


def perturbation_of(array, last):
    """The perturbation (M, 3, H, W) that an array holds, in [0, 1] units or as int8; else None."""
    x = channels_second(array, last)
    if x is None or not (x.dtype == torch.int8 or x.is_floating_point()):
        return None
    x = x / 255 if x.dtype == torch.int8 else x.float()
    return x if x.abs().max() < 0.25 else None


# -- Where nobody knows the originals --------------------------------------------------------------

def without_originals(arguments):
    """The story where nobody knows the protected images: what UEs and LEs teach, in a row."""
    with le.one_line_errors("studies.own"):
        stage, c = train.parse(arguments)
        if set(c.protections) != {"published"}:
            raise BadInput(f"--protections {','.join(c.protections)}: there are no originals; "
                           "expected published alone")
        sets, _ = train.load_data(c)
        train.claim(c)
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
