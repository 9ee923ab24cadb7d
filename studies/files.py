"""Files that people bring: images that Pillow reads, and arrays (.npy, .npz, .pt, .pth).

Everything here raises BadInput, in one line that names the file, where it cannot be used.
"""
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from unet import BadInput, as_float, read

# -- Image files -----------------------------------------------------------------------------------

IMAGES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff",
          ".ppm", ".pgm")


def refuse(error):
    raise error


def image_files(folder):
    """The files under a folder that are images by their names; and the other files and the links to
    folders, which are not followed; sorted. What begins with a dot is of a notebook or of a file
    system, and does not count. Raises OSError where a folder cannot be read."""
    images, others = [], []
    for here, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if name[0] != "."]
        others += [Path(here, name) for name in folders if Path(here, name).is_symlink()]
        for path in [Path(here, name) for name in names if name[0] != "."]:
            is_image = path.suffix.lower() in IMAGES and path.is_file()
            (images if is_image else others).append(path)
    return sorted(images), sorted(others)


def open_image(path):
    """The image in a file, upright (EXIF), in mode RGB, RGBA, L or LA; the first of several frames.

    Raises BadInput if it cannot be read whole, is far too large, or has not 8 bits a channel.
    """
    try:
        image = Image.open(path)
        if ";16" in str(image.tile):                       # Pillow would cut an RGB one to 8
            raise ValueError("16 bits a channel, expected 8")
        image = ImageOps.exif_transpose(image)
        if image.mode == "P" or "transparency" in image.info:
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    except Exception as error:                             # decoders raise whatever they like
        raise BadInput(f"{path}: not a readable image ({error})") from None
    if image.mode not in ("RGB", "RGBA", "L", "LA"):
        raise BadInput(f"{path}: mode {image.mode}; expected RGB or grey of 8 bits, or a palette")
    return image


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


def are_last(array, last):
    """Whether the channels of images (N, ., ., .) are the last axis; `last` where both could be."""
    return array.shape[3] == 3 and (last or array.shape[1] != 3)


def channels_second(array, last):
    """An array (N, 3, H, W) or (N, H, W, 3) as a tensor (N, 3, H, W), None if it is neither."""
    if array.ndim != 4 or not array.size or 3 not in (array.shape[1], array.shape[3]):
        return None
    return torch.from_numpy(np.moveaxis(array, 3, 1) if are_last(array, last) else array)


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
