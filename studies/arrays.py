"""Arrays of images, of any size and in files: .npy, .npz and .pt. Images are what looks like them,
whatever its key: 8-bit or in [0, 1], N x H x W x 3 or N x 3 x H x W, or grey with one channel in
place of three; 8-bit grey ones also without, N x H x W. Where a file holds colour images, what
looks like grey ones (masks, landmarks) is none, unless `--key` names it. All else is copied."""
import io
import json
import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch

import le
import unet
from attacks import luma
from le import BATCH, Progress
from train import hashes
from unet import BadInput, as_bytes, as_float, seed_of
from studies.files import all_described, channel_axis, described, images_of, read_arrays
from studies.files import writes_last


# -- Images of any size ----------------------------------------------------------------------------

TILE, OVERLAP = 128, 16            # pixels a side of a tile, and that neighbours share at least


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


def padded(length, unit):
    """The next side that the U-Net takes, a multiple of its unit, and VGG, which halves by 16."""
    return -(-max(length, 32) // unit) * unit


def count_tiles(height, width, unit):
    """How many tiles `purify_any` makes of an image of this size."""
    count = 1
    for side in (height, width):
        count *= len(positions(padded(side, unit), TILE - TILE % unit, OVERLAP))
    return count


def nothing(done):
    """The report of somebody who does not want one."""


def purify_any(net, distance, images, sampler, seeds, tile=TILE, overlap=OVERLAP, report=nothing):
    """Purify images of any one size: (N, 3, H, W) in [0, 1] -> same; seeds (N,) of their noise.

    They are padded by reflection to what the U-Net takes and cropped back; larger ones than `tile`
    are purified in overlapping tiles. report(tiles that are done, of all images) follows each.
    """
    h, w = images.shape[2:]
    unit = net.multiple
    down, right = padded(h, unit) - h, padded(w, unit) - w
    x = np.pad(images.numpy(), ((0, 0), (0, 0), (0, down), (0, right)), mode="reflect")
    x = torch.from_numpy(x)
    height, width = [min(side, tile - tile % unit) for side in x.shape[2:]]
    larger = height * width / 32 ** 2                      # distances are means over pixels
    sampler = replace(sampler, pixel_weight=larger * sampler.pixel_weight,
                      perceptual_weight=larger * sampler.perceptual_weight)
    weight = ramp(height, overlap)[:, None] * ramp(width, overlap)
    total, weights = torch.zeros_like(x), torch.zeros(x.shape[2:])
    count = 0
    for i in positions(x.shape[2], height, overlap):
        for j in positions(x.shape[3], width, overlap):
            part = x[:, :, i:i + height, j:j + width].contiguous()
            part = le.purify(net, distance, part, sampler, [seed_of(seed, count) for seed in seeds])
            total[:, :, i:i + height, j:j + width] += weight * part
            weights[i:i + height, j:j + width] += weight
            count += 1
            report(count * len(x))
    return as_float(as_bytes((total / weights)[:, :, :h, :w]))


# -- Arrays in files -------------------------------------------------------------------------------

def is_grey(array):
    """Whether an array is 8-bit images (N, H, W) of 8 pixels or more a side; not one image, which
    is (H, W, 3) or (H, W, 1)."""
    return array.ndim == 3 and array.dtype == np.uint8 and min(array.shape[1:]) >= 8


def has_colours(array, last):
    axis = channel_axis(array, last)
    return axis is not None and array.shape[axis] == 3


def what_looks_like_images(arrays, last, keys):
    """{key: images (N, 3, H, W) in [0, 1]} of the arrays that can be taken for some. (3, H, W) may
    be one image, and is three grey ones where it is among the keys that somebody names."""
    images = {}
    for key, array in arrays.items():
        grey = is_grey(array) and (len(array) != 3 or key in keys)
        found = images_of(array[..., None] if grey else array, last)
        if found is not None and (has_colours(array, last) or min(found.shape[2:]) >= 8):
            images[key] = found.contiguous()
    return images


def images_in(path, keys=()):
    """All arrays of a file, and {key: images (N, 3, H, W) in [0, 1]} of those with these keys, or
    of those that look like images; says what is taken for what.

    Raises BadInput, with what was found, if there are none.
    """
    arrays, last = read_arrays(path), writes_last(path)
    images = what_looks_like_images(arrays, last, keys)
    coloured = {key for key in images if has_colours(arrays[key], last)}
    chosen = set(keys) or coloured or set(images)
    if not images or not chosen <= set(images):
        asked = f"--key {', '.join(keys)}: " if keys else ""
        raise BadInput(f"{path}: {asked}{all_described(arrays)}; expected 8-bit images, N x H x W "
                       "x 3, N x 3 x H x W or grey N x H x W (x 1), or images in [0, 1]; a single "
                       "one, or three grey ones, with an axis for their number and for channels")
    for key, array in arrays.items():
        name = f"{path}: {key}".rstrip(": ")
        if key in chosen:
            n, _, height, width = images[key].shape
            kind = "colour" if key in coloured else "grey"
            print(f"{name}: {n} {kind} images of {height}x{width}, purified")
        else:
            hint = f"; --key {key} if these are images" if key in images else ""
            print(f"{name}: {described(array)}, copied as it is{hint}")
    return arrays, {key: x for key, x in images.items() if key in chosen}


def written(array, images, last):
    """Images (N, 3, H, W), multiples of 1/255, with the type and the axes that an array has."""
    axis = channel_axis(array, last)
    if not has_colours(array, last):
        images = as_float(as_bytes(luma(images)))
    made = as_bytes(images) if array.dtype == np.uint8 else images
    made = made.numpy().astype(array.dtype, copy=False)
    return made[:, 0] if axis is None else np.ascontiguousarray(np.moveaxis(made, 1, axis))


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


# -- What it was made of ---------------------------------------------------------------------------

def changed(before, parts):
    """Which parts of an LE are others than before; none where nothing says what they were."""
    names = [key for key in parts | before if before.get(key) != parts.get(key)]
    if "Python" in names:                                  # each has other words for every file
        names = ["Python"]
    return names if before else []


def parts_from(text):
    """{part: hash} that a text says an LE was made of; nothing if it does not."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        return {}


def is_kept(out, note, parts):
    """Whether an array that is there is of these parts; says why it is made again, if not."""
    before = parts_from(note.read_text(encoding="utf-8")) if note.exists() else {}
    why = changed(before, parts)
    if why:
        print(f"{out}: made again, as {', '.join(why[:4])} changed")
        return False
    unknown = "" if before else f", though no {note.name} says what it was made of"
    print(f"{out}: is there already and is kept{unknown}")
    return True


def advance(report, before, total, done):
    report(before + done, total)


def purify_array(source, out, clean, parts, unit, keys=(), save_every=30):
    """Purify an array, by clean(images, seeds, report=...), into a file of the same kind, of
    `parts`, which are in a note beside it.

    What an interrupted run had done is in a file whose name belongs to its input and settings.
    """
    parts = parts | hashes(dict(source=source, keys=sorted(keys)))
    note = out.with_name(f"{out.name}.json")
    if out.exists() and is_kept(out, note, parts):
        return
    arrays, images = images_in(source, keys)
    if "file" in arrays and source.suffix == ".npz":
        raise BadInput(f"{source}: an array named file, which numpy cannot write")
    work = hashes(dict(parts=parts))["parts"]
    partial_file = out.with_name(f"{out.name}.{work[:8]}.partial")
    done = unet.read(partial_file) if partial_file.exists() else {}
    written_at, report = time.monotonic(), Progress("purify, in tiles")
    tiles = {key: count_tiles(*x.shape[2:], unit) for key, x in images.items()}
    total = sum(len(x) * tiles[key] for key, x in images.items())
    place, before = 0, 0
    for key, x in images.items():
        made = done.get(key, x[:0])
        size = max(1, BATCH * 32 ** 2 // x[0, 0].numel())  # by pixels, as memory is
        for i in range(len(made), len(x), size):
            batch = x[i:i + size]
            seeds = [seed_of(parts["seed"], place + i + k) for k in range(len(batch))]
            so_far = partial(advance, report, before + i * tiles[key], total)
            done[key] = made = torch.cat([made, clean(batch, seeds, report=so_far)])
            if time.monotonic() - written_at > save_every:
                unet.save(partial_file, done)
                written_at = time.monotonic()
        place += len(x)
        before += len(x) * tiles[key]
    last = writes_last(source)
    made = {key: written(arrays[key], x, last) for key, x in done.items()}
    write_arrays(out, arrays | made)
    with unet.whole(note) as partial_note:
        partial_note.write_text(json.dumps(parts), encoding="utf-8")
    partial_file.unlink(missing_ok=True)
