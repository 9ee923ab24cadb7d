"""How fast the inner loops are: images a second, work in one, share of the machine's matrix peak,
and what purification costs, after `python train.py ddpm`.

    python -m studies.bench

On two cores it says that the released schedule costs 39 times as much as ours.
"""
import sys
import time
from dataclasses import replace
from functools import partial

if not __package__:
    print("expected `python -m studies.bench`, from the project's folder", file=sys.stderr)
    sys.exit(2)

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import le
import train
from attacks import PROTECTIONS, fit
from le import Sampler
from unet import DEVICE, on_device
from studies.run import networks, opened, parser_of


def seconds_of(loop):
    """Wall-clock seconds of a call, the GPU's work included."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    loop()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matrix_peak():
    """Operations a second of a large matrix product or convolution, the faster of the two."""
    n = 8192 if DEVICE == "cuda" else 1024
    kind = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    a = torch.randn(n, n, device=DEVICE, dtype=kind)
    product = 2 * n ** 3 / seconds_of(partial(torch.mm, a, a))
    x = on_device(torch.randn(64, 256, 32, 32)).to(kind)
    w = on_device(torch.randn(256, 256, 3, 3)).to(kind)
    convolution = 18 * 256 * x.numel() / seconds_of(partial(F.conv2d, x, w, padding=1))
    return max(product, convolution)


def silent(done, total, **values):
    pass


@torch.no_grad()
def evaluate(net, images, sampler):
    for _ in range(sampler.rounds * sampler.steps):
        for part in images.split(le.BATCH):
            net(part, sampler.t_star)


def train_afresh(unfinished, **how):
    unfinished.unlink(missing_ok=True)                     # of a loop before, if it took long
    train.train_unet(unfinished=unfinished, **how)


def loops_of(c, sets, count=512):
    """{what: (a function, how many images it handles)}."""
    net, distance = networks(c, sets, perceptual=True)
    images, labels = [part[:count] for part in sets["protected"]]
    count = len(images)
    x, y = on_device(images), labels.to(DEVICE)
    classifier = train.victim_of(c, "classifier")
    simclr = train.victim_of(c, "simclr")
    ours = Sampler(**c.sampler)
    longest = le.SAMPLERS["released"]
    shorter = replace(longest, t_star=20, steps=20)
    few = images[:64]
    noise = dict(rounds=1, train_batches=1, batch_size=128)
    once = dict(epochs=1, batch_size=128, lr=0.01, seed=0, report=silent)
    fresh = on_device(train.UNet(**net.config))
    short = c.ddpm | dict(steps=count // c.ddpm["batch_size"], seed=0, report=silent,
                          optimizer=train.OPTIMIZERS[c.ddpm["optimizer"]],
                          unfinished=c.run / "bench.unfinished")
    em = PROTECTIONS["em-sample"].make
    cp = PROTECTIONS["cp-sample"].make
    return {
        "network evaluation":
            (partial(evaluate, net, x, ours), count * ours.rounds * ours.steps),
        "purify": (partial(le.purify, net, distance, images, ours), count),
        "released, 20 levels": (partial(le.purify, net, distance, few, shorter), len(few)),
        "released, 36 levels": (partial(le.purify, net, distance, few, longest), len(few)),
        "U-Net training": (partial(train_afresh, net=fresh, images=images, **short), count),
        "error-minimizing noise": (partial(em, x, y, classifier, **noise), count),
        "contrastive noise": (partial(cp, x, y, simclr, **noise), count),
        "classifier training": (partial(fit, classifier, x, labels, **once), count),
        "SimCLR training": (partial(fit, simclr, x, labels, **once), count)}


def operations_of(loop):
    with FlopCounterMode(display=False) as counter:
        loop()
    return counter.get_total_flops()


def bench(c, sets, repeats=5):
    loops = loops_of(c, sets)
    work = {name: operations_of(loop) for name, (loop, _) in loops.items()}  # also warms up
    times = {name: [] for name in loops}
    peak = 0
    for _ in range(repeats):                               # in turn: a busy machine is so for all
        peak = max(peak, matrix_peak())
        for name, (loop, _) in loops.items():
            times[name].append(seconds_of(loop))
    rate = {}
    for name, (_, count) in loops.items():
        rate[name] = count / np.median(times[name])
        each = work[name] / count
        print(f"{name:<26} {rate[name]:8.0f} images/s of {each / 1e9:6.3g} GFLOP, "
              f"{100 * each * rate[name] / peak:4.1f} % of {peak / 1e12:.3g} TFLOP/s")
    evaluations = c.sampler["rounds"] * c.sampler["steps"]
    bare = rate["network evaluation"] / evaluations
    print(f"purify takes {bare / rate['purify']:.2f} times its {evaluations} network evaluations;")
    for levels in (20, 36):
        slower = rate["purify"] / rate[f"released, {levels} levels"]
        print(f"the released schedule of {levels} levels takes {slower:.1f} times as long")


def main(argv=None):
    parser = parser_of("bench", __doc__)
    with opened(parser, argv) as (_, c, sets, _):
        bench(c, sets)


if __name__ == "__main__":
    main()
