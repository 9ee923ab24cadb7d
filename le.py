"""Learnable unauthorized examples: the joint-conditional diffusion model of Jiang et al. 2023.

("Unlearnable Examples Give a False Sense of Security", arXiv 2305.09241.) An unlearnable example
(UE) is diffused a little, until the noise drowns the protection, and denoised by a U-Net that knows
only unprotected images. Two conditions pull every reverse step back towards the UE, so that the
picture survives and the protection does not: pixel distance, then perceptual distance.

Reading order: Sampler -> purify -> denoise -> guidance -> joint_conditioned_mean. Below them is
what every command needs. `train.py` tells the story, `python -m studies.purify` takes your images.
"""
import argparse
import math
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from unet import (DEVICE, PROCESSES, RANK, BadInput, mixed_precision, posterior, predict_x0,
                  q_sample, read, said, seed_of, sigma, visited_levels)

BATCH = 512 if DEVICE == "cuda" else 32                    # images purified at once


@dataclass(frozen=True)
class Sampler:
    """How to purify. The defaults suit drawings such as the built-in shapes: they visit levels 100,
    75, 50 and 25. Distances pull at each level that is visited, but for the last."""
    t_star: int = 100              # noise level that the image is diffused to, 1..1000
    rounds: int = 1                # times that it is diffused and denoised, one after the other
    steps: int = 4                 # strides from t_star to 0: network evaluations a round
    pixel_weight: float = 5e4      # of the pixel distance
    pixel_above: int = 60          # the pixel distance pulls above this level
    perceptual_weight: float = 2e3  # of the perceptual distance
    perceptual_below: int = 60     # the perceptual distance pulls from this level down
    target: str = "x0"             # x0: predicted x0 and UE are compared; xt: x_t and a noisy UE
    compare: str = "colour"        # what both distances see: colour, or grey, the channels' mean

    def __post_init__(self):
        visited_levels(self.t_star, self.steps)            # raises BadInput if they cannot be
        if self.target not in ("x0", "xt") or self.compare not in ("colour", "grey"):
            raise BadInput(f"target {self.target}, compare {self.compare}: expected x0 or xt, "
                             "and colour or grey")
        weights = (self.pixel_weight, self.perceptual_weight)
        if self.rounds < 1 or not all(0 <= w < math.inf for w in weights):
            raise BadInput(f"rounds {self.rounds}, weights {weights}: expected 1 or more rounds, "
                             "and finite weights that are not negative")


# guide_scale = 70000 over m = 2 * epsilon / 3, and distances averaged over the shipped batch of 500
WEIGHT = 3 * 70000 / (2 * 8 / 255) / 500
SAMPLERS = {
    "drawings": Sampler(),
    # photographs bear slow, coloured noise: their grey is kept, the rest diffused further
    "photographs": Sampler(200, rounds=4, steps=2, pixel_above=0, perceptual_weight=0.0,
                           compare="grey"),
    # the authors' setting, without its faults
    "released": Sampler(36, rounds=4, steps=36, pixel_weight=WEIGHT, pixel_above=10,
                        perceptual_weight=WEIGHT, perceptual_below=10, target="xt")}


def seen(x, sampler):
    """What the distances see of images (B, 3, H, W): themselves, or grey values as channels.

    Noise against photographs is mostly colour: grey keeps the picture, the U-Net paints it anew.
    """
    return x.mean(1, keepdim=True).expand_as(x) if sampler.compare == "grey" else x


def guidance(x, y, y_features, t, distance, sampler):
    """Gradient for x of its weighted distances to y that count at level t (Jiang et al. 2023).

    x, y (B, 3, H, W) in [-1, 1], each image's distances its own: the mean squared difference, above
    level pixel_above; and the perceptual distance, at perceptual_below and below. Its y_features
    are `distance.embed` of y / 2 + 0.5, or None where it does not count.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        d = 0 * x.sum()
        if t > sampler.pixel_above:
            d = d + sampler.pixel_weight * (x - y).square().mean((1, 2, 3)).sum()
        if t <= sampler.perceptual_below and sampler.perceptual_weight:
            perceived = distance.to_embedding(x / 2 + 0.5, y_features)
            d = d + sampler.perceptual_weight * perceived.sum()
        return torch.autograd.grad(d, x)[0]


def joint_conditioned_mean(mean, var, t, gradient):
    """The mean of N(mean, var) when exp(-s_t * gradient . x) tilts it towards the UE (Jiang et al.
    2023).

    s_t = sqrt((1 - alpha_bar_t) / alpha_bar_t) lets the pull fade with the noise; the weight is in
    the gradient. No pixel is pulled further than one standard deviation of the step: where VGG's
    features are next to nothing, to scale them to unit length makes their gradient huge.
    """
    return mean - (var * sigma(t) * gradient).clamp(-var.sqrt(), var.sqrt())


def denoise(net, distance, ue, sampler, draw, trace=None):
    """One batch of UEs (B, 3, H, W) in [-1, 1] -> LEs in [-1, 1] (Jiang et al. 2023).

    `draw()` gives standard normal noise of that shape. `trace`, a list, gets every x_t.
    """
    visited = visited_levels(sampler.t_star, sampler.steps)
    y, y_features = seen(ue, sampler), None
    if sampler.perceptual_weight:
        y_features = distance.embed(y / 2 + 0.5)
    x = ue
    for _ in range(sampler.rounds):
        xt = q_sample(x, sampler.t_star, draw())
        for t, s in zip(visited, visited[1:]):
            if trace is not None:
                trace.append(xt)
            with mixed_precision(xt.device):
                eps = net(xt, t)
            x0 = predict_x0(xt, t, eps.float()).clamp(-1, 1)
            mean, var = posterior(x0, xt, t, s)
            if s > 0:                                      # the last stride has no variance
                compared = x0
                if sampler.target == "xt":
                    compared, y = xt, seen(q_sample(ue, t, draw()), sampler)
                    y_features = distance.embed(y / 2 + 0.5) if y_features else None
                gradient = guidance(seen(compared, sampler), y, y_features, t, distance, sampler)
                gradient = seen(gradient, sampler)         # the chain rule: a symmetric projection
                mean = joint_conditioned_mean(mean, var, t, gradient)
            xt = mean + var.sqrt() * draw()
        x = xt
    return x


@torch.no_grad()
def purify(net, distance, images, sampler=Sampler(), seeds=None, batch_size=BATCH, report=None):
    """Turn unlearnable examples into learnable ones by the joint-conditional diffusion model.

    images (N, 3, H, W) in [0, 1] -> LEs of the same shape, rounded to multiples of 1/255.
    net predicts the noise in images in [-1, 1]; distance is a PerceptualDistance, or None where
    its weight is 0. seeds (N,) ints, default 0..N-1, are those of each image's own noise, so LEs do
    not depend on batch_size. report(done, total) is called after each batch.
    Raises BadInput if the images are not in [0, 1], if the U-Net cannot take their size or has
    not learned level t_star, or if what comes out is not finite.
    """
    if sampler.t_star > net.max_level:
        raise BadInput(f"t_star {sampler.t_star}: this U-Net knows levels up to {net.max_level}")
    if len(images) and not 0 <= images.min() <= images.max() <= 1:
        raise BadInput(f"need images in [0, 1], not {images.min():.3f} to {images.max():.3f}")
    device = next(net.parameters()).device
    seeds = range(len(images)) if seeds is None else seeds
    out = torch.empty_like(images)
    for i in range(0, len(images), batch_size):
        ue = images[i:i + batch_size].to(device, memory_format=torch.channels_last) * 2 - 1
        noises = [torch.Generator().manual_seed(int(seed)) for seed in seeds[i:i + batch_size]]

        def draw(shape=ue.shape[1:], noises=noises):
            return torch.stack([torch.randn(shape, generator=noise) for noise in noises]).to(device)
        made = denoise(net, distance, ue, sampler, draw)
        if not made.isfinite().all():
            raise BadInput("the sampled images are not finite")
        out[i:i + len(ue)] = as_float(as_bytes(made / 2 + 0.5))
        if report:
            report(i + len(ue), len(images))
    return out


# A purifier is a function like `purify`; with an entry here, train.py --purifier NAME judges it
PURIFIERS = {"joint": purify}


def divided(purifier, net, distance, images, sampler, seed, report):
    """What a purifier makes of images (N, 3, H, W), as bytes; each process does its share."""
    seeds = [seed_of(seed, place) for place in range(len(images))]
    mine = slice(RANK, None, PROCESSES)
    made = torch.zeros_like(images, device=DEVICE)
    made[mine] = purifier(net, distance, images[mine], sampler, seeds[mine], report=report)
    if PROCESSES > 1:
        torch.distributed.all_reduce(made)                 # every image is 0 in the other processes
    return dict(images=as_bytes(made).cpu())


# -- What every command needs: errors in one line, progress, downloads, images, torchrun -----------

@contextmanager
def processes():
    """Within, under torchrun, the processes can exchange tensors, and only the first one talks."""
    if PROCESSES == 1:
        yield
        return
    # here, since not every torch has it; and before a group is made, which would not end otherwise
    import torch.distributed.nn
    local = int(os.environ.get("LOCAL_RANK", 0))
    if DEVICE == "cuda":
        if local >= torch.cuda.device_count():
            raise BadInput("torchrun: more processes than GPUs")
        torch.cuda.set_device(local)
    try:                                                   # some wait while one trains for hours
        torch.distributed.init_process_group(timeout=timedelta(days=365))
    except ValueError as error:
        raise BadInput(f"WORLD_SIZE is set, as torchrun does, but: {said(error)}") from None
    if RANK:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def all_here():
    """Wait until every process is here."""
    if PROCESSES > 1:
        torch.distributed.barrier()


def as_bytes(images):
    return images.mul(255).round_().clamp_(0, 255).byte()


def as_float(images):
    return images / 255


@contextmanager
def one_line_errors(program):
    """Within, what a user can mend ends the program with one line and exit code 2."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):                 # a notebook's stream is another
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal need not know every letter
    try:
        yield
    except (BadInput, OSError) as error:
        named = getattr(error, "filename", None)
        print(f"{program}: {f'{named}: {error.strerror}' if named else error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


class Progress:
    """report(done, total, **values): one line on stderr that rewrites itself, with the time left.

    Off a terminal, a line every 20 s. Values are looked at only when shown, since that may mean to
    wait for a GPU. Raises BadInput when one is not finite.
    """

    def __init__(self, label):
        self.label, self.shown = label, 0.0

    def __call__(self, done, total, **values):
        now, live = time.time(), sys.stderr.isatty()
        if not self.shown:
            self.start, self.first = now, done             # a resumed job does not begin at 0
        elif done < total and now - self.shown < (0.2 if live else 20):
            return
        self.shown = now
        left = (now - self.start) * (total - done) / max(1, done - self.first)
        text = f"{self.label}: {done}/{total}" + f", {left:.0f} s left" * (done > self.first)
        for name, value in values.items():
            text += f", {name} {float(value):.3g}"
            if not math.isfinite(value):
                raise BadInput(f"{text}; a lower learning rate may help")
        end = "\n" if done == total or not live else ""
        print(f"\r{text:<78}" if live else text, end=end, file=sys.stderr, flush=True)


def download(address, path):
    """Fetch (url, sha256) to a path, if one is given and nothing is there, and if its hash fits."""
    if not path or Path(path).exists():
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address[0], str(path), hash_prefix=address[1])
    except (OSError, RuntimeError) as error:
        raise BadInput(f"{address[0]}: {error}; fetch it elsewhere and put it at {path}") from None


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


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")
