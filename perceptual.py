"""Perceptual distance: VGG-16 features (Simonyan & Zisserman 2015) compared the way LPIPS does (Zhang et al. 2018, arXiv 1801.03924).

Two images are close if a network that names things sees the same things at the same places. Images here are in [0, 1], (B, 3, H, W).
"""
import torch
from torch import nn

from unet import fit_weights, read

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)   # ImageNet's, which VGG weights expect


class VGG(nn.Module):
    """VGG's five stages of 3x3 convolutions and ReLUs, with a linear classifier on the spatial mean of the last.

    The defaults are VGG-16's features, layer for layer as torchvision numbers them (`features.N`); a small one
    (say width=16, convs=(1, 1, 1, 1, 1)) learns in a minute and serves as an offline stand-in.
    """

    def __init__(self, width=64, convs=(2, 2, 3, 3, 3), classes=10):
        super().__init__()
        self.config = dict(width=width, convs=tuple(convs), classes=classes)
        layers, self.taps, c = [], [], 3                   # taps: the last ReLU of each stage
        for stage, n in enumerate(convs):
            if stage > 0:
                layers.append(nn.MaxPool2d(2))
            for _ in range(n):
                c_out = width * min(2 ** stage, 8)
                layers += [nn.Conv2d(c, c_out, 3, padding=1), nn.ReLU()]
                nn.init.kaiming_normal_(layers[-2].weight, mode="fan_out", nonlinearity="relu")
                c = c_out
            self.taps.append(len(layers) - 1)
        self.features, self.classifier = nn.Sequential(*layers), nn.Linear(c, classes)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def stages(self, x):
        """The five feature maps of images in [0, 1], finest first: (B, c_l, H / 2**l, W / 2**l) for l = 0..4."""
        maps, h = [], (x - self.mean) / self.std
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in self.taps:
                maps.append(h)
        return maps

    def forward(self, x):
        """Class scores (B, classes) of images in [0, 1]."""
        return self.classifier(self.stages(x)[-1].mean((2, 3)))


def unit_length(h):
    """h (B, c, H, W) over its length at each position, and 1 / length (B, 1, H, W)."""
    inverse = (h.square().sum(1, keepdim=True) + 1e-10).rsqrt()  # 1e-10: a dead position has no gradient, not NaN
    return h * inverse, inverse


class PerceptualDistance(nn.Module):
    """LPIPS (Zhang et al. 2018, Eq. 1) over a frozen VGG: distance(x, y) of images in [0, 1] is a (B,) tensor, 0 for equal images.

    Each feature map is scaled to unit length over its channels; squared differences are weighted per channel, averaged over
    positions and summed over the five stages. `weights`, five non-negative (c_l,) tensors, default to ones.
    """

    def __init__(self, vgg, weights=None):
        super().__init__()
        self.vgg = vgg.eval().requires_grad_(False)
        channels = [vgg.features[tap - 1].out_channels for tap in vgg.taps]
        self.weights = nn.ParameterList(weights or [torch.ones(c) for c in channels]).requires_grad_(False)
        if [len(w) for w in self.weights] != channels or any((w < 0).any() for w in self.weights):
            raise ValueError(f"need non-negative weights for {channels} channels, got {[len(w) for w in self.weights]}")

    def weighted(self, x):
        """VGG's five maps (B, c_l, h_l, w_l) of images, and for each the factors (c_l, 1, 1) whose squares weight its channels and average its positions."""
        return [(h, (w / h[0, 0].numel()).sqrt().view(-1, 1, 1)) for h, w in zip(self.vgg.stages(x), self.weights)]

    def embed(self, x):
        """Five feature maps (B, c_l, h_l, w_l) whose squared differences add up to the perceptual distance, so that a fixed target is embedded once."""
        return [factor * unit_length(h)[0] for h, factor in self.weighted(x)]

    def gradient(self, x, target):
        """Gradient (B, 3, H, W), with respect to x, of its images' distances to those that have the embedding `target`.

        Unit length u = h / |h| is differentiated by hand, in half of autograd's time: of what pulls at u, the part along u is lost,
        and the rest is divided by |h|. The way on, through VGG, is autograd's.
        """
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            maps = self.weighted(x)
        pulls = []
        for (h, factor), y in zip(maps, target):
            u, inverse = unit_length(h.detach())
            pull = (factor * u).sub_(y).mul_(2 * factor)
            pulls.append(pull.sub_(u.mul_((u * pull).sum(1, keepdim=True))).mul_(inverse))
        return torch.autograd.grad([h for h, _ in maps], x, pulls)[0]

    def forward(self, x, y):
        return sum((a - b).square().sum((1, 2, 3)) for a, b in zip(self.embed(x), self.embed(y)))


WEIGHTS = {  # official address and sha256
    "vgg16-397923af.pth": ("https://download.pytorch.org/models/vgg16-397923af.pth",
                           "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"),
    "lpips-vgg.pth": ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
                      "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"),
}


def load(path, weights=None, device="cpu"):
    """The perceptual distance over the VGG in a file: a checkpoint of `train.py vgg`, or torchvision's vgg16 (vgg16-397923af.pth).

    `weights` is a file with LPIPS's linear layers, version 0.1 (`lin0.model.1.weight` ...); without it every channel counts the same.
    Raises ValueError if a file is something else, naming the first key that differs.
    """
    checkpoint = read(path, device)
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: holds a {type(checkpoint).__name__}, expected the weights of a VGG")
    if {"config", "weights"} <= set(checkpoint):
        vgg, state = VGG(**checkpoint["config"]), checkpoint["weights"]
    elif "features.0.weight" in checkpoint:
        vgg, state = VGG(), {name: w for name, w in checkpoint.items() if name.startswith("features.")}
        vgg.classifier = nn.Identity()                     # torchvision's wants 224x224 images; the distance needs none
    else:
        raise ValueError(f"{path}: not a VGG checkpoint; expected the keys config and weights, or torchvision's features.0.weight")
    fit_weights(path, vgg, state)
    if weights is not None:
        path, linear = weights, read(weights, device)
        names = [f"lin{i}.model.1.weight" for i in range(5)]
        if not isinstance(linear, dict) or not set(names) <= set(linear):
            raise ValueError(f"{path}: not LPIPS's linear layers; expected {names[0]} to {names[-1]}")
        weights = [linear[name].flatten() for name in names]
    return PerceptualDistance(vgg, weights).to(device)
