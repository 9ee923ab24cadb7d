"""Tests, usable as an autograder: each names the function and the property. About a minute.

    python -m pytest                      all
    python -m pytest -k q_sample          the tests of one function
"""
import base64
import copy
import functools
import importlib
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
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
from attacks import (EPSILON, PROTECTIONS, Protection, Victim, class_scores, crop_flip, min_min,
                     noise_step, nt_xent_scores, partner_scores, publish)
from le import BadInput, Sampler, guidance, joint_conditioned_mean, purify
from perceptual import VGG, PerceptualDistance
from studies import arrays, contrastive, handout, pictures, purify as own_images, scenarios
from studies.grading import CLAIMS, graded
from unet import (ALPHA_BAR, BETA, T, UNet, ddpm_loss, p_sample, posterior, predict_x0, q_sample,
                  sample, sigma, visited_levels)

HERE = Path(__file__).parent
CIFAR10_MINI = HERE.parent / "shared" / "data" / "cifar-10-mini.tar.gz"
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
    assert torch.allclose(q_sample(one, 36, zero), one * signal)
    assert torch.allclose(q_sample(zero, 36, one), one * math.sqrt(variance))


def test_q_sample_takes_one_level_per_image():
    x0, eps = torch.randn(3, 3, 4, 4), torch.randn(3, 3, 4, 4)
    mixed = q_sample(x0, torch.tensor([1, 36, 1000]), eps)
    for i, t in enumerate((1, 36, 1000)):
        assert torch.equal(mixed[i:i + 1], q_sample(x0[i:i + 1], t, eps[i:i + 1]))


def test_predict_x0_inverts_q_sample():
    x0, eps = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    for t in (1, 36, 500, T):
        assert torch.allclose(predict_x0(q_sample(x0, t, eps), t, eps), x0)


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


WITH_ATTENTION = dict(width=32, mults=(1, 2, 2), blocks=2, attention=(8,), dropout=0.1, patch=1)


@pytest.mark.parametrize("config", [TINY, WITH_ATTENTION])
def test_UNet_keeps_the_shape_and_reads_the_level(config):
    net, x = awake(UNet(**config)), torch.randn(2, 3, 32, 48)
    y = net(x, 5)
    assert y.shape == x.shape
    assert torch.equal(y, net(x, torch.tensor([5, 5])))
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
    assert torch.equal(seen[0][0], torch.tensor([0.0] * 4 + [1.0] * 4))


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
    assert torch.allclose(strided, x, atol=1e-5)


@pytest.mark.parametrize("t, s", [(36, 35), (500, 20), (5, 0)])
def test_ddim_keeps_the_noise_and_its_variance_is_none(t, s):
    x0, eps = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    mean, var = unet.ddim(x0, q_sample(x0, t, eps), t, s)
    assert torch.allclose(mean, q_sample(x0, s, eps)) and (var == 0).all()


def test_ddim_of_a_perfect_network_takes_any_strides_to_the_same_image():
    x0, eps = torch.rand(2, 3, 4, 4).double() * 2 - 1, torch.randn(2, 3, 4, 4).double()

    def perfect(xt, t):
        return (xt - ALPHA_BAR[t].sqrt() * x0) / (1 - ALPHA_BAR[t]).sqrt()
    for steps in (1, 3, 50):
        assert torch.allclose(sample(perfect, q_sample(x0, 50, eps), steps, 50, unet.ddim), x0)


def test_p_sample_to_level_zero_is_the_clipped_prediction():
    net, xt = awake(UNet(**TINY)), torch.randn(2, 3, 32, 32)
    x0 = predict_x0(xt, 3, net(xt, 3)).clamp(-1, 1)
    assert torch.allclose(p_sample(net, xt, 3, 0, torch.randn_like(xt)), x0, atol=1e-6)


def checkpoint(net, **more):
    return dict(config=net.config, weights=net.state_dict(), **more)


def test_save_load_unet_round_trip(tmp_path):
    net, x = awake(UNet(**TINY)), torch.randn(1, 3, 32, 32)
    unet.save(tmp_path / "u.pt", checkpoint(net, max_level=100))
    loaded = unet.load(tmp_path / "u.pt")
    assert torch.equal(loaded(x, 7), net(x, 7)) and loaded.max_level == 100
    assert [path.name for path in tmp_path.iterdir()] == ["u.pt"]


def test_load_unet_reads_bare_weights_of_the_released_layout(tmp_path, monkeypatch):
    defaults = (8, (1, 2), 1, (16,), 0.0, 2, 32)           # a small network for the paper's
    monkeypatch.setattr(UNet.__init__, "__defaults__", defaults)
    net, x = awake(UNet()), torch.randn(1, 3, 32, 32)
    torch.save(net.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    assert torch.equal(unet.load(tmp_path / "diffusion_pytorch_model.bin")(x, 7), net(x, 7))


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
    np.save(tmp_path / "evil.npy", np.array([Malice()]), allow_pickle=True)
    with pytest.raises(BadInput, match="evil.pt"):
        unet.read(tmp_path / "evil.pt")
    with pytest.raises(BadInput, match="evil.npy"):
        arrays.read_array(tmp_path / "evil.npy")
    assert "ran code" not in capsys.readouterr().out


UNET, SMALL_VGG = UNet(**TINY), VGG(width=4, convs=(1, 1, 1, 1, 1))
NAN = {name: w * math.nan for name, w in UNET.state_dict().items()}


@pytest.mark.parametrize("content, message", [
    ({"something": 1}, "linear_1.weight is .*expected"),
    (["a", "b"], "holds a list"),
    (torch.zeros(3), "holds a Tensor"),
    (checkpoint(SMALL_VGG), "not the configuration of a U-Net"),
    (checkpoint(UNET) | {"config": dict(TINY, width="8")}, "not the configuration"),
    (checkpoint(UNET) | {"config": dict(TINY, mults=())}, "is .*expected"),
    (checkpoint(UNET) | {"config": dict(TINY, width=10 ** 9)}, "not the configuration"),
    (checkpoint(UNET) | {"config": dict(TINY, colour="red")}, "not the configuration"),
    (checkpoint(UNET) | {"max_level": "all"}, "not the configuration"),
    (checkpoint(UNET) | {"max_level": 10 ** 6}, "not the configuration"),
    (checkpoint(UNET) | {"weights": None}, "holds no weights"),
    (checkpoint(UNET) | {"weights": {"conv_in.weight": 3}}, r"is \['nothing'\]"),
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


def test_PerceptualDistance_is_zero_on_equal_images_symmetric_and_per_image():
    distance, x, y = small_distance(), images(3), images(3)
    assert torch.equal(distance(x, x), torch.zeros(3))
    assert torch.allclose(distance(x, y), distance(y, x)) and (distance(x, y) > 0).all()
    assert torch.allclose(distance(x, y)[1:2], distance(x[1:2], y[1:2]), atol=1e-6)


class OneMap(torch.nn.Module):
    """For a VGG: two channels on two positions, the first two colours of the image."""
    taps, features = [1], [torch.nn.Conv2d(3, 2, 1)]

    def stages(self, x):
        return [x[:, :2]]


def test_PerceptualDistance_by_hand():
    x = torch.tensor([[[[3.0, 0.0]], [[4.0, 1.0]], [[0.0, 0.0]]]])   # vectors (3, 4) and (0, 1)
    y = torch.tensor([[[[5.0, 2.0]], [[0.0, 0.0]], [[0.0, 0.0]]]])   # vectors (5, 0) and (2, 0)
    # unit length: (.6, .8) (0, 1) against (1, 0) (1, 0); squared differences (.16, .64) and (1, 1);
    # weights 2 and 3, mean of two positions
    expected = ((2 * 0.16 + 3 * 0.64) + (2 * 1 + 3 * 1)) / 2
    got = PerceptualDistance(OneMap(), weights=[torch.tensor([2.0, 3.0])])(x, y)
    assert math.isclose(got.item(), expected, rel_tol=1e-5)


def test_PerceptualDistance_gradient_by_finite_differences():
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
    assert torch.equal(plain(x, y), PerceptualDistance(vgg)(x, y))
    assert torch.equal(weighted(x, y), PerceptualDistance(vgg, linear)(x, y))
    with pytest.raises(BadInput, match="lin0.model.1.weight"):
        perceptual.load(tmp_path / "vgg16.pth", tmp_path / "vgg16.pth")
    with pytest.raises(BadInput, match="features.0.weight"):
        perceptual.load(tmp_path / "lpips.pth")


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
    assert torch.allclose(got, torch.from_numpy(np.array(pillow)), atol=1e-5)


def test_random_resized_crop_draws_boxes_of_the_asked_area_and_aspect():
    ramp = torch.arange(32.0) + 0.5                        # the view says which box it shows
    x = torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32), torch.ones(32, 32)])
    x = x.expand(500, -1, -1, -1)
    view = attacks.random_resized_crop(x, torch.Generator().manual_seed(0), 16)
    assert view.shape == (500, 3, 16, 16)
    assert torch.allclose(view[:, 2], torch.ones(500, 16, 16))  # weights of a pixel add up to one
    inner = view[:, :2, 4:12, 4:12]
    width, height = ((inner.amax((2, 3)) - inner.amin((2, 3))) * 16 / 7).unbind(1)
    area, aspect = width * height / 1024, width / height
    assert 0.19 < area.min() < 0.25 and 0.85 < area.max() < 1.01
    assert 0.7 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.4
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
    assert torch.allclose(y.amax(1), x.amax(1)) and torch.allclose(y.amin(1), x.amin(1), atol=1e-6)
    assert torch.equal(attacks.hue(grey, torch.rand(2, 1, 1, 1)), grey)
    assert torch.allclose(attacks.hue(x, torch.ones(1)), x, atol=1e-6)


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


def linear_network(seed=0, size=8, outputs=3):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * size ** 2, outputs))


def plain_scores(net, x, labels, generator):
    return net(x), labels


PLAIN = Victim(linear_network, plain_scores)               # a victim that does not augment


def test_noise_step_descends_by_the_sign_within_epsilon():
    perturbation = torch.tensor([0.0, 0.0, 0.0, 0.7, -0.8])
    gradient = torch.tensor([3.0, -1e-9, 0.0, -5.0, 5.0])
    got = noise_step(perturbation, gradient, 0.5, 1.0)
    assert torch.allclose(got, torch.tensor([-0.5, 0.5, 0.0, 1.0, -1.0]))


def test_noise_gradient_adds_up_over_the_images_that_share_a_perturbation():
    net, x, y = linear_network(), 0.2 + 0.6 * images(6, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    wearer = torch.tensor([0, 1, 0, 0, 1, 1])
    # cross-entropy of a linear model has the gradient W^T (softmax - onehot)
    own = ((net(x).softmax(1) - F.one_hot(y, 3)) @ net[1].weight).view_as(x) / 6
    expected = torch.stack([own[wearer == r].sum(0) for r in range(2)])
    got = attacks.noise_gradient(net, PLAIN, x, y, torch.zeros(2, 3, 8, 8), wearer, None)
    assert torch.allclose(got, expected, atol=1e-7)


@pytest.mark.parametrize("class_wise", [True, False])
def test_min_min_lowers_the_loss_within_epsilon(class_wise):
    x, y = ((0.2 + 0.6 * images(60, 8)) * 255).round() / 255, torch.arange(60) % 3
    seen = []
    ue = min_min(x, y, PLAIN, class_wise=class_wise, rounds=6, batch_size=20, noise_steps=3,
                 lr=0.01, report=lambda done, total, loss: seen.append((done, float(loss))))
    net = linear_network(1000)                             # as the surrogate began
    noise = ue - x
    assert 0.9 * EPSILON < noise.abs().max() <= EPSILON + 1e-6 and noise.min() < 0 < noise.max()
    assert F.cross_entropy(net(ue), y) < F.cross_entropy(net(x), y) - 0.1
    assert [done for done, _ in seen] == [1, 2, 3, 4, 5, 6] and seen[-1][1] < 0.7 * seen[0][1]
    if class_wise:
        assert torch.allclose(noise[y == 1], noise[1].expand(20, -1, -1, -1), atol=1e-6)


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
    assert torch.allclose(ue, start, atol=1e-6)


def test_min_min_depends_on_the_seed_alone():
    x, y = images(20, 8), torch.arange(20) % 3
    first = min_min(x, y, PLAIN, rounds=2, seed=1)
    torch.manual_seed(5)
    assert torch.equal(first, min_min(x, y, PLAIN, rounds=2, seed=1))
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


def half_network(seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32, 16, bias=False))


def test_partner_scores_teach_noise_that_makes_views_agree():
    # noise can make the halves of each image alike, and unlike the others'
    scores = functools.partial(partner_scores, view=half_view)
    x, g = ((0.4 + 0.2 * images(24, 8)) * 255).round() / 255, torch.Generator().manual_seed(0)
    ue = min_min(x, torch.zeros(24), Victim(half_network, scores), rounds=10, train_batches=1,
                 noise_steps=8, lr=0.001, batch_size=24)

    def loss(x):
        net = half_network(1000)
        draws = [F.cross_entropy(*scores(net, x, None, g)).item() for _ in range(20)]
        return sum(draws) / 20
    assert loss(ue) < loss(x) - 0.1 and (ue - x).abs().max() <= EPSILON + 1e-6


def test_PROTECTIONS_fool_one_of_two_victims_and_start_from_one_another():
    for name, protection in PROTECTIONS.items():
        assert protection.victim in ("classifier", "simclr") and callable(protection.make)
        assert not protection.start or PROTECTIONS[protection.start].victim == protection.victim
        assert protection.settings.get("class_wise", False) == name.endswith("class")


# -- le.py -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def nets():
    torch.manual_seed(0)
    return awake(UNet(**TINY)), small_distance()


JOINT = Sampler(t_star=12, rounds=2, steps=3, pixel_weight=1e4, pixel_above=6,
                perceptual_weight=10.0, perceptual_below=6)
FREE = replace(JOINT, pixel_weight=0.0, perceptual_weight=0.0)


def colour(x):
    return x


def grey(x):
    """Grey as the distances may see it, written another way than in le.py."""
    return torch.einsum("ij,bjhw->bihw", torch.full((3, 3), 1 / 3, dtype=x.dtype), x)


@pytest.mark.parametrize("see", [colour, grey])
def test_guidance_pixel_is_the_gradient_of_the_mean_squared_difference(see):
    x, y = torch.randn(2, 3, 8, 8).double().requires_grad_(), torch.randn(2, 3, 8, 8).double()
    distance = (see(x) - see(y)).square().mean((1, 2, 3)).sum()
    expected, = torch.autograd.grad(7 * distance, x)
    sampler = Sampler(pixel_weight=7.0, pixel_above=10, perceptual_below=10, compare=see.__name__)
    assert torch.allclose(guidance(x.detach(), y, None, 20, None, sampler), expected)


@pytest.mark.parametrize("see", [colour, grey])
def test_guidance_perceptual_is_the_gradient_of_the_distance(nets, see):
    distance = copy.deepcopy(nets[1]).double()
    x, y = (images(2).double() * 2 - 1).requires_grad_(), images(2).double() * 2 - 1
    d = distance(see(x / 2 + 0.5), see(y / 2 + 0.5)).sum()
    expected, = torch.autograd.grad(7 * d, x)
    sampler = Sampler(pixel_above=10, perceptual_weight=7.0, perceptual_below=10,
                      compare=see.__name__)
    features = le.features(y, distance, sampler)
    assert torch.allclose(guidance(x.detach(), y, features, 10, distance, sampler), expected)


def test_guidance_by_level_and_both_at_once(nets):
    x, y = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    features = le.features(y, nets[1], JOINT)

    def at(t, **changes):
        return guidance(x, y, features, t, nets[1], replace(JOINT, **changes))
    pixel, perceived = at(7, perceptual_weight=0.0), at(6, pixel_weight=0.0)
    assert pixel.abs().max() > 0 and perceived.abs().max() > 0
    assert torch.equal(at(7), pixel) and torch.equal(at(6), perceived)
    assert torch.allclose(at(7, perceptual_below=12), pixel + perceived)


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
    assert torch.allclose(pulled, torch.tensor([-0.2, 0.2]))


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
    y = purify(*nets, x, JOINT, seeds=[3, 4])
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


def picture(mode, size=(40, 36)):
    """A smooth Pillow image, different in every channel."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    bands = np.stack([3 * x + 60, 255 - 4 * y, 2 * (x + y), 255 * (x > y)], -1)
    rgba = Image.fromarray(bands.astype(np.uint8))
    if mode == "P":
        return rgba.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
    return rgba.convert(mode)


@pytest.mark.parametrize("mode, transparency, expected", [
    ("RGB", None, "RGB"), ("RGBA", None, "RGBA"), ("L", None, "L"), ("LA", None, "LA"),
    ("P", None, "RGB"), ("P", 0, "RGBA"), ("RGB", (60, 255, 0), "RGBA"), ("L", 168, "RGBA")])
def test_open_image_keeps_transparency(tmp_path, mode, transparency, expected):
    picture(mode).save(tmp_path / "a.png", transparency=transparency)
    image = le.open_image(tmp_path / "a.png")
    assert image.mode == expected
    if transparency is not None:
        assert image.getchannel("A").getextrema()[0] == 0


# An RGB PNG of 16 bits a channel, which Pillow cannot write
DEEP_PNG = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABEAIAAADA54+dAAAA"
            "D0lEQVR4nGNgYGRiZmEFAAAqABAazIwkAAAAAElFTkSuQmCC")


def test_open_image_turns_takes_the_first_frame_and_refuses(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                       # to be turned by 90 degrees
    picture("RGB").save(tmp_path / "turned.jpg", exif=exif)
    assert le.open_image(tmp_path / "turned.jpg").size == (36, 40)
    frames = [picture("RGB").rotate(90)]
    picture("RGB").save(tmp_path / "two.gif", save_all=True, append_images=frames)
    first = np.array(le.open_image(tmp_path / "two.gif").convert("RGB")).astype(int)
    assert np.abs(first - np.array(picture("RGB"))).mean() < 20
    (tmp_path / "deep.png").write_bytes(base64.b64decode(DEEP_PNG))
    picture("CMYK").save(tmp_path / "cmyk.jpg")
    (tmp_path / "text.png").write_text("not an image")
    wrong = {"deep.png": "16 bits", "cmyk.jpg": "mode CMYK", "text.png": "readable"}
    for name, message in wrong.items():
        with pytest.raises(BadInput, match=f"{name}: .*{message}"):
            le.open_image(tmp_path / name)


def test_open_image_refuses_image_bombs(tmp_path, monkeypatch):
    picture("RGB").save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadInput, match="large.png"):
        le.open_image(tmp_path / "large.png")


def mutations(content, count, seed=0):
    """Copies of a file with a few bytes changed, cut off, or twice there."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        data = bytearray(content)
        for place in rng.integers(0, len(data), rng.integers(1, 8)):
            data[place] = rng.integers(0, 256)
        start, stop = sorted(rng.integers(0, len(data), 2))
        yield bytes([data, data[:stop], data[:start] + data[stop:]][rng.integers(3)])


def test_fuzz_open_image_and_read_array_and_load_raise_BadInput_or_read(tmp_path):
    seeds = {"a.png": "PNG", "a.jpg": "JPEG", "a.webp": "WEBP", "a.bmp": "BMP", "a.gif": "GIF",
             "b.bmp": "TIFF"}                              # the content decides, not the name
    originals = {}
    for name, kind in seeds.items():
        content = io.BytesIO()
        picture("RGB", (12, 10)).save(content, kind)
        originals[name] = le.open_image, content.getvalue()
    for name in ("a.npy", "a.npz", "a.pt"):
        arrays.write_array(tmp_path / name, images(2, 4), {})
        originals[name] = arrays.read_array, (tmp_path / name).read_bytes()
    torch.save(checkpoint(VGG(width=1, convs=(1,))), tmp_path / "vgg.pt")
    originals["vgg.pt"] = perceptual.load, (tmp_path / "vgg.pt").read_bytes()
    refused = 0
    for name, (reader, content) in originals.items():
        for mutated in mutations(content, 30):
            (tmp_path / name).write_bytes(mutated)
            try:
                reader(tmp_path / name)
            except BadInput as error:
                refused += 1
                assert name in str(error)
    assert refused > 100


# -- studies/purify.py and arrays.py: the user's own files -----------------------------------------

@pytest.fixture
def checkpoints(nets, tmp_path):
    """The options that name two small checkpoints, and a short way."""
    unet.save(tmp_path / "unet.pt", checkpoint(nets[0]))
    unet.save(tmp_path / "vgg.pt", checkpoint(nets[1].vgg))
    files = ["--unet", str(tmp_path / "unet.pt"), "--perceptual", str(tmp_path / "vgg.pt")]
    return [*files, "--t_star", "12", "--steps", "2", "--pixel_above", "6"]


@pytest.mark.parametrize("length, tile, overlap", [(32, 128, 16), (129, 128, 16), (500, 128, 16),
                                                   (1000, 64, 8)])
def test_positions_cover_the_length_with_overlap(length, tile, overlap):
    starts = arrays.positions(length, tile, overlap)
    assert starts[0] == 0 and starts[-1] + tile >= length and starts[-1] == max(0, length - tile)
    assert all(a + tile - b >= overlap for a, b in zip(starts, starts[1:]))


def test_purify_any_keeps_the_size_and_equals_purify_where_it_fits(nets):
    x = images(2, 32)
    expected = purify(*nets, x, JOINT, [5 * 1_000_003, 6 * 1_000_003])
    assert torch.equal(arrays.purify_any(*nets, x, JOINT, [5, 6]), expected)
    for size in ((1, 1), (5, 47), (33, 32)):
        y = arrays.purify_any(*nets, torch.rand(1, 3, *size), JOINT, [0])
        assert y.shape == (1, 3, *size) and torch.allclose(y * 255, (y * 255).round(), atol=1e-3)


def test_purify_any_blends_tiles_without_seams():
    net = UNet(**TINY).eval().requires_grad_(False)        # predicts no noise: its end is zero
    x = torch.full((1, 3, 80, 80), 0.5)
    sampler = replace(FREE, t_star=1, steps=1, rounds=1)   # no diffusion to speak of
    y = arrays.purify_any(net, None, x, sampler, [0], tile=32, overlap=8)
    assert (y - 0.5).abs().max() < 0.06 and y.std() > 0


def files_in(folder):
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


def test_main_purify_purifies_a_folder_to_pngs_and_says_what_it_leaves_out(
        tmp_path, checkpoints, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "deep" / "er").mkdir(parents=True)
    picture("RGB").save(source / "a.png")
    picture("RGB").save(source / "a.jpg")                  # beside a.png
    picture("RGBA").save(source / "deep" / "b.png")
    picture("L").save(source / "deep" / "er" / "c.bmp")
    picture("LA").save(source / "d.PNG")
    picture("RGB", (7, 5)).save(source / "f.webp", lossless=True)
    (source / "notes.txt").write_text("not an image")
    (source / "linked").symlink_to(tmp_path)
    own_images.main([str(source), str(out), *checkpoints])
    said = capsys.readouterr().out
    assert "2 that are not images" in said and "notes.txt" in said and "linked" in said
    made = {name: Image.open(path) for name, path in files_in(out).items()}
    assert {name: (image.mode, image.size) for name, image in made.items()} == {
        "a.png": ("RGB", (40, 36)), "a.jpg.png": ("RGB", (40, 36)), "d.PNG.png": ("LA", (40, 36)),
        "deep/b.png": ("RGBA", (40, 36)), "deep/er/c.bmp.png": ("L", (40, 36)),
        "f.webp.png": ("RGB", (7, 5))}
    alpha = made["deep/b.png"].getchannel("A").tobytes()
    assert alpha == picture("RGBA").getchannel("A").tobytes()
    assert made["a.png"].tobytes() != picture("RGB").tobytes()
    own_images.main([str(source / "a.png"), str(tmp_path / "one.png"), *checkpoints])
    assert (tmp_path / "one.png").read_bytes() == (out / "a.png").read_bytes()


def test_main_purify_goes_on_and_names_what_it_cannot_read(tmp_path, checkpoints, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in "abc":
        picture("RGB").save(source / f"{name}.png")
    own_images.main([str(source), str(out), *checkpoints])
    first = {name: path.read_bytes() for name, path in files_in(out).items()}
    (out / "a.png").write_bytes(first["a.png"][:100])      # half a file, and an empty one
    (out / "b.png").write_bytes(b"")
    (source / "0.png").write_bytes((source / "a.png").read_bytes()[:54])
    with pytest.raises(SystemExit) as stop:
        own_images.main([str(source), str(out), *checkpoints])
    said = capsys.readouterr()
    assert stop.value.code == 1 and "1 files could not be read" in said.err
    assert "1 of 4 are there already" in said.out and "0.png: not a readable image" in said.err
    assert {name: path.read_bytes() for name, path in files_in(out).items()} == first


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
def test_main_purify_takes_an_array_the_same_after_an_interruption(tmp_path, checkpoints, suffix,
                                                                     monkeypatch):
    x, source, out = images(70, 16), tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    arrays.write_array(source, x, dict(label=np.arange(70)))
    command = [str(source), str(out), *checkpoints]
    own_images.main(command)
    whole, others = arrays.read_array(out)
    assert whole.shape == x.shape and not torch.equal(whole, x)
    assert suffix != ".npz" or (others["label"] == np.arange(70)).all()
    out.unlink()

    def stopped(label):
        def report(done, total):
            if done == 70:
                raise KeyboardInterrupt
        return report
    with monkeypatch.context() as patch:
        patch.setattr(arrays, "Progress", stopped)
        patch.setattr(arrays.purify_array, "__defaults__", (0,))
        patch.setattr(arrays, "BATCH", 32)
        with pytest.raises(SystemExit) as stop:
            own_images.main(command)
        assert stop.value.code == 130 and not out.exists()
        with pytest.raises(SystemExit):                    # another seed does not take what is done
            own_images.main([*command, "--seed", "1"])
    assert len(list(tmp_path.glob("*.partial"))) == 2
    own_images.main(command)
    assert torch.equal(arrays.read_array(out)[0], whole)
    assert len(list(tmp_path.glob("*.partial"))) == 1


@pytest.mark.parametrize("name, content, message", [
    ("a.npy", np.zeros((4, 3, 8, 8), np.uint8), r"torch.uint8, \(4, 8, 3, 8\)"),
    ("a.npy", np.zeros((4, 8, 8, 3), np.float32), "float32"),
    ("a.npy", np.zeros((0, 8, 8, 3), np.uint8), "expected 8-bit"),
    ("a.npy", b"text", "not a readable .npy"),
    ("a.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, "
              b"'shape': (9000000000, 32, 32, 3)}" + b" " * 43 + b"\n", "not a readable .npy"),
    ("a.npz", dict(images=np.zeros(1)), "not a readable .npz"),
    ("a.npz", b"PK", "not a readable .npz"),
    ("a.pt", torch.zeros(2, 3, 4, 4, dtype=torch.bool), "torch.bool"),
    ("a.pt", torch.zeros(2, 3, 4, 4) - 1, "float32"),
    ("a.pt", torch.zeros(2, 3, 4, 4) * math.nan, "float32"),
    ("a.pt", {"images": torch.zeros(2, 3, 4, 4)}, "not a readable .pt"),
    ("a.pt", b"text", "not a whole file"),
])
def test_read_array_says_what_it_found(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif name == "a.npy":
        np.save(path, content)
    elif name == "a.npz":
        np.savez(path, **content)
    else:
        torch.save(content, path)
    with pytest.raises(BadInput, match=f"{name}: .*{message}|{name}: {message}"):
        arrays.read_array(path)


@pytest.mark.parametrize("arguments, message", [
    (["nowhere", "out"], "nowhere: no such file"),
    (["in", "in/out"], "expected a place outside in"),
    (["in", "in"], "expected a place outside in"),
    (["in", "out"], "--unet is missing; `python train.py ddpm"),
    (["in", "out", "--unet", "x.pt"], "--perceptual is missing; `python train.py ddpm"),
    (["in", "out", "--unet", "x.pt", "--perceptual", "y.pt"], "x.pt"),
    (["in", "out", "--steps", "0"], "steps"),
    (["in", "out", "--pixel_weight", "nan"], "weights"),
    (["in", "out", "--seed", "-1"], "--seed -1"),
    (["in", "out", "--fast"], "--fast"),
    (["in/a.npy", "out.npz"], "both end in"),
    (["in/a.png", "out.jpg"], "an image and a .png"),
    (["in/a.png", "in"], "an image and a .png"),
    (["in", "in/a.png"], "expected a place outside in"),
])
def test_main_purify_refuses_bad_input_in_one_line(
        tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    np.save("in/a.npy", np.zeros((1, 8, 8, 3), np.uint8))
    picture("RGB").save("in/a.png")
    said = refusal(own_images.main, arguments, capsys)
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_main_purify_refuses_targets_that_are_taken(tmp_path, checkpoints, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    picture("RGB").save(source / "a.jpg")
    (out / "a.jpg.png").mkdir(parents=True)
    command = [source, out, *checkpoints]
    assert "a.jpg.png: a folder" in refusal(own_images.main, command, capsys)
    (out / "a.jpg.png").rmdir()
    picture("RGB").save(source / "a.jpg.png")
    assert "would both become" in refusal(own_images.main, command, capsys)


def test_main_purify_takes_names_of_any_bytes_and_length(tmp_path, checkpoints, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in (b"\xff\xfe.jpg", "ü.png".encode(), b"l" * 251 + b".jpg"):
        with open(os.path.join(os.fsencode(source), name), "wb") as file:
            picture("RGB").save(file, "PNG")               # the content decides, not the name
    said = refusal(own_images.main, [source, out, *checkpoints], capsys, code=1)
    assert "its name leaves no room" in said
    assert sorted(os.listdir(os.fsencode(out))) == [b"\xc3\xbc.png", b"\xff\xfe.jpg.png"]


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


def cifar10_files(records=20):
    """The official layout in small: {name: bytes}, and the records (6, records, 3073) in them."""
    data = np.random.default_rng(0).integers(0, 256, (6, records, 3073), dtype=np.uint8)
    data[:, :, 0] %= 10
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    return {name: part.tobytes() for name, part in zip(names, data)}, data


def write_cifar10(path, files, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_load_data_keeps_the_test_batch_of_cifar10_apart(tmp_path):
    files, data = cifar10_files()
    root = write_cifar10(tmp_path / "c.tar.gz", files)
    cifar = ["--data", "cifar10", "--root", root]
    sets, _ = train.load_data(configured(*cifar, *asked_for(50, 30, 20, 15)))
    assert torch.equal(sets["test"][1], torch.from_numpy(data[5, :15, 0]).long())
    assert len({x.numpy().tobytes() for part, _ in sets.values() for x in part}) == 115
    with pytest.raises(BadInput, match="100 images for 51 protected"):
        train.load_data(configured(*cifar, *asked_for(51, 30, 20, 15)))
    with pytest.raises(BadInput, match="--images.test 21: .* has 20"):
        train.load_data(configured(*cifar, *asked_for(50, 30, 20, 21)))


def test_cifar10_reads_planes_and_labels(tmp_path):
    files, data = cifar10_files()
    (x, y), (test_x, test_y) = train.cifar10(write_cifar10(tmp_path / "c.tar.gz", files))
    assert x.shape == (100, 3, 32, 32) and test_x.shape == (20, 3, 32, 32)
    record = data[2, 5]                                    # the sixth of the third batch: image 45
    assert y[45] == record[0]
    assert math.isclose(x[45, 1, 3, 7], record[1 + 1024 + 3 * 32 + 7] / 255, rel_tol=1e-6)
    assert torch.equal(test_y, torch.from_numpy(data[5, :, 0]).long())


@pytest.mark.parametrize("mode", ["w:gz", "w:xz", "w:bz2"])
@pytest.mark.parametrize("damage", ["cut", "a bit turned over"])
def test_cifar10_notices_a_damaged_archive(tmp_path, mode, damage):
    path = write_cifar10(tmp_path / "c.tar.gz", cifar10_files()[0], mode)
    content = bytearray(path.read_bytes())
    place = len(content) // 2
    content[place] ^= 1
    path.write_bytes(content[:place] if damage == "cut" else content)
    with pytest.raises(BadInput, match="c.tar.gz"):
        train.cifar10(path)


@pytest.mark.parametrize("name, start, cut", [
    ("data_batch_2.bin", b"", -1), ("test_batch.bin", b"\x0b", None), ("data_batch_5.bin", b"", 0)])
def test_cifar10_names_the_broken_file(tmp_path, name, start, cut):
    files, _ = cifar10_files()
    files[name] = (start + files[name][len(start):])[:cut]
    with pytest.raises(BadInput, match=f"{name} is missing, cut off or mislabelled"):
        train.cifar10(write_cifar10(tmp_path / "c.tar.gz", files))


@pytest.mark.skipif(not CIFAR10_MINI.exists(), reason="no real CIFAR-10 beside the project")
def test_cifar10_reads_real_images():
    (x, y), (test_x, test_y) = train.cifar10(CIFAR10_MINI)
    assert len(x) == 12000 and len(test_x) == 2400 and set(y.tolist()) == set(range(10))
    neighbours = (x[:, :, 1:] - x[:, :, :-1]).abs().mean()
    strangers = (x[1:] - x[:-1]).abs().mean()
    assert 3 * neighbours < strangers                      # photographs are smooth


def class_folders(root, per_class=12, size=(40, 36)):
    for name, colour in (("cat", (200, 30, 30)), ("dog", (30, 30, 200))):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            suffix = "png" if i % 2 else "jpg"
            Image.new("RGB", size, colour).save(root / name / f"{i}.{suffix}")
    return root


def test_folder_crops_resizes_and_labels(tmp_path):
    x, y, classes = train.folder(class_folders(tmp_path / "pets"), 32)
    assert x.shape == (24, 3, 32, 32) and y.tolist() == [0] * 12 + [1] * 12
    assert classes == ["cat", "dog"]
    assert (x[0].mean((1, 2)) * 255 - torch.tensor([200, 30, 30])).abs().max() < 3  # JPEG


def test_folder_names_what_it_cannot_use(tmp_path):
    pets = class_folders(tmp_path / "pets")
    (pets / "cat" / "bad.png").write_bytes(b"not an image")
    with pytest.raises(BadInput, match="bad.png"):
        train.folder(pets, 32)
    with pytest.raises(BadInput, match="two or more"):
        train.folder(pets / "cat", 32)


# -- train.py: victims and training ----------------------------------------------------------------

def test_linear_probe_separates_what_is_linear_in_the_features():
    encoder = torch.nn.Module()
    encoder.features = lambda x: x.flatten(1)
    x = torch.randn(300, 3, 2, 2)
    labels = (x.flatten(1) @ torch.randn(12) > 0).long()
    assert train.linear_probe(encoder, (x[:200], labels[:200]), (x[200:], labels[200:])) > 90
    random = torch.randint(0, 2, (300,))
    assert train.linear_probe(encoder, (x[:200], random[:200]), (x[200:], random[200:])) < 65


def silent(done, total, **values):
    pass


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 5])
def test_fit_takes_any_number_of_steps_and_lowers_the_loss(epochs):
    config = dict(widths=(8, 16), blocks=1, strides=(2,), classes=2)
    victim = Victim(functools.partial(train.new_network, train.ResNet, config), class_scores)
    x, y = torch.rand(8, 3, 8, 8), torch.arange(8) % 2
    made = train.fit(victim, x, y, epochs=epochs, batch_size=8, lr=0.1, seed=0, report=silent)
    assert len(made["losses"]) == epochs and all(map(math.isfinite, made["losses"]))


def probe_of(x, view, data):
    """Accuracy of a small SimCLR that is trained on x."""
    config = dict(widths=(8, 16, 32, 64), blocks=1, strides=(2, 2, 2), classes=10)
    scores = functools.partial(partner_scores, view=view, temperature=0.2)
    victim = Victim(functools.partial(train.new_network, train.SimCLR, config), scores)
    made = train.fit(victim, x, torch.zeros(len(x), dtype=torch.long), epochs=20, batch_size=64,
                     lr=0.2, seed=0, report=silent)
    net = victim.network(0).eval()
    net.load_state_dict(made["weights"])
    return train.linear_probe(net.encoder, data, data)


def test_SimCLR_can_be_fooled_by_a_code_that_is_added_after_the_views():
    # a positive control: if this fails, no noise could protect from SimCLR
    x, labels = train.shapes(1280, seed=0)
    code = torch.zeros_like(x)
    code[:, :, :16, :16] = contrastive.class_codes(10, 16, 48 / 255, seed=0)[labels]
    clean = probe_of(x, attacks.quadrant_view, (x, labels))
    after = functools.partial(contrastive.coded_view, view=attacks.quadrant_view)
    fooled = probe_of(torch.cat([x, code], 1), after, (x, labels))
    assert clean > 58 and fooled < clean - 15              # 68 and 43 when this was written


def test_train_unet_resumed_ends_where_an_uninterrupted_run_does(tmp_path):
    x = images(16)

    def run(partial, stop=None):
        def report(done, total, **values):
            if done == stop:
                raise KeyboardInterrupt
        net = train.new_network(UNet, TINY, 0)
        return train.train_unet(net, x, levels=20, tilt=1.0, steps=16, batch_size=4, lr=1e-3,
                                ema_decay=0.9, seed=0, report=report, partial=partial,
                                checkpoint_seconds=0)
    whole = run(tmp_path / "a")["weights"]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", stop=8)
    assert 0 < torch.load(tmp_path / "b", weights_only=True)["step"] < 16
    resumed = run(tmp_path / "b")["weights"]
    assert all(torch.allclose(w, resumed[name], atol=1e-6) for name, w in whole.items())


def test_train_unet_averages_the_weights_with_a_decay_that_ramps_up(tmp_path):
    def weights(ema_decay, steps):
        net = train.new_network(UNet, TINY, 0)
        made = train.train_unet(net, images(4), levels=20, tilt=1.0, steps=steps,
                                batch_size=4, lr=0.1, ema_decay=ema_decay, seed=0, report=silent,
                                partial=tmp_path / "none")
        return made["weights"]["conv_out.bias"].cpu()
    torch.manual_seed(0)
    start = UNet(**TINY).conv_out.bias.detach()
    trained = weights(0.0, 1)
    assert not torch.equal(trained, start)
    assert torch.allclose(weights(0.999, 1), 0.1 * start + 0.9 * trained, atol=1e-7)


def test_train_unet_draws_levels_by_their_noise(tmp_path, monkeypatch):
    seen = []

    def spy(net, x0, t, eps):
        seen.append(t.cpu())
        return sum(weights.sum() for weights in net.parameters())
    monkeypatch.setattr(train, "ddpm_loss", spy)
    for tilt in (0.0, 2.0):
        seen.clear()
        net = train.new_network(UNet, TINY, 0)
        train.train_unet(net, images(4), levels=20, tilt=tilt, steps=4, batch_size=500, lr=0.01,
                         ema_decay=0.9, seed=0, report=silent, partial=tmp_path / "none")
        share = torch.cat(seen).bincount(minlength=21)[1:] / 2000
        variance = (1 - ALPHA_BAR[1:21]) ** (tilt / 2)
        assert (share - variance / variance.sum()).abs().max() < 0.025


# -- train.py: what is kept ------------------------------------------------------------------------

SMALL = ["--limit", "4", "--resnet.widths", "8,8,8", "--resnet.strides", "2,2", "--unet.width", "8",
         "--vgg.width", "4", "--noise.cp-class.surrogates", "1", "--noise.cp-class.rounds", "1",
         "--noise.cp-sample.surrogates", "1", "--noise.cp-sample.rounds", "1"]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """The folder of a toy run, for those who only read it."""
    folder = tmp_path_factory.mktemp("run")
    train.main([*SMALL, "--out", str(folder)])
    return folder


def doubled(x, report):
    return dict(made=2 * x)


def test_cached_keeps_what_is_unchanged_and_says_what_has_changed(tmp_path, capsys):
    c = configured("--out", tmp_path)

    def said(**inputs):
        assert torch.equal(train.cached(c, "double", doubled, **inputs)["made"], 2 * inputs["x"])
        return capsys.readouterr().out.strip()
    assert said(x=torch.ones(2)) == "double: made"
    assert said(x=torch.ones(2)) == "double: kept"
    assert said(x=torch.zeros(2)) == "double: made again, changed: x"
    (tmp_path / "double.pt").write_bytes(b"half a file")
    assert "double.pt is damaged" in said(x=torch.zeros(2))
    assert [path.name for path in tmp_path.iterdir()] == ["double.pt"]


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


@pytest.mark.parametrize("file, line, edited, again", [
    ("train.py", "picture.resize((2 *", "# comment\n    picture.resize((3 *", set()),
    # a helper two calls away from what makes LEs
    ("unet.py", "return math.sqrt(1 / ALPHA_BAR[t].item() - 1)",
     "return 0.5 * math.sqrt(1 / ALPHA_BAR[t].item() - 1)",
     {"em-class-le", "classifier-em-class-le"}),
    ("attacks.py", "return net(crop_flip(x, generator)), labels",
     "return net(crop_flip(x, generator, 2)), labels",
     {"vgg", "em-class", "em-class-le", "classifier-clean", "classifier-em-class-ue",
      "classifier-em-class-le"}),
])
def test_cached_follows_the_code_but_not_comments(tmp_path, small_run, file, line, edited, again):
    folder = copy_of_the_project(tmp_path / "copy")
    shutil.copytree(small_run, tmp_path / "run")
    source = (folder / file).read_text()
    assert source.count(line) == 1
    (folder / file).write_text(source.replace(line, edited))
    said = run(folder, "train.py", *SMALL, "--protections", "em-class", "--out", tmp_path / "run")
    made = set(re.findall(r"^([\w-]+): made again, changed: ", said, re.M))
    assert made == again and "ddpm: kept" in said


def test_cached_follows_settings_and_inputs(tmp_path, small_run, capsys):
    shutil.copytree(small_run, tmp_path / "run")
    command = [*SMALL, "--protections", "em-class", "--out", str(tmp_path / "run")]
    train.main([*command, "--sampler.pixel_weight", "9"])
    said = capsys.readouterr().out
    assert "em-class-le: made again, changed: sampler" in said and "em-class: kept" in said
    assert "classifier-em-class-le: made again, changed: images" in said


# -- train.py: the story ---------------------------------------------------------------------------

def test_main_tells_the_whole_story(small_run):
    results = json.loads((small_run / "results.json").read_text())
    assert [row["protection"] for row in results["rows"]] == list(PROTECTIONS)
    assert set(results) == {"config", "floor", "rows"}
    assert set(results["rows"][0]) == {"protection", "clean", "ue", "le", "recovery", "psnr_ue",
                                       "psnr_le"}
    assert all(20 < row["psnr_ue"] < 60 and 0 <= row["le"] <= 100 for row in results["rows"])
    picture = Image.open(small_run / "figure.png")
    assert picture.size == (2 * 32 * 4, 2 * 32 * 13)    # four classes have an image here
    ue = unet.read(small_run / "cp-class.pt")["images"].float() / 255
    x = train.load_data(configured(*SMALL))[0]["protected"][0]
    assert 0 < (ue - x).abs().max() <= EPSILON + 1e-6
    assert not list(small_run.glob("*.partial")) and not list(small_run.glob("*.tmp"))


def red_corner(images, labels, victim, *, epsilon, seed, report):
    """A protection of one's own: a corner whose red says the class."""
    ue = images.clone()
    ue[:, 0, :4, :4] += (labels.view(-1, 1, 1) - 4.5) / 4.5 * epsilon
    return publish(ue, 0)


def test_main_takes_a_protection_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PROTECTIONS, "corner", Protection(red_corner))
    monkeypatch.setitem(train.DEFAULTS["noise"], "corner", {})
    train.main([*SMALL, "--protections", "corner", "--out", str(tmp_path)])
    assert "| corner |" in capsys.readouterr().out and (tmp_path / "corner-le.pt").exists()


def blurred(net, distance, images, sampler, seeds, report):
    """A purifier of one's own."""
    return F.avg_pool2d(images, 3, stride=1, padding=1)


def test_main_takes_a_purifier_of_ones_own(tmp_path, small_run, monkeypatch, capsys):
    shutil.copytree(small_run, tmp_path / "run")
    monkeypatch.setitem(le.PURIFIERS, "blur", blurred)
    train.main([*SMALL, "--purifier", "blur", "--protections", "em-class",
                "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "em-class: kept" in said and "em-class-le: made again, changed: purifier, " in said
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


def test_main_runs_on_a_folder_that_keeps_its_runs_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = [*SMALL[:10], "--unet.attention", "", "--protections", "em-class",
             "--ddpm.levels", "200"]
    train.main(["--data", str(class_folders(tmp_path / "a" / "pets")), *small])
    assert "| em-class |" in capsys.readouterr().out
    assert not (tmp_path / "runs" / "pets-limit4" / "vgg.pt").exists()  # nothing perceptual there
    other = ["--data", class_folders(tmp_path / "b" / "pets"), *small]
    assert "belongs to --data" in refusal(train.main, other, capsys)
    few = ["--data", class_folders(tmp_path / "few", 2), "--out", "few-run"]
    assert "two or more images" in refusal(train.main, few, capsys)
    assert not list((tmp_path / "few-run").glob("*.pt"))


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
                "--vgg_weights", str(tmp_path / "vgg16-397923af.pth"),
                "--out", str(tmp_path / "run")])
    assert "| cp-sample |" in capsys.readouterr().out and not (tmp_path / "run" / "vgg.pt").exists()


def test_main_interrupted_shows_no_traceback_and_says_how_to_go_on(tmp_path):
    command = [sys.executable, HERE / "train.py", "ddpm", *SMALL[2:], "--images.protected", "10",
               "--images.unprotected", "10", "--ddpm.steps", "1000000", "--out", tmp_path / "run"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    process.stderr.readline()                              # the first progress line
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert "Traceback" not in said and process.returncode == 130 and "goes on from here" in said


@pytest.mark.parametrize("arguments, message", [
    (["--classifier.epoch", "3"], "--classifier.epoch"), (["evaluate"], "evaluate"),
    (["--classifier.epochs", "many"], "--classifier.epochs"),
    (["--classifier.epochs", "0"], "--classifier.epochs 0"),
    (["--evaluate", "train"], "--evaluate"),
    (["--data", "nowhere"], "expected shapes, cifar10 or an existing folder"),
    (["--data", ""], "expected shapes, cifar10 or an existing folder"),
    (["--out", "file/run"], "file/run"),
    (["--data", "cifar10", "--root", "nowhere.tar.gz"], "nowhere.tar.gz: no such file"),
    (["--images.protected", "0"], "--images.protected 0"),
    (["--protections", "em,ps"], "--protections: expected em-class,"),
    (["--protections", ""], "--protections"), (["--purifier", "soap"], "--purifier"),
    (["--contrast.view", "blur"], "--contrast.view"), (["--config", "napkin"], "--config"),
    (["--noise.em-class.rounds", "0"], "--noise.em-class.rounds 0"),
    (["--sampler.steps", "99", "--sampler.t_star", "36"], "steps"),
    (["--sampler.t_star", "200"], "--ddpm.levels"),
    (["--sampler.pixel_weight", "nan"], "--sampler.pixel_weight nan"),
    (["--resnet.strides", "2,2"], "--resnet"), (["--resnet.strides", "0,1,1"], "--resnet"),
    (["--resnet.strides", "2,x"], "--resnet.strides"), (["--epsilon", "inf"], "--epsilon inf"),
    (["--epsilon", "0.5"], "--epsilon: expected 1 to 255"), (["--seed", str(2 ** 45)], "--seed"),
    (["--root", "cifar.tar.gz"], "--root: expected --data cifar10"),
    (["--limit", "-3"], "--limit -3"), (["--limit", "1"], "--limit: expected 2 or more"),
    (["--size", "30"], "--unet"), (["--unet.patch", "3"], "--unet"), (["--vgg.convs", ""], "--vgg"),
    (["--unet.mults", "0"], "--unet"), (["--unet.width", "7"], "--unet"),
    (["--unet.dropout", "5"], "--unet"), (["ddpm", "--unet_start", "none.pt"], "none.pt"),
    (["--resnet.widths", "4,8,8,8"], "--resnet.widths: expected 8 or more each"),
    (["--ddpm.levels", "2000"], "--ddpm.levels: expected at most 1000"),
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
    assert configured().unet == train.DEFAULTS["unet"]
    ours = configured("--data", "cifar10", "--sampler.steps", "7", "--seed", "3")
    assert ours.images["protected"] == 6000 and ours.seed == 3
    assert Sampler(**ours.sampler) == replace(le.SAMPLERS["photographs"], steps=7)
    assert configured("--data", "a folder").noise["em-class"]["rounds"] == 24
    released = configured("--config", "released")
    assert Sampler(**released.sampler) == le.SAMPLERS["released"]
    runs = [c.run.name for c in (configured(), released, configured("--limit", 9), ours)]
    assert runs == ["shapes", "shapes-released", "shapes-limit9", "cifar10"]


def test_parse_config_paper_is_the_papers_protocol():
    c = configured("--data", "cifar10", "--config", "paper")
    with torch.device("meta"):
        networks = train.ResNet(**c.resnet, classes=10), UNet(**c.unet)
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
def test_main_torchrun_trains_everything_and_purifies_as_one_process_does(tmp_path, capsys):
    small = [*SMALL, "--protections", "em-class", "--out", str(tmp_path / "run")]
    assert torchrun(HERE, "train.py", *small).count("| em-class |") == 1  # only one of them talks
    both = unet.read(tmp_path / "run" / "em-class-le.pt")["images"].int()
    (tmp_path / "run" / "em-class-le.pt").unlink()
    train.main(small)                                      # what two processes made serves one
    said = capsys.readouterr().out
    assert "ddpm: kept" in said and "em-class: kept" in said and "em-class-le: made" in said
    alone = unet.read(tmp_path / "run" / "em-class-le.pt")["images"].int()
    assert (alone - both).abs().max() <= 1


@two_processes
def test_parallel_averages_the_gradients_of_all_processes(tmp_path):
    program = tmp_path / "both.py"
    program.write_text(f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import torch, le
def both():  # a function: a parallel network that outlives processes() keeps the group from ending
    torch.manual_seed(0)
    alone, x = torch.nn.Conv2d(3, 4, 3), torch.randn(6, 3, 8, 8)
    net = le.parallel(alone)
    net(x[le.RANK::2]).square().sum((1, 2, 3)).mean().backward()
    shared = alone.weight.grad.clone()
    alone.weight.grad = None
    alone(x).square().sum((1, 2, 3)).mean().backward()
    assert torch.allclose(alone.weight.grad, shared, atol=1e-5)
    assert le.summed(torch.ones(2)).tolist() == [2, 2]
    print("averaged")
with le.processes():
    both()
""")
    assert torchrun(HERE, program).split() == ["averaged"]


# -- studies ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("study, written", [
    (["pictures"], ["overview", "forward", "strip", "curves", "confusion", "neighbours"]),
    (["ablation", "--only", "JPEG 10", "--protection", "em-class"], []),
    (["ablation", "--only", "unguided, DDIM", "--protection", "em-class"], []),
    (["ablation", "--only", "joint, on grey", "--protection", "cp-class"], []),
    (["scenarios", "cross", "--victims", "1"], ["cross"]),
    (["scenarios", "code", "--victims", "1"], ["code"]),
    (["scenarios", "longer", "--victims", "1"], ["longer"]),
    (["scenarios", "probe", "--victims", "2"], ["probe"]),
    (["scenarios", "others", "--victims", "1", "--protections", "targeted",
      "--sampler.perceptual_weight", "0"], ["others"]),   # as on photographs
    (["scenarios", "mend", "--victims", "1"], ["mend"]),
    (["scenarios", "few", "--victims", "1"], ["few"]),
    (["scenarios", "shift", "--victims", "1"], ["shift", "shift-images"]),
    (["scenarios", "victims", "--victims", "1", "--protections", "em-class"], ["victims"]),
    (["scenarios", "reply", "--victims", "1"], ["reply"]),
    (["scenarios", "strides", "--victims", "1", "--protections", "em-class"], ["strides"]),
    (["scenarios", "worth", "--victims", "1"], ["worth"]),
    (["scenarios", "part", "--victims", "1"], ["part"]),
])
def test_main_studies_run_on_a_run(tmp_path, small_run, study, written, capsys):
    shutil.copytree(small_run, tmp_path / "run")
    name, *options = study
    main = importlib.import_module(f"studies.{name}").main
    main([*options, *SMALL, "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert ("ddpm: kept" in said or name == "scenarios") and (written or said.count("|") > 10)
    for picture_name in written:
        assert Image.open(tmp_path / "run" / f"{picture_name}.png").width > 300


def test_main_owner_gives_each_victim_a_noise_of_its_own(tmp_path, small_run):
    run = Path(shutil.copytree(small_run, tmp_path / "run"))
    scenarios.main(["owner", "--victims", "2", *SMALL, "--out", str(run)])
    assert Image.open(run / "owner.png").width > 300
    made = [unet.read(run / f"owner-8-knows-its-U-Net{k}.pt")["images"] for k in ("", "-1")]
    assert not torch.equal(*made)
    key = "classifier-owner-8-knows-its-U-Net"
    for k, images in zip(("", "-1"), made):
        learned = unet.read(run / f"{key}-UE{k}.pt")["parts"]["images"]
        assert learned == train.digest(le.as_float(images))
    assert len({unet.read(run / f"{key}-LE{k}.pt")["parts"]["images"] for k in ("", "-1")}) == 2


def test_main_pictures_puts_answers_of_scenarios_side_by_side(tmp_path, small_run):
    shutil.copytree(small_run, tmp_path / "run")
    for name in ("few", "part"):
        rows = [{name: f"{n} %", "mix": f"{n}.0 ± 1.0", "PSNR": "9 dB"} for n in (20, 50)]
        (tmp_path / "run" / f"{name}.json").write_text(json.dumps(rows))
    pictures.main(["scenarios", *SMALL, "--out", str(tmp_path / "run")])
    assert Image.open(tmp_path / "run" / "scenarios.png").size == (2 * 620, 400)


@pytest.mark.parametrize("study, message", [
    (["pictures"], "no run yet; first `python train.py`"), (["bench"], "no run yet"),
    (["scenarios", "part"], "no run yet"), (["ablation"], "no run yet"),
    (["ablation", "--only", "soap"], "no run yet"), (["scenarios", "money"], "invalid choice"),
])
def test_main_studies_say_in_one_line_what_they_lack(tmp_path, capsys, study, message):
    program = importlib.import_module(f"studies.{study[0]}").main
    said = refusal(program, [*study[1:], "--out", tmp_path / "none"], capsys)
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize("program", [train, own_images, handout, *map(importlib.import_module, (
    "studies.pictures", "studies.ablation", "studies.scenarios", "studies.bench"))])
def test_main_help_is_there(program, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(["--help"])
    assert stop.value.code == 0 and "    python " in capsys.readouterr().out


# -- README ----------------------------------------------------------------------------------------

def test_readme_commands_are_understood():
    """Every command in the READMEs is one that the programs know."""
    text = (HERE / "README.md").read_text() + (HERE / "studies" / "README.md").read_text()
    start = r"(?:python|torchrun --nproc_per_node=\d+) "
    commands = re.findall(rf"^    {start}(.*?)(?:  .*)?$", text, re.M)
    commands += re.findall(rf"`{start}([^`]*)`", text)
    assert len(commands) > 15
    for command in commands:
        program, *arguments = shlex.split(command)
        if program == "train.py":
            train.parse(arguments)
        elif arguments[0].startswith("studies."):
            assert (HERE / "studies" / f"{arguments[0].split('.')[1]}.py").exists(), command
        else:
            assert arguments[0] == "pytest", command


def test_readme_counts_the_lines_of_each_file():
    readme = (HERE / "README.md").read_text()
    for name, lines in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", readme, re.M):
        counted = len((HERE / name).read_text().splitlines())
        assert abs(counted - int(lines)) <= 10, f"README.md: {name} has {counted} lines"


# -- Assignments (see the README) ------------------------------------------------------------------

def outcomes(folder, only):
    """{test: (outcome, what it said)} of the quick tests in a copy of the project."""
    slow = "main or torchrun or assignment or readme or help or real or fuzz or cached or SimCLR"
    command = [sys.executable, "-m", "pytest", "-rA", "-q", "-p", "no:cacheprovider", "test_le.py",
               "-k", f"({only}) and not ({slow})"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    found = re.findall(r"^(PASSED|FAILED|SKIPPED).*::(\w+)(.*)", done.stdout, re.M)
    return {test: (outcome, said) for outcome, test, said in found}, done.stdout


def test_assignment_fails_its_own_tests_and_lets_those_of_others_wait(tmp_path):
    handout.main(["1", "4", "8", "--out", str(tmp_path / "copy")])
    functions = [handout.ASSIGNMENTS[number][1] for number in (1, 4, 8)]
    titles = [CLAIMS[name][0] for name in functions]
    others = ["ddpm_loss", "unguided", "schedule"]
    tests, said = outcomes(tmp_path / "copy", " or ".join([*titles, *others]))
    for name, title in zip(functions, titles):
        own = {outcome for test, (outcome, _) in tests.items() if title in test}
        assert own == {"FAILED"}
        assert f"{title} is yours to write: {CLAIMS[name][1][:40]}" in said
    assert tests["test_schedule_alpha_bar_is_the_running_product_and_starts_at_one"][0] == "PASSED"
    assert "2 skipped" in said and "needs q_sample" in said


def test_assignment_solutions_pass_their_tests(tmp_path):
    numbers = [str(number) for number in handout.ASSIGNMENTS]
    handout.main([*numbers, "--out", str(tmp_path / "copy")])
    assert "raise NotImplementedError" in (tmp_path / "copy" / "le.py").read_text()
    handout.main([*numbers, "--out", str(tmp_path / "copy"), "--solutions"])
    for file, _ in handout.ASSIGNMENTS.values():
        assert (tmp_path / "copy" / file).read_text() == (HERE / file).read_text()
    tests, _ = outcomes(tmp_path / "copy", " or ".join(title for title, _ in CLAIMS.values()))
    assert len(tests) > 15 and {outcome for outcome, _ in tests.values()} == {"PASSED"}


for _name, _test in [(n, t) for n, t in globals().items() if n.startswith("test_")]:
    globals()[_name] = graded(_test)
