"""Learnable unauthorized examples: the joint-conditional diffusion model of Jiang et al. 2023.

("Unlearnable Examples Give a False Sense of Security", arXiv 2305.09241.) An unlearnable example
(UE) is diffused a little, until the noise drowns the protection, and denoised by a U-Net that knows
only unprotected images. Two conditions pull every reverse step back towards the UE, so that the
picture survives and the protection does not: pixel distance, then perceptual distance.

Reading order: Sampler -> purify -> denoise -> guidance -> joint_conditioned_mean. Below them is
what every command needs: errors in one line, progress. `train.py` tells the story.
"""
import argparse
import dis
import inspect
import math
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import current_process

import torch

from unet import (DEVICE, BadInput, as_bytes, as_float, mixed_precision, posterior, predict_x0,
                  q_sample, sigma, visited_levels)

BATCH = 512 if DEVICE == "cuda" else 32                    # images purified at once
TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ             # whether it has started this process


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

    def seen(self, x):
        """What the distances see of images (B, 3, H, W): themselves, or grey values as channels.
        Noise against photographs is mostly colour: grey keeps the picture, and the U-Net paints it
        anew. Both are symmetric projections, so to see a gradient is to apply the chain rule."""
        return x.mean(1, keepdim=True).expand_as(x) if self.compare == "grey" else x


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


def guidance(x, y, y_features, t, distance, sampler):
    """Gradient for x of its weighted distances to y that count at level t (Jiang et al. 2023).

    x, y (B, 3, H, W) in [-1, 1], each image's distances its own: the mean squared difference, above
    level pixel_above; and the perceptual distance, at perceptual_below and below. Its y_features
    are `distance.embed` of y / 2 + 0.5, or None where it does not count."""
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
    """The mean of N(mean, var) that exp(-s_t * gradient . x) tilts to the UE (Jiang et al. 2023).

    s_t = sqrt((1 - alpha_bar_t) / alpha_bar_t) lets the pull fade with the noise; the weight is in
    the gradient. No pixel is pulled further than one standard deviation of the step: where VGG's
    features are next to nothing, to scale them to unit length makes their gradient huge."""
    return mean - (var * sigma(t) * gradient).clamp(-var.sqrt(), var.sqrt())


def denoise(net, distance, ue, sampler, draw):
    """The way of one batch of UEs (B, 3, H, W) in [-1, 1] to their LEs (Jiang et al. 2023): yields
    x_t at every level that is visited, the LEs last. `draw()` gives normal noise of that shape."""
    visited = visited_levels(sampler.t_star, sampler.steps)
    y, y_features = sampler.seen(ue), None
    if sampler.perceptual_weight:
        y_features = distance.embed(y / 2 + 0.5)
    xt = ue
    for _ in range(sampler.rounds):
        xt = q_sample(xt, sampler.t_star, draw())
        yield xt
        for t, s in zip(visited, visited[1:]):
            with mixed_precision(xt.device):
                eps = net(xt, t)
            x0 = predict_x0(xt, t, eps.float()).clamp(-1, 1)
            mean, var = posterior(x0, xt, t, s)
            if s > 0:                                      # the last stride has no variance
                compared = x0
                if sampler.target == "xt":
                    compared, y = xt, sampler.seen(q_sample(ue, t, draw()))
                    y_features = distance.embed(y / 2 + 0.5) if y_features else None
                compared = sampler.seen(compared)
                gradient = guidance(compared, y, y_features, t, distance, sampler)
                mean = joint_conditioned_mean(mean, var, t, sampler.seen(gradient))
            xt = mean + var.sqrt() * draw()
            yield xt


@torch.no_grad()
def purify(net, distance, images, sampler=Sampler(), seeds=None, batch_size=BATCH, report=None):
    """Turn unlearnable examples into learnable ones by the joint-conditional diffusion model.

    images (N, 3, H, W) in [0, 1] -> LEs of the same shape, rounded to multiples of 1/255.
    net predicts the noise in images in [-1, 1]; distance is a PerceptualDistance, or None where
    its weight is 0. seeds (N,) ints, default 0..N-1, are those of each image's own noise, so LEs do
    not depend on batch_size. report(done, total) is called after each batch.
    Raises BadInput if the images are not in [0, 1], if the U-Net cannot take their size or has
    not learned level t_star, or if what comes out is not finite."""
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
        for made in denoise(net, distance, ue, sampler, draw):
            pass                                           # only where the way ends
        if not made.isfinite().all():
            raise BadInput("the sampled images are not finite")
        out[i:i + len(ue)] = as_float(as_bytes(made / 2 + 0.5))
        if report:
            report(i + len(ue), len(images))
    return out


def recovery(clean, ue, le):
    """Share of what UEs took that LEs give back, None of 1 or less: recovery(90, 10, 70) is 0.75"""
    return (le - ue) / (clean - ue) if clean - ue > 1 else None


# A purifier is a function (net, distance, images, sampler, seeds, report) -> images in [0, 1]
PURIFIERS = {"joint": purify}


# -- What every command needs: errors in one line, progress ----------------------------------------

def talks():
    """Whether this process prints: of torchrun's that of rank 0, and no helper of another."""
    return current_process().name != "helper" and not (TORCHRUN and os.environ["RANK"] != "0")


def shared_store(port=0):
    """Where processes agree who makes what: torchrun's store, the one at the port, or a new one."""
    torch.set_num_threads(1)                               # each of them works by one thread
    if TORCHRUN:
        if DEVICE == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        return next(torch.distributed.rendezvous("env://"))[0]
    return torch.distributed.TCPStore("localhost", port, is_master=not port, wait_for_workers=False)


@contextmanager
def one_line_errors(program):
    """Within, what a user can mend ends the program with one line and exit code 2."""
    if not talks():
        sys.stdout = open(os.devnull, "w")
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):     # so that nothing half-written stays
            signal.signal(number, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):                 # a notebook's stream is another
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal need not know every letter
    try:
        yield
    except (BadInput, OSError) as error:
        named = getattr(error, "filename", None)
        print(f"{program}: {f'{named}: {error.strerror}' if named else error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if talks():
            print(f"\n{program}: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def looked_at(whose, made, shape, within=(-math.inf, math.inf)):
    """A tensor that somebody's function has made, if it has this shape, where -1 is any number, and
    finite values within these, but for rounding. Raises BadInput, naming whose it is, if not."""
    if not isinstance(made, torch.Tensor):
        raise BadInput(f"{whose} gave a {type(made).__name__}, expected a tensor")
    if made.ndim != len(shape) or any(n not in (-1, m) for n, m in zip(shape, made.shape)):
        raise BadInput(f"{whose} gave {tuple(made.shape)}, expected {tuple(shape)}")
    low, high = made.min().item(), made.max().item()
    if not (within[0] - 0.002 <= low and high <= within[1] + 0.002 and math.isfinite(low + high)):
        raise BadInput(f"{whose} gave {low:.3g} to {high:.3g}, expected {within}, finite")
    if len(made) > 1 and made.ndim == 4 and (made == made[:1]).all():
        raise BadInput(f"{whose} gave one image for all {len(made)}")
    return made


def unused_seed(make):
    """Whether a protection or a purifier never looks at the seed, or seeds, that it is given."""
    function = inspect.unwrap(getattr(make, "func", make))
    steps = dis.get_instructions(getattr(function, "__code__", None) or type(function).__call__)
    return not any("seed" in str(step.argval) for step in steps if step.opname.startswith("LOAD"))


class Progress:
    """report(done, total, **values): one line on stderr that rewrites itself, with the time left;
    off a terminal, a line every 20 s. Values are looked at only when shown, since that may mean to
    wait for a GPU. Raises BadInput when one is not finite."""

    def __init__(self, label):
        self.label, self.shown = label, None

    def __call__(self, done, total, **values):
        now, live = time.monotonic(), talks() and sys.stderr.isatty()
        if self.shown is None:
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


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")
