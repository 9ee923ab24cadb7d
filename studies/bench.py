"""How fast the inner loops are: images a second, work in one, share of the machine's matrix peak,
and what purification costs, after `python train.py ddpm`.

    python -m studies.bench
"""
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import le
import train
from le import DEVICE, Sampler, on_device
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
    n, kind = (8192, torch.bfloat16) if DEVICE == "cuda" else (1024, torch.float32)
    a = torch.randn(n, n, device=DEVICE, dtype=kind)
    x, w = on_device(torch.randn(64, 256, 32, 32)), on_device(torch.randn(256, 256, 3, 3))
    product = 2 * n ** 3 / seconds_of(partial(torch.mm, a, a))
    convolve = partial(F.conv2d, x.to(kind), w.to(kind), padding=1)
    return max(product, 18 * 256 * x.numel() / seconds_of(convolve))


def silent(done, total, **values):
    pass


@torch.no_grad()
def evaluate(net, images, sampler):
    for _ in range(sampler.rounds * sampler.steps):
        for part in images.split(le.BATCH):
            net(part, sampler.t_star)


def loops_of(c, sets, count=512):
    """{what: (a function, how many images it handles)}."""
    net, distance = networks(c, sets, perceptual=True)
    images, labels = [part[:count] for part in sets["protected"]]
    x, y = on_device(images), labels.to(DEVICE)
    sampler, released = Sampler(**c.sampler), le.SAMPLERS["released"]
    fresh = train.new_network(train.UNet, net.config, 0)
    short = c.ddpm | dict(steps=count // c.ddpm["batch_size"], seed=0, report=silent,
                          partial=c.run / "bench.partial")
    noise = dict(rounds=1, train_batches=1, batch_size=128)
    classifier, simclr = [train.victim_of(c, kind, sets) for kind in ("classifier", "simclr")]
    once = dict(epochs=1, batch_size=128, lr=0.01, seed=0, report=silent)
    few = x[:64]
    return {
        "network evaluation": (partial(evaluate, net, x, sampler),
                               count * sampler.rounds * sampler.steps),
        "purify": (partial(le.purify, net, distance, images, sampler), count),
        "released, 20 levels": (partial(le.purify, net, distance, few.cpu(), Sampler(
            **vars(released) | dict(t_star=20, steps=20))), 64),
        "released, 36 levels": (partial(le.purify, net, distance, few.cpu(), released), 64),
        "U-Net training": (partial(train.train_unet, fresh, images, **short), count),
        "error-minimizing noise": (partial(train.PROTECTIONS["em-sample"].make, x, y, classifier,
                                           **noise), count),
        "contrastive noise": (partial(train.PROTECTIONS["cp-sample"].make, x, y, simclr, **noise),
                              count),
        "classifier training": (partial(train.fit, classifier, images, labels, **once), count),
        "SimCLR training": (partial(train.fit, simclr, images, labels, **once), count)}


def bench(c, sets, repeats=5):
    loops = loops_of(c, sets)
    times, work, peak = {name: [] for name in loops}, {}, 0
    for name, (loop, _) in loops.items():                  # which also warms up
        with FlopCounterMode(display=False) as counter:
            loop()
        work[name] = counter.get_total_flops()
    for _ in range(repeats):                               # in turn: a busy machine is so for all
        peak = max(peak, matrix_peak())
        for name, (loop, _) in loops.items():
            times[name].append(seconds_of(loop))
    rate = {name: count / np.median(times[name]) for name, (_, count) in loops.items()}
    for name, (_, count) in loops.items():
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
