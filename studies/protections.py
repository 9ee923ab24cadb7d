"""Protections for which nothing was tuned: `python -m studies.scenarios others`, or `mend`.

Each has the signature of an entry of `attacks.PROTECTIONS`: (images (N, 3, H, W) in [0, 1], labels
(N,), victim, *, epsilon, seed, report) -> unlearnable examples of the same shape.
"""
import math
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from attacks import (PROTECTIONS, Protection, min_min, noise_gradient, noise_step, publish,
                     simclr_view, train_surrogate)


def patches(images, labels, victim, *, epsilon, seed, report, size=8, spread=0.25):
    """Linearly separable patches, LSP (Yu et al. 2022, "Availability Attacks Create Shortcuts").

    Points around a random corner of a cube for each class, one coordinate a patch and channel, so
    that a linear classifier tells the classes apart: each patch has one colour, within epsilon.
    """
    generator = torch.Generator().manual_seed(seed)
    pixels = images.shape[-1]
    side = math.ceil(pixels / size)
    classes = int(labels.max()) + 1
    corners = torch.randint(0, 2, (classes, 3, side, side), generator=generator)
    points = 2.0 * corners[labels.cpu()] - 1
    points = points + spread * torch.randn(points.shape, generator=generator)
    colours = points.clamp(-1, 1).repeat_interleave(size, 2).repeat_interleave(size, 3)
    report(len(images), len(images))
    return publish(images, epsilon * colours[..., :pixels, :pixels].to(images))


def one_pixel(images, labels, victim, *, epsilon, seed, report):
    """One-pixel shortcut, OPS (Wu et al. 2023): one pixel of each class has one colour, in all its
    images: the change whose mean is largest for its variance over the class. No place is used
    twice, and epsilon does not bound the change.
    """
    ue = images.clone()
    taken = torch.zeros(images.shape[2:], dtype=torch.bool, device=images.device)
    level = torch.tensor([0.0, 1.0])
    colours = torch.cartesian_prod(level, level, level).to(images)
    classes = labels.unique()
    for k in classes:
        own = images[labels == k]
        gains = []
        for colour in colours:
            change = (own - colour.view(3, 1, 1)).abs().sum(1)
            gain = change.mean(0) / change.var(0, correction=0).clamp_min(1e-6)
            gains.append(gain.masked_fill(taken, 0))
        best = torch.stack(gains).flatten().argmax().item()
        colour, place = divmod(best, taken.numel())
        row, column = divmod(place, images.shape[3])
        taken[row, column] = True
        ue[labels == k, :, row, column] = colours[colour]
        report(int(k) + 1, len(classes))
    return publish(ue, 0)


def targeted(images, labels, victim, *, epsilon, seed, report, batches, steps, step=0.1,
             batch_size=128):
    """Targeted adversarial poisons, TAP (Fowl et al. 2021, "Adversarial Examples Make Strong
    Poisons"): noise that a network trained on clean images takes for the third class after theirs.
    """
    generator = torch.Generator().manual_seed(seed)
    perturbation = torch.zeros_like(images)
    rows = torch.arange(len(images))
    net = victim.fresh(seed + 1000).to(images.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    train_surrogate(net, optimizer, victim, images, labels, perturbation, rows, batches, batch_size,
                    generator)
    targets = (labels + 3) % (int(labels.max()) + 1)
    for b in rows.split(batch_size):
        for _ in range(steps):
            gradient = noise_gradient(net, victim, images[b], targets[b], perturbation[b],
                                      torch.arange(len(b)), generator)
            perturbation[b] = noise_step(perturbation[b], gradient, step * epsilon, epsilon)
        report(int(b[-1]) + 1, len(images))
    return publish(images, perturbation)


def augmented_scores(net, x, labels, generator, view):
    """Which class? Asked of the views that contrastive learning compares."""
    return net(view(x, generator)), labels


def augmented(images, labels, victim, *, view=simclr_view, **how):
    """Augmented unlearnable examples, AUE (Wang et al. 2024): error-minimizing noise made under the
    augmentations of contrastive learning, meant for both kinds of victim.
    """
    scores = partial(augmented_scores, view=view)
    return min_min(images, labels, replace(victim, scores_and_answers=scores), **how)


def convolved(images, labels, victim, *, epsilon, seed, report, blur=0.3):
    """Convolution-based unlearnability, CUDA (Sadasivan et al. 2023): a random 3x3 filter for each
    class, one weight 1 and the others at most `blur`, after which an image is divided by its
    maximum. Epsilon does not bound the change.
    """
    generator = torch.Generator().manual_seed(seed)
    ue = images.clone()
    classes = labels.unique()
    for k in classes:
        weights = blur * torch.rand(9, generator=generator)
        weights[torch.randint(9, (1,), generator=generator)] = 1.0  # anywhere, as in their code
        of_each_channel = weights.view(1, 1, 3, 3).repeat(3, 1, 1, 1).to(images)
        own = F.conv2d(images[labels == k], of_each_channel, padding=1, groups=3)
        ue[labels == k] = own / own.amax((1, 2, 3), keepdim=True).clamp_min(1e-6)
        report(int(k) + 1, len(classes))
    return publish(ue, 0)


OTHERS = {
    "patches": Protection(patches),
    "one-pixel": Protection(one_pixel),
    "targeted": Protection(targeted, settings=dict(batches=500, steps=30)),
    "augmented": Protection(augmented, settings=dict(
        shared="class", rounds=40, noise_batches=10)),
    "convolved": Protection(convolved)}


def register():
    """Let the options --protections and --noise name them."""
    PROTECTIONS.update(OTHERS)
