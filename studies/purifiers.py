"""Other ways to purify: plain sampling (Ho et al. 2020), DDIM (Song et al. 2021), and others, for
`studies.ablation` and `python -m studies.scenarios mend`.

Only attacks, le and unet are imported, so that what these make is kept when the rest changes.
"""
from dataclasses import replace

import torch

import le
from attacks import publish
from unet import T, alpha_bar, on_device, posterior, predict_x0, q_sample, visited_levels


# -- Sampling without conditions -------------------------------------------------------------------

def p_sample(net, xt, t, s, noise, stride=posterior):
    """One stride of the reverse process, x_t -> x_s (Ho et al. 2020, Algorithm 2, x0 clipped), with
    standard normal noise (B, 3, H, W), for ints 0 <= s < t; stride is `posterior` or `ddim`."""
    x0 = predict_x0(xt, t, net(xt, t)).clamp(-1, 1)
    mean, var = stride(x0, xt, t, s)
    return mean + var.sqrt() * noise


@torch.no_grad()
def sample(net, xt, steps=T, t_star=T, stride=posterior):
    """Images from noise xt (B, 3, H, W) at level t_star; strided where steps < t_star."""
    visited = visited_levels(t_star, steps)
    for t, s in zip(visited, visited[1:]):
        xt = p_sample(net, xt, t, s, torch.randn_like(xt), stride)
    return xt


def ddim(x0, xt, t, s):
    """The deterministic stride of Song et al. 2021 (Eq. 12, sigma 0), in the form of `posterior`:
    the noise in x_t, less of it, in place of new noise."""
    a = alpha_bar(t, xt)
    eps = (xt - a.sqrt() * x0) / (1 - a).sqrt()
    return q_sample(x0, s, eps), torch.zeros_like(a)


# -- Purifiers -------------------------------------------------------------------------------------

def weighted(sampler, factor):
    """The sampler with `factor` times its weights."""
    return replace(sampler, pixel_weight=factor * sampler.pixel_weight,
                   perceptual_weight=factor * sampler.perceptual_weight)


def deterministic(net, distance, images, sampler, seeds, report):
    """A purifier without guidance, by DDIM's strides: its only noise is that of the diffusion."""
    noises = [torch.Generator().manual_seed(seed) for seed in seeds]
    x = 2 * images - 1
    for k in range(sampler.rounds):
        eps = torch.stack([torch.randn(x.shape[1:], generator=noise) for noise in noises])
        xt, x0 = q_sample(x, sampler.t_star, eps), []
        for part in xt.split(le.BATCH):
            made = sample(net, on_device(part), sampler.steps, sampler.t_star, ddim)
            x0.append(made.cpu())
            done = k * len(xt) + min(le.BATCH * len(x0), len(xt))
            report(done, sampler.rounds * len(xt))
        x = torch.cat(x0).clamp(-1, 1)
    return x / 2 + 0.5


def colours_anew(net, images, sampler, seeds):
    """Images (N, 3, H, W) in [0, 1] whose colours the U-Net paints anew, by one evaluation in each
    of the sampler's rounds, and whose grey values stay; as 8 bits."""
    once = replace(weighted(sampler, 0), rounds=1, steps=1)
    x = images
    for k in range(sampler.rounds):
        own = [seed + (k + 1) * 2 ** 40 for seed in seeds]  # each round has noise of its own
        x = le.purify(net, None, x, once, own)
        x = publish(x, (images - x).mean(1, keepdim=True))
    return x


def recoloured(net, distance, images, sampler, seeds, report=None):
    """A purifier against both kinds of noise: `colours_anew`, against slow casts of colour; then
    half the sampler's level, unguided, against fast noise, which takes some of the picture."""
    x = colours_anew(net, images, sampler, seeds)
    unguided = replace(weighted(sampler, 0), t_star=sampler.t_star // 2, rounds=1, steps=4)
    return le.purify(net, None, x, unguided, seeds, report=report)
