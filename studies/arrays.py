"""Arrays of images, of any size and in files: .npy, .npz and .pt. Images are what looks like them,
whatever its key: 8-bit N x H x W x 3, N x 3 x H x W, or grey N x H x W, or in [0, 1] with channels.
What else is in a file is copied."""
import io
import time
from dataclasses import replace

import numpy as np
import torch

import le
import unet
from attacks import luma
from le import BATCH, Progress
from train import hashes
from unet import BadInput, as_bytes, as_float, seed_of
from studies.files import are_last, described, images_of, read_arrays, writes_last

# -- Images of any size ----------------------------------------------------------------------------

def positions(length, tile, overlap):
    """Where tiles begin that cover `length` pixels, neighbours sharing at least `overlap`."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def ramp(length, overlap):
    """Weights of a tile's pixels, which fall off towards its edges."""
    rising = torch.arange(1, length + 1)
    return torch.minimum(rising, rising.flip(0)).clamp_max(overlap).float()


def purify_any(net, distance, images, sampler, seeds, tile=128, overlap=16):
    """Purify images of any one size: (N, 3, H, W) in [0, 1] -> same; seeds (N,) of their noise.

    They are padded by reflection to what the U-Net takes and cropped back; larger ones than `tile`
    are purified in overlapping tiles.
    """
    h, w = images.shape[2:]
    unit = net.multiple
    down, right = [-(-max(side, 32) // unit) * unit - side for side in (h, w)]  # VGG halves by 16
    x = np.pad(images.numpy(), ((0, 0), (0, 0), (0, down), (0, right)), mode="reflect")
    x = torch.from_numpy(x)
    height, width = [min(side, tile - tile % unit) for side in x.shape[2:]]
    larger = height * width / 32 ** 2                      # distances are means over pixels
    sampler = replace(sampler, pixel_weight=larger * sampler.pixel_weight,
                      perceptual_weight=larger * sampler.perceptual_weight)
    weight = ramp(height, overlap)[:, None] * ramp(width, overlap)
    total, weights = torch.zeros_like(x), torch.zeros(x.shape[2:])
    count = 0
    for i in positions(x.shape[2], tile, overlap):
        for j in positions(x.shape[3], tile, overlap):
            part = x[:, :, i:i + height, j:j + width].contiguous()
            part = le.purify(net, distance, part, sampler, [seed_of(seed, count) for seed in seeds])
            total[:, :, i:i + height, j:j + width] += weight * part
            weights[i:i + height, j:j + width] += weight
            count += 1
    return as_float(as_bytes((total / weights)[:, :, :h, :w]))


# -- Arrays in files -------------------------------------------------------------------------------

def is_grey(array):
    """8-bit images (N, H, W), not one image (H, W, 3)."""
    several = array.ndim == 3 and array.shape[-1] not in (3, 4)
    return several and array.dtype == np.uint8 and array.size


def images_in(path):
    """All arrays of a file, and {key: images (N, 3, H, W) in [0, 1]} of those that hold some.

    Raises BadInput, with what was found, if there are none.
    """
    arrays, images = read_arrays(path), {}
    for key, array in arrays.items():
        whole = np.repeat(array[..., None], 3, 3) if is_grey(array) else array
        found = images_of(whole, last=writes_last(path))
        if found is not None:
            images[key] = found.contiguous()
    if not images:
        found = "; ".join(f"{key} {described(array)}".strip() for key, array in arrays.items())
        raise BadInput(f"{path}: {found}; expected 8-bit images, N x H x W x 3, N x 3 x H x W or "
                       "grey N x H x W, or images in [0, 1]")
    return arrays, images


def written(array, images, last):
    """Images (N, 3, H, W), multiples of 1/255, with the type and the axes that an array has."""
    if is_grey(array):
        return as_bytes(luma(images))[:, 0].numpy()
    made = as_bytes(images) if array.dtype == np.uint8 else images
    made = made.numpy().astype(array.dtype, copy=False)
    return np.ascontiguousarray(np.moveaxis(made, 1, 3)) if are_last(array, last) else made


def write_arrays(path, arrays):
    """Write arrays to a file, as `read_arrays` gives them."""
    content = io.BytesIO()
    if path.suffix == ".npz":
        np.savez(content, **arrays)
    elif path.suffix == ".npy":
        np.save(content, arrays[""])
    else:
        tensors = {key: array.tolist() if array.dtype.kind in "OUS" else torch.from_numpy(array)
                   for key, array in arrays.items()}       # texts and the like are no tensors
        torch.save(tensors.get("", tensors), content)
    with unet.whole(path) as partial:
        partial.write_bytes(content.getvalue())


def purify_array(source, out, clean, seed, settings, save_every=30):
    """Purify an array, by clean(images, seeds), into a file of the same kind.

    What an interrupted run had done is in a file whose name belongs to its input and settings.
    """
    arrays, images = images_in(source)
    if "file" in arrays and source.suffix == ".npz":
        raise BadInput(f"{source}: an array named file, which numpy cannot write")
    key = hashes(dict(made=[arrays, seed, settings]))["made"]
    partial = out.with_name(f"{out.name}.{key[:8]}.partial")
    done = unet.read(partial) if partial.exists() else {}
    written_at, report = time.monotonic(), Progress("purify")
    total, place = sum(map(len, images.values())), 0
    for key, x in images.items():
        made = done.get(key, x[:0])
        size = max(1, BATCH * 32 ** 2 // x[0, 0].numel())  # by pixels, as memory is
        for i in range(len(made), len(x), size):
            batch = x[i:i + size]
            seeds = [seed_of(seed, place + i + k) for k in range(len(batch))]
            done[key] = made = torch.cat([made, clean(batch, seeds)])
            report(place + len(made), total)
            if time.monotonic() - written_at > save_every:
                unet.save(partial, done)
                written_at = time.monotonic()
        place += len(x)
    last = writes_last(source)
    made = {key: written(arrays[key], x, last) for key, x in done.items()}
    write_arrays(out, arrays | made)
    partial.unlink(missing_ok=True)
