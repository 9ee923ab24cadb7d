"""Tests of the studies, found by `python -m pytest` with the others."""
import functools
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import attacks
import le
import train
import unet
from attacks import EPSILON, SimCLR, Victim, fit, partner_scores, publish
from le import Sampler
from studies import (ablation, answers, contrastive, handout, opponents, pictures, protections,
                     purifiers, scenarios)
from studies import purify as own_images
from studies.grading import CLAIMS
from test_le import (HERE, SMALL, TINY, awake, copy_of_the_project, images, refusal, same, seeded,
                     silent, small_run)
from unet import DEVICE, UNet, on_device

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


def test_main_runs_without_distributed_and_where_text_is_not_utf_8(tmp_path):
    copied = copy_of_the_project(tmp_path / "kopie-ü")
    with open(copied / "attacks.py", "a", encoding="utf-8") as file:
        file.write("# für alle\n")
    program = tmp_path / "main.py"
    program.write_text("import sys, runpy; sys.modules['torch.distributed.nn'] = None; "
                       "sys.path.insert(0, sys.argv[1]); import train; train.main(sys.argv[2:])")
    command = [sys.executable, program, copied, "ddpm", *SMALL, "--out", tmp_path / "run"]
    plain = dict(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0", OMP_NUM_THREADS="1")
    done = subprocess.run([str(part) for part in command], cwd=tmp_path, capture_output=True,
                          env=os.environ | plain)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert b"vgg: made" in done.stdout


def test_main_says_in_one_line_that_WORLD_SIZE_alone_is_no_torchrun(monkeypatch, capsys):
    monkeypatch.setattr(le, "PROCESSES", 2)                # as `unet` reads it from WORLD_SIZE
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    said = refusal(train.main, SMALL, capsys)
    assert said.count("\n") == 1 and "WORLD_SIZE is set" in said and "MASTER_ADDR" in said


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
def test_main_studies_run_on_a_run(tmp_path, small_run, study, written, capsys):
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


def test_deterministic_goes_through_all_rounds(monkeypatch):
    net = awake(UNet(**TINY, size=16)).to(DEVICE)
    done = []
    sampler = Sampler(t_star=20, rounds=3, steps=2)
    purifiers.deterministic(net, None, images(2, 16), sampler, [0, 1],
                            lambda count, total: done.append((count, total)))
    assert done == [(2, 6), (4, 6), (6, 6)]


def test_unshared_takes_away_what_all_images_bear_and_others_do_not():
    originals = 0.25 + images(6) / 2
    noise = torch.tensor([8.0, -8.0, 4.0]).view(3, 1, 1) / 255
    unprotected = originals.flip(0)                        # other images, of the same mean
    restored = answers.unshared(publish(originals, noise), unprotected)
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


def test_main_owner_gives_each_victim_a_noise_of_its_own(tmp_path, small_run):
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


def test_every_option_is_explained_by_all_the_lines_beside_it():
    options = train.every_option()
    untold = {option for option, (_, what) in options.items() if not what}
    assert {option.split(".")[1] for option in untold} <= set(protections.OTHERS)
    assert options["seed"][1] == "of the images, the networks and the noise"
    assert options["simclr.lr"][1].endswith("from 0.95 to 0.85 and back")


def probe_of(x, view, data):
    """Accuracy of a small SimCLR that is trained on x."""
    config = dict(widths=(8, 16, 32, 64), blocks=1, strides=(2, 2, 2), classes=10)
    victim = Victim(SimCLR, partner_scores, config, dict(view=view, temperature=0.2))
    made = fit(victim, x, torch.zeros(len(x), dtype=torch.long), epochs=10, batch_size=64,
               lr=0.2, seed=0, report=silent)
    net = victim.fresh(0).eval()
    net.load_state_dict(made["weights"])
    return train.linear_probe(net, data, data)


def test_SimCLR_can_be_fooled_by_a_code_that_is_added_after_the_views():
    # a positive control: if this fails, no noise could protect from SimCLR
    x, labels = train.shapes(640, seed=0)
    code = torch.zeros_like(x)
    code[:, :, :16, :16] = contrastive.class_codes(10, 16, 48 / 255, seed=0)[labels]
    clean = probe_of(x, attacks.quadrant_view, (x, labels))
    after = functools.partial(opponents.coded_view, view=attacks.quadrant_view)
    fooled = probe_of(torch.cat([x, code], 1), after, (x, labels))
    assert clean > 58 and fooled < clean - 12              # 66 and 49 when this was written


# -- Assignments (see the README) ------------------------------------------------------------------

def outcomes(folder, only):
    """{test: (outcome, what it said)} of tests in a copy of the project."""
    command = [sys.executable, "-m", "pytest", "-rA", "-q", "-p", "no:cacheprovider", "test_le.py",
               "-k", only]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    found = re.findall(r"^(PASSED|FAILED|SKIPPED|ERROR).*::(\w+)(.*)", done.stdout, re.M)
    return {test: (outcome, said) for outcome, test, said in found}, done.stdout


QUICK = "not (main or torchrun or cached or SimCLR)"


def test_assignment_fails_its_own_tests_and_lets_those_of_others_wait(tmp_path):
    numbers = ["1", "4", "8"]
    handout.main([*numbers, "--out", str(tmp_path / "copy")])
    names = [handout.ASSIGNMENTS[int(number)][1] for number in numbers]
    # some that need nothing, or a fixture
    others = "ddpm_loss or unguided or schedule or (story and whole)"
    tests, said = outcomes(tmp_path / "copy", f"({' or '.join(names)} or {others})")
    for name in names:
        own = {outcome for test, (outcome, _) in tests.items() if name in test}
        assert own == {"FAILED"}
        assert f"{name} is yours to write: {CLAIMS[name][:40]}" in said
    assert tests["test_schedule_alpha_bar_is_the_running_product_and_starts_at_one"][0] == "PASSED"
    waiting = [line for line in said.splitlines() if line.startswith("SKIPPED")]
    assert len(waiting) >= 3 and all(re.search("needs (q_sample|embed)", line) for line in waiting)
    failed = {test for test, (outcome, _) in tests.items() if outcome in ("FAILED", "ERROR")}
    assert all(any(name in test for name in names) for test in failed)


def test_assignment_solutions_pass_their_tests_even_where_a_student_deleted_all(tmp_path):
    if any("raise NotImplementedError" in (HERE / file).read_text()
           for file, _ in handout.ASSIGNMENTS.values()):
        pytest.skip("the solutions are not in a copy that was handed out")
    numbers = [str(number) for number in handout.ASSIGNMENTS]
    folder = tmp_path / "copy"
    handout.main([*numbers, "--out", str(folder)])
    source = (folder / "unet.py").read_text()
    body = handout.function_in(source, "q_sample").body
    lines = source.splitlines(keepends=True)
    lines[body[0].lineno - 1:body[-1].end_lineno] = ["    return x0\n"]  # no docstring any more
    (folder / "unet.py").write_text("".join(lines))
    handout.main([*numbers, "--out", str(folder), "--solutions"])
    for file, _ in handout.ASSIGNMENTS.values():
        assert (folder / file).read_text() == (HERE / file).read_text()
    tests, _ = outcomes(folder, f"({' or '.join(CLAIMS)}) and {QUICK}")
    assert len(tests) > 15 and {outcome for outcome, _ in tests.values()} == {"PASSED"}


def test_assignment_copies_lie_anywhere_and_a_broken_one_is_named(tmp_path, capsys):
    folder = tmp_path / "studies"                          # a name that is in the project, too
    handout.main(["1", "--out", str(folder)])
    assert (folder / "studies" / "handout.py").exists()
    (folder / "unet.py").write_text("def q_sample(:\n")
    said = refusal(handout.main, ["1", "--out", str(folder), "--solutions"], capsys)
    assert "unet.py: line 1" in said


def test_assignment_solutions_are_not_taken_from_a_copy_that_lacks_them(tmp_path, monkeypatch,
                                                                        capsys):
    folder = tmp_path / "copy"
    handout.main(["1", "--out", str(folder)])
    assert '`python -m pytest -k "q_sample"`' in capsys.readouterr().out
    monkeypatch.setattr(handout, "HERE", folder)
    said = refusal(handout.main, ["1", "--out", str(folder), "--solutions"], capsys)
    assert "q_sample is left out here, too" in said


@pytest.mark.parametrize("number", handout.ASSIGNMENTS)
def test_every_assignment_has_tests_that_bear_its_name(number):
    tests = re.findall(r"^def (test_\w+)", (HERE / "test_le.py").read_text(), re.M)
    assert any(handout.ASSIGNMENTS[number][1] in test for test in tests)


# -- README ----------------------------------------------------------------------------------------

def test_readme_commands_are_understood():
    """Every command in the READMEs is one that the programs know."""
    text = (HERE / "README.md").read_text() + (HERE / "studies" / "README.md").read_text()
    start = r"(?:python|torchrun --nproc_per_node=\d+) "
    commands = re.findall(rf"^    {start}(.*?)(?:  .*)?$", text, re.M)
    commands += re.findall(rf"`{start}([^`]*)`", text)
    assert len(commands) > 15
    for command in sorted(set(commands)):
        program, *arguments = shlex.split(command)
        if program == "train.py" and arguments != ["--help"]:
            train.parse(arguments)
        elif program == "train.py":
            assert set(train.every_option()) > set(train.DEFAULTS)
        elif arguments[0].startswith("studies."):
            assert (HERE / "studies" / f"{arguments[0].split('.')[1]}.py").exists(), command
        else:
            assert arguments[0] == "pytest", command


def test_readme_doors_work_as_they_are_pasted(tmp_path, monkeypatch, capsys):
    """A protection, a victim and a purifier of one's own: the README's lines, as if they stood at
    the end of the files that it names."""
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    for module, entries, name in ((attacks, "PROTECTIONS", "corner"), (attacks, "VICTIMS", "mlp"),
                                  (le, "PURIFIERS", "blur")):
        monkeypatch.setitem(getattr(module, entries), name, None)  # is taken out again afterwards
        block, = [block for block in blocks if f"{entries}[" in block]
        exec(block, dict(vars(module)))
    train.main([*SMALL, "--out", str(tmp_path), "--protections", "corner", "--purifier", "blur",
                "--victim", "mlp"])
    said = capsys.readouterr().out
    assert "mlp on corner-le: " in said and "| corner |" in said


def test_readme_counts_the_lines_of_each_file():
    readme = (HERE / "README.md").read_text()
    for name, lines in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", readme, re.M):
        counted = len((HERE / name).read_text().splitlines())
        assert abs(counted - int(lines)) <= 10, f"README.md: {name} has {counted} lines"
