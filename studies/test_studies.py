"""Tests of what a course never grades: released weights, what is kept, the command line; and of
the studies' samplers. Found by `python -m pytest` with the others."""
import copy
import functools
import importlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from types import FunctionType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attacks
import le
import perceptual
import train
import unet
from attacks import EPSILON, PROTECTIONS, VICTIMS, Protection, ResNet, Victim, class_scores, publish
from le import Sampler, purify
from perceptual import VGG, PerceptualDistance
from studies import rotation
from studies.programs import run
from studies.purifiers import ddim, deterministic, p_sample, sample
from test_le import (FREE, HERE, JOINT, Malice, OneMap, PLAIN, SMALL, SMALL_VGG, TINY, UNET,
                     agrees, asked_for, awake, checkpoint, close, configured, filled, images,
                     linear_network, nets, refusal, same, seeded, silent, small_distance,
                     small_run, tiny_unet, wave)
from unet import ALPHA_BAR, BETA, DEVICE, T, BadInput, UNet, posterior, predict_x0, q_sample

pytest_plugins = "studies.grading"

# -- Samplers, rotations ---------------------------------------------------------------------------

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
    mean, var = ddim(x0, q_sample(x0, t, eps), t, s)
    close(mean, q_sample(x0, s, eps))
    assert (var == 0).all()


def test_ddim_of_a_perfect_network_takes_any_strides_to_the_same_image():
    x0, eps = torch.rand(2, 3, 4, 4).double() * 2 - 1, torch.randn(2, 3, 4, 4).double()

    def perfect(xt, t):
        return (xt - ALPHA_BAR[t].sqrt() * x0) / (1 - ALPHA_BAR[t]).sqrt()
    for steps in (1, 3, 50):
        close(sample(perfect, q_sample(x0, 50, eps), steps, 50, ddim), x0)


def test_p_sample_to_level_zero_is_the_clipped_prediction():
    net, xt = awake(UNet(**TINY)), torch.randn(2, 3, 32, 32)
    x0 = predict_x0(xt, 3, net(xt, 3)).clamp(-1, 1)
    close(p_sample(net, xt, 3, 0, torch.randn_like(xt)), x0, atol=1e-6)


@pytest.mark.parametrize("stride, t, s, expected", [
    # diffusers 0.42.1: DDPMScheduler, prediction_type="epsilon", fixed_small, clip_sample
    (posterior, 36, 35, [-0.61895625, -0.505303783, -1.61256819, 0.293365235, 0.964293972,
                         -1.76809896, 1.92192031, 1.71137965]),
    (posterior, 500, 400, [-0.870368286, -0.745097394, -1.48821997, -0.161922258, 0.534900006,
                           -0.64972631, 0.845326828, 1.91882665]),
    # and its DDIMScheduler, eta 0, clip_sample, use_clipped_model_output
    (ddim, 500, 400, [-0.751011885, -0.496919358, -1.70548152, 0.439631768, 0.798043581,
                           -1.77157827, 2.03364928, 1.78833158])],
    ids=("one_level", "a_stride", "ddim"))
def test_p_sample_is_diffusers(stride, t, s, expected):
    xt = 2 * wave(1, 1, 2, 4, start=100)
    eps = xt + wave(1, 1, 2, 4, start=200) / 3             # of eight x0, three or four are clipped
    noise = wave(1, 1, 2, 4, start=300)
    agrees(p_sample(lambda xt, t: eps, xt, t, s, noise, stride), expected)


def test_deterministic_goes_through_all_rounds():
    net, done = awake(UNet(**TINY, size=16)).to(DEVICE), []
    deterministic(net, None, images(2, 16), Sampler(t_star=20, rounds=3, steps=2), [0, 1],
                  lambda count, total: done.append((count, total)))
    assert done == [(2, 6), (4, 6), (6, 6)]


def test_rotation_scores_are_of_every_image_in_all_four_turns(monkeypatch):
    x, cropped = torch.arange(2 * 3 * 4).view(2, 3, 2, 2) / 24, []
    monkeypatch.setattr(rotation, "crop_flip", lambda x, generator: cropped.append(generator) or x)
    generator = torch.Generator()

    def corners(turned):
        return turned[:, 0].flatten(1)
    seen, turns = rotation.rotation_scores(corners, x, None, generator)
    assert cropped == [generator]                          # as a classifier's are
    assert turns.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for i in range(2):
        a, b, c, d = x[i, 0].flatten().tolist()            # upright; then counterclockwise
        assert seen[i].tolist() == [a, b, c, d]
        assert [seen[i + 2 * k].tolist() for k in (1, 2, 3)] == [
            [b, d, a, c], [d, c, b, a], [c, a, d, b]]


def test_rotation_scores_are_fooled_by_one_perturbation_for_all_images():
    victim = Victim(linear_network, rotation.rotation_scores, dict(size=16, outputs=4))
    x, last = ((0.4 + 0.2 * images(40, 16)) * 255).round() / 255, {}
    for epsilon in (EPSILON, EPSILON / 80):                # 1.1 and 1.4 when this was written
        def report(done, total, loss, epsilon=epsilon):
            last[epsilon] = float(loss)
        attacks.min_min(x, torch.zeros(40), victim, shared="all", noise_steps=3, lr=0.05,
                        batch_size=40, epsilon=epsilon, report=report)
    assert last[EPSILON] < last[EPSILON / 80] - 0.15


# -- Checkpoints -----------------------------------------------------------------------------------

def test_load_perceptual_takes_the_weights_of_lpips_where_they_are_in_the_file(tmp_path):
    weights, x, y = [torch.rand(c) for c in (4, 8, 16, 32, 32)], images(2), images(2)
    for more, expected in (dict(), None), (dict(lpips=weights), weights):
        unet.save(tmp_path / "vgg.pt", checkpoint(SMALL_VGG) | more)
        distance = PerceptualDistance(SMALL_VGG, expected)
        same(perceptual.load(tmp_path / "vgg.pt")(x, y), distance(x, y))
    unet.save(tmp_path / "vgg.pt", checkpoint(SMALL_VGG) | dict(lpips=weights[:4]))
    with pytest.raises(BadInput, match="vgg.pt: need .* weights for"):
        perceptual.load(tmp_path / "vgg.pt")


def test_save_load_unet_round_trip(tmp_path):
    net, x = awake(UNet(**TINY)), torch.randn(1, 3, 32, 32)
    net.config["max_level"] = 100
    unet.save(tmp_path / "u.pt", checkpoint(net))
    loaded = unet.load(tmp_path / "u.pt")
    assert torch.equal(loaded(x, 7), net(x, 7)) and loaded.max_level == 100
    assert not loaded.training and not any(w.requires_grad for w in loaded.parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["u.pt"]


def test_save_leaves_nothing_behind_on_a_full_disk(tmp_path, monkeypatch):
    def full(checkpoint, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("write failed: no space")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="u.pt: cannot be written"):
        unet.save(tmp_path / "u.pt", {})
    assert not list(tmp_path.iterdir())


def test_read_runs_no_code(tmp_path, capsys):
    torch.save({"config": Malice()}, tmp_path / "evil.pt")
    with pytest.raises(BadInput, match="evil.pt"):
        unet.read(tmp_path / "evil.pt")
    assert "ran code" not in capsys.readouterr().out


NAN = {name: w * math.nan for name, w in UNET.state_dict().items()}


@pytest.mark.parametrize("content, message", [
    ({"something": 1}, "not a checkpoint"), (["a", "b"], "not a checkpoint"),
    (torch.zeros(3), "not a checkpoint of train.py; .* `python -m studies.released` makes one"),
    (checkpoint(SMALL_VGG), "not the configuration of a UNet"),
    (checkpoint(UNET) | {"config": dict(TINY, width="8")}, "not the configuration"),
    (checkpoint(UNET) | {"config": dict(TINY, mults=())}, "is .*expected"),
    (checkpoint(UNET) | {"config": dict(TINY, width=10 ** 9)}, "not the configuration"),
    (checkpoint(UNET) | {"config": dict(TINY, colour="red")}, "not the configuration"),
    (checkpoint(UNET) | {"config": dict(TINY, max_level="all")}, "not the configuration"),
    (checkpoint(UNET) | {"config": dict(TINY, max_level=10 ** 6)}, "not the configuration"),
    (checkpoint(UNET) | {"weights": None}, "not a checkpoint"),
    (checkpoint(UNET) | {"weights": {"conv_in.weight": 3}}, r"is nothing"),
    (checkpoint(UNET) | {"weights": UNET.state_dict() | {"new": torch.ones(2)}}, r"new is \[2\]"),
    (checkpoint(UNET) | {"weights": NAN}, "is not finite")])
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


def test_load_perceptual_refuses_a_U_Net(tmp_path):
    torch.save(checkpoint(UNET), tmp_path / "u.pt")
    with pytest.raises(BadInput, match="u.pt: not the configuration of a VGG"):
        perceptual.load(tmp_path / "u.pt")


def test_train_unet_resumed_ends_where_an_uninterrupted_run_does(tmp_path):
    x = images(16)

    def run(unfinished, stop=None):
        def report(done, total, **values):
            if done == stop:
                raise KeyboardInterrupt
        net = tiny_unet()
        return unet.train_unet(net, x, levels=20, tilt=1.0, steps=6, batch_size=4, lr=1e-3,
                               optimizer=attacks.Muon, ema_decay=0.9, seed=0, report=report,
                               unfinished=unfinished, checkpoint_seconds=0)
    whole = run(tmp_path / "a")["weights"]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", stop=4)
    assert 0 < torch.load(tmp_path / "b", weights_only=True)["step"] < 6
    resumed = run(tmp_path / "b")["weights"]
    assert all(torch.allclose(w, resumed[name], atol=1e-6) for name, w in whole.items())


def test_train_unet_is_what_its_learning_rates_and_its_average_by_hand_lead_to(
        tmp_path, monkeypatch):
    # every gradient is 1, so weights go down by the learning rate
    monkeypatch.setattr(unet, "ddpm_loss", lambda net, *_: sum(w.sum() for w in net.parameters()))
    net = tiny_unet()
    w = average = net.conv_out.bias.detach().clone()
    made = unet.train_unet(net, images(2), levels=20, tilt=1.0, steps=150, batch_size=2, lr=0.5,
                           optimizer=torch.optim.SGD, ema_decay=0.9, seed=0, report=silent,
                           unfinished=tmp_path / "none")
    for k in range(150):
        w = w - 0.5 * min(1, (k + 1) / 100) * (1 + math.cos(math.pi * k / 150)) / 2
        decay = min(0.9, (1 + k) / (10 + k))
        average = decay * average + (1 - decay) * w
    close(made["weights"]["conv_out.bias"], average, atol=1e-5)
    assert not (tmp_path / "none").exists()                # every 30 s, and it took less


def test_fit_is_what_one_cycle_of_nesterovs_steps_by_hand_leads_to():
    x, y = images(4, 8), torch.tensor([0, 2, 1, 0])
    made = attacks.fit(PLAIN, x, y, epochs=7, batch_size=2, lr=0.05, seed=0, report=silent)
    _, linear = PLAIN.fresh(0)
    w, b, moves, losses = linear.weight.detach(), linear.bias.detach(), [0, 0], []
    generator, k = torch.Generator().manual_seed(0), 0
    for _ in range(7):
        for batch in torch.randperm(4, generator=generator).split(2):
            way = k / 2 if k < 2 else (14 - k) / 12        # up for a fifth of 15 steps, and down
            height, least = (1 - math.cos(math.pi * way)) / 2, 2e-3 if k < 2 else 2e-7
            lr, momentum = least + (0.05 - least) * height, 0.95 - 0.1 * height
            seen, labels = x[batch].flatten(1), y[batch]
            scores = seen @ w.T + b
            error = (scores.softmax(1) - F.one_hot(labels, 3)) / 2
            slopes = error.T @ seen + 5e-4 * w, error.sum(0) + 5e-4 * b
            moves = [momentum * move + slope for move, slope in zip(moves, slopes)]
            w, b = [p - lr * (slope + momentum * move)
                    for p, slope, move in zip((w, b), slopes, moves)]
            losses.append(F.cross_entropy(scores, labels).item())
            k += 1
    close(made["weights"]["1.weight"], w, atol=1e-6)
    assert made["losses"] == pytest.approx([sum(losses[i:i + 2]) / 2 for i in range(0, 14, 2)])


def test_ResNet_and_SimCLR_are_their_equations():
    net = filled(attacks.SimCLR(widths=(8, 16), blocks=2, strides=(2,), classes=3))
    w, root = net.state_dict(), math.sqrt(1 + 1e-5)        # a norm as it begins: mean 0, variance 1

    def conv(h, name, stride=1):
        kernel, name = w[f"encoder.{name}.0.weight"], f"encoder.{name}.1"
        h = F.conv2d(h, kernel, stride=stride, padding=kernel.shape[-1] // 2) / root
        return h * w[f"{name}.weight"].view(-1, 1, 1) + w[f"{name}.bias"].view(-1, 1, 1)
    x = (1 + wave(2, 3, 8, 8)) / 2
    h = conv(4 * x - 2, "levels.0").relu()
    for i, stride in ((2, 2), (3, 1)):
        inner = conv(conv(h, f"levels.{i}.conv1", stride).relu(), f"levels.{i}.conv2")
        h = (inner + (conv(h, "levels.2.shortcut", 2) if i == 2 else h)).relu()
    h = h.mean((2, 3))
    close(net.features(x), h)
    close(net.encoder(x), h @ w["encoder.head.weight"].T + w["encoder.head.bias"])
    h = (h @ w["projection.0.weight"].T + w["projection.0.bias"]) / root
    h = (h * w["projection.1.weight"] + w["projection.1.bias"]).relu()
    close(net(x), h @ w["projection.3.weight"].T + w["projection.3.bias"])


def test_networks_begin_as_they_should():
    net = UNet(width=16, mults=(1, 2), blocks=1, attention=(8,), patch=2, size=16)
    zero = [name for name, w in net.state_dict().items() if w.ndim > 1 and not w.any()]
    assert len(zero) == 8 + 4 + 1 and set(name.split(".")[-2] for name in zero) == {
        "conv2", "proj_attn", "conv_out"}                  # each block begins as its shortcut
    assert all("." in name for name in SMALL_VGG.state_dict())  # no mean and std of its own
    for i, channels in ((0, 64), (2, 64), (5, 128)):       # He et al.: by the outputs
        spread = VGG(64, (2, 1)).features[i].weight.std()
        assert abs(spread / math.sqrt(2 / (9 * channels)) - 1) < 0.1


def test_min_min_trains_surrogates_as_huang_et_al_do(monkeypatch):
    seen, modes, sgd = [], [], torch.optim.SGD

    def scores(net, x, labels, generator):                 # nothing to learn, and no gradient
        modes.append(net.training)
        assert 0 <= x.min() and x.max() <= 1               # as images that are published
        return 0 * net(x), labels

    def recorded(parameters, lr, **how):
        seen.append(dict(lr=lr) | how)
        return sgd(parameters, lr, **how)
    monkeypatch.setattr(torch.optim, "SGD", recorded)
    ue = attacks.min_min(images(4, 8), torch.arange(4) % 3, Victim(linear_network, scores),
                         surrogates=2, rounds=2, train_batches=3, noise_steps=2, lr=0.03)
    assert seen == 2 * [dict(lr=0.03, momentum=0.9, weight_decay=5e-4)] and ue.isfinite().all()
    assert modes == 4 * [True, True, True, False, False]   # noise is made in evaluation mode


# -- Optimizers, crops, and what functions refuse --------------------------------------------------

@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_orthogonal_keeps_directions_and_makes_their_lengths_alike(shape):
    left, _, right = torch.linalg.svd(torch.randn(shape).double(), full_matrices=False)
    lengths = torch.tensor([9.0, 5.0, 3.0, 2.0, 1.0, 0.5]).double()
    turned = left.mT @ attacks.orthogonal(left * lengths @ right) @ right.mT
    lengths /= lengths.norm()
    for _ in range(5):
        lengths = 3.4445 * lengths - 4.775 * lengths ** 3 + 2.0315 * lengths ** 5
    close(turned, lengths.diag(), atol=1e-6)
    assert 0.6 < lengths.min() and lengths.max() < 1.3
    same(attacks.orthogonal(torch.zeros(shape)), torch.zeros(shape))


def test_Muon_is_nesterovs_SGD_but_for_the_lengths_in_a_filters_step():
    ours = [nn.Parameter(torch.ones(shape)) for shape in ((4,), (8, 3, 3, 3), (20, 5))]
    twins, unused = copy.deepcopy(ours), nn.Parameter(torch.ones(2, 2))
    muon = attacks.Muon([*ours, unused], lr=0.5)
    sgd = torch.optim.SGD(twins, lr=0.5, momentum=0.9, nesterov=True)
    for _ in range(3):
        before = copy.deepcopy(ours), copy.deepcopy(twins)
        for p, twin in zip(ours, twins):
            p.grad = torch.randn_like(p)
            twin.grad = p.grad.clone()
        muon.step()
        sgd.step()
        for p, twin, p_before, twin_before in zip(ours, twins, *before):
            step = (twin_before - twin).detach() / 0.5
            if p.ndim > 1:
                rows, columns = step.flatten(1).shape
                step = attacks.orthogonal(step.flatten(1)).reshape(p.shape)
                step *= max(1, math.sqrt(rows / columns))
            close(p.detach(), p_before.detach() - 0.5 * step, atol=1e-5)
    same(unused.detach(), torch.ones(2, 2))                # it had no gradient


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


def test_embed_of_features_that_are_all_zero_has_a_gradient():
    distance = PerceptualDistance(OneMap())
    x = torch.zeros(1, 3, 4, 4, requires_grad=True)
    distance(x, torch.rand(1, 3, 4, 4)).sum().backward()
    assert x.grad.isfinite().all() and distance(x, x) == 0


def test_LPIPS_weights_must_fit_the_channels():
    for weights in ([torch.ones(3)] * 5, [-torch.ones(c) for c in (4, 8, 16, 32, 32)]):
        with pytest.raises(BadInput, match="weights"):
            small_distance(weights=weights)


@pytest.mark.parametrize("wrong", [
    dict(steps=500), dict(target="x1"), dict(rounds=0), dict(pixel_weight=-1.0), dict(t_star=0),
    dict(pixel_weight=math.nan), dict(perceptual_weight=math.inf), dict(compare="red")])
def test_Sampler_refuses_what_makes_no_sense(wrong):
    with pytest.raises(BadInput):
        Sampler(**wrong)


def test_purify_refuses_what_it_cannot_do(nets):
    for beyond in (1.01, -0.01):
        with pytest.raises(BadInput, match="0, 1"):
            purify(*nets, torch.tensor([0.5, beyond]).view(2, 1, 1, 1).expand(2, 3, 32, 32), JOINT)
    assert len(purify(*nets, images(0), JOINT)) == 0
    young, seen = copy.deepcopy(nets[0]), []
    young.max_level = 12                                   # as high as JOINT goes
    purify(young, None, images(5), FREE, batch_size=2, report=lambda *done: seen.append(done))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    young.max_level = 11
    with pytest.raises(BadInput, match="levels up to 11"):
        purify(young, nets[1], images(1), JOINT)
    young.max_level = T
    young.conv_out.bias.data.fill_(math.nan)
    with pytest.raises(BadInput, match="not finite"):
        purify(young, nets[1], images(1), JOINT)


def test_random_resized_crop_draws_whole_boxes_again_until_they_fit(monkeypatch):
    seen = []

    def spy(x, *box):
        seen.append(torch.stack(box[:4]))
        assert box[4:] == (16, generator)
        return x
    monkeypatch.setattr(attacks, "boxes", spy)
    generator = torch.Generator().manual_seed(0)
    attacks.random_resized_crop(torch.zeros(20000, 1, 32, 32), generator, 16)
    top, left, height, width = seen[0]
    assert all(torch.equal(side, side.round()) for side in seen[0])
    assert (top >= 0).all() and (top + height <= 32).all() and (left + width <= 32).all()
    area, aspect = height * width / 1024, width / height
    # 0.552 is what torchvision and kornia draw, and where nothing is cut few touch both sides
    assert abs(area.mean() - 0.552) < 0.005 and 0.18 < area.min() and area.max() <= 1
    assert 0.7 < aspect.min() and aspect.max() < 1.45 and abs(aspect.log().mean()) < 0.01
    assert ((height == 32) & (width == 32)).float().mean() < 0.03
    assert abs(top.mean() - (32 - height).mean() / 2) < 0.1


def test_colour_jitter_changes_four_in_five_images_by_up_to_its_strengths(monkeypatch):
    seen, names = [], ("brightness", "contrast", "saturation", "hue")

    def spied(name):
        def spy(x, factor):
            seen.append((name, factor.flatten()))
            return x + 1                                   # each is given what the last has made
        return spy
    for name in names:
        monkeypatch.setattr(attacks, name, spied(name))
    generator, orders = torch.Generator().manual_seed(0), set()
    for _ in range(40):
        seen.clear()
        x = attacks.colour_jitter(torch.zeros(500, 1, 1, 1), generator)
        assert (x == 4).all() and len(dict(seen)) == 4
        orders.add(tuple(name for name, _ in seen))
        factors = torch.stack([dict(seen)[name] for name in names])
        same(factors == 1, (factors[:1] == 1).expand(4, -1))  # an image in all four ways or none
        changes = factors[:, factors[0] != 1] - 1
        for change, strength in zip(changes, (0.4, 0.4, 0.4, 0.1)):
            assert -1 <= change.min() / strength < -0.95 and 0.95 < change.max() / strength <= 1.001
        assert 0.73 < changes.shape[1] / 500 < 0.87 and changes.corrcoef().triu(1).abs().max() < 0.2
    assert len(orders) > 15                                # of 24: a new one for each batch


# -- Seeds -----------------------------------------------------------------------------------------

def unsettled(**config):
    """A network, after which torch's own numbers are others each time."""
    net = linear_network(16, 4)
    torch.seed()
    return net


def flat(weights):
    return torch.cat([w.flatten() for w in weights.values()])


def drawn(c):
    """A data set that draws from torch's own numbers, as the README's does."""
    return train.divided(torch.rand(8, 3, 32, 32), torch.arange(8) % 2, c.images), ("a", "b")


CROPPED = Victim(unsettled, class_scores)
IMAGES, CLASSES = wave(12, 3, 16, 16).float() / 2 + 0.5, torch.arange(12) % 4
DRAWS = {view.__name__: lambda seed, view=view: view(IMAGES, torch.Generator().manual_seed(seed))
         for view in (attacks.crop_flip, attacks.quadrant_view, attacks.simclr_view)} | {
    "min_min": lambda seed: attacks.min_min(IMAGES, CLASSES, CROPPED, rounds=2, train_batches=2,
                                            noise_batches=1, batch_size=5, seed=seed),
    "fit": lambda seed: flat(attacks.fit(CROPPED, IMAGES, CLASSES, epochs=1, batch_size=4,
                                         seed=seed, report=silent)["weights"]),
    "train_unet": lambda seed: flat(unet.train_unet(
        copy.deepcopy(UNET), IMAGES, levels=20, tilt=1.0, steps=2, batch_size=2, lr=0.01,
        optimizer=attacks.Muon, ema_decay=0.9, seed=seed, report=silent,
        unfinished=Path("none"))["weights"]),
    "purify": lambda seed: purify(UNET, None, IMAGES[:2], FREE, seeds=[seed, 7]),
    "cached": lambda seed: train.cached(SimpleNamespace(seed=seed, run=Path(mkdtemp(dir="."))),
                                        "tossed", lambda report: dict(x=torch.rand(3)))["x"],
    "load_data": lambda seed: train.load_data(configured(
        "--data", "drawn", "--seed", seed, *asked_for(2, 2, 2, 2)))[0]["test"][0],
    "drawings": lambda seed: train.drawings(configured("--limit", 9, "--seed", seed))[0]["test"][0]}


@pytest.mark.parametrize("name", DRAWS)
def test_what_is_given_a_seed_or_a_generator_draws_from_it_alone(tmp_path, monkeypatch, name):
    monkeypatch.setitem(train.DATASETS, "drawn", drawn)
    monkeypatch.chdir(tmp_path)
    made = []
    for seed in (0, 0, 1):
        torch.seed()                                       # torch's own numbers: others each time
        made.append(DRAWS[name](seed))
    first, again, other = made
    same(first, again)
    assert not torch.equal(first, other)


# -- Data ------------------------------------------------------------------------------------------

def test_shapes_are_the_images_that_our_tables_are_about():
    x, labels = train.shapes(10, seed=0)
    assert labels.tolist() == list(range(10))
    told = (255 * x.double() * wave(3, 32, 32)).sum((1, 2, 3))  # what of each lies along a wave
    agrees(told, [1313.6, 1952.8, 2200.7, 594.1, 655.0, 203.7, 1506.7, -2272.9, 1674.1, 2103.4], 4)


# -- CIFAR-10 in its official archive --------------------------------------------------------------

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
        archive.fileobj.write(bytes(2 << 20))              # as much as may follow the last file
    return path


def test_cifar10_keeps_the_test_batch_apart_and_reads_planes_and_labels(tmp_path):
    files, data = cifar10_files()
    root = write_cifar10(tmp_path / "c.tar.gz", files)
    (x, y), (_, test_y) = train.cifar10(root)
    record = data[2, 5]                                    # the sixth of the third batch: image 45
    assert y[45] == record[0] and x.shape == (100, 3, 32, 32)
    assert abs(x[45, 1, 3, 7] - record[1 + 1024 + 3 * 32 + 7] / 255) < 1e-6
    same(test_y, torch.from_numpy(data[5, :, 0]).long())
    cifar = ["--data", "cifar10", "--root", root]
    sets, _ = train.load_data(configured(*cifar, *asked_for(50, 30, 20, 15)))
    same(sets["test"][1], test_y[:15])
    shown = {x.numpy().tobytes(): label for part in sets.values() for x, label in zip(*part)}
    assert len(shown) == 115
    brought = [shown.get(image.numpy().tobytes(), label) == label for image, label in zip(x, y)]
    others = train.load_data(configured(*cifar, *asked_for(50, 30, 20, 15), "--seed", 1))[0]
    assert all(brought) and not torch.equal(others["protected"][0], sets["protected"][0])
    for asked, message in ((51, 30, 20, 20), "100 are too few"), ((50, 30, 20, 21), "20 are too"):
        with pytest.raises(BadInput, match=message):
            train.load_data(configured(*cifar, *asked_for(*asked)))


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


# -- Judging ---------------------------------------------------------------------------------------

def test_fitted_and_show_judge_networks_in_evaluation_mode(tmp_path, monkeypatch, capsys):
    c, sets = configured("--out", tmp_path), dict(protected=(None, None), unprotected=0, test=1)
    c.classes = 10
    victim = attacks.victim_of(c, "classifier")
    weights = awake(victim.fresh(1)).state_dict()
    monkeypatch.setattr(train, "cached", lambda *_, **__: dict(weights=weights, losses=[2.0, 1.0]))
    net, losses = train.fitted(c, "x", victim, images(2), sets)
    assert not net.training and losses == [2.0, 1.0]
    same(flat(net.state_dict()).cpu(), flat(weights))

    def probe(encoder, known, asked):
        assert not encoder.training and (known, asked) == (0, 1)
        return 12.5
    monkeypatch.setattr(train, "linear_probe", probe)
    train.show(c, sets, [])
    assert json.loads((tmp_path / "results.json").read_text())["floor"] == 12.5
    assert "an untrained encoder's probe has 12.5." in capsys.readouterr().out


def test_linear_probe_ends_where_its_loss_is_least(monkeypatch):
    made, encoder, x = [], nn.Module(), torch.randn(200, 3, 2, 2) * torch.tensor([9.0, 0.1])
    encoder.features = lambda x: x.flatten(1)
    y = (x.flatten(1) @ torch.randn(12, 3)).argmax(1)

    class Kept(nn.Linear):
        def __init__(self, *size):
            super().__init__(*size)
            made.append(self)
    monkeypatch.setattr(nn, "Linear", Kept)
    train.linear_probe(encoder, (x, y), (x, y))
    w, b = [p.detach() for p in made[0].parameters()]
    z = (x - x.mean(0)).div(x.std(0)).flatten(1)
    error = ((z @ w.T + b).softmax(1) - F.one_hot(y, 3)) / 200
    close(error.T @ z, -2e-4 * w, atol=1e-4 * w.abs().max().item() / 4)
    close(error.sum(0), torch.zeros(3), atol=1e-4)


# -- Progress --------------------------------------------------------------------------------------

def progress(monkeypatch, live, calls):
    """What Progress("net") writes on a terminal, or elsewhere, at calls (time, done, total, value),
    one after the other: a list of texts."""
    stream, clock, texts = io.StringIO(), [0.0], []
    stream.isatty = lambda: live
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(le.time, "monotonic", lambda: clock[0])
    report = le.Progress("net")
    for clock[0], done, total, value in calls:
        report(done, total, loss=value)
        texts.append(stream.getvalue())
        stream.seek(stream.truncate(0))
    return texts


def test_Progress_rewrites_one_line_on_a_terminal_and_ends_it_when_all_is_done(monkeypatch):
    never = object()                                       # no number: nobody may look at it
    said = progress(monkeypatch, True, [
        (5.0, 2, 12, 0.123456), (5.125, 3, 12, never), (5.25, 2, 12, 4e5), (7.0, 3, 12, 0.5),
        (7.2, 5, 12, torch.tensor(0.25)), (7.25, 12, 12, 0.125)])
    texts = ["net: 2/12, loss 0.123", None, "net: 2/12, loss 4e+05",
             "net: 3/12, 18 s left, loss 0.5", "net: 5/12, 5 s left, loss 0.25",
             "net: 12/12, 0 s left, loss 0.125"]           # at 7: one in 2 s, and nine are left
    assert said[:-1] == [text and f"\r{text:<78}" or "" for text in texts[:-1]]
    assert said[-1] == f"\r{texts[-1]:<78}\n"


def test_Progress_writes_plain_lines_off_a_terminal_every_20_seconds(monkeypatch):
    never = object()
    calls = [(0.0, 1, 9, 1), (19.9, 2, 9, never), (20.0, 3, 9, 2), (39.0, 4, 9, never),
             (40.0, 5, 9, 3), (41.0, 9, 9, 4)]
    lines = ["net: 1/9, loss 1\n", "", "net: 3/9, 60 s left, loss 2\n", "",
             "net: 5/9, 40 s left, loss 3\n", "net: 9/9, 0 s left, loss 4\n"]
    assert progress(monkeypatch, False, calls) == lines
    monkeypatch.setattr(le, "talks", lambda: False)        # one that does not talk, on a terminal
    assert progress(monkeypatch, True, calls) == lines


# -- What is kept ----------------------------------------------------------------------------------

def applied(function, x, report):
    return dict(made=function(x))


def doubled(x):
    return 2 * x


def test_cached_keeps_what_is_unchanged_and_says_what_has_changed(tmp_path, capsys):
    c = configured("--out", tmp_path)
    capsys.readouterr()

    def said(x):
        same(train.cached(c, "double", applied, function=doubled, x=x)["made"], 2 * x)
        return capsys.readouterr().out.strip()
    for name in ("double.1.unfinished", "single.1.unfinished"):
        (tmp_path / name).touch()
    assert said(torch.ones(2)) == "double: made in 0 s"
    assert said(torch.ones(2)) == "double: kept"
    assert said(torch.zeros(2)) == "double: made again, as x changed, in 0 s"
    kept = unet.read(tmp_path / "double.pt")
    assert set(kept) == {"made", "parts", "seconds", "device"} and kept["seconds"] >= 0
    unet.save(tmp_path / "double.pt", kept | dict(device="cuda"))
    assert said(torch.zeros(2)) == "double: kept, made on cuda"
    unet.save(tmp_path / "double.pt", kept | dict(parts=kept["parts"] | dict(Python=(3, 1))))
    assert said(torch.zeros(2)) == "double: made again, as Python changed, in 0 s"
    (tmp_path / "double.pt").write_bytes(b"half a file")
    assert "double.pt is damaged" in said(torch.zeros(2))
    assert {path.name for path in tmp_path.iterdir()} == {"double.pt", "single.1.unfinished"}


def given(report, **inputs):
    return dict(made=inputs)


def test_cached_gives_every_input_to_the_function_whatever_its_name(tmp_path):
    inputs = dict(c=1, name=2, make=3, shared="class", resumed=4, path=5)
    made = train.cached(configured("--out", tmp_path), "given", given, **inputs)
    assert made["made"] == inputs and set(inputs) < set(made["parts"])


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


def test_hashes_of_code_that_is_in_no_file_are_new_each_time():
    typed = FunctionType(doubled.__code__, {}, "typed")
    typed.__module__ = "__main__"                          # as what a notebook has
    first, second = [train.hashes(dict(function=typed)) for _ in range(2)]
    assert first.keys() == second.keys() == {"function", "code that is in no file"}
    assert first["function"] == second["function"] and first != second


def test_train_ddpm_begins_with_a_network_of_the_seed_and_of_the_images_size(
        tmp_path, monkeypatch):
    c, begun = configured("--unet.attention", 4, "--out", tmp_path), []
    monkeypatch.setattr(train, "cached", lambda *_, **given: begun.append(given))
    for c.seed in (0, 0, 1):
        torch.seed()
        with pytest.raises(OSError, match="ddpm.pt"):      # which nobody has written here
            train.train_ddpm(c, dict(unprotected=(images(2, 16), None)))
    first, again, other = [flat(given["net"].state_dict()) for given in begun]
    same(first, again)
    assert not torch.equal(first, other) and begun[0]["net"].config["size"] == 16
    assert begun[2]["seed"] == 1 and begun[0]["optimizer"] is attacks.Muon


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
FILES = {"brought/own.py": OWN, "brought/helper.py": "def twice(x):\n    return 2 * x\n",
         "elsewhere.py": "def once(x):\n    return 1 * x\n", "noise.txt": "loud"}
ALL = {"plain", "lambda_", "partial", "file"}


@pytest.mark.parametrize("edited, old, new, again", [
    ("brought/own.py", "# one", "# another comment", set()),
    ("brought/own.py", "What the file holds", "Another docstring", set()),
    ("brought/own.py", "+ 1  #", "+ 3  #", ALL),
    ("brought/helper.py", "2 * x", "3 * x", ALL),             # two calls away
    ("elsewhere.py", "1 * x", "4 * x", ALL),               # and where nobody has been yet
    ("noise.txt", "loud", "silent", {"file"})])
def test_cached_shows_nothing_old_after_an_edit_of_ones_own_file(
        tmp_path, monkeypatch, capsys, edited, old, new, again):
    (tmp_path / "my-packages").mkdir()                     # which is no folder of packages
    monkeypatch.chdir(tmp_path / "my-packages")
    monkeypatch.syspath_prepend(tmp_path / "my-packages")
    c = configured("--out", tmp_path)
    Path("brought").mkdir()
    for name, content in FILES.items():
        Path(name).write_bytes(content.encode("utf-8-sig"))  # as Windows' editors begin a file
        os.utime(name, (4e9, 4e9))                         # a clock that is wrong by decades

    def made():
        train.own_source.cache_clear()                     # as if the program began
        for module in ("brought.helper", "brought.own", "brought", "elsewhere"):
            sys.modules.pop(module, None)
        importlib.invalidate_caches()
        for name, function in importlib.import_module("brought.own").ways.items():
            train.cached(c, name, applied, function=function, x=torch.ones(1))
        said = capsys.readouterr().out
        return set(re.findall(r"^(\w+): made", said, re.M))
    assert made() == ALL and made() == set()
    text = "# -*- coding: latin-1 -*-\n# für alle\n" * edited.endswith(".py")
    text += Path(edited).read_text(encoding="utf-8-sig").replace(old, new)
    Path(edited).write_text(text, encoding="latin-1")
    os.utime(edited, (10, 10))                             # not even the time is new
    assert made() == again and made() == set()


def test_own_source_reads_a_script_that_tries_to_import_from_its_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    text = "try:\n    from . import near\nexcept ImportError:\n    import near\n"
    (tmp_path / "alone.py").write_text(text)
    (tmp_path / "near.py").write_text("x = 1\n")
    assert [Path(file).name for file in train.files_of(["alone"])] == ["alone.py", "near.py"]


def test_cached_tells_lambdas_apart_and_what_they_have_captured(tmp_path, capsys):
    c = configured("--out", tmp_path)

    def adding(n):
        return lambda x: x + n
    for function, word in ((adding(1), "made"), (adding(1), "kept"), (adding(2), "made again"),
                           (lambda x: x + 1, "made again"), (lambda x: x + 2, "made again"),
                           (lambda x: x.sin(), "made again"), (lambda x: x.cos(), "made again"),
                           (lambda x: sum(y + 1 for y in [x]), "made again"),
                           (lambda x: sum(y + 2 for y in [x]), "made again"),
                           (lambda x: sum(y + 2 for y in [x]), "kept")):
        made = train.cached(c, "lambda", applied, function=function, x=torch.ones(1))["made"]
        same(made, function(torch.ones(1)))
        assert f"lambda: {word}" in capsys.readouterr().out


def test_cached_makes_again_what_was_made_before_an_edit_that_came_while_it_ran(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("elsewhen.py").write_text("def once(x):\n    return 1 * x\n")
    c = configured("--out", tmp_path)
    once = importlib.import_module("elsewhen").once
    train.files_of(["elsewhen"])                           # as the program begins
    Path("elsewhen.py").write_text("def once(x):\n    return 2 * x\n")
    for clear, word in ((False, "made in"), (False, "kept"), (True, "made again, as elsewhen.py")):
        if clear:                                          # the next program reads the new file
            train.own_source.cache_clear()
        train.cached(c, "once", applied, function=once, x=torch.ones(1))
        said = capsys.readouterr().out
        assert f"once: {word}" in said.replace(f"{os.path.relpath(tmp_path, HERE)}/", "")


def copy_of_the_project(folder):
    for file in [*HERE.glob("*.py"), *HERE.glob("studies/*.py")]:
        target = folder / file.relative_to(HERE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    return folder


@pytest.mark.parametrize("file, again", [
    ("train.py", set()), ("le.py", {"em-class-le"}), ("perceptual.py", {"vgg", "em-class-le"}),
    ("unet.py", {"ddpm", "vgg", "em-class-le"}),
    ("attacks.py", {"ddpm", "vgg", "em-class", "classifier-clean", "classifier-em-class-ue",
                    "classifier-em-class-le"})])
def test_cached_makes_again_what_is_in_a_file_that_has_changed(tmp_path, small_run, monkeypatch,
                                                               capsys, file, again):
    def edited(name, source=train.own_source):
        found = source(name)
        return found and (found[0], found[1] + "edited" * (found[0].name == file), found[2])
    shutil.copytree(small_run, tmp_path / "run")
    monkeypatch.setattr(train, "own_source", edited)
    train.main([*SMALL, "--protections", "em-class", "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    # what comes out the same makes nothing again that is built on it
    assert set(re.findall(rf"^([\w-]+): made again, as {file} changed", said, re.M)) == again
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


# -- The command line ------------------------------------------------------------------------------

def test_claim_lets_processes_of_one_run_in_and_another_data_set_or_seed_not(tmp_path, monkeypatch):
    note = tmp_path / "data.txt"
    c = configured("--out", tmp_path)
    for written in ("", "shapes --seed 0"):                # by another process: opened, or done
        note.write_text(written)
        train.claim(c)
        assert note.read_text() == "shapes --seed 0"
    for key, value in dict(data="cifar10", seed=1).items():
        with pytest.raises(BadInput, match="belongs to --data shapes --seed 0"):
            train.claim(SimpleNamespace(**vars(c) | {key: value}))
    assert note.read_text() == "shapes --seed 0"
    c.data = str(tmp_path)
    note.write_text("/once/there --seed 0")                # data, or a run, that was moved
    train.claim(c)
    monkeypatch.setattr(Path, "write_bytes", None)         # a run that can only be read
    train.claim(c)


def test_main_stops_in_one_line_when_a_loss_is_not_a_number(tmp_path, capsys):
    wild = ["ddpm", *SMALL, "--perceptual.lr", "1e9", "--out", tmp_path / "run"]
    said = refusal(train.main, wild, capsys)
    assert "vgg: " in said and "a lower learning rate" in said
    assert not (tmp_path / "run" / "vgg.pt").exists()


def test_main_paper_runs_at_toy_size(tmp_path, monkeypatch, capsys):
    vgg = awake(VGG(4, (2, 2, 3, 3, 3)))                   # VGG-16 with fewer channels
    unet.save(tmp_path / "vgg16.pt", checkpoint(vgg))
    train.main(["--config", "paper", "--limit", "2", "--resnet.widths", "8,8,8,8,8",
                "--unet.width", "8", "--unet.blocks", "1",
                "--protections", "em-sample,cp-sample",    # which begin with the other two
                "--vgg_weights", str(tmp_path / "vgg16.pt"), "--out", str(tmp_path / "run")])
    assert "| cp-sample |" in capsys.readouterr().out and not (tmp_path / "run" / "vgg.pt").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_main_interrupted_leaves_nothing_half_written_and_says_how_to_go_on(
        tmp_path, monkeypatch, capsys, number):
    def interrupted(checkpoint, path):
        Path(path).write_bytes(b"half")
        signal.raise_signal(number)
    monkeypatch.setattr(torch, "save", interrupted)
    said = refusal(train.main, ["ddpm", *SMALL, "--out", tmp_path / "run"], capsys, code=130)
    assert "train.py: interrupted; the same command goes on from here" in said
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["data.txt"]


@pytest.mark.parametrize("arguments, message", [
    (["--classifier.epoch", "3"], "--classifier.epoch"), (["evaluate"], "evaluate"),
    (["--config", "slow"], "--config: invalid choice: 'slow'"), (["--out", "file/run"], "file"),
    (["--classifier.epochs", "many"], "--classifier.epochs: invalid int value: 'many'"),
    (["--sampler.steps", "3.5"], "--sampler.steps: invalid int value: '3.5'"),
    (["--noise.em-class.shared", "row"], "--noise.em-class.shared"),
    (["--resnet.strides", "2,x"], "--resnet.strides: invalid numbers value: '2,x'"),
    (["--images.protected", "0"], "--images.protected 0"), (["--seed", str(2 ** 45)], "--seed"),
    (["--sampler.pixel_weight", "1e999"], "finite weights"), (["--ddpm.lr", "-1"], "--ddpm.lr -1"),
    (["--evaluate", "train"], "--evaluate"), (["--victim", "oracle"], "--victim"),
    (["--protections", "em,ps"], "--protections: expected em-class,"),
    (["--published", "ue.pt"], "--published: no such option; those of `python -m studies.own`"),
    (["--protections", "published"], "--protections"), (["--protections", ""], "--protections"),
    (["--data", "."], "expected one of shapes, cifar10; for a folder, `python -m studies.own`"),
    (["--data", "cifar10", "--root", "nowhere.tar.gz"], "nowhere.tar.gz: no archive"),
    (["--sampler.steps", "99", "--sampler.t_star", "36"], "steps"),
    (["--sampler.t_star", "200"], "--ddpm.levels"), (["--epsilon", "0.5"], "--epsilon: expected 1"),
    (["--limit", "1"], "--limit: expected 2 or more"), (["--size", "30"], "--unet"),
    (["--resnet.strides", "2,2"], "--resnet"), (["--vgg.convs", ""], "--vgg"),
    (["--resnet.widths", "4,8,8,8"], "--resnet.widths: expected 8 or more each"),
    (["--unet.width", "2"], "width 2, max_level 1000: expected an even width of 4 or more"),
    (["--ddpm.tilt", "5000"], "--ddpm.tilt: expected 0 to 10")])
def test_main_refuses_bad_input_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    short = [] if "--limit" in arguments else ["--limit", "4"]
    said = refusal(train.main, [*arguments, *short], capsys)
    assert message in said and said.count("\n") == 1 and said.startswith("train.py: ")
    assert not list(tmp_path.rglob("*.pt"))                # nothing half-written
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("option, fits, refused", [
    ("unet.width", 4, 3), ("seed", 2 ** 31 - 1, 2 ** 31), ("limit", 2, 1), ("limit", 0, -1),
    ("epsilon", 1, 0.99), ("epsilon", 255, 256), ("ddpm.levels", 1, 0), ("ddpm.levels", T, T + 1),
    ("resnet.widths", "8,8,8,8", "8,8,8,7"), ("ddpm.tilt", 0, -0.1), ("ddpm.tilt", 10, 10.1),
    ("images.test", 2 ** 31 - 1, 2 ** 31), ("noise.em-sample.warm_up", 0, 0.5), ("seed", 0, -1),
    ("sampler.t_star", 100, 101), ("unet.width", 6, 5), ("classifier.lr", 1e-9, 0)])
def test_parse_takes_values_up_to_their_bounds(option, fits, refused):
    one = ["--sampler.t_star", 1, "--sampler.steps", 1] * (option == "ddpm.levels")
    configured(f"--{option}", fits, *one)
    with pytest.raises((BadInput, SystemExit)):
        configured(f"--{option}", refused, *one)


def test_parse_lets_options_override_the_configuration_of_the_data():
    assert configured().unet["width"] == train.DEFAULTS["unet.width"]
    ours = configured("--data", "cifar10", "--sampler.steps", "7", "--seed", "3")
    assert ours.images["protected"] == 6000 and ours.seed == 3
    assert Sampler(**ours.sampler) == replace(le.SAMPLERS["photographs"], steps=7)
    assert ours.noise["em-class"]["rounds"] == 24
    released = configured("--config", "released")
    assert Sampler(**released.sampler) == le.SAMPLERS["released"]
    runs = [c.run.name for c in (configured(), released, configured("--limit", 9), ours)]
    assert runs == ["shapes", "shapes-released", "shapes-limit9", "cifar10-seed3"]
    both = configured("--data", "cifar10", "--config", "paper", "--config", "released")
    assert both.run.name == "cifar10-paper-released" and both.unet["width"] == 128
    assert Sampler(**both.sampler) == le.SAMPLERS["released"]
    assert configured("--data", "cifar10", "--config", "shapes").unet == configured().unet
    quick = configured("--config", "quick")
    assert quick.run.name == "shapes-quick" and quick.images["protected"] == 2048
    short = configured("--limit", 4)
    assert short.ddpm["batch_size"] == 4 and short.classifier["epochs"] == 4
    assert short.sampler["steps"] == 4 and short.noise["em-sample"]["warm_up"] == 4


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


def test_main_help_shows_the_options_as_they_stand_in_the_code(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    said = capsys.readouterr().out
    for line in ("usage: train.py [all | ddpm] [--OPTION VALUE ...]\n\nThe whole experiment: ",
                 '"seed": 0,                     # of the images, the networks and the noise',
                 "t_star: int = 100              # noise level", "momentum       of its gradient",
                 "lr             the highest learning rate", '"vgg_weights": ""}'):
        assert line in said


# -- Functions of one's own ------------------------------------------------------------------------

def red_corner(images, labels, victim, *, epsilon, seed, report):
    """A protection of one's own: a corner whose red says the class."""
    ue = images.clone()
    ue[:, 0, :4, :4] += (labels.view(-1, 1, 1) - 4.5) / 4.5 * epsilon
    return publish(ue, 0)


def test_main_takes_a_protection_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PROTECTIONS, "corner", Protection(red_corner))
    train.main([*SMALL, "--protections", "corner", "--out", str(tmp_path / "new" / "run")])
    assert "| corner |" in capsys.readouterr().out
    assert (tmp_path / "new" / "run" / "corner-le.pt").exists()


def moved(images, labels, victim, *, epsilon, seed, report, dx=0, steps=(1, 2)):
    """A protection with options of its own."""
    return publish(images, epsilon * torch.ones(3, 1, 1) * (1 + dx) / sum(steps))


def test_parse_takes_any_options_of_a_protection_of_ones_own(monkeypatch):
    monkeypatch.setitem(PROTECTIONS, "moved", Protection(moved))
    c = configured("--limit", 2, "--noise.moved.dx", "-1", "--noise.em-sample.noise_batches", "9")
    assert c.noise["moved"] == dict(dx=-1, steps=(1, 2))
    assert c.noise["em-sample"]["noise_batches"] == 9
    assert configured().noise["em-sample"]["noise_batches"] is None
    with pytest.raises(BadInput, match="--seed: expected 0 to"):
        configured("--seed", "-1")


def smaller(images, labels, victim, *, epsilon, seed, report):
    """A protection that gives images of another size."""
    return images[:, :, ::2, ::2]


def test_protect_says_where_a_protection_breaks_epsilon_or_shape(tmp_path, monkeypatch, capsys):
    entries = dict(louder=functools.partial(moved, dx=5), smaller=smaller,
                   darker=functools.partial(moved, dx=-4))  # by 2 epsilon, and by minus epsilon
    for name, make in entries.items():
        monkeypatch.setitem(PROTECTIONS, name, Protection(make))
    c = configured("--out", tmp_path, "--protections", "louder,smaller", *asked_for(4, 4, 1, 1))
    sets, _ = train.load_data(c)
    train.claim(c)
    train.protect(c, "louder", sets)
    said = "louder: changes a channel by 16/255, more than --epsilon 8"
    assert said in capsys.readouterr().out
    train.protect(c, "darker", sets)
    assert "changes a channel" not in capsys.readouterr().out
    with pytest.raises(BadInput, match=r"smaller gave \(4, 3, 16, 16\), expected \(4, 3, 32, 32\)"):
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
    train.main(command)                                    # with the defaults of `fit`


def blurred(net, distance, images, sampler, seeds, report):
    """A purifier of one's own."""
    return F.avg_pool2d(images, 3, stride=1, padding=1)


def test_main_takes_a_purifier_of_ones_own(tmp_path, small_run, monkeypatch, capsys):
    shutil.copytree(small_run, tmp_path / "run")
    monkeypatch.setitem(le.PURIFIERS, "blur", blurred)
    train.main([*SMALL, "--purifier", "blur", "--sampler.pixel_weight", "9", "--protections",
                "em-class", "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "em-class: kept" in said and "em-class-le: made again, as function, sampler, " in said
    assert "classifier-em-class-le: made again, as images changed" in said
    assert "em-class-le: makes no use of its seed" in said
    before = unet.read(small_run / "em-class-le.pt")["images"]
    assert not torch.equal(unet.read(tmp_path / "run" / "em-class-le.pt")["images"], before)


def in_place(net, distance, images, sampler, seeds, report):
    return images.mul_(0.5)


@pytest.mark.parametrize("change, message", [
    (lambda x: x.mean(0), r"gave \(3, 32, 32\), expected \(4, 3, 32, 32\)"),
    (lambda x: 2 * x, "to 2, expected .0, 1."), (lambda x: x - 1, "-1 to 0, expected .0, 1.")])
def test_cached_refuses_what_is_no_set_of_images(tmp_path, change, message):
    def wrong(net, distance, images, sampler, seeds, report):
        return change(images)
    c, x = configured("--out", tmp_path), images(4)
    with pytest.raises(BadInput, match=f"le {message}|le gave .*{message}"):
        train.cached(c, "le", wrong, net=None, distance=None, images=x, sampler=None, seeds=[0] * 4)
    assert not list(tmp_path.glob("*.pt"))
    before = x.clone()                                     # and who works in place gets a copy
    train.cached(c, "le", in_place, net=None, distance=None, images=x, sampler=None, seeds=[0] * 4)
    same(x, before)


@pytest.mark.parametrize("made, shape, message", [
    (torch.ones(2, 3, 4, 4), (2, 3, 4, 4), "it gave one image for all 2"),
    (torch.ones(2, 5), (2, 4), r"gave \(2, 5\), expected \(2, 4\)"), (None, (2,), "a NoneType"),
    (torch.ones(2, 5, 1), (2, -1), "expected"), (np.ones(2), (2,), "a ndarray, expected a ten"),
    (torch.tensor([0.5, 1.004]), (2,), r"gave 0.5 to 1, expected \(0, 1\), finite"),
    (torch.tensor([-0.004, 0.5]), (2,), "gave -0.004 to 0.5"),
    (torch.tensor([math.nan, 0.5]), (-1,), "gave nan"), (torch.ones(2) / 0, (-1,), "gave inf to i"),
    (torch.ones(1, 3, 4, 4), (1, 3, 4, 4), ""), (images(2), (2, 3, 32, 32), ""),
    (torch.ones(3, 5), (3, -1), ""),                       # scores may be alike
    (torch.tensor([-0.001, 1.001]), (2,), "")])
def test_looked_at_refuses_what_is_not_as_expected(made, shape, message):
    within = (0, math.inf) if shape == (-1,) else (0, 1)
    with pytest.raises(BadInput, match=message) if message else nullcontext():
        assert le.looked_at("it", made, shape, within) is made


class OfSeeds:
    def __call__(self, net, distance, images, sampler, seeds, report):
        return images + seeds[0]


def test_unused_seed_sees_who_never_looks_at_it():
    for make in (attacks.min_min, purify, functools.partial(attacks.min_min, shared="all"),
                 OfSeeds(), lambda x, seed: x + seed):
        assert not le.unused_seed(make)
    for make in (blurred, red_corner, functools.partial(blurred, net=None),
                 lambda x, seed: x):
        assert le.unused_seed(make)


# -- Other machines --------------------------------------------------------------------------------

class NotebookStream(io.StringIO):
    """A stream such as ipykernel's, which is no text file."""
    reconfigure = property()


def test_main_runs_in_a_notebook_and_outside_the_main_thread(tmp_path, monkeypatch, small_run):
    folder = shutil.copytree(small_run, tmp_path / "run")
    stream, failed = NotebookStream(), []
    assert not hasattr(stream, "reconfigure")
    monkeypatch.setattr(sys, "stdout", stream)

    def work():
        try:
            train.main([*SMALL, "--protections", "em-class", "--out", str(folder)])
        except BaseException as error:
            failed.append(error)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    assert "| em-class |" in stream.getvalue()


def test_main_runs_without_distributed(tmp_path):
    copied = copy_of_the_project(tmp_path / "copy")
    (copied / "main.py").write_text("import torch.distributed as d; del d.TCPStore, d.rendezvous; "
                                    "import train; train.main()")
    said = run(copied, "main.py", "ddpm", *SMALL, "--out", tmp_path)
    assert "vgg: made in" in said


def test_cached_reads_and_writes_where_text_is_not_utf_8(tmp_path):
    copied = copy_of_the_project(tmp_path / "kopie-ü")
    source = (copied / "attacks.py").read_text(encoding="utf-8")
    (copied / "attacks.py").write_text(f"{source}# für alle\n", encoding="utf-8")
    plain = dict(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0", OMP_NUM_THREADS="1")
    program = ("import sys, train; _, c = train.parse(sys.argv[1:]); train.claim(c); "
               "images, _ = train.load_data(c)[0]['test']; net = train.UNet(**c.unet).eval(); "
               "train.make_learnable(c, 'any', images, net, None)")
    command = [program, *SMALL, "--sampler.perceptual_weight", "0", "--out", "läuft"]
    done = subprocess.run([sys.executable, "-c", *command], cwd=copied, capture_output=True,
                          env=os.environ | plain)
    assert done.returncode == 0 and b"any-le: made in" in done.stdout, done.stderr


def test_main_is_alone_where_another_program_has_set_what_torchrun_sets(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    train.main([*SMALL, "--protections", "em-class", "--out", str(tmp_path)])
    assert (tmp_path / "results.json").exists()
