"""Tests, usable as an autograder: each names the function and the property. The whole file takes about a minute on 2 cores.

    python -m pytest                      all
    python -m pytest -k q_sample          the tests of one function
"""
import ast
import copy
import functools
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance

import attacks
import le
import perceptual
import train
import unet
from attacks import EPSILON, classify, crop_flip, find_partner, min_min, noise_step, nt_xent_scores, publish, resample
from le import RELEASED, Sampler, guidance, joint_conditioned_mean, purify
from perceptual import VGG, PerceptualDistance
from unet import ALPHA_BAR, BETA, EMA, T, UNet, ddpm_loss, levels, p_sample, posterior, predict_x0, q_sample, sample, sigma

HERE = Path(__file__).parent
CIFAR10_MINI = HERE.parent / "shared" / "data" / "cifar-10-mini.tar.gz"
TINY = dict(width=8, mults=(1, 2), blocks=1, attention=(), dropout=0.0, patch=2)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def awake(net):
    """The network with every weight random: its zero-initialised convolutions would hide mistakes."""
    for w in net.parameters():
        torch.nn.init.normal_(w, std=w[0].numel() ** -0.5 if w.ndim > 1 else 0.1)
    return net.eval().requires_grad_(False)


def images(n, size=32):
    """n random 8-bit images in [0, 1]."""
    return torch.randint(0, 256, (n, 3, size, size)) / 255


# ---------------------------------------------------------------------------------------------------------------------
# unet.py: schedule

def test_schedule_alpha_bar_is_the_running_product_and_starts_at_one():
    assert ALPHA_BAR[0] == 1 and len(ALPHA_BAR) == T + 1
    for t in (1, 2, 36, T):
        assert math.isclose(ALPHA_BAR[t], math.prod(1 - b.item() for b in BETA[:t]), rel_tol=1e-12)


def test_q_sample_matches_one_step_at_a_time():
    # variance preserving: signal and noise of a chain of single steps add up to Eq. 4
    signal, variance = 1.0, 0.0
    for t in range(1, 37):
        beta = BETA[t - 1].item()
        signal, variance = signal * math.sqrt(1 - beta), variance * (1 - beta) + beta
    one, zero = torch.ones(1, 3, 2, 2, dtype=torch.float64), torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    assert torch.allclose(q_sample(one, 36, zero), one * signal)
    assert torch.allclose(q_sample(zero, 36, one), one * math.sqrt(variance))


def test_q_sample_takes_one_level_per_image():
    x0, eps = torch.randn(3, 3, 4, 4), torch.randn(3, 3, 4, 4)
    mixed = q_sample(x0, torch.tensor([1, 36, 1000]), eps)
    for i, t in enumerate((1, 36, 1000)):
        assert torch.equal(mixed[i:i + 1], q_sample(x0[i:i + 1], t, eps[i:i + 1]))


def test_predict_x0_inverts_q_sample():
    x0, eps = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for t in (1, 36, 500, T):
        assert torch.allclose(predict_x0(q_sample(x0, t, eps), t, eps), x0)


@pytest.mark.parametrize("t, s", [(36, 35), (36, 20), (1000, 999), (500, 1)])
def test_posterior_is_the_product_of_gaussians(t, s):
    # q(x_s | x_t, x_0) is proportional to q(x_t | x_s) q(x_s | x_0): precisions add, precision-weighted means add
    x0, xt = 0.3, -0.7
    alpha = (ALPHA_BAR[t] / ALPHA_BAR[s]).item()
    prior_mean, prior_var = math.sqrt(ALPHA_BAR[s]) * x0, 1 - ALPHA_BAR[s].item()
    like_mean, like_var = xt / math.sqrt(alpha), (1 - alpha) / alpha
    var = 1 / (1 / prior_var + 1 / like_var)
    mean = var * (prior_mean / prior_var + like_mean / like_var)
    got_mean, got_var = posterior(*(torch.full((1, 1, 1, 1), v, dtype=torch.float64) for v in (x0, xt)), t, s)
    assert math.isclose(got_mean, mean, rel_tol=1e-9) and math.isclose(got_var, var, rel_tol=1e-9)


def test_posterior_at_level_zero_is_x0_without_variance():
    x0, xt = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    mean, var = posterior(x0, xt, 5, 0)
    assert torch.allclose(mean, x0, atol=1e-6) and var == 0


def test_sigma_is_noise_to_signal_ratio():
    assert math.isclose(sigma(36), math.sqrt((1 - ALPHA_BAR[36]) / ALPHA_BAR[36]), rel_tol=1e-9) and sigma(0) == 0


# ---------------------------------------------------------------------------------------------------------------------
# unet.py: network, loss, sampling

def test_ddpm_loss_is_zero_for_the_true_noise_and_one_for_none():
    x0, eps = torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(4, 3, 8, 8)
    t = torch.tensor([1, 5, 36, 900])
    assert ddpm_loss(lambda xt, t: eps, x0, t, eps) == 0
    assert torch.isclose(ddpm_loss(lambda xt, t: torch.zeros_like(xt), x0, t, eps), eps.square().mean())


@pytest.mark.parametrize("config", [TINY, dict(width=32, mults=(1, 2, 2), blocks=2, attention=(8,), dropout=0.1, patch=1)])
def test_unet_keeps_the_shape_and_reads_the_level(config):
    net, x = awake(UNet(**config)), torch.randn(2, 3, 32, 48)
    y = net(x, 5)
    assert y.shape == x.shape
    assert torch.equal(y, net(x, torch.tensor([5, 5])))
    assert not torch.allclose(y, net(x, 50), atol=1e-3)


def test_unet_paper_configuration_has_the_released_number_of_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet().parameters()) == 35_746_307


@pytest.mark.parametrize("channels, groups", [(128, 32), (384, 32), (144, 24), (8, 2), (3, 1)])
def test_norm_has_at_most_32_groups_and_never_a_channel_alone(channels, groups):
    assert unet.norm(channels).num_groups == groups


def test_unet_is_fed_t_minus_one():
    net, seen = UNet(**TINY), []
    net.temb.dense[0].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    net(torch.randn(1, 3, 32, 32), 1)
    assert torch.equal(seen[0][0], torch.tensor([0.0] * 4 + [1.0] * 4))  # sin 0 and cos 0: released checkpoints call the first level 0


def test_unet_names_the_sizes_it_takes():
    with pytest.raises(ValueError, match="multiples of 4"):
        UNet(**TINY)(torch.randn(1, 3, 30, 32), 1)


def test_EMA_weighs_the_past_by_its_decay_after_the_ramp():
    net = torch.nn.Linear(1, 1, bias=False)
    ema = EMA(net, 0.5)
    ema.updates = 1000                                     # past the ramp
    before = net.weight.item()
    net.weight.data.fill_(3.0)
    ema.update(net)
    ema.update(net)
    assert math.isclose(ema.weights["weight"].item(), 0.25 * before + 0.75 * 3.0, rel_tol=1e-6)


def test_levels_go_down_from_t_star_to_zero():
    assert levels(36, 36) == list(range(36, -1, -1))
    assert levels(36, 4) == [36, 27, 18, 9, 0]
    for t_star, steps in ((36, 37), (36, 0), (T + 1, 5)):
        with pytest.raises(ValueError, match="steps"):
            levels(t_star, steps)


def test_sample_strided_over_all_levels_is_ancestral_sampling():
    net, xT = awake(UNet(**TINY)).double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.manual_seed(1)
    strided = sample(net, xT, steps=12, t_star=12)
    torch.manual_seed(1)
    x = xT
    for t in range(12, 0, -1):                             # Ho et al. 2020, Algorithm 2, in its own letters
        beta, a, a_before = BETA[t - 1].item(), ALPHA_BAR[t].item(), ALPHA_BAR[t - 1].item()
        x0 = ((x - math.sqrt(1 - a) * net(x, t)) / math.sqrt(a)).clamp(-1, 1)
        mean = math.sqrt(a_before) * beta / (1 - a) * x0 + math.sqrt(1 - beta) * (1 - a_before) / (1 - a) * x
        x = mean + math.sqrt((1 - a_before) / (1 - a) * beta) * torch.randn_like(x)
    assert torch.allclose(strided, x, atol=1e-5)


def test_p_sample_to_level_zero_is_the_clipped_prediction():
    net, xt = awake(UNet(**TINY)), torch.randn(2, 3, 32, 32)
    x0 = predict_x0(xt, 3, net(xt, 3)).clamp(-1, 1)
    assert torch.allclose(p_sample(net, xt, 3, 0, torch.randn_like(xt)), x0, atol=1e-6)


def test_save_load_unet_round_trip_and_refusal(tmp_path):
    net, x = awake(UNet(**TINY)), torch.randn(1, 3, 32, 32)
    unet.save(tmp_path / "u.pt", dict(config=net.config, weights=net.state_dict(), levels=100))
    assert torch.equal(unet.load(tmp_path / "u.pt")(x, 7), net(x, 7)) and unet.load(tmp_path / "u.pt").levels == 100
    torch.save({"something": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt"):
        unet.load(tmp_path / "other.pt")


RELEASED_LIKE = dict(width=128, mults=(1, 1), blocks=1, attention=(16,), dropout=0.1, patch=1)


def in_diffusers_names(weights, attention):
    """Our names as diffusers spells them, written out by hand for two resolutions of one block: (ours, theirs), the decoder upside down."""
    prefixes = [("temb.dense.0", "time_embedding.linear_1"), ("temb.dense.1", "time_embedding.linear_2"), ("norm_out", "conv_norm_out"),
                ("down.0.block", "down_blocks.0.resnets"), ("down.1.block", "down_blocks.1.resnets"), ("down.1.attn", "down_blocks.1.attentions"),
                ("down.0.downsample", "down_blocks.0.downsamplers.0"), ("mid.block_1", "mid_block.resnets.0"), ("mid.block_2", "mid_block.resnets.1"),
                ("mid.attn_1", "mid_block.attentions.0"), ("up.1.block", "up_blocks.0.resnets"), ("up.1.attn", "up_blocks.0.attentions"),
                ("up.1.upsample", "up_blocks.0.upsamplers.0"), ("up.0.block", "up_blocks.1.resnets"), ("conv_in", "conv_in"), ("conv_out", "conv_out")]
    parts = {".temb_proj.": ".time_emb_proj.", ".nin_shortcut.": ".conv_shortcut.", **attention}
    theirs = {}
    for name, w in weights.items():
        ours, start = next((o, t) for o, t in prefixes if name.startswith(o + "."))
        new = start + name[len(ours):]
        if "attentions" in new:
            new = new.replace(".norm.", ".group_norm.")
            w = w.flatten(1) if w.ndim == 4 else w         # 1x1 convolutions are linear layers there
        for a, b in parts.items():
            new = new.replace(a, b)
        theirs[new] = w.clone()
    return theirs


def write_safetensors(path, weights):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, w in weights.items():
        raw = w.contiguous().numpy().tobytes()
        header[name], data = dict(dtype="F32", shape=list(w.shape), data_offsets=[len(data), len(data) + len(raw)]), data + raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("layout", ["released diffusers", "newer diffusers", "safetensors", "port", "port's training state"])
def test_load_unet_reads_released_layouts(tmp_path, layout):
    net, x, path = awake(UNet(**RELEASED_LIKE)), torch.randn(1, 3, 32, 32), tmp_path / "released.bin"
    ours, q = net.state_dict(), [".q.", ".k.", ".v.", ".proj_out."]
    if "port" in layout:
        averaged = {f"module.{name}": w for name, w in ours.items()}
        torch.save(averaged if layout == "port" else [{name: w + 1 for name, w in averaged.items()}, {"state": {}}, 3, 790000, averaged], path)
    else:
        names = [".query.", ".key.", ".value.", ".proj_attn."] if layout == "released diffusers" else [".to_q.", ".to_k.", ".to_v.", ".to_out.0."]
        theirs = in_diffusers_names(ours, dict(zip(q, names)))
        assert not any(".attn" in name for name in theirs)
        if layout == "safetensors":
            write_safetensors(path := tmp_path / "released.safetensors", theirs)
        else:
            torch.save(theirs, path)
    loaded = unet.load(path)
    assert loaded.config == net.config and torch.equal(loaded(x, 7), net(x, 7))


def test_load_unet_names_the_first_key_that_differs(tmp_path):
    weights = UNet(**RELEASED_LIKE).state_dict()
    for change, message in ((lambda w: w.pop("norm_out.weight"), "norm_out.weight is nothing"), (lambda w: w.update(extra=torch.ones(2)), r"extra is \[2\]"),
                            (lambda w: w.update({"mid.block_1.norm1.bias": torch.ones(3)}), r"mid.block_1.norm1.bias is \[3\], expected \[128\]")):
        changed = dict(weights)
        change(changed)
        torch.save(changed, tmp_path / "u.pt")
        with pytest.raises(ValueError, match=message):
            unet.load(tmp_path / "u.pt")


class Malice:
    def __reduce__(self):
        return print, ("this file ran code",)


def test_read_runs_no_code(tmp_path, capsys):
    torch.save({"config": Malice()}, tmp_path / "evil.pt")
    np.save(tmp_path / "evil.npy", np.array([Malice()]), allow_pickle=True)
    (tmp_path / "text.safetensors").write_text("not tensors")
    for name in ("evil.pt", "text.safetensors"):
        with pytest.raises(ValueError, match=name):
            unet.read(tmp_path / name)
    with pytest.raises(le.BadInput, match="evil.npy"):
        le.read_array(tmp_path / "evil.npy")
    assert "ran code" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# perceptual.py

def small_distance(**kwargs):
    return PerceptualDistance(awake(VGG(width=4, convs=(1, 1, 1, 1, 1))), **kwargs)


def test_VGG_defaults_are_the_released_layers():
    with torch.device("meta"):
        vgg = VGG()
    convolutions = [i for i, layer in enumerate(vgg.features) if isinstance(layer, torch.nn.Conv2d)]
    assert convolutions == [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]  # torchvision's features.N
    assert sum(p.numel() for p in vgg.features.parameters()) == 14_714_688
    assert vgg.taps == [3, 8, 15, 22, 29]                  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3, as in LPIPS


def test_VGG_stages_halve_the_resolution():
    maps = VGG(width=4, convs=(1, 1, 1, 1, 1)).stages(images(2))
    assert [tuple(m.shape) for m in maps] == [(2, 4, 32, 32), (2, 8, 16, 16), (2, 16, 8, 8), (2, 32, 4, 4), (2, 32, 2, 2)]


def test_PerceptualDistance_is_zero_on_equal_images_symmetric_and_per_image():
    distance, x, y = small_distance(), images(3), images(3)
    assert torch.equal(distance(x, x), torch.zeros(3))
    assert torch.allclose(distance(x, y), distance(y, x)) and (distance(x, y) > 0).all()
    assert torch.allclose(distance(x, y)[1:2], distance(x[1:2], y[1:2]), atol=1e-6)


def test_PerceptualDistance_by_hand():
    # features stubbed: one map of two channels on two positions, the others empty of difference
    class Stub(torch.nn.Module):
        taps, features = [1], [torch.nn.Conv2d(3, 2, 1)]

        def stages(self, x):
            return [x[:, :2]]
    x = torch.tensor([[[[3.0, 0.0]], [[4.0, 1.0]], [[0.0, 0.0]]]])   # channel vectors (3, 4) and (0, 1)
    y = torch.tensor([[[[5.0, 2.0]], [[0.0, 0.0]], [[0.0, 0.0]]]])   # channel vectors (5, 0) and (2, 0)
    # unit length: (.6, .8) (0, 1) against (1, 0) (1, 0); squared differences (.16, .64) and (1, 1); weights 2 and 3, mean of two positions
    expected = ((2 * 0.16 + 3 * 0.64) + (2 * 1 + 3 * 1)) / 2
    got = PerceptualDistance(Stub(), weights=[torch.tensor([2.0, 3.0])])(x, y)
    assert math.isclose(got.item(), expected, rel_tol=1e-5)


def test_PerceptualDistance_gradient_by_finite_differences():
    distance = small_distance().double()
    x, y = images(1).double().requires_grad_(), images(1).double()
    gradient, = torch.autograd.grad(distance(x, y).sum(), x)
    direction, h = torch.randn_like(x), 1e-6
    with torch.no_grad():
        slope = (distance(x + h * direction, y) - distance(x - h * direction, y)) / (2 * h)
    assert math.isclose(slope.item(), (gradient * direction).sum().item(), rel_tol=1e-3)


def test_PerceptualDistance_gradient_by_hand_is_autograds():
    distance, x, y = small_distance(weights=[torch.rand(c) for c in (4, 8, 16, 32, 32)]).double(), images(2).double().requires_grad_(), images(2).double()
    expected, = torch.autograd.grad(distance(x, y).sum(), x)
    assert torch.allclose(distance.gradient(x.detach(), distance.embed(y)), expected)


def test_LPIPS_weights_must_fit_the_channels():
    with pytest.raises(ValueError, match="weights"):
        small_distance(weights=[torch.ones(3)] * 5)


def test_load_perceptual_reads_torchvisions_vgg16_and_lpips_layers(tmp_path, monkeypatch):
    monkeypatch.setattr(VGG.__init__, "__defaults__", (8, (2, 2, 3, 3, 3), 10))  # VGG-16 with fewer channels: the same names
    vgg, linear = awake(VGG()), [torch.rand(c) for c in (8, 16, 32, 64, 64)]
    torch.save({name: w for name, w in vgg.state_dict().items() if "features" in name} | {"classifier.0.weight": torch.ones(1)}, tmp_path / "vgg16.pth")
    torch.save({f"lin{i}.model.1.weight": w.view(1, -1, 1, 1) for i, w in enumerate(linear)}, tmp_path / "lpips.pth")
    x, y = images(2), images(2)
    assert torch.equal(perceptual.load(tmp_path / "vgg16.pth")(x, y), PerceptualDistance(vgg)(x, y))
    assert torch.equal(perceptual.load(tmp_path / "vgg16.pth", tmp_path / "lpips.pth")(x, y), PerceptualDistance(vgg, linear)(x, y))
    with pytest.raises(ValueError, match="lin0.model.1.weight"):
        perceptual.load(tmp_path / "vgg16.pth", tmp_path / "vgg16.pth")
    with pytest.raises(ValueError, match="features.0.weight"):
        perceptual.load(tmp_path / "lpips.pth")


# ---------------------------------------------------------------------------------------------------------------------
# attacks.py

def test_resample_applies_row_and_column_matrices():
    x = torch.randn(2, 3, 4, 5)
    identity = resample(x, torch.eye(4).expand(2, 4, 4), torch.eye(5).expand(2, 5, 5))
    assert torch.equal(identity, x)
    assert torch.allclose(resample(x, torch.ones(2, 1, 4), torch.ones(2, 1, 5)), x.sum((2, 3), keepdim=True), atol=1e-5)


def test_crop_flip_is_a_shifted_window_of_the_padded_image():
    x = images(64, 8)
    views = crop_flip(x, torch.Generator().manual_seed(0), pad=2)
    windows, shifts = F.pad(x, (2, 2, 2, 2)), set()
    for i in range(64):
        match = [(dy, dx, flip) for dy in range(5) for dx in range(5) for flip in (False, True)
                 if torch.equal(views[i], (w := windows[i, :, dy:dy + 8, dx:dx + 8]).flip(2) if flip else windows[i, :, dy:dy + 8, dx:dx + 8])]
        assert len(match) == 1
        shifts.add(match[0])
    assert len(shifts) > 25                                # of 50: crops and flips vary from image to image


def test_crop_flip_gradient_goes_back_to_the_pixels_in_view():
    x = images(4, 8).requires_grad_()
    ones, = torch.autograd.grad(crop_flip(x, torch.Generator().manual_seed(0)).sum(), x)
    assert set(ones.unique().tolist()) == {0.0, 1.0}       # each pixel is seen once or is outside the crop


@pytest.mark.parametrize("start, length, n_out", [(0.0, 32.0, 32), (3.3, 17.5, 32), (0.0, 32.0, 20), (5.25, 25.0, 20)])
def test_bilinear_is_pillows(start, length, n_out):
    x = torch.rand(32, 32)
    matrix = attacks.bilinear(torch.tensor([start]), torch.tensor([length]), 32, n_out)
    pillow = Image.fromarray(x.numpy()).resize((n_out, n_out), Image.Resampling.BILINEAR, (start, start, start + length, start + length))
    assert torch.allclose(resample(x[None, None], matrix, matrix)[0, 0], torch.from_numpy(np.array(pillow)), atol=1e-5)


def test_random_resized_crop_draws_boxes_of_the_asked_area_and_aspect():
    ramp = torch.arange(32.0) + 0.5                        # an image of coordinates: the view says which box it shows
    x = torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32), torch.ones(32, 32)]).expand(500, -1, -1, -1)
    view = attacks.random_resized_crop(x, torch.Generator().manual_seed(0), 16)
    assert view.shape == (500, 3, 16, 16) and torch.allclose(view[:, 2], torch.ones(500, 16, 16))  # weights of an output pixel add up to one
    width, height = ((view[:, c, 4:12, 4:12].amax((1, 2)) - view[:, c, 4:12, 4:12].amin((1, 2))) * 16 / 7 for c in (0, 1))
    area, aspect = width * height / 1024, width / height
    assert 0.19 < area.min() < 0.25 and 0.85 < area.max() < 1.01 and 0.7 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.4
    assert 0.4 < (view[:, 0, 0, 0] > view[:, 0, 0, -1]).float().mean() < 0.6  # half of them flipped


COLOUR = [("brightness", ImageEnhance.Brightness, 1), ("contrast", ImageEnhance.Contrast, 2), ("saturation", ImageEnhance.Color, 2)]


@pytest.mark.parametrize("name, pillow, levels", COLOUR)
@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_brightness_contrast_saturation_are_pillows(name, pillow, levels, factor):
    x = images(1)
    expected = np.array(pillow(Image.fromarray((x[0] * 255).byte().permute(1, 2, 0).numpy())).enhance(factor))
    got = getattr(attacks, name)(x, torch.full((1, 1, 1, 1), factor))[0].permute(1, 2, 0) * 255
    assert np.abs(got.numpy() - expected).max() <= levels  # Pillow rounds to 8 bits on the way


@pytest.mark.parametrize("turn", [0, 25, -25, 128])
def test_hue_is_pillows(turn):
    x = images(1)
    hsv = np.array(Image.fromarray((x[0] * 255).round().byte().permute(1, 2, 0).numpy()).convert("HSV"))
    hsv[..., 0] += np.uint8(turn % 256)                    # Pillow keeps hue and saturation in 8 bits: compare most pixels closely
    expected = np.array(Image.fromarray(hsv, "HSV").convert("RGB"))
    got = attacks.hue(x, torch.full((1, 1, 1, 1), turn / 256))[0].permute(1, 2, 0) * 255
    assert np.quantile(np.abs(got.numpy() - expected), 0.95) <= 4 and np.abs(got.numpy() - expected).max() <= 12


def test_hue_keeps_value_and_chroma_and_leaves_grey_alone():
    x, grey = images(2), images(2)[:, :1].expand(-1, 3, -1, -1)
    y = attacks.hue(x, torch.rand(2, 1, 1, 1))
    assert torch.allclose(y.amax(1), x.amax(1)) and torch.allclose(y.amin(1), x.amin(1), atol=1e-6)
    assert torch.equal(attacks.hue(grey, torch.rand(2, 1, 1, 1)), grey) and torch.allclose(attacks.hue(x, torch.zeros(1)), x, atol=1e-6)


def test_grayscale_is_pillows_for_a_fifth_of_the_images():
    x = images(400, 4)
    y = attacks.grayscale(x, torch.Generator().manual_seed(0))
    changed = (y != x).flatten(1).any(1)
    i = changed.nonzero()[0, 0]
    expected = np.array(Image.fromarray((x[i] * 255).round().byte().permute(1, 2, 0).numpy()).convert("L"))
    assert 0.15 < changed.float().mean() < 0.25 and np.abs(y[i].numpy() * 255 - expected).max() <= 1


def test_mix_colours_is_linear_around_the_mean_and_differs_from_image_to_image():
    x = images(2).repeat(1, 1, 1, 1)
    mixed = lambda x: attacks.mix_colours(x, torch.Generator().manual_seed(0)) - 0.5
    flat = x.mean((2, 3), keepdim=True)
    assert torch.allclose(mixed(flat + 3 * (x - flat)), 3 * mixed(x), atol=1e-4) and mixed(x).mean((2, 3)).abs().max() < 1e-5
    twins = mixed(x[:1].repeat(2, 1, 1, 1))
    assert not torch.allclose(twins[0], twins[1], atol=0.1)


AUGMENTATIONS = {"random_resized_crop": lambda x, g: attacks.random_resized_crop(x, g, 8), "mix_colours": attacks.mix_colours,
                 "grayscale": attacks.grayscale, "colour_jitter": attacks.colour_jitter, "simclr": attacks.simclr_view, "outline": attacks.outline_view}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_gradient_by_finite_differences(name):
    view = lambda x: AUGMENTATIONS[name](x, torch.Generator().manual_seed(1)).square().sum()
    x = (0.2 + 0.6 * torch.rand(6, 3, 16, 16, dtype=torch.float64)).requires_grad_()
    gradient, = torch.autograd.grad(view(x), x)
    direction, h = torch.randn_like(x), 1e-7
    with torch.no_grad():
        slope = (view(x + h * direction) - view(x - h * direction)) / (2 * h)
    assert gradient.isfinite().all() and math.isclose(slope.item(), (gradient * direction).sum().item(), rel_tol=1e-3)


def test_hue_gradient_is_finite_on_grey():
    x = torch.full((1, 3, 4, 4), 0.5).requires_grad_()
    gradient, = torch.autograd.grad(attacks.hue(x, torch.full((1, 1, 1, 1), 0.1)).sum(), x)
    assert gradient.isfinite().all()


def test_publish_rounds_to_8_bits_within_epsilon():
    x = images(4)
    ue = publish(x, (torch.rand_like(x) * 2 - 1) * EPSILON)
    assert torch.equal((ue * 255).round() / 255, ue) and 0 <= ue.min() and ue.max() <= 1
    assert (ue - x).abs().max() <= EPSILON + 1e-6


def surrogate():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64, 3))


def same(x):
    """The augmentation that changes nothing."""
    return x


def test_noise_step_descends_along_the_sign_of_the_summed_gradient():
    model, x, y, rows = surrogate(), 0.2 + 0.6 * images(6, 8), torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, 1, 0, 0, 1, 1])
    delta, velocity = torch.zeros(3, 3, 8, 8), torch.zeros(3, 3, 8, 8)
    # cross-entropy of a linear model has the gradient W^T (softmax - onehot); nobody wears row 2
    gradient = ((model(x).softmax(1) - F.one_hot(y, 3)) @ model[1].weight).view_as(x)
    expected = -EPSILON / 10 * torch.stack([gradient[rows == r].sum(0).sign() for r in range(3)])
    noise_step(classify(model, y, same), x, torch.arange(6), delta, rows, velocity, EPSILON / 10, EPSILON, 0.0)
    assert torch.allclose(delta, expected, atol=1e-7) and delta[:2].all() and not delta[2].any()


@pytest.mark.parametrize("class_wise", [True, False])
def test_min_min_lowers_the_loss_within_epsilon(class_wise):
    x, y = 0.2 + 0.6 * images(60, 8), torch.arange(60) % 3
    rows = y if class_wise else torch.arange(60)
    model, start = surrogate(), torch.zeros(3 if class_wise else 60, 3, 8, 8)
    delta, history = min_min(model, classify(model, y, same), x, rows, start, rounds=6, batch_size=20, noise_steps=3, momentum=0.5,
                             stop_accuracy=0.99, generator=torch.Generator().manual_seed(0))
    assert delta.shape == start.shape and not start.any()  # the start is not changed
    assert 0.9 * EPSILON < delta.abs().max() <= EPSILON + 1e-7 and delta.min() < 0 < delta.max()
    assert F.cross_entropy(model(x + delta[rows]), y) < 0.5 * F.cross_entropy(model(x), y)
    assert len(history) <= 6 and all(h < 0.99 for h in history[:-1])
    if class_wise:
        published = publish(x, delta[y]) - x
        assert torch.allclose(published[y == 1], published[1].expand(20, -1, -1, -1), atol=1 / 255)


def test_min_min_freezes_the_weights_during_the_noise_step(monkeypatch):
    seen, original = [], attacks.noise_step
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), surrogate())

    def spy(*args):
        before = [w.clone() for w in model.state_dict().values()]
        original(*args)
        seen.append(not model.training and all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values()))
                    and not any(w.requires_grad or w.grad is not None and w.grad_fn for w in model.parameters()))
    monkeypatch.setattr(attacks, "noise_step", spy)
    min_min(model, classify(model, torch.arange(20) % 3, same), images(20, 8), torch.arange(20), torch.zeros(20, 3, 8, 8), rounds=2, batch_size=10)
    assert seen == [True] * 4 and all(w.requires_grad for w in model.parameters())


def test_min_min_stops_at_the_accuracy_asked_for():
    model, zero = surrogate(), torch.zeros(20, dtype=torch.long)
    args = model, classify(model, zero, same), images(20, 8), zero, torch.zeros(1, 3, 8, 8)
    assert len(min_min(*args, rounds=50, stop_accuracy=0.9)[1]) < 50
    assert len(min_min(*args, rounds=3)[1]) == 3


def test_min_min_refuses_a_start_beyond_epsilon_and_rows_that_do_not_fit():
    x, rows, model = images(4, 8), torch.zeros(4, dtype=torch.long), surrogate()
    with pytest.raises(ValueError, match="epsilon"):
        min_min(model, classify(model, rows, same), x, rows, torch.ones(1, 3, 8, 8), rounds=1)
    with pytest.raises(ValueError, match="rows"):
        min_min(model, classify(model, rows, same), x, rows + 1, torch.zeros(1, 3, 8, 8), rounds=1)


def test_nt_xent_scores_by_hand():
    # two images, views at 0 and 90 degrees and at 60 and 90: partners' cosines are 1/2 and 1
    degrees = torch.tensor([0.0, 90.0, 60.0, 90.0]) * math.pi / 180
    z = torch.stack([degrees.cos(), degrees.sin()], 1) * torch.tensor([[1.0], [2.0], [3.0], [4.0]])  # lengths do not count
    scores, partner = nt_xent_scores(z, temperature=0.5)
    assert partner.tolist() == [2, 3, 0, 1] and torch.isneginf(scores.diagonal()).all()
    similar = lambda a, b: math.exp(2 * math.cos((degrees[a] - degrees[b]).item()))
    losses = [-math.log(similar(i, p) / sum(similar(i, k) for k in range(4) if k != i)) for i, p in enumerate([2, 3, 0, 1])]
    assert math.isclose(F.cross_entropy(scores, partner).item(), sum(losses) / 4, rel_tol=1e-5)


def test_nt_xent_scores_gradient_by_finite_differences():
    z, direction, h = torch.randn(8, 5, dtype=torch.float64).requires_grad_(), torch.randn(8, 5, dtype=torch.float64), 1e-6
    loss = lambda z: F.cross_entropy(*nt_xent_scores(z))
    gradient, = torch.autograd.grad(loss(z), z)
    slope = (loss(z + h * direction) - loss(z - h * direction)) / (2 * h)
    assert math.isclose(slope.item(), (gradient * direction).sum().item(), rel_tol=1e-5)
    assert (gradient * z).sum(1).abs().max() < 1e-9        # lengths do not count


def test_find_partner_learns_noise_that_makes_views_agree():
    # views: one half of an 8x8 image or the other. Noise can make the halves of each image alike and unlike the others'
    x, g = 0.4 + 0.2 * images(24, 8), torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32, 16, bias=False))
    view = lambda x: torch.where(torch.rand(len(x), 1, 1, 1, generator=g) < 0.5, x[..., :4], x[..., 4:])
    loss = lambda x: sum(F.cross_entropy(*find_partner(model, view)(x)).item() for _ in range(20)) / 20
    delta, _ = min_min(model, find_partner(model, view), x, torch.arange(24), torch.zeros_like(x), rounds=5, train_batches=1, noise_steps=8, lr=0.01,
                       momentum=0.9, batch_size=24, generator=g)
    assert loss(x + delta) < loss(x) - 0.1 and delta.abs().max() <= EPSILON + 1e-7


# ---------------------------------------------------------------------------------------------------------------------
# le.py

@pytest.fixture(scope="module")
def nets():
    torch.manual_seed(0)
    return awake(UNet(**TINY)), small_distance()


JOINT = Sampler(t_star=12, rounds=2, steps=3, pixel_weight=1e4, perceptual_weight=10.0, switch=6)


# What the distances may see of an image, written another way than in le.py
SEEN = {"colour": lambda x: x, "grey": lambda x: torch.einsum("ij,bjhw->bihw", torch.full((3, 3), 1 / 3, dtype=x.dtype), x)}


@pytest.mark.parametrize("compare", SEEN)
def test_guidance_pixel_is_the_gradient_of_the_mean_squared_difference(compare):
    x, y = torch.randn(2, 3, 8, 8, dtype=torch.float64).requires_grad_(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected, = torch.autograd.grad(7 * (SEEN[compare](x) - SEEN[compare](y)).square().mean((1, 2, 3)).sum(), x)
    got = guidance(x.detach(), y, 20, None, None, Sampler(pixel_weight=7.0, switch=10, compare=compare))
    assert torch.allclose(got, expected)


@pytest.mark.parametrize("compare", SEEN)
def test_guidance_perceptual_is_the_gradient_of_the_distance(nets, compare):
    distance, see = copy.deepcopy(nets[1]).double(), SEEN[compare]
    x, y = (images(2).double() * 2 - 1).requires_grad_(), images(2).double() * 2 - 1
    expected, = torch.autograd.grad(7 * distance(see(x / 2 + 0.5), see(y / 2 + 0.5)).sum(), x)
    got = guidance(x.detach(), y, 10, distance, lambda: distance.embed(see(y / 2 + 0.5)), Sampler(perceptual_weight=7.0, switch=10, compare=compare))
    assert torch.allclose(got, expected)


def test_guidance_switch_and_both_at_once(nets):
    x, y = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    embed = lambda: nets[1].embed(y / 2 + 0.5)
    at = lambda t, **weights: guidance(x, y, t, nets[1], embed, replace(JOINT, **weights))
    pixel, perceptual_ = at(7, perceptual_weight=0.0), at(6, pixel_weight=0.0)
    assert torch.equal(at(7), pixel) and torch.equal(at(6), perceptual_)
    assert torch.allclose(at(7, switch=None), pixel + perceptual_)


def test_joint_conditioned_mean_is_the_mean_of_the_tilted_gaussian():
    # N(mean, var) tilted by exp(-s gradient . x) has mean - var s gradient and the same variance
    mean, var, t, g = torch.tensor(0.3), torch.tensor(0.02), 36, 1.7
    s = math.sqrt((1 - ALPHA_BAR[t]) / ALPHA_BAR[t])
    x = torch.linspace(-3, 3, 200001, dtype=torch.float64)
    density = torch.exp(-(x - mean) ** 2 / (2 * var) - s * g * x)
    assert math.isclose((density * x).sum() / density.sum(), joint_conditioned_mean(mean, var, t, g), abs_tol=1e-6)


def test_joint_conditioned_mean_pulls_no_further_than_a_standard_deviation():
    mean, var = torch.zeros(2), torch.tensor(0.04)
    assert torch.allclose(joint_conditioned_mean(mean, var, 36, torch.tensor([1e6, -1e6])), torch.tensor([-0.2, 0.2]))


def test_purify_is_8_bit_and_leaves_its_input_alone(nets):
    x = images(2)
    before = x.clone()
    y = purify(*nets, x, JOINT)
    assert torch.equal(x, before) and y.shape == x.shape
    assert torch.allclose((y * 255).round(), y * 255, atol=1e-4) and 0 <= y.min() and y.max() <= 1


@pytest.mark.parametrize("target", ["x0", "same", "fresh"])
def test_purify_does_not_depend_on_batch_size(nets, target):
    x, sampler = images(8), replace(JOINT, target=target)
    whole = purify(*nets, x, sampler, batch_size=8)
    for size in (1, 3):
        other = purify(*nets, x, sampler, batch_size=size)
        assert (other - whole).abs().max() < 1.5 / 255 and (other != whole).float().mean() < 1e-3  # a rounding may go either way


def test_purify_draws_by_seed_and_position(nets):
    x = images(1).repeat(2, 1, 1, 1)
    y = purify(*nets, x, JOINT, seed=0)
    assert not torch.equal(y[0], y[1])
    assert torch.equal(y, purify(*nets, x, JOINT, seed=0)) and not torch.equal(y, purify(*nets, x, JOINT, seed=1))


def test_purify_does_not_depend_on_threads(nets):
    x, threads = images(4), torch.get_num_threads()
    y = purify(*nets, x, JOINT)
    try:
        torch.set_num_threads(1)
        assert (purify(*nets, x, JOINT) - y).abs().max() < 1.5 / 255
    finally:
        torch.set_num_threads(threads)


def test_purify_with_zero_weights_is_unguided(nets):
    x, unguided = images(2), replace(JOINT, pixel_weight=0.0, perceptual_weight=0.0)
    y = purify(nets[0], None, x, unguided)
    torch.manual_seed(0)
    for i in range(2):                                     # DiffPure: diffuse, then p_sample down; twice
        g = torch.Generator().manual_seed(i)
        draw = lambda: torch.randn(3, 32, 32, generator=g)[None]
        z = x[i:i + 1] * 2 - 1
        for _ in range(2):
            z = q_sample(z, 12, draw())
            for t, s in ((12, 8), (8, 4), (4, 0)):
                z = p_sample(nets[0], z, t, s, draw())
        assert ((z / 2 + 0.5).clamp(0, 1) - y[i:i + 1]).abs().max() < 1 / 255


def test_purify_guidance_pulls_towards_the_UE(nets):
    x, free = images(4), replace(JOINT, pixel_weight=0.0, perceptual_weight=0.0)
    distance = lambda y: nets[1](x, y).sum()
    y = purify(*nets, x, free)
    assert (purify(*nets, x, replace(free, pixel_weight=3e5, switch=0)) - x).square().mean() < (y - x).square().mean()
    assert distance(purify(*nets, x, replace(free, perceptual_weight=3e3, switch=12))) < distance(y)


def test_purify_computes_only_the_gradient_in_use(nets, monkeypatch):
    calls, stages = [], nets[1].vgg.stages
    monkeypatch.setattr(nets[1].vgg, "stages", lambda x: calls.append(len(x)) or stages(x))
    purify(*nets, images(1), replace(JOINT, rounds=1, t_star=12, steps=4, switch=6))
    assert len(calls) == 2                                 # of the UE, and of the prediction at level 6; 12 and 9 use pixels, 3 has no variance to pull in


def test_RELEASED_preset_pull_matches_the_release():
    # DESIGN: about 1.6e-4 of the pixel difference a step, with batch means over 500
    t = 20
    var = posterior(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), t, t - 1)[1].item()
    pull = var * sigma(t) * RELEASED.pixel_weight * 2 / 3072
    assert 1e-4 < pull < 2e-4


def test_Sampler_and_purify_refuse_what_they_cannot_do(nets):
    for wrong in (dict(steps=500), dict(target="xt"), dict(rounds=0), dict(pixel_weight=-1.0), dict(compare="red")):
        with pytest.raises(ValueError):
            Sampler(**wrong)
    with pytest.raises(ValueError, match="0, 1"):
        purify(*nets, images(1) * 255, JOINT)
    young = copy.deepcopy(nets[0])
    young.levels = 11
    with pytest.raises(ValueError, match="learned the levels up to 11"):
        purify(young, nets[1], images(1), JOINT)


# ---------------------------------------------------------------------------------------------------------------------
# le.py: the user's own files

FEW = ["--t_star", "12", "--steps", "2", "--switch", "6"]


@pytest.fixture
def checkpoints(nets, tmp_path):
    """The options that name two small checkpoints."""
    unet.save(tmp_path / "unet.pt", dict(config=nets[0].config, weights=nets[0].state_dict()))
    unet.save(tmp_path / "vgg.pt", dict(config=nets[1].vgg.config, weights=nets[1].vgg.state_dict()))
    return ["--unet", str(tmp_path / "unet.pt"), "--perceptual", str(tmp_path / "vgg.pt"), *FEW]


def picture(mode, size=(40, 36)):
    """A smooth Pillow image, different in every channel."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    bands = np.stack([3 * x + 60, 255 - 4 * y, 2 * (x + y), 255 * (x > y)], -1).astype(np.uint8)
    rgba = Image.fromarray(bands)
    return rgba.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE) if mode == "P" else rgba.convert(mode)


@pytest.mark.parametrize("length, tile, overlap", [(32, 128, 16), (129, 128, 16), (500, 128, 16), (1000, 64, 8)])
def test_positions_cover_the_length_with_overlap(length, tile, overlap):
    starts = le.positions(length, tile, overlap)
    assert starts[0] == 0 and starts[-1] + tile >= length and starts[-1] == max(0, length - tile)
    assert all(a + tile - b >= overlap for a, b in zip(starts, starts[1:]))


def test_purify_any_keeps_the_size_and_equals_purify_where_it_fits(nets):
    x = images(2, 32)
    assert torch.equal(le.purify_any(*nets, x, JOINT, [5, 6]), purify(*nets, x, JOINT, [5 * 1_000_003, 6 * 1_000_003]))
    for size in ((1, 1), (5, 47), (33, 32)):
        y = le.purify_any(*nets, torch.rand(1, 3, *size), JOINT, [0])
        assert y.shape == (1, 3, *size) and torch.allclose(y * 255, (y * 255).round(), atol=1e-3)


def test_purify_any_blends_tiles_without_seams(nets):
    x = torch.full((1, 3, 80, 80), 0.5)                    # with no diffusion to speak of, a flat image stays flat across tiles
    y = le.purify_any(silent_unet(), None, x, replace(JOINT, t_star=1, steps=1, rounds=1, pixel_weight=0.0, perceptual_weight=0.0), [0], tile=32, overlap=8)
    assert (y - 0.5).abs().max() < 0.06 and y.std() > 0


def silent_unet():
    """A U-Net that predicts no noise: its last convolution starts at zero."""
    return UNet(**TINY).eval().requires_grad_(False)


def test_le_purifies_a_folder_and_keeps_names_modes_and_formats(tmp_path, checkpoints):
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "deep" / "er").mkdir(parents=True)
    picture("RGB").save(source / "a.png")
    picture("RGBA").save(source / "deep" / "b.png")
    picture("L").save(source / "deep" / "er" / "c.bmp")
    picture("LA").save(source / "d.png")
    picture("P").save(source / "e.png")
    picture("RGB", (7, 5)).save(source / "f.webp", lossless=True)
    picture("RGB").save(source / "a.jpg")                  # beside a.png
    exif = Image.Exif()
    exif[0x0112] = 6                                       # to be turned by 90 degrees
    picture("RGB").save(source / "g.jpg", exif=exif)
    (source / "notes.txt").write_text("not an image")
    le.main([str(source), str(out), *checkpoints])
    made = {str(path.relative_to(out)): Image.open(path) for path in sorted(out.rglob("*")) if path.is_file()}
    assert {name: (image.mode, image.size, image.format) for name, image in made.items()} == {
        "a.png": ("RGB", (40, 36), "PNG"), "a.jpg.png": ("RGB", (40, 36), "PNG"), "d.png": ("LA", (40, 36), "PNG"), "e.png": ("RGB", (40, 36), "PNG"),
        "deep/b.png": ("RGBA", (40, 36), "PNG"), "deep/er/c.bmp": ("L", (40, 36), "BMP"), "f.webp": ("RGB", (7, 5), "WEBP"), "g.png": ("RGB", (36, 40), "PNG")}
    assert made["deep/b.png"].getchannel("A").tobytes() == picture("RGBA").getchannel("A").tobytes()
    assert made["a.png"].tobytes() != picture("RGB").tobytes()


def test_le_purifies_one_image_as_it_does_in_a_folder(tmp_path, checkpoints):
    (tmp_path / "in").mkdir()
    picture("RGB").save(tmp_path / "in" / "a.png")
    le.main([str(tmp_path / "in"), str(tmp_path / "out"), *checkpoints])
    le.main([str(tmp_path / "in" / "a.png"), str(tmp_path / "one.png"), *checkpoints])
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "out" / "a.png").read_bytes()


def test_le_restarts_names_what_it_cannot_read_and_does_not_depend_on_order(tmp_path, checkpoints, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in "abc":
        picture("RGB").save(source / f"{name}.png")
    le.main([str(source), str(out), *checkpoints])
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "b.png").unlink()
    (source / "0.png").write_bytes((source / "a.png").read_bytes()[:54])  # cut off
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(source / "deep.png")
    picture("RGB").save(source / "moving.webp", save_all=True, append_images=[picture("RGB").rotate(90)])
    with pytest.raises(SystemExit) as stop:
        le.main([str(source), str(out), *checkpoints])
    said = capsys.readouterr()
    assert "3 files could not be read" in str(stop.value.code) and "2 of 6" in said.out
    assert all(text in said.err for text in ("moving.webp: not a readable image (2 frames", "0.png", "deep.png: mode I;16"))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
def test_le_purifies_an_array_the_same_after_an_interruption(tmp_path, checkpoints, suffix, monkeypatch):
    data, source, out = np.random.default_rng(0).integers(0, 256, (70, 16, 16, 3), dtype=np.uint8), tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    {".npy": lambda: np.save(source, data), ".npz": lambda: np.savez(source, data=data, label=np.arange(70)),
     ".pt": lambda: torch.save(torch.from_numpy(data).permute(0, 3, 1, 2), source)}[suffix]()
    read = lambda: torch.load(out) if suffix == ".pt" else np.load(out)["data"] if suffix == ".npz" else np.load(out)
    le.main([str(source), str(out), *checkpoints])
    whole = read()
    assert whole.shape == ((70, 3, 16, 16) if suffix == ".pt" else data.shape) and str(whole.dtype).endswith("uint8")
    out.unlink()

    def stop(done, total):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(le, "Progress", lambda label: lambda done, total: stop(done, total) if done == 70 else None)
        patch.setattr(le.purify_array, "__defaults__", (64, 0))
        with pytest.raises(SystemExit) as stopped:
            le.main([str(source), str(out), *checkpoints])
    assert stopped.value.code == 130 and not out.exists()
    le.main([str(source), str(out), *checkpoints])
    assert (read() == whole).all() and not list(tmp_path.glob("*.partial"))
    if suffix == ".npz":
        assert (np.load(out)["label"] == np.arange(70)).all()


@pytest.mark.parametrize("wrong, message", [
    (dict(data=np.zeros((4, 3, 8, 8), np.uint8)), r"uint8 \(4, 3, 8, 8\); expected uint8 \(N, H, W, 3\)"),
    (dict(data=np.zeros((4, 8, 8, 3), np.float32)), "float32"),
    (dict(a=np.zeros(1), b=np.zeros(1)), "not a readable .npz"),
])
def test_read_array_says_what_it_found(tmp_path, wrong, message):
    np.savez(tmp_path / "in.npz", **wrong)
    with pytest.raises(le.BadInput, match=message):
        le.read_array(tmp_path / "in.npz")


def test_open_image_refuses_image_bombs(tmp_path, monkeypatch):
    picture("RGB").save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(le.BadInput, match="large.png"):
        le.open_image(tmp_path / "large.png")


def test_download_keeps_only_what_has_the_hash(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"data")
    with pytest.raises(train.BadInput, match="sha256"):
        le.download(source.as_uri(), "0" * 64, tmp_path / "out")
    with pytest.raises(train.BadInput, match="put it at"):
        le.download((tmp_path / "missing").as_uri(), "0" * 64, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    le.download(source.as_uri(), "3a6eb0790f39ac87c94f3856b2dd2c5d110e6811602261a9a923d3bb23adc8b7", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"data"


def test_le_downloads_released_weights_only_when_asked(tmp_path, checkpoints, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    picture("RGB").save(tmp_path / "in" / "a.png")
    asked, released = [], str(tmp_path / "vgg16-397923af.pth")
    monkeypatch.setattr(le, "download", lambda url, sha256, path: asked.append((url, len(sha256))) or Path(path).write_bytes((tmp_path / "vgg.pt").read_bytes()))
    command = [str(tmp_path / "in"), str(tmp_path / "out"), *checkpoints[:2], "--perceptual", released, *FEW]
    with pytest.raises(SystemExit):
        le.main(command)
    assert not asked and released in capsys.readouterr().err
    le.main(command + ["--download"])
    assert asked == [("https://download.pytorch.org/models/vgg16-397923af.pth", 64)] and (tmp_path / "out" / "a.png").exists()


@pytest.mark.parametrize("arguments, message", [
    (["nowhere", "out"], "nowhere: no such file"),
    (["in", "in/out"], "expected a place outside in"),
    (["in", "in"], "expected a place outside in"),
    (["in", "out"], "--unet is missing; `python train.py ddpm"),
    (["in", "out", "--unet", "x.pt"], "--perceptual is missing; `python train.py vgg"),
    (["in", "out", "--unet", "x.pt", "--perceptual", "y.pt"], "x.pt"),
    (["in", "out", "--steps", "0"], "steps"),
    (["in", "out", "--fast"], "--fast"),
    (["in/a.npy", "out.npz"], "both end in"),
    (["in/a.png", "out.jpg"], "or an image and one of .png"),
])
def test_le_refuses_bad_input_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    np.save("in/a.npy", np.zeros((1, 8, 8, 3), np.uint8))
    picture("RGB").save("in/a.png")
    with pytest.raises(SystemExit) as stop:
        le.main(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# train.py: data

def test_shapes_come_from_the_seed_alone_as_8_bit_images():
    x, y = train.shapes(40, seed=3)
    assert x.shape == (40, 3, 32, 32) and torch.equal(y.bincount(), torch.full((10,), 4))
    assert torch.equal((x * 255).round() / 255, x) and 0 <= x.min() and x.max() <= 1 and x.std() > 0.05
    assert torch.equal(train.shapes(40, seed=3)[0], x) and not torch.equal(train.shapes(40, seed=4)[0], x)


@pytest.mark.parametrize("shape", train.SHAPES)
def test_signed_distance_is_negative_inside_and_changes_no_faster_than_a_distance(shape):
    axis = torch.linspace(-1.5, 1.5, 301)
    d = train.signed_distance(shape, torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1))
    slope = torch.stack(torch.gradient(d, spacing=0.01)).norm(dim=0)
    assert 0.05 < (d < 0).float().mean() < 0.4 and d[0, 0] > 0.4
    assert slope.median() > 0.7 and slope.quantile(0.99) < 1.1  # an anti-aliased edge is as wide everywhere


def test_split_data_sets_are_disjoint():
    sets, classes, _ = train.split_data(train.Config(protected=50, unprotected=40, validation=20, test=30))
    assert {name: len(x) for name, (x, _) in sets.items()} == dict(protected=50, unprotected=40, validation=20, test=30)
    assert len({x.numpy().tobytes() for part, _ in sets.values() for x in part}) == 140


def test_split_data_keeps_the_test_batch_of_cifar10_apart(tmp_path):
    files, data = cifar10_files()
    ask = train.Config(data="cifar10", root=write_cifar10(tmp_path / "c.tar.gz", files), protected=50, unprotected=30, validation=20, test=15)
    sets, _, (labels, places) = train.split_data(ask)
    assert torch.equal(sets["test"][1], torch.from_numpy(data[5, :15, 0]).long())
    assert len({x.numpy().tobytes() for part, _ in sets.values() for x in part}) == 115
    everything, _ = train.cifar10(ask.root)
    assert torch.equal(everything[0][places], sets["protected"][0]) and torch.equal(labels, everything[1])
    with pytest.raises(train.BadInput, match="100 images for 51 protected"):
        train.split_data(replace(ask, protected=51))


def cifar10_files(records=20):
    """The official layout in small: {name: bytes}, and the records (6, records, 3073) in them."""
    data = np.random.default_rng(0).integers(0, 256, (6, records, 3073), dtype=np.uint8)
    data[:, :, 0] %= 10
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    return {name: part.tobytes() for name, part in zip(names, data)}, data


def write_cifar10(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("packed", [True, False])
def test_cifar10_reads_planes_and_labels(tmp_path, packed):
    files, data = cifar10_files()
    if packed:
        root = write_cifar10(tmp_path / "c.tar.gz", files)
    else:
        (root := tmp_path / "cifar-10-batches-bin").mkdir()
        for name, content in files.items():
            (root / name).write_bytes(content)
    (x, y), (test_x, test_y) = train.cifar10(root)
    assert x.shape == (100, 3, 32, 32) and test_x.shape == (20, 3, 32, 32)
    record = data[2, 5]                                    # the sixth of the third batch: image 45
    assert y[45] == record[0] and math.isclose(x[45, 1, 3, 7], record[1 + 1024 + 3 * 32 + 7] / 255, rel_tol=1e-6)
    assert torch.equal(test_y, torch.from_numpy(data[5, :, 0]).long())


def test_cifar10_names_the_broken_file(tmp_path):
    files, _ = cifar10_files()
    broken = [("truncated", {"data_batch_2.bin": files["data_batch_2.bin"][:-1]}, "data_batch_2.bin has 61459 bytes"),
              ("mislabelled", {"test_batch.bin": b"\x0b" + files["test_batch.bin"][1:]}, "test_batch.bin has the label 11"),
              ("empty", {"data_batch_5.bin": b""}, "data_batch_5.bin has 0 bytes")]
    for name, change, message in broken:
        with pytest.raises(train.BadInput, match=message):
            train.cifar10(write_cifar10(tmp_path / f"{name}.tar.gz", files | change))
    del files["data_batch_4.bin"]
    with pytest.raises(train.BadInput, match="data_batch_4.bin is missing"):
        train.cifar10(write_cifar10(tmp_path / "missing.tar.gz", files))
    whole = (tmp_path / "missing.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(train.BadInput, match="not a whole tar archive"):
        train.cifar10(tmp_path / "cut.tar.gz")
    with pytest.raises(train.BadInput, match="no such file"):
        train.cifar10(tmp_path / "nowhere.tar.gz")


@pytest.mark.skipif(not CIFAR10_MINI.exists(), reason="no real CIFAR-10 beside the project")
def test_cifar10_reads_real_images():
    (x, y), (test_x, test_y) = train.cifar10(CIFAR10_MINI)
    assert len(x) == 12000 and len(test_x) == 2400 and set(y.tolist()) == set(range(10))
    assert 3 * (x[:, :, 1:] - x[:, :, :-1]).abs().mean() < (x[1:] - x[:-1]).abs().mean()  # photographs: neighbours are alike, strangers not


def class_folders(root, per_class=12, size=(40, 36)):
    for name, colour in (("cat", (200, 30, 30)), ("dog", (30, 30, 200))):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            Image.new("RGB", size, colour).save(root / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    return root


def test_folder_crops_resizes_and_labels(tmp_path):
    x, y, classes = train.folder(class_folders(tmp_path / "pets"), 32)
    assert x.shape == (24, 3, 32, 32) and y.tolist() == [0] * 12 + [1] * 12 and classes == ["cat", "dog"]
    assert (x[0].mean((1, 2)) * 255 - torch.tensor([200, 30, 30])).abs().max() < 3  # JPEG


def test_folder_names_what_it_cannot_use(tmp_path):
    pets = class_folders(tmp_path / "pets")
    (pets / "cat" / "bad.png").write_bytes(b"not an image")
    with pytest.raises(train.BadInput, match="bad.png"):
        train.folder(pets, 32)
    with pytest.raises(train.BadInput, match="at least two"):
        train.folder(pets / "cat", 32)


@pytest.fixture
def owned():
    """Six protected images out of nine, as the arguments of foreign_ues."""
    everything, labels, places = 0.2 + 0.6 * images(9, 32), torch.tensor([2, 0, 1, 1, 0, 2, 0, 1, 2]), torch.tensor([8, 1, 2, 4, 7, 5])
    everything = (everything * 255).round() / 255
    return everything, (everything[places], labels[places], ["a", "b", "c"], (labels, places))


@pytest.mark.parametrize("count", [3, 6, 9])
def test_foreign_ues_reads_perturbations_by_class_by_image_and_of_all_images(tmp_path, owned, count):
    _, (x, y, *rest) = owned
    delta = (torch.rand(count, 3, 32, 32) * 2 - 1) * EPSILON
    torch.save(delta, tmp_path / "perturbation.pt")
    mine = {3: delta[y], 6: delta, 9: delta[rest[1][1]] if count == 9 else None}[count]
    assert torch.equal(train.foreign_ues(tmp_path / "perturbation.pt", x, y, *rest), publish(x, mine))


@pytest.mark.parametrize("kind", [".npy", ".npz", "folder"])
@pytest.mark.parametrize("of_all", [True, False])
def test_foreign_ues_reads_poisoned_images(tmp_path, owned, kind, of_all):
    everything, (x, y, classes, (labels, places)) = owned
    poisoned, of = (everything, labels) if of_all else (x, y)
    data = (poisoned * 255).round().byte().permute(0, 2, 3, 1).numpy()
    path = tmp_path / f"poisoned{kind}"
    if kind == "folder":
        for i, label in enumerate(of):
            (path / classes[label]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(data[i]).save(path / classes[label] / f"{i:03}.png")
    else:
        np.save(path, data) if kind == ".npy" else np.savez(path, data=data, label=of)
    assert torch.allclose(train.foreign_ues(path, x, y, classes, (labels, places)), x)


def test_foreign_ues_says_what_does_not_fit(tmp_path, owned):
    _, args = owned
    for given, message in ((torch.zeros(5, 3, 32, 32), r"5 of them; expected 6 \(the protected images\) or 9 \(all images\) or 3 \(classes\)"),
                           (torch.full((3, 3, 32, 32), 8.0), "up to 8; expected"), (torch.zeros(6, 3, 16, 16), r"\(6, 3, 16, 16\)"),
                           (torch.zeros(6, 3, 32, 32, dtype=torch.uint8), "torch.uint8"), ({"noise": torch.zeros(1)}, "holds a dict")):
        torch.save(given, tmp_path / "perturbation.pt")
        with pytest.raises(train.BadInput, match=message):
            train.foreign_ues(tmp_path / "perturbation.pt", *args)


# ---------------------------------------------------------------------------------------------------------------------
# train.py: training and stages

def test_ResNet_18_has_the_known_number_of_parameters():
    with torch.device("meta"):
        net = train.ResNet((64, 64, 128, 256, 512), 2, (1, 2, 2, 2), 10)
    assert sum(p.numel() for p in net.parameters()) == 11_173_962


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_orthogonal_keeps_the_singular_vectors_and_levels_the_values(shape):
    m = torch.randn(shape, dtype=torch.float64)
    m[0] *= 10
    u, s, v = torch.linalg.svd(m, full_matrices=False)
    made = u.mT @ train.orthogonal(m, iterations=5) @ v.mT
    assert torch.allclose(made, made.diag().diag(), atol=1e-9) and 0.6 < made.diag().min() and made.diag().max() < 1.3 and s.max() > 5 * s.min()


def test_Muon_steps_by_its_rate_along_the_orthogonal_gradient_with_momentum():
    w = torch.nn.Parameter(torch.zeros(4, 2, 3, 3))
    gradients, optimizer = [torch.randn(4, 2, 3, 3) for _ in range(2)], train.Muon([w], lr=0.1, momentum=0.5)
    for w.grad in gradients:
        optimizer.step()
    first, second = 1.5 * gradients[0], gradients[1] + 0.5 * (0.5 * gradients[0] + gradients[1])  # Nesterov: look half a step ahead
    expected = -0.1 * (train.orthogonal(first.flatten(1)) + train.orthogonal(second.flatten(1)))
    assert torch.allclose(w.detach().flatten(1), expected, atol=1e-5)


def test_train_unet_resumed_ends_where_an_uninterrupted_run_does(tmp_path):
    x = images(16)

    def run(partial, stop=None):
        def report(done, total, **values):
            if done == stop:
                raise KeyboardInterrupt
        torch.manual_seed(0)
        return train.train_unet(UNet(**TINY).to(train.DEVICE), x, levels=20, steps=16, batch_size=4, lr=1e-3, muon=0.02, ema_decay=0.9, seed=0,
                                report=report, partial=partial, checkpoint_seconds=0)
    whole = run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", stop=8)
    assert 0 < torch.load(tmp_path / "b", weights_only=True)["step"] < 16
    resumed = run(tmp_path / "b")
    assert all(torch.allclose(whole[name], resumed[name], atol=1e-6) for name in whole)


def test_syntax_sees_code_but_not_comments_and_docstrings():
    one, same, other = ('def f(x):\n    return x + 1\n', '"""Sums."""\ndef f(x):\n    """Adds."""\n    return x + 1  # one\n', 'def f(x):\n    return x + 2\n')
    dump = lambda text: ast.dump(train.syntax(text))
    assert dump(one) == dump(same) != dump(other)


def test_digest_tells_values_tensors_and_functions_apart():
    x = torch.zeros(4)
    different = [(x,), (x + 1,), (x.view(2, 2),), (1,), (2,), ([1], [2]), ([1, 2],), (dict(a=1),), (dict(a=2),), ((),), (train.psnr,), (train.table,), (le,), (unet,)]
    assert len({train.digest(*things) for things in different}) == len(different)
    assert train.digest(x, 1) == train.digest(x.clone(), 1)


SMALL = ["--protected", "60", "--unprotected", "60", "--validation", "20", "--test", "20", "--classifier_epochs", "2", "--resnet_widths", "8,8,8",
         "--resnet_strides", "2,2", "--em_class_rounds", "1", "--em_sample_rounds", "1", "--cp_class_rounds", "1", "--cp_sample_rounds", "1",
         "--simclr_epochs", "1", "--unet_width", "8", "--unet_steps", "20", "--vgg_width", "4",
         "--vgg_epochs", "1"]


def test_main_tells_the_whole_story_and_reuses_it(tmp_path, capsys):
    run = tmp_path / "run"
    train.main(SMALL + ["--out", str(run)])
    first = capsys.readouterr()
    results = json.loads((run / "results.json").read_text())
    assert [row["protection"] for row in results["rows"]] == ["em-class", "em-sample", "cp-class", "cp-sample"]
    assert set(results) == {"data", "seed", "config", "clean", "floor", "rows", "seconds"}
    assert set(results["rows"][0]) == {"protection", "clean", "ue", "le", "recovery", "psnr_ue", "psnr_le"}
    assert all(20 < row["psnr_ue"] < 60 and 0 <= row["le"] <= 100 for row in results["rows"])
    assert "| em-class |" in first.out and all(Image.open(run / f"{name}.png").width > 500 for name in ("figure", "strip", "curves", "confusion"))
    made = {path.name: path.stat().st_mtime_ns for path in run.glob("*.pt")}
    train.main(SMALL + ["--out", str(run)])                # nothing changed, nothing is made again
    assert {path.name: path.stat().st_mtime_ns for path in run.glob("*.pt")} == made
    assert json.loads((run / "results.json").read_text()) == results
    train.main(SMALL + ["--out", str(run), "--vgg_epochs", "2"])  # the perceptual net is made again, its users only if it matters to them
    again = {name for name, stamp in made.items() if (run / name).stat().st_mtime_ns != stamp}
    assert "vgg.pt" in again and not {"ddpm.pt", "em-class.pt", "cp-sample.pt", "classifier-clean.pt", "simclr-clean.pt"} & again


def test_Experiment_purified_gives_each_pass_a_seed_as_purify_does(tmp_path):
    _, _, config = train.parse(["purify", *SMALL, "--unet_steps", "1", "--protected", "4", "--t_star", "20", "--steps", "2", "--out", str(tmp_path / "run")])
    e, ues, sampler = train.Experiment(config), images(4), config.sampler
    one = lambda seed: purify(e.ddpm, e.vgg, ues, sampler, seed)
    made = e.purified("passes", ues, sampler, draws=2, together=torch.cat)["images"]
    assert torch.equal(train.as_float(made), torch.cat([one(0), one(1)]))
    made = e.purified("chain", ues, sampler, sampler)["images"]
    assert torch.equal(train.as_float(made), purify(e.ddpm, e.vgg, one(0), sampler, 1))


def test_Experiment_purified_makes_a_perceptual_distance_only_where_the_sampler_looks_at_it(tmp_path):
    _, _, config = train.parse(["purify", *SMALL, "--unet_steps", "1", "--protected", "4", "--preset", "photographs", "--unet_levels", "200", "--out", str(tmp_path / "run")])
    train.Experiment(config).purified("grey", images(4), config.sampler)
    assert not (tmp_path / "run" / "vgg.pt").exists() and (tmp_path / "run" / "grey.pt").exists()


def test_main_ddpm_prints_how_well_it_denoises(tmp_path, capsys):
    train.main(["ddpm", *SMALL, "--unet_steps", "1", "--unet_lr", "1e-9", "--t_star", "36", "--steps", "2", "--out", str(tmp_path / "run")])
    said = dict((int(t), float(value)) for value, t in re.findall(r"([\d.]+) from t = (\d+)", capsys.readouterr().out))
    assert said.keys() == {36, 18}                         # a fresh U-Net predicts no noise: what is left of it is the noise itself
    for t, value in said.items():
        assert math.isclose(value, -20 * math.log10(sigma(t) / 2), abs_tol=1)


def test_anatomy_of_grey_coloured_slow_and_fast_noise():
    sign = (-1.0) ** torch.arange(32)
    fast, slow, grey, red = (sign[:, None] * sign).expand(1, 3, 32, 32), torch.ones(1, 3, 32, 32), torch.ones(3), torch.tensor([1.0, -1.0, 0.0])
    for pattern, is_slow in ((fast, 0.0), (slow, 1.0)):
        for colour, is_grey in ((grey, 1.0), (red, 0.0)):
            assert np.allclose(train.anatomy(pattern * colour.view(1, 3, 1, 1)), (is_grey, is_slow), atol=0.01)


def test_main_runs_one_stage_on_a_folder(tmp_path, capsys):
    pets = class_folders(tmp_path / "pets")
    train.main(["protect", "--data", str(pets)] + SMALL[8:] + ["--out", str(tmp_path / "run")])
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["cp-class.pt", "cp-sample.pt", "em-class.pt", "em-sample.pt"]
    made = torch.load(tmp_path / "run" / "em-sample.pt", weights_only=True)
    assert made["images"].dtype == torch.uint8 and made["noise"].abs().max() <= EPSILON + 1e-6
    assert capsys.readouterr().out.count("% of the noise's energy is grey") == 4


def test_main_cross_puts_each_protection_before_the_other_victim(tmp_path):
    train.main(["cross", *SMALL, "--out", str(tmp_path / "run")])
    victims = {path.stem for path in (tmp_path / "run").glob("*.pt")}
    assert {"simclr-em-class-ue", "simclr-em-sample-le", "classifier-cp-class-ue", "classifier-cp-sample-le"} <= victims
    assert "classifier-em-class-ue" not in victims and len(json.loads((tmp_path / "run" / "cross.json").read_text())["rows"]) == 4


def test_main_ablation_compares_every_countermeasure_on_validation_images(tmp_path, capsys):
    run, names = tmp_path / "run", lambda questions: list(dict.fromkeys(label for counters in questions.values() for label in counters))
    train.main(["ablation", *SMALL, "--protected", "20", "--protections", "em", "--ablate", "em-class,em-sample", "--classifier_epochs", "1", "--out", str(run)])
    result = json.loads((run / "ablation.json").read_text())
    rows = {row["countermeasure"]: row for row in result["em-class"]["rows"]}
    assert result["evaluate"] == "validation" and list(rows) == names(train.countermeasures(Sampler()) | train.variations(Sampler()))
    assert [row["countermeasure"] for row in result["em-sample"]["rows"]] == names(train.countermeasures(Sampler()))
    assert Image.open(run / "ablation-em-class-target.png").height > 3 * 64 and Image.open(run / "ablation-em-sample-condition.png").height > 4 * 64
    assert rows["none"]["evaluations"] == 0 and rows["none"]["recovery"] in (0, None) and rows["released, 36 levels"]["evaluations"] == 144
    assert rows["joint"]["evaluations"] == 8 and rows["joint, mean of two draws"]["evaluations"] == 16
    assert rows["joint, then a shallow round"]["evaluations"] == 10
    assert "| joint, both throughout |" in capsys.readouterr().out and Image.open(run / "ablation.png").width > 500


def test_main_sweep_shows_what_a_setting_does(tmp_path, capsys):
    run = tmp_path / "run"
    train.main(["victim", *SMALL, "--evaluate", "validation", "--protections", "em", "--out", str(run)])
    train.main(["sweep", *SMALL, "--protections", "em", "--sweep", "epsilon=1,64", "--out", str(run)])
    rows = json.loads((run / "sweep-epsilon.json").read_text())
    assert [(row["epsilon"], row["protection"]) for row in rows] == [(1, "em-class"), (1, "em-sample"), (64, "em-class"), (64, "em-sample")]
    assert "| 64 |" in capsys.readouterr().out and Image.open(run / "sweep-epsilon.png").width > 500
    assert not (run / "epsilon-1" / "classifier-clean.pt").exists()  # the clean victim is the same for both, and there already
    noise = [torch.load(run / f"epsilon-{n}" / "em-sample.pt", weights_only=True)["noise"].abs().max() * 255 for n in (1, 64)]
    assert noise[0] <= 1.001 and 32 < noise[1] <= 64.001


def test_main_bench_prints_rates_and_the_cost_of_guidance(tmp_path, capsys):
    train.main(["bench", *SMALL, "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    work, shares = np.array(re.findall(r"images/s of +([\d.]+) GFLOP, +([\d.]+) % of", said), float).T
    assert len(shares) == 6 and (0 < shares).all() and (shares < 100).all() and "times its 8 network evaluations" in said
    evaluation, purification, training = work[:3]          # a step of training is a pass forward and one back, twice as long
    assert purification > 8 * evaluation and math.isclose(training, 3 * evaluation, rel_tol=0.1)


def test_countermeasures_without_a_network():
    x, g = train.shapes(4, seed=0)[0], torch.Generator().manual_seed(0)
    made = {name: counter(x, g) for name, counter in train.countermeasures(Sampler())["network"].items()}
    assert torch.equal(made["none"], x) and torch.equal(made["grayscale"][:, 0], made["grayscale"][:, 2])
    assert 15 < train.psnr(made["JPEG 10"], x) < 35
    assert math.isclose((made["noise"] - x)[(made["noise"] > 0) & (made["noise"] < 1)].std(), sigma(100) / 2, rel_tol=0.1)


def test_main_judges_a_foreign_perturbation_and_exports_what_comes_of_it(tmp_path, capsys):
    torch.save((torch.rand(10, 3, 32, 32) * 2 - 1) * EPSILON, tmp_path / "perturbation.pt")
    small = SMALL + ["--out", str(tmp_path / "run"), "--perturbation", str(tmp_path / "perturbation.pt")]
    train.main(["victim"] + small)
    assert "| perturbation |" in capsys.readouterr().out
    train.main(["export"] + small)
    made = np.load(tmp_path / "run" / "export" / "perturbation-le.npz")
    files = sorted((tmp_path / "run" / "export" / "perturbation-le").glob("*/*.png"))
    assert made["data"].shape == (60, 32, 32, 3) and len(files) == 60
    i = int(files[7].stem)
    assert (np.array(Image.open(files[7])) == made["data"][i]).all() and files[7].parent.name == train.SHAPES[made["label"][i]]


def torchrun(*arguments, **environment):
    """Run a program of this project by two processes; returns what they said."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, arguments)], cwd=HERE,
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torchrun_main_trains_everything_and_purifies_as_one_process_does(tmp_path):
    run, small = tmp_path / "run", [*SMALL, "--protections", "em", "--protected", "33", "--out", str(tmp_path / "run")]
    assert torchrun("train.py", *small).count("| em-sample |") == 1  # only one of them talks
    made = torch.load(run / "em-sample.pt", weights_only=True)
    changed = (made["images"].float() / 255 - train.shapes(33 + 60 + 40, 0)[0][:33]).abs().amax((1, 2, 3))
    assert len(made["noise"]) == 33 and (changed > 1 / 255).all() and changed.max() <= EPSILON + 1e-6
    both, written = {path: torch.load(path, weights_only=True) for path in run.glob("em-*-le.pt")}, (run / "em-sample.pt").stat().st_mtime_ns
    for path in both:
        path.unlink()
    train.main(["purify", *small])
    assert len(both) == 2 and (run / "em-sample.pt").stat().st_mtime_ns == written  # what two processes made serves one
    for path in both:
        alone = torch.load(path, weights_only=True)
        assert alone["key"] == both[path]["key"] and (alone["images"].int() - both[path]["images"].int()).abs().max() <= 1


def test_torchrun_le_purifies_an_array_as_one_process_does(tmp_path, checkpoints):
    np.save(tmp_path / "in.npy", (images(5).permute(0, 2, 3, 1) * 255).round().byte().numpy())
    files = [str(tmp_path / f"{name}.npy") for name in ("in", "alone", "both")]
    le.main([files[0], files[1], *checkpoints])
    torchrun("le.py", files[0], files[2], *checkpoints)
    assert abs(np.load(files[1]).astype(int) - np.load(files[2])).max() <= 1 and not list(tmp_path.glob("*.partial"))


def test_le_shares_a_folder_among_processes(tmp_path, checkpoints, monkeypatch):
    (tmp_path / "in").mkdir()
    for i in range(5):
        picture("RGB", (32 + i, 32)).save(tmp_path / "in" / f"{i}.png")
    le.main([str(tmp_path / "in"), str(tmp_path / "alone"), *checkpoints])
    monkeypatch.setattr(le, "joined", nullcontext)
    monkeypatch.setattr(le, "barrier", lambda: None)
    monkeypatch.setattr(le, "PROCESSES", 2)
    for rank, count in ((0, 3), (1, 5)):
        monkeypatch.setattr(le, "RANK", rank)
        le.main([str(tmp_path / "in"), str(tmp_path / "both"), *checkpoints])
        assert len(list((tmp_path / "both").iterdir())) == count
    for file in (tmp_path / "alone").iterdir():
        assert (np.array(Image.open(file)) == np.array(Image.open(tmp_path / "both" / file.name))).all()


def test_data_parallel_averages_the_gradients_of_all_processes(tmp_path):
    program = tmp_path / "both.py"
    program.write_text(f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import torch, le, train
with le.joined():
    torch.manual_seed(0)
    net, x = train.data_parallel(torch.nn.Conv2d(3, 4, 3)), torch.randn(6, 3, 8, 8)
    loss = lambda net, x: net(x).square().sum((1, 2, 3)).mean()
    loss(net, le.share(x)).backward()
    alone = torch.nn.Conv2d(3, 4, 3)
    alone.load_state_dict(net.state_dict())
    loss(alone, x).backward()
    assert torch.allclose(net.weight.grad, alone.weight.grad, atol=1e-5) and torch.allclose(net.bias.grad, alone.bias.grad, atol=1e-5)
    assert torch.equal(le.gathered(le.share(x), 6), x)
    assert train.even_share(5).tolist() == [[0, 2, 4], [1, 3, 0]][le.RANK]
    print("averaged")
""")
    assert torchrun(program).split() == ["averaged"]


def test_accelerated_computes_in_bfloat16_and_returns_float32():
    net, x = awake(UNet(**TINY)), torch.randn(2, 3, 32, 32)
    exact = net(x, 5)
    rough = le.accelerated(net, "cpu")(x, 5)
    assert torch.equal(rough, exact)                       # only CUDA is worth it
    autocast = torch.autocast
    with pytest.MonkeyPatch.context() as patch:            # what CUDA would do, on a CPU
        patch.setattr(torch, "autocast", lambda device, kind: autocast("cpu", kind))
        rough = le.accelerated(net, "cuda")(x, 5)
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact) and (rough - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("arguments, message", [
    (["--classifier_epoch", "3"], "--classifier_epoch"),
    (["--classifier_epochs", "many"], "--classifier_epochs"),
    (["evaluate"], "evaluate"),
    (["--evaluate", "train"], "expected test or validation"),
    (["--data", "nowhere"], "expected shapes, cifar10 or an existing folder"),
    (["--data", "cifar10", "--root", "nowhere.tar.gz"], "nowhere.tar.gz: no such file"),
    (["--protected", "0"], "--protected"),
    (["--protections", "em,ps"], "--protections em,ps"),
    (["--simclr_view", "blur"], "--simclr_view blur"),
    (["--em_class_rounds", "0"], "--em_class_rounds"),
    (["--steps", "99", "--t_star", "36"], "steps"),
    (["--t_star", "200"], "--unet_levels"),
    (["sweep", "--sweep", "colour=1,2"], "--sweep colour=1,2"),
    (["sweep", "--sweep", "epsilon=1,x"], "--sweep"),
    (["--config", "napkin"], "--config"),
    (["--resnet_strides", "2,2"], "--resnet_widths"),
    (["--resnet_strides", "2,x"], "--resnet_strides"),
])
def test_main_refuses_bad_input_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and message in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())                    # nothing half-written


def test_parse_lets_options_override_the_preset_of_the_data():
    assert train.parse([])[2] == train.Config()
    ours = train.parse(["--data", "cifar10", "--steps", "7", "--resnet_widths", "8,8,8", "--resnet_strides", "2,2"])[2]
    assert ours.protected == 6000 and ours.resnet_widths == (8, 8, 8) and ours.sampler == replace(le.PHOTOGRAPHS, steps=7)
    assert train.parse(["--data", "cifar10", "--preset", "released", "--switch", "both"])[2].sampler == replace(RELEASED, switch=None)
    assert train.parse(["--data", "a folder"])[2].sampler == le.sampler_from(dict(preset="photographs")) == le.PHOTOGRAPHS


def test_parse_takes_a_default_spelled_out_for_the_default():
    text = lambda value: ",".join(map(str, value)) if isinstance(value, tuple) else value if isinstance(value, str) else f"{value:g}"
    spelled = [f"--{name}={text(value)}" for name, value in vars(train.Config()).items() if name != "sampler"]
    assert repr(train.parse(spelled)[2]) == repr(train.Config())  # 8 and 8.0 would be two stages


def test_parse_config_paper_is_the_papers_protocol():
    c = train.parse(["--data", "cifar10", "--config", "paper", "--limit", "2"])[2]
    with torch.device("meta"):
        victim = train.ResNet(c.resnet_widths, c.resnet_blocks, c.resnet_strides, 10)
        denoiser = UNet(c.unet_width, c.unet_mults, c.unet_blocks, c.unet_attention, c.unet_dropout, c.unet_patch)
    assert [sum(p.numel() for p in net.parameters()) for net in (victim, denoiser)] == [11_173_962, 35_746_307]
    assert (c.protected, c.test, c.unet_steps, c.em_sample_steps, c.classifier_epochs, c.noise_step, c.unet_levels) == (2, 2, 2, 2, 2, 0.1, T)


def test_main_paper_runs_at_toy_size(tmp_path, monkeypatch, capsys):
    """The paper's configuration, its networks made narrower; .ci/run has it whole."""
    monkeypatch.setattr(VGG.__init__, "__defaults__", (4, (2, 2, 3, 3, 3), 10))
    torch.save(awake(VGG()).state_dict(), tmp_path / "vgg16-397923af.pth")
    train.main(["--config", "paper", "--limit", "2", "--resnet_widths", "4,4,8,8,8", "--unet_width", "32", "--vgg_weights", str(tmp_path / "vgg16-397923af.pth"),
                "--lpips", "", "--out", str(tmp_path / "run")])
    assert "| cp-sample |" in capsys.readouterr().out and not (tmp_path / "run" / "vgg.pt").exists()


def test_main_ddpm_goes_on_from_a_checkpoint(tmp_path, capsys):
    small = ["ddpm", *SMALL, "--unet_steps", "1", "--unet_muon", "0", "--unet_lr", "1e-9"]
    train.main([*small, "--seed", "1", "--out", str(tmp_path / "first")])
    train.main([*small, "--unet_start", str(tmp_path / "first" / "ddpm.pt"), "--out", str(tmp_path / "second")])
    first, second = (unet.load(tmp_path / name / "ddpm.pt").state_dict() for name in ("first", "second"))
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)
    with pytest.raises(SystemExit):
        train.main([*small, "--unet_start", str(tmp_path / "none.pt"), "--out", str(tmp_path / "third")])
    assert "none.pt: no such file" in capsys.readouterr().err


def test_main_stops_in_one_line_when_a_loss_is_not_a_number(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["vgg", *SMALL, "--vgg_lr", "1e30", "--vgg_epochs", "4", "--out", str(tmp_path / "run")])
    assert stop.value.code == 2 and "vgg: loss is" in capsys.readouterr().err and not (tmp_path / "run" / "vgg.pt").exists()


def test_main_stops_in_one_line_when_it_may_not_write(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        train.main(["vgg", *SMALL, "--out", str(tmp_path / "file" / "run")])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_readme_commands_are_understood():
    """Every indented or quoted command of the README is one that the programs, and this file, know."""
    text = (HERE / "README.md").read_text()
    start = r"(?:python|torchrun --nproc_per_node=\d+) "
    commands = re.findall(rf"^    {start}(.*)$", text, re.M) + re.findall(rf"`{start}([^`]*)`", text)
    assert len(commands) > 20
    for command in commands:
        program, *arguments = shlex.split(command)
        if program == "train.py":
            train.parse(arguments)
        elif program == "le.py":
            le.parse(arguments)
        else:
            assert arguments[0] == "pytest" and (len(arguments) == 1 or arguments[2] in ASSIGNMENTS), command


def test_readme_counts_the_lines_of_each_file():
    for name, lines in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", (HERE / "README.md").read_text(), re.M):
        assert abs(len((HERE / name).read_text().splitlines()) - int(lines)) <= 10, f"README.md: {name} has other than {lines} lines"


@pytest.mark.parametrize("program", ["train.py", "le.py"])
def test_help_fits_a_screen(program):
    said = subprocess.run([sys.executable, HERE / program, "--help"], capture_output=True, text=True, env=os.environ | {"COLUMNS": "130"}).stdout.splitlines()
    assert len(said) <= 60 and max(map(len, said)) <= 130 and any("default" in line for line in said)


def test_main_interrupted_says_how_to_go_on(tmp_path):
    command = [sys.executable, HERE / "train.py", "ddpm", *SMALL, "--unet_steps", "1000000", "--out", tmp_path / "run"]
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test runner in the background ignores it, and so would its children
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    process.stderr.readline()                              # the first progress line: training is under way
    process.send_signal(signal.SIGINT)
    assert "goes on from here" in process.communicate(timeout=30)[1] and process.returncode == 130


# ---------------------------------------------------------------------------------------------------------------------
# Assignments (see the README): a function whose body is `raise NotImplementedError` fails its own tests with its claim for a message,
# and lets the others wait

ASSIGNMENTS = {"q_sample": unet.q_sample, "posterior": unet.posterior, "ddpm_loss": unet.ddpm_loss, "PerceptualDistance": PerceptualDistance.embed,
               "noise_step": attacks.noise_step, "nt_xent_scores": attacks.nt_xent_scores, "guidance": le.guidance,
               "joint_conditioned_mean": le.joint_conditioned_mean}
# Tests of other things, which would only take time where a function is missing
SLOW = ("main", "data_parallel", "le_", "assignment", "readme", "help", "real", "resumed", "defaults", "released_layouts", "cifar10", "foreign", "signed",
        "shapes")
CLAIMS = {function.__name__: (name, " ".join(function.__doc__.split("\n\n")[0].split())) for name, function in ASSIGNMENTS.items()}


def graded(test):
    """The test, for somebody who is still writing some of the functions."""
    @functools.wraps(test)
    def run(*args, **kwargs):
        try:
            test(*args, **kwargs)
        except NotImplementedError as missing:
            trace = missing.__traceback__
            while trace.tb_next:
                trace = trace.tb_next
            name, claim = CLAIMS.get(trace.tb_frame.f_code.co_name, (None, ""))
            if name is None:
                raise
            if name in test.__name__:
                pytest.fail(f"{name} is yours to write: {claim}", pytrace=False)
            pytest.skip(f"needs {name}")
    return run


def outcomes_without(name):
    """{test: [outcome, what it said]} of this file in a process of its own, where the assignment is still to be written."""
    module, function = sys.modules[ASSIGNMENTS[name].__module__], ASSIGNMENTS[name]
    code = f"""
import json, pytest, torch, {module.__name__}
torch.set_num_threads(1)
def {function.__name__}(*args, **kwargs):
    raise NotImplementedError
{function.__name__}.__doc__ = {module.__name__}.{function.__qualname__}.__doc__
{function.__name__}.__module__ = "{module.__name__}"
{module.__name__}.{function.__qualname__} = {function.__name__}
class Seen:
    tests = {{}}
    def pytest_collection_modifyitems(self, items):        # the slow ones only take time here
        items[:] = [test for test in items if not any(word in test.originalname for word in {SLOW})]
    def pytest_runtest_logreport(self, report):
        if report.when == "call":
            self.tests[report.nodeid.split("::")[1].split("[")[0]] = [report.outcome, str(report.longrepr)]
pytest.main(["-q", "-p", "no:cacheprovider", "{HERE / 'test_le.py'}"], plugins=[Seen()])
print(json.dumps(Seen.tests))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def without():
    """`outcomes_without` every assignment, made by as many processes as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(ASSIGNMENTS, pool.map(outcomes_without, ASSIGNMENTS)))


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_assignment_fails_exactly_its_own_tests(name, without):
    tests = without[name]
    failed = {test for test, (outcome, _) in tests.items() if outcome == "failed"}
    assert failed == {test for test in tests if name in test} and failed
    assert all(f"{name} is yours to write: " in said for test, (_, said) in tests.items() if test in failed)


for _name, _test in [(n, t) for n, t in globals().items() if n.startswith("test_")]:
    globals()[_name] = graded(_test)
