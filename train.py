"""The whole experiment: protect images, break the protection with learnable examples, and see what a victim learns from each.

    python train.py                        everything, on built-in images (shapes); ends with a table and runs/shapes/figure.png
    python train.py ddpm                   one stage and what it needs: ddpm, vgg, protect, purify, victim
    python train.py --data cifar10 --root cifar-10-binary.tar.gz
    python train.py --data DIR             your own folder of class folders with images
    torchrun --nproc_per_node=2 train.py   the same by two processes, on a GPU each if there are

Every stage keeps its result in runs/<data>/ and is redone only when its settings, its input or its code changed.
"""
import argparse
import ast
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import sys
import tarfile
import textwrap
import time
import zlib
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import attacks
import le
import perceptual
import unet
from attacks import VIEWS, classify, crop_flip, find_partner, min_min, publish, to
from le import (DEVICE, PROCESSES, RANK, BadInput, Parser, Progress, accelerated, add_sampler_options, barrier, download, explained, gathered, joined,
                sampler_from, seed_of, share)
from unet import EMA, UNet, ddpm_loss, save


@dataclass
class Config:
    data: str = "shapes"              # shapes, cifar10, or a folder of class folders
    root: str = "runs/cifar-10-binary.tar.gz"  # cifar10: the official archive, or the folder it unpacks to
    out: str = ""                     # where results are kept; runs/<data> if empty
    seed: int = 0
    evaluate: str = "test"            # the clean images that accuracy is measured on: test, or validation while tuning
    # images in each of the disjoint sets (a folder is divided in these proportions)
    protected: int = 4096             # the owner's, published only as unlearnable examples
    unprotected: int = 4096           # the unauthorized user's own
    validation: int = 1000
    test: int = 2000
    size: int = 32                    # a folder's images are cropped to squares and resized to size x size
    # network of every victim, and of the owner's surrogates
    resnet_widths: tuple = (16, 24, 48, 96)  # channels of the stem and of each level of the ResNet
    resnet_blocks: int = 1            # residual blocks a level
    resnet_strides: tuple = (2, 2, 2)  # of each level
    # victim that learns labels
    classifier_epochs: int = 16
    classifier_batch: int = 128
    classifier_lr: float = 0.1
    # victim that learns without labels
    simclr_view: str = "outline"      # what it sees of an image, one of attacks.VIEWS
    simclr_temperature: float = 0.5
    simclr_epochs: int = 25
    simclr_batch: int = 128
    simclr_lr: float = 0.1
    # protection
    protections: str = "em,cp"        # error-minimizing noise, contrastive poisoning
    perturbation: str = ""            # somebody else's in place of ours: perturbation.pt, .npy, .npz or a folder (see foreign_ues)
    epsilon: float = 8.0              # largest change of a channel, of 255
    noise_step: float = 0.2           # size of a step of the noise, of epsilon
    em_class_rounds: int = 40         # rounds of class-wise noise, of 10 training and 10 noise batches
    em_sample_rounds: int = 10        # rounds of sample-wise noise, of 10 training batches and all images
    em_sample_steps: int = 2          # noise steps on each image a round
    em_sample_lr: float = 0.2         # of the surrogate; 0.1 and 0.4 left a victim more of the picture
    cp_class_rounds: int = 40         # the same of contrastive noise
    cp_sample_rounds: int = 10
    cp_sample_steps: int = 2
    cp_sample_lr: float = 0.1
    # diffusion model
    unet_width: int = 32
    unet_mults: tuple = (1, 2)        # channels of each resolution, in widths
    unet_blocks: int = 1
    unet_attention: tuple = ()        # resolutions with self-attention
    unet_dropout: float = 0.0
    unet_patch: int = 2
    unet_levels: int = 100            # noise levels 1..unet_levels are trained: those that purification visits
    unet_steps: int = 6200
    unet_batch: int = 16
    unet_lr: float = 4e-3             # of Adam
    unet_muon: float = 0.02           # of Muon, which trains the 3x3 convolutions; 0: Adam trains all
    unet_ema: float = 0.999
    unet_start: str = ""              # a checkpoint, such as released weights, to go on from instead of a fresh U-Net
    # perceptual distance
    vgg_width: int = 16
    vgg_convs: tuple = (1, 1, 1, 1, 1)  # convolutions in each of the five stages
    vgg_epochs: int = 24
    vgg_batch: int = 32               # without normalisation layers, small steps: larger batches and rates did not learn
    vgg_lr: float = 0.03
    vgg_weights: str = ""             # torchvision's vgg16-397923af.pth, or another checkpoint, instead of training one
    lpips: str = ""                   # LPIPS's linear layers for it
    # purification: le.Sampler, whose values are options too
    sampler: le.Sampler = field(default_factory=le.Sampler)
    ablate: str = "em-sample,cp-sample"  # protections that `ablation` looks at
    sweep: str = "epsilon=4,8,16,32"  # setting of the protection, and its values, that `sweep` looks at
    limit: int = 0                    # if not 0, at most so many images in each set and batch, epochs, rounds and steps: to see whether it runs


# What differs from the defaults above, which are for shapes: for photographs (cifar10 or a folder), and with --config
PRESETS = {
    "photographs": dict(protected=6000, unprotected=5500, validation=500, test=2400, resnet_widths=(16, 32, 64, 128), classifier_epochs=30,
                        simclr_view="simclr", em_class_rounds=24, em_sample_rounds=12, unet_width=48, unet_levels=250, unet_steps=8500, vgg_epochs=40,
                        sampler=le.PHOTOGRAPHS),
    # the papers' protocol: ResNet-18, M = 10 and K = 20 with steps of epsilon / 10, the U-Net of Ho et al., VGG-16
    "paper": dict(protected=40000, unprotected=9500, validation=500, test=10000, resnet_widths=(64, 64, 128, 256, 512), resnet_blocks=2,
                  resnet_strides=(1, 2, 2, 2), classifier_epochs=60, simclr_epochs=200, simclr_batch=512, noise_step=0.1,
                  em_sample_steps=20, em_sample_lr=0.1, cp_class_rounds=200, cp_sample_rounds=40, cp_sample_steps=5,
                  unet_width=128, unet_mults=(1, 2, 2, 2), unet_blocks=2, unet_attention=(16,), unet_dropout=0.1, unet_patch=1, unet_levels=1000,
                  unet_steps=40000, unet_batch=128, unet_lr=2e-4, unet_muon=0.0, unet_ema=0.9999,
                  vgg_weights="runs/vgg16-397923af.pth", lpips="runs/lpips-vgg.pth"),
}

# What a protection is made against, and who judges it: error-minimizing noise and contrastive poisoning
VICTIMS = {"em": "classifier", "cp": "simclr"}


def judge_of(protection, victims=VICTIMS):
    """The kind of victim that judges a protection, by its family: cp-sample's is that of "cp". Somebody else's is judged by a classifier."""
    return victims.get(protection.split("-")[0], "classifier")


torch.set_flush_denormal(True)        # denormal numbers late in training slow a CPU down several times


def batch_of(images):
    """Float images on the device, laid out the way convolutions like them."""
    return images.to(DEVICE, memory_format=torch.channels_last)


def as_bytes(images):
    return images.mul(255).round().clamp(0, 255).byte()


def as_float(images):
    return images.float().div(255)


# ---------------------------------------------------------------------------------------------------------------------
# Data: shapes. Four copies of one shape, each in its own colour, place, size and turn: the class is the only thing they share.
# The ground is smooth and the sensor quiet, so that a protection is easier to see than the shape, as it must be to protect.

SHAPES = ("disc", "ring", "square", "frame", "triangle", "cross", "star", "crescent", "bars", "nut")


def polygon(p, sides, notch=1.0):
    """Signed distance to a regular polygon with corners at radius 1, or to the star with the middle of each side pulled in by `notch`."""
    wedge = math.pi / sides                                # fold the plane into half a sector, corner straight ahead
    angle = torch.atan2(p[..., 0], p[..., 1])
    angle = ((angle + wedge) % (2 * wedge) - wedge).abs()
    x, y, r = p.norm(dim=-1) * angle.sin(), p.norm(dim=-1) * angle.cos(), math.cos(wedge) * notch
    nx, ny = 1 - r * math.cos(wedge), r * math.sin(wedge)  # normal of the edge from (0, 1) to (r sin, r cos)
    return (nx * x + ny * (y - 1)) / math.hypot(nx, ny)


def signed_distance(shape, p):
    """Distance of the points p (..., 2) to the outline of a shape of radius about 1, negative inside."""
    x, y = p.abs().unbind(-1)
    r, box = p.norm(dim=-1), torch.maximum(x, y)
    return {"disc": lambda: r - 0.9,
            "ring": lambda: (r - 0.72).abs() - 0.22,
            "square": lambda: box - 0.8,
            "frame": lambda: (box - 0.68).abs() - 0.2,
            "triangle": lambda: polygon(p, 3),
            "cross": lambda: torch.maximum(box - 0.95, torch.minimum(x, y) - 0.27),
            "star": lambda: polygon(p / 1.1, 5, notch=0.5),
            "crescent": lambda: torch.maximum(r - 0.95, 0.72 - (p - torch.tensor([0.45, 0.0])).norm(dim=-1)),
            "bars": lambda: torch.maximum(y - 0.85, (x - 0.55).abs() - 0.22),
            "nut": lambda: torch.maximum(polygon(p, 6), 0.5 - r)}[shape]()


def shapes(n, seed, size=32, contrast=(0.25, 0.5), texture=(0.03, 0.1), sensor=0.008):
    """n images (n, 3, size, size) in [0, 1], 8-bit, and labels (n,) that go round the ten SHAPES; made from the seed alone."""
    g = torch.Generator().manual_seed(seed)
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(n, *shape, generator=g)
    labels = torch.arange(n) % len(SHAPES)
    axis = torch.arange(size) + 0.5
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    images = uniform(0.25, 0.75, 3, 1, 1).repeat(1, 1, size, size)
    for scale in (8, 16):                                  # the ground's texture
        coarse = torch.randn(n, 3, size // scale + 1, size // scale + 1, generator=g)
        images += uniform(*texture, 1, 1, 1) / 2 ** 0.5 * F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)
    ground = images.mean((2, 3), keepdim=True)
    for row in (0.25, 0.75):
        for column in (0.25, 0.75):
            centre = torch.tensor([column, row]) * size + uniform(-0.05, 0.05, 2) * size
            radius, turn, aspect = uniform(0.16, 0.225) * size, uniform(0, 2 * math.pi), uniform(-0.2, 0.2).exp()
            rotation = torch.stack([turn.cos(), turn.sin(), -turn.sin(), turn.cos()], -1).view(n, 2, 2)
            p = ((grid - centre[:, None, None]).flatten(1, 2) @ rotation.mT).view(n, size, size, 2) / radius.view(n, 1, 1, 1)
            p = p * torch.stack([aspect, 1 / aspect], -1)[:, None, None]
            colour = F.normalize(torch.randn(n, 3, 1, 1, generator=g), dim=1) * 3 ** 0.5 * uniform(*contrast, 1, 1, 1)
            colour = torch.where((ground + colour - 0.5).abs() > 0.5, -colour, colour)  # away from black and white
            for k, shape in enumerate(SHAPES):
                own = labels == k                          # anti-aliased: a pixel's cover falls from 1 to 0 across the outline
                cover = (0.5 - signed_distance(shape, p[own]) * radius[own].view(-1, 1, 1)).clamp(0, 1)
                images[own] += cover[:, None] * colour[own]
    sun = uniform(0, 2 * math.pi, 1, 1)
    light = 1 + 0.2 * ((grid[..., 0] / size - 0.5) * sun.cos() + (grid[..., 1] / size - 0.5) * sun.sin())
    images = images * light[:, None] + sensor * torch.randn(images.shape, generator=g)
    return as_float(as_bytes(images)), labels


# ---------------------------------------------------------------------------------------------------------------------
# Data: CIFAR-10 in its official binary layout, and folders

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar10(root):
    """Training images (N, 3, 32, 32) in [0, 1] and labels (N,), and the same of the test batch.

    root is the official cifar-10-binary.tar.gz or the folder it unpacks to. A record is a label byte and three 32x32 planes.
    Nothing is unpacked to disk. Raises BadInput if files are missing, truncated or hold a label above 9.
    """
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    root, files = Path(root), {}
    if root.is_dir():
        files = {name: path.read_bytes() for name in names for path in (root / name, root / "cifar-10-batches-bin" / name) if path.is_file()}
    elif root.is_file():
        try:
            with tarfile.open(root) as archive:
                files = {Path(m.name).name: archive.extractfile(m).read() for m in archive if m.isfile() and Path(m.name).name in names}
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise BadInput(f"{root}: not a whole tar archive ({error}); expected cifar-10-binary.tar.gz") from None
    else:
        raise BadInput(f"{root}: no such file; put {CIFAR10_URL} there, or name it with --root, or add --download")
    batches = []
    for name in names:
        if name not in files:
            raise BadInput(f"{root}: {name} is missing; expected the CIFAR-10 binary version, {', '.join(names)}")
        if not files[name] or len(files[name]) % 3073:
            raise BadInput(f"{root}: {name} has {len(files[name])} bytes; expected records of 3073")
        batches.append(torch.frombuffer(bytearray(files[name]), dtype=torch.uint8).view(-1, 3073))
        if batches[-1][:, 0].max() > 9:
            raise BadInput(f"{root}: {name} has the label {batches[-1][:, 0].max()}; expected 0 to 9")
    split = lambda records: (as_float(records[:, 1:].reshape(-1, 3, 32, 32)), records[:, 0].long())
    return split(torch.cat(batches[:5])), split(batches[5])


def folder(root, size):
    """Images (N, 3, size, size) in [0, 1], labels (N,) and class names of a folder of class folders with images.

    Every image is cropped to its central square and resized. Raises BadInput if there are fewer than two classes or a file cannot be read.
    """
    classes = sorted(path for path in Path(root).iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(classes) < 2:
        raise BadInput(f"{root}: {len(classes)} class folders; expected at least two, with images in each")
    images, labels = [], []
    for label, path in enumerate(classes):
        files = sorted(f for f in path.rglob("*") if f.suffix.lower() in le.IMAGES)
        if not files:
            raise BadInput(f"{path}: no images; expected {', '.join(le.IMAGES)}")
        for file in files:
            image = le.open_image(file).convert("RGB")
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
            images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
            labels.append(label)
    return as_float(torch.stack(images)), torch.tensor(labels), [path.name for path in classes]


SETS = ("protected", "unprotected", "validation", "test")


def split_data(config):
    """The four disjoint sets {"protected" | "unprotected" | "validation" | "test": (images, labels)}, the class names, and where the
    protected images are from: the labels of all that there were, in their own order, and the protected ones' places in it.

    Raises BadInput if there is no such data, or less of it than config asks for.
    """
    counts = {name: getattr(config, name) for name in SETS}
    own_test = {}                                          # CIFAR-10 brings its own test images
    if config.data == "shapes":
        (images, labels), classes = shapes(sum(counts.values()), config.seed, config.size), SHAPES
    elif config.data == "cifar10":
        (images, labels), (test_images, test_labels) = cifar10(config.root)
        classes, n = CIFAR10_CLASSES, counts.pop("test")
        own_test = {"test": (test_images[:n], test_labels[:n])}
    elif Path(config.data).is_dir():
        images, labels, classes = folder(config.data, config.size)
        total = sum(counts.values())
        counts = {name: max(1, n * len(images) // total) for name, n in counts.items()}
    else:
        raise BadInput(f"--data {config.data}: expected shapes, cifar10 or an existing folder")
    if sum(counts.values()) > len(images):
        raise BadInput(f"{config.data}: {len(images)} images for {' + '.join(f'{n} {name}' for name, n in counts.items())}; ask for fewer")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(config.seed))
    if config.data == "shapes":
        order = torch.arange(len(images))                  # independent already, and each set gets its classes in equal parts
    parts = order[:sum(counts.values())].split(list(counts.values()))
    return {name: (images[part], labels[part]) for name, part in zip(counts, parts)} | own_test, classes, (labels, parts[0])


def foreign_ues(path, images, labels, classes, source):
    """Somebody else's unlearnable examples of the protected images (N, 3, H, W), labels (N,): the same shape, published.

    path is a perturbation, .pt, floats of [0, 1] images (M, 3, H, W) such as Huang et al.'s perturbation.pt; or the poisoned images, .npy
    or .npz, uint8 (M, H, W, 3); or a folder of class folders with them, sorted by name as the originals are. M is the number of protected
    images, or of all there were (source, from `split_data`), or, for a perturbation, of classes. Raises BadInput with the numbers if not.
    """
    path, (all_labels, places) = Path(path), source
    perturbation, choices = path.suffix == ".pt", [(len(images), "the protected images", slice(None)), (len(all_labels), "all images", places)]
    if path.is_dir():
        given, found, _ = folder(path, images.shape[-1])
        wanted = labels if len(found) == len(images) else all_labels
        if not torch.equal(found.bincount(), wanted.bincount()):
            found, these, those = (some.bincount().tolist() for some in (found, labels, all_labels))
            raise BadInput(f"{path}: {found} images in its class folders; expected {these} or {those}")
        given = given[wanted.argsort(stable=True).argsort()]
    elif perturbation:
        given, choices = unet.read(path), [*choices, (len(classes), "classes", labels)]
        if not isinstance(given, torch.Tensor):
            raise BadInput(f"{path}: holds a {type(given).__name__}; expected a tensor")
        if not given.is_floating_point() or not given.abs().max() <= 1:
            raise BadInput(f"{path}: {given.dtype} up to {given.abs().max().item():.4g}; "
                           "expected a perturbation of [0, 1] images in floats (8/255 = 0.0314)")
    else:
        given, _ = le.read_array(path)
    if given.shape[1:] != images.shape[1:]:
        raise BadInput(f"{path}: {tuple(given.shape)}; expected images of {tuple(images.shape[1:])}")
    place = next((place for count, _, place in choices if count == len(given)), None)
    if place is None:
        raise BadInput(f"{path}: {len(given)} of them; expected {' or '.join(f'{count} ({what})' for count, what, _ in choices)}")
    return publish(images, given[place].float()) if perturbation else given[place]


# ---------------------------------------------------------------------------------------------------------------------
# The victim classifier

class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016). (B, c_in, H, W) -> (B, c_out, H / stride, W / stride)."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        self.shortcut = nn.Identity()
        if stride > 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class ResNet(nn.Module):
    """Residual network with the CIFAR stem: images in [0, 1] (B, 3, H, W) -> class scores (B, classes).

    widths are the channels of the stem and of each level; ResNet-18 is widths (64, 64, 128, 256, 512), blocks 2, strides (1, 2, 2, 2).
    """

    def __init__(self, widths, blocks, strides, classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        levels = [BasicBlock(c_in if j == 0 else c_out, c_out, stride if j == 0 else 1)
                  for c_in, c_out, stride in zip(widths[:-1], widths[1:], strides, strict=True) for j in range(blocks)]
        self.levels, self.head = nn.Sequential(*levels), nn.Linear(widths[-1], classes)

    def features(self, x):
        """What the classifier's last layer sees: (B, widths[-1])."""
        return self.levels(self.stem((x - 0.5) / 0.25)).mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x))


class SimCLR(nn.Module):
    """An encoder and the head through which contrastive learning trains it (Chen et al. 2020): images (B, 3, H, W) -> embeddings (B, c).

    The head is thrown away afterwards: what a victim keeps are the encoder's features.
    """

    def __init__(self, encoder):
        super().__init__()
        c = encoder.head.in_features
        self.encoder, self.projection = encoder, nn.Sequential(nn.Linear(c, c), nn.BatchNorm1d(c), nn.ReLU(), nn.Linear(c, c))

    def forward(self, x):
        return self.projection(self.encoder.features(x))


def data_parallel(net):
    """Under torchrun, every backward pass through the network leaves the mean of all processes' gradients, as if each had seen all the batches."""
    def average(w):
        dist.all_reduce(w.grad)
        w.grad /= PROCESSES
    for w in net.parameters() if PROCESSES > 1 else ():
        w.register_post_accumulate_grad_hook(average)
    return net


def even_share(n):
    """Places of this process's part of n training images, as many for each process: where n does not divide, some are seen twice."""
    return share(torch.arange(math.ceil(n / PROCESSES) * PROCESSES) % n)


def fit(model, choose, images, *, epochs, lr, batch_size, generator, report):
    """Train the model in place with SGD (Nesterov momentum 0.9, weight decay 5e-4) and one learning-rate cycle.

    choose(x, b), as in `attacks.min_min`, says what it learns from the images x of batch b (indices): `classify` or `find_partner`.
    Leaves it in evaluation mode and returns the mean loss of each epoch.
    """
    batches, losses = math.ceil(len(images) / batch_size), []
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * batches, pct_start=0.2)
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for b in torch.randperm(len(images), generator=generator).to(images.device).chunk(batches):
            loss = F.cross_entropy(*choose(images[b], b))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        losses.append(total.item() / batches)
        report(epoch + 1, epochs, loss=losses[-1])
    model.eval()
    return losses


@torch.no_grad()
def answers(model, images):
    """The classes (N,) that the model, in evaluation mode, takes the images for."""
    return torch.cat([model(batch_of(part)).argmax(1).cpu() for part in images.split(500)])


def accuracy(model, images, labels):
    """Percentage of the images that the model, in evaluation mode, classifies right."""
    return 100 * (answers(model, images) == labels).float().mean().item()


def linear_probe(encoder, train, test):
    """Percentage of the test images that a linear classifier of the encoder's features gets right, the encoder frozen.

    train and test are (images, labels). Logistic regression on standardised features, by L-BFGS to convergence: nothing to tune.
    """
    with torch.no_grad():
        x, x_test = (torch.cat([encoder.features(batch_of(part)) for part in images.split(500)]) for images, _ in (train, test))
    mean, std, y = x.mean(0), x.std(0) + 1e-6, train[1].to(DEVICE)
    linear = nn.Linear(x.shape[1], y.max() + 1, device=DEVICE)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(linear((x - mean) / std), y) + 1e-4 * linear.weight.square().sum()
        value.backward()
        return value
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer.step(loss)
    return 100 * (linear((x_test - mean) / std).argmax(1).cpu() == test[1]).float().mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# The diffusion model

def orthogonal(m, iterations=4):
    """A matrix (r, c) with the singular vectors of m and singular values about 1, by Newton and Schulz's iteration (Jordan et al. 2024)."""
    if m.shape[0] > m.shape[1]:
        return orthogonal(m.T, iterations).T
    m = m / (m.norm() + 1e-7)                              # no singular value above 1
    for _ in range(iterations):                            # each becomes 3.4445 s - 4.775 s^3 + 2.0315 s^5, which lifts small ones fast
        square = m @ m.T
        m = 3.4445 * m + (-4.775 * square + 2.0315 * square @ square) @ m
    return m


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose step is orthogonal (Jordan et al. 2024), for convolutions, seen as matrices (c_out, c_in * k * k).

    All directions of a weight learn equally fast, not only the few that dominate its gradient. torch.optim.Muon takes matrices alone.
    """

    def __init__(self, weights, lr, momentum=0.95):
        super().__init__(weights, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                velocity = self.state[w].setdefault("velocity", torch.zeros_like(w))
                velocity.mul_(group["momentum"]).add_(w.grad)
                w -= group["lr"] * orthogonal((w.grad + group["momentum"] * velocity).flatten(1)).view_as(w)


def train_unet(net, images, *, levels, steps, batch_size, lr, muon, ema_decay, seed, report, partial, checkpoint_seconds=30):
    """Train in place by Ho et al. 2020, Algorithm 1, on noise levels 1..levels; returns the EMA of the weights (a state dict).

    Every step of every process draws from its own seed, so a run resumed from `partial`, a file written every `checkpoint_seconds`, ends where an
    uninterrupted one does. Muon trains the 3x3 convolutions, Adam all else, or all if the rate `muon` is 0. Learning rates warm up over 100 steps
    and fall to zero along a half cosine.
    """
    by_muon = lambda w: muon > 0 and w.shape[2:] == (3, 3)
    others, convolutions = ([w for w in net.parameters() if by_muon(w) == chosen] for chosen in (False, True))
    optimizers = {torch.optim.Adam(others, betas=(0.9, 0.99), fused=True): lr} | ({Muon(convolutions, muon): muon} if muon else {})
    ema, start = EMA(net, ema_decay), 0
    if partial.exists():
        saved = torch.load(partial, map_location=DEVICE, weights_only=True)
        net.load_state_dict(saved["net"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        ema.weights, ema.updates, start = saved["ema"], saved["step"], saved["step"]
    net.train()
    images, batch_size, written = images.to(DEVICE), math.ceil(batch_size / PROCESSES), time.time()
    for step in range(start, steps):
        torch.manual_seed(seed_of(seed * PROCESSES + RANK, step))
        for optimizer, rate in optimizers.items():
            optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps)) / 2
        x0 = images[to(DEVICE, torch.randint(len(images), (batch_size,)))[0]] * 2 - 1
        x0 = torch.where(*to(DEVICE, torch.rand(batch_size, 1, 1, 1) < 0.5), x0.flip(3), x0)
        t, eps = torch.randint(1, levels + 1, (batch_size,)), torch.randn_like(x0)
        loss = ddpm_loss(net, batch_of(x0), *to(DEVICE, t), batch_of(eps))
        net.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        ema.update(net)
        report(step + 1, steps, loss=loss.detach())
        if RANK == 0 and time.time() - written > checkpoint_seconds:
            save(partial, dict(step=step + 1, net=net.state_dict(), ema=ema.weights, optimizers=[optimizer.state_dict() for optimizer in optimizers]))
            written = time.time()
    return ema.weights


# ---------------------------------------------------------------------------------------------------------------------
# Stages

def syntax(source):
    """The syntax tree of a file without its docstrings: comments and spacing are gone already, so what is left is what it does."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            del node.body[0]
    return tree


# Read now: a file may be edited while the program runs
SYNTAX = {module.__name__: syntax(inspect.getsource(module)) for module in (attacks, le, perceptual, unet, sys.modules[__name__])}


def digest(*things):
    """A hash of tensors, of plain values, and of modules, classes and functions, which count by what they do."""
    sha = hashlib.sha256()
    for thing in things:
        if isinstance(thing, torch.Tensor):
            sha.update(f"{thing.shape}{thing.dtype}".encode())
            sha.update(thing.cpu().contiguous().numpy())
        elif isinstance(thing, (dict, list, tuple)):
            parts = [*thing.keys(), *thing.values()] if isinstance(thing, dict) else thing
            sha.update(f"{len(parts)}{digest(*parts) if parts else ''}".encode())
        elif inspect.ismodule(thing):
            sha.update(ast.dump(SYNTAX[thing.__name__]).encode())
        elif inspect.isclass(thing) or inspect.isfunction(thing):
            node = SYNTAX[thing.__module__]
            for name in thing.__qualname__.replace(".<locals>", "").split("."):
                node = next(inner for inner in ast.walk(node) if inner is not node and getattr(inner, "name", None) == name)
            sha.update(ast.dump(node).encode())
        else:
            sha.update(repr(thing).encode())
    return sha.hexdigest()


def generator(seed):
    """A source of random choices that differs from process to process."""
    return torch.Generator().manual_seed(seed * PROCESSES + RANK)


def given(load, *files):
    """load(*files, DEVICE) of checkpoints that the user named. Raises BadInput if one is missing or something else."""
    for file in (Path(file) for file in files if file):
        if not file.exists():
            url = perceptual.WEIGHTS.get(file.name, [""])[0]
            raise BadInput(f"{file}: no such file" + f"; put {url} there, or add --download" * bool(url))
    try:
        return load(*files, DEVICE)
    except ValueError as error:
        raise BadInput(error) from None


class Experiment:
    """The stages as properties: asking for one makes what it needs, or reads it from the run's folder.

    A stage is made again when anything it depends on has changed: settings, input data, or the code that makes it.
    `elsewhere` are other folders, whose stages are used where they hold.
    """

    def __init__(self, config, *elsewhere):
        self.config = config
        self.run = Path(config.out or f"runs/{Path(config.data).resolve().name}")
        self.folders = [self.run, *elsewhere]
        self.sets, self.classes, self.source = split_data(config)
        self.seconds = {}
        self.run.mkdir(parents=True, exist_ok=True)

    def stage(self, name, make, *depends):
        """The dict of tensors and plain values that make(report, partial) returns, from runs/<data>/<name>.pt if that still holds.

        `partial` is where an unfinished stage may keep its state; it is deleted when the stage is done.
        """
        key, path = digest(name, DEVICE, make, *depends), self.run / f"{name}.pt"
        stored = (torch.load(folder / path.name, map_location="cpu", weights_only=True) for folder in self.folders if (folder / path.name).exists())
        result = next((result for result in stored if result.get("key") == key), None)
        barrier()                                          # before anyone writes what the others are still to find missing
        if result is None:
            partial, start = self.run / f"{name}.{key[:8]}.partial", time.time()
            result = make(Progress(name), partial)
            result |= dict(key=key, seconds=round(time.time() - start, 1))
            if RANK == 0:
                save(path, result)
                for stale in self.run.glob(f"{name}.*.partial"):
                    stale.unlink()
            barrier()
            if RANK:                                       # all go on with what the first one made
                result = torch.load(path, map_location="cpu", weights_only=True)
        self.seconds[name] = result["seconds"]
        return result

    def settings(self, *prefixes):
        """What the configuration says under names that begin so."""
        return {f.name: getattr(self.config, f.name) for f in fields(Config) if f.name.startswith(prefixes)}

    def learner(self, kind, seed, labels, generator):
        """A fresh network and what it is to learn (see `attacks.min_min`): a "classifier" the labels, "simclr" which views are of one image."""
        c = self.config
        torch.manual_seed(seed)
        net = ResNet(c.resnet_widths, c.resnet_blocks, c.resnet_strides, len(self.classes))
        net = data_parallel(accelerated((net if kind == "classifier" else SimCLR(net)).to(DEVICE, memory_format=torch.channels_last)))
        if kind == "classifier":
            return net, classify(net, labels.to(DEVICE), lambda x: crop_flip(x, generator))
        return net, find_partner(net, lambda x: VIEWS[c.simclr_view](x, generator), c.simclr_temperature)

    def fresh_unet(self):
        """The U-Net before its training."""
        c = self.config
        torch.manual_seed(c.seed)
        return UNet(c.unet_width, c.unet_mults, c.unet_blocks, c.unet_attention, c.unet_dropout, c.unet_patch, self.sets["unprotected"][0].shape[-1])

    def unet_training(self):
        """What `train_unet` is told of its training."""
        c = self.config
        return dict(levels=c.unet_levels, steps=c.unet_steps, batch_size=c.unet_batch, lr=c.unet_lr, muon=c.unet_muon, ema_decay=c.unet_ema, seed=c.seed)

    @cached_property
    def ddpm(self):
        """The U-Net, trained on the unprotected images only."""
        c, (images, _), training = self.config, self.sets["unprotected"], self.unet_training()
        net = given(unet.load, c.unet_start).requires_grad_(True) if c.unet_start else self.fresh_unet()

        def make(report, partial):
            parallel = data_parallel(accelerated(net.to(DEVICE, memory_format=torch.channels_last)))
            return dict(config=net.config, levels=c.unet_levels, weights=train_unet(parallel, images, **training, report=report, partial=partial))
        self.stage("ddpm", make, net.config, net.state_dict(), training, images, unet, train_unet, Muon, orthogonal)
        return accelerated(unet.load(self.run / "ddpm.pt", DEVICE).to(memory_format=torch.channels_last))

    @cached_property
    def vgg(self):
        """The perceptual distance, over released weights, or over a VGG trained on the unprotected images and their labels."""
        c, (images, labels) = self.config, self.sets["unprotected"]
        if c.vgg_weights:
            return given(perceptual.load, c.vgg_weights, c.lpips or None).to(memory_format=torch.channels_last)
        settings = dict(width=c.vgg_width, convs=c.vgg_convs, classes=len(self.classes))
        training = dict(epochs=c.vgg_epochs, lr=c.vgg_lr, batch_size=c.vgg_batch)

        def make(report, _):
            torch.manual_seed(c.seed)
            net, g = perceptual.VGG(**settings).to(DEVICE, memory_format=torch.channels_last), torch.Generator().manual_seed(c.seed)
            fit(net, classify(net, labels.to(DEVICE), lambda x: crop_flip(x, g)), batch_of(images), **training, generator=g, report=report)
            print(f"vgg: {accuracy(net, *self.sets['validation']):.1f} % right on validation images")
            return dict(config=net.config, weights=net.state_dict())
        self.stage("vgg", make, settings, training, c.seed, images, labels, perceptual, fit, classify, crop_flip)
        return perceptual.load(self.run / "vgg.pt", device=DEVICE).to(memory_format=torch.channels_last)

    def distance(self, *samplers):
        """The perceptual distance, if one of the samplers looks at it; the setting for photographs does not."""
        return self.vgg if any(sampler.perceptual_weight for sampler in samplers) else None

    @cached_property
    def protect(self):
        """{protection: unlearnable examples (N, 3, H, W)} of the protected images.

        Sample-wise noise starts from the class-wise and its surrogate, as in He et al. 2023. All run all their rounds:
        noise that a surrogate has just learned still leaves a victim some of the picture, or is not yet each image's own.
        """
        c, (images, labels) = self.config, self.sets["protected"]
        if c.perturbation:
            ues = foreign_ues(c.perturbation, images, labels, self.classes, self.source)
            change = 255 * (ues - images).abs()
            print(f"{c.perturbation}: changes a channel by {change.max():.0f}/255 at most, {change.mean():.1f}/255 on average")
            return {Path(c.perturbation).stem: ues}
        x, epsilon, ues = batch_of(images), c.epsilon / 255, {}
        for family in c.protections.split(","):
            kind = VICTIMS[family]
            settings = self.settings("resnet", "epsilon", "noise_step", "seed", *["simclr_view", "simclr_temperature"] * (kind == "simclr"))
            of_class, of_sample = self.settings(f"{family}_class"), self.settings(f"{family}_sample")

            def make(mine, rows, start, surrogate_weights, g, report, **how):
                surrogate, choose = self.learner(kind, c.seed + 1000, labels[mine], g)  # not the victim's initialisation
                surrogate.load_state_dict(surrogate_weights or surrogate.state_dict())
                noise, history = min_min(surrogate, choose, x[mine], rows, start.to(DEVICE), **how, momentum=0.9, epsilon=epsilon,
                                         step=c.noise_step * epsilon, generator=g, report=report)
                print(f"{report.label}: surrogate {100 * history[-1]:.0f} % right after {len(history)} rounds")
                return noise.cpu(), surrogate.state_dict()

            def class_wise(report, _):                     # under torchrun, each process does all of it
                start = torch.empty(len(self.classes), *images.shape[1:]).uniform_(-epsilon, epsilon, generator=torch.Generator().manual_seed(c.seed))
                noise, surrogate = make(slice(None), labels, start, None, torch.Generator().manual_seed(c.seed), report,
                                        rounds=of_class[f"{family}_class_rounds"], noise_batches=10)
                return dict(images=as_bytes(publish(images, noise[labels])), noise=noise, surrogate=surrogate)

            def sample_wise(report, _):                    # and here the noise of its own share
                mine = share(torch.arange(len(images)))
                noise, surrogate = make(mine, torch.arange(len(mine)), by_class["noise"][labels[mine]], by_class["surrogate"], generator(c.seed), report,
                                        rounds=of_sample[f"{family}_sample_rounds"], noise_steps=of_sample[f"{family}_sample_steps"],
                                        lr=of_sample[f"{family}_sample_lr"], batch_size=math.ceil(128 / PROCESSES))
                noise = gathered(noise, len(images))
                return dict(images=as_bytes(publish(images, noise)), noise=noise, surrogate=surrogate)
            depends = settings, images, labels, attacks, ResNet, BasicBlock, SimCLR, Experiment.learner, make
            by_class = self.stage(f"{family}-class", class_wise, of_class, *depends)
            by_sample = self.stage(f"{family}-sample", sample_wise, by_class["noise"], by_class["surrogate"], of_sample, *depends)
            ues |= {f"{family}-class": as_float(by_class["images"]), f"{family}-sample": as_float(by_sample["images"])}
        return ues

    @cached_property
    def purify(self):
        """{protection: learnable examples (N, 3, H, W)} made from the unlearnable ones."""
        c, les = self.config, {}
        for name, ues in self.protect.items():
            les[name] = as_float(self.purified(f"{name}-le", ues, c.sampler)["images"])
        return les

    def purified(self, name, ues, *samplers, draws=1, together=lambda made: made[0]):
        """The stage of learnable examples made from UEs (N, 3, H, W) by one sampler after the other: what `together` makes of the list of `draws` such."""
        c, distance = self.config, self.distance(*samplers)

        def make(report, _):
            made, seeds = [], itertools.count(c.seed)      # each pass has its own
            for _ in range(draws):
                images = share(ues)
                for sampler, seed in zip(samplers, seeds):
                    images = le.purify(self.ddpm, distance, images, sampler, share([seed_of(seed, place) for place in range(len(ues))]), report=report)
                made.append(gathered(images, len(ues)))
            return dict(images=as_bytes(together(made)))
        return self.stage(name, make, [asdict(sampler) for sampler in samplers], draws, c.seed, ues, self.ddpm.state_dict(),
                          distance and distance.state_dict(), unet, perceptual, le.seen, le.guidance, le.joint_conditioned_mean, le.denoise, le.purify)

    def victim(self, kind, name, images, seed=None):
        """A victim of this kind, trained on `images` in place of the protected ones, and the loss of each epoch.

        `images` may hold several versions of them one after the other; all are trained on, in as many steps.
        """
        c, labels = self.config, self.sets["protected"][1]
        seed, versions = c.seed if seed is None else seed, len(images) // len(labels)
        mine, g, labels = even_share(len(images)), generator(seed), labels.repeat(versions)
        net, choose = self.learner(kind, seed, labels[mine], g)
        settings = self.settings("resnet", kind)
        epochs, batch_size, lr = (settings[f"{kind}_{name}"] for name in ("epochs", "batch", "lr"))

        def make(report, _):
            losses = fit(net, choose, batch_of(images[mine]), epochs=max(1, epochs // versions), lr=lr, batch_size=math.ceil(batch_size / PROCESSES),
                         generator=g, report=report)
            return dict(weights=net.state_dict(), losses=losses)
        made = self.stage(f"{kind}-{name}", make, settings, seed, images, labels, ResNet, BasicBlock, SimCLR, Experiment.learner, fit, attacks)
        net.load_state_dict(made["weights"])
        return net.eval(), made["losses"]

    def score(self, kind, name, images, seed=None):
        """Accuracy of that victim in percent, on clean images.

        A SimCLR victim is judged by a linear probe of its encoder, trained on the unprotected images, which are clean, and their labels.
        """
        net, clean = self.victim(kind, name, images, seed)[0], self.sets[self.config.evaluate]
        return accuracy(net, *clean) if kind == "classifier" else linear_probe(net.encoder, self.sets["unprotected"], clean)

    def victims(self, kinds=VICTIMS):
        """The table: {"clean": of the classifier, "floor": linear probe of a fresh encoder, "rows": [{...}]}.

        A row has "protection", the accuracies "clean", "ue" and "le", "recovery", "psnr_ue" and "psnr_le".
        """
        c, (images, labels), rows = self.config, self.sets["protected"], []
        for name, ues in self.protect.items():
            kind, les = judge_of(name, kinds), self.purify[name]
            clean, on_ue, on_le = (self.score(kind, *of) for of in (("clean", images), (f"{name}-ue", ues), (f"{name}-le", les)))
            recovery = round((on_le - on_ue) / (clean - on_ue), 3) if clean - on_ue > 1 else None  # nothing was lost, nothing can be recovered
            rows.append(dict(protection=name, clean=round(clean, 2), ue=round(on_ue, 2), le=round(on_le, 2), recovery=recovery,
                             psnr_ue=round(psnr(ues, images), 2), psnr_le=round(psnr(les, images), 2)))
        floor = linear_probe(self.learner("classifier", c.seed, labels, None)[0].eval(), self.sets["unprotected"], self.sets[c.evaluate])
        return dict(clean=rows[0]["clean"], floor=round(floor, 2), rows=rows)


# ---------------------------------------------------------------------------------------------------------------------
# Results

def psnr(x, y):
    """Peak signal-to-noise ratio in dB of two sets of images in [0, 1], from their mean squared difference."""
    return -10 * math.log10(max((x - y).square().mean().item(), 1e-12))


def decimal(value):
    """A recovery as text, "-" where nothing was lost."""
    return "-" if value is None else f"{value:.2f}"


def table(results):
    """The results as a Markdown table; accuracies in percent on clean images."""
    lines = ["| protection | clean | UE | LE | recovery | PSNR UE | PSNR LE |", "|---|---|---|---|---|---|---|"]
    for r in results["rows"]:
        lines.append(f"| {r['protection']} | {r['clean']:.1f} | {r['ue']:.1f} | {r['le']:.1f} | {decimal(r['recovery'])} "
                     f"| {r['psnr_ue']:.1f} dB | {r['psnr_le']:.1f} dB |")
    return "\n".join(lines)


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")     # told apart by the colour-blind (Okabe & Ito)


def grid(path, rows, titles=(), zoom=2, margin=130, gap=4):
    """A picture of rows of images, (text, [(3, H, W), ...]) each, all of one size, under a line of titles."""
    (height, width), header = (zoom * side for side in rows[0][1][0].shape[1:]), 16 * bool(titles)
    canvas = Image.new("RGB", (margin + max(len(images) for _, images in rows) * (width + gap), header + len(rows) * (height + gap) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for j, title in enumerate(titles):
        draw.text((margin + j * (width + gap), 2), title, fill="black")
    for i, (text, images) in enumerate(rows):
        top = header + gap + i * (height + gap)
        draw.text((6, top + height // 2 - 6), text, fill="black")
        for j, image in enumerate(images):
            pixels = as_bytes(image).permute(1, 2, 0).numpy()
            canvas.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST), (margin + j * (width + gap), top))
    canvas.save(path)


def plot(path, series, x_label, y_label, y_top, y_low=0, size=(900, 520)):
    """A picture of series (name, colour, joined by a line?, [(x, y, text), ...]), y from y_low to y_top."""
    canvas, left, right, bottom = Image.new("RGB", size, "white"), 50, size[0] - 150, size[1] - 50
    draw, xs = ImageDraw.Draw(canvas), [x for _, _, _, points in series for x, _, _ in points]
    low, high, labels = min(xs), max(max(xs), min(xs) + 1), []
    place = lambda x, y: (left + (x - low) / (high - low) * (right - left), bottom - (min(y, y_top) - y_low) / (y_top - y_low) * (bottom - 30))
    for i in range(6):
        x, y = low + (high - low) * i / 5, y_low + (y_top - y_low) * i / 5
        draw.line((*place(low, y), *place(high, y)), fill="#dddddd")
        draw.text((6, place(low, y)[1] - 6), f"{y:.3g}", fill="black")
        draw.text((place(x, y_low)[0] - 8, bottom + 6), f"{x:.3g}", fill="black")
    draw.text((left, size[1] - 20), x_label, fill="black")
    draw.text((6, 6), y_label, fill="black")
    for i, (name, colour, joined, points) in enumerate(series):
        draw.text((right + 30, 30 + 16 * i), name, fill=colour)
        if joined:
            draw.line([place(x, y) for x, y, _ in points], fill=colour, width=2)
        for x, y, text in points:
            x, y = place(x, y)
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
            box = np.array([x + 7, y - 6, x + 7 + draw.textlength(text), y + 6])
            while text and any((box[:2] < other[2:]).all() and (other[:2] < box[2:]).all() for other in labels):
                box += (0, 12, 0, 12)                      # below the label that is there already
            labels.append(box)
            draw.text(tuple(box[:2]), text, fill=colour)
    canvas.save(path)


def first_of_each(labels, n):
    """Where the first image of each class is, for at most n classes."""
    return [(labels == k).nonzero()[0, 0].item() for k in labels.unique()][:n]


def figure(e, path, amplify=16, columns=10):
    """Rows of original, UE, perturbation, LE and what is left of the perturbation, for each protection; one image of each class."""
    originals, labels = e.sets["protected"]
    chosen = first_of_each(labels, columns)
    rows = [("original", originals[chosen])]
    for name, ues in e.protect.items():
        x, ue, le_ = originals[chosen], ues[chosen], e.purify[name][chosen]
        rows += [(f"{name} UE", ue), (f"UE - original, x{amplify}", 0.5 + amplify * (ue - x)),
                 (f"{name} LE", le_), (f"LE - original, x{amplify}", 0.5 + amplify * (le_ - x))]
    grid(path, rows)


def strip(e, path):
    """The reverse process: for each protection one image, its UE, x_t at every level that the sampler visits in its last round, and the LE."""
    c, n, rows = e.config, min(2, len(e.sets["protected"][0]) - 1), []
    for name, ues in e.protect.items():
        seen = []
        hook = e.ddpm.register_forward_pre_hook(lambda net, args: seen.append(args[0][0].cpu() / 2 + 0.5))
        made = le.purify(e.ddpm, e.distance(c.sampler), ues[n:n + 1], c.sampler, seed=c.seed)
        hook.remove()
        rows.append((name, [e.sets["protected"][0][n], ues[n], *seen[-c.sampler.steps:], made[0]]))
    grid(path, rows, ["original", "UE", *(f"t = {t}" for t in unet.levels(c.sampler.t_star, c.sampler.steps)[:-1]), "LE"])


def curves(e, path):
    """Loss of the classifiers at each epoch: on UEs it falls before there was time to learn a picture."""
    runs, series = {"clean": e.sets["protected"][0]}, []
    for name in e.protect:
        if judge_of(name) == "classifier":
            runs |= {f"{name}-ue": e.protect[name], f"{name}-le": e.purify[name]}
    for colour, (name, images) in zip(itertools.cycle(COLOURS), runs.items()):
        series.append((name, colour, True, [(epoch, loss, "") for epoch, loss in enumerate(e.victim("classifier", name, images)[1], 1)]))
    plot(path, series, "epoch", "training loss", 2.5)


def confusion(e, path):
    """What classifiers trained on clean images, UEs and LEs take clean images for: rows are classes, columns answers, blue is often."""
    name = next((name for name in e.protect if judge_of(name) == "classifier"), None)
    if name is None:
        return
    (x, y), n, blue, matrices = e.sets[e.config.evaluate], len(e.classes), torch.tensor([0.0, 0.45, 0.7]).view(3, 1, 1), []
    for key, images in (("clean", e.sets["protected"][0]), (f"{name}-ue", e.protect[name]), (f"{name}-le", e.purify[name])):
        net = e.victim("classifier", key, images)[0]
        counts = (n * y + answers(net, x)).bincount(minlength=n * n).view(n, n)
        matrices.append(0.94 + (blue - 0.94) * counts / counts.sum(1, keepdim=True).clamp_min(1))
    rows = [(str(e.classes[i])[:16], [matrix[:, i:i + 1] for matrix in matrices]) for i in range(n)]
    grid(path, rows, ["clean", f"{name} UE", f"{name} LE"], zoom=24)


def run_all(experiment):
    """Every stage, then the table on stdout, results.json and figure.png in the run's folder."""
    config, run = experiment.config, experiment.run
    results = dict(data=config.data, seed=config.seed, config=asdict(config), **experiment.victims(), seconds=experiment.seconds)
    (run / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for picture in (figure, strip, curves, confusion):
        picture(experiment, run / f"{picture.__name__}.png")
    seconds = ", ".join(f"{name} {s:.0f}" for name, s in experiment.seconds.items())
    print(textwrap.fill(f"seconds: {seconds}; all {sum(experiment.seconds.values()):.0f}", 120, break_on_hyphens=False))
    print(f"\n{table(results)}\n\nAccuracy in percent on clean {config.evaluate} images. More in {run}/results.json and {run}/figure.png;\n"
          "beside them the reverse process (strip.png), training losses (curves.png) and what is taken for what (confusion.png).")


def ddpm(experiment, count=500):
    """Make the U-Net and print how well it denoises validation images, in one step, from each level that purification visits."""
    net, sampler, g, decibels = experiment.ddpm, experiment.config.sampler, torch.Generator().manual_seed(0), []
    x0 = batch_of(experiment.sets["validation"][0][:count]) * 2 - 1
    for t in unet.levels(sampler.t_star, sampler.steps)[:-1]:
        xt = unet.q_sample(x0, t, batch_of(torch.randn(x0.shape, generator=g)))
        with torch.no_grad():
            made = torch.cat([unet.predict_x0(part, t, net(part, t)).clamp(-1, 1) for part in xt.split(100)])
        decibels.append(f"{psnr(made / 2, x0 / 2):.2f} from t = {t}")
    print(f"ddpm: PSNR of one denoising step, dB: {', '.join(decibels)}")


def anatomy(noise):
    """Shares of the energy of perturbations (N, 3, H, W) that are grey (the channels' mean) and that are slow (the mean of 7x7 pixels)."""
    slow = F.avg_pool2d(F.pad(noise, (3, 3, 3, 3), mode="reflect"), 7, stride=1)
    return [part.square().sum().item() / noise.square().sum().item() for part in (le.seen(noise, le.PHOTOGRAPHS), slow)]


def protect(experiment):
    """Make the protections and print what their noise consists of."""
    for name, ues in experiment.protect.items():
        grey, slow = anatomy(ues - experiment.sets["protected"][0])
        print(f"{name}: {100 * grey:.0f} % of the noise's energy is grey, {100 * slow:.0f} % is slow (the mean of 7x7 pixels)")


def cross(experiment):
    """Each protection before the victim it was not made for: the reason why either kind alone protects nobody."""
    results = experiment.victims({"em": "simclr", "cp": "classifier"})
    (experiment.run / "cross.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"{table(results)}\n\nError-minimizing noise before SimCLR, contrastive poisoning before a classifier.")


# ---------------------------------------------------------------------------------------------------------------------
# Ablation: countermeasures side by side, on the same unlearnable examples and with the same U-Net

def jpeg(images, quality=10):
    """Images (N, 3, H, W) in [0, 1] after JPEG compression."""
    made = []
    for pixels in as_bytes(images).permute(0, 2, 3, 1).numpy():
        Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG", quality=quality)
        made.append(torch.from_numpy(np.array(Image.open(file))))
    return as_float(torch.stack(made).permute(0, 3, 1, 2))


def weighted(sampler, w):
    """The sampler with w times its weights."""
    return replace(sampler, pixel_weight=w * sampler.pixel_weight, perceptual_weight=w * sampler.perceptual_weight)


CURVE = {"unguided": 0, **{f"joint, weights x {w}": w for w in (0.25, 0.5)}, "joint": 1, **{f"joint, weights x {w}": w for w in (2, 4)}}


def using(*samplers, **how):
    """These samplers, one after the other, and how `Experiment.purified` is to use them."""
    return samplers, how


def countermeasures(sampler):
    """{question: {name: what is done to unlearnable examples: a function of them and a generator, or what `using` returns}}."""
    level, joint = sampler.t_star, {"joint": using(sampler)}
    return {
        "network": {
            "none": lambda x, g: x,
            "grayscale": lambda x, g: attacks.luma(x).expand_as(x),
            "JPEG 10": lambda x, g: jpeg(x),
            "noise": lambda x, g: (x + unet.sigma(level) / 2 * torch.randn(x.shape, generator=g)).clamp(0, 1)},  # as much as the samplers add
        "condition": {
            "unguided": using(weighted(sampler, 0)),
            "pixel only": using(replace(sampler, perceptual_weight=0.0, switch=0)),
            "perceptual only": using(replace(sampler, pixel_weight=0.0, switch=level))} | joint,
        "release": joint | {
            "released, 20 levels": using(replace(le.RELEASED, t_star=20, steps=20)),
            "released, 36 levels": using(le.RELEASED)}}


def variations(sampler):
    """The same for questions about the joint sampler."""
    joint = {"joint": using(sampler)}
    return {
        "target": joint | {
            "joint, target at level t, same noise": using(replace(sampler, target="same")),
            "joint, target at level t, fresh noise": using(replace(sampler, target="fresh"))},
        "order": joint | {"joint, both throughout": using(replace(sampler, switch=None))},
        "sight": joint | {"joint, on grey": using(replace(sampler, compare="grey"))},
        "rounds": joint | {
            "joint, two rounds of half the steps": using(replace(sampler, rounds=2 * sampler.rounds, steps=max(1, sampler.steps // 2))),
            "joint, twice the steps": using(replace(sampler, steps=2 * sampler.steps)),
            "joint, then a shallow round": using(sampler, replace(weighted(sampler, 0), t_star=max(2, sampler.t_star // 4), rounds=1, steps=2))},
        "draws": joint | {
            "joint, mean of two draws": using(sampler, draws=2, together=lambda made: torch.stack(made).mean(0)),
            "joint, two draws as augmentation": using(sampler, draws=2, together=torch.cat)},
        "weight": {label: using(weighted(sampler, w)) for label, w in CURVE.items()}}


def compare(e, name, questions, victims):
    """What victims learn from a protection's UEs after each countermeasure: {"clean": accuracy, "rows": [{"countermeasure", "accuracy", ...}]}.

    Draws a picture for each question: images as each of its countermeasures leaves them, and what is left of the perturbation.
    """
    ues, (originals, labels), vgg, kind, rows, looks = e.protect[name], e.sets["protected"], e.vgg, judge_of(name), [], {}
    chosen = first_of_each(labels, 6)
    spread = lambda what, images: np.array([e.score(kind, f"{what}-{k}", images, e.config.seed + k) for k in range(victims)])
    clean = spread("clean", originals)
    for label, counter in dict(itertools.chain(*(counters.items() for counters in questions.values()))).items():
        evaluations, seconds = 0, 0.0
        if callable(counter):
            made = counter(ues, torch.Generator().manual_seed(e.config.seed))
        else:
            samplers, how = counter
            stage = e.purified(f"ablation-{name}-{slug(label)}", ues, *samplers, **how)
            made, evaluations = as_float(stage["images"]), how.get("draws", 1) * sum(sampler.rounds * sampler.steps for sampler in samplers)
            seconds = 1000 * stage["seconds"] / len(ues)
        accuracies, version = spread(f"{name}-{slug(label)}", made), made[:len(ues)]
        lost = lost if rows else clean - accuracies        # the first row is what nothing does
        with torch.no_grad():
            distance = torch.cat([vgg(batch_of(a), batch_of(b)) for a, b in zip(version.split(500), originals.split(500))]).mean().item()
        rows.append(dict(countermeasure=label, accuracy=round(accuracies.mean(), 2), spread=round(accuracies.std(ddof=1), 2),
                         recovery=round(1 - ((clean - accuracies) / lost).mean(), 3) if lost.min() > 1 else None,
                         psnr=round(psnr(version, originals), 2), perceptual=round(distance, 4), evaluations=evaluations, seconds_1000=round(seconds, 2)))
        looks[label] = (f"{label}: {rows[-1]['accuracy']:.1f}", [*version[chosen], *(0.5 + 8 * (version[chosen] - originals[chosen]))])
        print(f"{name}, {label}: {rows[-1]['accuracy']:.1f} +- {rows[-1]['spread']:.1f}", flush=True)
    for question, counters in questions.items():
        grid(e.run / f"ablation-{name}-{question}.png", [looks[label] for label in counters], margin=260)
    return dict(clean=round(clean.mean(), 2), rows=rows)


def ablation(experiment, victims=3):
    """A table, ablation.json and ablation.png: for each countermeasure the accuracy, over `victims` seeds, and what it costs.

    Questions about the joint sampler are asked of the first protection only.
    """
    c, results = experiment.config, {}
    for name in c.ablate.split(","):
        results[name] = compare(experiment, name, countermeasures(c.sampler) | ({} if results else variations(c.sampler)), victims)
    (experiment.run / "ablation.json").write_text(json.dumps(dict(seed=c.seed, evaluate=c.evaluate, victims=victims, **results), indent=1) + "\n")
    for name, result in results.items():
        print(f"\n{name}, {victims} victims, clean {result['clean']:.1f}\n\n"
              "| countermeasure | accuracy | recovery | PSNR | perceptual distance | evaluations | s / 1000 images |\n|---|---|---|---|---|---|---|")
        for r in result["rows"]:
            print(f"| {r['countermeasure']} | {r['accuracy']:.1f} ± {r['spread']:.1f} | {decimal(r['recovery'])} | {r['psnr']:.1f} dB "
                  f"| {r['perceptual']:.3f} | {r['evaluations']} | {r['seconds_1000']:.1f} |")
    trade_off(results, experiment.run / "ablation.png")


def slug(text):
    """A file name for a label."""
    return "-".join("".join(ch if ch.isalnum() or ch == "." else " " for ch in text).split())


def trade_off(results, path):
    """Accuracy against fidelity (PSNR) of every sampler; the joint one's, from no weight to four times ours, are joined by a line."""
    series, low = [], 100
    for colour, (name, result) in zip(COLOURS, results.items()):
        samplers = {r["countermeasure"]: r for r in result["rows"] if r["evaluations"]}
        points = {label: (r["psnr"], r["accuracy"], label.removeprefix("joint, weights ")) for label, r in samplers.items()}
        series += [(name, colour, True, [points[label] for label in CURVE if label in points]),
                   ("", colour, False, [point for label, point in points.items() if label not in CURVE and not label.startswith("joint, ")])]
        low = min([low, *(accuracy for _, accuracy, _ in points.values())])
    plot(path, series, "PSNR to the original, dB", "accuracy on clean images, %", 100, 5 * (low // 5))


def sweep(experiment):
    """What a setting does to the protections, a table, sweep-<setting>.json and .png: accuracy of victims of clean images and of UEs.

    Each value has a folder of its own for what differs.
    """
    c, rows = experiment.config, []
    name, values = sweep_of(c)
    for value in values:
        e = Experiment(replace(c, **{name: value}, out=str(experiment.run / f"{name}-{value:g}")), experiment.run)
        for protection, ues in e.protect.items():
            kind = judge_of(protection)
            clean, on_ue = e.score(kind, "clean", e.sets["protected"][0]), e.score(kind, f"{protection}-ue", ues)
            rows.append({name: value, "protection": protection, "clean": round(clean, 2), "ue": round(on_ue, 2)})
            print(f"{name} {value:g}, {protection}: clean {clean:.1f}, UE {on_ue:.1f}", flush=True)
    (experiment.run / f"sweep-{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    protections = list(dict.fromkeys(row["protection"] for row in rows))
    of = lambda protection, what: [(row[name], row[what], "") for row in rows if row["protection"] == protection]
    print(f"\n| {name} | clean | {' | '.join(protections)} |\n|{'---|' * (2 + len(protections))}")
    for value in values:
        here = [row for row in rows if row[name] == value]
        print(f"| {value:g} | {here[0]['clean']:.1f} | {' | '.join(format(row['ue'], '.1f') for row in here)} |")
    series = [("clean", COLOURS[-1], True, of(protections[0], "clean"))]
    series += [(f"{protection} UE", colour, True, of(protection, "ue")) for colour, protection in zip(COLOURS, protections)]
    plot(experiment.run / f"sweep-{name}.png", series, name, f"accuracy on clean {c.evaluate} images, %", 100)


def sweep_of(config):
    """The name and the values that --sweep asks for, such as epsilon=8,16. Raises ValueError if it is not a number in Config."""
    name, _, values = config.sweep.partition("=")
    kind = {option.name: option.type for option in fields(Config)}.get(name)
    if kind not in (int, float) or not values:
        raise ValueError("expected a setting that is a number, and its values, such as epsilon=8,16")
    return name, numbers(kind, values)


def numbers(kind, text):
    """The option 1,2,2 as (1, 2, 2)."""
    return tuple(kind(number) for number in text.split(",") if number)


def integers(text):
    return numbers(int, text)


def matrix_peak(repeats=2):
    """Floating-point operations a second, in bfloat16 on CUDA, of a large matrix product or a large convolution, whichever is faster here."""
    n, kind = (8192, torch.bfloat16) if DEVICE == "cuda" else (1024, torch.float32)
    a, x, w = (torch.randn(shape, device=DEVICE, dtype=kind) for shape in ((n, n), (64, 256, 32, 32), (256, 256, 3, 3)))
    x, w = (images.contiguous(memory_format=torch.channels_last) for images in (x, w))
    loops = (lambda: a @ a, 2 * n ** 3), (lambda: F.conv2d(x, w, padding=1), 18 * 256 * x.numel())
    return max(work / min(seconds_of(loop) for _ in range(repeats)) for loop, work in loops)


def seconds_of(loop):
    """Wall-clock seconds of a call, the GPU's work included."""
    wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    loop()
    wait()
    return time.perf_counter() - start


def bench(experiment, repeats=5):
    """Images a second of each inner loop, the work in one, and its share of the machine's matrix peak; what purification costs over its evaluations."""
    c, e = experiment.config, experiment
    images, labels = (part[:512] for part in e.sets["protected"])
    n, x, g, quiet = len(images), batch_of(images), torch.Generator().manual_seed(0), lambda *a, **k: None
    net = accelerated(e.fresh_unet().to(DEVICE, memory_format=torch.channels_last))
    distance = perceptual.PerceptualDistance(perceptual.VGG(c.vgg_width, c.vgg_convs)).to(DEVICE, memory_format=torch.channels_last)
    surrogate, choose = e.learner("classifier", 0, labels, g)
    evaluations, noise = c.sampler.rounds * c.sampler.steps, torch.zeros_like(x)

    @torch.no_grad()
    def bare():
        for _ in range(evaluations):
            for part in x.split(le.BATCH):
                net(part, c.sampler.t_star)
    steps = lambda: train_unet(net, images, **e.unet_training() | dict(steps=n // c.unet_batch), report=quiet, partial=e.run / "bench.partial")
    passes = lambda choose: min_min(choose[0], choose[1], x, torch.arange(n), noise, rounds=1, train_batches=1, generator=g)
    loops = {"network evaluation": (bare, n * evaluations), "purify": (lambda: le.purify(net.eval(), distance, images, c.sampler), n),
             "U-Net training": (steps, n // c.unet_batch * c.unet_batch), "error-minimizing noise, sample-wise": (lambda: passes((surrogate, choose)), n),
             "contrastive noise, sample-wise": (lambda: passes(e.learner("simclr", 0, labels, g)), n),
             "classifier training": (lambda: fit(surrogate, choose, x, epochs=1, lr=0.01, batch_size=c.classifier_batch, generator=g, report=quiet), n)}
    times, peak, work = {name: [] for name in loops}, 0, {}
    for name, (loop, _) in loops.items():                  # which also warms up
        with FlopCounterMode(display=False) as counter:
            loop()
        work[name] = counter.get_total_flops()
    for _ in range(repeats):                               # in turn, so that a busy machine is busy for all
        peak = max(peak, matrix_peak())
        for name, (loop, _) in loops.items():
            times[name].append(seconds_of(loop))
    for name, (_, count) in loops.items():
        seconds = np.median(times[name])
        print(f"{name:<36} {count / seconds:8.0f} images/s of {work[name] / count / 1e9:6.3g} GFLOP, "
              f"{100 * work[name] / seconds / peak:4.1f} % of {peak / 1e12:.3g} TFLOP/s")
    ratio = np.median(np.array(times["purify"]) / np.array(times["network evaluation"]))
    print(f"purification takes {ratio:.2f} times its {evaluations} network evaluations")


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def export(experiment):
    """The published images of every protection for other training code: PNGs in class folders, and .npz with data (N, H, W, 3) and label."""
    labels, root = experiment.sets["protected"][1], experiment.run / "export"
    for name in experiment.protect:
        for kind, images in (("ue", experiment.protect[name]), ("le", experiment.purify[name])):
            data = as_bytes(images).permute(0, 2, 3, 1).numpy()
            for i, (pixels, label) in enumerate(zip(data, labels)):
                path = root / f"{name}-{kind}" / experiment.classes[label] / f"{i:06}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
            np.savez(root / f"{name}-{kind}.npz", data=data, label=labels.numpy())
    print(f"{root}: a folder and an .npz for each of {', '.join(experiment.protect)}")


STAGES = {"all": run_all, "ddpm": ddpm, "vgg": lambda e: e.vgg, "protect": protect,
          "purify": lambda e: e.purify, "export": export, "victim": lambda e: print(table(e.victims())),
          "cross": cross, "ablation": ablation, "sweep": sweep, "bench": bench}


def parse(argv):
    """The stage, whether to download, and the Config that the arguments ask for. Exits with 2 and one line if they make no sense."""
    options = {f"--{option.name}": option for option in fields(Config) if option.name != "sampler"}
    shown = [f"{name} {','.join(map(str, o.default)) if o.type is tuple else o.default}" for name, o in options.items()]
    columns = [shown[i::-(-len(shown) // 3)] for i in range(-(-len(shown) // 3))]
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                    usage="python train.py [stage] [--option value ...]",
                    epilog="\n".join(["what Config explains, with the defaults of shapes (PRESETS has those of photographs):",
                                      *("  " + "".join(f"{cell:<40}" for cell in row).rstrip() for row in columns)]))
    parser.add_argument("stage", nargs="?", default="all", choices=STAGES, help="default all")
    parser.add_argument("--config", default="", choices=[name for name in PRESETS if name != "photographs"], help="paper: its protocol, for a GPU")
    parser.add_argument("--download", action="store_true", help="first fetch the official archive of cifar10 to --root, and released weights")
    for name, option in options.items():
        parser.add_argument(name, type=integers if option.type is tuple else option.type, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    add_sampler_options(parser, "that of the data")
    known = {action.option_strings[-1] for action in parser._actions if action.option_strings}
    for option in argv:                                    # argparse would take an unknown option's value for the stage
        if option.startswith("--") and option.split("=")[0] not in known:
            parser.error(f"unknown option {option}; --help lists them")
    options = vars(parser.parse_args(argv))
    stage, wanted, config = (options.pop(name) for name in ("stage", "download", "config"))
    defaults = (PRESETS["photographs"] if options.get("data", Config.data) != "shapes" else {}) | PRESETS.get(config, {})
    try:
        sampler = sampler_from(options, defaults.get("sampler", le.Sampler()))
    except ValueError as error:
        parser.error(error)
    config = Config(**(defaults | options | dict(sampler=sampler)))
    if stage in ("ablation", "sweep"):
        config.evaluate = "validation"                     # what is chosen by looking must not be chosen on the test images
    for option in fields(Config):
        value, name = getattr(config, option.name), option.name
        if option.type in (int, float) and name not in ("seed", "unet_dropout", "unet_muon", "limit") and not value > 0:
            parser.error(f"--{name} {value}: expected a number above 0")
        if config.limit and (name in SETS or name.endswith(("_epochs", "_rounds", "_steps", "_batch"))):
            setattr(config, name, min(value, config.limit))
    if not set(config.protections.split(",")) <= set(VICTIMS):
        parser.error(f"--protections {config.protections}: expected some of {','.join(VICTIMS)}")
    if config.simclr_view not in VIEWS:
        parser.error(f"--simclr_view {config.simclr_view}: expected one of {', '.join(VIEWS)}")
    try:
        sweep_of(config)
    except ValueError as error:
        parser.error(f"--sweep {config.sweep}: {error}")
    if config.evaluate not in ("test", "validation"):
        parser.error(f"--evaluate {config.evaluate}: expected test or validation")
    if len(config.resnet_widths) != len(config.resnet_strides) + 1:
        parser.error(f"--resnet_widths: expected {len(config.resnet_strides) + 1} numbers, the stem's and one for each of --resnet_strides")
    if config.sampler.t_star > config.unet_levels:
        parser.error(f"--t_star {config.sampler.t_star}: expected at most --unet_levels = {config.unet_levels}, the levels that the U-Net learns")
    return stage, wanted, config


def main(argv=None):
    stage, wanted, config = parse(sys.argv[1:] if argv is None else argv)
    resolved = asdict(config)
    resolved |= resolved.pop("sampler") | dict(device=DEVICE)
    print(textwrap.fill(" ".join(f"{name}={str(value).replace(' ', '')}" for name, value in resolved.items()), 120, break_on_hyphens=False))
    with joined(), explained("train.py"):
        if wanted and RANK == 0:
            if config.data == "cifar10" and not Path(config.root).exists():
                download(CIFAR10_URL, CIFAR10_SHA256, config.root)
            le.fetch_weights(config.vgg_weights, config.lpips)
        barrier()
        STAGES[stage](Experiment(config))


if __name__ == "__main__":
    main()
