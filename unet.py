"""Denoising diffusion: the forward process, its reversal, and the U-Net of Ho et al. 2020 ("DDPM", arXiv 2006.11239).

Reading order: schedule -> q_sample -> ddpm_loss -> UNet -> p_sample -> sample -> save / load.
Images in this file are in [-1, 1], shape (B, 3, H, W); t counts the noise levels 1..T as in the paper, 0 is "no noise".
"""
import json
import math
import os
import re
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------------------------------------
# The forward process: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps

T = 1000                                                  # noise levels of the full process
BETA = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)  # BETA[t - 1] is the paper's beta_t
# ALPHA_BAR[t] for t = 0..T, so that ALPHA_BAR[0] == 1. Other code stores T values and calls them alphas_cumprod.
ALPHA_BAR = torch.cat([torch.ones(1, dtype=torch.float64), (1 - BETA).cumprod(0)])


@cache
def schedule(device, dtype):
    """ALPHA_BAR, copied to a GPU once, and rounded before that: not every GPU knows float64."""
    return ALPHA_BAR.to(dtype).to(device)


def alpha_bar(t, like):
    """alpha_bar_t as a (B, 1, 1, 1) or (1, 1, 1, 1) tensor that multiplies images `like`; t is an int or a (B,) tensor in 0..T."""
    return schedule(like.device, like.dtype)[t].reshape(-1, 1, 1, 1)


def sigma(t):
    """Noise-to-signal ratio sqrt((1 - alpha_bar_t) / alpha_bar_t) at level t (int), a float: the noise's standard deviation on a [-1, 1] image."""
    return math.sqrt(1 / ALPHA_BAR[t].item() - 1)


def q_sample(x0, t, eps):
    """Diffuse x0 straight to level t with the noise eps (both (B, 3, H, W)): Ho et al. 2020, Eq. 4."""
    a = alpha_bar(t, x0)
    return a.sqrt() * x0 + (1 - a).sqrt() * eps


def predict_x0(xt, t, eps):
    """The x0 whose diffusion to level t with noise eps is xt: the inverse of `q_sample` (Ho et al. 2020, Eq. 15)."""
    a = alpha_bar(t, xt)
    return (xt - (1 - a).sqrt() * eps) / a.sqrt()


def posterior(x0, xt, t, s):
    """Mean (B, 3, H, W) and variance (B or 1, 1, 1, 1) of q(x_s | x_t, x_0) for levels 0 <= s < t.

    Ho et al. 2020, Eq. 6-7 is the case s = t - 1; a larger gap is one stride of a shorter sampler.
    """
    a_t, a_s = alpha_bar(t, xt), alpha_bar(s, xt)
    alpha = a_t / a_s                                      # signal kept between s and t; the paper's alpha_t when s = t - 1
    beta = 1 - alpha
    mean = (a_s.sqrt() * beta * x0 + alpha.sqrt() * (1 - a_s) * xt) / (1 - a_t)
    return mean, (1 - a_s) / (1 - a_t) * beta


def ddpm_loss(unet, x0, t, eps):
    """Mean squared error of the predicted noise, Ho et al. 2020, Eq. 14 (L_simple). x0, eps (B, 3, H, W); t (B,) in 1..T."""
    return F.mse_loss(unet(q_sample(x0, t, eps), t), eps)


# ---------------------------------------------------------------------------------------------------------------------
# The U-Net. Submodules carry the names of the PyTorch port of Ho et al.'s code.

def norm(channels):
    """GroupNorm with 32 groups as in Ho et al., fewer in a narrow network: alone in its group, a channel would lose its time embedding."""
    groups = next(g for g in range(max(1, min(32, channels // 4)), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """norm, swish, conv, + time embedding, norm, swish, dropout, conv, + shortcut. (B, c_in, H, W) -> (B, c_out, H, W)."""

    def __init__(self, c_in, c_out, c_time, dropout):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.temb_proj = nn.Linear(c_time, c_out)
        self.norm2, self.conv2 = norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)
        nn.init.zeros_(self.conv2.weight)                  # every block starts as its shortcut

    def forward(self, x, temb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over the H*W positions, with a shortcut. (B, c, H, W) -> same."""

    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, x):
        q, k, v = (f(h).flatten(2).mT for h in [self.norm(x)] for f in (self.q, self.k, self.v))  # (B, HW, c)
        h = F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))           # TensorFlow's SAME padding, which released weights expect


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def time_embedding(t, width):
    """Sinusoids of the level (B,) -> (B, width), as in Ho et al.: frequencies from 1 down to 1/10000."""
    freq = torch.exp(-math.log(10000) / (width // 2 - 1) * torch.arange(width // 2, device=t.device))
    angle = t.float()[:, None] * freq
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class UNet(nn.Module):
    """Predicts the noise eps in x_t: unet(xt (B, 3, H, W), t int or (B,) in 1..T) -> (B, 3, H, W).

    H and W must be multiples of patch * 2 ** (len(mults) - 1). The defaults are the paper's CIFAR-10 network (35.7 M parameters).
    `patch` > 1 folds patch x patch pixels into channels first, which makes everything after it patch**2 times cheaper.
    """

    def __init__(self, width=128, mults=(1, 2, 2, 2), blocks=2, attention=(16,), dropout=0.1, patch=1, size=32):
        super().__init__()
        self.config = dict(width=width, mults=tuple(mults), blocks=blocks, attention=tuple(attention), dropout=dropout, patch=patch, size=size)
        self.width, self.patch, self.multiple = width, patch, patch * 2 ** (len(mults) - 1)
        self.levels = T                                    # noise levels that it has learned: 1..levels
        colours, resolution, c_time = 3 * patch ** 2, size // patch, 4 * width
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(width, c_time), nn.Linear(c_time, c_time)])
        self.conv_in = nn.Conv2d(colours, width, 3, padding=1)
        level = lambda: nn.ModuleDict(dict(block=nn.ModuleList(), attn=nn.ModuleList()))
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        c, skips = width, [width]
        for i, m in enumerate(mults):
            self.down.append(level())
            for _ in range(blocks):
                self.down[i].block.append(ResnetBlock(c, m * width, c_time, dropout))
                c = m * width
                if resolution in attention:
                    self.down[i].attn.append(AttnBlock(c))
                skips.append(c)
            if i < len(mults) - 1:
                self.down[i].downsample, resolution = Downsample(c), resolution // 2
                skips.append(c)
        self.mid = nn.ModuleDict(dict(block_1=ResnetBlock(c, c, c_time, dropout), attn_1=AttnBlock(c) if attention else nn.Identity(),
                                      block_2=ResnetBlock(c, c, c_time, dropout)))
        for i, m in reversed(list(enumerate(mults))):
            self.up.insert(0, level())                     # up[i] works at the resolution of down[i]
            for _ in range(blocks + 1):
                self.up[0].block.append(ResnetBlock(c + skips.pop(), m * width, c_time, dropout))
                c = m * width
                if resolution in attention:
                    self.up[0].attn.append(AttnBlock(c))
            if i > 0:
                self.up[0].upsample, resolution = Upsample(c), resolution * 2
        self.norm_out, self.conv_out = norm(c), nn.Conv2d(c, colours, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, xt, t):
        if xt.shape[-1] % self.multiple or xt.shape[-2] % self.multiple:
            raise ValueError(f"this U-Net takes images whose sides are multiples of {self.multiple}, not {tuple(xt.shape[-2:])}")
        t = t if isinstance(t, torch.Tensor) else torch.full((len(xt),), t, device=xt.device)
        temb = time_embedding(t - 1, self.width).to(xt.dtype)  # released checkpoints count the levels from 0
        temb = self.temb.dense[1](F.silu(self.temb.dense[0](temb)))
        stage = lambda level, j, h: level.attn[j](level.block[j](h, temb)) if level.attn else level.block[j](h, temb)
        h = self.conv_in(F.pixel_unshuffle(xt, self.patch))
        skips = [h]
        for level in self.down:
            for j in range(len(level.block)):
                skips.append(stage(level, j, skips[-1]))
            if "downsample" in level:
                skips.append(level.downsample(skips[-1]))
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(skips[-1], temb)), temb)
        for level in reversed(self.up):
            for j in range(len(level.block)):
                h = stage(level, j, torch.cat([h, skips.pop()], dim=1))
            if "upsample" in level:
                h = level.upsample(h)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch)


class EMA:
    """Exponential moving average of a network's weights: the network that one samples from (Ho et al. 2020, decay 0.9999).

    The decay ramps up as (1 + k) / (10 + k) over the updates k, so that a short training is not an average with its own start.
    """

    def __init__(self, net, decay):
        self.decay, self.updates = decay, 0
        self.weights = {name: w.detach().clone() for name, w in net.state_dict().items()}

    @torch.no_grad()
    def update(self, net):
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, w in net.state_dict().items():
            self.weights[name].lerp_(w, 1 - decay)


# ---------------------------------------------------------------------------------------------------------------------
# The reverse process

def levels(t_star, steps):
    """The levels that a sampler of `steps` strides visits, from t_star down to 0: steps + 1 ints, as evenly spaced as they come."""
    if not 1 <= steps <= t_star <= T:
        raise ValueError(f"need 1 <= steps <= t_star <= {T}, got steps = {steps} and t_star = {t_star}")
    return [round(t_star * (steps - i) / steps) for i in range(steps + 1)]


def p_sample(unet, xt, t, s, noise):
    """One stride of the reverse process, x_t -> x_s (Ho et al. 2020, Algorithm 2, with x0 clipped to [-1, 1]).

    t, s are ints, 0 <= s < t; noise (B, 3, H, W) is standard normal and has no effect at s = 0, where the variance is 0.
    """
    x0 = predict_x0(xt, t, unet(xt, t)).clamp(-1, 1)
    mean, var = posterior(x0, xt, t, s)
    return mean + var.sqrt() * noise


@torch.no_grad()
def sample(unet, xT, steps=T, t_star=T):
    """New images from noise xT (B, 3, H, W) at level t_star: ancestral sampling, or strided when steps < t_star."""
    xt, visited = xT, levels(t_star, steps)
    for t, s in zip(visited, visited[1:]):
        xt = p_sample(unet, xt, t, s, torch.randn_like(xt))
    return xt


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints describe themselves: {"config": the constructor's arguments, "weights": state dict}

def save(path, checkpoint):
    """Write a checkpoint so that a reader sees the old file or the whole new one, never half of it."""
    torch.save(checkpoint, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def read(path, device="cpu"):
    """What torch.save or safetensors wrote to a file, without running any code in it. Raises ValueError if it is neither."""
    try:
        if str(path).endswith(".safetensors"):
            with open(path, "rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
                data = bytearray(file.read())
            header.pop("__metadata__", None)
            kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
            return {name: torch.frombuffer(data, dtype=kinds[h["dtype"]], offset=h["data_offsets"][0], count=math.prod(h["shape"]))
                    .view(h["shape"]).float().to(device) for name, h in header.items()}
        return torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:                             # torch and json each have several for a file that is not theirs
        raise ValueError(f"{path}: not a checkpoint that can be read safely ({(str(error) or type(error).__name__).splitlines()[0]})") from None


# Regular expressions from diffusers' names to ours; "query" and its like in the released file, "to_q" in newer ones
DIFFUSERS = [(r"time_embedding\.linear_(1|2)", lambda m: f"temb.dense.{int(m[1]) - 1}"), (r"conv_norm_out", "norm_out"),
             (r"(down|up)_blocks\.(\d+)\.resnets", r"\1.\2.block"), (r"(down|up)_blocks\.(\d+)\.attentions", r"\1.\2.attn"),
             (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"), (r"up_blocks\.(\d+)\.upsamplers\.0", r"up.\1.upsample"),
             (r"mid_block\.resnets\.(0|1)", lambda m: f"mid.block_{int(m[1]) + 1}"), (r"mid_block\.attentions\.0", "mid.attn_1"),
             (r"time_emb_proj", "temb_proj"), (r"conv_shortcut", "nin_shortcut"), (r"group_norm", "norm"),
             (r"\.(?:to_q|query)\.", ".q."), (r"\.(?:to_k|key)\.", ".k."), (r"\.(?:to_v|value)\.", ".v."), (r"\.(?:to_out\.0|proj_attn)\.", ".proj_out.")]


def from_diffusers(weights):
    """The weights of diffusers' UNet2DModel under our names: its decoder counts from the coarsest level, its attention is linear layers."""
    top, ours = max(int(name.split(".")[1]) for name in weights if name.startswith("up_blocks.")), {}
    for name, w in weights.items():
        for pattern, new in DIFFUSERS:
            name = re.sub(pattern, new, name)
        name = re.sub(r"^up\.(\d+)", lambda m: f"up.{top - int(m[1])}", name)
        ours[name] = w[:, :, None, None] if re.search(r"attn.*\.(q|k|v|proj_out)\.weight", name) else w
    return ours


def infer_config(weights):
    """The constructor's arguments of the U-Net for 32x32 images that has these weights."""
    width, colours = weights["conv_in.weight"].shape[:2]
    patch, down = math.isqrt(colours // 3), [name for name in weights if name.startswith("down.")]
    first = lambda i: weights[f"down.{i}.block.0.conv1.weight"]
    levels = 1 + max(int(name.split(".")[1]) for name in down)
    return dict(width=width, mults=[len(first(i)) // width for i in range(levels)], patch=patch, size=32, dropout=0.1,
                blocks=1 + max(int(name.split(".")[3]) for name in down if name.startswith("down.0.block.")),
                attention=[32 // patch // 2 ** i for i in range(levels) if f"down.{i}.attn.0.q.weight" in weights])


def load(path, device="cpu"):
    """The U-Net in a checkpoint, in evaluation mode, recognised by its keys:

    ours            {"config", "weights", "levels"}, of `train.py ddpm`
    diffusers       the weights of a UNet2DModel such as google/ddpm-cifar10-32, .bin or .safetensors
    the PyTorch     port of Ho et al., for which the paper's authors released theirs: a state dict, or a list that begins
                    with one, its names after "module.", and ends with the averaged (EMA) weights, which are taken
    Raises ValueError if the file is something else, naming the first key that differs.
    """
    weights, known = read(path, device), T
    if isinstance(weights, list) and weights:
        weights = weights[0] | weights[-1]                 # the average lacks buffers, if there are any
    if not isinstance(weights, dict):
        raise ValueError(f"{path}: holds a {type(weights).__name__}, expected the weights of a U-Net")
    if {"config", "weights"} <= set(weights):
        config, weights, known = weights["config"], weights["weights"], weights.get("levels", T)
    else:
        weights = {str(name).removeprefix("module."): w for name, w in weights.items()}
        if "down_blocks.0.resnets.0.conv1.weight" in weights:
            weights = from_diffusers(weights)
        try:
            config = infer_config(weights)
        except (KeyError, ValueError, IndexError):
            raise ValueError(f"{path}: not a U-Net checkpoint; expected the keys config and weights, or diffusers' or the PyTorch port's names") from None
        if config["width"] < 128:
            raise ValueError(f"{path}: {config['width']} channels wide; others' networks are read from 128 up, where ours has as many groups in its norms")
    unet = UNet(**config).to(device)
    unet.levels = known
    fit_weights(path, unet, weights)
    return unet.eval().requires_grad_(False)


def fit_weights(path, net, weights):
    """Load a state dict. Raises ValueError naming the first key that is missing, unknown or of another shape."""
    own = net.state_dict()
    for name in [*own, *weights]:
        has, needs = (list(d[name].shape) if name in d else "nothing" for d in (weights, own))
        if has != needs:
            raise ValueError(f"{path}: {name} is {has}, expected {needs}")
    net.load_state_dict(weights)
