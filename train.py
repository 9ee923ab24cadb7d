"""The whole experiment: protect images, purify them, and see what victims learn from each.

    python train.py --config quick      the story on one protection, in four to eight minutes
    python train.py                     all protections, on built-in images (shapes)
    python train.py ddpm                only the networks that purification needs
    python train.py --data cifar10 --root cifar-10-binary.tar.gz
    python train.py --data DIR          your own folder of class folders with images
    torchrun --nproc_per_node=2 train.py    by two processes, on a GPU each if there are any

On 2 cores of an AMD EPYC the quick look prints clean 99.3, UE 18.6, LE 97.9, recovery 0.98. The
whole story, in 11 to 25 minutes, goes on from there: noise takes a classifier from 99 % to about
20, and purification brings it back to 98; it takes SimCLR from 98 % to 60 or 66, and back to 97.

Read `story` first. Results are kept in runs/, with a table and a picture, and made again only when
their inputs, their settings or the files that their code is in have changed.
"""
import argparse
import ast
import inspect
import json
import math
import os
import pickle
import re
import sys
import tarfile
import textwrap
import time
from dataclasses import asdict
from functools import cache, partial
from hashlib import sha256
from importlib.util import find_spec, resolve_name
from pathlib import Path
from types import FunctionType, SimpleNamespace
from uuid import uuid4

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

import perceptual
import unet
from attacks import (EPSILON, OPTIMIZERS, PROTECTIONS, VICTIMS, VIEWS, ResNet, Victim,
                     class_scores, fit, publish, published, victim_of)
from le import (IMAGES, PURIFIERS, SAMPLERS, Parser, Progress, Sampler, all_here, as_bytes,
                as_float, channels_second, described, divided, download, image_files, images_of,
                one_line_errors, open_image, pixels_of, processes, read_arrays, writes_last)
from perceptual import VGG
from unet import DEVICE, PROCESSES, RANK, BadInput, UNet, on_device, said, train_unet


def named(prefix, values):
    """{"prefix.key": value} of a dict of settings."""
    return {f"{prefix}.{key}": value for key, value in values.items()}


# Every value is an option: --seed 1, --unet.width 48. More are --sampler.steps 8, of le.Sampler;
# --classifier.epochs 4, of attacks.VICTIMS; --noise.em-class.rounds 10, of attacks.PROTECTIONS
DEFAULTS = {
    "data": "shapes",              # shapes, cifar10, or a folder of class folders
    "root": "runs/cifar-10-binary.tar.gz",  # the official archive, for --data cifar10
    "published": "",               # others' UEs or perturbations of the first training images
    "unprotected": "",             # beside them: a folder of class folders, or test
    "out": "",                     # where results are kept; a folder in runs/ if empty
    "seed": 0,                     # of the images, the networks and the noise
    "evaluate": "test",            # clean images that judge: test, or validation while tuning
    "limit": 0,                    # at most so many images, epochs, rounds, steps: does it run?
    "protections": ("em-class", "em-sample", "cp-class", "cp-sample"),  # rows of the table
    "victim": "",                  # of attacks.VICTIMS, judges in place of each protection's own
    "purifier": "joint",           # of le.PURIFIERS
    "epsilon": 255 * EPSILON,      # largest change of a channel, of 255
    "size": 32,                    # a folder's images are cropped and resized to size x size
    # four disjoint sets; a folder is divided in these proportions
    "images.protected": 4096,      # the owner's images, published only as unlearnable examples
    "images.unprotected": 4096,    # the unauthorized user's own images
    "images.validation": 1000,     # clean images that judge while somebody tunes
    "images.test": 2000,           # clean images that judge
    "resnet.widths": (16, 24, 48, 96),  # the victims' network: channels of its stem and levels
    "resnet.blocks": 1,            # residual blocks in each level
    "resnet.strides": (2, 2, 2),   # of each level's first block
    "unet.width": 32,              # channels at the finest resolution
    "unet.mults": (1, 2),          # channels at each resolution, in widths
    "unet.blocks": 1,              # residual blocks at each resolution
    "unet.attention": (),          # resolutions that have attention, in patches
    "unet.dropout": 0.0,           # share of the values that are dropped in training
    "unet.patch": 2,               # so many pixels a side are folded into channels
    "unet_start": "",              # a checkpoint, such as released weights, to go on from
    "ddpm.levels": 100,            # noise levels 1..levels are learned, no others visited
    "ddpm.tilt": 1.0,              # levels are drawn by their noise's deviation to this power
    "ddpm.steps": 2000,            # training steps of the U-Net
    "ddpm.batch_size": 16,         # images a step
    "ddpm.lr": 4e-3,               # the highest learning rate
    "ddpm.ema_decay": 0.999,       # of the moving average of the weights
    "vgg.width": 16,               # channels of the first stage
    "vgg.convs": (1, 1, 1, 1, 1),  # convolutions of each stage
    "perceptual.epochs": 6,        # of the VGG's training
    "perceptual.batch_size": 32,   # images a step
    "perceptual.lr": 0.03,         # the highest learning rate
    "perceptual.optimizer": "muon",  # how it learns: a name in attacks.OPTIMIZERS
    "vgg_weights": "",             # torchvision's vgg16-397923af.pth, in place of training one
    "lpips": ""}                   # LPIPS's linear layers for it

# How the papers' classifiers learn
BY_SGD = {"classifier.optimizer": "sgd", "classifier.batch_size": 128, "classifier.lr": 0.1}

# What differs from the defaults. Photographs are cifar10 and folders, without being asked
CONFIGS = {
    "shapes": {},
    "photographs": BY_SGD | {
        "images.protected": 6000, "images.unprotected": 5500, "images.validation": 500,
        "images.test": 2400,
        "resnet.widths": (16, 32, 64, 128),
        "classifier.epochs": 30,
        "simclr.epochs": 60, "simclr.lr": 0.2, "simclr.view": "simclr", "simclr.temperature": 0.2,
        "unet.width": 48,
        "ddpm.levels": 250, "ddpm.steps": 6000,
        "perceptual.epochs": 40, "perceptual.optimizer": "sgd",
        "noise.em-class.rounds": 24,
        "noise.em-sample.rounds": 12} | named("sampler", asdict(SAMPLERS["photographs"])),
    "quick": {"protections": ("em-class",)},
    "released": named("sampler", asdict(SAMPLERS["released"])),
    # the papers' protocol: ResNet-18, M = 10, K = 20, steps of epsilon / 10, the U-Net of Ho et
    # al., VGG-16; contrastive noise by 20 and 20 batches of 512 and one surrogate
    "paper": BY_SGD | {
        "images.protected": 40000, "images.unprotected": 9500, "images.validation": 500,
        "images.test": 10000,
        "resnet.widths": (64, 64, 128, 256, 512), "resnet.blocks": 2,
        "resnet.strides": (1, 2, 2, 2),
        "classifier.epochs": 60,
        "simclr.epochs": 200, "simclr.batch_size": 512, "simclr.view": "simclr",
        "simclr.temperature": 0.5,
        "unet.width": 128, "unet.mults": (1, 2, 2, 2), "unet.blocks": 2, "unet.attention": (16,),
        "unet.dropout": 0.1, "unet.patch": 1,
        "ddpm.levels": 1000, "ddpm.tilt": 0.0, "ddpm.steps": 40000, "ddpm.batch_size": 128,
        "ddpm.lr": 2e-4, "ddpm.ema_decay": 0.9999,
        "vgg_weights": "runs/vgg16-397923af.pth",
        "lpips": "runs/lpips-vgg.pth"}
    | named("noise.em-class", dict(rounds=40, step=0.1))
    | named("noise.em-sample", dict(rounds=10, step=0.1, noise_steps=20, lr=0.1))
    | named("noise.cp-class", dict(surrogates=1, rounds=200, train_batches=20, noise_batches=20,
                                   step=0.1, batch_size=512))
    | named("noise.cp-sample", dict(surrogates=1, rounds=40, train_batches=20, noise_steps=5,
                                    step=0.1, batch_size=512))}

torch.set_flush_denormal(True)        # denormal numbers late in training slow a CPU down


# -- The story -------------------------------------------------------------------------------------

def story(c, stage="all"):
    """The paper: networks from unprotected images; then protect, purify and judge."""
    sets, _ = load_data(c)
    claim(c)
    if stage == "all" and min(len(labels) for _, labels in sets.values()) < 2:
        raise BadInput(f"--data {c.data}: expected two or more images in each of the four sets")
    distance = train_vgg(c, sets)                          # first, as it may lack a file
    net = train_ddpm(c, sets)
    if stage == "ddpm":
        return
    rows, pictures = [], {}
    for name in c.protections:
        ue = protect(c, name, sets)
        le = make_learnable(c, name, ue, net, distance)
        rows.append(judge(c, name, sets, ue, le))
        pictures[name] = of_each_class(sets, ue), of_each_class(sets, le)
        del ue, le                                         # as memory counts here
    if RANK == 0:
        show(c, sets, rows, pictures)


def train_ddpm(c, sets):
    """The U-Net, trained on the unprotected images only."""
    images, _ = sets["unprotected"]
    torch.manual_seed(c.seed)
    net = on_device(UNet(**c.unet, size=images.shape[-1]))
    if c.unet_start:
        net = on_device(unet.load(c.unet_start))
    cached(c, "ddpm", train_unet, net=net, images=images, seed=c.seed, **c.ddpm)
    return on_device(unet.load(c.run / "ddpm.pt"))


def train_vgg(c, sets):
    """The perceptual distance, None where the sampler has no use for it.

    Over released weights, or over a VGG trained on the unprotected images and their labels.
    """
    if not c.sampler["perceptual_weight"]:
        return None
    if c.vgg_weights:
        return on_device(perceptual.load(c.vgg_weights, c.lpips))
    images, labels = sets["unprotected"]
    victim = Victim(VGG, class_scores, c.vgg | dict(classes=count_classes(sets)))
    cached(c, "vgg", fit, victim=victim, images=on_device(images), labels=labels, seed=c.seed,
           **c.perceptual)
    return on_device(perceptual.load(c.run / "vgg.pt"))


def protect(c, name, sets):
    """The unlearnable examples (N, 3, H, W) that a protection makes of the protected images."""
    if name == "published":
        return sets["published"][0]
    protection, how = PROTECTIONS[name], dict(c.noise.get(name, {}))
    if protection.start:
        how["start"] = on_device(protect(c, protection.start, sets))
    images, labels = sets["protected"]
    if images is None:
        raise BadInput(f"--protections {name}: there are no originals; expected published alone")
    made = cached(c, name, published, protection=protection.make, images=on_device(images),
                  labels=labels, victim=victim_in(c, protection.victim, sets),
                  epsilon=c.epsilon / 255, seed=c.seed, **how)
    ue = as_float(made["images"])
    if ue.shape != images.shape:
        raise BadInput(f"{name} gave images {tuple(ue.shape)}, expected {tuple(images.shape)}")
    change = 255 * (ue - images).abs_().max()
    if change > c.epsilon + 1e-3:
        print(f"{name}: changes a channel by {change:.0f}/255, more than --epsilon {c.epsilon:g}")
    return ue


def make_learnable(c, name, ue, net, distance):
    """The learnable examples (N, 3, H, W) made from unlearnable ones."""
    made = cached(c, f"{name}-le", divided, purifier=PURIFIERS[c.purifier], net=net,
                  distance=distance, images=ue, sampler=Sampler(**c.sampler), seed=c.seed)
    return as_float(made["images"])


def judge(c, name, sets, ue, le):
    """A row of the table, by --victim, or by the victim that the protection is made against."""
    kind, images = kind_of(c, name), sets["protected"][0]
    row = dict(protection=name)
    if images is not None:
        row["clean"] = train_victim(c, kind, "clean", images, sets)
    row["ue"] = train_victim(c, kind, f"{name}-ue", ue, sets)
    row["le"] = train_victim(c, kind, f"{name}-le", le, sets)
    if images is not None:
        row["recovery"] = recovery(row["clean"], row["ue"], row["le"])
        row |= dict(psnr_ue=psnr(ue, images), psnr_le=psnr(le, images))
    return {key: round(value, 3) if isinstance(value, float) else value
            for key, value in row.items()}


def kind_of(c, name):
    """Which victim judges a protection."""
    return c.victim or made_against(name)


def made_against(name):
    """Which victim a protection is made against; of somebody else's, what one would guess."""
    return "classifier" if name == "published" else PROTECTIONS[name].victim


def train_victim(c, kind, name, images, sets):
    """Accuracy in percent, on clean images, of a victim of this kind, an entry of VICTIMS, that is
    trained on `images` in place of the protected ones."""
    net, losses = trained(c, kind, name, images, sets)
    score = score_of(c, VICTIMS[kind], net, sets)
    every = math.ceil(len(losses) / 6)
    shown = ", ".join(f"{loss:.2f}" for loss in losses[::every])
    print(f"{kind} on {name}: {score:.1f} %; loss every {every} epochs {shown}", flush=True)
    return score


def trained(c, kind, name, images, sets):
    """The network of such a victim, and its loss by epoch."""
    return fitted(c, f"{kind}-{name}", victim_in(c, kind, sets), training_of(c, kind), images, sets)


def training_of(c, kind):
    """The settings of a victim's training: its options without those of its choice."""
    return {key: vars(c)[kind][key] for key in VICTIMS[kind].training}


def fitted(c, name, victim, training, images, sets):
    """The network of any victim, trained with these settings, and its loss by epoch."""
    made = cached(c, name, fit, victim=victim, images=on_device(images),
                  labels=sets["protected"][1], seed=c.seed, **training)
    net = on_device(victim.fresh(c.seed)).eval()
    net.load_state_dict(made["weights"])
    return net, made["losses"]


def victim_in(c, kind, sets):
    """The victim of this kind, with the settings and classes of the run."""
    return victim_of(kind, c.resnet | dict(classes=count_classes(sets)), vars(c)[kind])


def count_classes(sets):
    return 1 + int(torch.cat([labels for _, labels in sets.values()]).max())


def score_of(c, victim, net, sets):
    """Accuracy of a victim's network in percent on clean images; a probe's where it is probed."""
    if victim.probed:
        return linear_probe(net, sets["unprotected"], sets[c.evaluate])
    return accuracy(net, *sets[c.evaluate])


@torch.no_grad()
def in_parts(function, images, size=500):
    """function(images) of images (N, 3, H, W) on the device, `size` at a time, on the CPU."""
    return torch.cat([function(on_device(part)).cpu() for part in images.split(size)])


def accuracy(net, images, labels):
    """Percentage of the images that a network in evaluation mode classifies right."""
    return 100 * (in_parts(net, images).argmax(1) == labels).float().mean().item()


def linear_probe(encoder, train, test):
    """Percentage of test images that a linear classifier of the encoder's features gets right.

    train and test are (images, labels). Logistic regression on standardised features, the encoder
    frozen, by L-BFGS to convergence: nothing to tune.
    """
    x, x_test = in_parts(encoder.features, train[0]), in_parts(encoder.features, test[0])
    mean, std = x.mean(0), x.std(0) + 1e-6
    linear = nn.Linear(x.shape[1], int(train[1].max()) + 1)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        decay = 1e-4 * linear.weight.square().sum()
        value = F.cross_entropy(linear((x - mean) / std), train[1]) + decay
        value.backward()
        return value
    optimizer.step(loss)
    answers = linear((x_test - mean) / std).argmax(1)
    return 100 * (answers == test[1]).float().mean().item()


def psnr(x, y):
    """Peak signal-to-noise ratio in dB of two sets of images in [0, 1]."""
    return -10 * math.log10(max((x - y).square().mean().item(), 1e-12))


def recovery(clean, ue, le):
    """Share of what UEs took from a victim that LEs give back; None if that is a point or less."""
    return (le - ue) / (clean - ue) if clean - ue > 1 else None


def table(rows):
    """The rows of `judge` as a Markdown table; what nobody can know is a dash."""
    columns = dict(clean="{:.1f}", ue="{:.1f}", le="{:.1f}", recovery="{:.2f}",
                   psnr_ue="{:.1f} dB", psnr_le="{:.1f} dB")
    lines = ["| protection | clean | UE | LE | recovery | PSNR UE | PSNR LE |", "|---" * 7 + "|"]
    for row in rows:
        cells = ["-" if row.get(key) is None else form.format(row[key])
                 for key, form in columns.items()]
        lines.append(f"| {' | '.join([row['protection'], *cells])} |")
    return "\n".join(lines)


def first_of_each(labels, most=10):
    """Where the first image of each class is, for at most so many classes."""
    return [(labels == k).nonzero()[0, 0].item() for k in labels.unique()][:most]


def of_each_class(sets, images):
    """The first of each class among the protected images, or UEs or LEs of them, or None."""
    return None if images is None else images[first_of_each(sets["protected"][1])]


def side_by_side(sets, pictures):
    """[(what, images (K, 3, H, W))]: the original of each class; then, of each protection in
    {name: (UEs, LEs)}, the UEs, their noise x16, and the LEs."""
    originals = of_each_class(sets, sets["protected"][0])
    rows = [] if originals is None else [("original", originals)]
    for name, (ue, le) in pictures.items():
        rows.append((f"{name} UE", ue))
        if originals is not None:
            rows.append(("its noise x16", 0.5 + 16 * (ue - originals)))
        rows.append((f"{name} LE", le))
    return rows


def show(c, sets, rows, pictures):
    """The table on stdout, results.json and figure.png in the run's folder."""
    kinds = [kind_of(c, row["protection"]) for row in rows]
    probed = next((kind for kind in kinds if VICTIMS[kind].probed), "simclr")
    untrained = on_device(victim_in(c, probed, sets).fresh(c.seed)).eval()
    floor = linear_probe(untrained, sets["unprotected"], sets[c.evaluate])
    results = dict(config=vars(c), rows=rows, floor=round(floor, 2))
    text = json.dumps(results, indent=1, default=str) + "\n"
    (c.run / "results.json").write_text(text, encoding="utf-8")
    lines = [torch.cat(list(part), dim=2) for _, part in side_by_side(sets, pictures)]
    picture = Image.fromarray(as_bytes(torch.cat(lines, dim=1)).permute(1, 2, 0).numpy())
    picture.resize((2 * picture.width, 2 * picture.height), 0).save(c.run / "figure.png")
    print(f"\n{table(rows)}\n\nAccuracy in percent on clean {c.evaluate} images; an untrained "
          f"encoder's probe has {floor:.1f}.\nMore in {c.run}: results.json, and figure.png "
          "with originals, then UEs, their noise x16 and LEs\nof each protection; "
          "`python -m studies.pictures`, with the same options, draws more.")


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
    moon = p - torch.tensor([0.45, 0.0])                   # crescent
    return torch.maximum(r - 0.95, 0.72 - moon.norm(dim=-1))


def uniform(generator, low, high, *shape):
    return low + (high - low) * torch.rand(shape, generator=generator)


def shapes(n, seed, size=32):
    """n 8-bit images (n, 3, size, size) in [0, 1] and labels (n,), made from the seed alone.

    The labels go round the ten SHAPES.
    """
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
        rotation = torch.stack([turn.cos(), turn.sin(), -turn.sin(), turn.cos()], -1).view(n, 2, 2)
        stretch = torch.stack([stretch, 1 / stretch], -1)
        colour = F.normalize(torch.randn(n, 3, 1, 1, generator=g), dim=1) * 3 ** 0.5
        colour = colour * uniform(g, 0.25, 0.5, n, 1, 1, 1)
        too_far = (mean + colour - 0.5).abs() > 0.5        # black or white
        colour = torch.where(too_far, -colour, colour)
        for k, shape in enumerate(SHAPES):                 # one at a time, as memory counts here
            own = labels == k
            p = (points - centre[own, None, None]).flatten(1, 2) @ rotation[own].mT
            p = p.view(-1, size, size, 2) / radius[own].view(-1, 1, 1, 1) * stretch[own, None, None]
            distance = signed_distance(shape, p) * radius[own].view(-1, 1, 1)
            images[own] += (0.5 - distance).clamp(0, 1)[:, None] * colour[own]  # 0 outside it
    sun = uniform(g, 0, 2 * math.pi, n, 1, 1)
    x, y = (points / size - 0.5).unbind(-1)
    images *= (1 + 0.2 * (x * sun.cos() + y * sun.sin()))[:, None]
    images += torch.randn(images.shape, generator=g).mul_(0.008)  # in place, as memory counts here
    return as_float(as_bytes(images)), labels


# -- Data: CIFAR-10 in its official binary layout, and folders -------------------------------------

CIFAR10 = ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
           "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
                   "truck")
CIFAR10_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6)) + ("test_batch.bin",)


def cifar10(root):
    """Images (N, 3, 32, 32) in [0, 1] and labels (N,) for training, and the same of the test batch.

    A record is a label byte and three 32x32 planes. Raises BadInput if the official archive is
    damaged, or lacks records of that form.
    """
    if not Path(root).is_file():
        raise BadInput(f"--root {root}: no such file; put {CIFAR10[0]} there, or add --download")
    files = dict.fromkeys(CIFAR10_FILES, b"")
    try:
        with tarfile.open(root) as archive:
            for member in archive:
                if Path(member.name).name in files and member.size < 1e8:
                    files[Path(member.name).name] = archive.extractfile(member).read()
            while archive.fileobj.read(1 << 20):           # to the end, where the checksum is
                pass
    except Exception as error:                             # tar, gzip and xz raise several kinds
        raise BadInput(f"--root {root}: not a whole cifar-10-binary.tar.gz ({error})") from None
    parts = []
    for name, content in files.items():
        data = torch.frombuffer(bytearray(content or b" "), dtype=torch.uint8)
        if len(data) % 3073 or data[::3073].max() > 9:
            raise BadInput(f"--root {root}: {name} is missing, cut off or mislabelled; expected "
                           "records of 3073 bytes that begin with a label, 0 to 9")
        parts.append(data.view(-1, 3073))
    return [(as_float(part[:, 1:].reshape(-1, 3, 32, 32)), part[:, 0].long())
            for part in (torch.cat(parts[:5]), parts[5])]


def spaced(n, count):
    """`count` of the places 0 to n - 1, evenly spaced: of a folder, which is in the order of its
    classes, some of each."""
    return [i * (n - 1) // max(1, count - 1) for i in range(count)]


def folder(root, size, classes=(), limit=0):
    """Images (N, 3, size, size) in [0, 1], their labels (N,) and files, from a folder a class.

    Every image is cropped to its central square and resized; N is at most the limit, where there is
    one. Raises BadInput if there are fewer than two classes, or others than the given ones, or a
    file cannot be read.
    """
    found, left_out = image_files(root)
    files = [file for file in found if file.parent != Path(root)]
    names = [file.relative_to(root).parts[0] for file in files]
    left_out += [file for file in found if file.parent == Path(root)]
    if left_out:
        print(f"{root}: {len(left_out)} files that are no images of a class are left out: "
              f"{', '.join(map(str, left_out[:3]))}{' ...' * (len(left_out) > 3)}")
    if len(set(names)) < 2 or not set(names) <= set(classes or names):
        raise BadInput(f"{root}: expected two or more folders of images, a class each, "
                       f"{('named ' + ', '.join(classes)) if classes else ', '.join(IMAGES)}")
    images, places = [], spaced(len(files), min(len(files), limit or len(files)))
    for i in places:
        image = open_image(files[i]).convert("RGB")
        images.append(pixels_of(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)))
    classes = classes or sorted(set(names))
    labels = torch.tensor([classes.index(names[i]) for i in places])
    return torch.stack(images), labels, [files[i] for i in places]


def classes_in(*folders):
    """The names of the classes that have a folder in one of these."""
    return sorted({file.relative_to(root).parts[0] for root in folders
                   for file in image_files(root)[0] if file.parent != root})


def source(c):
    """(images, labels) to be divided, the class names, and the sets that the data bring along."""
    if c.data == "shapes":
        return shapes(sum(c.images.values()), c.seed, c.size), SHAPES, {}
    if c.data == "cifar10":
        pool, (x, y) = cifar10(c.root)
        n = len(x) if c.unprotected == "test" else c.images["test"]
        if n > len(x):
            raise BadInput(f"--images.test {n}: {c.root} has {len(x)} test images")
        return pool, CIFAR10_CLASSES, {"test": (x[:n], y[:n])}
    root = Path(c.data)
    if not c.data or not root.is_dir():
        raise BadInput(f"--data {c.data}: expected shapes, cifar10 or an existing folder")
    if not {"train", "test"} <= set(os.listdir(root)):
        classes = classes_in(root)
        return folder(root, c.size)[:2], classes, {}
    classes = classes_in(root / "train", root / "test")
    test = folder(root / "test", c.size, classes, c.limit)[:2]
    return folder(root / "train", c.size, classes)[:2], classes, {"test": test}


def in_proportion(counts, n):
    """Counts of these proportions, one at least of each, into which n images can be divided."""
    whole = sum(counts.values())
    found = {name: max(1, count * n // whole) for name, count in counts.items()}
    largest = max(found, key=found.get)                    # it gives what the smallest were given
    found[largest] = max(1, found[largest] - max(0, sum(found.values()) - n))
    return found


def load_data(c):
    """The disjoint sets {name: (images, labels)}, and the class names: protected, unprotected,
    validation and test; and "published", the UEs, where somebody else has protected the images.

    Raises BadInput if there is no such data, or less of it than asked for.
    """
    if is_published(c.data):
        sets, classes = published_folders(Path(c.data), c.size, c.limit)
        counts = {name: c.images[name] for name in ("unprotected", "validation")}
        images, labels = sets.pop("unprotected")
    else:
        (images, labels), classes, sets = source(c)
        if c.published:
            images, labels = add_published(c, sets, images, labels, classes)
        counts = {name: n for name, n in c.images.items() if name not in sets}
    if c.data not in ("shapes", "cifar10") or c.unprotected:
        counts = in_proportion(counts, len(labels))
        counts = {name: min(n, c.limit or n) for name, n in counts.items()}
    if sum(counts.values()) > len(images):
        asked = " + ".join(f"{n} {name}" for name, n in counts.items())
        raise BadInput(f"--data {c.data}: {len(images)} images for {asked}; ask for fewer"
                       + ", or give --unprotected" * bool(c.published))
    used = slice(sum(counts.values()))
    if c.data != "shapes":                                 # which are independent already
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(c.seed))
        images, labels = images[order[used]], labels[order[used]]
    parts = [part[used].split(list(counts.values())) for part in (images, labels)]
    sets |= dict(zip(counts, zip(*parts)))
    print(f"{len(classes)} classes, {', '.join(map(str, classes[:10]))}; images: "
          + ", ".join(f"{len(labels)} {name}" for name, (_, labels) in sets.items()))
    return sets, classes


# -- Data: what somebody else has protected --------------------------------------------------------

def is_published(data):
    """Is it a folder of three sets, or four with the originals, of which one is protected?"""
    return all((Path(data) / name).is_dir() for name in ("protected", "unprotected", "test"))


def published_folders(root, size, limit):
    """The sets in such a folder and the class names; the protected images are None without
    `original`, which has the same names as `protected`."""
    classes = classes_in(root / "protected", root / "unprotected", root / "test")
    sets = {"unprotected": folder(root / "unprotected", size, classes)[:2],
            "test": folder(root / "test", size, classes, limit)[:2]}
    ue, labels, files = folder(root / "protected", size, classes, limit)
    originals = None
    if (root / "original").is_dir():
        originals, _, others = folder(root / "original", size, classes, limit)
        here = [file.relative_to(root / "protected").with_suffix("") for file in files]
        there = [file.relative_to(root / "original").with_suffix("") for file in others]
        if here != there:
            raise BadInput(f"{root}/original: expected the names of protected; they differ in "
                           f"{min(set(here) ^ set(there), default='how many have one name')}")
    return sets | {"protected": (originals, labels), "published": (ue, labels)}, classes


def add_published(c, sets, images, labels, classes):
    """Add the UEs in --published to the sets, and their originals, of the training set; returns the
    images and labels from which the other sets may be taken."""
    ue, places, left = published_images(c, images, labels)
    own = labels[places]
    if len(own.unique()) < 2:
        raise BadInput(f"--published {c.published}: its {len(ue)} images are of one class")
    sets["published"] = ue, own
    sets["protected"] = images[places], own
    if c.unprotected == "test":
        if "test" not in sets:
            raise BadInput(f"--unprotected test: {c.data} has no test set; expected a folder")
        return sets.pop("test")
    if c.unprotected:
        return folder(c.unprotected, c.size, classes)[:2]
    known, every = len(labels[left].unique()), len(labels.unique())
    if known < every:
        raise BadInput(f"--published {c.published}: the {len(left)} training images that are not "
                       f"protected are of {known} of {every} classes; expected --unprotected "
                       "FOLDER of classes, or --unprotected test beside it")
    return images[left], labels[left]


def published_images(c, images, labels):
    """The UEs (N, 3, H, W) that --published holds: a folder of 0.png, 1.png, ...; an array of
    images; or one of perturbations, an image's or a class's each. Then the places in the training
    set of their originals, the first, or, where noise is of a class, some of each; and the places
    of those that are not protected.

    Raises BadInput if it is none of these, with what was found.
    """
    path, classes = Path(c.published), 1 + int(labels.max())
    if path.is_dir():
        files = {file.stem: file for file in image_files(path)[0] if file.parent == path}
        places = [str(i) for i in range(len(files))]
        if not files or set(files) != set(places):
            raise BadInput(f"{path}: expected 0.png, 1.png, ..., in the training set's order; "
                           f"there is no {min(set(places) - set(files), default=0)}")
        found = [pixels_of(open_image(files[i])) for i in places]
        for i, pixels in zip(places, found):
            if pixels.shape != images.shape[1:]:
                raise BadInput(f"{files[i]}: {tuple(pixels.shape)}, expected the size of the "
                               f"originals, {tuple(images.shape[1:])}")
        arrays = {"": torch.stack(found).numpy()}
    else:
        arrays = read_arrays(path)
    for array in arrays.values():
        noise = perturbation_of(array, writes_last(path))
        ue = images_of(array, writes_last(path)) if noise is None else noise
        if ue is not None and ue.shape[1:] == images.shape[1:]:
            break
    else:
        found = "; ".join(f"{key} {described(array)}".strip() for key, array in arrays.items())
        raise BadInput(f"{path}: {found}; expected images of {tuple(images.shape[1:])} in 8 bits "
                       "or [0, 1], or their perturbation, of less than 0.25 in these units")
    class_wise = noise is not None and len(noise) == classes
    counts = c.images if c.data == "cifar10" else in_proportion(c.images, len(images))
    n = counts["protected"] if class_wise else len(ue)
    if n > len(images):
        raise BadInput(f"{path}: {n} images, but the training set of {c.data} has {len(images)}")
    protected = spaced(len(images), n) if class_wise else range(n)
    left = sorted(set(range(len(images))) - set(protected))
    places = [protected[i] for i in spaced(n, min(n, c.limit or n))]
    own = images[places]
    if noise is not None:
        return publish(own, noise[labels[places] if class_wise else places]), places, left
    ue = ue[places]
    apart, strangers = [(ue - other).abs().mean() for other in (own, own.roll(1, 0))]
    if n > 1 and apart > 0.7 * strangers:
        raise BadInput(f"{path}: its images are not the first of the training set of {c.data}, in "
                       f"its order: they differ by {255 * apart:.0f}/255 on average")
    return ue, places, left


def perturbation_of(array, last):
    """The perturbation (M, 3, H, W) that an array holds, in [0, 1] units or as int8; else None."""
    x = channels_second(array, last)
    if x is None or not (x.dtype == torch.int8 or x.is_floating_point()):
        return None
    x = x / 255 if x.dtype == torch.int8 else x.float()
    return x if x.abs().max() < 0.25 else None


# -- What is kept: a result, beside hashes of its inputs and of the files that its code is in ------

BEGAN = time.time()


@cache
def syntax(file, package, changed):
    """A hash of what a file, `changed` at this time, says to Python, comments and docstrings aside,
    and the names of the modules, or of what is in them, that it imports."""
    names, tree = set(), ast.parse(Path(file).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
            if ast.get_docstring(node):
                del node.body[0]
    if changed > BEGAN:                                    # what runs is what was there before
        return uuid4().hex, names
    return sha256(ast.dump(tree).encode()).hexdigest(), names


def own_file(name):
    """The file and the package of a module, imported or not yet, that is neither Python's own nor
    installed; else None, as for a name within a module."""
    module = sys.modules.get(name)
    try:
        spec = None if module else find_spec(name)
    except (ImportError, ValueError):
        return None, None
    file = getattr(module, "__file__", None) or getattr(spec, "origin", None)
    if name.partition(".")[0] in sys.stdlib_module_names or "-packages" in str(file):
        return None, None
    return file, getattr(module, "__package__", None) or getattr(spec, "parent", None)


def files_of(modules):
    """{file: hash} for the own files among these modules, and for those that they import in turn.
    """
    found, waiting = {}, set(modules)
    while waiting:
        name = waiting.pop()
        file, package = own_file(name)
        if name == "__main__" and not file:                # typed in, where nothing shows a change
            return {"code that is in no file": uuid4().hex}
        if file and file not in found:
            found[file], imported = syntax(file, package, os.path.getmtime(file))
            waiting |= imported
    return {os.path.relpath(file, Path(__file__).parent): found[file] for file in sorted(found)}


class Inputs(pickle.Pickler):
    """Hashes what pickle would write of an input, and collects the modules that its code is in."""

    def __init__(self):
        self.hash, self.modules = sha256(), set()
        super().__init__(SimpleNamespace(write=self.hash.update))
        self.fast = True                                   # equal is equal, the same object or not

    def reducer_override(self, thing):
        if isinstance(thing, torch.Tensor):
            for part in torch.atleast_1d(thing.detach()).split(500):  # as memory counts here
                self.hash.update(part.cpu().numpy().tobytes())
            return str, (str(thing.dtype), thing.shape)
        if isinstance(thing, nn.Module):                   # a set has no order to rely on
            state = {key: sorted(value) if isinstance(value, set) else value
                     for key, value in vars(thing).items()}
            return type(thing), (state,)
        if isinstance(thing, Path):                        # a file that somebody's function reads
            return str, (thing.read_bytes(),)
        if isinstance(thing, (type, FunctionType)) and thing.__module__ != "builtins":
            self.modules.add(thing.__module__)
            code = getattr(thing, "__code__", None)
            values = [cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()]
            values += [getattr(thing, "__defaults__", None), getattr(thing, "__kwdefaults__", None)]
            if thing.__name__ == "<lambda>":               # its file may have several
                values += [code.co_code, repr(code.co_consts)]
            return str, (thing.__qualname__, values)
        return NotImplemented


def hashes(inputs):
    """{input or file: hash} of a result's inputs and of the files that their code is in."""
    found, modules = {}, set()
    for key, value in inputs.items():
        seen = Inputs()
        seen.dump(value)
        found[key] = seen.hash.hexdigest()
        modules |= seen.modules
    return found | files_of(modules)


def kept(path, parts):
    """(What a file holds, "") if it was made of the same parts, else (None, what has changed)."""
    if not path.exists():
        return None, ""
    try:
        made = unet.read(path)
        changed = [key for key in parts | made["parts"] if parts.get(key) != made["parts"].get(key)]
    except (BadInput, KeyError, TypeError, AttributeError):
        return None, f" again, {path} is damaged"
    if changed:
        return None, f" again, {', '.join(changed[:4])} changed"
    return made, ""


TOGETHER = (train_unet, divided)      # all processes of torchrun do these; others the first alone
RESUMED = (train_unet,)               # these are given a file, `unfinished`, to go on from


def cached(c, name, make, /, **inputs):
    """make(**inputs, report=...), a dict, or what that gave before, if nothing has changed since.

    It is kept in the run's folder as name.pt, with the hashes. Says what it keeps, and what has
    changed where it makes something again.
    """
    path = c.run / f"{name}.pt"
    parts = hashes(dict(function=make) | inputs) | dict(device=DEVICE)
    made, why = kept(path, parts)
    all_here()                                             # nobody looks at the old file any more
    if made:
        print(f"{name}: kept")
        return made
    print(f"{name}: made{why}", flush=True)
    if make in RESUMED:
        key = sha256(repr(parts).encode()).hexdigest()
        inputs["unfinished"] = path.with_suffix(f".{key[:8]}.unfinished")
    start = time.time()
    if make in TOGETHER or RANK == 0:
        made = make(**inputs, report=Progress(name))
    if RANK == 0:
        unet.save(path, made | dict(parts=parts, seconds=time.time() - start))
        for unfinished in c.run.glob(f"{name}.*.unfinished"):
            unfinished.unlink()
    all_here()                                             # it is there
    return unet.read(path)


# -- Command line ----------------------------------------------------------------------------------

def every_option():
    """{option: (default, what it is)}: of DEFAULTS, of the sampler, of victims and protections."""
    groups = [("", DEFAULTS, Path(__file__).read_text(encoding="utf-8")),
              ("sampler.", asdict(Sampler()), inspect.getsource(Sampler))]
    for name, victim in VICTIMS.items():
        text = fit.__doc__ + (victim.scores_and_answers.__doc__ or "")
        groups.append((f"{name}.", victim.training | victim.choice, text))
    for name, protection in PROTECTIONS.items():
        groups.append((f"noise.{name}.", protection.options(), protection.make.__doc__ or ""))
    found = {}
    for prefix, values, text in groups:
        # a comment beside the default, or lines of the docstring of which one begins with the name
        lines = r'^ {4}"?([\w.]+)"?(?:: .*?  #|  +) *(\w.*(?:\n {10,}\w.*)*)'
        beside = re.findall(lines, text, re.M)
        says = {key: " ".join(what.split()) for key, what in beside}
        found |= {prefix + key: (value, says.get(key, "")) for key, value in values.items()}
    return found


NONE = ("noise_batches",)             # options that may be None


def value_of(option, default, text):
    """The text of an option as a value of its default's kind; 1,2 is (1, 2)."""
    if isinstance(default, str):
        return text
    if isinstance(default, tuple) and isinstance((default or (0,))[0], str):
        return tuple(filter(None, text.split(",")))
    try:
        value = ast.literal_eval(text or "()")
    except (ValueError, SyntaxError):
        value = text
    if isinstance(default, tuple) and isinstance(value, int):
        value = (value,)
    if isinstance(default, float) and isinstance(value, int):
        value = float(value)
    if value is None and option.rpartition(".")[2] in NONE:
        return None
    if type(value) is not (int if default is None else type(default)):
        raise BadInput(f"--{option} {text}: expected a value such as {default}")
    return value


CHOICES = {"purifier": PURIFIERS, "victim": VICTIMS, "view": VIEWS, "optimizer": OPTIMIZERS,
           "evaluate": ("validation", "test"), "shared": ("image", "class", "all")}
SHORTENED = ("protected", "unprotected", "validation", "test", "epochs", "steps", "rounds",
             "surrogates", "train_batches", "noise_steps", "warm_up", "batches",
             "batch_size")            # by --limit


def parse(argv):
    """The stage, whether to download, and the configuration that the arguments ask for."""
    known = every_option()
    parser = Parser(prog="train.py", usage="train.py [all | ddpm] [--OPTION VALUE ...]",
                    description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("all", "ddpm"), help="default all")
    parser.add_argument("--config", choices=CONFIGS, action="append", default=[],
                        help="default: shapes or photographs; given twice, the second adds to it")
    parser.add_argument("--download", action="store_true", help="first fetch what is missing")
    for option, (default, what) in known.items():
        choices = CHOICES.get(option.rpartition(".")[2])
        what += f": {', '.join(choices)}" if choices else ""
        parser.add_argument(f"--{option}", dest=option, metavar="", choices=choices,
                            help=f"{what} (default {default!r})".replace("%", "%%"))
    if not argv or argv[0].startswith("-"):
        argv = ["all", *argv]
    given = vars(parser.parse_args(argv))
    configs = given["config"]
    if not {"shapes", "photographs"} & set(configs):       # that of the data
        configs = ["shapes" if given["data"] in (None, "shapes") else "photographs", *configs]
    options = {option: default for option, (default, _) in known.items()}
    for name in configs:
        options |= CONFIGS[name]
    for option, (default, _) in known.items():
        if given[option] is not None:
            options[option] = value_of(option, default, given[option])
    limit = options["limit"]
    shortened = [option for option, value in options.items() if limit and type(value) is int
                 and option.rpartition(".")[2] in SHORTENED and option != "sampler.steps"]
    for option in shortened:
        shared = -limit % PROCESSES if option == "ddpm.batch_size" else 0  # a share each
        options[option] = min(options[option], limit + shared)
    c = nested(options)
    if given["protections"] is None and (c.published or is_published(c.data)):
        c.protections = ("published",)
    check(c, options, known)
    lasting = [name for name in given["config"] if name != "quick"]  # the story goes on from it
    parts = [Path(c.data).resolve().name, *lasting, f"limit{limit}" * bool(limit),
             Path(c.published).stem]
    c.run = Path(c.out or "runs/" + "-".join(filter(None, parts)))
    return given["stage"], given["download"], c


def nested(options):
    """The options as a namespace, those with a dot in dicts: c.seed, c.unet["width"]."""
    c = {}
    for option, value in options.items():
        *groups, key = option.split(".")
        owner = c
        for group in groups:
            owner = owner.setdefault(group, {})
        owner[key] = value
    return SimpleNamespace(**c)


# Options that may be 0; one of somebody's own function whose default is 0 or less may be anything
ZERO = ("seed", "limit", "dropout", "tilt", "momentum", "warm_up", "pixel_weight", "pixel_above",
        "perceptual_weight", "perceptual_below")


def check(c, options, known):
    """Raise BadInput, naming the option, where a value, other than its default, makes no sense."""
    for option, value in options.items():
        zero_fits, default = option.rpartition(".")[2] in ZERO, known[option][0]
        free = isinstance(default, (int, float)) and default <= 0 and not zero_fits
        if free or value == default:
            continue
        for number in value if isinstance(value, tuple) else [value]:
            counts = isinstance(number, (int, float)) and not isinstance(number, bool)
            if counts and not (0 < number < 2 ** 31 or number == 0 and zero_fits):
                raise BadInput(f"--{option} {number}: expected a number above 0, below 2 ** 31")
    folders = is_published(c.data)
    theirs = ["published"] * bool(c.published or folders)
    for option, fits, expected in (
            ("limit", c.limit != 1, "2 or more"), ("epsilon", 1 <= c.epsilon <= 255, "1 to 255"),
            ("ddpm.levels", c.ddpm["levels"] <= unet.T, f"at most {unet.T}"),
            ("ddpm.tilt", c.ddpm["tilt"] <= 10, "at most 10"),
            ("ddpm.batch_size", c.ddpm["batch_size"] % PROCESSES == 0,
             f"a multiple of the {PROCESSES} processes"),
            # below 8, oneDNN (torch 2.13.0) errs in gradients of strides where AVX2 is the best
            ("resnet.widths", min(c.resnet["widths"], default=0) >= 8, "8 or more each"),
            ("unet.width", c.unet["width"] >= 4, "4 or more"),
            ("root", c.root == DEFAULTS["root"] or c.data == "cifar10", "--data cifar10 beside it"),
            ("protections", c.protections and set(c.protections) <= {*PROTECTIONS, *theirs},
             ",".join(PROTECTIONS)),
            ("lpips", c.vgg_weights or not c.lpips, "--vgg_weights beside it"),
            ("published", not (c.published and folders), "a --data that is not protected yet"),
            ("unprotected", c.published or not c.unprotected, "--published beside it"),
            ("sampler.t_star", c.sampler["t_star"] <= c.ddpm["levels"],
             f"at most --ddpm.levels, {c.ddpm['levels']}, which the U-Net learns")):
        if not fits:
            raise BadInput(f"--{option}: expected {expected}")
    Sampler(**c.sampler)
    for name, victim in VICTIMS.items():
        if not {"epochs", "batch_size", "lr"} <= set(victim.training):
            raise BadInput(f"VICTIMS {name}: expected training=dict(epochs=, batch_size=, lr=)")
    for option, network in (("unet", partial(UNet, **c.unet, size=c.size)),
                            ("vgg", partial(VGG, **c.vgg)),
                            ("resnet", partial(ResNet, **c.resnet, classes=2))):
        try:
            with torch.device("meta"):                     # shapes without numbers
                x = torch.zeros(1, 3, c.size, c.size)
                network()(x, 1) if option == "unet" else network()(x)
        except Exception as error:                         # whatever the values lead to
            raise BadInput(f"--{option}: no network for images of {c.size} pixels has these "
                           f"settings ({said(error)})") from None


def claim(c):
    """Make the run's folder, which belongs to one data set."""
    c.run.mkdir(parents=True, exist_ok=True)
    owner = c.data if c.data in ("shapes", "cifar10") else str(Path(c.data).resolve())
    note = c.run / "data.txt"
    text = dict(encoding="utf-8", errors="surrogateescape")  # a path may be any bytes
    before = note.read_text(**text) if note.exists() else ""
    if before not in ("", owner):                          # empty: another process is at it
        raise BadInput(f"{c.run} belongs to --data {before}; give another --out")
    note.write_text(owner, **text)


def main(argv=None):
    with one_line_errors("train.py"), processes():
        stage, wanted, c = parse(sys.argv[1:] if argv is None else argv)
        if wanted and RANK == 0:
            download(CIFAR10, c.root if c.data == "cifar10" else "")
            if c.sampler["perceptual_weight"]:
                download(perceptual.VGG16, c.vgg_weights)
                download(perceptual.LPIPS, c.lpips)
        all_here()
        noise = {name: c.noise.get(name, {}) for name in c.protections}
        shown = vars(c) | dict(noise=noise, device=DEVICE)
        text = " ".join(f"{option}={value}" for option, value in shown.items())
        print(textwrap.fill(text, 100, break_on_hyphens=False))
        story(c, stage)


if __name__ == "__main__":
    main()
