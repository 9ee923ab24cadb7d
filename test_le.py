"""Tests, usable as an autograder: each names the function and the property. Two minutes.

    python -m pytest                      all
    python -m pytest -k q_sample          the tests of one function
"""
import copy
import functools
import importlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from torch import nn

import attacks
import le
import perceptual
import train
import unet
from attacks import (EPSILON, PROTECTIONS, VICTIMS, Protection, ResNet, Victim,
                     class_scores, crop_flip, fit, min_min, noise_step, nt_xent_scores,
                     partner_scores, publish)
from le import BadInput, Sampler, guidance, joint_conditioned_mean, purify
from perceptual import VGG, PerceptualDistance
from unet import (ALPHA_BAR, BETA, T, UNet, ddpm_loss, p_sample, posterior, predict_x0, q_sample,
                  sample, sigma, visited_levels)

HERE = Path(__file__).parent
pytest_plugins = "studies.grading"
torch.set_num_threads(1)              # what is computed here is so small that a second one waits
TINY = dict(width=8, mults=(1, 2), blocks=1, attention=(), dropout=0.0, patch=2)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def awake(net):
    """The network with every weight random: zero-initialised convolutions would hide mistakes."""
    for w in net.parameters():
        torch.nn.init.normal_(w, std=w[0].numel() ** -0.5 if w.ndim > 1 else 0.1)
    return net.eval().requires_grad_(False)


def images(n, size=32):
    """n random 8-bit images in [0, 1]."""
    return torch.randint(0, 256, (n, 3, size, size)) / 255


def close(actual, expected, atol=1e-8):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=atol)


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def refusal(main, arguments, capsys, code=2):
    """What a program says on stderr as it stops."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == code
    return capsys.readouterr().err


def slope_and_gradient(function, x, h=1e-6):
    """The derivative of a scalar function along a random direction: measured, and by autograd."""
    x = x.detach().requires_grad_()
    gradient, = torch.autograd.grad(function(x), x)
    direction = torch.randn_like(x)
    with torch.no_grad():
        slope = (function(x + h * direction) - function(x - h * direction)) / (2 * h)
    assert gradient.isfinite().all()
    return slope.item(), (gradient * direction).sum().item()


# -- unet.py: schedule -----------------------------------------------------------------------------

def test_schedule_alpha_bar_is_the_running_product_and_starts_at_one():
    assert ALPHA_BAR[0] == 1 and len(ALPHA_BAR) == T + 1
    for t in (1, 2, 36, T):
        product = math.prod(1 - beta.item() for beta in BETA[:t])
        assert math.isclose(ALPHA_BAR[t], product, rel_tol=1e-12)
        assert math.isclose(sigma(t), math.sqrt((1 - product) / product), rel_tol=1e-9)


def test_q_sample_matches_one_step_at_a_time():
    # variance preserving: signal and noise of a chain of single steps add up to Eq. 4
    signal, variance = 1.0, 0.0
    for t in range(1, 37):
        beta = BETA[t - 1].item()
        signal, variance = signal * math.sqrt(1 - beta), variance * (1 - beta) + beta
    one, zero = torch.ones(1, 3, 2, 2).double(), torch.zeros(1, 3, 2, 2).double()
    close(q_sample(one, 36, zero), one * signal)
    close(q_sample(zero, 36, one), one * math.sqrt(variance))


def test_q_sample_takes_one_level_per_image():
    x0, eps = torch.randn(3, 3, 4, 4), torch.randn(3, 3, 4, 4)
    mixed = q_sample(x0, torch.tensor([1, 36, 1000]), eps)
    for i, t in enumerate((1, 36, 1000)):
        same(mixed[i:i + 1], q_sample(x0[i:i + 1], t, eps[i:i + 1]))


def test_predict_x0_inverts_q_sample():
    x0, eps = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    for t in (1, 36, 500, T):
        close(predict_x0(q_sample(x0, t, eps), t, eps), x0)


@pytest.mark.parametrize("t, s", [(36, 35), (36, 20), (1000, 999), (500, 1)])
def test_posterior_is_the_product_of_gaussians(t, s):
    # q(x_s | x_t, x_0) is proportional to q(x_t | x_s) q(x_s | x_0): precisions add
    x0, xt = 0.3, -0.7
    alpha = (ALPHA_BAR[t] / ALPHA_BAR[s]).item()
    prior_mean, prior_var = math.sqrt(ALPHA_BAR[s]) * x0, 1 - ALPHA_BAR[s].item()
    like_mean, like_var = xt / math.sqrt(alpha), (1 - alpha) / alpha
    var = 1 / (1 / prior_var + 1 / like_var)
    mean = var * (prior_mean / prior_var + like_mean / like_var)
    one = torch.ones(1, 1, 1, 1).double()
    got_mean, got_var = posterior(x0 * one, xt * one, t, s)
    assert math.isclose(got_mean, mean, rel_tol=1e-9)
    assert math.isclose(got_var, var, rel_tol=1e-9)


def test_posterior_at_level_zero_is_x0_without_variance():
    x0, xt = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    mean, var = posterior(x0, xt, 5, 0)
    assert torch.allclose(mean, x0, atol=1e-6) and var == 0


# -- unet.py: network, loss, sampling --------------------------------------------------------------

def test_ddpm_loss_is_zero_for_the_true_noise_and_one_for_none():
    x0, eps = torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(4, 3, 8, 8)
    t = torch.tensor([1, 5, 36, 900])
    assert ddpm_loss(lambda xt, t: eps, x0, t, eps) == 0
    nothing = ddpm_loss(lambda xt, t: torch.zeros_like(xt), x0, t, eps)
    assert torch.isclose(nothing, eps.square().mean())


def test_ddpm_loss_shows_the_network_the_diffused_images_and_their_levels():
    x0, eps = torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(4, 3, 8, 8)
    t, seen = torch.tensor([1, 5, 36, 900]), []
    ddpm_loss(lambda xt, t: seen.append((xt, t)) or eps, x0, t, eps)
    [(xt, level)] = seen
    assert torch.allclose(xt, q_sample(x0, t, eps)) and torch.equal(level, t)


WITH_ATTENTION = dict(width=32, mults=(1, 2, 2), blocks=2, attention=(8,), dropout=0.1, patch=1)


@pytest.mark.parametrize("config", [TINY, WITH_ATTENTION])
def test_UNet_keeps_the_shape_and_reads_the_level(config):
    net, x = awake(UNet(**config)), torch.randn(2, 3, 32, 48)
    y = net(x, 5)
    assert y.shape == x.shape
    same(y, net(x, torch.tensor([5, 5])))
    assert not torch.allclose(y, net(x, 50), atol=1e-3)


# Some of the keys of google/ddpm-cifar10-32's diffusion_pytorch_model.bin, and their shapes
RELEASED_KEYS = {
    "conv_in.weight": (128, 3, 3, 3), "time_embedding.linear_1.weight": (512, 128),
    "down_blocks.0.resnets.1.time_emb_proj.weight": (128, 512),
    "down_blocks.0.downsamplers.0.conv.weight": (128, 128, 3, 3),
    "down_blocks.1.resnets.0.conv_shortcut.weight": (256, 128, 1, 1),
    "down_blocks.1.attentions.1.query.weight": (256, 256),
    "mid_block.attentions.0.proj_attn.bias": (256,), "up_blocks.0.upsamplers.0.conv.bias": (256,),
    "up_blocks.0.resnets.2.conv1.weight": (256, 512, 3, 3), "conv_norm_out.weight": (128,)}


def test_UNet_defaults_are_the_released_network():
    with torch.device("meta"):
        weights = {name: tuple(w.shape) for name, w in UNet().state_dict().items()}
    assert {name: weights.get(name) for name in RELEASED_KEYS} == RELEASED_KEYS
    assert sum(map(math.prod, weights.values())) == 35_746_307


@pytest.mark.parametrize("channels, groups", [(128, 32), (384, 32), (144, 24), (8, 2), (3, 1)])
def test_norm_has_at_most_32_groups_and_never_a_channel_alone(channels, groups):
    assert unet.norm(channels).num_groups == groups


def test_UNet_is_fed_t_minus_one():
    net, seen = UNet(**TINY), []
    net.time_embedding.linear_1.register_forward_hook(lambda layer, args, _: seen.append(args[0]))
    net(torch.randn(1, 3, 32, 32), 1)
    # sin 0 and cos 0: released checkpoints call the first level 0
    same(seen[0][0], torch.tensor([0.0] * 4 + [1.0] * 4))


def test_UNet_names_the_sizes_it_takes():
    with pytest.raises(BadInput, match="multiples of 4"):
        UNet(**TINY)(torch.randn(1, 3, 30, 32), 1)


def test_visited_levels_go_down_from_t_star_to_zero():
    assert visited_levels(36, 36) == list(range(36, -1, -1))
    assert visited_levels(36, 4) == [36, 27, 18, 9, 0]
    for t_star, steps in ((36, 37), (36, 0), (T + 1, 5)):
        with pytest.raises(BadInput, match="steps"):
            visited_levels(t_star, steps)


def test_sample_strided_over_all_levels_is_ancestral_sampling():
    net, xT = awake(UNet(**TINY)).double(), torch.randn(2, 3, 32, 32).double()
    torch.manual_seed(1)
    strided = sample(net, xT, steps=12, t_star=12)
    torch.manual_seed(1)
    x = xT
    for t in range(12, 0, -1):                             # Ho et al. 2020, Algorithm 2
        beta, a, a_before = BETA[t - 1].item(), ALPHA_BAR[t].item(), ALPHA_BAR[t - 1].item()
        x0 = ((x - math.sqrt(1 - a) * net(x, t)) / math.sqrt(a)).clamp(-1, 1)
        mean = math.sqrt(a_before) * beta / (1 - a) * x0
        mean = mean + math.sqrt(1 - beta) * (1 - a_before) / (1 - a) * x
        x = mean + math.sqrt((1 - a_before) / (1 - a) * beta) * torch.randn_like(x)
    close(strided, x, atol=1e-5)


@pytest.mark.parametrize("t, s", [(36, 35), (500, 20), (5, 0)])
def test_ddim_keeps_the_noise_and_its_variance_is_none(t, s):
    x0, eps = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    mean, var = unet.ddim(x0, q_sample(x0, t, eps), t, s)
    close(mean, q_sample(x0, s, eps))
    assert (var == 0).all()


def test_ddim_of_a_perfect_network_takes_any_strides_to_the_same_image():
    x0, eps = torch.rand(2, 3, 4, 4).double() * 2 - 1, torch.randn(2, 3, 4, 4).double()

    def perfect(xt, t):
        return (xt - ALPHA_BAR[t].sqrt() * x0) / (1 - ALPHA_BAR[t]).sqrt()
    for steps in (1, 3, 50):
        close(sample(perfect, q_sample(x0, 50, eps), steps, 50, unet.ddim), x0)


def test_p_sample_to_level_zero_is_the_clipped_prediction():
    net, xt = awake(UNet(**TINY)), torch.randn(2, 3, 32, 32)
    x0 = predict_x0(xt, 3, net(xt, 3)).clamp(-1, 1)
    close(p_sample(net, xt, 3, 0, torch.randn_like(xt)), x0, atol=1e-6)


def checkpoint(net):
    return dict(config=net.config, weights=net.state_dict())


def test_save_load_unet_round_trip(tmp_path):
    net, x = awake(UNet(**TINY)), torch.randn(1, 3, 32, 32)
    net.config["max_level"] = 100
    unet.save(tmp_path / "u.pt", checkpoint(net))
    loaded = unet.load(tmp_path / "u.pt")
    assert torch.equal(loaded(x, 7), net(x, 7)) and loaded.max_level == 100
    assert [path.name for path in tmp_path.iterdir()] == ["u.pt"]


def test_load_unet_reads_bare_weights_of_the_released_layout(tmp_path, monkeypatch):
    defaults = (8, (1, 2), 1, (16,), 0.0, 2, 32, T)        # a small network for the paper's
    monkeypatch.setattr(UNet.__init__, "__defaults__", defaults)
    net, x = awake(UNet()), torch.randn(1, 3, 32, 32)
    torch.save(net.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    same(unet.load(tmp_path / "diffusion_pytorch_model.bin")(x, 7), net(x, 7))


def test_load_unet_reads_diffusers_names_of_today_and_refuses_other_settings(
        tmp_path, monkeypatch, capsys):
    defaults = (8, (1, 2), 1, (16,), 0.0, 2, 32, T)
    monkeypatch.setattr(UNet.__init__, "__defaults__", defaults)
    net, x, file = awake(UNet()), torch.randn(1, 3, 32, 32), tmp_path / "weights.bin"
    weights = net.state_dict()
    for ours, theirs in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"),
                         ("proj_attn", "to_out.0")):
        weights = {name.replace(f".{ours}.", f".{theirs}."): w for name, w in weights.items()}
    torch.save(weights, file)
    same(unet.load(file)(x, 7), net(x, 7))
    assert "no config.json beside it" in capsys.readouterr().out
    config = {name: ours for name, (ours, _) in unet.SETTINGS.items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    same(unet.load(file)(x, 7), net(x, 7))
    for change in (dict(flip_sin_to_cos=True), dict(attention_head_dim=8)):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(BadInput, match=f"config.json: {next(iter(change))} is .*, expected"):
            unet.load(file)
    del config["freq_shift"]                               # then diffusers takes its own default
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="config.json: freq_shift is 0, expected 1"):
        unet.load(file)


def test_save_leaves_nothing_behind_on_a_full_disk(tmp_path, monkeypatch):
    def full(checkpoint, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("write failed: no space")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="u.pt: cannot be written"):
        unet.save(tmp_path / "u.pt", {})
    assert not list(tmp_path.iterdir())


class Malice:
    def __reduce__(self):
        return print, ("this file ran code",)


def test_read_runs_no_code(tmp_path, capsys):
    torch.save({"config": Malice()}, tmp_path / "evil.pt")
    with pytest.raises(BadInput, match="evil.pt"):
        unet.read(tmp_path / "evil.pt")
    assert "ran code" not in capsys.readouterr().out


UNET, SMALL_VGG = UNet(**TINY), VGG(width=4, convs=(1, 1, 1, 1, 1))
NAN = {name: w * math.nan for name, w in UNET.state_dict().items()}


@pytest.mark.parametrize("content, message", [
    ({"something": 1}, "linear_1.weight is .*expected"),
    (["a", "b"], "holds a list"),
    (torch.zeros(3), "holds a Tensor"),
    (checkpoint(SMALL_VGG), "not the configuration of a UNet"),
    (checkpoint(UNET) | {"config": dict(TINY, width="8")}, "not the configuration"),
    (checkpoint(UNET) | {"config": dict(TINY, mults=())}, "is .*expected"),
    (checkpoint(UNET) | {"config": dict(TINY, width=10 ** 9)}, "not the configuration"),
    (checkpoint(UNET) | {"config": dict(TINY, colour="red")}, "not the configuration"),
    (checkpoint(UNET) | {"config": dict(TINY, max_level="all")}, "not the configuration"),
    (checkpoint(UNET) | {"config": dict(TINY, max_level=10 ** 6)}, "not the configuration"),
    (checkpoint(UNET) | {"weights": None}, "holds a NoneType"),
    (checkpoint(UNET) | {"weights": {"conv_in.weight": 3}}, r"is nothing"),
    (checkpoint(UNET) | {"weights": UNET.state_dict() | {"new": torch.ones(2)}}, r"new is \[2\]"),
    (checkpoint(UNET) | {"weights": NAN}, "is not finite"),
])
def test_load_unet_says_what_is_wrong(tmp_path, content, message):
    torch.save(content, tmp_path / "u.pt")
    with pytest.raises(BadInput, match=f"u.pt: .*{message}") as stop:
        unet.load(tmp_path / "u.pt")
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("content", [b"", b"text", b"\x80\x02", "half"])
@pytest.mark.parametrize("load", [unet.load, perceptual.load])
def test_load_refuses_files_that_are_not_whole(tmp_path, load, content):
    torch.save(checkpoint(UNET), tmp_path / "u.pt")
    whole = (tmp_path / "u.pt").read_bytes()
    (tmp_path / "u.pt").write_bytes(whole[:len(whole) // 2] if content == "half" else content)
    with pytest.raises(BadInput, match="u.pt: not a whole file"):
        load(tmp_path / "u.pt")


# -- perceptual.py ---------------------------------------------------------------------------------

def small_distance(**kwargs):
    return PerceptualDistance(awake(VGG(width=4, convs=(1, 1, 1, 1, 1))), **kwargs)


def test_VGG_defaults_are_the_released_layers():
    with torch.device("meta"):
        vgg = VGG()
    convolutions = [i for i, layer in enumerate(vgg.features) if isinstance(layer, torch.nn.Conv2d)]
    assert convolutions == [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]  # as in torchvision
    assert sum(p.numel() for p in vgg.features.parameters()) == 14_714_688
    assert vgg.taps == [3, 8, 15, 22, 29]                  # relu1_2 ... relu5_3, as in LPIPS


def test_VGG_stages_halve_the_resolution():
    maps = VGG(width=4, convs=(1, 1, 1, 1, 1)).stages(images(2))
    assert [tuple(m.shape[1:]) for m in maps] == [(4, 32, 32), (8, 16, 16), (16, 8, 8), (32, 4, 4),
                                                  (32, 2, 2)]


def test_embed_makes_distances_zero_on_equal_images_symmetric_and_per_image():
    distance, x, y = small_distance(), images(3), images(3)
    same(distance(x, x), torch.zeros(3))
    close(distance(x, y), distance(y, x))
    assert (distance(x, y) > 0).all()
    close(distance(x, y)[1:2], distance(x[1:2], y[1:2]), atol=1e-6)


class OneMap(torch.nn.Module):
    """For a VGG: two channels on two positions, the first two colours of the image."""
    taps, features = [1], [torch.nn.Conv2d(3, 2, 1)]

    def stages(self, x):
        return [x[:, :2]]


def test_embed_by_hand():
    x = torch.tensor([[[[3.0, 0.0]], [[4.0, 1.0]], [[0.0, 0.0]]]])   # vectors (3, 4) and (0, 1)
    y = torch.tensor([[[[5.0, 2.0]], [[0.0, 0.0]], [[0.0, 0.0]]]])   # vectors (5, 0) and (2, 0)
    # unit length: (.6, .8) (0, 1) against (1, 0) (1, 0); squared differences (.16, .64) and (1, 1);
    # weights 2 and 3, mean of two positions
    expected = ((2 * 0.16 + 3 * 0.64) + (2 * 1 + 3 * 1)) / 2
    got = PerceptualDistance(OneMap(), weights=[torch.tensor([2.0, 3.0])])(x, y)
    assert math.isclose(got.item(), expected, rel_tol=1e-5)


def test_embed_gradient_by_finite_differences():
    distance, y = small_distance().double(), images(1).double()
    slope, gradient = slope_and_gradient(lambda x: distance(x, y).sum(), images(1).double())
    assert math.isclose(slope, gradient, rel_tol=1e-3)


def test_LPIPS_weights_must_fit_the_channels():
    for weights in ([torch.ones(3)] * 5, [-torch.ones(c) for c in (4, 8, 16, 32, 32)]):
        with pytest.raises(BadInput, match="weights"):
            small_distance(weights=weights)


def test_load_perceptual_reads_torchvisions_vgg16_and_lpips_layers(tmp_path, monkeypatch):
    narrow = (8, (2, 2, 3, 3, 3), 10)                      # VGG-16's names, fewer channels
    monkeypatch.setattr(VGG.__init__, "__defaults__", narrow)
    vgg, linear = awake(VGG()), [torch.rand(c) for c in (8, 16, 32, 64, 64)]
    released = {name: w for name, w in vgg.state_dict().items() if "features" in name}
    torch.save(released | {"classifier.0.weight": torch.ones(1)}, tmp_path / "vgg16.pth")
    layers = {f"lin{i}.model.1.weight": w.view(1, -1, 1, 1) for i, w in enumerate(linear)}
    torch.save(layers, tmp_path / "lpips.pth")
    x, y = images(2), images(2)
    plain = perceptual.load(tmp_path / "vgg16.pth")
    weighted = perceptual.load(tmp_path / "vgg16.pth", tmp_path / "lpips.pth")
    same(plain(x, y), PerceptualDistance(vgg)(x, y))
    same(weighted(x, y), PerceptualDistance(vgg, linear)(x, y))
    with pytest.raises(BadInput, match="lin0.model.1.weight"):
        perceptual.load(tmp_path / "vgg16.pth", tmp_path / "vgg16.pth")
    with pytest.raises(BadInput, match="features.0.weight"):
        perceptual.load(tmp_path / "lpips.pth")
    layers["lin0.model.1.weight"] = layers["lin0.model.1.weight"][:, :3]
    torch.save(layers, tmp_path / "narrow.pth")
    with pytest.raises(BadInput, match="narrow.pth: need .* weights for"):
        perceptual.load(tmp_path / "vgg16.pth", tmp_path / "narrow.pth")
    features = released | {"classifier.0.weight": torch.full((1,), math.nan)}
    torch.save(features, tmp_path / "vgg16_features.pth")  # torchvision's other VGG-16
    with pytest.raises(BadInput, match="vgg16_features.pth: its classifier is NaN"):
        perceptual.load(tmp_path / "vgg16_features.pth")


def test_load_perceptual_refuses_a_U_Net(tmp_path):
    torch.save(checkpoint(UNET), tmp_path / "u.pt")
    with pytest.raises(BadInput, match="u.pt: not the configuration of a VGG"):
        perceptual.load(tmp_path / "u.pt")


# -- attacks.py ------------------------------------------------------------------------------------

def test_crop_flip_is_a_shifted_window_of_the_padded_image():
    x = images(64, 8)
    views = crop_flip(x, torch.Generator().manual_seed(0), pad=2)
    padded, seen = F.pad(x, (2, 2, 2, 2)), set()
    for i in range(64):
        match = []
        for dy, dx in itertools.product(range(5), range(5)):
            window = padded[i, :, dy:dy + 8, dx:dx + 8]
            match += [(dy, dx, flip) for flip, candidate in enumerate((window, window.flip(2)))
                      if torch.equal(views[i], candidate)]
        assert len(match) == 1
        seen.add(match[0])
    assert len(seen) > 25                                  # of 50: they vary from image to image


def test_crop_flip_gradient_goes_back_to_the_pixels_in_view():
    x = images(4, 8).requires_grad_()
    view = crop_flip(x, torch.Generator().manual_seed(0))
    ones, = torch.autograd.grad(view.sum(), x)
    assert set(ones.unique().tolist()) == {0.0, 1.0}       # a pixel is seen once or is outside


def test_quadrant_view_is_a_quadrant_less_its_mean():
    x = images(200, 16)
    views = attacks.quadrant_view(x, torch.Generator().manual_seed(0), jitter=1)
    assert views.shape == (200, 3, 8, 8) and (views.mean((2, 3)) - 0.5).abs().max() < 1e-5
    seen = set()
    for image, view in zip(x, views):
        for top in (0, 1, 7, 8):                           # 0 +- 1 and 8 +- 1, within the image
            for left in (0, 1, 7, 8):
                window = image[:, top:top + 8, left:left + 8]
                window = window - window.mean((1, 2), keepdim=True) + 0.5
                for flip, candidate in ((False, window), (True, window.flip(2))):
                    if torch.allclose(view, candidate, atol=1e-5):
                        seen.add((top, left, flip))
    assert len(seen) > 24                                  # of 32


@pytest.mark.parametrize("start, length, n_out", [(0.0, 32.0, 32), (3.3, 17.5, 32), (0.0, 32.0, 20),
                                                  (5.25, 25.0, 20)])
def test_bilinear_is_pillows(start, length, n_out):
    x = torch.rand(32, 32)
    matrix = attacks.bilinear(torch.tensor([start]), torch.tensor([length]), 32, n_out)
    box = (start, start, start + length, start + length)
    pillow = Image.fromarray(x.numpy()).resize((n_out, n_out), Image.Resampling.BILINEAR, box)
    got = (matrix @ x @ matrix.mT)[0]
    close(got, torch.from_numpy(np.array(pillow)), atol=1e-5)


def test_random_resized_crop_draws_whole_boxes_again_until_they_fit(monkeypatch):
    seen = []

    def spy(x, *box):
        seen.append(torch.stack(box[:4]))
        return x
    monkeypatch.setattr(attacks, "boxes", spy)
    attacks.random_resized_crop(torch.zeros(20000, 1, 32, 32), torch.Generator().manual_seed(0), 16)
    top, left, height, width = seen[0]
    assert all(torch.equal(side, side.round()) for side in seen[0])
    assert (top >= 0).all() and (top + height <= 32).all() and (left + width <= 32).all()
    area, aspect = height * width / 1024, width / height
    # 0.552 is what torchvision and kornia draw, and where nothing is cut few touch both sides
    assert abs(area.mean() - 0.552) < 0.005 and 0.18 < area.min() and area.max() <= 1
    assert 0.7 < aspect.min() and aspect.max() < 1.45 and abs(aspect.log().mean()) < 0.01
    assert ((height == 32) & (width == 32)).float().mean() < 0.03
    assert abs(top.mean() - (32 - height).mean() / 2) < 0.1


def test_random_resized_crop_shows_that_box_resized_and_flipped(monkeypatch):
    ramp = torch.arange(32.0) + 0.5                        # the view says which box it shows
    x = torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32), torch.ones(32, 32)])
    boxes, seen = attacks.boxes, []

    def spy(x, *box):
        seen.append(torch.stack([box[3], box[2]], 1))
        return boxes(x, *box)
    monkeypatch.setattr(attacks, "boxes", spy)
    view = attacks.random_resized_crop(x.expand(500, -1, -1, -1), torch.Generator().manual_seed(0),
                                       16)
    assert view.shape == (500, 3, 16, 16)
    close(view[:, 2], torch.ones(500, 16, 16), atol=1e-6)  # weights of a pixel add up to one
    inner = view[:, :2, 4:12, 4:12]
    close((inner.amax((2, 3)) - inner.amin((2, 3))) * 16 / 7, seen[0], atol=0.5)
    assert 0.4 < (view[:, 0, 0, 0] > view[:, 0, 0, -1]).float().mean() < 0.6  # half of them flipped


def pillow_of(x):
    return Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize("name, pillow, levels", [("brightness", ImageEnhance.Brightness, 1),
                                                  ("contrast", ImageEnhance.Contrast, 2),
                                                  ("saturation", ImageEnhance.Color, 2)])
@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_brightness_contrast_saturation_are_pillows(name, pillow, levels, factor):
    x = images(1)
    expected = np.array(pillow(pillow_of(x[0])).enhance(factor))
    got = getattr(attacks, name)(x, torch.full((1, 1, 1, 1), factor))[0].permute(1, 2, 0) * 255
    assert np.abs(got.numpy() - expected).max() <= levels  # Pillow rounds to 8 bits on the way


@pytest.mark.parametrize("turn", [0, 25, -25, 128])
def test_hue_is_pillows(turn):
    x = images(1)
    hsv = np.array(pillow_of(x[0]).convert("HSV"))
    hsv[..., 0] += np.uint8(turn % 256)                    # Pillow keeps hue in 8 bits
    expected = np.array(Image.fromarray(hsv, "HSV").convert("RGB"))
    got = attacks.hue(x, torch.full((1, 1, 1, 1), 1 + turn / 256))[0].permute(1, 2, 0) * 255
    error = np.abs(got.numpy() - expected)
    assert np.quantile(error, 0.95) <= 4 and error.max() <= 12


def test_hue_keeps_value_and_chroma_and_leaves_grey_alone():
    x, grey = images(2), images(2)[:, :1].expand(-1, 3, -1, -1).requires_grad_()
    y = attacks.hue(x, torch.rand(2, 1, 1, 1))
    gradient, = torch.autograd.grad(attacks.hue(grey, torch.full((1, 1, 1, 1), 1.1)).sum(), grey)
    assert gradient.isfinite().all()
    close(y.amax(1), x.amax(1))
    close(y.amin(1), x.amin(1), atol=1e-6)
    same(attacks.hue(grey, torch.rand(2, 1, 1, 1)), grey)
    close(attacks.hue(x, torch.ones(1)), x, atol=1e-6)


def test_grayscale_is_pillows_for_a_fifth_of_the_images():
    x = images(400, 4)
    y = attacks.grayscale(x, torch.Generator().manual_seed(0))
    changed = (y != x).flatten(1).any(1)
    i = changed.nonzero()[0, 0]
    expected = np.array(pillow_of(x[i]).convert("L"))
    assert 0.15 < changed.float().mean() < 0.25
    assert np.abs(y[i].numpy() * 255 - expected).max() <= 1


def small_crop(x, generator):
    return attacks.random_resized_crop(x, generator, 8)


@pytest.mark.parametrize("view", [small_crop, attacks.grayscale, attacks.colour_jitter,
                                  attacks.simclr_view, attacks.quadrant_view, crop_flip])
def test_view_gradient_by_finite_differences(view):
    def energy(x):
        return view(x, torch.Generator().manual_seed(1)).square().sum()
    x = 0.2 + 0.6 * torch.rand(6, 3, 16, 16).double()
    slope, gradient = slope_and_gradient(energy, x, 1e-7)
    assert math.isclose(slope, gradient, rel_tol=1e-3)


def test_publish_rounds_to_8_bits_within_epsilon():
    x = images(4)
    ue = publish(x, (torch.rand_like(x) * 2 - 1) * EPSILON)
    assert torch.equal((ue * 255).round() / 255, ue) and 0 <= ue.min() and ue.max() <= 1
    assert (ue - x).abs().max() <= EPSILON + 1e-6


def linear_network(size=8, outputs=3):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * size ** 2, outputs))


def plain_scores(net, x, labels, generator):
    return net(x), labels


PLAIN = Victim(linear_network, plain_scores)               # a victim that does not augment


def test_noise_step_descends_by_the_sign_within_epsilon():
    perturbation = torch.tensor([0.0, 0.0, 0.0, 0.7, -0.8])
    gradient = torch.tensor([3.0, -1e-9, 0.0, -5.0, 5.0])
    got = noise_step(perturbation, gradient, 0.5, 1.0)
    close(got, torch.tensor([-0.5, 0.5, 0.0, 1.0, -1.0]))


def test_noise_gradient_adds_up_over_the_images_that_share_a_perturbation():
    net, x, y = PLAIN.fresh(0), 0.2 + 0.6 * images(6, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    wearer = torch.tensor([0, 1, 0, 0, 1, 1])
    # cross-entropy of a linear model has the gradient W^T (softmax - onehot)
    own = ((net(x).softmax(1) - F.one_hot(y, 3)) @ net[1].weight).view_as(x) / 6
    expected = torch.stack([own[wearer == r].sum(0) for r in range(2)])
    got = attacks.noise_gradient(net, PLAIN, x, y, torch.zeros(2, 3, 8, 8), wearer, None)
    close(got, expected, atol=1e-7)


@pytest.mark.parametrize("shared", ["class", "image"])
def test_min_min_lowers_the_loss_within_epsilon(shared):
    x, y = ((0.2 + 0.6 * images(60, 8)) * 255).round() / 255, torch.arange(60) % 3
    seen = []
    ue = min_min(x, y, PLAIN, shared=shared, rounds=6, batch_size=20, noise_steps=3,
                 lr=0.01, report=lambda done, total, loss: seen.append((done, float(loss))))
    net = PLAIN.fresh(1000)                                # as the surrogate began
    noise = ue - x
    assert 0.9 * EPSILON < noise.abs().max() <= EPSILON + 1e-6 and noise.min() < 0 < noise.max()
    assert F.cross_entropy(net(ue), y) < F.cross_entropy(net(x), y) - 0.1
    assert [done for done, _ in seen] == [1, 2, 3, 4, 5, 6] and seen[-1][1] < 0.7 * seen[0][1]


@pytest.mark.parametrize("shared, count", [("image", 12), ("class", 3), ("all", 1)])
def test_min_min_makes_one_perturbation_for_those_that_share_it(shared, count):
    x, y = ((0.2 + 0.6 * images(12, 8)) * 255).round() / 255, torch.arange(12) % 3
    noise = (255 * (min_min(x, y, PLAIN, shared=shared, rounds=1) - x)).round()
    assert len(noise.flatten(1).unique(dim=0)) == count
    same(noise[y == 1], noise[[1, 4, 7, 10]])
    assert shared == "image" or torch.equal(noise[1], noise[4])


class Pushing:
    """A victim whose loss pushes every pixel the same way, by one sign after the other."""

    def __init__(self, *signs):
        self.signs = iter(signs)

    def fresh(self, seed):
        return torch.nn.Linear(1, 1)

    def loss(self, net, x, labels, generator):
        return 0 * net.weight.sum() if net.training else next(self.signs) * x.sum()


@pytest.mark.parametrize("signs, how, levels", [
    ((1, 1), dict(rounds=2, step=0.2), -8 - 4),            # then steps half as long
    ((1, 1, 1, -1), dict(rounds=1, noise_steps=4, step=0.1), -4 * 4),
    ((1, 1, 1, -1), dict(rounds=1, noise_steps=4, step=0.1, momentum=0.0), -4 * 2)])
def test_min_min_takes_steps_that_fall_by_a_gradient_with_momentum(signs, how, levels):
    x = torch.full((4, 3, 2, 2), 128 / 255)
    ue = min_min(x, torch.zeros(4, dtype=torch.long), Pushing(*signs), start=x, epsilon=40 / 255,
                 train_batches=1, **how)
    same((255 * (ue - x)).round(), torch.full_like(x, levels))


def test_rotation_scores_are_of_every_image_in_all_four_turns(monkeypatch):
    x, cropped = torch.arange(2 * 3 * 4).view(2, 3, 2, 2) / 24, []
    monkeypatch.setattr(attacks, "crop_flip", lambda x, generator: cropped.append(generator) or x)
    generator = torch.Generator()

    def corners(turned):
        return turned[:, 0].flatten(1)
    seen, turns = attacks.rotation_scores(corners, x, None, generator)
    assert cropped == [generator]                          # as a classifier's are
    assert turns.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for i in range(2):
        a, b, c, d = x[i, 0].flatten().tolist()            # upright; then counterclockwise
        assert seen[i].tolist() == [a, b, c, d]
        assert [seen[i + 2 * k].tolist() for k in (1, 2, 3)] == [
            [b, d, a, c], [d, c, b, a], [c, a, d, b]]


def test_rotation_scores_are_fooled_by_one_perturbation_for_all_images():
    victim = Victim(linear_network, attacks.rotation_scores, dict(size=16, outputs=4))
    x, last = ((0.4 + 0.2 * images(40, 16)) * 255).round() / 255, {}
    for epsilon in (EPSILON, EPSILON / 80):                # 1.1 and 1.4 when this was written
        def report(done, total, loss, epsilon=epsilon):
            last[epsilon] = float(loss)
        min_min(x, torch.zeros(40), victim, shared="all", noise_steps=3, lr=0.05, batch_size=40,
                epsilon=epsilon, report=report)
    assert last[EPSILON] < last[EPSILON / 80] - 0.15


def test_min_min_freezes_the_weights_and_starts_surrogates_afresh(monkeypatch):
    seen, original = [], attacks.noise_gradient

    def spy(net, *args):
        assert not net.training and not any(w.requires_grad for w in net.parameters())
        before = copy.deepcopy(net.state_dict())
        gradient = original(net, *args)
        assert all(torch.equal(w, before[name]) for name, w in net.state_dict().items())
        seen.append(net)
        return gradient
    monkeypatch.setattr(attacks, "noise_gradient", spy)
    x, y = images(20, 8), torch.arange(20) % 3
    min_min(x, y, PLAIN, surrogates=3, rounds=2, train_batches=1, noise_batches=1, batch_size=10)
    assert len(seen) == 6 and len({id(net) for net in seen}) == 3


def test_min_min_goes_on_from_the_start_it_is_given():
    x, y = 0.2 + 0.6 * images(12, 8), torch.arange(12) % 3
    start = publish(x, (torch.rand_like(x) * 2 - 1) * EPSILON)
    ue = min_min(x, y, PLAIN, start=start, rounds=1, step=0.0)
    close(ue, start, atol=1e-6)


def test_min_min_depends_on_the_seed_alone():
    x, y = images(20, 8), torch.arange(20) % 3
    first = min_min(x, y, PLAIN, rounds=2, seed=1)
    torch.manual_seed(5)
    same(first, min_min(x, y, PLAIN, rounds=2, seed=1))
    assert not torch.equal(first, min_min(x, y, PLAIN, rounds=2, seed=2))


def test_nt_xent_scores_by_hand():
    # two images, views at 0 and 90 degrees and at 60 and 90: partners' cosines are 1/2 and 1
    degrees = torch.tensor([0.0, 90.0, 60.0, 90.0]) * math.pi / 180
    lengths = torch.tensor([[1.0], [2.0], [3.0], [4.0]])   # do not count
    z = torch.stack([degrees.cos(), degrees.sin()], 1) * lengths
    scores, partner = nt_xent_scores(z, temperature=0.5)
    assert partner.tolist() == [2, 3, 0, 1] and torch.isneginf(scores.diagonal()).all()
    losses = []
    for i, p in enumerate([2, 3, 0, 1]):
        similar = [math.exp(2 * math.cos((degrees[i] - degrees[k]).item())) for k in range(4)]
        losses.append(-math.log(similar[p] / (sum(similar) - similar[i])))
    assert math.isclose(F.cross_entropy(scores, partner).item(), sum(losses) / 4, rel_tol=1e-5)


def test_nt_xent_scores_gradient_by_finite_differences():
    def loss(z):
        return F.cross_entropy(*nt_xent_scores(z))
    z = torch.randn(8, 5).double().requires_grad_()
    slope, along = slope_and_gradient(loss, z)
    assert math.isclose(slope, along, rel_tol=1e-5)
    gradient, = torch.autograd.grad(loss(z), z)
    assert (gradient * z).sum(1).abs().max() < 1e-9        # lengths do not count


def half_view(x, generator):
    """The left half of an image or the right."""
    left = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
    return torch.where(left, x[..., :4], x[..., 4:]) - 0.5


def half_network():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32, 16, bias=False))


def test_partner_scores_teach_noise_that_makes_views_agree():
    # noise can make the halves of each image alike, and unlike the others'
    victim = Victim(half_network, partner_scores, choice=dict(view=half_view, temperature=0.5))
    x, g = ((0.4 + 0.2 * images(24, 8)) * 255).round() / 255, torch.Generator().manual_seed(0)
    ue = min_min(x, torch.zeros(24), victim, rounds=10, train_batches=1, noise_steps=8, lr=0.001,
                 batch_size=24)

    def loss(x):
        net = victim.fresh(1000)
        return sum(victim.loss(net, x, None, g).item() for _ in range(20)) / 20
    assert loss(ue) < loss(x) - 0.1 and (ue - x).abs().max() <= EPSILON + 1e-6


def test_PROTECTIONS_fool_one_of_the_victims_and_start_from_one_another():
    for name, protection in PROTECTIONS.items():
        assert protection.victim in VICTIMS and callable(protection.make)
        assert not protection.start or PROTECTIONS[protection.start].victim == protection.victim
        assert (protection.settings.get("shared") == "class") == name.endswith("class")


# -- le.py -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def nets():
    torch.manual_seed(0)
    return awake(UNet(**TINY)), small_distance()


JOINT = Sampler(t_star=12, rounds=2, steps=3, pixel_weight=1e4, pixel_above=6,
                perceptual_weight=10.0, perceptual_below=6)
FREE = replace(JOINT, pixel_weight=0.0, perceptual_weight=0.0)


def test_guidance_pixel_is_the_gradient_of_the_mean_squared_difference():
    x, y = torch.randn(2, 3, 8, 8).double().requires_grad_(), torch.randn(2, 3, 8, 8).double()
    distance = (x - y).square().mean((1, 2, 3)).sum()
    expected, = torch.autograd.grad(7 * distance, x)
    sampler = Sampler(pixel_weight=7.0, pixel_above=10, perceptual_below=10)
    close(guidance(x.detach(), y, None, 20, None, sampler), expected)


def test_guidance_perceptual_is_the_gradient_of_the_distance(nets):
    distance = copy.deepcopy(nets[1]).double()
    x, y = (images(2).double() * 2 - 1).requires_grad_(), images(2).double() * 2 - 1
    expected, = torch.autograd.grad(7 * distance(x / 2 + 0.5, y / 2 + 0.5).sum(), x)
    sampler = Sampler(pixel_above=10, perceptual_weight=7.0, perceptual_below=10)
    features = distance.embed(y / 2 + 0.5)
    close(guidance(x.detach(), y, features, 10, distance, sampler), expected)


def test_seen_is_a_symmetric_projection_as_its_use_on_gradients_asks():
    grey, x, y = replace(JOINT, compare="grey"), torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    seen = le.seen(x, grey)
    close(seen, x.mean(1, keepdim=True).repeat(1, 3, 1, 1))
    close(le.seen(seen, grey), seen, atol=1e-6)
    assert torch.isclose((seen * y).sum(), (x * le.seen(y, grey)).sum(), atol=1e-5)
    same(le.seen(x, JOINT), x)


def test_guidance_by_level_and_both_at_once(nets):
    x, y = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    features = nets[1].embed(y / 2 + 0.5)

    def at(t, **changes):
        return guidance(x, y, features, t, nets[1], replace(JOINT, **changes))
    pixel, perceived = at(7, perceptual_weight=0.0), at(6, pixel_weight=0.0)
    assert pixel.abs().max() > 0 and perceived.abs().max() > 0
    same(at(7), pixel)
    same(at(6), perceived)
    close(at(7, perceptual_below=12), pixel + perceived)


def test_joint_conditioned_mean_is_the_mean_of_the_tilted_gaussian():
    # N(mean, var) tilted by exp(-s gradient . x) has mean - var s gradient and the same variance
    mean, var, t, gradient = torch.tensor(0.3), torch.tensor(0.02), 36, 1.7
    s = math.sqrt((1 - ALPHA_BAR[t]) / ALPHA_BAR[t])
    x = torch.linspace(-3, 3, 200001).double()
    density = torch.exp(-(x - mean) ** 2 / (2 * var) - s * gradient * x)
    expected = (density * x).sum() / density.sum()
    assert math.isclose(expected, joint_conditioned_mean(mean, var, t, gradient), abs_tol=1e-6)


def test_joint_conditioned_mean_pulls_no_further_than_a_standard_deviation():
    steep = torch.tensor([1e6, -1e6])
    pulled = joint_conditioned_mean(torch.zeros(2), torch.tensor(0.04), 36, steep)
    close(pulled, torch.tensor([-0.2, 0.2]))


def test_purify_is_8_bit_and_leaves_its_input_alone(nets):
    x = images(2)
    before = x.clone()
    y = purify(*nets, x, JOINT)
    assert torch.equal(x, before) and y.shape == x.shape
    assert torch.allclose((y * 255).round(), y * 255, atol=1e-4) and 0 <= y.min() and y.max() <= 1


@pytest.mark.parametrize("target", ["x0", "xt"])
def test_purify_does_not_depend_on_batch_size(nets, target):
    x, sampler = images(8), replace(JOINT, target=target)
    whole = purify(*nets, x, sampler, batch_size=8)
    for size in (1, 3):
        other = purify(*nets, x, sampler, batch_size=size)
        difference = (other - whole).abs()                 # a rounding may go either way
        assert difference.max() < 1.5 / 255 and (difference > 0).float().mean() < 1e-3


def test_purify_draws_by_the_seed_of_each_image(nets):
    x = images(1).repeat(2, 1, 1, 1)
    y = purify(*nets, x, JOINT, seeds=torch.tensor([3, 4]))
    assert not torch.equal(y[0], y[1])
    again = purify(*nets, x, JOINT, seeds=[4, 3])
    assert (again.flip(0) - y).abs().max() < 1.5 / 255


def test_purify_with_zero_weights_is_unguided(nets):
    x = images(2)
    y = purify(nets[0], None, x, FREE)
    for i in range(2):                                     # diffuse, then p_sample down; twice
        g = torch.Generator().manual_seed(i)
        z = x[i:i + 1] * 2 - 1
        for _ in range(2):
            z = q_sample(z, 12, torch.randn(3, 32, 32, generator=g)[None])
            for t, s in ((12, 8), (8, 4), (4, 0)):
                z = p_sample(nets[0], z, t, s, torch.randn(3, 32, 32, generator=g)[None])
        assert ((z / 2 + 0.5).clamp(0, 1) - y[i:i + 1]).abs().max() < 1 / 255


def test_purify_guidance_pulls_towards_the_UE(nets):
    x = images(4)
    y = purify(*nets, x, FREE)
    by_pixels = purify(*nets, x, replace(FREE, pixel_weight=3e5, pixel_above=0))
    by_features = purify(*nets, x, replace(FREE, perceptual_weight=3e3, perceptual_below=12))
    assert (by_pixels - x).square().mean() < (y - x).square().mean()
    assert nets[1](x, by_features).sum() < nets[1](x, y).sum()


def test_purify_computes_only_the_gradient_in_use(nets, monkeypatch):
    calls, stages = [], nets[1].vgg.stages

    def spy(x):
        calls.append(len(x))
        return stages(x)
    monkeypatch.setattr(nets[1].vgg, "stages", spy)
    purify(*nets, images(1), replace(JOINT, rounds=1, t_star=12, steps=4))
    # of the UE, and of the prediction at level 6; 12 and 9 use pixels, 3 has no variance
    assert len(calls) == 2


def test_purify_released_pull_matches_the_release():
    # about 1.6e-4 of the pixel difference a step, with batch means over 500
    t, zero = 20, torch.zeros(1, 1, 1, 1)
    var = posterior(zero, zero, t, t - 1)[1].item()
    pull = var * sigma(t) * le.SAMPLERS["released"].pixel_weight * 2 / 3072
    assert 1e-4 < pull < 2e-4


@pytest.mark.parametrize("wrong", [
    dict(steps=500), dict(target="x1"), dict(rounds=0), dict(pixel_weight=-1.0), dict(t_star=0),
    dict(pixel_weight=math.nan), dict(perceptual_weight=math.inf), dict(compare="red")])
def test_Sampler_refuses_what_makes_no_sense(wrong):
    with pytest.raises(BadInput):
        Sampler(**wrong)


def test_purify_refuses_what_it_cannot_do(nets):
    with pytest.raises(BadInput, match="0, 1"):
        purify(*nets, images(1) * 255, JOINT)
    young = copy.deepcopy(nets[0])
    young.max_level = 11
    with pytest.raises(BadInput, match="levels up to 11"):
        purify(young, nets[1], images(1), JOINT)
    young.max_level = T
    young.conv_out.bias.data.fill_(math.nan)
    with pytest.raises(BadInput, match="not finite"):
        purify(young, nets[1], images(1), JOINT)


def test_download_keeps_only_what_has_the_hash(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"data")
    for url in (source, tmp_path / "missing"):
        with pytest.raises(BadInput, match="put it at"):
            le.download((url.as_uri(), "0" * 64), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    right = "3a6eb0790f39ac87c94f3856b2dd2c5d110e6811602261a9a923d3bb23adc8b7"
    le.download((source.as_uri(), right), tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"data"


# -- train.py: data --------------------------------------------------------------------------------

def test_shapes_come_from_the_seed_alone_as_8_bit_images():
    x, y = train.shapes(40, seed=3)
    assert x.shape == (40, 3, 32, 32) and torch.equal(y.bincount(), torch.full((10,), 4))
    assert torch.equal((x * 255).round() / 255, x) and 0 <= x.min() and x.max() <= 1
    assert x.std() > 0.05 and torch.equal(train.shapes(40, seed=3)[0], x)
    assert not torch.equal(train.shapes(40, seed=4)[0], x)


@pytest.mark.parametrize("shape", train.SHAPES)
def test_signed_distance_is_negative_inside_and_changes_no_faster_than_a_distance(shape):
    axis = torch.linspace(-1.5, 1.5, 301)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    d = train.signed_distance(shape, points)
    slope = torch.stack(torch.gradient(d, spacing=0.01)).norm(dim=0)
    assert 0.05 < (d < 0).float().mean() < 0.4 and d[0, 0] > 0.4
    assert slope.median() > 0.7 and slope.quantile(0.99) < 1.1  # an edge is as wide everywhere


def configured(*arguments):
    return train.parse([str(argument) for argument in arguments])[2]


def asked_for(protected, unprotected, validation, test):
    return ["--images.protected", protected, "--images.unprotected", unprotected,
            "--images.validation", validation, "--images.test", test]


def test_load_data_gives_disjoint_sets():
    sets, classes = train.load_data(configured(*asked_for(50, 40, 20, 30)))
    counts = {name: len(images) for name, (images, _) in sets.items()}
    assert counts == dict(protected=50, unprotected=40, validation=20, test=30)
    assert len({x.numpy().tobytes() for part, _ in sets.values() for x in part}) == 140


# -- train.py: victims and training ----------------------------------------------------------------

def test_linear_probe_separates_what_is_linear_in_the_features():
    encoder = torch.nn.Module()
    encoder.features = lambda x: 5 + x.flatten(1) * torch.logspace(-2, 2, 12)  # to be standardised
    x = torch.randn(300, 3, 2, 2)
    labels = (x.flatten(1) @ torch.randn(12) > 0).long()
    known, test = (x[:200], labels[:200]), (x[200:], labels[200:])
    assert train.linear_probe(encoder, known, test) > 90
    assert train.linear_probe(encoder, known, (x[200:], 1 - labels[200:])) < 10
    random = torch.randint(0, 2, (300,))
    assert train.linear_probe(encoder, (x[:200], random[:200]), (x[200:], random[200:])) < 65


def test_accuracy_and_recovery_by_hand():
    x = torch.rand(4, 3, 1, 1)
    answers = x.flatten(1).argmax(1)
    wrong = torch.where(torch.arange(4) < 3, answers, (answers + 1) % 3)
    assert train.accuracy(lambda x: x.flatten(1), x, wrong) == 75
    assert train.recovery(90, 10, 50) == 0.5 and train.recovery(90, 10, 10) == 0
    assert train.recovery(90, 89.5, 90) is None            # nothing was taken


def silent(done, total, **values):
    pass


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_orthogonal_keeps_directions_and_makes_their_lengths_alike(shape):
    left, _, right = torch.linalg.svd(torch.randn(shape).double(), full_matrices=False)
    lengths = torch.tensor([9.0, 5.0, 3.0, 2.0, 1.0, 0.5]).double()
    turned = left.mT @ attacks.orthogonal(left * lengths @ right) @ right.mT
    assert ((turned.diagonal() > 0.6) & (turned.diagonal() < 1.3)).all()
    close(turned - turned.diagonal().diag(), torch.zeros(6, 6).double(), atol=1e-6)


def test_Muon_is_nesterovs_SGD_but_for_the_lengths_in_a_filters_step():
    bias, twin = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    filters, unused = nn.Parameter(torch.ones(8, 3, 3, 3)), nn.Parameter(torch.ones(2, 2))
    muon = attacks.Muon([bias, filters, unused], lr=0.5)
    sgd = torch.optim.SGD([twin], lr=0.5, momentum=0.9, nesterov=True)
    for _ in range(3):
        bias.grad = torch.randn(4)
        twin.grad = bias.grad.clone()
        filters.grad = torch.randn(8, 3, 3, 3)
        before = filters.detach().clone()
        muon.step()
        sgd.step()
        close(bias, twin)
        lengths = torch.linalg.svdvals((before - filters).detach().flatten(1)) / 0.5
        assert ((lengths > 0.6) & (lengths < 1.3)).all()
    same(unused.detach(), torch.ones(2, 2))                # it had no gradient


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 5])
def test_fit_takes_any_number_of_steps_and_lowers_the_loss(epochs):
    config = dict(widths=(8, 16), blocks=1, strides=(2,), classes=2)
    victim = Victim(ResNet, class_scores, config)
    x, y = torch.rand(8, 3, 8, 8), torch.arange(8) % 2
    made = fit(victim, x, y, epochs=epochs, batch_size=8, lr=0.1, seed=0, report=silent)
    assert len(made["losses"]) == epochs and all(map(math.isfinite, made["losses"]))


def tiny_unet():
    torch.manual_seed(0)
    return UNet(**TINY)


def test_train_unet_resumed_ends_where_an_uninterrupted_run_does(tmp_path):
    x = images(16)

    def run(unfinished, stop=None):
        def report(done, total, **values):
            if done == stop:
                raise KeyboardInterrupt
        net = tiny_unet()
        return unet.train_unet(net, x, levels=20, tilt=1.0, steps=16, batch_size=4, lr=1e-3,
                                ema_decay=0.9, seed=0, report=report, unfinished=unfinished,
                                checkpoint_seconds=0)
    whole = run(tmp_path / "a")["weights"]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", stop=8)
    assert 0 < torch.load(tmp_path / "b", weights_only=True)["step"] < 16
    resumed = run(tmp_path / "b")["weights"]
    assert all(torch.allclose(w, resumed[name], atol=1e-6) for name, w in whole.items())


def test_train_unet_averages_the_weights_with_a_decay_that_ramps_up(tmp_path):
    def weights(ema_decay, steps):
        net = tiny_unet()
        made = unet.train_unet(net, images(4), levels=20, tilt=1.0, steps=steps,
                                batch_size=4, lr=0.1, ema_decay=ema_decay, seed=0, report=silent,
                                unfinished=tmp_path / "none")
        return made["weights"]["conv_out.bias"].cpu()
    torch.manual_seed(0)
    start = UNet(**TINY).conv_out.bias.detach()
    trained = weights(0.0, 1)
    assert not torch.equal(trained, start)
    close(weights(0.999, 1), 0.1 * start + 0.9 * trained, atol=1e-7)


def test_train_unet_draws_levels_by_their_noise(tmp_path, monkeypatch):
    seen = []

    def spy(net, x0, t, eps):
        seen.append(t.cpu())
        return sum(weights.sum() for weights in net.parameters())
    monkeypatch.setattr(unet, "ddpm_loss", spy)
    for tilt in (0.0, 2.0):
        seen.clear()
        net = tiny_unet()
        unet.train_unet(net, images(4), levels=20, tilt=tilt, steps=4, batch_size=500, lr=0.01,
                         ema_decay=0.9, seed=0, report=silent, unfinished=tmp_path / "none")
        share = torch.cat(seen).bincount(minlength=21)[1:] / 2000
        variance = (1 - ALPHA_BAR[1:21]) ** (tilt / 2)
        assert (share - variance / variance.sum()).abs().max() < 0.025


# -- train.py: what is kept ------------------------------------------------------------------------

SMALL = ["--limit", "4", "--resnet.widths", "8,8,8", "--resnet.strides", "2,2", "--unet.width", "8",
         "--vgg.width", "4", "--noise.cp-class.surrogates", "1", "--noise.cp-class.rounds", "1",
         "--noise.cp-sample.surrogates", "1", "--noise.cp-sample.rounds", "1"]


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """The folder of a toy run, for those who only read it; one for both files of tests."""
    folder = tmp_path_factory.getbasetemp() / "toy"
    if not (folder / "results.json").exists():
        train.main([*SMALL, "--out", str(folder)])
    return folder


def applied(function, x, report):
    return dict(made=function(x))


def doubled(x):
    return 2 * x


def test_cached_keeps_what_is_unchanged_and_says_what_has_changed(tmp_path, capsys):
    c = configured("--out", tmp_path)

    def said(x):
        same(train.cached(c, "double", applied, function=doubled, x=x)["made"], 2 * x)
        return capsys.readouterr().out.strip()
    assert said(torch.ones(2)) == "double: made"
    assert said(torch.ones(2)) == "double: kept"
    assert said(torch.zeros(2)) == "double: made again, x changed"
    (tmp_path / "double.pt").write_bytes(b"half a file")
    assert "double.pt is damaged" in said(torch.zeros(2))
    assert [path.name for path in tmp_path.iterdir()] == ["double.pt"]


def given(report, **inputs):
    return dict(made=inputs)


def test_cached_gives_every_input_to_the_function_whatever_its_name(tmp_path):
    inputs = dict(c=1, name=2, make=3, shared="class", resumed=4, path=5)
    made = train.cached(configured("--out", tmp_path), "given", given, **inputs)
    assert made["made"] == inputs and set(inputs) < set(made["parts"])


def test_protect_gives_every_setting_to_the_protection(tmp_path, monkeypatch):
    seen = {}

    def spy(images, labels, victim, **how):
        seen.update(how)
        return images
    c = configured("--out", tmp_path, "--noise.em-class.rounds", 3, *asked_for(10, 10, 1, 1))
    monkeypatch.setitem(PROTECTIONS, "em-class", replace(PROTECTIONS["em-class"], make=spy))
    train.protect(c, "em-class", train.load_data(c)[0])
    assert seen.items() > c.noise["em-class"].items() and seen["shared"] == "class"
    assert seen["rounds"] == 3 and seen["epsilon"] == EPSILON


def test_hashes_are_of_a_value_and_not_of_an_object():
    net, other = SMALL_VGG, VGG(width=4, convs=(1, 1, 1, 1, 1))
    pairs = [(torch.ones(2), torch.ones(1, 2)), (torch.ones(2), torch.ones(2).double()),
             (dict(a=(1, 2.0)), dict(a=(1, 3.0))), (Sampler(), Sampler(steps=2)), (net, other),
             (functools.partial(doubled, x=1), functools.partial(doubled, x=2))]
    for one, another in pairs:
        first, copied, second = [train.hashes(dict(x=x))["x"]
                                 for x in (one, copy.deepcopy(one), another)]
        assert first == copied != second


def test_hashes_name_the_files_that_code_comes_from_and_no_others():
    found = {}
    for name, thing in dict(noise=PROTECTIONS["cp-class"], sampler=[purify, Sampler()], vgg=VGG,
                            unet=unet.train_unet, victim=Victim(ResNet, class_scores)).items():
        found[name] = set(train.hashes({name: thing})) - {name}
    assert found == dict(noise={"attacks.py"}, victim={"attacks.py"}, unet={"unet.py"},
                         vgg={"perceptual.py", "unet.py"}, sampler={"le.py", "unet.py"})


OWN = """
import functools, pathlib
from .helper import twice
def plain(x):
    \"\"\"What the file holds, times the helper's two, plus one.\"\"\"
    from elsewhere import once                             # when it is called, not before
    return once(twice(x)) + 1  # one
def scaled(x, factor):
    return factor * x
def read(x, path):
    return x + len(path.read_text())
lambdas = [lambda x: x + 1, lambda x: x + 2]
ways = dict(plain=plain, lambda_=lambdas[0], partial=functools.partial(scaled, factor=2),
            file=functools.partial(read, path=pathlib.Path("noise.txt")))
"""
FILES = {"mine/own.py": OWN, "mine/helper.py": "def twice(x):\n    return 2 * x\n",
         "elsewhere.py": "def once(x):\n    return 1 * x\n", "noise.txt": "loud"}
ALL = {"plain", "lambda_", "partial", "file"}


@pytest.mark.parametrize("edited, old, new, again", [
    ("mine/own.py", "# one", "# another comment", set()),
    ("mine/own.py", "What the file holds", "Another docstring", set()),
    ("mine/own.py", "+ 1  #", "+ 3  #", ALL),
    ("mine/helper.py", "2 * x", "3 * x", ALL),             # two calls away
    ("elsewhere.py", "1 * x", "4 * x", ALL),               # and where nobody has been yet
    ("noise.txt", "loud", "silent", {"file"}),
])
def test_cached_shows_nothing_old_after_an_edit_of_ones_own_file(
        tmp_path, monkeypatch, capsys, edited, old, new, again):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(train, "BEGAN", math.inf)          # this process may read its files again
    c = configured("--out", tmp_path)
    Path("mine").mkdir()
    for name, content in FILES.items():
        Path(name).write_text(content)

    def made():
        for module in ("mine.helper", "mine.own", "mine", "elsewhere"):
            sys.modules.pop(module, None)
        importlib.invalidate_caches()
        for name, function in importlib.import_module("mine.own").ways.items():
            train.cached(c, name, applied, function=function, x=torch.ones(1))
        said = capsys.readouterr().out
        return set(re.findall(r"^(\w+): made", said, re.M))
    assert made() == ALL and made() == set()
    Path(edited).write_text(Path(edited).read_text().replace(old, new))
    os.utime(edited, (10, 10))                             # not even the time is new
    assert made() == again and made() == set()


def test_cached_tells_lambdas_apart_and_what_they_have_captured(tmp_path, capsys):
    c = configured("--out", tmp_path)

    def adding(n):
        return lambda x: x + n
    for function, word in ((adding(1), "made"), (adding(1), "kept"), (adding(2), "made again"),
                           (lambda x: x + 1, "made again"), (lambda x: x + 2, "made again")):
        made = train.cached(c, "lambda", applied, function=function, x=torch.ones(1))["made"]
        same(made, function(torch.ones(1)))
        assert f"lambda: {word}" in capsys.readouterr().out


def test_cached_keeps_nothing_of_a_file_that_was_edited_while_the_program_ran(tmp_path, capsys,
                                                                              monkeypatch):
    c = configured("--out", tmp_path)
    for began in (0.0, math.inf):                          # all files are newer, then none is
        monkeypatch.setattr(train, "BEGAN", began)
        train.syntax.cache_clear()
        train.cached(c, "double", applied, function=doubled, x=torch.ones(1))
    assert "double: made again, " in capsys.readouterr().out


def copy_of_the_project(folder):
    for file in [*HERE.glob("*.py"), *HERE.glob("studies/*.py")]:
        target = folder / file.relative_to(HERE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    return folder


def run(folder, *command):
    """What a program of the project says in a process of its own."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=folder, text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("file, again", [
    ("train.py", set()), ("le.py", {"em-class-le"}), ("perceptual.py", {"vgg", "em-class-le"}),
    ("unet.py", {"ddpm", "vgg", "em-class-le"}),
    ("attacks.py", {"vgg", "em-class", "classifier-clean", "classifier-em-class-ue",
                    "classifier-em-class-le"})])
def test_cached_makes_again_what_is_in_a_file_that_has_changed(tmp_path, small_run, monkeypatch,
                                                               capsys, file, again):
    def edited(path, *when, syntax=train.syntax):
        found, names = syntax(path, *when)
        return found + "edited" * (Path(path).name == file), names
    shutil.copytree(small_run, tmp_path / "run")
    monkeypatch.setattr(train, "syntax", edited)
    train.main([*SMALL, "--protections", "em-class", "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    # what comes out the same makes nothing again that is built on it
    assert set(re.findall(rf"^([\w-]+): made again, {file} changed", said, re.M)) == again
    assert said.count("made") == len(again)


def test_cached_makes_again_what_comes_out_different_after_an_edit(tmp_path, small_run):
    folder = copy_of_the_project(tmp_path / "copy")
    shutil.copytree(small_run, tmp_path / "run")
    source = (folder / "unet.py").read_text()
    line = "return math.sqrt(1 / ALPHA_BAR[t].item() - 1)"  # a helper two calls away from LEs
    assert source.count(line) == 1
    (folder / "unet.py").write_text(source.replace(line, f"{line} / 2"))
    said = run(folder, "train.py", *SMALL, "--protections", "em-class", "--out", tmp_path / "run")
    assert set(re.findall(r"^([\w-]+): made again, ", said, re.M)) == {
        "ddpm", "vgg", "em-class-le", "classifier-em-class-le"}


def test_cached_follows_settings_and_inputs(tmp_path, small_run, capsys):
    shutil.copytree(small_run, tmp_path / "run")
    command = [*SMALL, "--protections", "em-class", "--out", str(tmp_path / "run")]
    train.main([*command, "--sampler.pixel_weight", "9"])
    said = capsys.readouterr().out
    assert "em-class-le: made again, sampler changed" in said and "em-class: kept" in said
    assert "classifier-em-class-le: made again, images changed" in said


# -- train.py: the story ---------------------------------------------------------------------------

def test_main_tells_the_whole_story(small_run):
    results = json.loads((small_run / "results.json").read_text())
    assert [row["protection"] for row in results["rows"]] == list(train.DEFAULTS["protections"])
    assert set(results) == {"config", "floor", "rows"}
    assert set(results["rows"][0]) == {"protection", "clean", "ue", "le", "recovery", "psnr_ue",
                                       "psnr_le"}
    assert all(20 < row["psnr_ue"] < 60 and 0 <= row["le"] <= 100 for row in results["rows"])
    picture = Image.open(small_run / "figure.png")
    assert picture.size == (2 * 32 * 4, 2 * 32 * 13)    # four classes have an image here
    ue = unet.read(small_run / "cp-class.pt")["images"].float() / 255
    x = train.load_data(configured(*SMALL))[0]["protected"][0]
    assert 0 < (ue - x).abs().max() <= EPSILON + 1e-6
    assert not list(small_run.glob("*.unfinished")) and not list(small_run.glob("*.tmp"))


def red_corner(images, labels, victim, *, epsilon, seed, report):
    """A protection of one's own: a corner whose red says the class."""
    ue = images.clone()
    ue[:, 0, :4, :4] += (labels.view(-1, 1, 1) - 4.5) / 4.5 * epsilon
    return publish(ue, 0)


def test_main_takes_a_protection_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PROTECTIONS, "corner", Protection(red_corner))
    train.main([*SMALL, "--protections", "corner", "--out", str(tmp_path)])
    assert "| corner |" in capsys.readouterr().out and (tmp_path / "corner-le.pt").exists()


def moved(images, labels, victim, *, epsilon, seed, report, dx=0, steps=(1, 2)):
    """A protection with options of its own."""
    return publish(images, epsilon * torch.ones(3, 1, 1) * (1 + dx) / sum(steps))


def test_parse_takes_any_options_of_a_protection_of_ones_own(monkeypatch):
    monkeypatch.setitem(PROTECTIONS, "moved", Protection(moved))
    c = configured("--limit", 2, "--noise.moved.dx", "-1", "--noise.em-class.noise_batches", "None")
    assert c.noise["moved"] == dict(dx=-1, steps=(1, 2))
    assert c.noise["em-class"]["noise_batches"] is None
    with pytest.raises(BadInput, match="--seed -1"):
        configured("--seed", "-1")


def louder(images, labels, victim, *, epsilon, seed, report):
    """A protection that changes more than it may."""
    return publish(images, torch.full_like(images, 2 * epsilon))


def smaller(images, labels, victim, *, epsilon, seed, report):
    """A protection that gives images of another size."""
    return images[:, :, ::2, ::2]


def test_protect_says_where_a_protection_breaks_epsilon_or_shape(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PROTECTIONS, "louder", Protection(louder))
    monkeypatch.setitem(PROTECTIONS, "smaller", Protection(smaller))
    c = configured("--out", tmp_path, "--protections", "louder,smaller", *asked_for(4, 4, 1, 1))
    sets, _ = train.load_data(c)
    train.claim(c)
    train.protect(c, "louder", sets)
    said = "louder: changes a channel by 16/255, more than --epsilon 8"
    assert said in capsys.readouterr().out
    with pytest.raises(BadInput, match=r"smaller gave images \(4, 3, 16, 16\), expected"):
        train.protect(c, "smaller", sets)


class MLP(torch.nn.Module):
    """A victim of one's own, which has no `features` and no use for the ResNet's settings."""

    def __init__(self, classes, **resnet):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 ** 2, classes))

    def forward(self, x):
        return self.layers(x)


def test_main_takes_a_victim_of_ones_own_and_the_surrogate_stays(tmp_path, small_run, monkeypatch,
                                                                 capsys):
    shutil.copytree(small_run, tmp_path / "run")
    training = dict(epochs=2, batch_size=4, lr=0.01)
    monkeypatch.setitem(VICTIMS, "mlp", Victim(MLP, class_scores, training=training))
    command = [*SMALL, "--protections", "em-class", "--out", str(tmp_path / "run")]
    train.main([*command, "--victim", "mlp", "--mlp.epochs", "3"])
    said = capsys.readouterr().out
    assert "em-class: kept" in said and "mlp on em-class-le" in said and "| em-class |" in said
    made = unet.read(tmp_path / "run" / "mlp-em-class-ue.pt")
    assert len(made["losses"]) == 3 and made["weights"]["layers.1.weight"].shape[0] == 10
    monkeypatch.setitem(PROTECTIONS, "em-class", replace(PROTECTIONS["em-class"], victim="mlp"))
    train.main(command)                                    # the entry's own is the surrogate, too
    said = capsys.readouterr().out
    assert "em-class: made again, " in said and "mlp on em-class-le" in said
    monkeypatch.setitem(VICTIMS, "mlp", Victim(MLP, class_scores))
    assert "VICTIMS mlp: expected training=dict(" in refusal(train.main, command, capsys)


def blurred(net, distance, images, sampler, seeds, report):
    """A purifier of one's own."""
    return F.avg_pool2d(images, 3, stride=1, padding=1)


def test_main_takes_a_purifier_of_ones_own(tmp_path, small_run, monkeypatch, capsys):
    shutil.copytree(small_run, tmp_path / "run")
    monkeypatch.setitem(le.PURIFIERS, "blur", blurred)
    train.main([*SMALL, "--purifier", "blur", "--protections", "em-class",
                "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "em-class: kept" in said and "em-class-le: made again, purifier, " in said
    before = unet.read(small_run / "em-class-le.pt")["images"]
    assert not torch.equal(unet.read(tmp_path / "run" / "em-class-le.pt")["images"], before)


def test_claim_lets_processes_of_one_run_in_and_another_data_set_not(tmp_path):
    note = tmp_path / "data.txt"
    _, _, c = train.parse(["--out", str(tmp_path)])
    for written in ("", "shapes"):                         # by another process: opened, or done
        note.write_text(written)
        train.claim(c)
        assert note.read_text() == "shapes"
    c.data = "cifar10"
    with pytest.raises(BadInput, match="belongs to --data shapes"):
        train.claim(c)
    assert note.read_text() == "shapes"


def test_main_ddpm_goes_on_from_a_checkpoint(tmp_path, capsys):
    small = ["ddpm", *SMALL, "--ddpm.steps", "1", "--ddpm.lr", "1e-9"]
    train.main([*small, "--seed", "1", "--out", str(tmp_path / "first")])
    start = ["--unet_start", str(tmp_path / "first" / "ddpm.pt")]
    train.main([*small, *start, "--out", str(tmp_path / "second")])
    first, second = [unet.load(tmp_path / name / "ddpm.pt").state_dict()
                     for name in ("first", "second")]
    assert all(torch.allclose(w, second[name], atol=1e-6) for name, w in first.items())
    assert not (tmp_path / "first" / "em-class.pt").exists()


def test_main_stops_in_one_line_when_a_loss_is_not_a_number(tmp_path, capsys):
    wild = ["ddpm", *SMALL, "--perceptual.lr", "1e9", "--out", tmp_path / "run"]
    said = refusal(train.main, wild, capsys)
    assert "vgg: " in said and "a lower learning rate" in said
    assert not (tmp_path / "run" / "vgg.pt").exists()


def test_main_paper_runs_at_toy_size(tmp_path, monkeypatch, capsys):
    narrow = (4, (2, 2, 3, 3, 3), 10)                      # VGG-16 with fewer channels
    monkeypatch.setattr(VGG.__init__, "__defaults__", narrow)
    torch.save(awake(VGG()).state_dict(), tmp_path / "vgg16-397923af.pth")
    train.main(["--config", "paper", "--limit", "2", "--resnet.widths", "8,8,8,8,8",
                "--unet.width", "8", "--unet.blocks", "1", "--lpips", "",
                "--protections", "em-sample,cp-sample",    # which begin with the other two
                "--vgg_weights", str(tmp_path / "vgg16-397923af.pth"),
                "--out", str(tmp_path / "run")])
    assert "| cp-sample |" in capsys.readouterr().out and not (tmp_path / "run" / "vgg.pt").exists()


def interrupting(label):
    """In place of `Progress`: somebody presses Ctrl-C."""
    return lambda done, total, **values: signal.raise_signal(signal.SIGINT)


def test_main_interrupted_shows_no_traceback_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "Progress", interrupting)
    said = refusal(train.main, ["ddpm", *SMALL, "--out", tmp_path / "run"], capsys, code=130)
    assert said.strip() == "train.py: interrupted; the same command goes on from here"
    assert not list((tmp_path / "run").glob("*.pt"))       # nothing half-written


@pytest.mark.parametrize("arguments, message", [
    (["--classifier.epoch", "3"], "--classifier.epoch"), (["evaluate"], "evaluate"),
    (["--classifier.epochs", "many"], "--classifier.epochs many: expected a value such as 6"),
    (["--sampler.steps", "3.5"], "--sampler.steps 3.5: expected a value such as 4"),
    (["--noise.em-class.shared", "row"], "--noise.em-class.shared"),
    (["--resnet.strides", "2,x"], "--resnet.strides 2,x: expected a value such as (2, 2, 2)"),
    (["--images.protected", "0"], "--images.protected 0"), (["--seed", str(2 ** 45)], "--seed"),
    (["--sampler.pixel_weight", "1e999"], "--sampler.pixel_weight inf"),
    (["--evaluate", "train"], "--evaluate"), (["--victim", "oracle"], "--victim"),
    (["--protections", "em,ps"], "--protections: expected em-class,"),
    (["--protections", "published"], "--protections"), (["--lpips", "l.pth"], "--vgg_weights"),
    (["--protections", ""], "--protections"), (["--out", "file/run"], "file"),
    (["--data", "nowhere"], "expected shapes, cifar10 or an existing folder"),
    (["--data", "cifar10", "--root", "nowhere.tar.gz"], "nowhere.tar.gz: no such file"),
    (["--root", "cifar.tar.gz"], "--root: expected --data cifar10"),
    (["--sampler.steps", "99", "--sampler.t_star", "36"], "steps"),
    (["--sampler.t_star", "200"], "--ddpm.levels"), (["--epsilon", "0.5"], "--epsilon: expected 1"),
    (["--limit", "1"], "--limit: expected 2 or more"), (["--size", "30"], "--unet"),
    (["--resnet.strides", "2,2"], "--resnet"), (["--vgg.convs", ""], "--vgg"),
    (["ddpm", "--unet_start", "none.pt", "--sampler.perceptual_weight", "0"], "none.pt"),
    (["--resnet.widths", "4,8,8,8"], "--resnet.widths: expected 8 or more each"),
    (["--unet.width", "2"], "--unet.width: expected 4 or more"),
    (["--ddpm.tilt", "5000"], "--ddpm.tilt: expected at most 10"),
])
def test_main_refuses_bad_input_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    short = [] if "--limit" in arguments else ["--limit", "4"]
    said = refusal(train.main, [*arguments, *short], capsys)
    assert message in said and said.count("\n") == 1
    assert not list(tmp_path.rglob("*.pt"))                # nothing half-written
    assert "--unet_start" in arguments or len(list(tmp_path.iterdir())) == 1


def test_parse_lets_options_override_the_configuration_of_the_data():
    assert configured().unet["width"] == train.DEFAULTS["unet.width"]
    ours = configured("--data", "cifar10", "--sampler.steps", "7", "--seed", "3")
    assert ours.images["protected"] == 6000 and ours.seed == 3
    assert Sampler(**ours.sampler) == replace(le.SAMPLERS["photographs"], steps=7)
    assert configured("--data", "a folder").noise["em-class"]["rounds"] == 24
    released = configured("--config", "released")
    assert Sampler(**released.sampler) == le.SAMPLERS["released"]
    runs = [c.run.name for c in (configured(), released, configured("--limit", 9), ours)]
    assert runs == ["shapes", "shapes-released", "shapes-limit9", "cifar10"]
    both = configured("--data", "cifar10", "--config", "paper", "--config", "released")
    assert both.run.name == "cifar10-paper-released" and both.unet["width"] == 128
    assert Sampler(**both.sampler) == le.SAMPLERS["released"]
    assert configured("--data", "cifar10", "--config", "shapes").unet == configured().unet
    quick = configured("--config", "quick")                # from which the story goes on
    assert vars(quick) == vars(configured()) | dict(protections=("em-class",))


def test_parse_limit_shortens_batches_to_what_processes_can_share(monkeypatch):
    assert configured("--limit", 4).ddpm["batch_size"] == 4
    monkeypatch.setattr(train, "PROCESSES", 3)
    monkeypatch.setitem(train.DEFAULTS, "ddpm.batch_size", 12)
    short = configured("--limit", 4)
    assert short.ddpm["batch_size"] == 6 and short.classifier["batch_size"] == 4
    assert configured("--limit", 40).ddpm["batch_size"] == 12


def test_parse_config_paper_is_the_papers_protocol():
    c = configured("--data", "cifar10", "--config", "paper")
    with torch.device("meta"):
        networks = ResNet(**c.resnet, classes=10), UNet(**c.unet)
    sizes = [sum(p.numel() for p in net.parameters()) for net in networks]
    assert sizes == [11_173_962, 35_746_307]               # ResNet-18's, and the released U-Net's
    em = c.noise["em-sample"]
    assert (em["noise_steps"], em["step"]) == (20, 0.1)
    assert (c.ddpm["levels"], c.images["test"]) == (T, 10000)
    assert c.noise["cp-class"]["batch_size"] == 512 and c.noise["cp-class"]["surrogates"] == 1


# -- torchrun --------------------------------------------------------------------------------------

def test_processes_says_that_there_are_more_of_them_than_gpus(monkeypatch):
    monkeypatch.setattr(le, "PROCESSES", 2)
    monkeypatch.setattr(le, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", int)   # none
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(BadInput, match="more processes than GPUs"):
        with le.processes():
            raise AssertionError


two_processes = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two GPUs, or none")


def torchrun(folder, *arguments):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments]
    return run(folder, *command)


@two_processes
def test_main_torchrun_gets_the_table_that_one_process_gets(tmp_path, capsys):
    small = [*SMALL[2:], "--images.protected", "16", "--images.unprotected", "47", "--images.test",
             "20", "--images.validation", "2", "--ddpm.steps", "5", "--perceptual.epochs", "1",
             "--simclr.epochs", "3", "--protections", "cp-class"]
    said = torchrun(HERE, "train.py", *small, "--out", tmp_path / "two")
    train.main([*small, "--out", str(tmp_path / "one")])
    said += capsys.readouterr().out
    rows = re.findall(r"^\| cp-class.*$", said, re.M)
    assert len(rows) == 2 and rows[0] == rows[1]           # and only one of two processes talks
    for name in ("cp-class", "vgg", "simclr-cp-class-ue"):
        one, two = [unet.read(tmp_path / out / f"{name}.pt") for out in ("one", "two")]
        assert one["parts"] == two["parts"]
    one, two = [unet.load(tmp_path / out / "ddpm.pt") for out in ("one", "two")]
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
