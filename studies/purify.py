"""Purify images of your own by the joint-conditional diffusion model.

    python -m studies.purify IN OUT --unet runs/shapes/ddpm.pt --perceptual runs/shapes/vgg.pt

IN and OUT are two folders, or an image and the .png to write, or two arrays (.npy, .npz or .pt, see
studies/arrays.py). Of a folder every image at any depth is purified, of any size, to a PNG of the
same place and name (a.jpg becomes a.jpg.png). Of several frames, as in a GIF, the first is taken.
What is in OUT already is kept, so an interrupted run goes on, unless its source, the seed or the
settings are others than it says it was made of. What cannot be read is named and skipped, and the
exit code is 1. An array comes back with its own type and axes.
"""
import argparse
import json
import os
import sys
import tempfile
import zlib
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

if not __package__:
    print("expected `python -m studies.purify`, from the project's folder", file=sys.stderr)
    sys.exit(2)

import torch
from PIL import Image, PngImagePlugin

import le
import unet
from le import BATCH, Progress, Sampler
from train import hashes
from unet import BadInput, as_bytes, on_device
from studies import released
from studies.arrays import advance, changed, count_tiles, parts_from, purify_any, purify_array
from studies.files import ARRAYS, IMAGES, image_files, listed, open_image, pixels_of, say_frames


# -- Folders ---------------------------------------------------------------------------------------

def pairs(source, out):
    """(image file, where its LE goes) for every image under a folder; says what is left out."""
    found = {}
    images, left_out = image_files(source)
    for file in images:
        name = file.name if file.suffix == ".png" else f"{file.name}.png"
        target = (out / file.relative_to(source)).with_name(name)
        if target in found:
            raise BadInput(f"{file} and {found[target]} would both become {target}")
        if os.path.isdir(target):
            raise BadInput(f"{target}: a folder, where the LE of {file} is to be written")
        if file.resolve().is_relative_to(out.resolve()):
            raise BadInput(f"{out}: expected a place to which no link leads, as to {file}")
        found[target] = file
    if left_out:
        print(f"{len(left_out)} that are not images, or links to folders that have been seen, are "
              f"left out: {listed(left_out)}")
    if not found:
        raise BadInput(f"{source}: no images; expected {', '.join(IMAGES)}")
    return sorted((file, target) for target, file in found.items())


def made_of(target):
    """{part: hash} of what an LE says that it was made of, {} if it does not; None if there is none
    that can be read to its end."""
    try:
        return parts_from(open_image(target).info.get("made of"))
    except BadInput:
        return None


def with_source(parts, file):
    """What an LE of this file is made of."""
    return parts | dict(source=hashes(dict(source=Path(file)))["source"])


def left_to_do(files, parts):
    """Those (image file, target) pairs whose LE is not there, or was made of something else; says
    what is kept, and why the others are made again."""
    todo, reasons, silent = [], {}, 0
    for file, target in files:
        before = made_of(target)
        why = changed(before or {}, with_source(parts, file))
        if before is None or why:
            todo.append((file, target))
            reasons |= dict.fromkeys(why, 1)
        silent += before == {}
    if len(todo) < len(files):
        unknown = f"; {silent} do not say what they were made of" if silent else ""
        print(f"{len(files) - len(todo)} of {len(files)} are there already and are kept{unknown}")
    if reasons:
        print(f"made again where {listed(list(reasons))} changed since")
    return todo


def with_pixels(image, pixels):
    """A Pillow image with these colours (3, H, W) in [0, 1]; its alpha is kept, grey stays grey."""
    made = Image.fromarray(as_bytes(pixels).permute(1, 2, 0).numpy())
    if image.mode in ("L", "LA"):
        made = made.convert("L")
    if image.mode in ("RGBA", "LA"):
        made.putalpha(image.getchannel("A"))
    return made


def tiles_of(file, unit):
    """How many tiles an image file has; 1 where it cannot be read, which is said later."""
    try:
        with Image.open(file) as image:
            return count_tiles(*image.size, unit)
    except Exception:                                      # decoders raise whatever they like
        return 1


def purify_folder(files, clean, parts, unit):
    """Purify (image file, target) pairs that are not there yet; returns how many were not read.

    Images of one size are purified together, as many as are read at once.
    """
    todo = left_to_do(files, parts)
    tiles = [tiles_of(file, unit) for file, _ in todo]
    report, unread, waiting, frames, before = Progress("purify, in tiles"), 0, {}, [], 0
    for place, (file, target) in enumerate(todo):
        try:
            if len(os.fsencode(target.name)) > 255:
                raise BadInput(f"{file}: its name leaves no room for .png")
            image = open_image(file)
            waiting.setdefault(image.size, []).append((file, target, image))
            frames += [file] * (image.info["frames"] > 1)
        except BadInput as error:
            unread += 1
            print(f"\nskipped {error}", file=sys.stderr)
        pixels = sum(size[0] * size[1] * len(group) for size, group in waiting.items())
        if place == len(todo) - 1 or pixels >= BATCH * 32 ** 2:
            for size, group in waiting.items():
                so_far = partial(advance, report, before, sum(tiles))
                purify_group(group, partial(clean, report=so_far), parts)
                before += len(group) * count_tiles(*size, unit)
            waiting, before = {}, sum(tiles[:place + 1])
    if unread:
        report(sum(tiles), sum(tiles))
    say_frames(frames)
    return unread


def purify_group(group, clean, parts):
    """Purify (file, target, image) triples of one size."""
    # neither the order nor a restart changes an image's noise
    texts = [f"{parts['seed']} ".encode() + os.fsencode(file.name) for file, _, _ in group]
    images = torch.stack([pixels_of(image) for _, _, image in group])
    made = clean(images, [zlib.crc32(text) for text in texts])
    for (file, target, image), pixels in zip(group, made):
        target.parent.mkdir(parents=True, exist_ok=True)
        profile, note = image.info.get("icc_profile"), PngImagePlugin.PngInfo()
        note.add_text("made of", json.dumps(with_source(parts, file)))
        with unet.whole(target) as partial_file:
            with_pixels(image, pixels).save(partial_file, "PNG", icc_profile=profile, pnginfo=note)


# -- Command line ----------------------------------------------------------------------------------

def parse(argv):
    parser = le.Parser(prog="studies.purify", description=__doc__, allow_abbrev=False,
                       formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--unet", metavar="FILE", help="of `train.py ddpm`, or ddpm-cifar10-32")
    parser.add_argument("--perceptual", metavar="FILE", help="of `train.py ddpm`, or VGG-16")
    parser.add_argument("--lpips", metavar="FILE", help="LPIPS's linear layers for VGG-16")
    parser.add_argument("--download", action="store_true", help="fetch those two to these places")
    parser.add_argument("--key", action="append", default=[], metavar="NAME",
                        help="purify this array of the file; may be given again")
    parser.add_argument("--seed", type=int, default=0, metavar="", help="default 0")
    parser.add_argument("--sampler", choices=le.SAMPLERS, default="drawings",
                        help="default drawings")
    for option in fields(Sampler):
        parser.add_argument(f"--{option.name}", type=option.type, metavar="",
                            help=f"default that of --sampler, such as {option.default}")
    return parser.parse_args(argv)


def check(options, sampler):
    """Raise BadInput where what the options name cannot be used."""
    source, out = options.source, options.out
    if not source.exists():
        raise BadInput(f"{source}: no such file or folder")
    if source.resolve() in (out.resolve(), *out.resolve().parents):
        raise BadInput(f"{out}: expected a place outside {source}")
    fits = not out.is_file()
    if source.is_file():
        array = source.suffix in ARRAYS
        image = source.suffix.lower() in IMAGES
        fits = not out.is_dir() and (array and out.suffix == source.suffix or
                                     image and out.suffix == ".png")
    if not fits:
        raise BadInput(f"{source} {out}: expected two folders, an image and a .png, or two files "
                       f"that both end in {', '.join(ARRAYS)}")
    if options.key and not (source.is_file() and source.suffix in ARRAYS):
        raise BadInput(f"--key {options.key[0]}: expected a file of arrays, not {source}")
    if not 0 <= options.seed < 2 ** 31:
        raise BadInput(f"--seed {options.seed}: expected a number from 0 to 2 ** 31")
    if not options.unet:
        raise BadInput("--unet is missing; `python -m studies.own ddpm --data FOLDER`, of your own "
                       "unprotected images, makes one in runs/FOLDER")
    if sampler.perceptual_weight and not options.perceptual:
        raise BadInput("--perceptual is missing: the vgg.pt of a run, or VGG-16's weights; "
                       "--sampler photographs needs none")


def purify_on_device(net, distance, sampler, images, seeds, report):
    return purify_any(net, distance, images, sampler, seeds, report=report)


def main(argv=None):
    options = parse(argv)
    with le.one_line_errors("studies.purify"):
        given = {option.name: getattr(options, option.name) for option in fields(Sampler)}
        given = {name: value for name, value in given.items() if value is not None}
        sampler = replace(le.SAMPLERS[options.sampler], **given)
        check(options, sampler)
        if options.download:
            released.download(released.VGG16, options.perceptual)
            released.download(released.LPIPS, options.lpips)
        net, distance = on_device(released.any_unet(options.unet)), None
        if sampler.perceptual_weight:
            distance = on_device(released.any_distance(options.perceptual, options.lpips))
        folder = options.out if options.source.is_dir() else options.out.parent
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()         # look before the work
        clean = partial(purify_on_device, net, distance, sampler)
        parts = hashes(dict(code=purify_any, sampler=sampler, unet=net, perceptual=distance))
        parts |= dict(seed=options.seed, Python=list(sys.version_info[:2]))
        unread = 0
        if options.source.is_dir():
            unread = purify_folder(pairs(options.source, options.out), clean, parts, net.multiple)
        elif options.source.suffix in ARRAYS:
            purify_array(options.source, options.out, clean, parts, net.multiple, options.key)
        else:
            open_image(options.source)                     # raises where a folder would skip
            purify_folder([(options.source, options.out)], clean, parts, net.multiple)
        if unread:
            print(f"studies.purify: {unread} files could not be read; all others are in "
                  f"{options.out}", file=sys.stderr)
            sys.exit(1)


if __name__ == "__main__":
    main()
