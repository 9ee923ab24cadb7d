"""Noise that says which way is up, for networks that learn by telling how far an image is turned.

    python -m studies.rotation --data cifar10 --root cifar-10-binary.tar.gz

It is a third loss for the alternation `attacks.min_min`: one perturbation for all images, `rot`,
and the victim that it fools, RotNet, an encoder that learns without labels. The command is that of
`train.py`, whose options it takes; --protections is rot.
"""
import sys

if not __package__:
    print("expected `python -m studies.rotation`, from the project's folder", file=sys.stderr)
    sys.exit(2)

import torch

import train
from attacks import PROTECTIONS, VICTIMS, Protection, ResNet, Victim, crop_flip, min_min


def rotation_scores(net, x, labels, generator):
    """Which way is up? Every image, cropped and flipped, in all four turns, by 0, 90, 180 and 270
    degrees counterclockwise (Gidaris et al. 2018, "RotNet", arXiv 1803.07728).

    Returns scores (4B, 4), of all B images upright, then of all in the next turn, and so on, and
    the turns, 0 to 3 (4B,).
    """
    x = crop_flip(x, generator)
    turned = torch.cat([x.rot90(k, (2, 3)) for k in range(4)])
    return net(turned), torch.arange(4, device=x.device).repeat_interleave(len(x))


class RotNet(ResNet):
    """A ResNet that tells by which of four turns an image is turned (Gidaris et al. 2018).

    Its features are those of the last two blocks: the very last one knows turns best, and the one
    before it what is in the picture.
    """

    def __init__(self, classes, **resnet):
        super().__init__(classes=4, **resnet)

    def features(self, x):
        before = self.levels[:-1]((x - 0.5) / 0.25)
        return torch.cat([before.mean((2, 3)), self.levels[-1](before).mean((2, 3))], dim=1)

    def forward(self, x):
        return self.head(self.features(x)[:, -self.head.in_features:])


VICTIM = Victim(RotNet, rotation_scores, probed=True,      # a batch is in all four turns
                training=dict(epochs=8, batch_size=32, lr=0.1, optimizer="sgd"))
PROTECTION = Protection(min_min, "rotation", settings=dict(
    shared="all", rounds=30, noise_batches=10, batch_size=32))


def register():
    """Let the options --victim and --protections name them."""
    VICTIMS["rotation"] = VICTIM
    PROTECTIONS["rot"] = PROTECTION


def main(argv=None):
    register()
    given = sys.argv if argv is None else list(argv)       # a command may use all cores
    if not any(word.partition("=")[0] == "--protections" for word in given):
        given += ["--protections", "rot"]
    train.main(argv and given)


if __name__ == "__main__":
    main()
