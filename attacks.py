"""Protections: imperceptible noise that makes published images unlearnable.

Error-minimizing noise (Huang et al. 2021, "Unlearnable Examples", arXiv 2101.04898) makes the
training loss so small that nothing is left to learn: the network finds the noise, which says the
class, before it finds the picture. Contrastive poisoning (He et al. 2023, "Indiscriminate Poisoning
Attacks on Unsupervised Contrastive Learning", arXiv 2202.11202) does the same to networks that
learn without labels: the noise says which two views are of one image. Both are one alternation,
`min_min`, over two losses. Reading order: min_min -> noise_step -> class_scores, partner_scores ->
PROTECTIONS; above them the views of an image that the noise has to survive.
Images are in [0, 1], (B, 3, H, W); random choices are drawn per image from a CPU torch.Generator.
"""
import math
from dataclasses import dataclass, field
from itertools import islice
from typing import Callable

import torch
import torch.nn.functional as F

EPSILON = 8 / 255

# -- Views: place ----------------------------------------------------------------------------------
# Crops, resizes and flips pick and blend rows and columns, so each is a pair of matrices: view =
# rows @ image @ columns^T. That is differentiable, and zero outside the image.

def resample(x, rows, columns):
    """rows (B, h, H) and columns (B, w, W) applied to images (B, C, H, W) -> (B, C, h, w)."""
    return rows[:, None] @ x @ columns[:, None].mT


def bilinear(start, length, n_in, n_out):
    """Matrices (B, n_out, n_in) that stretch pixels start (B,) .. start + length over n_out pixels,
    as Pillow's BILINEAR: by triangles as wide as two pixels of the input, or of a smaller output.
    Where start is whole and length is n_out, they cut a window."""
    scale = torch.as_tensor(length / n_out).view(-1, 1, 1)
    centre = start.view(-1, 1, 1) + (torch.arange(n_out)[:, None] + 0.5) * scale
    distance = (torch.arange(n_in) + 0.5 - centre).abs()
    weight = (1 - distance / scale.clamp_min(1)).clamp_min(0)
    return weight / weight.sum(-1, keepdim=True).clamp_min(1e-6)


def flip_half(columns, generator):
    """The matrices, half of them with their rows in reverse order: a random horizontal flip."""
    flipped = torch.rand(len(columns), 1, 1, generator=generator) < 0.5
    return torch.where(flipped, columns.flip(1), columns)


def crop_flip(x, generator, pad=4):
    """Random crop of the zero-padded image and random flip, as in nearly every CIFAR classifier:
    (B, C, H, W) -> same."""
    n, _, h, w = x.shape
    top, left = torch.randint(-pad, pad + 1, (2, n), generator=generator)
    columns = flip_half(bilinear(left, w, w, w), generator)
    return resample(x, bilinear(top, h, h, h).to(x), columns.to(x))


def quadrant_view(x, generator, jitter=2):
    """One of the four quadrants, moved by up to `jitter` pixels, flipped half of the time, and each
    channel less its mean: (B, C, H, W) -> (B, C, H / 2, W / 2), around 0.5.

    Two views of one of our shapes share the class and nothing else.
    """
    n, _, h, w = x.shape
    down, right = torch.randint(2, (2, n), generator=generator)
    moves = torch.randint(-jitter, jitter + 1, (2, n), generator=generator)
    top = (down * (h // 2) + moves[0]).clamp(0, h - h // 2)
    left = (right * (w // 2) + moves[1]).clamp(0, w - w // 2)
    columns = flip_half(bilinear(left, w // 2, w, w // 2), generator)
    view = resample(x, bilinear(top, h // 2, h, h // 2).to(x), columns.to(x))
    return view - view.mean((2, 3), keepdim=True) + 0.5


def random_resized_crop(x, generator, size, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)):
    """A random box of `scale` of the area and aspect `ratio`, resized, and flipped half of the time.

    (B, C, H, W) -> (B, C, size, size) (Szegedy et al. 2015). A box too long for the image is cut.
    """
    n, _, h, w = x.shape
    area, aspect, top, left = torch.rand(4, n, generator=generator)
    area = h * w * (scale[0] + (scale[1] - scale[0]) * area)
    aspect = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * aspect)
    height = (area / aspect).sqrt().clamp_max(h)
    width = (area * aspect).sqrt().clamp_max(w)
    rows = bilinear(top * (h - height), height, h, size)
    columns = flip_half(bilinear(left * (w - width), width, w, size), generator)
    return resample(x, rows.to(x), columns.to(x))


# -- Views: colour ---------------------------------------------------------------------------------
# Factors are (B, 1, 1, 1); what leaves [0, 1] is clipped, as in Pillow.

def blend(x, other, factor):
    """`other` at factor 0, x at 1, beyond x above."""
    return (other + factor * (x - other)).clamp(0, 1)


def luma(x):
    """Grey value (B, 1, H, W) of an image, ITU-R 601 as in Pillow's mode L."""
    weights = x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    return (x * weights).sum(1, keepdim=True)


def brightness(x, factor):
    return blend(x, torch.zeros_like(x), factor)


def contrast(x, factor):
    return blend(x, luma(x).mean((2, 3), keepdim=True), factor)


def saturation(x, factor):
    return blend(x, luma(x), factor)


def hue(x, shift):
    """Turn the hue by `shift` of a full circle, value and saturation kept (the HSV hexagon)."""
    value = x.amax(1, keepdim=True)
    r, g, b = x.split(1, dim=1)
    chroma = value - x.amin(1, keepdim=True)
    is_red, is_green = value == r, value == g
    sector = torch.where(is_red, g - b, torch.where(is_green, b - r, r - g))
    sector = sector / chroma.clamp_min(1e-6)               # a grey pixel has no hue
    sector = sector + torch.where(is_red, 0, torch.where(is_green, 2, 4)) + 6 * shift
    k = (sector + x.new_tensor([5.0, 3.0, 1.0]).view(3, 1, 1)) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def colour_jitter(x, generator, strength=(0.4, 0.4, 0.4, 0.1), p=0.8):
    """Brightness, contrast, saturation times 1 +- strength and hue turned by it, for p of the images,
    in an order that is new for each batch."""
    used = torch.rand(len(x), 1, 1, 1, generator=generator) < p
    changes = 2 * torch.rand(4, len(x), 1, 1, 1, generator=generator) - 1
    steps = (brightness, contrast, saturation, hue)
    for i in torch.randperm(4, generator=generator).tolist():
        change = used * strength[i] * changes[i]
        factor = change if steps[i] is hue else 1 + change
        x = steps[i](x, factor.to(x))
    return x


def grayscale(x, generator, p=0.2):
    """p of the images without their colours."""
    grey = torch.rand(len(x), 1, 1, 1, generator=generator) < p
    return torch.where(grey.to(x.device), luma(x), x)


def simclr_view(x, generator):
    """The view of Chen et al. 2020 for CIFAR: random resized crop, flip, colour jitter, grayscale."""
    cropped = random_resized_crop(x, generator, x.shape[-1])
    return grayscale(colour_jitter(cropped, generator), generator)


VIEWS = {"quadrant": quadrant_view, "simclr": simclr_view}


# -- What a victim learns --------------------------------------------------------------------------
# Both losses are the cross-entropy of a choice, so each is a function (net, images, labels,
# generator) -> scores (M, choices) and the right answers (M,).

def class_scores(net, x, labels, generator):
    """Which class? The choice that a classifier learns, and error-minimizing noise makes easy."""
    return net(crop_flip(x, generator)), labels


def nt_xent_scores(z, temperature=0.5):
    """SimCLR's loss as a choice: which of all other views shows the same image (Chen, Eq. 1)?

    z (2B, D): embeddings of B images' first views, then of their second. Returns the scores
    (2B, 2B), cosines over the temperature with a view's own at -inf, and the index of each view's
    partner (2B,). The mean cross-entropy of the two is NT-Xent (Chen et al. 2020).
    """
    z = F.normalize(z, dim=1)
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    scores = (z @ z.T / temperature).masked_fill(own, -math.inf)
    return scores, torch.arange(len(z), device=z.device).roll(len(z) // 2)


def partner_scores(net, x, labels, generator, view=simclr_view, temperature=0.5):
    """Which two views are of one image? What SimCLR learns, and contrastive poisoning makes easy."""
    views = torch.cat([view(x, generator), view(x, generator)])
    return nt_xent_scores(net(views), temperature)


@dataclass(frozen=True)
class Victim:
    """Who trains on published images, and before that the owner's surrogate for him."""
    network: Callable              # network(seed) -> a fresh one, on the device
    scores_and_answers: Callable   # what it learns: class_scores or partner_scores


# -- Protections -----------------------------------------------------------------------------------
# A function (images (N, 3, H, W) in [0, 1], labels (N,), victim, *, epsilon, seed, report, ...)
# -> unlearnable examples of the same shape.

def publish(images, perturbation):
    """The unlearnable examples: images + perturbation, clipped to [0, 1] and rounded to 8 bits,
    which cannot push a pixel beyond an epsilon that is a multiple of 1/255."""
    return (images + perturbation).clamp(0, 1).mul(255).round().div(255)


def noise_step(perturbation, gradient, step, epsilon):
    """One signed-gradient descent step within epsilon (Huang et al. 2021, Eq. 3)."""
    return (perturbation - step * gradient.sign()).clamp(-epsilon, epsilon)


def batches(n, size, generator):
    """Batches of 0..n-1 without end, each pass in a new order."""
    while True:
        yield from torch.randperm(n, generator=generator).split(size)


def train_surrogate(net, victim, images, labels, perturbation, rows, stream, optimizer, generator):
    """min over the weights: a step for each batch of images + perturbation. Returns the accuracy."""
    right = total = 0
    net.train().requires_grad_(True)
    for b in stream:
        x = (images[b] + perturbation[rows[b]]).clamp(0, 1)
        scores, answers = victim.scores_and_answers(net, x, labels[b], generator)
        optimizer.zero_grad()
        F.cross_entropy(scores, answers).backward()
        optimizer.step()
        right += (scores.argmax(1) == answers).sum()
        total += len(answers)
    net.eval().requires_grad_(False)
    return right / total


def noise_gradient(net, victim, images, labels, perturbation, wearer, generator):
    """Gradient of the loss for the perturbation (R, 3, H, W), the weights fixed.

    Image i wears perturbation[wearer[i]]; those that share one add up their gradients.
    """
    delta = perturbation.detach().requires_grad_()
    x = (images + delta[wearer]).clamp(0, 1)
    loss = F.cross_entropy(*victim.scores_and_answers(net, x, labels, generator))
    return torch.autograd.grad(loss, delta)[0]


def min_min(images, labels, victim, *, class_wise=False, start=None, surrogates=1, rounds=10,
            train_batches=10, noise_batches=None, noise_steps=1, step=0.2, momentum=0.9, lr=0.1,
            batch_size=128, warm_up=0, epsilon=EPSILON, seed=0, report=None):
    """Noise that leaves nothing to learn: min over the noise of min over the weights of the loss.

    (Huang et al. 2021, Eq. 2; with the loss of SimCLR, He et al. 2023.)
    class_wise     one perturbation for each class (True) or for each image
    start          UEs (N, 3, H, W) whose perturbation to begin with; default: uniform noise
    surrogates     networks, one after the other, that start afresh. A victim is lost in its first
                   epochs, so the noise must be read by a young network before the picture is
    rounds         of each surrogate: `train_batches` that train it, then `noise_batches` (default:
                   all images) with `noise_steps` steps on each, its weights frozen
    step           of the noise at first, in epsilons; it falls to 0
    momentum       of its gradient, normalised (Dong et al. 2018): one crop's is mostly noise
    batch_size     in a large batch many images of a class add up their gradients
    warm_up        more training batches for a surrogate before its first noise step
    Returns UEs, at most epsilon away from the images, and rounded to 8 bits.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = labels.cpu() if class_wise else torch.arange(len(images))
    shape = (int(rows.max()) + 1, *images.shape[1:])
    perturbation = torch.empty(shape).uniform_(-epsilon, epsilon, generator=generator)
    perturbation = perturbation.to(images.device)
    if start is not None:
        perturbation[rows] = start - images
    velocity = torch.zeros_like(perturbation)
    training = batches(len(images), batch_size, generator)
    every = math.ceil(len(images) / batch_size)
    total = surrogates * rounds
    for done in range(total):
        stream = islice(training, train_batches)
        if done % rounds == 0:                             # a surrogate starts afresh
            net = victim.network(seed + 1000 + done)       # not the victim's initialisation
            optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=5e-4)
            stream = islice(training, warm_up + train_batches)
        accuracy = train_surrogate(net, victim, images, labels, perturbation, rows, stream,
                                   optimizer, generator)
        size = step * epsilon * (1 - done / total)
        for b in islice(batches(len(images), batch_size, generator), noise_batches or every):
            used, wearer = rows[b].unique(return_inverse=True)
            for _ in range(noise_steps):
                gradient = noise_gradient(net, victim, images[b], labels[b], perturbation[used],
                                          wearer, generator)
                length = gradient.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-12)
                velocity[used] = momentum * velocity[used] + gradient / length
                perturbation[used] = noise_step(perturbation[used], velocity[used], size, epsilon)
        if report:
            report(done + 1, total, accuracy=accuracy)
    return publish(images, perturbation[rows])


@dataclass(frozen=True)
class Protection:
    """An entry of PROTECTIONS: the function, whom it is to fool, and its settings."""
    make: Callable
    victim: str = "classifier"     # or "simclr": who judges it, and who `make` is given
    start: str = ""                # the protection whose UEs are given to it as `start`
    settings: dict = field(default_factory=dict)


# Sample-wise noise starts from the class-wise, as in He et al. 2023
PROTECTIONS = {
    "em-class": Protection(min_min, settings=dict(class_wise=True, rounds=40, noise_batches=10)),
    "em-sample": Protection(min_min, start="em-class", settings=dict(noise_steps=2, lr=0.2,
                                                                      warm_up=200)),
    "cp-class": Protection(min_min, "simclr", settings=dict(
        class_wise=True, surrogates=7, rounds=10, train_batches=16, noise_batches=8, step=0.15,
        batch_size=384)),
    "cp-sample": Protection(min_min, "simclr", start="cp-class", settings=dict(
        surrogates=3, rounds=5, train_batches=30, noise_steps=2, step=1.0, batch_size=256))}
