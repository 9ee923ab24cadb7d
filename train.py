"""The whole experiment: protect images, purify them, and see what victims learn from each.

    python train.py --config quick      one protection, half of the images: two to four minutes
    python train.py                     all protections, on built-in images (shapes)
    python train.py ddpm                only the networks that purification needs
    python train.py --data cifar10 --root cifar-10-binary.tar.gz

Read `story` first. What is in runs/ is made again only when what it depends on has changed.
"""
import argparse
import ast
import copy
import gc
import inspect
import json
import math
import multiprocessing
import os
import pickle
import sys
import sysconfig
import tarfile
import time
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache, partial
from hashlib import sha256
from importlib.util import find_spec, module_from_spec, resolve_name
from pathlib import Path
from types import CodeType, FunctionType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

import perceptual
import unet
from attacks import (EPSILON, OPTIMIZERS, PROTECTIONS, VICTIMS, VIEWS, ResNet, Victim,
                     class_scores, fit, min_min, victim_of)
from le import (PURIFIERS, SAMPLERS, TORCHRUN, Parser, Progress, Sampler, looked_at,
                one_line_errors, recovery, shared_store, talks, unused_seed)
from perceptual import VGG, psnr
from unet import DEVICE, BadInput, UNet, as_bytes, as_float, on_device, said, seed_of, train_unet


def named(prefix, values):
    """{"prefix.key": value} of a dict of settings."""
    return {f"{prefix}.{key}": value for key, value in values.items()}


# Every value is an option: --seed 1, --unet.width 48. More are --sampler.steps 8, of le.Sampler;
# --classifier.epochs 4, of attacks.VICTIMS; --noise.em-class.rounds 10, of attacks.PROTECTIONS.
DEFAULTS = {
    "data": "shapes",              # of DATASETS: shapes, cifar10
    "root": "runs/cifar-10-binary.tar.gz",  # the official archive, for --data cifar10
    "out": "",                     # where results are kept; a folder in runs/ if empty
    "seed": 0,                     # of the images, the networks and the noise
    "evaluate": "test",            # clean images that judge: test, or validation while tuning
    "limit": 0,                    # at most so many images, epochs, rounds, steps: does it run?
    "protections": ("em-class", "em-sample", "cp-class", "cp-sample"),  # rows of the table
    "victim": "",                  # of attacks.VICTIMS, judges in place of each protection's own
    "purifier": "joint",           # of le.PURIFIERS
    "epsilon": 255 * EPSILON,      # largest change of a channel, of 255
    "size": 32,                    # pixels a side
    "images.protected": 4096,      # the owner's images, published only as unlearnable examples
    "images.unprotected": 4096,    # the unauthorized user's own images
    "images.validation": 1000,     # clean images that judge while somebody tunes
    "images.test": 2000,           # clean images that judge
    "resnet.widths": (16, 16, 32, 64),  # the victims' network: channels of its stem and levels
    "resnet.blocks": 1,            # residual blocks in each level
    "resnet.strides": (2, 2, 2),   # of each level's first block
    "unet.width": 32,              # channels at the finest resolution
    "unet.mults": (1, 2),          # channels at each resolution, in widths
    "unet.blocks": 1,              # residual blocks at each resolution
    "unet.attention": (),          # resolutions that have attention, in patches
    "unet.dropout": 0.0,           # share of the values that are dropped in training
    "unet.patch": 2,               # so many pixels a side are folded into channels
    "ddpm.levels": 100,            # noise levels 1..levels are learned, no others visited
    "ddpm.tilt": 1.0,              # levels are drawn by their noise's deviation to this power
    "ddpm.steps": 1500,            # training steps of the U-Net
    "ddpm.batch_size": 16,         # images a step
    "ddpm.optimizer": "muon",      # how it learns: a name in attacks.OPTIMIZERS
    "ddpm.lr": 0.03,               # the highest learning rate
    "ddpm.ema_decay": 0.999,       # of the moving average of the weights
    "vgg.width": 16,               # channels of the first stage
    "vgg.convs": (1, 1, 1, 1, 1),  # convolutions of each stage
    "perceptual.epochs": 6,        # of the VGG's training
    "perceptual.batch_size": 32,   # images a step
    "perceptual.lr": 0.03,         # the highest learning rate
    "perceptual.optimizer": "muon",  # how it learns: a name in attacks.OPTIMIZERS
    "vgg_weights": ""}             # a checkpoint of VGG-16, in place of training a small one

# What differs from the defaults. All data but shapes are photographs, without being asked
AS_IN_PAPERS = {"classifier.optimizer": "sgd", "classifier.batch_size": 128, "classifier.lr": 0.1,
                "simclr.optimizer": "sgd", "simclr.view": "simclr", "ddpm.optimizer": "adam"}
CONFIGS = {
    "shapes": {"noise.em-class.lr": 0.05},  # by 0.1 some noise lies in nothing but colours
    "photographs": AS_IN_PAPERS | {
        "images.protected": 6000, "images.unprotected": 5500, "images.test": 2400,
        "images.validation": 500, "resnet.widths": (16, 32, 64, 128), "classifier.epochs": 30,
        "simclr.epochs": 60, "simclr.lr": 0.2, "simclr.temperature": 0.2,
        "unet.width": 48, "ddpm.levels": 250, "ddpm.steps": 6000, "ddpm.lr": 4e-3,
        "perceptual.epochs": 40, "perceptual.optimizer": "sgd", "noise.em-class.rounds": 24,
        "noise.em-sample.rounds": 12} | named("sampler", asdict(SAMPLERS["photographs"])),
    "quick": {"protections": ("em-class",), "images.protected": 2048, "images.unprotected": 2048,
              "noise.em-class.noise_batches": 5, "ddpm.steps": 800, "perceptual.epochs": 4,
              "classifier.epochs": 10},
    "released": named("sampler", asdict(SAMPLERS["released"])),
    # the papers' protocol: ResNet-18, M = 10, K = 20, steps of epsilon / 10, the U-Net of Ho et
    # al., VGG-16; contrastive noise by 20 and 20 batches of 512 and one surrogate
    "paper": AS_IN_PAPERS | {
        "images.protected": 40000, "images.unprotected": 9500, "images.test": 10000,
        "resnet.widths": (64, 64, 128, 256, 512), "resnet.blocks": 2,
        "images.validation": 500, "resnet.strides": (1, 2, 2, 2), "classifier.epochs": 60,
        "simclr.epochs": 200, "simclr.batch_size": 512, "simclr.temperature": 0.5, "simclr.lr": 0.1,
        "unet.width": 128, "unet.mults": (1, 2, 2, 2), "unet.blocks": 2, "unet.attention": (16,),
        "unet.dropout": 0.1, "unet.patch": 1, "ddpm.levels": 1000, "ddpm.tilt": 0.0,
        "ddpm.steps": 40000, "ddpm.batch_size": 128, "ddpm.lr": 2e-4, "ddpm.ema_decay": 0.9999,
        "vgg_weights": "runs/vgg16-lpips.pt"}
    | named("noise.em-class", dict(rounds=40, step=0.1, lr=0.1))
    | named("noise.em-sample", dict(rounds=10, step=0.1, noise_steps=20, lr=0.1))
    | named("noise.cp-class", dict(surrogates=1, rounds=200, train_batches=20, noise_batches=20,
                                   step=0.1, batch_size=512))
    | named("noise.cp-sample", dict(surrogates=1, rounds=40, train_batches=20, noise_steps=5,
                                    step=0.1, batch_size=512))}


# -- The story -------------------------------------------------------------------------------------
def story(c, sets, stage="all"):
    """The paper: networks from unprotected images; then protect, purify and judge. c holds the
    settings, and sets are those of `load_data`: sets["protected"] is (images, labels)."""
    distance = train_vgg(c, sets)                          # first, as it may lack a file
    net = train_ddpm(c, sets)
    if stage == "ddpm":
        return
    rows = []
    for name in c.protections:
        ue = protect(c, name, sets)
        le = make_learnable(c, name, ue, net, distance)
        rows.append(judge(c, name, sets, ue, le))
        del ue, le                                         # before the next ones are made
    if talks():
        show(c, sets, rows)


def train_ddpm(c, sets):
    """The U-Net, trained on the unprotected images only."""
    images, _ = sets["unprotected"]
    torch.manual_seed(c.seed)
    net = UNet(**c.unet, size=images.shape[-1])
    how = c.ddpm | dict(optimizer=OPTIMIZERS[c.ddpm["optimizer"]])
    cached(c, "ddpm", train_unet, net=on_device(net), images=images, seed=c.seed, **how)
    return on_device(unet.load(c.run / "ddpm.pt"))


def train_vgg(c, sets):
    """The perceptual distance, over a VGG trained on the unprotected images and their labels, or
    over released weights; None where the sampler has no use for it."""
    if not c.sampler["perceptual_weight"]:
        return None
    if c.vgg_weights:
        return on_device(perceptual.load(c.vgg_weights))
    images, labels = sets["unprotected"]
    victim = Victim(VGG, class_scores, c.vgg | dict(classes=c.classes))
    cached(c, "vgg", fit, victim=victim, images=on_device(images), labels=labels, seed=c.seed,
           **c.perceptual)
    return on_device(perceptual.load(c.run / "vgg.pt"))


def protect(c, name, sets):
    """The unlearnable examples (N, 3, H, W) that a protection makes of the protected images."""
    protection, how = PROTECTIONS[name], dict(c.noise.get(name, {}))
    if protection.start:
        how["start"] = on_device(protect(c, protection.start, sets))
    images, labels = sets["protected"]
    surrogate = replace(victim_of(c, protection.victim), training={})  # noise has its own
    made = cached(c, name, protection.make, images=on_device(images), labels=labels.to(DEVICE),
                  victim=surrogate, epsilon=c.epsilon / 255, seed=c.seed, **how)
    ue = as_float(made["images"])
    change = 255 * (ue - images).abs_().max()
    if change > c.epsilon + 1e-3:
        print(f"{name}: changes a channel by {change:.0f}/255, more than --epsilon {c.epsilon:g}")
    return ue


def make_learnable(c, name, ue, net, distance):
    """The learnable examples (N, 3, H, W) made from unlearnable ones."""
    seeds = [seed_of(c.seed, place) for place in range(len(ue))]
    made = cached(c, f"{name}-le", PURIFIERS[c.purifier], net=net, distance=distance, images=ue,
                  sampler=Sampler(**c.sampler), seeds=seeds)
    return as_float(made["images"])


def judge(c, name, sets, ue, le):
    """A row of the table, by --victim, or by the victim that the protection is made against."""
    kind, images = kind_of(c, name), sets["protected"][0]
    row = dict(protection=name,                            # LEs first: others begin with the rest
               le=train_victim(c, kind, f"{name}-le", le, sets),
               ue=train_victim(c, kind, f"{name}-ue", ue, sets),
               clean=train_victim(c, kind, "clean", images, sets),
               psnr_ue=psnr(ue, images), psnr_le=psnr(le, images))
    return row | dict(recovery=recovery(row["clean"], row["ue"], row["le"]))


def kind_of(c, name):
    """Which victim judges a protection: "simclr" for "cp-class", if --victim names no other."""
    return c.victim or PROTECTIONS[name].victim


def train_victim(c, kind, name, images, sets):
    """Accuracy in percent, on clean images, of a victim of this kind that `images` have taught."""
    victim = victim_of(c, kind)
    net, losses = fitted(c, f"{kind}-{name}", victim, images, sets)
    score = round(score_of(c, victim, net, sets), 2) if talks() else 0  # a helper shows none
    print(f"{kind} on {name}: {score:.1f} %; loss {losses[0]:.2f} to {losses[-1]:.2f}")
    return score


def fitted(c, name, victim, images, sets):
    """The network of a victim that is trained on the images, and its loss by epoch."""
    made = cached(c, name, fit, victim=replace(victim, training={}), images=on_device(images),
                  labels=sets["protected"][1], seed=c.seed, **victim.training)
    net = on_device(victim.fresh(c.seed)).eval()
    net.load_state_dict(made["weights"])
    return net, made["losses"]


def score_of(c, victim, net, sets):
    """Accuracy of a victim's network in percent on clean images; a probe's where it is probed."""
    if victim.probed:
        return linear_probe(net, sets["unprotected"], sets[c.evaluate])
    return accuracy(net, *sets[c.evaluate])


@torch.no_grad()
def in_parts(function, images):
    """function(images) (N, k) of images (N, 3, H, W), which are on the device 500 at a time."""
    made = torch.cat([function(on_device(part)).cpu() for part in images.split(500)])
    return looked_at("a victim", made, (len(images), -1))


def accuracy(net, images, labels):
    """Percentage of the images that a network in evaluation mode classifies right."""
    return 100 * (in_parts(net, images).argmax(1) == labels).float().mean().item()


def linear_probe(encoder, train, test):
    """Percentage of test images that a linear classifier of the encoder's features gets right.
    train and test are (images, labels). Logistic regression on standardised features, the encoder
    frozen, by L-BFGS to convergence: nothing to tune."""
    x = in_parts(encoder.features, train[0])
    mean, std = x.mean(0), x.std(0) + 1e-6
    linear = nn.Linear(x.shape[1], int(train[1].max()) + 1)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=200, line_search_fn="strong_wolfe")
    def loss():
        optimizer.zero_grad()
        decay = 1e-4 * linear.weight.square().sum()
        value = F.cross_entropy(linear((x - mean) / std), train[1]) + decay
        value.backward()
        return value
    optimizer.step(loss)
    answers = linear((in_parts(encoder.features, test[0]) - mean) / std).argmax(1)
    return 100 * (answers == test[1]).float().mean().item()


def table(rows):
    """The rows of `judge` as a Markdown table; what nobody can know is a dash."""
    columns = dict(clean="{:.1f}", ue="{:.1f}", le="{:.1f}", recovery="{:.2f}",
                   psnr_ue="{:.1f} dB", psnr_le="{:.1f} dB")
    lines = ["| protection | clean | UE | LE | recovery | PSNR UE | PSNR LE |",
             "|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = ["-" if row.get(key) is None else form.format(row[key])
                 for key, form in columns.items()]
        lines.append(f"| {' | '.join([row['protection'], *cells])} |")
    return "\n".join(lines)


def show(c, sets, rows):
    """The table on stdout, and results.json in the run's folder."""
    kinds = [kind_of(c, row["protection"]) for row in rows]
    probed = next((kind for kind in kinds if VICTIMS[kind].probed), "simclr")
    untrained = on_device(victim_of(c, probed).fresh(c.seed)).eval()
    floor = linear_probe(untrained, sets["unprotected"], sets[c.evaluate])
    print(f"\n{table(rows)}\n\nAccuracy in percent on clean {c.evaluate} images; an untrained "
          f"encoder's probe has {floor:.1f}.\n`python -m studies.pictures` shows {c.run}.")
    text = json.dumps(dict(config=vars(c), rows=rows, floor=floor), indent=1, default=str)
    (c.run / "results.json").write_text(text, encoding="utf-8")


# -- Data: shapes ----------------------------------------------------------------------------------
# Four copies of one shape, each in its own colour, place, size and turn: the class is the only
# thing they share. The ground is smooth, so that a protection is easier to see than the shape.

SHAPES = ("disc", "ring", "square", "frame", "triangle", "cross", "star", "crescent", "bars", "nut")


def polygon(p, sides, notch=1.0):
    """Signed distance to a regular polygon with corners at radius 1, or, with the middle of each
    side pulled in by `notch`, to a star."""
    wedge = math.pi / sides                                # fold the plane into half a sector
    angle = torch.atan2(p[..., 0], p[..., 1])
    angle = ((angle + wedge) % (2 * wedge) - wedge).abs()
    x, y = p.norm(dim=-1) * angle.sin(), p.norm(dim=-1) * angle.cos()
    r = math.cos(wedge) * notch
    nx, ny = 1 - r * math.cos(wedge), r * math.sin(wedge)  # normal of the edge
    return (nx * x + ny * (y - 1)) / math.hypot(nx, ny)


def signed_distance(shape, p):
    """Distance of points p (..., 2) to the outline of a shape of radius about 1, < 0 inside."""
    x, y = p.abs().unbind(-1)
    r, box = p.norm(dim=-1), torch.maximum(x, y)
    match shape:
        case "disc": return r - 0.9
        case "ring": return (r - 0.72).abs() - 0.22
        case "square": return box - 0.8
        case "frame": return (box - 0.68).abs() - 0.2
        case "triangle": return polygon(p, 3)
        case "cross": return torch.maximum(box - 0.95, torch.minimum(x, y) - 0.27)
        case "star": return polygon(p / 1.1, 5, notch=0.5)
        case "bars": return torch.maximum(y - 0.85, (x - 0.55).abs() - 0.22)
        case "nut": return torch.maximum(polygon(p, 6), 0.5 - r)
    bite = p - torch.tensor([0.45, 0.0])                   # of the crescent
    return torch.maximum(r - 0.95, 0.72 - bite.norm(dim=-1))


def uniform(generator, low, high, *shape):
    return low + (high - low) * torch.rand(shape, generator=generator)


def shapes(n, seed, size=32):
    """n 8-bit images (n, 3, size, size) in [0, 1] and labels (n,), which go round the ten SHAPES,
    made from the seed alone."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % len(SHAPES)
    images = uniform(g, 0.25, 0.75, n, 3, 1, 1).repeat(1, 1, size, size)
    for scale in (8, 16):                                  # the ground
        coarse = torch.randn(n, 3, size // scale + 1, size // scale + 1, generator=g)
        strength = uniform(g, 0.03, 0.1, n, 1, 1, 1) / 2 ** 0.5
        images += strength * F.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)
    mean = images.mean((2, 3), keepdim=True)
    axis = torch.arange(size) + 0.5
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    for corner in ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)):
        centre = (torch.tensor(corner) + uniform(g, -0.05, 0.05, n, 2)) * size
        radius = uniform(g, 0.16, 0.225, n) * size
        turn = uniform(g, 0, 2 * math.pi, n)
        stretch = uniform(g, -0.2, 0.2, n).exp()
        cos, sin = turn.cos(), turn.sin()
        rotation = torch.stack([cos, sin, -sin, cos], -1).view(n, 2, 2)
        stretch = torch.stack([stretch, 1 / stretch], -1)
        colour = F.normalize(torch.randn(n, 3, 1, 1, generator=g), dim=1) * 3 ** 0.5
        colour *= uniform(g, 0.25, 0.5, n, 1, 1, 1)
        too_far = (mean + colour - 0.5).abs() > 0.5        # black or white
        colour = torch.where(too_far, -colour, colour)
        for k, shape in enumerate(SHAPES):                 # one at a time, to need less memory
            own = labels == k
            p = (points - centre[own, None, None]).flatten(1, 2) @ rotation[own].mT
            r = radius[own].view(-1, 1, 1, 1)
            p = p.view(-1, size, size, 2) / r * stretch[own, None, None]
            distance = signed_distance(shape, p) * r[..., 0]
            images[own] += (0.5 - distance).clamp(0, 1)[:, None] * colour[own]  # 0 outside it
    sun = uniform(g, 0, 2 * math.pi, n, 1, 1)
    x, y = (points / size - 0.5).unbind(-1)
    images *= (1 + 0.2 * (x * sun.cos() + y * sun.sin()))[:, None]
    images += torch.randn(images.shape, generator=g).mul_(0.008)
    return as_float(as_bytes(images)), labels


def drawings(c):
    """The sets of --data shapes, and their class names."""
    return divided(*shapes(sum(c.images.values()), c.seed, c.size), c.images), SHAPES


# -- Data: CIFAR-10 in its official binary layout --------------------------------------------------
CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
CIFAR10_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6)) + ("test_batch.bin",)


def cifar10(root):
    """Images (N, 3, 32, 32) in [0, 1] and labels (N,) for training, and the same of the test batch.
    A record is a label byte and three 32x32 planes. Raises BadInput if there are none such."""
    if not Path(root).is_file():
        raise BadInput(f"--root {root}: no archive; `python -m studies.released cifar10 {root}` "
                       f"fetches {CIFAR10}")
    try:
        with tarfile.open(root) as archive:
            found = {Path(member.name).name: member for member in archive if member.size < 1e8}
            files = [archive.extractfile(found[name]).read() for name in CIFAR10_FILES]
            while archive.fileobj.read(1 << 20):           # to the end, where the checksum is
                pass
    except Exception as error:                             # tar, gzip and xz raise several kinds
        raise BadInput(f"--root {root}: no whole cifar-10-binary.tar.gz ({said(error)})") from None
    parts = []
    for name, content in zip(CIFAR10_FILES, files):
        data = torch.frombuffer(bytearray(content or b" "), dtype=torch.uint8)
        if len(data) % 3073 or data[::3073].max() > 9:
            raise BadInput(f"--root {root}: {name} is cut off or mislabelled; expected records of "
                           "3073 bytes that begin with a label, 0 to 9")
        parts.append(data.view(-1, 3073))
    return [(as_float(part[:, 1:].reshape(-1, 3, 32, 32)), part[:, 0].long())
            for part in (torch.cat(parts[:5]), parts[5])]


def photographs(c):
    """The sets of --data cifar10, of which `test` is of the official test batch; class names."""
    (images, labels), test = cifar10(c.root)
    order = torch.randperm(len(images))                    # by the seed that `load_data` has set
    counts = dict(c.images)
    sets = divided(*test, dict(test=counts.pop("test")))
    return sets | divided(images[order], labels[order], counts), CIFAR10_CLASSES


# A data set of your own is a function of the configuration, and an entry here or in a file of yours
DATASETS = {"shapes": drawings, "cifar10": photographs}


def load_data(c):
    """The four disjoint sets, {name: (images, labels)}, and the class names. Raises BadInput."""
    torch.manual_seed(c.seed)                              # for a set that draws from torch's own
    sets, classes = DATASETS[c.data](c)
    c.classes = len(classes)
    counts = [f"{len(labels)} {name}" for name, (_, labels) in sets.items()]
    print(f"{len(classes)} classes, {', '.join(classes[:10])}; images: {', '.join(counts)}")
    return sets, classes


def divided(images, labels, counts):
    """{set: (images, labels)} of the first images, of those that follow, and so on, by {set: how
    many}: divided(x, y, dict(a=2, b=1)) is dict(a=(x[:2], y[:2]), b=(x[2:3], y[2:3]))."""
    if sum(counts.values()) > len(images):
        raise BadInput(f"--images: {len(images)} are too few for {counts}")
    parts = [part[:sum(counts.values())].split(list(counts.values())) for part in (images, labels)]
    return dict(zip(counts, zip(*parts)))


# -- What is kept: a result, beside hashes of its inputs and of the files that its code is in ------
# Where installed packages are; every other source file counts as somebody's own
INSTALLED = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
INSTALLED.add(sysconfig.get_path("purelib", sysconfig.get_preferred_scheme("user")))


@cache
def own_source(name):
    """(File, hash, names that it imports) of a module, imported or not yet, that is not installed;
    else None, as for a name within a module. The hash is of its syntax, comments and docstrings
    aside. It is read once: what runs is what was there when the program began."""
    try:
        module = sys.modules.get(name) or module_from_spec(find_spec(name))
    except (ImportError, ValueError, AttributeError):
        return None
    file, names = Path(getattr(module, "__file__", None) or ""), set()
    own = file.suffix == ".py" and file.is_file()
    if not own or any(file.is_relative_to(folder) for folder in INSTALLED):
        return None
    tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), module.__package__ or ".")
            names |= {source} | {f"{source}.{alias.name}" for alias in node.names}
        elif isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
            node.body = node.body[ast.get_docstring(node) is not None:]
    return file, sha256(ast.dump(tree).encode()).hexdigest(), names


def files_of(modules):
    """{file: hash} of the own files among these modules, and of what these import in turn, but for
    this file, unless it is named: a new line of the story makes nothing again."""
    found, waiting = {}, set(modules)
    while waiting:
        name = waiting.pop()
        source = own_source(name)
        if name == "__main__" and not source:              # typed in, where nothing shows a change
            return {"code that is in no file": time.time_ns()}
        file, code, imported = source or (None, "", ())
        if file not in (None, *found) and (file != Path(__file__) or name in modules):
            found[file] = code
            waiting.update(imported)
    return {os.path.relpath(file, Path(__file__).parent): found[file] for file in sorted(found)}


class Inputs(pickle.Pickler):
    """Hashes what pickle would write of an input, and adds the modules that its code is in."""

    def __init__(self, value, modules):
        self.hash, self.modules = sha256(), modules
        super().__init__(SimpleNamespace(write=self.hash.update), protocol=4)
        self.fast = True                                   # equal is equal, the same object or not
        self.dump(value)

    def reducer_override(self, thing):
        if isinstance(thing, torch.Tensor):                # in parts, since a copy may be large
            for part in torch.atleast_1d(thing.detach()).split(500):
                self.hash.update(part.cpu().numpy().tobytes())
            return str, (str(thing.dtype), thing.shape)
        if isinstance(thing, nn.Module):                   # a set has no order to rely on
            state = {key: value for key, value in vars(thing).items() if type(value) is not set}
            return type(thing), (state,)
        if isinstance(thing, Path):                        # a file that somebody's function reads
            return str, (thing.read_bytes(),)
        if isinstance(thing, (type, FunctionType)) and thing.__module__ != "builtins":
            self.modules.add(thing.__module__)
            values = [cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()]
            values += [getattr(thing, key, None) for key in ("__defaults__", "__kwdefaults__")]
            if thing.__name__ == "<lambda>":               # its file may have several
                values.append(thing.__code__)
            return str, (thing.__qualname__, values)
        if isinstance(thing, CodeType):                    # of a lambda, or of a loop within it
            return str, (thing.co_code, thing.co_names, thing.co_consts)
        return NotImplemented


def hashes(inputs):
    """{input or file: hash} of a result's inputs and of the files that their code is in."""
    modules = set()
    found = {key: Inputs(value, modules).hash.hexdigest() for key, value in inputs.items()}
    return found | files_of(modules)


def kept(path, parts):
    """(What a file holds, "") if it was made of the same parts, else (None, why it is made)."""
    if not path.exists():
        return None, ""
    try:
        made = unet.read(path)
        changed = [key for key in parts | made["parts"] if parts.get(key) != made["parts"].get(key)]
    except (BadInput, KeyError, TypeError, AttributeError):
        return None, f" again, as {path} is damaged,"
    changed = ["Python"] if "Python" in changed else changed[:4]  # whose syntax differs
    return (None, f" again, as {', '.join(changed)} changed,") if changed else (made, "")


TEAM = SimpleNamespace(store=None, waits=True, helpers=[])  # several processes; who does what


def cached(c, name, make, /, **inputs):
    """What make(**inputs, report=...) gives, or what it gave if nothing has changed since, kept in
    the run's folder as name.pt: a dict, "images" in which, of a protection or a purifier, are
    bytes. Of several processes the first that asks makes it. Says what changed and how long."""
    path, start = c.run / f"{name}.pt", time.monotonic()
    parts = hashes(dict(function=make) | inputs) | dict(Python=sys.version_info[:2])
    made, why = kept(path, parts)
    if made:
        print(f"{name}: kept" + f", made on {made['device']}" * (made["device"] != DEVICE))
        return made
    work = f"{name}.{sha256(repr(parts).encode()).hexdigest()[:8]}"
    if TEAM.store and TEAM.store.add(work, 1) > 1:         # another process has begun it
        if not TEAM.waits:
            raise BlockingIOError
        while not TEAM.store.check([f"{work} is done"]):
            if any(helper.exitcode for helper in TEAM.helpers):
                raise BadInput(f"{name}: the process that began it has failed")
            time.sleep(0.2)
        return unet.read(path)
    inputs = copy.deepcopy(inputs)                         # a function may work in place
    if make is train_unet:                                 # it goes on where it was cut off
        inputs["unfinished"] = c.run / f"{work}.unfinished"
    torch.manual_seed(c.seed)                              # for those who draw from torch's own
    made = make(**inputs, report=Progress(name))
    if not isinstance(made, dict):
        if unused_seed(make):
            print(f"{name}: makes no use of its seed")
        made = looked_at(name, made, inputs["images"].shape, (0, 1))
        made = dict(images=as_bytes(made).cpu())
    unet.save(path, made | dict(parts=parts, seconds=time.monotonic() - start, device=DEVICE))
    for unfinished in c.run.glob(f"{name}.*.unfinished"):
        unfinished.unlink()
    if TEAM.store:
        TEAM.store.set(f"{work} is done", "")
    print(f"{name}: made{why} in {time.monotonic() - start:.0f} s", flush=True,
          file=sys.stdout if talks() else sys.__stdout__)  # a fork ends without a flush
    return unet.read(path)


# -- Command line ----------------------------------------------------------------------------------
def every_option():
    """{option: its default}: of DEFAULTS, of the sampler, of victims and protections."""
    found = DEFAULTS | named("sampler", asdict(Sampler()))
    for name, victim in VICTIMS.items():
        found |= named(name, victim.training | victim.choice)
    for name, protection in PROTECTIONS.items():
        found |= named(f"noise.{name}", protection.options())
    return found


def numbers(text):
    """Comma-separated numbers as a tuple: numbers("1,2") is (1, 2), and numbers("") is ()."""
    return tuple(float(n) if "." in n else int(n) for n in text.split(",") if n)


KINDS = {"protections": partial(str.split, sep=","), tuple: numbers, str: str, float: float}
CHOICES = {"purifier": PURIFIERS, "victim": VICTIMS, "view": VIEWS, "optimizer": OPTIMIZERS,
           "evaluate": ("validation", "test"), "shared": ("image", "class", "all")}
# How many of something: --limit shortens them
COUNTS = ("protected", "unprotected", "validation", "test", "epochs", "steps", "rounds", "batches",
          "surrogates", "train_batches", "noise_steps", "batch_size")


def parse(argv):
    """The stage, and the configuration that the arguments ask for."""
    options = every_option()
    source = Path(__file__).read_text(encoding="utf-8")    # in which the options stand
    block = source[source.index("DEFAULTS = {"):source.index("\n\n# What differs")]
    says = f"{block}\n{inspect.getsource(Sampler)}\n{fit.__doc__}\n{min_min.__doc__}"
    hidden = argparse.SUPPRESS
    parser = Parser(prog="train.py", usage="train.py [all | ddpm] [--OPTION VALUE ...]",
                    description=__doc__, epilog=says.replace("%", "%%"), allow_abbrev=False,
                    argument_default=hidden, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("all", "ddpm"), help="default all")
    parser.add_argument("--config", choices=CONFIGS, action="append", default=[],
                        help="default: shapes or photographs; given twice, the second adds to it")
    for option, default in options.items():
        kind = KINDS.get(option) or KINDS.get(type(default), int)
        choices = CHOICES.get(option.rpartition(".")[2])
        parser.add_argument(f"--{option}", dest=option, type=kind, choices=choices, help=hidden)
    if not argv or argv[0].startswith("-"):
        argv = ["all", *argv]
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        raise BadInput(f"{unknown[0]}: no such option; those of `python -m studies.own` are "
                       "--published and --unprotected")
    asked = {option: value for option, value in vars(given).items() if option in options}
    data = (options | asked)["data"]
    if data not in DATASETS:
        raise BadInput(f"--data {data}: expected one of {', '.join(DATASETS)}; for a folder, "
                       "`python -m studies.own`")
    if not {"shapes", "photographs"} & {*given.config}:
        options |= CONFIGS["shapes" if data == "shapes" else "photographs"]
    for name in given.config:
        options |= CONFIGS[name]
    options |= asked
    for option, value in options.items():
        word, number = option.rpartition(".")[2], isinstance(value, (int, float))
        if number and word in (*COUNTS, "lr") and not 0 < value < 2 ** 31:
            raise BadInput(f"--{option} {value}: expected a number above 0")
        if number and word in (*COUNTS, "warm_up") and option != "sampler.steps":
            options[option] = min(value, options["limit"] or value)
    c = nested(options)
    check(c)
    parts = given.config + [f"limit{c.limit}"][:c.limit] + [f"seed{c.seed}"][:c.seed]
    c.run = Path(c.out or f"runs/{'-'.join([Path(data).name, *parts])}")
    print(f"{c.run}, on {DEVICE}:", *[f"{option}={value}" for option, value in asked.items()])
    return given.stage, c


def nested(options):
    """The options as a namespace, those with a dot in dicts: c.seed, c.unet["width"]."""
    c = {}
    for option, value in options.items():
        (*groups, key), owner = option.split("."), c
        for group in groups:
            owner = owner.setdefault(group, {})
        owner[key] = value
    return SimpleNamespace(**c)


def check(c):
    """Raise BadInput, naming the option, where a value makes no sense."""
    for option, fits, expected in (
            ("seed", 0 <= c.seed < 2 ** 31, "0 to 2 ** 31"),
            ("limit", c.limit != 1 and c.limit >= 0, "2 or more"),
            ("epsilon", 1 <= c.epsilon <= 255, "1 to 255"),
            ("ddpm.levels", 1 <= c.ddpm["levels"] <= unet.T, f"1 to {unet.T}"),
            ("ddpm.tilt", 0 <= c.ddpm["tilt"] <= 10, "0 to 10"),
            # below 8, oneDNN (torch 2.13.0) errs in gradients of strides where AVX2 is the best
            ("resnet.widths", min(c.resnet["widths"] or [0]) >= 8, "8 or more each"),
            ("protections", set(c.protections) <= set(PROTECTIONS), ",".join(PROTECTIONS)),
            ("sampler.t_star", c.sampler["t_star"] <= c.ddpm["levels"], "at most --ddpm.levels")):
        if not fits:
            raise BadInput(f"--{option}: expected {expected}")
    Sampler(**c.sampler)
    for option, network in (("unet", partial(UNet, **c.unet, size=c.size)),
                            ("vgg", partial(VGG, **c.vgg)),
                            ("resnet", partial(ResNet, **c.resnet, classes=2))):
        try:
            network()(torch.zeros(1, 3, c.size, c.size), *[1] * (option == "unet"))
        except Exception as error:                         # whatever the values lead to
            raise BadInput(f"--{option}: no network for images of {c.size} pixels has these "
                           f"settings ({said(error)})") from None


def claim(c):
    """Make the run's folder, which belongs to one data set and one seed."""
    c.run.mkdir(parents=True, exist_ok=True)
    note, now = c.run / "data.txt", f"{c.data} --seed {c.seed}"
    before = os.fsdecode(note.read_bytes()) if note.exists() else ""
    data = before.partition(" --seed ")[0]
    if before not in ("", now) and (data in DATASETS or Path(data).exists()):  # else it was moved
        raise BadInput(f"{c.run} belongs to --data {before}; give another --out")
    if before != now:
        note.write_bytes(os.fsencode(now))


def start_helpers(c, sets):
    """Share the stages with forks of this process, at most one for each protection, and in all as
    many processes as threads. One thread makes a stage, so their number does not move numbers."""
    count = min(torch.get_num_threads() - 1, len(c.protections))
    torch.optim.SGD([torch.zeros(1)])                      # loads the compiler once, for all
    gc.freeze()                                            # whose pages no collection then copies
    TEAM.store, fork = shared_store(), multiprocessing.get_context("fork").Process
    TEAM.helpers = [fork(name="helper", target=help_out, args=(c, sets, TEAM.store.port),
                         daemon=True) for _ in range(count)]
    for helper in TEAM.helpers:
        helper.start()


@one_line_errors("train.py")
def help_out(c, sets, port=0):
    """The work of another process: noise, and victims of UEs and of clean images, but for what has
    been begun (`cached` raises BlockingIOError), the last protection's first; then the story."""
    TEAM.store, TEAM.waits, c.protections = shared_store(port), False, c.protections[::-1]
    for name in c.protections:
        with suppress(BlockingIOError):
            train_victim(c, kind_of(c, name), f"{name}-ue", protect(c, name, sets), sets)
    for name in c.protections:
        with suppress(BlockingIOError):
            train_victim(c, kind_of(c, name), "clean", sets["protected"][0], sets)
    TEAM.waits = True
    story(c, sets)


def main(argv=None):
    """The command line: `python train.py`, or a file of your own that adds entries and calls it."""
    with one_line_errors("train.py"):
        start = time.monotonic()
        stage, c = parse(sys.argv[1:] if argv is None else argv)
        sets, _ = load_data(c)
        claim(c)
        if not talks():                                    # another of torchrun's
            return help_out(c, sets) if stage == "all" else None
        if TORCHRUN:
            TEAM.store = shared_store()
        elif stage == "all" and argv is None and DEVICE == "cpu" and sys.platform == "linux":
            start_helpers(c, sets)
        story(c, sets, stage)
        print(f"It took {time.monotonic() - start:.0f} s.")


# hash the files now, since what is edited from here on does not run
files_of([name for name in list(sys.modules) if own_source(name)])
torch.set_flush_denormal(True)        # denormal numbers late in training slow a CPU down

if __name__ == "__main__":
    main()
