"""Purify images of your own by the joint-conditional diffusion model.

    python -m studies.purify IN OUT --unet runs/shapes/ddpm.pt --perceptual runs/shapes/vgg.pt

IN and OUT are two folders, or an image and the .png to write, or two arrays (.npy, .npz or .pt, see
studies/arrays.py). Of a folder every image at any depth is purified, of any size, to a PNG of the
same place and name (a.jpg becomes a.jpg.png). What is in OUT already is kept, so an interrupted run
goes on; what cannot be read is named and skipped, and the exit code is 1. An array comes back with
its own type and axes.
"""
import argparse
import os
import sys
import tempfile
import zlib
from dataclasses import fields, replace
from pathlib import Path

import torch
from PIL import Image

import le
import unet
from le import BATCH, Progress, Sampler
from unet import BadInput, as_bytes, on_device
from studies import released
from studies.arrays import purify_any, purify_array
from studies.files import ARRAYS, IMAGES, image_files, open_image, pixels_of


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
        found[target] = file
    if left_out:
        print(f"{len(left_out)} that are not images, or links to folders, are left out: "
              f"{', '.join(map(str, left_out[:3]))}{' ...' * (len(left_out) > 3)}")
    if not found:
        raise BadInput(f"{source}: no images; expected {', '.join(IMAGES)}")
    return sorted((file, target) for target, file in found.items())


def is_whole(path):
    """Whether a file is an image that can be read to its end."""
    try:
        open_image(path)
        return True
    except BadInput:
        return False


def with_pixels(image, pixels):
    """A Pillow image with these colours (3, H, W) in [0, 1]; its alpha is kept, grey stays grey."""
    made = Image.fromarray(as_bytes(pixels).permute(1, 2, 0).numpy())
    if image.mode in ("L", "LA"):
        made = made.convert("L")
    if image.mode in ("RGBA", "LA"):
        made.putalpha(image.getchannel("A"))
    return made


def purify_folder(files, clean, seed):
    """Purify (image file, target) pairs that are not there yet; returns how many were not read.

    Images of one size are purified together, as many as are read at once.
    """
    todo = [(file, target) for file, target in files if not is_whole(target)]
    if len(todo) < len(files):
        print(f"{len(files) - len(todo)} of {len(files)} are there already and are kept")
    report, unread, waiting = Progress("purify"), 0, {}
    for done, (file, target) in enumerate(todo, 1):
        try:
            if len(os.fsencode(target.name)) > 255:
                raise BadInput(f"{file}: its name leaves no room for .png")
            image = open_image(file)
            waiting.setdefault(image.size, []).append((file, target, image))
        except BadInput as error:
            unread += 1
            print(f"\nskipped {error}", file=sys.stderr)
        pixels = sum(size[0] * size[1] * len(group) for size, group in waiting.items())
        if done == len(todo) or pixels >= BATCH * 32 ** 2:
            for group in waiting.values():
                purify_group(group, clean, seed)
            waiting = {}
            report(done, len(todo))
    return unread


def purify_group(group, clean, seed):
    """Purify (file, target, image) triples of one size."""
    # neither the order nor a restart changes an image's noise
    seeds = [zlib.crc32(f"{seed} ".encode() + os.fsencode(file.name)) for file, _, _ in group]
    made = clean(torch.stack([pixels_of(image) for _, _, image in group]), seeds)
    for (_, target, image), pixels in zip(group, made):
        target.parent.mkdir(parents=True, exist_ok=True)
        profile = image.info.get("icc_profile")
        with unet.whole(target) as partial:
            with_pixels(image, pixels).save(partial, "PNG", icc_profile=profile)


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
    if not 0 <= options.seed < 2 ** 31:
        raise BadInput(f"--seed {options.seed}: expected a number from 0 to 2 ** 31")
    if not options.unet:
        raise BadInput("--unet is missing; `python -m studies.own ddpm --data FOLDER`, your own "
                       "unprotected images in folders, makes one in runs/FOLDER")
    if sampler.perceptual_weight and not options.perceptual:
        raise BadInput("--perceptual is missing: the vgg.pt of a run, or VGG-16's weights; "
                       "--sampler photographs needs none")


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

        def clean(images, seeds):
            return purify_any(net, distance, images, sampler, seeds)
        unread = 0
        if options.source.is_dir():
            unread = purify_folder(pairs(options.source, options.out), clean, options.seed)
        elif options.out.exists():
            print(f"{options.out}: is there already and is kept")
        elif options.source.suffix in ARRAYS:
            settings = [sampler, net, distance]
            purify_array(options.source, options.out, clean, options.seed, settings)
        else:
            open_image(options.source)                     # raises where a folder would skip
            purify_folder([(options.source, options.out)], clean, options.seed)
        if unread:
            print(f"studies.purify: {unread} files could not be read; all others are in "
                  f"{options.out}", file=sys.stderr)
            sys.exit(1)


if __name__ == "__main__":
    main()
