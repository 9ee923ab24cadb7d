"""SimSiam, a network that learns without labels and without comparing images with each other.

`--victim simsiam` of any study lets it judge, and the protection `simsiam-class` is contrastive
noise that is made against it. Question 4 of studies/README.md asks what fools it.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from attacks import PROTECTIONS, VICTIMS, Protection, ResNet, Victim, min_min


class SimSiam(nn.Module):
    """An encoder, a projection, and a predictor of the other view's projection (Chen and He 2021,
    arXiv 2011.10566). Images (B, 3, H, W) -> what is predicted of the other view (B, c), and what
    it would have to be, by this view, without a gradient (B, c).
    """

    def __init__(self, **resnet):
        super().__init__()
        self.encoder = ResNet(**resnet)
        c = self.encoder.head.in_features
        self.projection = nn.Sequential(
            nn.Linear(c, c, bias=False),
            nn.BatchNorm1d(c),
            nn.ReLU(),
            nn.Linear(c, c, bias=False),
            nn.BatchNorm1d(c, affine=False))
        self.predictor = nn.Sequential(
            nn.Linear(c, c // 4, bias=False),
            nn.BatchNorm1d(c // 4),
            nn.ReLU(),
            nn.Linear(c // 4, c))

    def features(self, x):
        return self.encoder.features(x)

    def forward(self, x):
        projected = self.projection(self.features(x))
        return self.predictor(projected), projected.detach()


def other_views(net, x, labels, generator, view):
    """What the network predicts of the other view of each image, and what that view shows.

    view    what the two are made by, such as `attacks.simclr_view`; as an option, a name in VIEWS
    Returns (2B, c) twice: of the first views, then of the second."""
    views = torch.cat([view(x, generator), view(x, generator)])
    predicted, shown = net(views)
    return predicted, shown.roll(len(x), 0)


@dataclass(frozen=True)
class Siamese(Victim):
    """A victim whose loss is no choice: it has no other images from which to tell one (Eq. 1)."""

    def loss(self, net, x, labels, generator):
        """Minus the mean cosine of what is predicted and what is shown, from 1 to -1."""
        predicted, shown = self.scores_and_answers(net, x, labels, generator, **self.choice)
        return -F.cosine_similarity(predicted.float(), shown.float()).mean()


def register():
    """Let the options --victim and --protections name them; settings are those of photographs."""
    VICTIMS["simsiam"] = Siamese(
        SimSiam, other_views, choice=dict(view="simclr"), probed=True,
        training=dict(epochs=60, batch_size=128, lr=0.1, optimizer="sgd"))
    PROTECTIONS["simsiam-class"] = Protection(
        min_min, "simsiam", settings=PROTECTIONS["cp-class"].settings)
