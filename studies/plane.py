"""The whole paper on one slide: points in the plane in place of images. It needs no run.

    python -m studies.plane --out DIR          plane.png, pipeline.png and the table, in a minute

Natural points lie on a circle, not quite thin, and six arcs say their class in turn. Nothing else
is natural, as next to no image of random pixels is. A perturbation moves a point off the circle,
outwards in one class and inwards in the other: to a classifier that is easier to read than arcs,
and natural points, which lie between the two, say nothing to it. A diffusion model has learned
other natural points. What it paints lies on the circle again, but not in the same place. Without
a condition no level is right: low ones leave the protection, and high ones lose the place.

The forward process, its posterior, the guidance and the tilted mean are those of the images. What
is simpler here: the U-Net is a small network of two numbers and the level. The pixel distance is
that of coordinates. The perceptual distance is one between directions from the centre, as LPIPS
scales features to unit length. It is blind to this perturbation by construction, as VGG is not. So
here it does most of the work: alone it teaches as much as both do. The pixel distance brings points
nearer to their places, and a little of the protection back; at every level, with fifty times the
weight, most of it. That victims learn more by both than by either can only be seen of images.
"""
import math
import sys
from pathlib import Path

if not __package__:
    print("expected `python -m studies.plane`, from the project's folder", file=sys.stderr)
    sys.exit(2)

import torch
import torch.nn.functional as F
from torch import nn

from le import Parser, Sampler, guidance, joint_conditioned_mean, one_line_errors
from studies.slide import draw_panels, draw_pipeline
from unet import BadInput, posterior, predict_x0, q_sample, visited_levels

RADIUS = 0.65                                              # of the circle, in a plane of [-1, 1]
ARCS = 6                                                   # of the two classes in turn
THICKNESS = 0.05                                           # spread of natural points around it
EPSILON = 0.2                                              # how far a perturbation moves a point
POINTS = 2000
LEVELS = 200                                               # that the denoiser learns

UNGUIDED = Sampler(100, steps=10, pixel_weight=0.0, perceptual_weight=0.0)
SAMPLERS = {
    "LEs, no condition": UNGUIDED,
    "LEs, no condition, level 36": Sampler(36, steps=10, pixel_weight=0.0, perceptual_weight=0.0),
    "LEs, pixel distance": Sampler(100, steps=10, pixel_weight=40.0, perceptual_weight=0.0),
    "LEs, perceptual distance": Sampler(100, steps=10, pixel_weight=0.0, perceptual_weight=256.0),
    "LEs, both": Sampler(100, steps=10, pixel_weight=40.0, perceptual_weight=256.0),
    "LEs, pixels x 50": Sampler(100, steps=10, pixel_weight=2000.0, pixel_above=0,
                                perceptual_weight=256.0)}
DRAWN = ("originals", "UEs", "UEs, diffused", "LEs, no condition", "LEs, both", "LEs, pixels x 50")


# -- Points and their protection -------------------------------------------------------------------

def natural_points(count, generator):
    """Points (N, 2, 1, 1), shaped as images of one pixel with two channels, and classes (N,)."""
    share = torch.rand(count, generator=generator)         # of the way around the circle
    angle = 2 * math.pi * share
    radius = RADIUS + THICKNESS * torch.randn(count, generator=generator)
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    labels = (ARCS * share).long() % 2
    return points.view(-1, 2, 1, 1), labels


def direction(points):
    """Points scaled to distance 1 from the centre."""
    return points / points.norm(dim=1, keepdim=True)


def protect(points, labels):
    """UEs: class 1 moves outwards by EPSILON, class 0 inwards."""
    side = 2 * labels - 1
    return points + EPSILON * side.view(-1, 1, 1, 1) * direction(points)


def moved(points, originals, labels):
    """How far points lie from their originals along the circle, the root mean square; and how far
    off the circle on the side of their class, the mean, which a classifier can read."""
    x, y = direction(points).flatten(1).T
    x0, y0 = direction(originals).flatten(1).T
    turn = torch.atan2(y * x0 - x * y0, x * x0 + y * y0)
    along = RADIUS * turn.square().mean().sqrt()
    outwards = points.norm(dim=1).flatten() - RADIUS
    off = ((2 * labels - 1) * outwards).mean()
    return along.item(), off.item()


# -- Two networks ----------------------------------------------------------------------------------

def perceptron(width_in, width, width_out):
    return nn.Sequential(nn.Flatten(), nn.Linear(width_in, width), nn.SiLU(),
                         nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width_out))


class Denoiser(nn.Module):
    """Predicts the noise in points (B, 2, 1, 1) of levels t, an int or (B,), as a U-Net does."""

    def __init__(self, width=96):
        super().__init__()
        self.net = perceptron(2 + 16, width, 2)

    def forward(self, xt, t):
        level = torch.as_tensor(t).expand(len(xt)) / LEVELS
        angle = level[:, None] * torch.logspace(0, 2, 8)
        known = torch.cat([xt.flatten(1), angle.sin(), angle.cos()], dim=1)
        return self.net(known).view_as(xt)


def fit(net, loss_of, steps, lr):
    """Adam, with rates that fall to zero; loss_of(net) is the loss of a random batch."""
    optimizer = torch.optim.Adam(net.parameters(), lr, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        loss = loss_of(net)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.requires_grad_(False)


def train_victim(points, labels, seed):
    """A classifier of points."""
    torch.manual_seed(seed)

    def loss_of(net):
        batch = torch.randint(len(points), (128,))
        return F.cross_entropy(net(points[batch]), labels[batch])
    return fit(perceptron(2, 64, 2), loss_of, steps=600, lr=0.01)


def train_denoiser(points, seed):
    """A diffusion model of points (Ho et al. 2020, Algorithm 1)."""
    torch.manual_seed(seed)

    def loss_of(net):
        x0 = points[torch.randint(len(points), (256,))]
        t = torch.randint(1, LEVELS + 1, (len(x0),))
        eps = torch.randn_like(x0)
        return F.mse_loss(net(q_sample(x0, t, eps), t), eps)
    return fit(Denoiser(), loss_of, steps=2500, lr=0.003)


# -- The way back ----------------------------------------------------------------------------------

class Directions:
    """The perceptual distance: between directions from the centre. Takes points in [0, 1]."""

    def embed(self, points):
        return direction(2 * points - 1)

    def to_embedding(self, points, features):
        return (self.embed(points) - features).square().mean((1, 2, 3))


@torch.no_grad()
def way_back(net, ue, sampler, generator):
    """UEs are diffused to a level and denoised; two distances pull every stride towards them."""
    distance = Directions()
    features = distance.embed(ue / 2 + 0.5)
    xt = q_sample(ue, sampler.t_star, torch.randn(ue.shape, generator=generator))
    visited = visited_levels(sampler.t_star, sampler.steps)
    for t, s in zip(visited, visited[1:]):
        x0 = predict_x0(xt, t, net(xt, t)).clamp(-1, 1)
        mean, var = posterior(x0, xt, t, s)
        if s > 0:                                          # the last stride has no variance
            gradient = guidance(x0, ue, features, t, distance, sampler)
            mean = joint_conditioned_mean(mean, var, t, gradient)
        xt = mean + var.sqrt() * torch.randn(ue.shape, generator=generator)
    return xt


def experiment(seed):
    """{what: (points, their victim, (its accuracy in percent, how far they moved along the circle
    and off it))}, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    originals, labels = natural_points(POINTS, generator)
    others, _ = natural_points(POINTS, generator)
    test, answers = natural_points(POINTS, generator)
    ue = protect(originals, labels)
    noise = torch.randn(ue.shape, generator=generator)
    versions = {"originals": originals, "UEs": ue,
                "UEs, diffused": q_sample(ue, UNGUIDED.t_star, noise)}
    net = train_denoiser(others, seed)
    for name, sampler in SAMPLERS.items():
        versions[name] = way_back(net, ue, sampler, generator)
    found = {}
    for name, points in versions.items():
        victim = train_victim(points, labels, seed)
        right = victim(test).argmax(1) == answers
        accuracy = 100 * right.float().mean().item()
        found[name] = points, victim, (accuracy, *moved(points, originals, labels))
    return found, labels


def summary(experiments):
    """{what: texts of its accuracy, and how far along and off it moved}, with spread over seeds."""
    rows = {}
    for name in experiments[0]:
        numbers = torch.tensor([found[name][2] for found in experiments])
        accuracy = f"{numbers[:, 0].mean():.1f}"
        if len(numbers) > 1:
            accuracy += f" ± {numbers[:, 0].std():.1f}"
        along = numbers[:, 1].mean().item()
        off = round(numbers[:, 2].mean().item(), 3) + 0.0  # not -0.000
        rows[name] = accuracy, f"{along:.2f}", f"{off:.3f}"
    return rows


def main(argv=None):
    parser = Parser(prog="studies.plane", description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="runs/plane", help="default runs/plane")
    parser.add_argument("--seeds", type=int, default=3, help="default 3")
    options = parser.parse_args(argv)
    with one_line_errors(parser.prog):
        if options.seeds < 1:
            raise BadInput(f"--seeds {options.seeds}: expected 1 or more")
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        draw_pipeline(out / "pipeline.png")
        experiments = []
        for seed in range(options.seeds):
            found, labels = experiment(seed)
            accuracies = [f"{name} {numbers[0]:.1f}" for name, (*_, numbers) in found.items()]
            print(f"seed {seed}: {'; '.join(accuracies)}", flush=True)
            experiments.append(found)
        rows = summary(experiments)
        print("\n| a victim learns from | accuracy | moved along | off, to its class's side |")
        print("|---|---|---|---|")
        for name, texts in rows.items():
            print(f"| {name} | {' | '.join(texts)} |")
        draw_panels(DRAWN, found, labels, rows, out / "plane.png")


if __name__ == "__main__":
    main()
