"""Networks that a protection did not expect, and noise that did expect the sampler: what
`python -m studies.scenarios` victims, code, owner and reply need. Only `attacks` and `unet` are
imported, so that what is made of these is kept when the rest changes."""
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import unet
from attacks import ResNet, SimCLR, class_scores, conv_norm, min_min


# -- Networks --------------------------------------------------------------------------------------

class Transformer(nn.Module):
    """A small vision transformer (Dosovitskiy et al. 2021) whose patches of 4x4 pixels are read by
    convolutions, with which it learns from few images (Xiao et al. 2021): (B, 3, H, W) -> (B, c,
    H / 4, W / 4)."""

    def __init__(self, c, size, depth=4):
        super().__init__()
        self.patches = nn.Sequential(
            conv_norm(3, c // 2, 3, 2),
            nn.ReLU(),
            conv_norm(c // 2, c, 3, 2),
            nn.ReLU(),
            nn.Conv2d(c, c, 1))
        self.place = nn.Parameter(0.02 * torch.randn((size // 4) ** 2, c))
        layer = nn.TransformerEncoderLayer(c, 4, 2 * c, 0.0, F.gelu, batch_first=True,
                                           norm_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, nn.LayerNorm(c),
                                            enable_nested_tensor=False)

    def forward(self, x):
        patches = self.patches(x)
        tokens = self.layers(patches.flatten(2).mT + self.place)
        return tokens.mT.reshape(patches.shape)


def plain(c):
    """Three times two convolutions, without shortcuts: (B, 3, H, W) -> (B, c, H / 8, W / 8)."""
    layers = []
    for c_in, c_out in ((3, c // 4), (c // 4, c // 2), (c // 2, c)):
        layers += [conv_norm(c_in, c_out, 3), nn.ReLU()]
        layers += [conv_norm(c_out, c_out, 3), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def encoder(kind, size, widths, classes, **resnet):
    """A network like ResNet with other layers between the image and the mean of its maps."""
    net = ResNet(widths=widths[-1:], blocks=1, strides=(), classes=classes)
    net.levels = plain(widths[-1]) if kind == "plain" else Transformer(widths[-1], size)
    return net


def contrastive(kind, size, widths, classes, **resnet):
    """SimCLR with such an encoder."""
    net = SimCLR(widths=widths, blocks=1, strides=(2,) * (len(widths) - 1), classes=classes)
    net.encoder = encoder(kind, size, widths, classes)
    return net


def coded_view(x, generator, view):
    """The view of an image; a code that it carries in three more channels is added after it."""
    seen = view(x[:, :3], generator)
    height, width = seen.shape[2:]
    return seen + x[:, 3:, :height, :width] if x.shape[1] > 3 else seen


# -- Noise -----------------------------------------------------------------------------------------

def scores_after_a_stride(net, x, labels, generator, prior, level):
    """The choice of a classifier that sees what the U-Net makes of the diffused images."""
    x = 2 * x - 1
    eps = torch.randn(x.shape, generator=generator).to(x)
    xt = unet.q_sample(x, level, eps)
    x0 = unet.predict_x0(xt, level, prior(xt, level)).clamp(-1, 1)
    return class_scores(net, x0 / 2 + 0.5, labels, generator)


def through_the_sampler(images, labels, victim, *, prior, level, **how):
    """Error-minimizing noise that is to survive the sampler's first stride, without guidance."""
    scores = partial(scores_after_a_stride, prior=prior, level=level)
    return min_min(images, labels, replace(victim, scores_and_answers=scores), **how)
