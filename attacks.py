"""Protections: imperceptible noise that makes published images unlearnable, and the augmentations it has to survive.

Error-minimizing noise (Huang et al. 2021, "Unlearnable Examples", arXiv 2101.04898) makes the training loss so small that nothing
is left to learn: the network finds the noise, which says the class, before it finds the picture.
Images here are in [0, 1], (B, 3, H, W); perturbations are in the same unit, at most epsilon in every channel.
"""
import math
from itertools import islice

import torch
import torch.nn.functional as F

EPSILON = 8 / 255


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation. A crop and a flip pick rows and columns, so each is a pair of matrices: view = rows @ image @ columns^T.
# That is differentiable, batched, and zero outside the image.

def resample(x, rows, columns):
    """rows (B, h, H) and columns (B, w, W) applied to every channel of x (B, C, H, W) -> (B, C, h, w)."""
    return rows[:, None] @ x @ columns[:, None].mT


def crop_flip(x, generator, pad=4):
    """Random crop of the zero-padded image and random horizontal flip, drawn per image: (B, C, H, W) -> same.

    The augmentation of nearly every CIFAR classifier. `generator` is a CPU torch.Generator.
    """
    n, _, h, w = x.shape
    down, right = torch.randint(-pad, pad + 1, (2, n, 1, 1), generator=generator)
    flip = torch.rand(n, 1, 1, generator=generator) < 0.5
    i, j = torch.arange(h), torch.arange(w)
    rows = i[:, None] + down == i                          # (B, h, H): output row i shows input row i + down
    columns = torch.where(flip, w - 1 - j[:, None], j[:, None]) + right == j
    return resample(x, rows.to(x), columns.to(x))


# ---------------------------------------------------------------------------------------------------------------------
# Publishing

def publish(images, perturbation):
    """The unlearnable examples: images + perturbation, clipped to [0, 1] and rounded to 8 bits.

    Rounding cannot push a pixel further than epsilon from an 8-bit original when epsilon is a multiple of 1/255.
    """
    return (images + perturbation).clamp(0, 1).mul(255).round().div(255)


# ---------------------------------------------------------------------------------------------------------------------
# Error-minimizing noise

def noise_step(model, images, labels, perturbation, rows, velocity, step, epsilon, momentum, augment):
    """One signed-gradient descent step on the perturbation of these images, weights fixed (Huang et al. 2021, Eq. 3), in place.

    rows (B,) names the entry of `perturbation` (R, 3, H, W) that each image wears; images that share one add up their gradients.
    With momentum, `velocity` (R, 3, H, W) averages the normalised gradient over crops and over surrogates (Dong et al. 2018):
    one crop's gradient alone is mostly noise, and its sign makes that noise as large as the signal.
    """
    used, wearer = rows.unique(return_inverse=True)
    delta = perturbation[used].requires_grad_()
    loss = F.cross_entropy(model(augment((images + delta[wearer]).clamp(0, 1))), labels)
    gradient, = torch.autograd.grad(loss, delta)
    velocity[used] = momentum * velocity[used] + gradient / gradient.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-12)
    perturbation[used] = (delta.detach() - step * velocity[used].sign()).clamp(-epsilon, epsilon)


def error_minimizing(model, images, labels, rows, perturbation, *, rounds, train_batches=10, noise_batches=None, noise_steps=1,
                     step=EPSILON / 5, epsilon=EPSILON, momentum=0.0, lr=0.1, batch_size=128, stop_accuracy=0.99,
                     augment=lambda x: x, generator=None, report=lambda done, total, **values: None):
    """Error-minimizing noise: min over the noise of min over the weights of the training loss (Huang et al. 2021, Eq. 2).

    model         surrogate classifier of images in [0, 1], trained in place; a continued one may be given
    images        (N, 3, H, W) in [0, 1], labels (N,) integers
    rows          (N,) the perturbation each image wears: `labels` makes noise class-wise, `torch.arange(N)` sample-wise
    perturbation  (R, 3, H, W) start, at most epsilon; not changed
    Each round trains the surrogate on `train_batches` of published images, then, its weights frozen and in evaluation mode, takes
    `noise_steps` signed-gradient steps of size `step` on each of `noise_batches` (default: one pass over all the images).
    Ends at `stop_accuracy` of the surrogate on its training batches, or after `rounds`.
    Returns the perturbation (R, 3, H, W) and the surrogate's accuracy in each round.
    Raises ValueError when shapes disagree or the start is larger than epsilon.
    """
    if len(rows) != len(images) or len(labels) != len(images) or rows.max() >= len(perturbation):
        raise ValueError(f"{len(images)} images need as many labels and rows below {len(perturbation)}")
    if perturbation.abs().max() > epsilon + 1e-6:
        raise ValueError(f"the start is {perturbation.abs().max():.4f} at its largest, more than epsilon = {epsilon:.4f}")

    def batches():
        while True:
            yield from torch.randperm(len(images), generator=generator).to(images.device).split(batch_size)

    stream, perturbation, velocity, history = batches(), perturbation.clone(), torch.zeros_like(perturbation), []
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    for done in range(1, rounds + 1):
        model.train()
        right = seen = 0
        for b in islice(stream, train_batches):            # min over the weights
            scores = model(augment((images[b] + perturbation[rows[b]]).clamp(0, 1)))
            optimizer.zero_grad()
            F.cross_entropy(scores, labels[b]).backward()
            optimizer.step()
            right, seen = right + (scores.argmax(1) == labels[b]).sum(), seen + len(b)
        model.eval().requires_grad_(False)
        for b in islice(batches(), noise_batches or math.ceil(len(images) / batch_size)):  # min over the noise
            for _ in range(noise_steps):
                noise_step(model, images[b], labels[b], perturbation, rows[b], velocity, step, epsilon, momentum, augment)
        model.requires_grad_(True)
        history.append(float(right) / seen)
        report(done, rounds, accuracy=history[-1])
        if history[-1] >= stop_accuracy:
            break
    return perturbation, history
