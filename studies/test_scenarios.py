"""Tests of what is asked of a whole run, of its tables and its pictures, and of the plane."""
import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import attacks
import le
import train
import unet
from attacks import EPSILON, publish
from le import Sampler
from studies import ablation, handout, labels, pictures, plane, protections, purifiers
from studies import purify as own_images
from studies import replies, scenarios, slide, untuned
from test_le import SMALL, TINY, awake, images, refusal, same, seeded, silent, small_run
from unet import DEVICE, UNet, on_device


# -- studies ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("study, written", [
    (["pictures"], ["overview", "forward", "strip", "curves", "confusion", "neighbours"]),
    (["ablation", "--only", "JPEG 10", "--protection", "em-class"], []),
    (["ablation", "--only", "unguided, DDIM", "--protection", "em-class"], []),
    (["ablation", "--only", "joint, on grey", "--protection", "cp-class"], []),
    (["scenarios", "code", "--victims", "1"], ["code"]),
    (["scenarios", "longer", "--victims", "1"], ["longer"]),
    (["scenarios", "mean", "--victims", "1", "--protections", "em-class"], ["mean"]),
    (["scenarios", "ceiling", "--victims", "1", "--protections", "em-class"], ["ceiling"]),
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
def test_main_studies_run_on_a_run(tmp_path, small_run, monkeypatch, study, written, capsys):
    short = replace(le.SAMPLERS["released"], rounds=1)     # in place of four, of 36 levels each
    monkeypatch.setitem(le.SAMPLERS, "released", short)
    shutil.copytree(small_run, tmp_path / "run")
    name, *options = study
    main = importlib.import_module(f"studies.{name}").main
    main([*options, *SMALL, "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert ("ddpm: kept" in said or name == "scenarios") and (written or said.count("|") > 10)
    for picture_name in written:
        assert Image.open(tmp_path / "run" / f"{picture_name}.png").width > 300
    if study[1:2] == ["part"]:
        assert "part, em-sample" in said                   # the question's own, of a whole run


@pytest.mark.parametrize("name", le.SAMPLERS)
def test_ablation_changes_what_the_name_of_its_row_says(name):
    sampler = le.SAMPLERS[name]
    rows = {}
    for part in ablation.questions(sampler).values():
        rows |= part
    alone, both = rows["perceptual only"], rows["joint, both"]
    assert alone.perceptual_weight > 0 and alone.pixel_weight == 0 and both.perceptual_weight > 0
    other = "colour" if sampler.compare == "grey" else "grey"
    assert rows[f"joint, on {other}"] == replace(sampler, compare=other)


def test_pictures_says_where_there_is_nothing_to_draw(tmp_path, small_run, capsys):
    shutil.copytree(small_run, tmp_path / "run")
    pictures.main(["scenarios", *SMALL, "--out", str(tmp_path / "run")])
    assert "scenarios: there is nothing to draw yet" in capsys.readouterr().err


def test_main_studies_know_victims_of_ones_own_and_runs_of_two_images(tmp_path, monkeypatch):
    monkeypatch.setitem(attacks.VICTIMS, "mine", attacks.VICTIMS["classifier"])
    own = replace(attacks.PROTECTIONS["em-class"], victim="mine")
    monkeypatch.setitem(attacks.PROTECTIONS, "own", own)
    small = [*SMALL, "--limit", "2", "--protections", "own", "--out", str(tmp_path / "run")]
    train.main(small)
    scenarios.main(["cross", "--victims", "1", *small])
    assert Image.open(tmp_path / "run" / "cross.png").width > 300
    for picture in ("forward", "strip", "neighbours"):
        pictures.main([picture, *small])


def test_main_scenarios_all_asks_each_with_settings_of_its_own(tmp_path, small_run, monkeypatch):
    seen = []

    def watched(c, sets, count):
        """What does it see?"""
        seen.append(c.evaluate)
        return scenarios.cross(c, sets, count)
    questions = {"probe": scenarios.probe, "cross": watched}
    monkeypatch.setattr(scenarios, "SCENARIOS", questions)
    run = Path(shutil.copytree(small_run, tmp_path / "run"))
    scenarios.main(["all", "--victims", "1", "--protections", "em-class", *SMALL,
                    "--out", str(run)])
    assert seen == ["test"]                                # though the probe's are for validation
    for name in questions:
        assert json.loads((run / f"{name}.json").read_text())
        assert Image.open(run / f"{name}.png").width > 300


@pytest.mark.parametrize("protections, expected", [
    ("em-class,convolved,patches", ["patches", "convolved"]), ("em-class", "default")])
def test_asked_for_are_the_others_that_are_named_or_the_default(protections, expected):
    c = SimpleNamespace(protections=protections.split(","))
    assert untuned.asked_for(c, "default") == expected


def test_convolved_filters_every_channel_and_image_of_a_class_alike():
    dot = torch.zeros(6, 3, 8, 8)
    dot[:, :, 4, 4] = 1.0                                  # what becomes of it is the filter
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    made = protections.convolved(dot, labels, None, epsilon=0, seed=0, report=silent)
    filters = made[:, :, 3:6, 3:6].flatten(2)
    assert made.sum() == filters.sum()
    same(filters[:3], filters[3:])
    same(filters[:, :1].expand_as(filters), filters)
    highest, others = filters.sort(descending=True)[0].split((1, 8), dim=2)
    assert (highest == 1).all() and others.max() < 0.31
    assert len({f.numpy().tobytes() for f in filters[:3, 0]}) == 3


def test_patches_fit_any_size():
    ue = protections.patches(images(4, 28), torch.arange(4) % 2, None, epsilon=EPSILON, seed=0,
                             report=silent)
    assert ue.shape == (4, 3, 28, 28)


def test_unshared_takes_away_what_all_images_bear_and_others_do_not():
    originals = 0.25 + images(6) / 2
    noise = torch.tensor([8.0, -8.0, 4.0]).view(3, 1, 1) / 255
    unprotected = originals.flip(0)                        # other images, of the same mean
    restored = replies.unshared(publish(originals, noise), unprotected)
    same(restored, publish(originals, 0))


def test_colours_anew_keeps_grey_values_and_no_colours_of_the_noise():
    net = awake(UNet(**TINY, size=16)).to(DEVICE)
    x = 0.3 + 0.4 * images(3, 16)
    sampler = Sampler(t_star=20, rounds=2, steps=2)
    anew = purifiers.colours_anew(net, x, sampler, [3, 1, 2])
    assert (anew - x).mean(1).abs().max() <= 1 / 255 and (anew - x).abs().max() > 20 / 255
    same(purifiers.colours_anew(net, x[1:], sampler, [1, 2]), anew[1:])  # noise is each image's own
    made = purifiers.recoloured(net, None, x, sampler, [3, 1, 2])
    same(made, (255 * made).round() / 255)


def test_main_owner_gives_each_victim_a_noise_of_its_own(tmp_path, small_run, monkeypatch):
    monkeypatch.setattr(replies, "known_priors", lambda c, images, net: {"knows its U-Net": net})
    run = Path(shutil.copytree(small_run, tmp_path / "run"))
    scenarios.main(["owner", "--victims", "2", *SMALL, "--out", str(run)])
    assert Image.open(run / "owner.png").width > 300
    made = [unet.read(run / f"owner-8-knows-its-U-Net{k}.pt")["images"] for k in ("", "-1")]
    assert not torch.equal(*made)
    key = "classifier-owner-8-knows-its-U-Net"
    for k, images in zip(("", "-1"), made):
        learned = unet.read(run / f"{key}-UE{k}.pt")["parts"]["images"]
        assert learned == train.hashes(dict(images=on_device(le.as_float(images))))["images"]
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


# -- The plane, and drawing ------------------------------------------------------------------------

def test_protect_moves_points_by_epsilon_off_the_circle_to_the_side_of_their_class():
    points, classes = plane.natural_points(500, torch.Generator().manual_seed(0))
    ue = plane.protect(points, classes)
    assert ((ue - points).flatten(1).norm(dim=1) - plane.EPSILON).abs().max() < 1e-5
    assert plane.moved(ue, points, classes) == pytest.approx((0, plane.EPSILON), abs=0.01)


def test_the_perceptual_distance_of_the_plane_is_blind_to_the_perturbation_alone():
    points, classes = plane.natural_points(50, torch.Generator().manual_seed(0))
    distance, ue = plane.Directions(), plane.protect(points, classes)
    seen = distance.embed(points / 2 + 0.5)
    assert distance.to_embedding(ue / 2 + 0.5, seen).max() < 1e-8
    assert distance.to_embedding(points.flip(1) / 2 + 0.5, seen).mean() > 0.1


def test_conditions_keep_points_in_place_and_too_much_of_one_brings_the_protection_back():
    points, classes = plane.natural_points(400, torch.Generator().manual_seed(0))
    net = plane.fit(plane.Denoiser(), lambda net: unet.ddpm_loss(
        net, points, torch.randint(1, 101, (400,)), torch.randn(points.shape)), 600, 0.005)
    ue, ways = plane.protect(points, classes), []
    for name in ("LEs, no condition", "LEs, both", "LEs, pixels x 50"):
        made = plane.way_back(net, ue, plane.SAMPLERS[name], torch.Generator().manual_seed(0))
        ways.append(plane.moved(made, points, classes))
    (along, off), (along_both, off_both), (_, off_pixels) = ways
    assert along_both < along / 2 and off < off_both < off_pixels and off_both < plane.EPSILON / 3


def test_pictures_of_the_plane_are_drawn(tmp_path):
    points, classes = plane.natural_points(50, torch.Generator().manual_seed(0))
    found = {"points": (points, plane.perceptron(2, 8, 2), (99.0, 0.0, 0.0))}
    slide.draw_panels(["points"] * 6, found, classes, plane.summary([found]), tmp_path / "a.png")
    slide.draw_pipeline(tmp_path / "b.png")
    assert all(Image.open(tmp_path / name).width > 1000 for name in ("a.png", "b.png"))


def test_labels_of_a_plot_overlap_neither_each_other_nor_dots_and_stay_inside():
    torch.manual_seed(0)
    dots = (torch.rand(25, 2) * torch.tensor([860, 460]) + 20).tolist()
    taken = [labels.square(x, y, 6) for x, y in dots]
    boxes = labels.placed([(x, y, 120) for x, y in dots], taken, (900, 500))
    for i, (left, top, right, bottom) in enumerate(boxes):
        assert not any(labels.overlap(boxes[i], other) for other in [*taken, *boxes[:i]])
        assert left >= 0 and top >= 0 and right <= 900 and bottom <= 500


@pytest.mark.parametrize("t", [0, 36, 1000])
def test_rows_of_forward_differ_by_exactly_the_perturbation_that_is_left(t):
    original, move, eps = torch.randn(3, 3, 8, 8)
    noisy, left, noise = pictures.forward_rows(original, original + move, eps, t)
    kept = unet.ALPHA_BAR[t].sqrt().item()
    torch.testing.assert_close(left - noise, kept * move, atol=1e-6, rtol=0)
    torch.testing.assert_close(noisy - left, kept * (original - 0.5) + 0.5, atol=1e-6, rtol=0)
