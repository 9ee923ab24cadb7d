"""What `python -m studies.guessed` makes of images, and of what a victim or a purifier sees.

Only attacks and le are imported, so that what these make is kept when the rest changes.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from attacks import Protection, publish
from le import Sampler


# -- Images ----------------------------------------------------------------------------------------

def unprotected(images, labels, victim, *, epsilon, seed, report):
    """No protection: the images, as 8 bits."""
    return publish(images, torch.zeros_like(images))


NONE = Protection(unprotected)


def share_left(before, after):
    """The share of a perturbation `before` that is in `after`: their product over its square."""
    product = (before * after).sum()
    return (product / before.square().sum()).item()


def less_class_means(images, labels, others, other_labels, most):
    """Images (N, 3, H, W) less what the mean of their class, over its first `most` images, has more
    than that of as many other images of the class, or fewer; as 8 bits."""
    change = torch.zeros_like(images)
    for k in labels.unique():
        own = labels == k
        theirs = others[other_labels == k][:most]
        if len(theirs):
            mean = images[own][:most].mean(0)
            change[own] = theirs.mean(0) - mean
    return publish(images, change)


def mixtures(images, first, second):
    """{what images bear: UEs} of two perturbations (N, 3, H, W): each on every other image, or both
    on all."""
    every_other = torch.arange(len(images)) % 2 == 0
    taking_turns = torch.where(every_other.view(-1, 1, 1, 1), first, second)
    return {
        "half and half": publish(images, taking_turns),
        "both, half of each": publish(images, (first + second) / 2),
        "both": publish(images, first + second)}


# -- What a victim sees ----------------------------------------------------------------------------

def scores_of_a_draw(net, x, labels, generator, scores):
    """What a victim learns, `scores`, of one of the draws that stand in the channels of x (B, 3 n,
    H, W): another one of each image whenever it is seen."""
    draws = x.unflatten(1, (-1, 3))                        # (B, n, 3, H, W)
    chosen = torch.randint(draws.shape[1], (len(x),), generator=generator)
    places = torch.arange(len(x))
    return scores(net, draws[places, chosen], labels, generator)


# -- What a purifier sees --------------------------------------------------------------------------

@dataclass(frozen=True)
class DetailSampler(Sampler):
    """A sampler whose distances see what is not smooth: grey values less their means over squares
    of `smooth` pixels a side."""
    smooth: int = 4

    def seen(self, x):
        grey = x.mean(1, keepdim=True)
        means = F.avg_pool2d(grey, self.smooth)
        means = means.repeat_interleave(self.smooth, 2)
        means = means.repeat_interleave(self.smooth, 3)
        return (grey - means).expand_as(x)
