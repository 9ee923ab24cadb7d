"""Perceptual distance: VGG-16 features compared the way LPIPS does.

(Simonyan & Zisserman 2015, arXiv 1409.1556; Zhang et al. 2018, arXiv 1801.03924.)
Two images are close if a network that names things sees the same things at the same places.
Images here are in [0, 1], (B, 3, H, W).
"""
import torch
from torch import nn

from unet import BadInput, fit_weights, read, unfilled

MEAN = (0.485, 0.456, 0.406)                               # ImageNet's, which VGG weights expect
STD = (0.229, 0.224, 0.225)


class VGG(nn.Module):
    """VGG's five stages of 3x3 convolutions and ReLUs, and a linear classifier on their mean.

    The defaults are VGG-16's features, layer for layer as torchvision numbers them
    (`features.N`); a small one (say width=16, convs=(1, 1, 1, 1, 1)) learns in a minute.
    """

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
    non-negative (c_l,) tensors, default to ones.
    """

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


# Official addresses, and the first digits of their sha256
VGG16 = ("https://download.pytorch.org/models/vgg16-397923af.pth",
         "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0")
LPIPS = ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/"
         "v0.1/vgg.pth", "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868")


def load(path, lpips=None):
    """The distance over the VGG in a checkpoint of `train.py`, or in torchvision's vgg16.

    `lpips` is a file with LPIPS's linear layers, version 0.1; without it every channel counts the
    same. Raises BadInput if a file is something else, naming the first key that differs.
    """
    vgg, weights, released = unfilled(path, VGG)
    if released:                                           # the distance needs no class scores
        vgg.classifier = nn.Identity()
        scores = {k: w for k, w in weights.items() if str(k).startswith("classifier.")}
        if any(isinstance(w, torch.Tensor) and w.isnan().any() for w in scores.values()):
            raise BadInput(f"{path}: its classifier is NaN, as in torchvision's vgg16_features, "
                           "which has another normalisation; expected vgg16-397923af.pth")
        weights = {k: w for k, w in weights.items() if k not in scores}
    fit_weights(path, vgg, weights)
    if not lpips:
        return PerceptualDistance(vgg)
    layers = read(lpips)
    names = [f"lin{i}.model.1.weight" for i in range(5)]
    if not isinstance(layers, dict) or not set(names) <= set(layers):
        raise BadInput(f"{lpips}: not LPIPS's linear layers; expected {names[0]} to {names[-1]}")
    try:
        return PerceptualDistance(vgg, [layers[name].flatten() for name in names])
    except BadInput as error:
        raise BadInput(f"{lpips}: {error}") from None
