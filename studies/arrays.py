"""Arrays of images, of any size and in files: .npy and .npz (uint8, N x H x W x 3; an .npz's images
are under `data`, its other arrays are copied), .pt (a tensor N x 3 x H x W, uint8 or in [0, 1])."""
import io
import time
from dataclasses import replace

import numpy as np
import torch

import le
import unet
from le import BATCH, BadInput, Progress, as_bytes, as_float, seed_of
from train import hashes

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
    down, right = [max(-side % net.multiple, 32 - side) for side in (h, w)]  # VGG halves four times
    x = np.pad(images.numpy(), ((0, 0), (0, 0), (0, down), (0, right)), mode="reflect")
    x = torch.from_numpy(x)
    height, width = [min(side, tile) for side in x.shape[2:]]
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

ARRAYS = (".npy", ".npz", ".pt")


def read_array(path):
    """Images (N, 3, H, W) in [0, 1] in a file, and the other arrays of an .npz.

    Raises BadInput, with what was found. No file is allowed to run code.
    """
    others = {}
    try:
        data = unet.read(path) if path.suffix == ".pt" else np.load(path, allow_pickle=False)
        if path.suffix == ".npz":
            others = {name: data[name] for name in data.files}
            data = others.pop("data")
            if "file" in others:                           # np.savez could not write it
                raise ValueError("an array named file")
        data = torch.as_tensor(data).detach().to_dense()
    except BadInput:
        raise
    except Exception as error:                             # numpy and zipfile raise many kinds
        raise BadInput(f"{path}: not a readable {path.suffix} file of images "
                       f"({type(error).__name__})") from None
    if path.suffix != ".pt" and data.ndim == 4:
        data = data.permute(0, 3, 1, 2)
    shaped = data.ndim == 4 and data.shape[1] == 3 and data.numel()
    if shaped and data.dtype == torch.uint8:
        return as_float(data).contiguous(), others
    if shaped and path.suffix == ".pt" and data.is_floating_point():
        if 0 <= data.min() <= data.max() <= 1:
            return data.float().contiguous(), others
    raise BadInput(f"{path}: {data.dtype}, {tuple(data.shape)}; expected 8-bit images, "
                   "N x H x W x 3 (.npy, .npz) or N x 3 x H x W (.pt, or those in [0, 1])")


def write_array(path, images, others):
    """Images (N, 3, H, W) in [0, 1], and the other arrays of an .npz, as 8 bits."""
    content, data = io.BytesIO(), as_bytes(images)
    if path.suffix == ".pt":
        torch.save(data, content)
    elif path.suffix == ".npz":
        np.savez(content, data=data.permute(0, 2, 3, 1).numpy(), **others)
    else:
        np.save(content, data.permute(0, 2, 3, 1).numpy())
    with unet.whole(path) as partial:
        partial.write_bytes(content.getvalue())


def purify_array(source, out, clean, seed, settings, save_every=30):
    """Purify an array, by clean(images, seeds), into a file of the same kind.

    What an interrupted run had done is in a file whose name belongs to its input and settings.
    """
    images, others = read_array(source)
    key = hashes(dict(made=[images, seed, settings]))["made"]
    partial = out.with_name(f"{out.name}.{key[:8]}.partial")
    done = unet.read(partial) if partial.exists() else images[:0]
    written, report = time.time(), Progress("purify")
    for i in range(len(done), len(images), BATCH):
        batch = images[i:i + BATCH]
        done = torch.cat([done, clean(batch, [seed_of(seed, i + k) for k in range(len(batch))])])
        report(len(done), len(images))
        if time.time() - written > save_every:
            unet.save(partial, done)
            written = time.time()
    write_array(out, done, others)
    partial.unlink(missing_ok=True)
