"""Tests of the five files, usable as an autograder: each names the function and the property.

    python -m pytest                      all, and those of the studies
    python -m pytest -k q_sample          the tests of one function
"""
import copy
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import attacks
import le
import train
import unet
from attacks import (EPSILON, PROTECTIONS, VICTIMS, ResNet, Victim, class_scores, crop_flip, fit,
                     min_min, noise_step, nt_xent_scores, partner_scores, publish)
from le import Sampler, denoise, guidance, joint_conditioned_mean, purify
from perceptual import VGG, PerceptualDistance
from studies.grading import close, same
from unet import (ALPHA_BAR, BETA, T, BadInput, UNet, ddpm_loss, posterior, predict_x0, q_sample,
                  sigma, visited_levels)

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


class Malice:
    def __reduce__(self):
        return print, ("this file ran code",)


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


# -- Oracles: numbers that another library computed once -------------------------------------------
# Each comment names it. All of them in float64, of inputs that a closed formula makes anywhere.

def wave(*shape, start=0):
    """sin(n ** 2) for n = start, start + 1, ...: without a pattern, and no generator's choice."""
    n = torch.arange(start, start + math.prod(shape), dtype=torch.float64)
    return (n * n).sin().reshape(shape)


def filled(net):
    """The network with weights by that formula: parameter i in the order of their names."""
    net = net.double().eval().requires_grad_(False)
    for i, (_, w) in enumerate(sorted(net.named_parameters())):
        values = wave(*w.shape, start=1000 * i)
        w.copy_(2 * w[0].numel() ** -0.5 * values if w.ndim > 1 else (1 + values) / 2)
    return net


def agrees(actual, expected, atol=1e-7):
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.flatten(), expected.flatten(), rtol=1e-6, atol=atol)


def test_UNet_is_diffusers():
    # diffusers 0.42.1: UNet2DModel with the settings of google/ddpm-cifar10-32, but two scales of
    # 128 channels and one block each, attention in the second; levels 8 - 1 and 400 - 1
    net = filled(UNet(width=128, mults=(1, 1), blocks=1, attention=(4,), size=8))
    y = net(wave(2, 3, 8, 12), torch.tensor([8, 400]))
    expected = [0.397233642, 1.05688573, 1.09850907, 0.818722385, 0.973528973, 1.50893001,
                1.44699152, -0.390983768]
    agrees(y.flatten()[::73], expected, atol=1e-5)         # sinusoids are float32 in both


def test_ResnetBlock_is_diffusers():
    # diffusers 0.42.1: ResnetBlock2D, groups 32 and 16; images so small that eps, 1e-6, counts
    block = filled(unet.ResnetBlock(128, 64, 32, dropout=0.1))
    expected = [1.82251483, 1.6204692, 1.1860321, 2.61903199, 1.04040294, 1.09396, -0.71138393,
                2.28531547]
    agrees(block(wave(2, 128, 3, 4) / 100, wave(2, 32)).flatten()[::211], expected)


def test_Attention_is_diffusers():
    # diffusers 0.42.1: Attention, one head, residual_connection, eps 1e-6
    expected = [0.460450667, 1.5872571, -0.229325304, -2.35270525, 1.99055522, 1.16965519,
                1.94847882, 2.19544262]
    agrees(filled(unet.Attention(128))(wave(2, 128, 3, 4) / 100).flatten()[::409], expected)


@pytest.mark.parametrize("t, s, mean, variance", [
    (36, 35, [-0.290525999, -0.19240658, -0.813302363, 0.170288438], 0.000758141285),
    (1000, 999, [-0.30254256, -0.243517752, -0.808130754, 0.156197227], 0.0199999835),
    (500, 400, [-0.169407311, 0.10454633, -0.669172493, 0.205446457], 0.521733313)])
def test_posterior_is_diffusers(t, s, mean, variance):
    # diffusers 0.42.1: DDPMScheduler, prediction_type="sample", fixed_small, tables in float64
    got_mean, got_variance = posterior(wave(1, 1, 2, 2), wave(1, 1, 2, 2, start=100), t, s)
    agrees(got_mean, mean, atol=1e-9)
    agrees(got_variance, [variance], atol=0)


def test_VGG_stages_are_torchvisions():
    # torchvision 0.29.1: vgg16 with 1/8 of the channels, behind transforms' normalize; of each
    # stage's map what of it lies along a wave, so that every number counts
    net = VGG(width=8, convs=(2, 2, 3, 3, 3))
    net.classifier = torch.nn.Identity()
    maps = filled(net).stages((1 + wave(2, 3, 32, 32)) / 2)
    expected = [216.106029, -38.7456878, 205.089165, 42.8141937, 26.3913819, -284.020906,
                -26.1233652, -76.5887823, 31.5400777, 58.5132858]
    agrees(torch.stack([(m * wave(*m.shape)).sum((1, 2, 3)) for m in maps]), expected, atol=1e-6)


@pytest.mark.parametrize("weighted, expected", [
    (True, [0.472811621, 0.464802204, 0.474006404, 0.465194773]),
    (False, [1.13987887, 1.12158317, 1.13186352, 1.14025217])])
def test_PerceptualDistance_embed_is_lpips(weighted, expected):
    # lpips 0.1.4: LPIPS(net="vgg", lpips=weighted) over that VGG, normalize=True
    vgg = VGG(width=8, convs=(2, 2, 3, 3, 3))
    vgg.classifier = torch.nn.Identity()
    weights = [wave(c).square() for c in (8, 16, 32, 64, 64)]
    distance = PerceptualDistance(filled(vgg), weights if weighted else None).double()
    x = (1 + wave(8, 3, 32, 32)) / 2
    agrees(distance(x[:4], x[4:]), expected)


@pytest.mark.parametrize("temperature, expected", [
    (0.5, [1.2643185, 2.20095009, 3.62279131, 2.08252526, 0.954066548, 1.74927788, 3.07143577,
           2.70964545]),
    (0.2, [0.747827764, 3.12003554, 7.66465779, 2.7799351, 0.231284423, 1.88706026, 5.73545174,
           5.29474854])])
def test_nt_xent_scores_make_the_loss_of_pytorch_metric_learning(temperature, expected):
    # pytorch-metric-learning 2.9.0: NTXentLoss, view by view
    scores, partner = nt_xent_scores(wave(8, 5), temperature)
    agrees(F.cross_entropy(scores, partner, reduction="none"), expected)


@pytest.mark.parametrize("box, straight, flipped", [
    # torchvision 0.29.1: resized_crop(antialias=True) to 8 x 8, its diagonal; and that of hflip
    ((0, 0, 12, 16), [0.583920231, 0.44714241, 0.58992648, 0.361205739, 0.37738349, 0.642595409,
                      0.680366954, 0.60575977],
     [0.221732091, 0.724590737, 0.568496668, 0.309581579, 0.33048142, 0.561989103, 0.584204687,
      0.500699514]),
    # the same, but for the outermost pixels Pillow 13.0.0: resize(box=...) of mode F. It blends
    # them with what is beyond the box, and torchvision has cut that off
    ((2, 5, 7, 9), [0.914564908, 0.625223737, 0.295271197, 0.31780672, 0.282016134, 0.384176288,
                    0.396643217, 0.369013488],
     [0.439848989, 0.492776088, 0.601233273, 0.431322761, 0.298374853, 0.416606506, 0.212716251,
      0.162323102])])
def test_boxes_are_torchvisions_resized_crop_and_flip(box, straight, flipped):
    x = (1 + wave(1, 3, 12, 16)).expand(32, -1, -1, -1) / 2
    box = [torch.full((32,), side, dtype=torch.float64) for side in box]
    views = attacks.boxes(x, *box, 8, torch.Generator().manual_seed(0))
    diagonals = views[:, 1].diagonal(dim1=1, dim2=2)
    turned = (diagonals[:, 0] - straight[0]).abs() > 0.1
    for seen, expected in ((diagonals[~turned], straight), (diagonals[turned], flipped)):
        agrees(seen, [expected] * len(seen))
    assert 0 < turned.sum() < 32


@pytest.mark.parametrize("name, factor, expected", [
    # torchvision 0.29.1: adjust_brightness; adjust_hue(factor - 1), kept in float64 on its way
    ("brightness", 0.6, [0.3, 0.00246634397, 0.152693522, 0.178780434, 0.0342141665, 0.599340982,
                         0.598702738, 2.74132761e-06]),
    ("brightness", 1.4, [0.7, 0.00575480259, 0.356284884, 0.417154346, 0.0798330551, 1, 1,
                         6.39643109e-06]),
    ("hue", 1.1, [0.5, 0.00411057328, 0.760784492, 0.121598752, 0.556453262, 0.998901637,
                  0.997837896, 4.56887935e-06]),
    ("hue", 0.9, [0.27950428, 0.316569297, 0.00743204697, 0.447051206, 0.0570236108, 0.431522482,
                  0.997837896, 4.56887935e-06]),
    ("hue", 1.5, [0.000395982946, 0.596751483, 0.604200373, 0.270682568, 0.960013019,
                  0.00470869582, 0.0745403202, 0.246817179]),
    # kornia 0.9.0: adjust_contrast_with_mean_subtraction, adjust_saturation_with_gray_subtraction,
    # since torchvision's weight of red is 0.2989, and Pillow's, as here, 0.299
    ("contrast", 0.6, [0.475304885, 0.177771229, 0.327998407, 0.354085319, 0.209519052,
                       0.774645868, 0.774007623, 0.175307627]),
    ("contrast", 1.4, [0.524695115, 0, 0.180979999, 0.241849461, 0, 1, 1, 0]),
    ("saturation", 0.6, [0.379078416, 0.145229196, 0.223692818, 0.283671923, 0.166952942,
                         0.950081701, 0.704289595, 0.084801971]),
    ("saturation", 1.4, [0.620921584, 0, 0.285285588, 0.312262857, 0, 1, 1, 0])])
def test_colours_are_torchvisions_and_kornias(name, factor, expected):
    x = (1 + wave(1, 3, 4, 4)) / 2
    factor = torch.full((1, 1, 1, 1), factor, dtype=torch.float64)
    agrees(getattr(attacks, name)(x, factor).flatten()[::6], expected, atol=1e-8)


def test_luma_is_kornias():
    # kornia 0.9.0: rgb_to_grayscale
    expected = [0.197696039, 0.262228723, 0.263967142, 0.356907131, 0.331846939, 0.211998074,
                0.177498242, 0.876851796]
    agrees(attacks.luma((1 + wave(1, 3, 4, 4)) / 2).flatten()[::2], expected)


# -- unet.py: the forward process ------------------------------------------------------------------

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


def test_posterior_variance_is_a_tensor_that_multiplies_images():
    x = torch.randn(2, 3, 4, 4)
    for levels, shape in (((36, 20), (1, 1, 1, 1)), ((torch.tensor([36, 9]), 5), (2, 1, 1, 1))):
        var = posterior(x, x, *levels)[1]
        assert isinstance(var, torch.Tensor) and var.shape == shape and var.dtype == x.dtype


def test_bytes_and_seeds_by_hand():
    given, made = [0.4, 1.2, -0.3, 1.4 / 255, 1.6 / 255, 1.0], [102, 255, 0, 1, 2, 255]
    assert unet.as_bytes(torch.tensor(given)).tolist() == made
    assert unet.as_float(torch.tensor([51, 255])).tolist() == pytest.approx([0.2, 1])
    assert unet.seed_of(2, 3) == 2_000_009


# -- unet.py: network, loss, training --------------------------------------------------------------

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


@pytest.mark.parametrize("channels, groups", [(128, 32), (264, 24), (144, 24), (8, 2), (3, 1)])
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


def checkpoint(net):
    return dict(config=net.config, weights=net.state_dict())


UNET, SMALL_VGG = UNet(**TINY), VGG(width=4, convs=(1, 1, 1, 1, 1))


# -- perceptual.py ---------------------------------------------------------------------------------

def small_distance(**kwargs):
    return PerceptualDistance(awake(VGG(width=4, convs=(1, 1, 1, 1, 1))), **kwargs)


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
    assert all({place[k] for place in seen} == set(range(5)) for k in (0, 1))


def test_crop_flip_gradient_goes_back_to_the_pixels_in_view():
    x = images(4, 8).requires_grad_()
    view = crop_flip(x, torch.Generator().manual_seed(0))
    ones, = torch.autograd.grad(view.sum(), x)
    assert set(ones.unique().tolist()) == {0.0, 1.0}       # a pixel is seen once or is outside


def test_quadrant_view_is_a_quadrant_less_its_mean():
    x = images(200, 16)
    views = attacks.quadrant_view(x, torch.Generator().manual_seed(0), jitter=1)
    assert views.shape == (200, 3, 8, 8) and (views.mean((2, 3)) - 0.5).abs().max() < 1e-5
    seen = []
    for image, view in zip(x, views):
        for top in (0, 1, 7, 8):                           # 0 +- 1 and 8 +- 1, within the image
            for left in (0, 1, 7, 8):
                window = image[:, top:top + 8, left:left + 8]
                window = window - window.mean((1, 2), keepdim=True) + 0.5
                for flip, candidate in ((False, window), (True, window.flip(2))):
                    if torch.allclose(view, candidate, atol=1e-5):
                        seen.append((top > 4, left > 4, flip, top, left))
    assert len(seen) == 200 and len(set(seen)) > 24        # of 32
    assert all(70 < sum(choice) < 130 for choice in list(zip(*seen))[:3])  # each as often


@pytest.mark.parametrize("start, length, n_out", [(0.0, 32.0, 32), (3.3, 17.5, 32), (0.0, 32.0, 20),
                                                  (5.25, 25.0, 20)])
def test_bilinear_is_pillows(start, length, n_out):
    x = torch.rand(32, 32)
    matrix = attacks.bilinear(torch.tensor([start]), torch.tensor([length]), 32, n_out)
    box = (start, start, start + length, start + length)
    pillow = Image.fromarray(x.numpy()).resize((n_out, n_out), Image.Resampling.BILINEAR, box)
    got = (matrix @ x @ matrix.mT)[0]
    close(got, torch.from_numpy(np.array(pillow)), atol=1e-5)


def pillow_of(x):
    return Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy())


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
    wearer, noise = torch.tensor([0, 1, 0, 0, 1, 1]), 0.1 * torch.randn(2, 3, 8, 8)
    # cross-entropy of a linear model has the gradient W^T (softmax - onehot), of what they wear
    worn = x + noise[wearer]
    own = (net(worn.clamp(0, 1)).softmax(1) - F.one_hot(y, 3)) @ net[1].weight / 6
    own = own.view_as(x) * ((worn >= 0) & (worn <= 1))
    expected = torch.stack([own[wearer == r].sum(0) for r in range(2)])
    got = attacks.noise_gradient(net, PLAIN, x, y, noise, wearer, None)
    close(got, expected, atol=1e-7)


def by_hand(x, y, *, surrogates=1, rounds=1, train_batches=2, noise_steps=2, step=0.2, momentum=0.9,
            lr=0.01, warm_up=0, epsilon=EPSILON, seed=0):
    """`min_min` of a linear network, all images in each batch, by gradients that are written down.
    """
    uniform = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed))
    delta, v = epsilon * (2 * uniform - 1), torch.zeros_like(x)
    for done in range(surrogates * rounds):
        if done % rounds == 0:
            _, linear = PLAIN.fresh(seed + 1000 + done)
            w, b, moves = linear.weight.detach(), linear.bias.detach(), [0, 0]
        for _ in range(train_batches + warm_up * (done % rounds == 0)):
            seen = (x + delta).clamp(0, 1).flatten(1)
            error = ((seen @ w.T + b).softmax(1) - F.one_hot(y, 3)) / len(x)
            slopes = error.T @ seen + 5e-4 * w, error.sum(0) + 5e-4 * b
            moves = [0.9 * move + slope for move, slope in zip(moves, slopes)]
            w, b = w - lr * moves[0], b - lr * moves[1]
        for _ in range(noise_steps):
            seen = x + delta
            error = ((seen.clamp(0, 1).flatten(1) @ w.T + b).softmax(1) - F.one_hot(y, 3)) / len(x)
            slope = (error @ w).view_as(x) * ((seen >= 0) & (seen <= 1))
            v = momentum * v + slope / slope.abs().mean((1, 2, 3), keepdim=True)
            size = step * epsilon * (1 - done / (surrogates * rounds))
            delta = (delta - size * v.sign()).clamp(-epsilon, epsilon)
    return (x + delta).clamp(0, 1)


@pytest.mark.parametrize("how", [
    dict(), dict(surrogates=2), dict(rounds=3), dict(surrogates=2, rounds=2, warm_up=3),
    dict(warm_up=2), dict(train_batches=5), dict(noise_steps=4), dict(step=0.4),
    dict(momentum=0.0, noise_steps=4), dict(lr=0.1), dict(epsilon=4 / 255), dict(seed=3)], ids=str)
def test_min_min_is_what_its_gradients_by_hand_lead_to(how):
    x, y = images(2, 8), torch.tensor([0, 2])
    given = dict(rounds=1, train_batches=2, noise_steps=2, lr=0.01) | how
    got = min_min(x, y, PLAIN, batch_size=2, **given)
    expected = by_hand(x, y, **how)
    apart = (got - expected).abs()                         # by hand nothing is rounded to 8 bits
    assert (apart > 0.51 / 255).float().mean() < 0.01      # but a sign of next to nothing


def test_min_min_takes_as_many_batches_of_images_a_round_as_it_is_told():
    x, y = images(12, 8), torch.arange(12) % 3
    start = publish(x, torch.zeros_like(x))
    ue = min_min(x, y, PLAIN, start=start, rounds=1, noise_batches=2, batch_size=3)
    assert ((ue - x).abs().amax((1, 2, 3)) > 0).sum() == 6


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


def test_guidance_needs_no_gradients_outside_and_no_distance_where_none_counts():
    x, y = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    nothing = Sampler(pixel_above=20, perceptual_weight=0.0)
    with torch.no_grad():                                  # as in `purify`
        same(guidance(x, y, None, 10, None, nothing), torch.zeros_like(x))
        pulled = guidance(x, y, None, 30, None, nothing)
    close(pulled, 5e4 * 2 / 192 * (x - y), atol=1e-3)


def test_seen_is_a_symmetric_projection_as_its_use_on_gradients_asks():
    grey, x, y = replace(JOINT, compare="grey"), torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    seen = grey.seen(x)
    close(seen, x.mean(1, keepdim=True).repeat(1, 3, 1, 1))
    close(grey.seen(seen), seen, atol=1e-6)
    assert torch.isclose((seen * y).sum(), (x * grey.seen(y)).sum(), atol=1e-5)
    same(JOINT.seen(x), x)


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
    # the density of N(mean, var) times exp(-s gradient . x), as numbers
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


def way_by_hand(net, distance, ue, draw, weights, target, compare):
    """`denoise` from level 12 by 8 and 4, twice, by the equations as they stand in the papers. The
    pixel distance counts above level 5, the perceptual one up to level 10: both do at 8."""
    def looked(x):
        return x.mean(1, keepdim=True).repeat(1, 3, 1, 1) if compare == "grey" else x
    x = ue
    for _ in range(2):
        x = math.sqrt(ALPHA_BAR[12]) * x + math.sqrt(1 - ALPHA_BAR[12]) * draw()
        for t, s in ((12, 8), (8, 4), (4, 0)):
            a, b = ALPHA_BAR[t].item(), ALPHA_BAR[s].item()
            x0 = ((x - math.sqrt(1 - a) * net(x, t)) / math.sqrt(a)).clamp(-1, 1)
            beta, var = 1 - a / b, (1 - b) / (1 - a) * (1 - a / b)
            mean = (math.sqrt(b) * beta * x0 + math.sqrt(a / b) * (1 - b) * x) / (1 - a)
            if s > 0:
                y = math.sqrt(a) * ue + math.sqrt(1 - a) * draw() if target == "xt" else ue
                z = (x if target == "xt" else x0).detach().requires_grad_()
                d = weights[0] * (t > 5) * (looked(z) - looked(y)).square().mean((1, 2, 3))
                seen = distance(looked(z) / 2 + 0.5, looked(y) / 2 + 0.5)
                d = d + weights[1] * (t <= 10) * seen
                gradient, = torch.autograd.grad(d.sum(), z)
                pull = var * math.sqrt((1 - a) / a) * gradient
                mean = mean - pull.clamp(-math.sqrt(var), math.sqrt(var))
            x = mean + math.sqrt(var) * draw()
    return x


def draws(shape):
    """A function that draws normal noise of this shape, always the same in turn."""
    g = torch.Generator().manual_seed(0)
    return lambda: torch.randn(shape, generator=g).double()


@pytest.mark.parametrize("compare", ["colour", "grey"])
@pytest.mark.parametrize("target", ["x0", "xt"])
@pytest.mark.parametrize("weights", [(0.0, 0.0), (3e4, 0.0), (0.0, 90.0), (3e4, 90.0)])
def test_denoise_is_the_way_by_hand(nets, weights, target, compare):
    net, distance = [copy.deepcopy(part).double() for part in nets]
    ue = 2 * images(2).double() - 1
    sampler = Sampler(12, 2, 3, weights[0], 5, weights[1], 10, target, compare)
    needed = distance if weights[1] else None
    with torch.no_grad():
        *_, made = denoise(net, needed, ue, sampler, draws(ue.shape))
    expected = way_by_hand(net, distance, ue, draws(ue.shape), weights, target, compare)
    close(made, expected, atol=1e-6)


def test_denoise_yields_every_level_that_it_visits(nets):
    ue = torch.zeros(1, 3, 32, 32)
    levels = list(denoise(nets[0], None, ue, FREE, lambda: torch.ones_like(ue)))
    assert len(levels) == FREE.rounds * (FREE.steps + 1)
    close(levels[0], math.sqrt(1 - ALPHA_BAR[12]) * torch.ones_like(ue), atol=1e-6)


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
    for i in range(2):                                     # diffuse, then stride down; twice
        g = torch.Generator().manual_seed(i)
        z = x[i:i + 1] * 2 - 1
        for _ in range(2):
            z = q_sample(z, 12, torch.randn(3, 32, 32, generator=g)[None])
            for t, s in ((12, 8), (8, 4), (4, 0)):
                x0 = predict_x0(z, t, nets[0](z, t)).clamp(-1, 1)
                mean, var = posterior(x0, z, t, s)
                z = mean + var.sqrt() * torch.randn(3, 32, 32, generator=g)[None]
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
    return train.parse([str(argument) for argument in arguments])[1]


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


def test_linear_probe_learns_from_the_training_set_alone():
    encoder = torch.nn.Module()
    encoder.features = lambda x: x.flatten(1)
    x, labels = torch.randn(80, 3, 4, 4), torch.randint(0, 2, (80,))  # there is nothing to learn
    known, test = (x[:40], labels[:40]), (x[40:], labels[40:])
    assert train.linear_probe(encoder, known, test) < 75
    labels = (x.flatten(1) @ torch.randn(48) > 0).long()   # now there is, and one class is asked
    known, asked = (x[:70], labels[:70]), labels[70:] == 1
    alone = [train.linear_probe(encoder, known, (x[70:][i:i + 1], labels[70:][i:i + 1]))
             for i in range(10)]
    together = train.linear_probe(encoder, known, (x[70:][asked], labels[70:][asked]))
    assert together == pytest.approx(torch.tensor(alone)[asked].mean().item(), abs=0.1)


def test_psnr_by_hand():
    x = torch.rand(2, 3, 4, 4) / 2
    assert math.isclose(train.psnr(x, x + 8 / 255), 20 * math.log10(255 / 8), rel_tol=1e-4)
    assert math.isclose(train.psnr(x, x.clone()), 120)     # no infinity, and the best there is


def test_table_has_every_number_in_its_own_column():
    rows = [dict(protection="em", clean=91.26, ue=12.5, le=80.04, recovery=0.857, psnr_ue=31.52,
                 psnr_le=27.08), dict(protection="theirs", ue=3.0, le=4.0, recovery=None)]
    assert train.table(rows).splitlines() == [
        "| protection | clean | UE | LE | recovery | PSNR UE | PSNR LE |",
        "|---|---|---|---|---|---|---|",
        "| em | 91.3 | 12.5 | 80.0 | 0.86 | 31.5 dB | 27.1 dB |",
        "| theirs | - | 3.0 | 4.0 | - | - | - |"]


def test_accuracy_and_recovery_by_hand():
    x = torch.rand(4, 3, 1, 1)
    answers = x.flatten(1).argmax(1)
    wrong = torch.where(torch.arange(4) < 3, answers, (answers + 1) % 3)
    assert train.accuracy(lambda x: x.flatten(1), x, wrong) == 75
    assert train.recovery(90, 10, 50) == 0.5 and train.recovery(90, 10, 10) == 0
    assert train.recovery(90, 89.5, 90) is None            # nothing was taken


def silent(done, total, **values):
    pass


@pytest.mark.parametrize("optimizer", attacks.OPTIMIZERS)
@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_fit_takes_any_number_of_steps_and_lowers_the_loss(epochs, optimizer):
    config = dict(widths=(8, 16), blocks=1, strides=(2,), classes=2)
    victim, seen = Victim(ResNet, class_scores, config), []
    y = torch.arange(32) % 2
    x = (0.3 + 0.4 * y).view(-1, 1, 1, 1) * torch.ones(1, 3, 8, 8)  # dark or bright
    made = fit(victim, x, y, epochs=epochs, batch_size=8, lr=0.05, seed=0, optimizer=optimizer,
               report=lambda done, total, loss: seen.append((done, total, loss)))
    assert seen == [(k + 1, epochs, loss) for k, loss in enumerate(made["losses"])]
    assert epochs < 5 or made["losses"][-1] < 0.7 * made["losses"][0]


def test_fit_shows_every_image_once_an_epoch_beside_its_own_label():
    seen = []

    def scores(net, x, labels, generator):
        seen.append((x[:, 0, 0, 0].clone(), labels))
        return net(x), labels
    x = torch.arange(10.0).view(-1, 1, 1, 1).expand(-1, 3, 8, 8) / 10
    victim = Victim(linear_network, scores, dict(outputs=10))
    fit(victim, x, torch.arange(10), epochs=2, batch_size=4, lr=0.01, seed=0, report=silent)
    for values, labels in seen:
        same((10 * values).round().long(), labels)
    order = torch.cat([labels for _, labels in seen]).view(2, 10)
    assert (order.sort().values == torch.arange(10)).all() and not torch.equal(*order)


def tiny_unet():
    torch.manual_seed(0)
    return UNet(**TINY)


def test_train_unet_averages_the_weights_with_a_decay_that_ramps_up(tmp_path):
    def weights(ema_decay, steps):
        net = tiny_unet()
        made = unet.train_unet(net, images(4), levels=20, tilt=1.0, steps=steps, batch_size=4,
                               optimizer=torch.optim.Adam, lr=0.1, ema_decay=ema_decay, seed=0,
                               report=silent, unfinished=tmp_path / "none")
        assert made["config"]["max_level"] == 20       # what it has learned, not what there is
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
        unet.train_unet(tiny_unet(), images(4), levels=20, tilt=tilt, steps=4, batch_size=500,
                        lr=0.01, ema_decay=0.9, optimizer=torch.optim.Adam, seed=0,
                        report=silent, unfinished=tmp_path / "none")
        share = torch.cat(seen).bincount(minlength=21)[1:] / 2000
        variance = (1 - ALPHA_BAR[1:21]) ** (tilt / 2)
        assert (share - variance / variance.sum()).abs().max() < 0.025


def test_train_unet_learns_from_images_in_minus_one_to_one_half_of_them_flipped(
        tmp_path, monkeypatch):
    seen = []

    def spy(net, x0, t, eps):
        seen.append((x0.cpu(), eps.cpu()))
        return sum(weights.sum() for weights in net.parameters())
    monkeypatch.setattr(unet, "ddpm_loss", spy)
    x = images(3)
    unet.train_unet(tiny_unet(), x, levels=20, tilt=1.0, steps=2, batch_size=200, lr=0.01,
                    optimizer=torch.optim.Adam, ema_decay=0.9, seed=0, report=silent,
                    unfinished=tmp_path / "none")
    ways = [(2 * x - 1).flatten(1), (2 * x - 1).flip(3).flatten(1)]
    flipped = 0
    for x0, eps in seen:
        straight, turned = [(x0.flatten(1)[:, None] == way).all(2).any(1) for way in ways]
        assert (straight | turned).all() and abs(eps.mean()) < 0.02 and abs(eps.std() - 1) < 0.02
        flipped += turned.sum().item()
    assert 150 < flipped < 250                             # of 400
    assert not torch.equal(seen[0][1], seen[1][1])         # each step draws noise of its own


# -- train.py: the story ---------------------------------------------------------------------------

SMALL = """--limit 4 --resnet.widths 8,8,8 --resnet.strides 2,2 --unet.width 8 --vgg.width 4
    --noise.em-class.rounds 1 --noise.em-sample.rounds 1 --noise.cp-class.surrogates 1
    --noise.cp-class.rounds 1 --noise.cp-sample.rounds 1 --noise.cp-sample.surrogates 1""".split()


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """The folder of a toy run, for those who only read it; one for all files of tests."""
    folder = tmp_path_factory.getbasetemp() / "toy"
    if not (folder / "results.json").exists():
        train.main([*SMALL, "--out", str(folder)])
    return folder


def coded(c):
    """A data set whose images say, in a corner of each colour: their class and number; their set;
    and who has changed them, nobody so far. Protected images are of the class 3 - k % 4, others of
    the class k % 4, so that labels in another order would be seen."""
    sets = {}
    for number, name in enumerate(c.images):
        k = torch.arange(12)
        labels = 3 - k % 4 if name == "protected" else k % 4
        x = torch.full((12, 3, 32, 32), 0.5)
        x[:, 0, 0, :2] = torch.stack([labels, k], 1) / 255
        x[:, 1, 0, 0] = number / 255
        x[:, 2, 0, 0] = 0
        sets[name] = x, labels
    return sets, ("a", "b", "c", "d")


def told(x):
    """(Classes, sets, changes) that such images say."""
    said = (255 * x[:, :, 0, 0]).round().long().cpu()
    return said[:, 0], set(said[:, 1].tolist()), set(said[:, 2].tolist())


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """What every stage of a story of two protections, em-sample after em-class, is given; nothing
    is trained. A protection adds 1 to what images say of changes, and a purifier 1 more."""
    seen = {}

    def spy(c, name, make, /, **inputs):
        seen[name] = inputs
        if make is unet.train_unet:
            unet.save(c.run / "ddpm.pt", checkpoint(inputs["net"]))
        elif make is fit:
            net = inputs["victim"].fresh(0)
            if name == "vgg":
                unet.save(c.run / "vgg.pt", checkpoint(net))
            return dict(weights=net.state_dict(), losses=[1.0])
        else:
            made = inputs["images"].clone()
            made[:, 2, 0, 0] += 1 / 255
            return dict(images=unet.as_bytes(made).cpu())

    def judged(what):
        def judge(net, *sets):
            seen.setdefault(what, []).append(sets)
            return 50.0
        return judge
    monkeypatch.setattr(train, "cached", spy)
    monkeypatch.setattr(train, "linear_probe", judged("probe"))
    monkeypatch.setattr(train, "accuracy", judged("accuracy"))
    monkeypatch.setitem(train.DATASETS, "coded", coded)
    c = configured(*SMALL, "--data", "coded", "--protections", "em-sample,cp-class", "--config",
                   "shapes", "--out", tmp_path)
    sets, _ = train.load_data(c)
    train.claim(c)
    train.story(c, sets)
    return seen


def test_story_gives_every_stage_the_images_of_its_own_set(stages):
    protected, unprotected, validation, test = range(4)
    expected = {"ddpm": ({unprotected}, {0}), "vgg": ({unprotected}, {0}),
                "em-class": ({protected}, {0}), "em-sample": ({protected}, {0}),
                "em-sample-le": ({protected}, {1}), "cp-class-le": ({protected}, {1})}
    for kind, name in (("classifier", "em-sample"), ("simclr", "cp-class")):
        expected |= {f"{kind}-clean": ({protected}, {0}), f"{kind}-{name}-ue": ({protected}, {1}),
                     f"{kind}-{name}-le": ({protected}, {2})}
    given = {name: told(stages[name]["images"])[1:] for name in expected}
    assert given == expected                               # (whose images, changed how often)
    assert set(stages) - set(expected) == {"cp-class", "probe", "accuracy"}
    same(stages["em-sample"]["start"][:, 2, 0, 0], torch.full((12,), 1 / 255))  # em-class's UEs


def test_story_gives_every_stage_the_labels_of_its_images(stages):
    labelled = [name for name, inputs in stages.items() if "labels" in inputs]
    assert len(labelled) == 10                             # a VGG, three noises and six victims
    for name in labelled:
        same(stages[name]["labels"].cpu(), told(stages[name]["images"])[0])


def test_story_judges_by_test_images_and_probes_learn_from_unprotected_ones(stages):
    assert len(stages["accuracy"]) == 3 and len(stages["probe"]) == 3 + 1  # the untrained encoder's
    for judged in stages["accuracy"]:
        classes, sets, _ = told(judged[0])
        assert sets == {3} and torch.equal(judged[1], classes)
    for known, judged in stages["probe"]:
        assert told(known[0])[1] == {1} and told(judged[0])[1] == {3}
        for x, labels in (known, judged):
            same(labels, told(x)[0])


def test_story_purifies_by_the_networks_of_the_unprotected_images(stages):
    purified = stages["cp-class-le"]
    for name, w in stages["ddpm"]["net"].state_dict().items():
        same(purified["net"].state_dict()[name], w)
    assert purified["seeds"] == list(range(12)) and purified["sampler"] == Sampler()
    assert purified["distance"].vgg.config["width"] == 4


def test_judge_puts_every_number_where_it_belongs(monkeypatch):
    x = torch.zeros(2, 3, 4, 4)
    scores = {"clean": 90.0, "em-class-ue": 10.0, "em-class-le": 50.0}
    monkeypatch.setattr(train, "train_victim",
                        lambda c, kind, name, images, sets: scores[name] + 100 * images.max())
    c = configured()
    row = train.judge(c, "em-class", dict(protected=(x, None)), x + 0.1, x + 0.2)
    assert row.pop("psnr_ue") == pytest.approx(20, abs=0.01)
    assert row.pop("psnr_le") == pytest.approx(13.98, abs=0.01)
    assert row.pop("protection") == "em-class"
    assert {key: round(float(value), 3) for key, value in row.items()} == dict(
        clean=90.0, ue=20.0, le=70.0, recovery=round(50 / 70, 3))


def test_main_tells_the_whole_story(small_run):
    results = json.loads((small_run / "results.json").read_text())
    assert [row["protection"] for row in results["rows"]] == list(train.DEFAULTS["protections"])
    assert set(results) == {"config", "floor", "rows"}
    x = train.load_data(configured(*SMALL))[0]["protected"][0]
    for row in results["rows"]:
        name = row["protection"]
        ue, le_ = [unet.read(small_run / f"{file}.pt")["images"].float() / 255
                   for file in (name, f"{name}-le")]
        assert 0 < (ue - x).abs().max() <= EPSILON + 1e-6
        assert row["psnr_ue"] == pytest.approx(train.psnr(ue, x), abs=0.01)
        assert row["psnr_le"] == pytest.approx(train.psnr(le_, x), abs=0.01)
        assert row["clean"] in (0, 25, 50, 75, 100)        # of four test images
    assert not list(small_run.glob("*.unfinished")) and not list(small_run.glob("*.tmp"))
