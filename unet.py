"""Denoising diffusion (Ho et al. 2020, "DDPM", arXiv 2006.11239): forward, reverse, U-Net.

The forward process q turns an image into noise, a little at each level. A network that predicts
this noise knows the way back: the image less the noise is a guess of the image, and with a guess
of it the distribution one level lower, q(x_s | x_t, x_0), is a Gaussian that can be written down.

Reading order: schedule -> q_sample -> posterior -> ddpm_loss -> UNet -> train_unet; then what the
other files need as well. `le.denoise` goes all the way back.
Images in this file are in [-1, 1], (B, 3, H, W); t counts the noise levels 1..T, 0 is no noise.
"""
import copy
import math
import os
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

DEVICE = ("cuda" if torch.cuda.is_available() else
          "mps" if torch.backends.mps.is_available() else "cpu")


class BadInput(ValueError):
    """Something that a user gave cannot be used; the message, one line, says what was expected."""


# -- The forward process: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps ------------------

T = 1000                                                   # noise levels of the full process
BETA = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)  # BETA[t - 1] is the paper's beta_t
# ALPHA_BAR[t] for t = 0..T, and ALPHA_BAR[0] == 1; other code calls the T values alphas_cumprod
ALPHA_BAR = torch.cat([torch.ones(1, dtype=torch.float64), (1 - BETA).cumprod(0)])


def alpha_bar(t, like):
    """alpha_bar_t, shaped (B or 1, 1, 1, 1) to multiply images `like`; t is an int or (B,) ints."""
    in_kind = ALPHA_BAR.to(like.dtype)                     # first, since MPS has no float64
    return in_kind.to(like.device)[t].reshape(-1, 1, 1, 1)


def sigma(t):
    """Noise-to-signal ratio sqrt((1 - alpha_bar_t) / alpha_bar_t) at level t: sigma(0) is 0."""
    return math.sqrt(1 / ALPHA_BAR[t].item() - 1)


def q_sample(x0, t, eps):
    """Diffuse x0 straight to level t with the noise eps (both (B, 3, H, W)): Ho et al., Eq. 4."""
    a = alpha_bar(t, x0)
    return a.sqrt() * x0 + (1 - a).sqrt() * eps


def predict_x0(xt, t, eps):
    """The x0 whose diffusion to level t with noise eps is xt: `q_sample` inverted (Ho, Eq. 15)."""
    a = alpha_bar(t, xt)
    return (xt - (1 - a).sqrt() * eps) / a.sqrt()


def posterior(x0, xt, t, s):
    """Mean (B, 3, H, W) and variance (B or 1, 1, 1, 1) of q(x_s | x_t, x_0), levels 0 <= s < t.

    It is what is known of the image at level s by somebody who knows it at level t and without
    noise. Ho et al. 2020, Eq. 6-7 is the case s = t - 1; a larger gap is a stride of a sampler."""
    a_t, a_s = alpha_bar(t, xt), alpha_bar(s, xt)
    alpha = a_t / a_s                                      # the paper's alpha_t when s = t - 1
    beta = 1 - alpha
    mean = (a_s.sqrt() * beta * x0 + alpha.sqrt() * (1 - a_s) * xt) / (1 - a_t)
    var = (1 - a_s) / (1 - a_t) * beta
    return mean, var


def visited_levels(t_star, steps):
    """The steps + 1 levels that a sampler of `steps` strides visits, evenly from t_star to 0:
    visited_levels(100, 4) is [100, 75, 50, 25, 0]. Raises BadInput if there are none such."""
    if not 1 <= steps <= t_star <= T:
        raise BadInput(f"steps {steps}, t_star {t_star}: need 1 <= steps <= t_star <= {T}")
    return [round(t_star * (steps - i) / steps) for i in range(steps + 1)]


def ddpm_loss(net, x0, t, eps):
    """Mean squared error of the predicted noise (Ho et al. 2020, Eq. 14, L_simple); t is (B,)."""
    return F.mse_loss(net(q_sample(x0, t, eps), t), eps)


# -- The U-Net. Submodules have the names of the released weights, google/ddpm-cifar10-32. ---------

def norm(channels):
    """GroupNorm with 32 groups as in Ho et al., fewer in a narrow network: a channel alone in its
    group would lose its time embedding. norm(48) has 12 groups."""
    groups = max(1, min(32, channels // 4))
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """(norm, swish, conv) twice, plus time embedding and shortcut: (B, c_in, H, W) -> c_out."""

    def __init__(self, c_in, c_out, c_time, dropout):
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(c_time, c_out)
        self.norm2 = norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)                  # every block starts as its shortcut

    def forward(self, x, temb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + self.conv_shortcut(x)


class Attention(nn.Module):
    """Single-head self-attention over the H*W positions, with a shortcut: (B, c, H, W) -> same."""

    def __init__(self, c):
        super().__init__()
        self.group_norm = norm(c)
        self.query = nn.Linear(c, c)
        self.key = nn.Linear(c, c)
        self.value = nn.Linear(c, c)
        self.proj_attn = nn.Linear(c, c)
        nn.init.zeros_(self.proj_attn.weight)

    def forward(self, x):
        h = self.group_norm(x).flatten(2).mT               # (B, HW, c)
        h = F.scaled_dot_product_attention(self.query(h), self.key(h), self.value(h))
        return x + self.proj_attn(h).mT.reshape(x.shape)


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))           # TensorFlow's SAME padding


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Scale(nn.Module):
    """What the U-Net does at one resolution: residual blocks, after each perhaps attention."""

    def __init__(self, widths_in, c, c_time, dropout, attention):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c_in, c, c_time, dropout) for c_in in widths_in)
        self.attentions = nn.ModuleList(Attention(c) for _ in widths_in if attention)
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def block(self, j, h, temb):
        h = self.resnets[j](h, temb)
        return self.attentions[j](h) if self.attentions else h


def time_embedding(t, width):
    """Sinusoids of the level (B,) -> (B, width): Ho et al.'s frequencies from 1 to 1/10000."""
    frequency = torch.arange(width // 2, device=t.device) / (width // 2 - 1)
    angle = t.float()[:, None] * torch.exp(-math.log(10000) * frequency)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class UNet(nn.Module):
    """Predicts the noise eps in x_t: net(xt (B, 3, H, W), t int or (B,) in 1..T) -> (B, 3, H, W).

    H and W must be multiples of patch * 2 ** (len(mults) - 1). The defaults are the paper's
    CIFAR-10 network (35.7 M parameters). `patch` > 1 folds patch x patch pixels into channels, so
    that all else is patch**2 times cheaper. It learns noise levels 1..max_level. Raises BadInput.
    """

    def __init__(self, width=128, mults=(1, 2, 2, 2), blocks=2, attention=(16,), dropout=0.1,
                 patch=1, size=32, max_level=T):
        super().__init__()
        if width < 4 or width % 2 or not 1 <= max_level <= T:
            raise BadInput(f"width {width}, max_level {max_level}: expected an even width of 4 or "
                           f"more, and a level of 1..{T}")
        self.config = dict(width=width, mults=tuple(mults), blocks=blocks, max_level=max_level,
                           attention=tuple(attention), dropout=dropout, patch=patch, size=size)
        self.width, self.patch = width, patch
        self.multiple = patch * 2 ** (len(mults) - 1)
        self.max_level = max_level
        c_time = 4 * width
        widths = [m * width for m in mults]
        attends = [size // patch // 2 ** i in attention for i in range(len(mults))]
        self.time_embedding = nn.Module()
        self.time_embedding.linear_1 = nn.Linear(width, c_time)
        self.time_embedding.linear_2 = nn.Linear(c_time, c_time)
        self.conv_in = nn.Conv2d(3 * patch ** 2, width, 3, padding=1)
        self.down_blocks = nn.ModuleList()
        self.up_blocks = nn.ModuleList()
        c, skips = width, [width]
        for i, c_out in enumerate(widths):                 # from fine to coarse
            widths_in = [c] + [c_out] * (blocks - 1)
            scale = Scale(widths_in, c_out, c_time, dropout, attends[i])
            skips += [c_out] * blocks
            if i < len(mults) - 1:
                scale.downsamplers.append(Downsample(c_out))
                skips.append(c_out)
            self.down_blocks.append(scale)
            c = c_out
        # the middle has attention if any resolution has, between its two blocks
        self.mid_block = Scale([c, c], c, c_time, dropout, len(attention) > 0)
        del self.mid_block.attentions[1:]
        for i, c_out in reversed(list(enumerate(widths))):  # and back
            widths_in = [h + skips.pop() for h in [c] + [c_out] * blocks]
            scale = Scale(widths_in, c_out, c_time, dropout, attends[i])
            if i > 0:
                scale.upsamplers.append(Upsample(c_out))
            self.up_blocks.append(scale)
            c = c_out
        self.conv_norm_out = norm(c)
        self.conv_out = nn.Conv2d(c, 3 * patch ** 2, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, xt, t):
        if xt.shape[-1] % self.multiple or xt.shape[-2] % self.multiple:
            raise BadInput(f"this U-Net takes sides that are multiples of {self.multiple}, "
                           f"not {tuple(xt.shape[-2:])}")
        if not isinstance(t, torch.Tensor):
            t = torch.full((len(xt),), t, device=xt.device)
        temb = time_embedding(t - 1, self.width).to(xt.dtype)  # released weights count from 0
        temb = self.time_embedding.linear_1(temb)
        temb = self.time_embedding.linear_2(F.silu(temb))
        skips = [self.conv_in(F.pixel_unshuffle(xt, self.patch))]
        for scale in self.down_blocks:
            for j in range(len(scale.resnets)):
                skips.append(scale.block(j, skips[-1], temb))
            for downsample in scale.downsamplers:
                skips.append(downsample(skips[-1]))
        h = self.mid_block.resnets[0](skips[-1], temb)
        for attention in self.mid_block.attentions:
            h = attention(h)
        h = self.mid_block.resnets[1](h, temb)
        for scale in self.up_blocks:
            for j in range(len(scale.resnets)):
                h = scale.block(j, torch.cat([h, skips.pop()], dim=1), temb)
            for upsample in scale.upsamplers:
                h = upsample(h)
        h = self.conv_out(F.silu(self.conv_norm_out(h)))
        return F.pixel_shuffle(h, self.patch)


# -- Training --------------------------------------------------------------------------------------

def train_unet(net, images, *, levels, tilt, steps, batch_size, optimizer, lr, ema_decay, seed,
               report, unfinished, checkpoint_seconds=30):
    """Train by Ho et al. 2020, Algorithm 1, on images (N, 3, H, W) in [0, 1]; a checkpoint.

    They draw noise levels evenly (tilt 0). Errors of x0 grow with the noise, so at tilt 1 a level
    of 1..levels is drawn in proportion to its standard deviation: as good an x0 in half the steps.

    The weights are an exponential moving average. Learning rates warm up over 100 steps and fall
    along a half cosine. Every step draws from its own seed, so a run resumed from `unfinished`, a
    file written every `checkpoint_seconds`, ends where an uninterrupted one does."""
    images = images.to(DEVICE)
    likely = (1 - ALPHA_BAR[1:levels + 1]) ** (tilt / 2)
    net.train().requires_grad_(True)
    average = copy.deepcopy(net)
    optimizer = optimizer(net.parameters(), lr)
    parts = dict(net=net, average=average, optimizer=optimizer)
    start, written = 0, time.monotonic()
    if unfinished.exists():
        saved = read(unfinished)
        start = saved.pop("step")
        for name, state in saved.items():
            parts[name].load_state_dict(state)
    for step in range(start, steps):
        torch.manual_seed(seed_of(seed, step))
        warm_up = min(1, (step + 1) / 100)
        optimizer.param_groups[0]["lr"] = lr * warm_up * (1 + math.cos(math.pi * step / steps)) / 2
        x0 = images[torch.randint(len(images), (batch_size,))] * 2 - 1
        flipped = torch.rand(batch_size, 1, 1, 1) < 0.5
        x0 = torch.where(flipped.to(DEVICE), x0.flip(3), x0)
        t = 1 + torch.multinomial(likely, batch_size, replacement=True).to(DEVICE)
        x0, eps = on_device(x0), on_device(torch.randn_like(x0))
        with mixed_precision(DEVICE):
            loss = ddpm_loss(net, x0, t, eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # the average forgets the random weights of its start: its decay grows with the steps
        decay = min(ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)
        report(step + 1, steps, loss=loss.detach())
        if time.monotonic() - written > checkpoint_seconds:
            states = {name: part.state_dict() for name, part in parts.items()}
            save(unfinished, states | dict(step=step + 1))
            written = time.monotonic()
    return dict(config=net.config | dict(max_level=levels), weights=average.state_dict())


# -- Devices, bytes and seeds ----------------------------------------------------------------------

def on_device(images_or_net):
    """Images or a network on the device, laid out as convolutions like them."""
    return images_or_net.to(DEVICE, memory_format=torch.channels_last)


def mixed_precision(device):
    """Within, networks on CUDA compute in bfloat16 where that is safe, many times as fast."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")


def as_bytes(images):
    """Images in [0, 1] as 8 bits, rounded and clipped: 0.4 is 102, 1.2 is 255."""
    return images.mul(255).round_().clamp_(0, 255).byte()


def as_float(images):
    return images / 255


def seed_of(seed, place):
    """A seed for what stands at a place, such as an image or a step, whatever else is drawn."""
    return (seed * 1_000_003 + place) % 2 ** 63


# -- Checkpoints describe themselves: {"config": the constructor's arguments, "weights": state dict}

def said(error):
    """What an exception says, in one line: said(OSError("full")) is "full"."""
    return str(error).partition("\n")[0] or type(error).__name__


@contextmanager
def whole(path):
    """Within, a path to write to, so that a reader sees the old file or the whole new one."""
    partial = Path(path).with_name(f"{os.getpid()}.tmp")
    try:
        yield partial
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:               # torch's word for a full disk
        raise OSError(f"{path}: cannot be written ({said(error)})") from None
    finally:
        partial.unlink(missing_ok=True)


def save(path, checkpoint):
    """torch.save to a file that is whole at any time. Raises OSError if it cannot be written."""
    with whole(path) as partial:
        torch.save(checkpoint, partial)


def read(path):
    """What torch.save wrote to a file, on the CPU, without running any code in it. Raises BadInput
    if it is something else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:                             # torch raises several kinds
        raise BadInput(f"{path}: not a whole file of tensors ({type(error).__name__})") from None


def fit_weights(path, net, weights):
    """Load a state dict. Raises BadInput naming the first key that does not fit."""
    needed = net.state_dict()
    for name in [*needed, *weights]:
        has, needs = [list(state[name].shape) if isinstance(state.get(name), torch.Tensor)
                      else "nothing" for state in (weights, needed)]
        if has != needs:
            raise BadInput(f"{path}: {name} is {has}, expected {needs}")
        if not weights[name].isfinite().all():
            raise BadInput(f"{path}: {name} is not finite")
    net.load_state_dict(weights)


def load(path, architecture=UNet):
    """The network in a checkpoint of `train.py`, for evaluation. Raises BadInput, naming what
    differs, if the file is something else."""
    checkpoint = read(path)
    weights = checkpoint.get("weights") if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict):
        raise BadInput(f"{path}: not a checkpoint of train.py; of weights that others have "
                       "released, `python -m studies.released` makes one")
    try:
        net = architecture(**checkpoint["config"])
    except Exception as error:                             # whatever a stranger's values lead to
        raise BadInput(f"{path}: not the configuration of a {architecture.__name__} "
                       f"({said(error)})") from None
    fit_weights(path, net, weights)
    return net.eval().requires_grad_(False)
