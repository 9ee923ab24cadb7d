"""Perceptual distance: VGG-16 features compared the way LPIPS does.

(Simonyan & Zisserman 2015, arXiv 1409.1556; Zhang et al. 2018, arXiv 1801.03924.)
Two images are close if a network that names things sees the same things at the same places.
Images here are in [0, 1], (B, 3, H, W).
"""
import math

import torch
from torch import nn

import unet
from unet import BadInput

MEAN = (0.485, 0.456, 0.406)                               # ImageNet's, which VGG weights expect
STD = (0.229, 0.224, 0.225)


class VGG(nn.Module):
    """VGG's five stages of 3x3 convolutions and ReLUs, and a linear classifier on their mean.

    The defaults are VGG-16's features, layer for layer as torchvision numbers them
    (`features.N`); a small one (say width=16, convs=(1, 1, 1, 1, 1)) learns in a minute."""

    def __init__(self, width=64, convs=(2, 2, 3, 3, 3), classes=10):
        super().__init__()
        self.config = dict(width=width, convs=tuple(convs), classes=classes)
        self.features = nn.Sequential()
        self.taps = []                                     # the last ReLU of each stage
        c = 3
        for stage, n in enumerate(convs):
            c_out = width * min(2 ** stage, 8)
            if stage > 0:
                self.features.append(nn.MaxPool2d(2))
            for _ in range(n):
                conv = nn.Conv2d(c, c_out, 3, padding=1)
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                self.features.append(conv)
                self.features.append(nn.ReLU())
                c = c_out
            self.taps.append(len(self.features) - 1)
        self.classifier = nn.Linear(c, classes)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def stages(self, x):
        """The five feature maps (B, c_l, H / 2**l, W / 2**l), l = 0..4, of images in [0, 1]."""
        maps = []
        h = (x - self.mean) / self.std
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in self.taps:
                maps.append(h)
        return maps

    def forward(self, x):
        """Class scores (B, classes) of images in [0, 1]."""
        return self.classifier(self.stages(x)[-1].mean((2, 3)))


class PerceptualDistance(nn.Module):
    """LPIPS (Zhang et al. 2018, Eq. 1) over a frozen VGG: (B,) distances, 0 for equal images.

    Each feature map is scaled to unit length over its channels; squared differences are weighted
    per channel, averaged over positions and summed over the five stages. `weights`, five
    non-negative (c_l,) tensors, default to ones."""

    def __init__(self, vgg, weights=None):
        super().__init__()
        self.vgg = vgg.eval().requires_grad_(False)
        channels = [vgg.features[tap - 1].out_channels for tap in vgg.taps]
        weights = weights or [torch.ones(c) for c in channels]
        self.weights = nn.ParameterList(weights).requires_grad_(False)
        if [len(w) for w in weights] != channels or any((w < 0).any() for w in weights):
            raise BadInput(f"need non-negative weights for {channels} channels, "
                           f"got {[len(w) for w in weights]}")

    def embed(self, x):
        """Five maps (B, c_l, h_l, w_l) whose squared differences add up to the distance."""
        maps = []
        for h, w in zip(self.vgg.stages(x), self.weights):
            length = (h.square().sum(1, keepdim=True) + 1e-10).sqrt()  # a dead position: not NaN
            positions = h[0, 0].numel()
            maps.append(h / length * (w / positions).sqrt().view(-1, 1, 1))
        return maps

    def to_embedding(self, x, maps):
        """The distances (B,) of images x to the images that were embedded as `maps`."""
        return sum((a - b).square().sum((1, 2, 3)) for a, b in zip(self.embed(x), maps))

    def forward(self, x, y):
        return self.to_embedding(x, self.embed(y))


def psnr(x, y):
    """Peak signal-to-noise ratio in dB of images in [0, 1]: -10 log10 of their mean squared
    difference. A change of 1/255 everywhere is 48 dB, of 8/255 is 30 dB."""
    return -10 * math.log10(max((x - y).square().mean().item(), 1e-12))


def load(path):
    """The distance over the VGG in a checkpoint, of `train.py`, or of `python -m studies.released`
    with LPIPS's weights, "lpips", in it. Raises BadInput, naming what differs, if it is neither."""
    vgg = unet.load(path, VGG)
    try:
        return PerceptualDistance(vgg, unet.read(path).get("lpips"))
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
