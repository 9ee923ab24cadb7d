"""Learnable unauthorized examples: the joint-conditional diffusion model of Jiang et al. 2023 (arXiv 2305.09241).

An unlearnable example (UE) is diffused a little, until the noise drowns the protection, and denoised by a U-Net that knows only
unprotected images. Two conditions pull every reverse step back towards the UE, so that the picture survives and the protection
does not: pixel distance, then perceptual distance.
"""
from dataclasses import dataclass

import torch

from unet import levels, posterior, predict_x0, q_sample, sigma


@dataclass(frozen=True)
class Sampler:
    """How to purify. The defaults are ours; RELEASED is the authors' setting without its faults."""
    t_star: int = 100              # noise level that the image is diffused to, 1..1000
    rounds: int = 1                # times that it is diffused and denoised, each round starting from the last one's output
    steps: int = 8                 # strides from t_star to 0, so network evaluations an image = rounds * steps
    pixel: float = 5e4             # weight of the pixel distance
    perceptual: float = 2e3        # weight of the perceptual distance
    switch: int | None = 40        # pixel distance above this level, perceptual distance from it down; None: both throughout
    target: str = "x0"             # what is compared: "x0": predicted x0 with the UE; "same", "fresh": x_t with the UE diffused
                                   # to level t by the noise of the first diffusion, or by new noise at every step

    def __post_init__(self):
        levels(self.t_star, self.steps)                    # raises ValueError if they cannot be
        if self.target not in ("x0", "same", "fresh"):
            raise ValueError(f"target is x0, same or fresh, not {self.target!r}")
        if self.rounds < 1 or min(self.pixel, self.perceptual) < 0:
            raise ValueError(f"rounds is at least 1 and weights are not negative: {self}")


# guide_scale = 70000 over m = 2 * epsilon / 3, and distances averaged over the shipped batch of 500
RELEASED_WEIGHT = 3 * 70000 / (2 * 8 / 255) / 500
RELEASED = Sampler(t_star=36, rounds=4, steps=36, pixel=RELEASED_WEIGHT, perceptual=RELEASED_WEIGHT, switch=10, target="fresh")


def guidance(x, y, t, perceptual, y_embedding, sampler):
    """Gradient with respect to x (B, 3, H, W), in [-1, 1], of its weighted distances to y that apply at level t.

    Every image's distance is its own. The pixel distance is the mean squared difference, whose gradient needs no autograd;
    `y_embedding()` gives the target's perceptual features and is called only where the perceptual distance applies.
    """
    gradient = torch.zeros_like(x)
    if sampler.pixel and (sampler.switch is None or t > sampler.switch):
        gradient += sampler.pixel * 2 * (x - y) / x[0].numel()
    if sampler.perceptual and (sampler.switch is None or t <= sampler.switch):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            distance = (perceptual.embed(x / 2 + 0.5) - y_embedding()).square().sum()
            gradient += sampler.perceptual * torch.autograd.grad(distance, x)[0]
    return gradient


def joint_conditioned_mean(mean, var, t, gradient):
    """The posterior mean pulled towards the UE: mean - var * s_t * gradient, s_t = sqrt((1 - alpha_bar_t) / alpha_bar_t) (Jiang et al. 2023).

    The weight is in the gradient; s_t lets the pull fade with the noise.
    """
    return mean - var * sigma(t) * gradient


def denoise(unet, perceptual, ue, sampler, draw):
    """One batch of UEs (B, 3, H, W) in [-1, 1] -> LEs in [-1, 1]. `draw()` returns standard normal noise of that shape."""
    embed = lambda y: perceptual.embed(y / 2 + 0.5)
    ue_embedding = embed(ue) if sampler.perceptual and sampler.target == "x0" else None
    x, visited = ue, levels(sampler.t_star, sampler.steps)
    for _ in range(sampler.rounds):
        first = draw()
        xt = q_sample(x, sampler.t_star, first)
        for t, s in zip(visited, visited[1:]):
            x0 = predict_x0(xt, t, unet(xt, t)).clamp(-1, 1)
            mean, var = posterior(x0, xt, t, s)
            if sampler.target == "x0":
                gradient = guidance(x0, ue, t, perceptual, lambda: ue_embedding, sampler)
            else:
                yt = q_sample(ue, t, first if sampler.target == "same" else draw())
                gradient = guidance(xt, yt, t, perceptual, lambda: embed(yt), sampler)
            xt = joint_conditioned_mean(mean, var, t, gradient) + var.sqrt() * draw()
        x = xt
    return x


@torch.no_grad()
def purify(unet, perceptual, images, sampler=Sampler(), seed=0, batch_size=128, report=lambda done, total: None):
    """Turn unlearnable examples into learnable ones with the joint-conditional diffusion model (Jiang et al. 2023).

    images (N, 3, H, W) in [0, 1] on any device -> LEs of the same shape there, rounded to multiples of 1/255.
    unet predicts noise in images in [-1, 1], perceptual is a PerceptualDistance (None if its weight is 0); both on one device.
    An image's noise depends on `seed` and its position alone, so results do not depend on batch_size.
    Raises ValueError if the images are not in [0, 1] or the U-Net cannot take their size.
    """
    if images.numel() and not 0 <= images.min() <= images.max() <= 1:
        raise ValueError(f"images must be in [0, 1], got {images.min():.3f} to {images.max():.3f}")
    device, out = next(unet.parameters()).device, torch.empty_like(images)
    for i in range(0, len(images), batch_size):
        ue = images[i:i + batch_size].to(device, memory_format=torch.channels_last) * 2 - 1
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + j) for j in range(i, i + len(ue))]
        draw = lambda: torch.stack([torch.randn(ue.shape[1:], generator=g) for g in generators]).to(ue)
        le = denoise(unet, perceptual, ue, sampler, draw)
        out[i:i + len(ue)] = (le / 2 + 0.5).clamp(0, 1).mul(255).round().div(255)
        report(i + len(ue), len(images))
    return out
