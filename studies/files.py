"""Files that people bring: images that Pillow reads, and arrays (.npy, .npz, .pt, .pth).

Everything here raises BadInput, in one line that names the file, where it cannot be used.
"""
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from unet import BadInput, as_float, read


def listed(things, most=3):
    """The first of some things, as a text: "a, b, c ..."."""
    return ", ".join(map(str, things[:most])) + " ..." * (len(things) > most)


# -- Image files -----------------------------------------------------------------------------------

IMAGES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff",
          ".ppm", ".pgm")
# Modes that say the same in another form. Of the others (I, F, LAB) one would have to guess which
# value is black
SAME_IN = {"1": "L", "La": "LA", "CMYK": "RGB", "YCbCr": "RGB", "HSV": "RGB", "RGBX": "RGB",
           "RGBa": "RGBA"}


def refuse(error):
    raise error


def image_files(folder):
    """The files under a folder that are images by their names, and whatever else is there; sorted.

    Links to folders are followed, after all else, each folder once: a link to one that has been
    seen is among the others. What begins with a dot is of a notebook or of a file system, and does
    not count. Raises OSError where a folder cannot be read.
    """
    images, others, seen, waiting = [], [], set(), [Path(folder)]
    while waiting:
        for here, folders, names in os.walk(waiting.pop(0), onerror=refuse):
            if os.path.realpath(here) in seen:
                others.append(Path(here))
                folders.clear()
                continue
            seen.add(os.path.realpath(here))
            folders[:] = sorted(name for name in folders if name[0] != ".")
            waiting += [Path(here, name) for name in folders if Path(here, name).is_symlink()]
            for path in [Path(here, name) for name in names if name[0] != "."]:
                is_image = path.suffix.lower() in IMAGES and path.is_file()
                (images if is_image else others).append(path)
    return sorted(images), sorted(others)


def is_deep(image):
    """Whether an image has more than 8 bits a channel, which Pillow would cut to 8 in silence."""
    for codec, _, _, args in image.tile:
        if ";16" in str(args) or codec == "ppm" and args[1] > 255:
            return True
    return False


def open_image(path):
    """The image in a file, upright (EXIF), in mode RGB, RGBA, L or LA. Of several frames, whose
    number is info["frames"], it is the first.

    Raises BadInput if it cannot be read whole, is far too large, or has not 8 bits a channel.
    """
    try:
        image = Image.open(path)
        if is_deep(image):
            raise ValueError("16 bits a channel, expected 8")
        frames = getattr(image, "n_frames", 1)
        image = ImageOps.exif_transpose(image)
        if image.mode in ("P", "PA") or "transparency" in image.info:
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        elif image.mode in SAME_IN:
            if image.mode in ("CMYK", "YCbCr"):            # their profile is not one of RGB
                image.info.pop("icc_profile", None)
            image = image.convert(SAME_IN[image.mode])
    except Exception as error:                             # decoders raise whatever they like
        raise BadInput(f"{path}: not a readable image ({error})") from None
    if image.mode not in ("RGB", "RGBA", "L", "LA"):
        raise BadInput(f"{path}: mode {image.mode}; expected 8 bits a channel, in colour or grey")
    image.info["frames"] = frames
    return image


def say_frames(names):
    """Say of which files only a part is used."""
    if names:
        print(f"{len(names)} with several frames, of which the first is taken: {listed(names)}")


def pixels_of(image):
    """A Pillow image as a tensor (3, H, W) in [0, 1]."""
    return as_float(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))


# -- Arrays ----------------------------------------------------------------------------------------

ARRAYS = (".npy", ".npz", ".pt", ".pth")


def as_array(value):
    """A tensor or array as an array in this machine's byte order; bfloat16, which NumPy does not
    have, as float32."""
    if isinstance(value, torch.Tensor):
        value = value.detach().to_dense()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    array = np.asarray(value)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def read_arrays(path):
    """{key: array} of what is in a .npy, .npz, .pt or .pth file; "" is the key of a lone array.

    No file is allowed to run code. Raises BadInput.
    """
    try:
        if Path(path).suffix in (".pt", ".pth"):
            found = read(path)
        else:
            found = np.load(path, allow_pickle=False)
        if not isinstance(found, (dict, np.lib.npyio.NpzFile)):
            found = {"": found}
        return {str(key): as_array(value) for key, value in found.items()}
    except (BadInput, FileNotFoundError):
        raise
    except Exception as error:                             # numpy and zipfile raise many kinds
        raise BadInput(f"{path}: not a readable file of arrays ({type(error).__name__})") from None


def writes_last(path):
    """Where either axis could be the channels: NumPy's users write them last, torch's second."""
    return Path(path).suffix.startswith(".np")


def channel_axis(array, last):
    """Which axis of images (N, ., ., .) holds three channels, or one where none holds three: 1 or
    3, and that of `last` where both could; None if the array is no images."""
    if array.ndim != 4 or not array.size or array.dtype.kind not in "biuf":
        return None
    for count in (3, 1):
        for axis in ((3, 1) if last else (1, 3)):
            if array.shape[axis] == count:
                return axis
    return None


def channels_second(array, last):
    """An array of images (N, ., ., .), with three channels or one, as a tensor (N, 3, H, W), or
    None if it is none."""
    axis = channel_axis(array, last)
    if axis is None or array.dtype.itemsize > 8:           # torch has no longer numbers
        return None
    x = torch.from_numpy(np.moveaxis(array, axis, 1))
    return x.expand(-1, 3, -1, -1)


def images_of(array, last=True):
    """The images (N, 3, H, W) in [0, 1] that an array holds, 8-bit or in [0, 1]; else None."""
    x = channels_second(array, last)
    if x is None or not (x.dtype == torch.uint8 or x.is_floating_point()):
        return None
    if x.dtype == torch.uint8:
        return as_float(x)
    return x.float() if 0 <= x.min() <= x.max() <= 1 else None


def described(array):
    """What an array is, for a message: its type, its shape and its range."""
    if not array.size or array.dtype.kind not in "biuf":
        return f"{array.dtype}, {array.shape}"
    return f"{array.dtype}, {array.shape}, {array.min():.3g} to {array.max():.3g}"


def all_described(arrays):
    return "; ".join(f"{key} {described(array)}".strip() for key, array in arrays.items())
