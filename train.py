"""The whole experiment: protect images, purify them, and see what victims learn from each.

    python train.py --config quick      the story in four minutes, on one protection
    python train.py                     all protections, on built-in images (shapes)
    python train.py ddpm                only the networks that purification needs
    python train.py --data cifar10 --root cifar-10-binary.tar.gz
    python train.py --data DIR          your own folder of class folders with images
    torchrun --nproc_per_node=2 train.py    by two processes, on a GPU each if there are

Read `story` first. Results are kept in runs/, with a table and a picture, and made again only when
their inputs, their settings or their code have changed.
"""
import argparse
import ast
import copy
import inspect
import json
import math
import re
import sys
import tarfile
import textwrap
import time
from dataclasses import asdict
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

import le
import perceptual
import unet
from attacks import PROTECTIONS, VIEWS, Victim, class_scores, partner_scores
from le import DEVICE, PROCESSES, RANK, BadInput, Sampler, as_bytes, as_float, on_device, seed_of
from perceptual import VGG
from unet import UNet, ddpm_loss, save


# Every value is an option: --seed 1, --classifier.epochs 4, --noise.em-class.rounds 10
DEFAULTS = dict(
    data="shapes",                    # shapes, cifar10, or a folder of class folders
    root="runs/cifar-10-binary.tar.gz",  # cifar10: the official archive
    out="",                           # where results are kept; a folder in runs/ if empty
    seed=0,
    evaluate="test",                  # clean images that judge: test, or validation while tuning
    limit=0,                          # at most so many images, epochs, rounds, steps: does it run?
    protections=tuple(PROTECTIONS),
    purifier="joint",                 # one of le.PURIFIERS
    epsilon=8.0,                      # largest change of a channel, of 255
    size=32,                          # a folder's images are cropped and resized to size x size
    images=dict(                      # in disjoint sets; a folder is divided in these proportions
        protected=4096,               # the owner's, published only as unlearnable examples
        unprotected=4096,             # the unauthorized user's own
        validation=1000, test=2000),
    resnet=dict(widths=(16, 24, 48, 96), blocks=1, strides=(2, 2, 2)),
    classifier=dict(epochs=16, batch_size=128, lr=0.1),  # the victim that learns labels
    simclr=dict(epochs=44, batch_size=128, lr=0.1),      # the victim that does not,
    contrast=dict(view="quadrant", temperature=0.3),     # and what it compares
    unet=dict(width=32, mults=(1, 2), blocks=1, attention=(), dropout=0.0, patch=2),
    ddpm=dict(levels=100,             # noise levels 1..levels are learned, no others visited,
              tilt=1.0,               # and drawn by their noise's deviation to this power
              steps=4000, batch_size=16, lr=4e-3, ema_decay=0.999),
    unet_start="",                    # a checkpoint, such as released weights, to go on from
    vgg=dict(width=16, convs=(1, 1, 1, 1, 1)),
    perceptual=dict(epochs=24, batch_size=32, lr=0.03),  # the VGG's training
    vgg_weights="",                   # torchvision's vgg16-397923af.pth instead of training one
    lpips="",                         # LPIPS's linear layers for it
    sampler=asdict(Sampler()),
    noise={name: protection.settings for name, protection in PROTECTIONS.items()})

# What differs from the defaults above. Photographs are cifar10 and folders, without being asked
CONFIGS = {
    "shapes": {},
    "photographs": {
        "images": dict(protected=6000, unprotected=5500, validation=500, test=2400),
        "resnet": dict(widths=(16, 32, 64, 128)),
        "classifier": dict(epochs=30),
        "simclr": dict(epochs=60, lr=0.2),
        "contrast": dict(view="simclr", temperature=0.2),
        "unet": dict(width=48),
        "ddpm": dict(levels=250, steps=6000),
        "perceptual": dict(epochs=40),
        "sampler": asdict(le.SAMPLERS["photographs"]),
        "noise": {"em-class": dict(rounds=24), "em-sample": dict(rounds=12)}},
    "quick": {"protections": ("em-class",), "ddpm": dict(steps=2000)},
    "released": {"sampler": asdict(le.SAMPLERS["released"])},
    # the papers' protocol: ResNet-18, M = 10, K = 20, steps of epsilon / 10, the U-Net of Ho et
    # al., VGG-16; contrastive noise by 20 and 20 batches of 512 and one surrogate
    "paper": {
        "images": dict(protected=40000, unprotected=9500, validation=500, test=10000),
        "resnet": dict(widths=(64, 64, 128, 256, 512), blocks=2, strides=(1, 2, 2, 2)),
        "classifier": dict(epochs=60),
        "simclr": dict(epochs=200, batch_size=512),
        "contrast": dict(view="simclr", temperature=0.5),
        "unet": dict(width=128, mults=(1, 2, 2, 2), blocks=2, attention=(16,), dropout=0.1,
                     patch=1),
        "ddpm": dict(levels=1000, tilt=0.0, steps=40000, batch_size=128, lr=2e-4, ema_decay=0.9999),
        "vgg_weights": "runs/vgg16-397923af.pth",
        "lpips": "runs/lpips-vgg.pth",
        "noise": {
            "em-class": dict(rounds=40, step=0.1),
            "em-sample": dict(rounds=10, step=0.1, noise_steps=20, lr=0.1),
            "cp-class": dict(surrogates=1, rounds=200, train_batches=20, noise_batches=20, step=0.1,
                             batch_size=512),
            "cp-sample": dict(surrogates=1, rounds=40, train_batches=20, noise_steps=5, step=0.1,
                              batch_size=512)}}}

torch.set_flush_denormal(True)        # denormal numbers late in training slow a CPU down


# -- The story -------------------------------------------------------------------------------------

def story(c, stage="all"):
    """The paper: networks from unprotected images; then protect, purify and judge."""
    sets, _ = load_data(c)
    claim(c)
    if stage == "all" and min(len(labels) for _, labels in sets.values()) < 2:
        raise BadInput(f"--data {c.data}: expected two or more images in each of the four sets")
    net, distance = train_ddpm(c, sets), train_vgg(c, sets)
    if stage == "ddpm":
        return
    rows, images = [], {}
    for name in c.protections:
        ue = protect(c, name, sets)
        le = purify(c, name, ue, net, distance)
        rows.append(judge(c, name, sets, ue, le))
        images[name] = ue, le
    show(c, sets, rows, images)


def train_ddpm(c, sets):
    """The U-Net, trained on the unprotected images only."""
    images = sets["unprotected"][0]
    net = new_network(UNet, c.unet | dict(size=images.shape[-1]), c.seed)
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
    config = c.vgg | dict(classes=count_classes(sets))
    victim = Victim(partial(new_network, VGG, config), class_scores)
    cached(c, "vgg", fit, victim=victim, images=images, labels=labels, seed=c.seed, **c.perceptual)
    return on_device(perceptual.load(c.run / "vgg.pt"))


def protect(c, name, sets):
    """The unlearnable examples (N, 3, H, W) that a protection makes of the protected images."""
    protection, how = PROTECTIONS[name], dict(c.noise[name])
    if protection.start:
        how["start"] = on_device(protect(c, protection.start, sets))
    images, labels = sets["protected"]
    made = cached(c, name, published, protection=protection.make, images=images, labels=labels,
                  victim=victim_of(c, protection.victim, sets), epsilon=c.epsilon / 255,
                  seed=c.seed, **how)
    return as_float(made["images"])


def purify(c, name, ue, net, distance):
    """The learnable examples (N, 3, H, W) made from unlearnable ones."""
    made = cached(c, f"{name}-le", purified, purifier=le.PURIFIERS[c.purifier], net=net,
                  distance=distance, images=ue, sampler=Sampler(**c.sampler), seed=c.seed)
    return as_float(made["images"])


def judge(c, name, sets, ue, le):
    """A row of the table, by the victim that the protection is made against."""
    kind, images = PROTECTIONS[name].victim, sets["protected"][0]
    clean = train_victim(c, kind, "clean", images, sets)
    on_ue = train_victim(c, kind, f"{name}-ue", ue, sets)
    on_le = train_victim(c, kind, f"{name}-le", le, sets)
    return dict(protection=name, clean=round(clean, 2), ue=round(on_ue, 2), le=round(on_le, 2),
                recovery=recovery(clean, on_ue, on_le),
                psnr_ue=round(psnr(ue, images), 2), psnr_le=round(psnr(le, images), 2))


def train_victim(c, kind, name, images, sets):
    """Accuracy in percent, on clean images, of a victim of this kind (classifier or simclr) that
    is trained on `images` in place of the protected ones."""
    victim = victim_of(c, kind, sets)
    training = c.classifier if kind == "classifier" else c.simclr
    made = cached(c, f"{kind}-{name}", fit, victim=victim, images=images, seed=c.seed,
                  labels=sets["protected"][1], **training)
    net = victim.network(c.seed).eval()
    net.load_state_dict(made["weights"])
    score = score_of(c, net, sets)
    every = math.ceil(len(made["losses"]) / 6)
    losses = ", ".join(f"{loss:.2f}" for loss in made["losses"][::every])
    print(f"{kind} on {name}: {score:.1f} %; loss every {every} epochs {losses}", flush=True)
    return score


def score_of(c, net, sets):
    """Accuracy of a victim in percent on clean images; a linear probe's where it is an encoder."""
    if isinstance(net, SimCLR):
        return linear_probe(net.encoder, sets["unprotected"], sets[c.evaluate])
    return accuracy(net, *sets[c.evaluate])


def psnr(x, y):
    """Peak signal-to-noise ratio in dB of two sets of images in [0, 1]."""
    return -10 * math.log10(max((x - y).square().mean().item(), 1e-12))


def recovery(clean, ue, le):
    """Share of what UEs took from a victim that LEs give back; None if that is a point or less."""
    return round((le - ue) / (clean - ue), 3) if clean - ue > 1 else None


def table(rows):
    """The rows of `judge` as a Markdown table."""
    lines = ["| protection | clean | UE | LE | recovery | PSNR UE | PSNR LE |", "|---" * 7 + "|"]
    for r in rows:
        share = "-" if r["recovery"] is None else f"{r['recovery']:.2f}"
        lines.append(f"| {r['protection']} | {r['clean']:.1f} | {r['ue']:.1f} | {r['le']:.1f} "
                     f"| {share} | {r['psnr_ue']:.1f} dB | {r['psnr_le']:.1f} dB |")
    return "\n".join(lines)


def show(c, sets, rows, images):
    """The table on stdout, results.json and figure.png in the run's folder."""
    untrained = victim_of(c, "classifier", sets).network(c.seed).eval()
    floor = linear_probe(untrained, sets["unprotected"], sets[c.evaluate])
    results = dict(config=vars(c), rows=rows, floor=round(floor, 2))
    (c.run / "results.json").write_text(json.dumps(results, indent=1, default=str) + "\n")
    originals, labels = sets["protected"]
    chosen = [(labels == k).nonzero()[0, 0].item() for k in labels.unique()][:10]
    x = originals[chosen]
    pictures = [x]
    for ue, learnable in images.values():
        pictures += [ue[chosen], 0.5 + 16 * (ue[chosen] - x), learnable[chosen]]
    canvas = torch.cat([torch.cat(list(row), dim=2) for row in pictures], dim=1)
    picture = Image.fromarray(as_bytes(canvas).permute(1, 2, 0).numpy())
    picture.resize((2 * picture.width, 2 * picture.height), 0).save(c.run / "figure.png")
    print(f"\n{table(rows)}\n\nAccuracy in percent on clean {c.evaluate} images; an untrained "
          f"encoder's probe has {floor:.1f}.\nMore in {c.run}: results.json, and figure.png "
          "with originals, then UEs, their noise x16 and LEs\nof each protection; "
          "`python -m studies.pictures` draws more.")


# -- The victims -----------------------------------------------------------------------------------

def conv_norm(c_in, c_out, size, stride=1):
    conv = nn.Conv2d(c_in, c_out, size, stride, size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016): (B, c_in, H, W) -> c_out, / stride."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = conv_norm(c_in, c_out, 3, stride)
        self.conv2 = conv_norm(c_out, c_out, 3)
        same = stride == 1 and c_in == c_out
        self.shortcut = nn.Identity() if same else conv_norm(c_in, c_out, 1, stride)

    def forward(self, x):
        h = F.relu(self.conv1(x))
        return F.relu(self.conv2(h) + self.shortcut(x))


class ResNet(nn.Module):
    """Residual network with the CIFAR stem: images in [0, 1] (B, 3, H, W) -> scores (B, classes).

    widths are the channels of the stem and of each level; ResNet-18 is widths
    (64, 64, 128, 256, 512), blocks 2, strides (1, 2, 2, 2).
    """

    def __init__(self, widths, blocks, strides, classes):
        super().__init__()
        self.levels = nn.Sequential(conv_norm(3, widths[0], 3), nn.ReLU())
        for c_in, c_out, stride in zip(widths[:-1], widths[1:], strides, strict=True):
            self.levels.append(BasicBlock(c_in, c_out, stride))
            for _ in range(blocks - 1):
                self.levels.append(BasicBlock(c_out, c_out, 1))
        self.head = nn.Linear(widths[-1], classes)

    def features(self, x):
        """What the last layer sees: (B, widths[-1])."""
        return self.levels((x - 0.5) / 0.25).mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x))


class SimCLR(nn.Module):
    """An encoder and the head through which contrastive learning trains it (Chen et al. 2020).

    Images (B, 3, H, W) -> embeddings (B, c). The head is thrown away afterwards: what a victim
    keeps are the encoder's features.
    """

    def __init__(self, **resnet):
        super().__init__()
        self.encoder = ResNet(**resnet)
        c = self.encoder.head.in_features
        self.projection = nn.Sequential(nn.Linear(c, c), nn.BatchNorm1d(c), nn.ReLU(),
                                        nn.Linear(c, c))

    def forward(self, x):
        return self.projection(self.encoder.features(x))


def new_network(architecture, config, seed):
    """A network on the device, whose weights depend on the seed alone."""
    torch.manual_seed(seed)
    return on_device(architecture(**config))


def count_classes(sets):
    return 1 + int(torch.cat([labels for _, labels in sets.values()]).max())


def victim_of(c, kind, sets):
    """The victim of this kind: classifier, or simclr."""
    config = c.resnet | dict(classes=count_classes(sets))
    if kind == "classifier":
        return Victim(partial(new_network, ResNet, config), class_scores)
    return Victim(partial(new_network, SimCLR, config),
                  partial(partner_scores, view=VIEWS[c.contrast["view"]],
                          temperature=c.contrast["temperature"]))


def fit(victim, images, labels, *, epochs, batch_size, lr, seed, report):
    """Train a fresh network of a victim by SGD (Nesterov momentum 0.9) and one learning-rate cycle.

    Returns its {"weights"}, "config" if it has one, and the mean loss of each epoch, "losses".
    """
    net = victim.network(seed)
    trained = le.parallel(net.train())
    generator = torch.Generator().manual_seed(seed * PROCESSES + RANK)
    images, labels = on_device(images[RANK::PROCESSES]), labels[RANK::PROCESSES].to(DEVICE)
    steps = max(1, round(len(images) * PROCESSES / batch_size))
    optimizer = torch.optim.SGD(net.parameters(), lr, 0.9, weight_decay=5e-4, nesterov=True)
    total = max(6, epochs * steps + 1)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total, pct_start=0.2)
    losses = []
    for epoch in range(epochs):
        summed = 0.0
        for b in torch.randperm(len(images), generator=generator).chunk(steps):
            with le.mixed_precision(DEVICE):
                x, y = images[b], labels[b]
                scores, answers = victim.scores_and_answers(trained, x, y, generator)
            loss = F.cross_entropy(scores.float(), answers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
            summed += loss.detach()
        losses.append(float(summed) / steps)
        report(epoch + 1, epochs, loss=losses[-1])
    return dict(config=getattr(net, "config", None), weights=net.state_dict(), losses=losses)


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


# -- The diffusion model ---------------------------------------------------------------------------

def train_unet(net, images, *, levels, tilt, steps, batch_size, lr, ema_decay, seed, report,
               partial, checkpoint_seconds=30):
    """Train by Ho et al. 2020, Algorithm 1, on noise levels 1..levels; returns a checkpoint.

    They draw levels evenly (tilt 0). Errors of x0 grow with the noise, so at tilt 1 a level is
    drawn in proportion to its standard deviation: as good an x0 in half the steps.

    The weights are an exponential moving average. Learning rates warm up over 100 steps and fall
    along a half cosine. Every step draws from its own seed, so a run resumed from `partial`, a file
    written every `checkpoint_seconds`, ends where an uninterrupted one does.
    """
    images = images.to(DEVICE)
    likely = (1 - unet.ALPHA_BAR[1:levels + 1]) ** (tilt / 2)
    trained = le.parallel(net.train().requires_grad_(True))
    average = copy.deepcopy(net)
    optimizer = torch.optim.Adam(net.parameters(), lr, betas=(0.9, 0.99), fused=True)
    start = 0
    if partial.exists():
        saved = unet.read(partial)
        net.load_state_dict(saved["net"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    written = time.time()
    for step in range(start, steps):
        torch.manual_seed(seed_of(seed * PROCESSES + RANK, step))
        warm_up = min(1, (step + 1) / 100)
        optimizer.param_groups[0]["lr"] = lr * warm_up * (1 + math.cos(math.pi * step / steps)) / 2
        n = math.ceil(batch_size / PROCESSES)
        x0 = images[torch.randint(len(images), (n,))] * 2 - 1
        x0 = torch.where((torch.rand(n, 1, 1, 1) < 0.5).to(DEVICE), x0.flip(3), x0)
        t = 1 + torch.multinomial(likely, n, replacement=True).to(DEVICE)
        with le.mixed_precision(DEVICE):
            loss = ddpm_loss(trained, on_device(x0), t, on_device(torch.randn_like(x0)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay = min(ema_decay, (1 + step) / (10 + step))   # not an average with its own start
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)
        report(step + 1, steps, loss=loss.detach())
        if RANK == 0 and time.time() - written > checkpoint_seconds:
            save(partial, dict(step=step + 1, net=net.state_dict(), average=average.state_dict(),
                               optimizer=optimizer.state_dict()))
            written = time.time()
    return dict(config=net.config, max_level=levels, weights=average.state_dict())


def published(protection, images, labels, **settings):
    """What a protection makes of images, as bytes."""
    return dict(images=as_bytes(protection(on_device(images), labels.to(DEVICE), **settings)).cpu())


def purified(purifier, net, distance, images, sampler, seed, report):
    """What a purifier makes of images, as bytes; each process does every PROCESSES-th image."""
    seeds = [seed_of(seed, place) for place in range(len(images))]
    mine = slice(RANK, None, PROCESSES)
    made = torch.zeros_like(images, device=DEVICE)
    made[mine] = purifier(net, distance, images[mine], sampler, seeds[mine], report=report)
    return dict(images=as_bytes(le.summed(made)).cpu())


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
        texture = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)
        images += uniform(g, 0.03, 0.1, n, 1, 1, 1) / 2 ** 0.5 * texture
    mean = images.mean((2, 3), keepdim=True)
    axis = torch.arange(size) + 0.5
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    for corner in ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)):
        centre = (torch.tensor(corner) + uniform(g, -0.05, 0.05, n, 2)) * size
        radius = uniform(g, 0.16, 0.225, n) * size
        turn = uniform(g, 0, 2 * math.pi, n)
        stretch = uniform(g, -0.2, 0.2, n).exp()
        rotation = torch.stack([turn.cos(), turn.sin(), -turn.sin(), turn.cos()], -1).view(n, 2, 2)
        p = (points - centre[:, None, None]).flatten(1, 2) @ rotation.mT
        p = p.view(n, size, size, 2) / radius.view(n, 1, 1, 1)
        p = p * torch.stack([stretch, 1 / stretch], -1)[:, None, None]
        colour = F.normalize(torch.randn(n, 3, 1, 1, generator=g), dim=1) * 3 ** 0.5
        colour = colour * uniform(g, 0.25, 0.5, n, 1, 1, 1)
        too_far = (mean + colour - 0.5).abs() > 0.5        # black or white
        colour = torch.where(too_far, -colour, colour)
        for k, shape in enumerate(SHAPES):
            own = labels == k                              # cover falls to 0 across the outline
            distance = signed_distance(shape, p[own]) * radius[own].view(-1, 1, 1)
            images[own] += (0.5 - distance).clamp(0, 1)[:, None] * colour[own]
    sun = uniform(g, 0, 2 * math.pi, n, 1, 1)
    x, y = (points / size - 0.5).unbind(-1)
    images = images * (1 + 0.2 * (x * sun.cos() + y * sun.sin()))[:, None]
    images = images + 0.008 * torch.randn(images.shape, generator=g)
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


def folder(root, size):
    """Images (N, 3, size, size) in [0, 1], labels (N,) and class names, from folders of images.

    Every image is cropped to its central square and resized. Raises BadInput if there are fewer
    than two classes or a file cannot be read.
    """
    images, labels, classes = [], [], []
    for path in sorted(path for path in Path(root).iterdir() if path.is_dir()):
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in le.IMAGES)
        for file in files:
            image = le.open_image(file).convert("RGB")
            image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
            images.append(le.pixels_of(image))
        if files:
            labels += [len(classes)] * len(files)
            classes.append(path.name)
    if len(classes) < 2:
        raise BadInput(f"--data {root}: expected two or more folders with {', '.join(le.IMAGES)}")
    return torch.stack(images), torch.tensor(labels), classes


SETS = ("protected", "unprotected", "validation", "test")


def load_data(c):
    """The four disjoint sets {name: (images, labels)}, and the class names.

    Raises BadInput if there is no such data, or less of it than asked for.
    """
    counts, sets = dict(c.images), {}
    if c.data == "shapes":
        (images, labels), classes = shapes(sum(counts.values()), c.seed, c.size), SHAPES
    elif c.data == "cifar10":                              # brings its own test images
        (images, labels), (x, y) = cifar10(c.root)
        classes, n = CIFAR10_CLASSES, counts.pop("test")
        sets["test"] = (x[:n], y[:n])
        if n > len(x):
            raise BadInput(f"--images.test {n}: {c.root} has {len(x)} test images")
    elif c.data and Path(c.data).is_dir():
        images, labels, classes = folder(c.data, c.size)
        total = sum(counts.values())
        counts = {name: max(1, n * len(images) // total) for name, n in counts.items()}
    else:
        raise BadInput(f"--data {c.data}: expected shapes, cifar10 or an existing folder")
    if sum(counts.values()) > len(images):
        asked = " + ".join(f"{n} {name}" for name, n in counts.items())
        raise BadInput(f"--data {c.data}: {len(images)} images for {asked}; ask for fewer")
    order = torch.arange(len(images))                      # shapes are independent already
    if c.data != "shapes":
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(c.seed))
    parts = order[:sum(counts.values())].split(list(counts.values()))
    return sets | {name: (images[p], labels[p]) for name, p in zip(counts, parts)}, classes


# -- What is made is kept, with a hash of each input and of all the code that it comes from --------

MODULES = ("unet", "perceptual", "attacks", "le", "train")
SOURCES = {str(path): path.read_text()                     # as they were when the program began
           for path in (Path(__file__).with_name(f"{name}.py") for name in MODULES)}


def digest(thing):
    """A hash of tensors, networks, and of what other values show of themselves."""
    if isinstance(thing, nn.Module):
        thing = dict(thing.state_dict())
    if isinstance(thing, dict):
        thing = [(key, digest(value)) for key, value in sorted(thing.items())]
    if isinstance(thing, torch.Tensor):
        array = thing.detach().cpu().contiguous().numpy()
        return sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()
    # neither where a function lies in memory nor whether this file is the program matters
    shown = re.sub(r" at 0x[0-9a-f]+|__main__\.|train\.", "", repr(thing))
    return sha256(shown.encode()).hexdigest()


@cache
def definitions(source):
    """[(name, its syntax, names it uses)] of what a file defines; docstrings do not count."""
    found = []
    for node in ast.parse(source).body:
        uses = set()
        for part in ast.walk(node):
            if isinstance(part, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(part):
                del part.body[0]
            elif isinstance(part, ast.Name):
                uses.add(part.id)
            elif isinstance(part, ast.Attribute) and getattr(part.value, "id", "") in MODULES:
                uses.add(part.attr)                        # such as `load` in unet.load
        for part in [node, *getattr(node, "targets", [])]:
            name = getattr(part, "name", getattr(part, "id", None))
            found.append((name, ast.dump(node), uses))
    return found


def code_of(make, inputs):
    """{name: hash} of each function, class and constant of the project that `make`, or something
    that the inputs name, reaches by its names. Comments and docstrings do not count."""
    own = inspect.getsourcefile(make)                      # of a study, or of somebody's protection
    sources = {own: Path(own).read_text()} | SOURCES
    known, found = {}, {}
    for definition in [d for source in sources.values() for d in definitions(source)]:
        known.setdefault(definition[0], []).append(definition)  # two files may use a name
    waiting = {make.__name__, *re.findall(r"\w+", repr(inputs))}
    while waiting:
        name = waiting.pop()
        if name in known and name not in found:
            for _, syntax, uses in known[name]:
                found[name] = digest(found.get(name, "") + syntax)
                waiting |= uses
    return found


def cached(c, name, make, **inputs):
    """make(**inputs, report=...), a dict, or what that gave before, if nothing has changed since.

    It is kept in the run's folder as name.pt, together with hashes of all inputs and of all code
    that went into it. Says what it keeps, and what has changed where it makes something again.
    """
    path = c.run / f"{name}.pt"
    code = dict(sorted(code_of(make, inputs).items()))
    parts = {key: digest(value) for key, value in inputs.items()} | code | dict(device=DEVICE)
    why = ""
    if path.exists():
        try:
            made = unet.read(path)
            old = made["parts"]
            changed = [key for key in parts | old if old.get(key) != parts.get(key)]
        except (ValueError, KeyError, TypeError):
            changed = [f"the file {path} is damaged"]
        if not changed:
            print(f"{name}: kept")
            return made
        why = " again, changed: " + ", ".join(changed[:4]) + " ..." * (len(changed) > 4)
    print(f"{name}: made{why}", flush=True)
    le.summed(torch.zeros(1, device=DEVICE))               # others may still look at the old file
    if "partial" in inspect.signature(make).parameters:
        inputs["partial"] = path.with_suffix(f".{digest(parts)[:8]}.partial")
    start = time.time()
    made = make(**inputs, report=le.Progress(name))
    if RANK == 0:
        save(path, made | dict(parts=parts, seconds=time.time() - start))
        for unfinished in c.run.glob(f"{name}.*.partial"):
            unfinished.unlink()
    le.summed(torch.zeros(1, device=DEVICE))               # others wait until it is there
    return made


# -- Command line ----------------------------------------------------------------------------------

def leaves(owner, prefix=""):
    """(option, the dict that holds its value, its key there) for each value in nested dicts."""
    for key, value in owner.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, owner, key


def merge(owner, changes):
    """Set the values of nested dicts that other nested dicts name."""
    for key, value in changes.items():
        if isinstance(value, dict):
            merge(owner.setdefault(key, {}), value)
        else:
            owner[key] = value


def value_like(default, text):
    """The text of an option as a value of its default's kind; 1,2 is (1, 2)."""
    if isinstance(default, tuple):
        kind = type(default[0]) if default else int
        return tuple(kind(part) for part in text.split(",") if part)
    return type(default)(text)


CHOICES = {"purifier": le.PURIFIERS, "contrast.view": VIEWS, "evaluate": ("validation", "test")}
SHORTENED = ("protected", "unprotected", "validation", "test", "epochs", "steps", "rounds",
             "surrogates", "train_batches", "noise_steps", "warm_up", "batches")  # by --limit


def parse(argv):
    """The stage, whether to download, and the configuration that the arguments ask for."""
    parser = le.Parser(prog="train.py", description=__doc__, allow_abbrev=False,
                       formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("all", "ddpm"), help="default all")
    parser.add_argument("--config", choices=CONFIGS, help="default: shapes or photographs")
    parser.add_argument("--download", action="store_true", help="first fetch what is missing")
    for option, owner, key in leaves(DEFAULTS):
        parser.add_argument(f"--{option}", dest=option, type=partial(value_like, owner[key]),
                            metavar="", choices=CHOICES.get(option), help=f"default {owner[key]}")
    if not argv or argv[0].startswith("-"):
        argv = ["all", *argv]
    options = vars(parser.parse_args(argv))
    photographs = options["data"] not in (None, "shapes")
    c = SimpleNamespace(**copy.deepcopy(DEFAULTS))
    merge(vars(c), CONFIGS["photographs" if photographs else "shapes"])
    merge(vars(c), CONFIGS[options["config"] or "shapes"])
    for option, owner, key in leaves(vars(c)):
        if options.get(option) is not None:
            owner[key] = options[option]
        if c.limit and key in SHORTENED and owner is not c.sampler:
            owner[key] = min(owner[key], c.limit)
    check(c)
    parts = [Path(c.data).resolve().name, options["config"], f"limit{c.limit}" * bool(c.limit)]
    c.run = Path(c.out or "runs/" + "-".join(filter(None, parts)))
    return options["stage"], options["download"], c


# Options that may be 0
ZERO = ("seed", "limit", "dropout", "tilt", "momentum", "warm_up", "pixel_weight", "pixel_above",
        "perceptual_weight", "perceptual_below")


def check(c):
    """Raise BadInput, naming the option, where a value makes no sense."""
    for option, owner, key in leaves(vars(c)):
        for value in owner[key] if isinstance(owner[key], tuple) else [owner[key]]:
            small = isinstance(value, (str, bool)) or 0 < value < 2 ** 31
            if not (small or value == 0 and key in ZERO):
                raise BadInput(f"--{option} {value}: expected a number above 0, below 2 ** 31")
    for option, fits, expected in (
            ("limit", c.limit != 1, "2 or more"), ("epsilon", 1 <= c.epsilon <= 255, "1 to 255"),
            ("ddpm.levels", c.ddpm["levels"] <= unet.T, f"at most {unet.T}"),
            # below 8, oneDNN (torch 2.13.0) errs in gradients of strides where AVX2 is the best
            ("resnet.widths", min(c.resnet["widths"], default=0) >= 8, "8 or more each"),
            ("root", c.root == DEFAULTS["root"] or c.data == "cifar10", "--data cifar10 beside it"),
            ("protections", c.protections and set(c.protections) <= set(PROTECTIONS),
             ",".join(PROTECTIONS)),
            ("sampler.t_star", c.sampler["t_star"] <= c.ddpm["levels"],
             f"at most --ddpm.levels, {c.ddpm['levels']}, which the U-Net learns")):
        if not fits:
            raise BadInput(f"--{option}: expected {expected}")
    Sampler(**c.sampler)
    for option, network in (("unet", partial(UNet, **c.unet, size=c.size)),
                            ("vgg", partial(VGG, **c.vgg)),
                            ("resnet", partial(ResNet, **c.resnet, classes=2))):
        try:
            with torch.device("meta"):                     # shapes without numbers
                x = torch.zeros(1, 3, c.size, c.size)
                network()(x, 1) if option == "unet" else network()(x)
        except Exception as error:                         # whatever the values lead to
            said = str(error).partition("\n")[0]
            raise BadInput(f"--{option}: no network for images of {c.size} pixels has these "
                           f"settings ({said})") from None


def claim(c):
    """Make the run's folder, which belongs to one data set."""
    c.run.mkdir(parents=True, exist_ok=True)
    owner = c.data if c.data in ("shapes", "cifar10") else str(Path(c.data).resolve())
    note = c.run / "data.txt"
    if note.exists() and note.read_text() not in ("", owner):  # empty: another process is at it
        raise BadInput(f"{c.run} belongs to --data {note.read_text()}; give another --out")
    note.write_text(owner)


def main(argv=None):
    with le.one_line_errors("train.py"), le.processes():
        stage, wanted, c = parse(sys.argv[1:] if argv is None else argv)
        if wanted and RANK == 0:
            le.download(CIFAR10, c.root if c.data == "cifar10" else "")
            le.download(perceptual.VGG16, c.vgg_weights)
            le.download(perceptual.LPIPS, c.lpips)
        text = " ".join(f"{option}={owner[key]}".replace(" ", "")
                        for option, owner, key in leaves(vars(c)))
        print(textwrap.fill(f"{text} device={DEVICE}", 100, break_on_hyphens=False))
        story(c, stage)


if __name__ == "__main__":
    main()
