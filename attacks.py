"""Protections: imperceptible noise that makes published images unlearnable, and whom it fools.

Error-minimizing noise (Huang et al. 2021, arXiv 2101.04898) makes the training loss so small that
nothing is left to learn: the network finds the noise, which says the class, before the picture.
Contrastive poisoning (He et al. 2023, arXiv 2202.11202) does the same to networks that learn
without labels: the noise says which two views are of one image. Both are one alternation,
`min_min`, over two losses; `studies/rotation.py` gives it a third.

Reading order: what a victim learns -> min_min -> noise_step -> views -> networks -> fit. Images are
in [0, 1], (B, 3, H, W); random choices are drawn per image, on the CPU. This file imports none of
the others, so an edit of those makes no noise again."""
import inspect
import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Callable

import torch
import torch.nn.functional as F
from torch import nn

EPSILON = 8 / 255                                          # the largest change of a channel


# -- What a victim learns --------------------------------------------------------------------------
# Each loss is the cross-entropy of a choice: its scores (M, choices) and right answers (M,).

def class_scores(net, x, labels, generator):
    """Which class? The choice that a classifier learns, and error-minimizing noise makes easy."""
    return net(crop_flip(x, generator)), labels


def nt_xent_scores(z, temperature=0.5):
    """SimCLR's loss as a choice: which of all other views shows the same image (Chen, Eq. 1)?

    z (2B, D): embeddings of B images' first views, then of their second. Returns scores (2B, 2B),
    cosines over the temperature, a view's own at -inf, and the index of its partner (2B,). Their
    mean cross-entropy is NT-Xent."""
    z = F.normalize(z, dim=1)
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    scores = (z @ z.T / temperature).masked_fill(own, -math.inf)
    return scores, torch.arange(len(z), device=z.device).roll(len(z) // 2)


def partner_scores(net, x, labels, generator, view, temperature):
    """Which two views are of one image? SimCLR learns it, contrastive poisoning makes it easy.

    view           what the two are made by, such as `simclr_view`; as an option, a name in VIEWS
    temperature    of NT-Xent"""
    views = torch.cat([view(x, generator), view(x, generator)])
    return nt_xent_scores(net(views), temperature)


@dataclass(frozen=True)
class Victim:
    """Who trains on published images; and the *surrogate*, by which the owner makes his noise."""
    network: Callable              # network(**config) -> one with random weights
    scores_and_answers: Callable   # what it learns: class_scores, partner_scores, or your own
    config: dict = field(default_factory=dict)
    choice: dict = field(default_factory=dict)    # further arguments of scores_and_answers
    training: dict = field(default_factory=dict)  # of `fit`: epochs, batch_size, lr
    probed: bool = False           # judged by a linear probe of its `features`, not by its scores

    def fresh(self, seed):
        """A network whose weights depend on the seed alone."""
        torch.manual_seed(seed)
        return self.network(**self.config)

    def loss(self, net, x, labels, generator):
        """The mean cross-entropy of the network's choices on images x."""
        scores, answers = self.scores_and_answers(net, x, labels, generator, **self.choice)
        return F.cross_entropy(scores.float(), answers)


# -- Noise -----------------------------------------------------------------------------------------
# A protection is a function (images (N, 3, H, W) in [0, 1], labels (N,), victim, *, epsilon, seed,
# report, ...) -> unlearnable examples of the same shape.

def min_min(images, labels, victim, *, shared="image", start=None, surrogates=1, rounds=10,
            train_batches=10, noise_batches=None, noise_steps=1, step=0.2, momentum=0.9, lr=0.1,
            batch_size=128, warm_up=0, epsilon=EPSILON, seed=0, report=None):
    """Noise that leaves nothing to learn: min over noise of min over weights of the loss (Huang et
    al. 2021, Eq. 2; with the loss of SimCLR, He et al. 2023).

    shared         who has a perturbation in common: nobody (image), each class, or all
    start          UEs (N, 3, H, W) whose perturbation to begin with; default: uniform noise
    surrogates     networks that start afresh, one after the other. A victim is lost in its first
                   epochs, so the noise must be read by a young network before the picture is
    rounds         of each surrogate: batches that train it, then batches that make noise
    train_batches  training steps of a surrogate in a round
    noise_batches  batches of images whose noise takes steps in a round, None for all images
    noise_steps    steps of the noise of each batch, the surrogate's weights frozen
    step           of the noise at first, in epsilons; it falls to 0
    momentum       of its gradient, normalised (Dong et al. 2018): one crop's is mostly noise
    lr             the surrogate's learning rate, by SGD
    batch_size     images a batch; in a large one many of a class add up their gradients
    warm_up        more training batches for a surrogate before its first noise step
    Returns UEs, at most epsilon away from the images, and rounded to 8 bits."""
    generator = torch.Generator().manual_seed(seed)
    # rows (N,): which perturbation of (R, 3, H, W) each image wears
    rows = {"image": torch.arange(len(images)), "class": labels.cpu(),
            "all": torch.zeros(len(images), dtype=torch.long)}[shared]
    shape = (int(rows.max()) + 1, *images.shape[1:])
    perturbation = epsilon * (2 * torch.rand(shape, generator=generator) - 1).to(images.device)
    if start is not None:
        perturbation[rows] = start - images
    velocity = torch.zeros_like(perturbation)
    total = surrogates * rounds
    for done in range(total):
        count = train_batches
        if done % rounds == 0:                             # a surrogate starts afresh
            net = victim.fresh(seed + 1000 + done)         # not the victim's initialisation
            net.to(images.device, memory_format=torch.channels_last)
            optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=5e-4)
            count += warm_up
        loss = train_surrogate(net, optimizer, victim, images, labels, perturbation, rows, count,
                               batch_size, generator)
        size = step * epsilon * (1 - done / total)
        for b in torch.randperm(len(images), generator=generator).split(batch_size)[:noise_batches]:
            used, wearer = rows[b].unique(return_inverse=True)  # (r,) rows, (B,) places in them
            for _ in range(noise_steps):
                gradient = noise_gradient(net, victim, images[b], labels[b], perturbation[used],
                                          wearer, generator)
                length = gradient.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-12)
                velocity[used] = momentum * velocity[used] + gradient / length
                perturbation[used] = noise_step(perturbation[used], velocity[used], size, epsilon)
        if report:
            report(done + 1, total, loss=loss)
    del velocity                                           # as large as all images, if each has one
    return publish(images, perturbation[rows])


def publish(images, perturbation):
    """The unlearnable examples: images + perturbation, clipped to [0, 1] and rounded to 8 bits,
    which cannot push a pixel beyond an epsilon that is a multiple of 1/255."""
    return (images + perturbation).clamp_(0, 1).mul_(255).round_().div_(255)


def noise_step(perturbation, gradient, step, epsilon):
    """One signed-gradient descent step within epsilon (Huang et al. 2021, Eq. 3)."""
    return (perturbation - step * gradient.sign()).clamp(-epsilon, epsilon)


def train_surrogate(net, optimizer, victim, images, labels, perturbation, rows, batches, size,
                    generator):
    """min over the weights: `batches` steps on `size` images + perturbation. Returns the loss."""
    net.train().requires_grad_(True)
    for _ in range(batches):
        b = torch.randperm(len(images), generator=generator)[:size]
        x = (images[b] + perturbation[rows[b]]).clamp(0, 1)
        loss = victim.loss(net, x, labels[b], generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval().requires_grad_(False)
    return loss.detach()


def noise_gradient(net, victim, images, labels, perturbation, wearer, generator):
    """Gradient of the loss for the perturbation (R, 3, H, W), the weights fixed: image i wears
    perturbation[wearer[i]], and those that share one add up their gradients."""
    delta = perturbation.detach().requires_grad_()
    x = (images + delta[wearer]).clamp(0, 1)
    loss = victim.loss(net, x, labels, generator)
    return torch.autograd.grad(loss, delta)[0]


# -- Views: place ----------------------------------------------------------------------------------
# Crops, resizes and flips pick and blend rows and columns, so a view is rows @ image @ columns^T:
# differentiable, and zero outside the image.

def bilinear(start, length, n_in, n_out):
    """Matrices (B, n_out, n_in) that stretch pixels start (B,) .. start + length over n_out pixels,
    as Pillow's BILINEAR: by triangles as wide as two pixels of the input, or of a smaller output.
    Where start is whole and length is n_out, they cut a window."""
    scale = torch.as_tensor(length / n_out).view(-1, 1, 1)
    centre = start.view(-1, 1, 1) + (torch.arange(n_out)[:, None] + 0.5) * scale
    distance = (torch.arange(n_in) + 0.5 - centre).abs()
    weight = (1 - distance / scale.clamp_min(1)).clamp_min(0)
    return weight / weight.sum(-1, keepdim=True).clamp_min(1e-6)


def boxes(x, top, left, height, width, size, generator):
    """A box of each image (B, C, H, W), resized to (B, C, size, size), and half of them flipped."""
    rows = bilinear(top, height, x.shape[2], size).to(x)
    columns = bilinear(left, width, x.shape[3], size).to(x)
    flipped = torch.rand(len(x), 1, 1, generator=generator) < 0.5
    columns = torch.where(flipped.to(x.device), columns.flip(1), columns)
    return rows[:, None] @ x @ columns[:, None].mT


def crop_flip(x, generator, pad=4):
    """Random crop of the zero-padded image, and flip, as CIFAR classifiers do: (B, C, H, H)."""
    size = x.shape[-1]
    top, left = torch.randint(-pad, pad + 1, (2, len(x)), generator=generator)
    return boxes(x, top, left, size, size, size, generator)


def quadrant_view(x, generator, jitter=2):
    """One of the four quadrants, moved by up to `jitter` pixels, flipped or not, each channel less
    its mean: (B, C, H, H) -> (B, C, H / 2, H / 2), around 0.5. Two share the class of our shapes
    and nothing else."""
    half = x.shape[-1] // 2
    corners = torch.randint(2, (2, len(x)), generator=generator) * half
    moves = torch.randint(-jitter, jitter + 1, (2, len(x)), generator=generator)
    top, left = (corners + moves).clamp(0, half)
    view = boxes(x, top, left, half, half, half, generator)
    return view - view.mean((2, 3), keepdim=True) + 0.5


def random_resized_crop(x, generator, size, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), tries=10):
    """A random box of `scale` of the area and aspect `ratio`, resized, half of them flipped:
    (B, C, H, W) -> (B, C, size, size) (Szegedy et al. 2015). As torchvision and kornia do it: in
    whole pixels, a box too long is drawn again, and after ten tries it is the whole image."""
    n, _, h, w = x.shape
    area, aspect = torch.rand(2, n, tries, generator=generator)
    area = h * w * (scale[0] + (scale[1] - scale[0]) * area)
    aspect = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * aspect)
    heights = torch.cat([(area / aspect).sqrt().round(), torch.full((n, 1), h)], dim=1)
    widths = torch.cat([(area * aspect).sqrt().round(), torch.full((n, 1), w)], dim=1)
    first = ((heights <= h) & (widths <= w)).int().argmax(1, keepdim=True)
    height, width = heights.gather(1, first)[:, 0], widths.gather(1, first)[:, 0]
    top, left = torch.rand(2, n, generator=generator)
    top, left = (top * (h - height + 1)).floor(), (left * (w - width + 1)).floor()
    return boxes(x, top, left, height, width, size, generator)


# -- Views: colour ---------------------------------------------------------------------------------
# Factors are (B, 1, 1, 1); what leaves [0, 1] is clipped, as in Pillow.

def blend(x, other, factor):
    """`other` at factor 0, x at 1, beyond x above: of x 0.6 and other 0.5, factor 2 makes 0.7."""
    return (other + factor * (x - other)).clamp(0, 1)


def luma(x):
    """Grey value (B, 1, H, W) of an image, ITU-R 601 as in Pillow's mode L: 0.587 of pure green."""
    weights = x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    return (x * weights).sum(1, keepdim=True)


def brightness(x, factor):
    return blend(x, torch.zeros_like(x), factor)


def contrast(x, factor):
    return blend(x, luma(x).mean((2, 3), keepdim=True), factor)


def saturation(x, factor):
    return blend(x, luma(x), factor)


def hue(x, factor):
    """Turn the hue by factor - 1 of a full circle, value and saturation kept (the HSV hexagon)."""
    value = x.amax(1, keepdim=True)
    r, g, b = x.split(1, dim=1)
    chroma = value - x.amin(1, keepdim=True)
    least = chroma.clamp_min(1e-6)                         # a grey pixel has no hue
    sector = torch.where(value == g, (b - r) / least + 2, (r - g) / least + 4)
    sector = torch.where(value == r, (g - b) / least, sector) + 6 * (factor - 1)
    k = (sector + x.new_tensor([5.0, 3.0, 1.0]).view(3, 1, 1)) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def colour_jitter(x, generator, strength=(0.4, 0.4, 0.4, 0.1), p=0.8):
    """Brightness, contrast, saturation and hue changed by up to `strength`, for p of the images,
    in an order that is new for each batch."""
    used = torch.rand(len(x), 1, 1, 1, generator=generator) < p
    changes = 2 * torch.rand(4, len(x), 1, 1, 1, generator=generator) - 1
    steps = (brightness, contrast, saturation, hue)
    for i in torch.randperm(4, generator=generator).tolist():
        x = steps[i](x, (1 + used * strength[i] * changes[i]).to(x))
    return x


def grayscale(x, generator, p=0.2):
    """p of the images without their colours."""
    chosen = torch.rand(len(x), 1, 1, 1, generator=generator) < p
    return torch.where(chosen.to(x.device), luma(x), x)


def simclr_view(x, generator):
    """The view of Chen et al. 2020 for CIFAR: resized crop, flip, colour jitter, grayscale."""
    cropped = random_resized_crop(x, generator, x.shape[-1])
    return grayscale(colour_jitter(cropped, generator), generator)


VIEWS = {"quadrant": quadrant_view, "simclr": simclr_view}


# -- Networks --------------------------------------------------------------------------------------

def conv_norm(c_in, c_out, size, stride=1):
    conv = nn.Conv2d(c_in, c_out, size, stride, size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016): (B, c_in, H, W) -> c_out, / stride."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = conv_norm(c_in, c_out, 3, stride)
        self.conv2 = conv_norm(c_out, c_out, 3)
        same = stride == 1 and c_in == c_out
        self.shortcut = nn.Identity() if same else conv_norm(c_in, c_out, 1, stride)

    def forward(self, x):
        h = F.relu(self.conv1(x))
        return F.relu(self.conv2(h) + self.shortcut(x))


class ResNet(nn.Module):
    """Residual network with the CIFAR stem: images in [0, 1] (B, 3, H, W) -> scores (B, classes).

    widths are the channels of the stem and of each level; ResNet-18 is widths
    (64, 64, 128, 256, 512), blocks 2, strides (1, 2, 2, 2).
    """

    def __init__(self, widths, blocks, strides, classes):
        super().__init__()
        self.levels = nn.Sequential(conv_norm(3, widths[0], 3), nn.ReLU())
        for c_in, c_out, stride in zip(widths[:-1], widths[1:], strides, strict=True):
            self.levels.append(BasicBlock(c_in, c_out, stride))
            for _ in range(blocks - 1):
                self.levels.append(BasicBlock(c_out, c_out, 1))
        self.head = nn.Linear(widths[-1], classes)

    def features(self, x):
        """What the last layer sees: (B, widths[-1])."""
        return self.levels((x - 0.5) / 0.25).mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x))


class SimCLR(nn.Module):
    """An encoder and the head through which contrastive learning trains it (Chen et al. 2020).

    Images -> embeddings (B, c). The head is thrown away afterwards: a victim keeps the features.
    """

    def __init__(self, **resnet):
        super().__init__()
        self.encoder = ResNet(**resnet)
        c = self.encoder.head.in_features
        self.projection = nn.Sequential(nn.Linear(c, c), nn.BatchNorm1d(c), nn.ReLU(),
                                        nn.Linear(c, c))

    def features(self, x):
        return self.encoder.features(x)

    def forward(self, x):
        return self.projection(self.features(x))


def orthogonal(matrix):
    """Nearly U V^T of a matrix U S V^T, by five Newton-Schulz steps: what it does to each direction
    is kept, how much of it becomes about the same (Jordan et al. 2024). A step is an odd polynomial
    of each singular value; five with these coefficients take 0.01 to 1 into 0.68 to 1.14."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.mT if tall else matrix) / matrix.norm().clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum, in which the step of a matrix or filter is made orthogonal
    (Jordan et al. 2024): a network learns as much in half the epochs."""

    def __init__(self, parameters, lr, momentum=0.9):
        super().__init__(parameters, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:                         # SimCLR has no use for scores
                    continue
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                velocity.mul_(group["momentum"]).add_(p.grad)
                step = p.grad + group["momentum"] * velocity
                if p.ndim > 1:
                    flat = step.flatten(1)
                    longer = max(1, flat.shape[0] / flat.shape[1]) ** 0.5
                    step = longer * orthogonal(flat).reshape(p.shape)
                p.sub_(group["lr"] * step)


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4, nesterov=True), "muon": Muon,
    "adam": partial(torch.optim.Adam, betas=(0.9, 0.99), fused=True)}


def fit(victim, images, labels, *, epochs=6, batch_size=64, lr=0.1, optimizer="sgd", seed,
        report):
    """Train a fresh network of a victim, where the images are.

    epochs         of the victim's training
    batch_size     images a step
    lr             the highest learning rate of the one cycle, in which the momentum goes the
                   other way, from 0.95 to 0.85 and back
    optimizer      how it learns: a name in OPTIMIZERS
    Returns its {"weights"}, "config" if it has one, and the mean loss of each epoch, "losses".
    """
    labels = labels.to(images.device)
    net = victim.fresh(seed).to(images.device, memory_format=torch.channels_last).train()
    generator = torch.Generator().manual_seed(seed)
    steps = max(1, round(len(images) / batch_size))
    optimizer = OPTIMIZERS[optimizer](net.parameters(), lr)
    total = max(6, epochs * steps + 1)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total, pct_start=0.2)
    losses = []
    for epoch in range(epochs):
        added = 0.0
        for b in torch.randperm(len(images), generator=generator).tensor_split(steps):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
                loss = victim.loss(net, images[b], labels[b], generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
            added += loss.detach()
        losses.append(float(added) / steps)
        report(epoch + 1, epochs, loss=losses[-1])
    return dict(config=getattr(net, "config", None), weights=net.state_dict(), losses=losses)


# A victim of your own is a network and an entry here, and train.py --victim NAME is judged by it
VICTIMS = {
    "classifier": Victim(ResNet, class_scores,
                         training=dict(epochs=8, batch_size=64, lr=0.2, optimizer="muon")),
    "simclr": Victim(SimCLR, partner_scores, choice=dict(view="quadrant", temperature=0.3),
                     training=dict(epochs=32, batch_size=128, lr=0.05, optimizer="muon"),
                     probed=True)}


def victim_of(c, name):
    """The victim of this name, with a run's ResNet, its classes, and its own settings."""
    victim, settings = VICTIMS[name], vars(c).get(name, {})
    choice = {key: settings[key] for key in victim.choice}
    if "view" in choice:
        choice["view"] = VIEWS[choice["view"]]
    training = {key: settings[key] for key in victim.training}
    return replace(victim, config=c.resnet | dict(classes=c.classes), choice=choice,
                   training=training)


# -- Protections -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Protection:
    """An entry of PROTECTIONS: the function, whom it is to fool, and its settings."""
    make: Callable
    victim: str = "classifier"     # a name in VICTIMS: who judges it, and who `make` is given
    start: str = ""                # the protection whose UEs are given to it as `start`
    settings: dict = field(default_factory=dict)

    def options(self):
        """{name: default} of all that can be set: what `make` has defaults for, and `settings`."""
        keywords = inspect.signature(self.make).parameters.values()
        found = {k.name: k.default for k in keywords if k.default is not k.empty} | self.settings
        given = ("start", "epsilon", "seed", "report")     # to every protection, by the story
        return {name: value for name, value in found.items()
                if name not in given and not callable(value)}


# Sample-wise noise starts from class-wise noise, as in He et al. 2023
PROTECTIONS = {
    "em-class": Protection(min_min, settings=dict(shared="class", rounds=40, noise_batches=10)),
    "em-sample": Protection(min_min, "classifier", "em-class", dict(
        noise_steps=2, lr=0.2, warm_up=200)),
    "cp-class": Protection(min_min, "simclr", settings=dict(
        shared="class", surrogates=7, rounds=10, train_batches=16, noise_batches=8, step=0.15,
        batch_size=384)),
    "cp-sample": Protection(min_min, "simclr", "cp-class", dict(
        surrogates=1, rounds=4, train_batches=30, noise_steps=2, step=0.15, batch_size=256))}
