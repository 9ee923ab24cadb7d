"""Learnable unauthorized examples: the joint-conditional diffusion model of Jiang et al. 2023 (arXiv 2305.09241).

An unlearnable example (UE) is diffused a little, until the noise drowns the protection, and denoised by a U-Net that knows only
unprotected images. Two conditions pull every reverse step back towards the UE, so that the picture survives and the protection
does not: pixel distance, then perceptual distance.

    python le.py IN OUT --unet runs/shapes/ddpm.pt --perceptual runs/shapes/vgg.pt

    torchrun --nproc_per_node=2 le.py IN OUT ...   the same by two processes, on a GPU each if there are

IN is an image or a folder of them (PNG, JPEG, WebP, BMP; any size, nested), a .npy or .npz array (uint8, N x H x W x 3)
or a .pt tensor (N x 3 x H x W, uint8 or in [0, 1]); OUT gets the same, purified. What is in OUT is kept, so a restart goes on.
"""
import argparse
import hashlib
import io
import math
import os
import sys
import time
import urllib.request
import warnings
import zlib
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps

import perceptual
import unet
from unet import levels, posterior, predict_x0, q_sample, sigma

DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
BATCH = 512 if DEVICE == "cuda" else 32  # images purified at once; a CPU spends a quarter more on more, in the system's memory management
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # which of how many: set by torchrun


@dataclass(frozen=True)
class Sampler:
    """How to purify. The defaults suit drawings such as the built-in shapes."""
    t_star: int = 100              # noise level that the image is diffused to, 1..1000
    rounds: int = 1                # times that it is diffused and denoised, each round starting from the last one's output
    steps: int = 8                 # strides from t_star to 0, so network evaluations an image = rounds * steps
    pixel_weight: float = 5e4      # of the pixel distance
    perceptual_weight: float = 2e3  # of the perceptual distance
    switch: int | None = 40        # pixel distance above this level, perceptual distance from it down; None: both throughout
    target: str = "x0"             # what is compared: "x0": predicted x0 with the UE; "same", "fresh": x_t with the UE diffused
                                   # to level t by the noise of the first diffusion, or by new noise at every step
    compare: str = "colour"        # what the distances see: "colour", or "grey", the mean of the channels

    def __post_init__(self):
        levels(self.t_star, self.steps)                    # raises ValueError if they cannot be
        if self.target not in ("x0", "same", "fresh"):
            raise ValueError(f"target is x0, same or fresh, not {self.target!r}")
        if self.compare not in ("grey", "colour"):
            raise ValueError(f"compare is grey or colour, not {self.compare!r}")
        if self.rounds < 1 or min(self.pixel_weight, self.perceptual_weight) < 0:
            raise ValueError(f"rounds is at least 1 and weights are not negative: {self}")


# guide_scale = 70000 over m = 2 * epsilon / 3, and distances averaged over the shipped batch of 500
RELEASED_WEIGHT = 3 * 70000 / (2 * 8 / 255) / 500
RELEASED = Sampler(t_star=36, rounds=4, steps=36, pixel_weight=RELEASED_WEIGHT, perceptual_weight=RELEASED_WEIGHT, switch=10, target="fresh")
# photographs bear noise that is slow and coloured, for which their grey values are kept and the rest is diffused further
PHOTOGRAPHS = Sampler(t_star=200, rounds=3, steps=5, perceptual_weight=0.0, switch=0, compare="grey")
PRESETS = {"drawings": Sampler(), "photographs": PHOTOGRAPHS, "released": RELEASED}  # released: the authors' setting without its faults


def seen(x, sampler):
    """What the distances see of images (B, 3, H, W): themselves, or their grey values in every channel.

    Noise made against photographs is mostly in colours, of which they have few: grey keeps the picture, and leaves the colours to the U-Net.
    """
    return x.mean(1, keepdim=True).expand_as(x) if sampler.compare == "grey" else x


def guidance(x, y, t, distance, y_embedding, sampler):
    """Gradient with respect to x (B, 3, H, W), in [-1, 1], of its weighted distances to y that apply at level t.

    Every image's distance is its own; the pixel distance is the mean squared difference. `y_embedding()` gives the perceptual features
    of what is `seen` of the target and is called only where the perceptual distance applies.
    """
    gradient = torch.zeros_like(x)
    if sampler.pixel_weight and (sampler.switch is None or t > sampler.switch):
        gradient += sampler.pixel_weight * 2 * seen(x - y, sampler) / x[0].numel()
    if sampler.perceptual_weight and (sampler.switch is None or t <= sampler.switch):
        at = seen(x / 2 + 0.5, sampler)
        gradient += sampler.perceptual_weight / 2 * seen(distance.gradient(at, y_embedding()), sampler)  # `seen` is its own transpose
    return gradient


def joint_conditioned_mean(mean, var, t, gradient):
    """The posterior mean pulled towards the UE: mean - var * s_t * gradient, s_t = sqrt((1 - alpha_bar_t) / alpha_bar_t) (Jiang et al. 2023).

    The weight is in the gradient; s_t lets the pull fade with the noise. No pixel is pulled further than one standard deviation of the
    step: where VGG sees almost nothing, unit length makes the perceptual gradient thousands of times as large.
    """
    return mean - (var * sigma(t) * gradient).clamp(-var.sqrt(), var.sqrt())


def denoise(unet, distance, ue, sampler, draw):
    """One batch of UEs (B, 3, H, W) in [-1, 1] -> LEs in [-1, 1]. `draw()` returns standard normal noise of that shape."""
    embed = lambda y: distance.embed(seen(y / 2 + 0.5, sampler))
    ue_embedding = embed(ue) if sampler.perceptual_weight and sampler.target == "x0" else None
    x, visited = ue, levels(sampler.t_star, sampler.steps)
    for _ in range(sampler.rounds):
        first = draw()
        xt = q_sample(x, sampler.t_star, first)
        for t, s in zip(visited, visited[1:]):
            x0 = predict_x0(xt, t, unet(xt, t)).clamp(-1, 1)
            mean, var = posterior(x0, xt, t, s)
            if s > 0:                                      # the last stride has no variance, so nothing would be pulled
                if sampler.target == "x0":
                    gradient = guidance(x0, ue, t, distance, lambda: ue_embedding, sampler)
                else:
                    yt = q_sample(ue, t, first if sampler.target == "same" else draw())
                    gradient = guidance(xt, yt, t, distance, lambda: embed(yt), sampler)
                mean = joint_conditioned_mean(mean, var, t, gradient)
            xt = mean + var.sqrt() * draw()
        x = xt
    return x


def seed_of(seed, place):
    """A seed for what stands at a place, so that an image's noise does not depend on who else is purified, when and where."""
    return seed * 1_000_003 + place


@torch.no_grad()
def purify(unet, distance, images, sampler=Sampler(), seed=0, batch_size=BATCH, report=lambda done, total: None):
    """Turn unlearnable examples into learnable ones with the joint-conditional diffusion model (Jiang et al. 2023).

    images (N, 3, H, W) in [0, 1] on any device -> LEs of the same shape there, rounded to multiples of 1/255.
    unet predicts noise in images in [-1, 1], distance is a PerceptualDistance (None if its weight is 0); both on one device.
    An image's noise depends on `seed` and its position alone, or on its own entry where `seed` is a list, never on batch_size.
    Raises ValueError if the images are not in [0, 1], or the U-Net cannot take their size or has not learned level t_star.
    """
    if sampler.t_star > unet.levels:
        raise ValueError(f"t_star is {sampler.t_star}, but this U-Net has learned the levels up to {unet.levels}")
    if images.numel() and not 0 <= images.min() <= images.max() <= 1:
        raise ValueError(f"images must be in [0, 1], got {images.min():.3f} to {images.max():.3f}")
    device, out = next(unet.parameters()).device, torch.empty_like(images)
    seeds = [seed_of(seed, place) for place in range(len(images))] if isinstance(seed, int) else seed
    for i in range(0, len(images), batch_size):
        ue = images[i:i + batch_size].to(device, memory_format=torch.channels_last) * 2 - 1
        generators = [torch.Generator().manual_seed(s) for s in seeds[i:i + batch_size]]
        draw = lambda: torch.stack([torch.randn(ue.shape[1:], generator=g) for g in generators]).to(ue, non_blocking=True)
        le = denoise(unet, distance, ue, sampler, draw)
        out[i:i + len(ue)] = (le / 2 + 0.5).clamp(0, 1).mul(255).round().div(255)
        report(i + len(ue), len(images))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Images of any size

def positions(length, tile, overlap):
    """Where tiles begin so that they cover `length` pixels, neighbours sharing at least `overlap` and the last one ending at the end."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def purify_any(unet, distance, images, sampler=Sampler(), seeds=(0,), tile=128, overlap=16):
    """Purify images of any one size: (N, 3, H, W) in [0, 1] -> same; seeds (N,) ints, one for each image's noise.

    They are padded by reflection to what the U-Net takes and cropped back; larger ones than `tile` are purified in overlapping tiles,
    whose weights fall off towards their edges.
    """
    h, w = images.shape[2:]
    pad = lambda length: max(-length % unet.multiple, 32 - length)  # the last of the VGG's maps is 16 times smaller
    x = torch.from_numpy(np.pad(images.numpy(), ((0, 0), (0, 0), (0, pad(h)), (0, pad(w))), mode="reflect"))
    height, width = (min(length, tile) for length in x.shape[2:])
    larger = height * width / 32 ** 2                      # distances are means: over more pixels than 32x32, each of them would be pulled less
    sampler = replace(sampler, pixel_weight=larger * sampler.pixel_weight, perceptual_weight=larger * sampler.perceptual_weight)
    corners = [(i, j) for i in positions(x.shape[2], tile, overlap) for j in positions(x.shape[3], tile, overlap)]
    ramp = lambda length: torch.minimum(torch.arange(1, length + 1), torch.arange(length, 0, -1)).clamp_max(overlap).float()
    weight, total, weights = ramp(height)[:, None] * ramp(width), torch.zeros_like(x), torch.zeros(x.shape[2:])
    for k, (i, j) in enumerate(corners):
        part = purify(unet, distance, x[:, :, i:i + height, j:j + width].contiguous(), sampler, [seed_of(seed, k) for seed in seeds])
        total[:, :, i:i + height, j:j + width] += weight * part
        weights[i:i + height, j:j + width] += weight
    return (total / weights)[:, :, :h, :w].mul(255).round().div(255)


# ---------------------------------------------------------------------------------------------------------------------
# One GPU, or several processes with one each

def accelerated(net, device=DEVICE):
    """On CUDA, the network computes in bfloat16 where that is safe (autocast), many times as fast; what it returns, and all around it, is float32."""
    if device == "cuda":
        forward = torch.autocast(device, torch.bfloat16)(net.forward)
        net.forward = lambda *inputs: forward(*inputs).float()
    return net


@contextmanager
def joined():
    """Within, under torchrun, the processes can exchange tensors; each has its own GPU, and only the first one talks."""
    if PROCESSES == 1:
        yield
        return
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(timeout=timedelta(days=1))     # the first one may be busy long
    try:
        with redirect_stdout(sys.stdout if RANK == 0 else io.StringIO()):
            yield
    finally:
        dist.destroy_process_group()


def barrier():
    """Wait for the other processes."""
    if PROCESSES > 1:
        dist.barrier()


def share(things):
    """This process's part of things, every PROCESSES-th of them; `gathered` is its inverse."""
    return things[RANK::PROCESSES]


def gathered(mine, n):
    """The whole (n, ...) of which every process has made its `share`."""
    if PROCESSES == 1:
        return mine
    whole = torch.zeros(n, *mine.shape[1:], dtype=mine.dtype, device=mine.device)
    whole[RANK::PROCESSES] = mine
    dist.all_reduce(whole)
    return whole


# ---------------------------------------------------------------------------------------------------------------------
# The user's own files

class BadInput(Exception):
    """Something the user gave cannot be used; a main program prints it in one line and exits with 2."""


@contextmanager
def explained(program, *more):
    """Within, what a user can mend ends the program with one line, exit code 2: BadInput, a full disk, `more`. Ctrl-C exits with 130."""
    try:
        yield
    except (BadInput, OSError, *more) as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


class Progress:
    """report(done, total, **values): one line on stderr that rewrites itself, with the time left; off a terminal, a line every 20 s.

    Values are looked at only when shown, since that may mean to wait for a GPU. Raises BadInput when one is not a number any more.
    """

    def __init__(self, label):
        self.label, self.start, self.first, self.shown, self.live = label, time.time(), None, 0.0, sys.stderr.isatty()

    def __call__(self, done, total, **values):
        now = time.time()
        self.first = self.first or (done, now)             # a resumed run does not start at 0
        if RANK or done < total and now - self.shown < (0.2 if self.live else 20):
            return
        values = {name: float(value) for name, value in values.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise BadInput(f"{self.label}: {name} is {value} after {done} of {total}; a lower learning rate may help")
        self.shown = now
        text = f"{self.label}: {done}/{total}" + "".join(f", {name} {value:.3g}" for name, value in values.items())
        if done == total:
            text += f", took {now - self.start:.0f} s"
        elif done > self.first[0]:
            text += f", {(now - self.first[1]) * (total - done) / (done - self.first[0]):.0f} s left"
        print(f"\r{text:<78}" if self.live else text, end="\n" if done == total or not self.live else "", file=sys.stderr, flush=True)


def download(url, sha256, path):
    """Fetch url to path, keeping nothing if the hash is wrong."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, report = path.with_name(path.name + ".part"), Progress("download")
    try:
        with urllib.request.urlopen(url, timeout=60) as source, open(partial, "wb") as target:
            total = int(source.headers.get("Content-Length", 0))
            while block := source.read(1 << 20):
                target.write(block)
                report(target.tell(), max(total, target.tell()))
        if hashlib.sha256(partial.read_bytes()).hexdigest() != sha256:
            raise BadInput(f"{url}: sha256 is not {sha256}, nothing kept")
        os.replace(partial, path)
    except OSError as error:
        raise BadInput(f"{url}: {error}; fetch it elsewhere and put it at {path}") from None
    finally:
        partial.unlink(missing_ok=True)


def fetch_weights(*files):
    """Fetch those of the released weights (perceptual.WEIGHTS) that are named and are not there yet."""
    for file in (Path(file) for file in files if file):
        if file.name in perceptual.WEIGHTS and not file.exists():
            download(*perceptual.WEIGHTS[file.name], file)


IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@contextmanager
def bombs_refused():
    """Within, an image of over 89 million pixels is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def open_image(path):
    """The image in a file, upright (EXIF), in mode RGB, RGBA, L or LA; a palette is resolved.

    Raises BadInput if it cannot be read whole, has over 89 million pixels, or has more than 8 bits a channel.
    """
    try:
        with bombs_refused(), Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"{image.n_frames} frames, expected one")
            image.load()
            icc, image = image.info.get("icc_profile"), ImageOps.exif_transpose(image)
            if image.mode == "P":
                image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadInput(f"{path}: not a readable image ({error})") from None
    if image.mode not in ("RGB", "RGBA", "L", "LA"):
        raise BadInput(f"{path}: mode {image.mode}; expected 8-bit RGB or grey, with or without alpha, or a palette")
    image.info = {"icc_profile": icc} if icc else {}
    return image


def pixels_of(image):
    """A Pillow image as a tensor (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float().div(255)


def with_pixels(image, pixels):
    """A copy of a Pillow image whose colours are pixels (3, H, W) in [0, 1]; alpha is kept, grey stays grey."""
    made = Image.fromarray(pixels.mul(255).round().byte().permute(1, 2, 0).numpy())
    made = made.convert("L") if image.mode in ("L", "LA") else made
    if image.mode in ("RGBA", "LA"):
        made.putalpha(image.getchannel("A"))
    made.info = image.info
    return made


def target_of(file, source, out):
    """Where a file's LE goes: the same place and name, but as PNG instead of JPEG, whose losses would add a perturbation of their own."""
    target = out / file.relative_to(source)
    if file.suffix.lower() not in (".jpg", ".jpeg"):
        return target
    same_name = [other for other in file.parent.iterdir() if other.stem == file.stem and other != file]
    return target.with_name(target.name + ".png") if same_name else target.with_suffix(".png")


def pairs(source, out):
    """(file, where its LE goes) for one image, or for every image under a folder."""
    if source.is_file():
        return [(source, out)]
    files = sorted(file for file in source.rglob("*") if file.suffix.lower() in IMAGES and file.is_file())
    if not files:
        raise BadInput(f"{source}: no images; expected {', '.join(IMAGES)}")
    return [(file, target_of(file, source, out)) for file in files]


def purify_images(files, clean, seed, batch_pixels=BATCH * 32 ** 2):
    """Purify image files, (source, target) each, with clean(images (N, 3, H, W), seeds (N,)); targets that are there already are kept.

    Returns how many could not be read; each is named and skipped.
    """
    todo = [(file, target) for file, target in files if not target.exists()]
    if len(todo) < len(files):
        print(f"{len(files) - len(todo)} of {len(files)} are there already and are kept")
    if any(file.suffix.lower() in (".jpg", ".jpeg") for file, _ in todo):
        print("JPEG files are written as PNG, which adds no losses of its own")
    report, unread, batch = Progress("purify"), 0, []

    def flush():
        seeds = [zlib.crc32(f"{seed} {file.name}".encode()) for file, _, _ in batch]  # neither order nor a restart changes the noise
        for (_, target, image), pixels in zip(batch, clean(torch.stack([pixels_of(image) for _, _, image in batch]), seeds)):
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.partial")
            made = with_pixels(image, pixels)
            made.save(partial, format=Image.registered_extensions()[target.suffix.lower()], lossless=True, **made.info)
            os.replace(partial, target)
        batch.clear()
    for done, (file, target) in enumerate(todo, 1):
        try:
            image = open_image(file)
        except BadInput as error:
            unread += 1
            print(f"\nle.py: {error}; skipped", file=sys.stderr)
            continue
        if batch and (image.size != batch[0][2].size or (len(batch) + 1) * image.width * image.height > batch_pixels):
            flush()
            report(done - 1, len(todo))
        batch.append((file, target, image))
    if batch:
        flush()
        report(len(todo), len(todo))
    return unread


def read_array(path):
    """A file's images as a tensor (N, 3, H, W) in [0, 1] and a function that writes such images to another file the same way.

    .npy and .npz hold uint8 (N, H, W, 3), an .npz under `data` or alone, and its other arrays are copied; .pt holds a tensor
    (N, 3, H, W), uint8 or in [0, 1]. Raises BadInput, with what was found, if not. No file is allowed to run code.
    """
    try:
        data = unet.read(path) if path.suffix == ".pt" else np.load(path, allow_pickle=False)
        others = {}
        if path.suffix == ".npz":
            others = {name: data[name] for name in data.files}
            data = others.pop("data" if "data" in others or len(others) != 1 else next(iter(others)))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise BadInput(f"{path}: not a readable {path.suffix} file of images ({error})") from None
    shape, kind = tuple(getattr(data, "shape", ())), getattr(data, "dtype", type(data).__name__)
    if path.suffix == ".pt":
        if len(shape) != 4 or shape[1] != 3 or not (kind == torch.uint8 or kind.is_floating_point and 0 <= data.min() <= data.max() <= 1):
            raise BadInput(f"{path}: {kind} {shape}; expected a tensor (N, 3, H, W), uint8 or in [0, 1]")
        images = data.float() / (255 if kind == torch.uint8 else 1)
        back = lambda images: images.mul(255).round().byte() if kind == torch.uint8 else images.to(kind)
        return images, lambda out, images: torch.save(back(images), out)
    if len(shape) != 4 or shape[3] != 3 or kind != np.uint8:
        raise BadInput(f"{path}: {kind} {shape}; expected uint8 (N, H, W, 3)")

    def write(out, images):
        images = images.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
        with open(out, "wb") as file:
            np.savez(file, data=images, **others) if path.suffix == ".npz" else np.save(file, images)
    return torch.from_numpy(data).permute(0, 3, 1, 2).float() / 255, write


def purify_array(source, out, clean, seed, batch_size=BATCH, save_every=30):
    """Purify an array of images into a file of the same kind; what an interrupted run had done is kept in OUT.partial."""
    if out.exists():
        print(f"{out}: is there already and is kept")
        return
    images, write = read_array(source)
    n, places, images = len(images), share(range(len(images))), share(images).contiguous()
    partial, done, written, report = out.with_name(out.name + f".{RANK}of{PROCESSES}" * (PROCESSES > 1) + ".partial"), 0, time.time(), Progress("purify")
    out.parent.mkdir(parents=True, exist_ok=True)
    if partial.exists():
        made = unet.read(partial)
        images[:len(made)], done = made, len(made)
    for i in range(done, len(images), batch_size):
        batch = images[i:i + batch_size]
        images[i:i + batch_size] = clean(batch, [seed_of(seed, place) for place in places[i:i + batch_size]])
        report(i + len(batch), len(images))
        if time.time() - written > save_every:
            unet.save(partial, images[:i + len(batch)].clone())
            written = time.time()
    images = gathered(images, n)
    if RANK == 0:
        write(out.with_name(out.name + ".tmp"), images)
        os.replace(out.with_name(out.name + ".tmp"), out)
    partial.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Command line

class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def level_or_both(text):
    """The option --switch: a level, or `both`."""
    return None if text == "both" else int(text)


def add_sampler_options(parser, default="drawings"):
    """Every value of Sampler as an option, and --preset."""
    parser.add_argument("--preset", choices=PRESETS, default=argparse.SUPPRESS, help=f"where the sampler's values start from, default {default}")
    for option in fields(Sampler):
        kind = level_or_both if option.name == "switch" else option.type
        parser.add_argument(f"--{option.name}", type=kind, default=argparse.SUPPRESS, metavar="", help=f"default {option.default}")


def sampler_from(options, default=Sampler()):
    """Take what `add_sampler_options` added out of the options (a dict); returns the Sampler. Raises ValueError if it makes no sense."""
    start = PRESETS.get(options.pop("preset", None), default)
    return replace(start, **{option.name: options.pop(option.name) for option in fields(Sampler) if option.name in options})


def parse(argv):
    """What the arguments ask for (a dict). Exits with 2 and one line if they make no sense."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                    usage="python le.py IN OUT --unet FILE --perceptual FILE [--option value ...]")
    parser.add_argument("source", metavar="IN")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--unet", metavar="FILE", help="checkpoint of `train.py ddpm`, or released weights (see unet.load)")
    parser.add_argument("--perceptual", metavar="FILE", help="checkpoint of `train.py vgg`, or vgg16-397923af.pth")
    parser.add_argument("--lpips", metavar="FILE", help="LPIPS's linear layers for vgg16; every channel counts the same without")
    parser.add_argument("--download", action="store_true", help="fetch vgg16-397923af.pth and lpips-vgg.pth to where these options name them")
    parser.add_argument("--seed", type=int, default=0, metavar="", help="default 0")
    add_sampler_options(parser)
    return vars(parser.parse_args(argv))


def main(argv=None):
    options = parse(argv)
    source, out, seed, wanted = Path(options.pop("source")), Path(options.pop("out")), options.pop("seed"), options.pop("download")
    files = {name: options.pop(name) for name in ("unet", "perceptual", "lpips")}
    with joined(), explained("le.py", ValueError):                   # what unet.load and perceptual.load say of a file
        sampler = sampler_from(options)
        if not source.exists():
            raise BadInput(f"{source}: no such file or folder")
        if source.resolve() in (out.resolve(), *out.resolve().parents):
            raise BadInput(f"{out}: expected a place outside {source}")
        array, lossless = source.suffix in (".npy", ".npz", ".pt"), (".png", ".webp", ".bmp")
        if source.is_file() and not (out.suffix == source.suffix if array else source.suffix.lower() in IMAGES and out.suffix.lower() in lossless):
            raise BadInput(f"{source} {out}: expected two folders, two files that both end in .npy, .npz or .pt, or an image and one of {', '.join(lossless)}")
        for name, stage in (("unet", "ddpm"), ("perceptual", "vgg")):
            if files[name] is None and (name == "unet" or sampler.perceptual_weight):
                raise BadInput(f"--{name} is missing; `python train.py {stage} --data FOLDER`, FOLDER with your own unprotected images in class folders, "
                               f"makes runs/FOLDER/{stage}.pt")
        if wanted and RANK == 0:
            fetch_weights(files["perceptual"], files["lpips"])
        barrier()
        net = accelerated(unet.load(files["unet"], DEVICE).to(memory_format=torch.channels_last))
        distance = perceptual.load(files["perceptual"], files["lpips"], DEVICE).to(memory_format=torch.channels_last) if files["perceptual"] else None
        clean = lambda images, seeds: purify_any(net, distance, images, sampler, seeds)
        if source.is_file() and array:
            purify_array(source, out, clean, seed)
        elif unread := purify_images(share(pairs(source, out)), clean, seed):
            sys.exit(f"le.py: {unread} files could not be read; all others are in {out}")


if __name__ == "__main__":
    main()
