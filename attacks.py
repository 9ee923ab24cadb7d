"""Protections: imperceptible noise that makes published images unlearnable, and the augmentations it has to survive.

Error-minimizing noise (Huang et al. 2021, "Unlearnable Examples", arXiv 2101.04898) makes the training loss so small that nothing
is left to learn: the network finds the noise, which says the class, before it finds the picture. Contrastive poisoning (He et al. 2023,
"Indiscriminate Poisoning Attacks on Unsupervised Contrastive Learning", arXiv 2202.11202) does the same to networks that learn
without labels: the noise says which two views are of one image. Both are one alternation, `min_min`, over two losses.
Images here are in [0, 1], (B, 3, H, W); perturbations are in the same unit, at most epsilon in every channel.
Random choices are drawn per image from `generator`, a CPU torch.Generator.
"""
import math
from itertools import islice

import torch
import torch.nn.functional as F

EPSILON = 8 / 255


def to(device, *tensors):
    """The tensors on the device, without waiting for a GPU to finish what it has in its queue."""
    return [tensor.to(device, non_blocking=True) for tensor in tensors]


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation: place. Crops, resizes and flips pick and blend rows and columns, so each is a pair of matrices:
# view = rows @ image @ columns^T. That is differentiable, batched, and zero outside the image.

def resample(x, rows, columns):
    """rows (B, h, H) and columns (B, w, W) applied to every channel of x (B, C, H, W) -> (B, C, h, w)."""
    return rows[:, None] @ x @ columns[:, None].mT


def flip_half(columns, generator):
    """Reverse the order of the output columns (B, w, W) for half of the images: a random horizontal flip."""
    flipped, = to(columns.device, torch.rand(len(columns), 1, 1, generator=generator) < 0.5)
    return torch.where(flipped, columns.flip(1), columns)


def crop_flip(x, generator, pad=4):
    """Random crop of the zero-padded image and random horizontal flip: (B, C, H, W) -> same. What nearly every CIFAR classifier does."""
    n, _, h, w = x.shape
    down, right = to(x.device, *torch.randint(-pad, pad + 1, (2, n, 1, 1), generator=generator))
    i, j = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
    rows = i[:, None] + down == i                          # (B, h, H): output row i shows input row i + down
    columns = flip_half(j[:, None] + right == j, generator)
    return resample(x, rows.to(x), columns.to(x))


def bilinear(start, length, n_in, n_out):
    """Matrices (B, n_out, n_in) that stretch pixels start .. start + length (both (B,)) of a line over n_out pixels, as Pillow's BILINEAR does.

    A triangle as wide as two input pixels, or two output pixels where it shrinks, around the centre of each output pixel.
    """
    scale = (length / n_out).view(-1, 1, 1)
    place = lambda n: torch.arange(n, device=start.device) + 0.5
    centre = start.view(-1, 1, 1) + place(n_out)[:, None] * scale
    weight = (1 - (place(n_in) - centre).abs() / scale.clamp_min(1)).clamp_min(0)
    return weight / weight.sum(-1, keepdim=True)


def random_resized_crop(x, generator, size, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)):
    """A random box of `scale` of the area and aspect `ratio` (Szegedy et al. 2015), resized, and flipped half of the time.

    (B, C, H, W) -> (B, C, size, size). A box that is too long for the image is shortened to it.
    """
    n, _, h, w = x.shape
    area, aspect, top, left = to(x.device, *torch.rand(4, n, generator=generator))
    area = h * w * (scale[0] + (scale[1] - scale[0]) * area)
    aspect = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * aspect)
    height, width = (area / aspect).sqrt().clamp_max(h), (area * aspect).sqrt().clamp_max(w)
    rows = bilinear(top * (h - height), height, h, size)
    columns = flip_half(bilinear(left * (w - width), width, w, size), generator)
    return resample(x, rows.to(x), columns.to(x))


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation: colour. Factors are (B, 1, 1, 1); what leaves [0, 1] is clipped, as in Pillow.

def blend(x, other, factor):
    """`other` at factor 0, x at 1, beyond x above."""
    return (other + factor * (x - other)).clamp(0, 1)


def luma(x):
    """Grey value (B, 1, H, W) of an image, ITU-R 601 as in Pillow's mode L."""
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)


def brightness(x, factor):
    return blend(x, torch.zeros_like(x), factor)


def contrast(x, factor):
    return blend(x, luma(x).mean((2, 3), keepdim=True), factor)


def saturation(x, factor):
    return blend(x, luma(x), factor)


def hue(x, shift):
    """Turn the hue by `shift` of a full circle, value and saturation kept (the HSV hexagon)."""
    value, (r, g, b) = x.amax(1, keepdim=True), x.split(1, dim=1)
    chroma = value - x.amin(1, keepdim=True)
    sector = torch.where(value == r, g - b, torch.where(value == g, b - r, r - g)) / chroma.clamp_min(1e-6)  # a grey pixel has no hue
    sector = sector + torch.where(value == r, 0, torch.where(value == g, 2, 4)) + 6 * shift
    k = (sector + x.new_tensor([5.0, 3.0, 1.0]).view(3, 1, 1)) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def colour_jitter(x, generator, strength=(0.4, 0.4, 0.4, 0.1), p=0.8):
    """Brightness, contrast and saturation times 1 +- strength, hue turned by +- strength, for p of the images; a new order each batch."""
    n, (b, c, s, h) = len(x), strength
    used = torch.rand(n, 1, 1, 1, generator=generator) < p
    draw = lambda s: to(x, used * s * (2 * torch.rand(n, 1, 1, 1, generator=generator) - 1))[0]
    steps = [(brightness, 1 + draw(b)), (contrast, 1 + draw(c)), (saturation, 1 + draw(s)), (hue, draw(h))]
    for i in torch.randperm(4, generator=generator).tolist():
        x = steps[i][0](x, steps[i][1])
    return x


def grayscale(x, generator, p=0.2):
    """p of the images without their colours."""
    grey, = to(x.device, torch.rand(len(x), 1, 1, 1, generator=generator) < p)
    return torch.where(grey, luma(x), x)


def mix_colours(x, generator, strength=(0.5, 2.0)):
    """A random linear map of the colours around their mean, times a random contrast: what is left of an image is its outlines.

    Around 0.5, and not clipped: mixing can turn a dark shape on light ground into any other pair of colours.
    """
    n = len(x)
    low, high = (math.log(s) for s in strength)
    mixing = torch.randn(n, 3, 3, generator=generator) / 3 ** 0.5 * torch.exp(low + (high - low) * torch.rand(n, 1, 1, generator=generator))
    return 0.5 + torch.einsum("bij,bjhw->bihw", *to(x, mixing), x - x.mean((2, 3), keepdim=True))


def simclr_view(x, generator):
    """The view of Chen et al. 2020 for CIFAR: random resized crop and flip, colour jitter, grayscale."""
    return grayscale(colour_jitter(random_resized_crop(x, generator, x.shape[-1]), generator), generator)


def outline_view(x, generator):
    """A view for images whose colours say which image it is: smaller (20 of 32 pixels, for speed) and with its colours mixed."""
    return mix_colours(random_resized_crop(x, generator, x.shape[-1] * 5 // 8), generator)


VIEWS = {"simclr": simclr_view, "outline": outline_view}


# ---------------------------------------------------------------------------------------------------------------------
# Publishing

def publish(images, perturbation):
    """The unlearnable examples: images + perturbation, clipped to [0, 1] and rounded to 8 bits.

    Rounding cannot push a pixel further than epsilon from an 8-bit original when epsilon is a multiple of 1/255.
    """
    return (images + perturbation).clamp(0, 1).mul(255).round().div(255)


# ---------------------------------------------------------------------------------------------------------------------
# min over the noise of min over the weights. Both losses are the cross-entropy of a choice, so a protection is defined by
# `choose(x, b)`: the published images x of the batch b (indices) -> scores (M, choices) and which choice is right (M,).

def noise_step(choose, images, b, perturbation, rows, velocity, step, epsilon, momentum):
    """One signed-gradient descent step on the perturbation of the images b, weights fixed (Huang et al. 2021, Eq. 3), in place.

    b (B,) and rows (N,) are on the CPU; rows names the entry of `perturbation` (R, 3, H, W) that each image wears; images that share one add up their gradients.
    With momentum, `velocity` (R, 3, H, W) averages the normalised gradient over crops and over surrogates (Dong et al. 2018):
    one crop's gradient alone is mostly noise, and its sign makes that noise as large as the signal.
    """
    b, used, wearer = to(images.device, b, *rows[b].unique(return_inverse=True))
    delta = perturbation[used].requires_grad_()
    loss = F.cross_entropy(*choose((images[b] + delta[wearer]).clamp(0, 1), b))
    gradient, = torch.autograd.grad(loss, delta)
    velocity[used] = momentum * velocity[used] + gradient / gradient.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-12)
    perturbation[used] = (delta.detach() - step * velocity[used].sign()).clamp(-epsilon, epsilon)


def min_min(model, choose, images, rows, perturbation, *, rounds, train_batches=10, noise_batches=None, noise_steps=1, step=EPSILON / 5,
            epsilon=EPSILON, momentum=0.0, lr=0.1, batch_size=128, stop_accuracy=math.inf, generator=None,
            report=lambda done, total, **values: None):
    """Noise that leaves nothing to learn: min over the noise of min over the weights of the training loss (Huang et al. 2021, Eq. 2).

    model         surrogate network, trained in place; a continued one may be given
    choose        what it is to learn: `classify` makes error-minimizing noise, `find_partner` contrastive poisoning
    images        (N, 3, H, W) in [0, 1]
    rows          (N,) on the CPU, the perturbation each image wears: its label makes noise class-wise, its index sample-wise
    perturbation  (R, 3, H, W) start, at most epsilon; not changed
    Each round trains the surrogate on `train_batches` of published images, then, its weights frozen and in evaluation mode, takes
    `noise_steps` signed-gradient steps of size `step` on each of `noise_batches` (default: one pass over all the images).
    Ends at `stop_accuracy` of the surrogate on its training batches, or after `rounds`.
    Returns the perturbation (R, 3, H, W) and the surrogate's accuracy in each round.
    Raises ValueError when shapes disagree or the start is larger than epsilon.
    """
    if len(rows) != len(images) or rows.max() >= len(perturbation):
        raise ValueError(f"{len(images)} images need as many rows, below {len(perturbation)}")
    if perturbation.abs().max() > epsilon + 1e-6:
        raise ValueError(f"the start is {perturbation.abs().max():.4f} at its largest, more than epsilon = {epsilon:.4f}")

    def batches():
        while True:
            yield from torch.randperm(len(images), generator=generator).split(batch_size)

    stream, perturbation, velocity, history = batches(), perturbation.clone(), torch.zeros_like(perturbation), []
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    for done in range(1, rounds + 1):
        model.train()
        right = seen = 0
        for b in islice(stream, train_batches):            # min over the weights
            b, worn = to(images.device, b, rows[b])
            scores, answer = choose((images[b] + perturbation[worn]).clamp(0, 1), b)
            optimizer.zero_grad()
            F.cross_entropy(scores, answer).backward()
            optimizer.step()
            right, seen = right + (scores.argmax(1) == answer).sum(), seen + len(answer)
        model.eval().requires_grad_(False)
        for b in islice(batches(), noise_batches or math.ceil(len(images) / batch_size)):  # min over the noise
            for _ in range(noise_steps):
                noise_step(choose, images, b, perturbation, rows, velocity, step, epsilon, momentum)
        model.requires_grad_(True)
        history.append(float(right) / seen)
        report(done, rounds, accuracy=history[-1])
        if history[-1] >= stop_accuracy:
            break
    return perturbation, history


def classify(model, labels, augment):
    """The choice of error-minimizing noise (Huang et al. 2021): which class? `augment(x)` gives the view that the network sees."""
    return lambda x, b: (model(augment(x)), labels[b])


def nt_xent_scores(z, temperature=0.5):
    """SimCLR's loss as a choice: which of all the other views shows the same image (Chen et al. 2020, Eq. 1)?

    z (2B, D): embeddings of B images' first views, then of their second. Returns the scores (2B, 2B), cosines over the temperature
    with a view's own at -inf, and the index of each view's partner (2B,). The mean cross-entropy of the two is NT-Xent.
    """
    z = F.normalize(z, dim=1)
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    return (z @ z.T / temperature).masked_fill(own, -math.inf), torch.arange(len(z), device=z.device).roll(len(z) // 2)


def find_partner(model, view, temperature=0.5):
    """The choice of contrastive poisoning (He et al. 2023): which two of all the views are of one image? `view(x)` draws one."""
    return lambda x, b=None: nt_xent_scores(model(torch.cat([view(x), view(x)])), temperature)
