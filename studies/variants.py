"""What `python -m studies.guessed` makes of images, and of what a victim or a purifier sees.

Only attacks, le and unet are imported, so that what these make is kept when the rest changes.
"""
import torch
import torch.nn.functional as F

import le
from attacks import Protection, publish
from unet import as_bytes, as_float, posterior, predict_x0, q_sample, visited_levels


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

def detail(x, smooth):
    """Grey values of images (B, 3, H, W), as three channels, less their means over squares of
    `smooth` pixels a side; of grey values as they are for 0."""
    grey = x.mean(1, keepdim=True)
    grey = grey.expand_as(x)
    if not smooth:
        return grey
    means = F.avg_pool2d(grey, smooth)
    means = means.repeat_interleave(smooth, 2)
    means = means.repeat_interleave(smooth, 3)
    return grey - means


def normal_like(x, noises):
    """Normal noise for each of the images x, by a generator of its own."""
    drawn = [torch.randn(x.shape[1:], generator=noise) for noise in noises]
    return torch.stack(drawn).to(x)


@torch.no_grad()
def by_detail(net, distance, images, sampler, seeds, report=None, smooth=4):
    """A purifier like `le.purify`, whose pixel distance, the only one, sees `detail`. This is a
    projection, so that the gradient of its square is twice itself."""
    visited = visited_levels(sampler.t_star, sampler.steps)
    device = next(net.parameters()).device
    made = []
    for i in range(0, len(images), le.BATCH):
        y = 2 * images[i:i + le.BATCH].to(device) - 1
        noises = [torch.Generator().manual_seed(seed) for seed in seeds[i:i + le.BATCH]]
        weight = 2 * sampler.pixel_weight / y[0].numel()
        xt = y
        for _ in range(sampler.rounds):
            xt = q_sample(xt, sampler.t_star, normal_like(y, noises))
            for t, s in zip(visited, visited[1:]):
                x0 = predict_x0(xt, t, net(xt, t))
                x0 = x0.clamp(-1, 1)
                mean, var = posterior(x0, xt, t, s)
                if s > 0:                                  # the last stride has no variance
                    gradient = weight * detail(x0 - y, smooth)
                    mean = le.joint_conditioned_mean(mean, var, t, gradient)
                xt = mean + var.sqrt() * normal_like(y, noises)
        made.append(as_float(as_bytes(xt / 2 + 0.5)).to(images))
        if report:
            report(i + len(y), len(images))
    return torch.cat(made)
