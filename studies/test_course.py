"""Tests of what a course needs: handing out, and grading."""
import ast
import csv
import os
import re
import shutil
import subprocess
from threading import get_ident
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from studies import assignments, grade, grading, handout, submissions
from studies.grading import CLAIMS
from studies.programs import output
from test_le import HERE, refusal, seeded

SOLVED = not any("raise NotImplementedError" in (HERE / file).read_text(encoding="utf-8")
                 for file, _ in assignments.ASSIGNMENTS.values())

# A project like ours, of few files, whose tests take no time
BODY = "return (1 - t) * x0 + t * eps"
SOURCE = f'''"""Two functions."""
def q_sample(x0, t, eps):
    """Between an image and noise."""
    {BODY}
def posterior(x0):
    """Half of it."""
    return x0 / 2
'''
TESTS = """import unet
def test_q_sample_of_no_noise(): assert unet.q_sample(3.0, 0, 5.0) == 3.0
def test_q_sample_of_noise(): assert unet.q_sample(3.0, 1, 5.0) == 5.0
def test_posterior_by_hand(): assert unet.posterior(3.0) == 1.5
def test_story(): assert unet.posterior(unet.q_sample(3.0, 1, 5.0)) * 2 == 5.0
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The folder of that project, which takes the place of this one."""
    (tmp_path / "toy" / "studies").mkdir(parents=True)
    shutil.copy(HERE / "studies" / "recorder.py", tmp_path / "toy" / "studies")
    (tmp_path / "toy" / "unet.py").write_text(SOURCE)
    (tmp_path / "toy" / "test_le.py").write_text(TESTS)
    two = {1: ("unet.py", "q_sample"), 2: ("unet.py", "posterior")}
    for module in (assignments, handout, grade):
        monkeypatch.setattr(module, "HERE", tmp_path / "toy")
        monkeypatch.setattr(module, "ASSIGNMENTS", two)
    monkeypatch.setattr(grade, "NEEDED", {1: ["test_story"], 2: ["test_story"]})
    return tmp_path / "toy"


DEFINED, LOOP = "def q_sample", "while True:\n        "
# What a submission has in place of what, and what is said of it
FAULTS = {
    "right": ("", "", ""),
    "endless": (BODY, f"{LOOP}time.sleep(1)\nimport time", "of_no_noise: did not end within 4 s"),
    "prints": (BODY, f"{LOOP}print('x' * 10 ** 7, time.sleep(0.1))\nimport time", "within 4 s"),
    "memory": (BODY, f"kept = []\n    {LOOP}kept.append(bytearray(2 ** 26))", "MemoryError"),
    "syntax": (BODY, "x = (", r"unet.py: line \d+: '\(' was never closed"),
    "renamed": (DEFINED, "def q_sampled", "no function of this name"),
    "unwritten": (BODY, "raise NotImplementedError", "is not written yet"),
    "import-inside": (BODY, "import not_installed", "No module named 'not_installed'"),
    "import-outside": (BODY, "gone.run()\nimport math, gone", "No module named 'gone'"),
    "exits": (BODY, "import sys\n    sys.exit(0)", "SystemExit: 0"),
    "ends": (BODY, "import os\n    os._exit(0)", "ended the process, exit code 0"),
    "a-child": (BODY, f"import subprocess as s\n    s.Popen(['sleep', '4321'])\n    {BODY}", ""),
    "wrong": (BODY, "return eps", "q_sample: test_q_sample_of_no_noise: assert 5.0 == 3.0")}
# What a submission may have in place of what, since nothing is wrong with it
WAYS = {
    "utf-8-sig": ("", ""), "latin-1": ('"""Two', '# coding: latin-1\n# B\xfcrgi\n"""Two'),
    "no-docstring": ('    """Between an image and noise."""\n', ""),
    "not-needed": (DEFINED, f"import not_installed\nopen('/none')\n{DEFINED}"),
    "star": (BODY, "return t * eps + (hypot(1, 0) - t) * x0\nfrom math import *"),
    "helpers": (BODY, "return mixed(x0, t, eps)\nfrom math import floor, ceil as up\nONE = 1\n"
                "def mixed(x0, t, eps): return lerp(x0, eps, t)\n"
                "def lerp(a, b, t): return floor(ONE) * ((up(ONE) - t) * a + t * b)")}


def hand_in(folder):
    """A submission: the toy's unet.py, with the fault that the folder is named after."""
    old, new, said = FAULTS.get(folder.name) or (*WAYS[folder.name], "")
    folder.mkdir()
    encoding = folder.name if folder.name in ("utf-8-sig", "latin-1") else "utf-8"
    (folder / "unet.py").write_text(SOURCE.replace(old, new, 1), encoding=encoding)
    return folder, said


def test_grade_lets_no_fault_cost_more_than_its_own_assignment(toy, tmp_path, monkeypatch, capsys):
    tests = Mock(side_effect=grade.run_tests)
    monkeypatch.setattr(grade, "run_tests", tests)
    absent = {tmp_path / "a-link": "unet.py is not there", tmp_path / "none": "not a folder"}
    expected = dict(hand_in(tmp_path / name) for name in FAULTS) | absent
    (tmp_path / "a-link").mkdir()
    (tmp_path / "a-link" / "unet.py").symlink_to(tmp_path / "right" / "unet.py")
    grade.main([*map(str, expected), "--only", "1", "2", "--seconds", "4", "--memory", "0.5",
                "--jobs", "4", "--csv", str(tmp_path / "grades.csv")])
    lines = capsys.readouterr().out.splitlines()
    rows = csv.DictReader((tmp_path / "grades.csv").read_text(encoding="utf-8").splitlines())
    for line, row, (folder, said) in zip(lines[1:], rows, expected.items(), strict=True):
        points = [3 if not said else folder.name == "wrong", 0 if folder in absent else 6]
        assert [float(row[key]) for key in ("1 q_sample", "2 posterior")] == points, line
        assert line.startswith(f"{folder}: {sum(points)} of 9") and row["submission"] == str(folder)
        assert re.search(said or "^$", row["what is wrong"]), line
    running = subprocess.run("ps -eo args", shell=True, capture_output=True, text=True).stdout
    assert "sleep 4321" not in running.splitlines()
    judged = [number for (number, *_), _ in tests.call_args_list]
    assert judged.count(2) == 1                            # since all have written it alike


@pytest.mark.parametrize("way", WAYS)
def test_handed_in_takes_a_function_with_what_it_needs_in_any_way(toy, tmp_path, way):
    hand_in(tmp_path / way)
    for name in ("q_sample", "posterior"):
        part, made = submissions.handed_in(tmp_path / way, toy, "unet.py", name), {}
        exec(part.source, made)
        for test in re.findall("assert (.*)", TESTS):
            assert eval(test, dict(unet=SimpleNamespace(**made))) and not part.fault


def test_grade_takes_a_method_with_those_that_it_calls(tmp_path):
    (tmp_path / "a.py").write_text('"""A."""\nclass A:\n    def f(self):\n        """F."""\n')
    student = "import os\nclass A:\n def f(self): return self.g()\n def g(self): return os.sep\n"
    (tmp_path / "his").mkdir()
    (tmp_path / "his" / "a.py").write_text(f"from __future__ import annotations\n{student}")
    part, made = submissions.handed_in(tmp_path / "his", tmp_path, "a.py", "f"), {}
    exec(part.source, made)
    assert made["A"]().f() == os.sep and made["A"].f.__doc__ == "F." and part.changed


def test_grade_asks_what_to_grade_and_for_the_solutions(toy, tmp_path, monkeypatch, capsys):
    right, wrong = [str(hand_in(tmp_path / name)[0]) for name in ("right", "wrong")]
    assert "nothing differs from the project" in refusal(grade.main, [right], capsys)
    threads, parse = [], ast.parse                         # in two of which Python 3.11 fails
    monkeypatch.setattr(ast, "parse", lambda source: threads.append(get_ident()) or parse(source))
    grade.main([right, wrong])
    assert "3 points: 1 q_sample\n" in capsys.readouterr().out
    assert set(threads) == {get_ident()} and len(threads) > 6
    (toy / "unet.py").write_text(SOURCE.replace(BODY, "raise NotImplementedError"))
    assert "q_sample is left out here" in refusal(grade.main, [right], capsys)


@pytest.mark.skipif(not SOLVED, reason="the solutions are not in a copy handed out")
def test_grade_finds_what_own_tests_do_not_show(tmp_path, monkeypatch, capsys):
    for number, tests in grade.NEEDED.items():             # the story takes several seconds
        monkeypatch.setitem(grade.NEEDED, number, [t for t in tests if t != grade.STORY])
    for file, start, right, wrong in (
            ("unet.py", "def posterior", "return mean, var", "return mean, var.item()"),
            ("le.py", "def guidance", "with torch.enable_grad():", "if True:")):
        before, found, after = (HERE / file).read_text(encoding="utf-8").partition(start)
        assert right in after
        (tmp_path / file).write_text(before + found + after.replace(right, wrong, 1))
    grade.main([str(tmp_path)])
    assert re.fullmatch(r"12 points: 2 posterior, 7 guidance\n.*: [\d.]+ of 12  posterior: "
                        "test_posterior_.*: AttributeError: .*\n", capsys.readouterr().out)


def test_NEEDED_names_tests_that_are_there():
    for number, (_, name) in assignments.ASSIGNMENTS.items():
        assert grade.POINTS[number] > 0 and assignments.own_tests(name)
        assert not set(grade.needed_tests(number)) & set(assignments.own_tests(name))


@pytest.mark.parametrize("actual, said", [
    ([2, -4, 10], "twice what is expected"), ([-1, 2, -5], "minus what is expected"),
    ([0.5, -1, 2.5], "a constant factor of 0.5"), ([5, -2, 1], "the right values in another order"),
    ([2, -1, 6], ""), ([1, -2], ""), ([torch.nan, -2, 5], ""), ([1, -2, 5], ""), ([0, 0, 0], "")])
def test_close_says_first_how_numbers_differ(actual, said):
    actual, expected = torch.tensor(actual).float(), torch.tensor([1.0, -2.0, 5.0])
    assert grading.explained(actual, expected) == said and not grading.close(expected, expected)
    for compare in (grading.close, grading.same) if said else ():
        with pytest.raises(AssertionError, match=f"^{said}\n"):
            compare(actual, expected)


def test_claims_are_read_of_files_that_are_broken_or_lack_a_function(tmp_path, monkeypatch):
    whole = assignments.claims()
    (tmp_path / "unet.py").write_text("def q_sample(:")
    (tmp_path / "perceptual.py").write_text("class Renamed:\n    pass\n")
    shutil.copy(HERE / "le.py", tmp_path)
    monkeypatch.setattr(assignments, "HERE", tmp_path)
    assert assignments.claims() == {name: whole[name] if file == "le.py" else ""
                                    for file, name in assignments.ASSIGNMENTS.values()}
    for name in ("grading", "assignments", "recorder"):     # no broken module stops these
        source = (HERE / "studies" / f"{name}.py").read_text(encoding="utf-8")
        assert not re.search(r"^(from|import) (unet|le|perceptual|attacks|train)", source, re.M)


@pytest.mark.parametrize("git", [False, True])
def test_handout_copies_what_is_listed_alone_or_nothing(tmp_path, monkeypatch, git):
    project = tmp_path / "project"
    listed = ["README.md", "LICENSE", ".gitignore", "studies/a.py", "figures/a.png"]
    for name in ["runs/a/b.pt", "env/lib/x.py", "solutions/unet.py", "grades.csv", "all.zip",
                 "old/unet.py", "studies/deep/x.py", "notes.py", "figures/raw.pt", *listed]:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("text")
    shutil.copy(HERE / "unet.py", project)
    (project / "unet.py").chmod(0o444)
    (project / "studies" / "link.py").symlink_to(project / "notes.py")
    if git and shutil.which("git"):
        subprocess.run("git init -q; git add .; echo > studies/x.py", cwd=project, shell=True)
    monkeypatch.setattr(handout, "HERE", project)
    for out in (tmp_path / "new" / "copy", project / "copy"):
        handout.hand_out([1] if SOLVED else [], out)
        made = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
        assert made == {*listed, "unet.py"}
        assert os.stat(out / "unet.py").st_mode & 0o200 and not list(out.parent.glob(".*.tmp"))
    monkeypatch.setitem(handout.ASSIGNMENTS, 99, ("unet.py", "no_such_function"))
    with pytest.raises(ValueError, match="no_such_function"):  # half-way
        handout.hand_out([99], tmp_path / "other" / "copy")
    assert {path.name for path in tmp_path.iterdir()} == {"project", "new"}


def outcomes(folder, only):
    """{test: (outcome, what it said)} of tests in a copy of the project."""
    _, said = output(folder, "-m", "pytest", "-rA", "-q", "-p", "no:cacheprovider", "test_le.py",
                     "-k", only)
    found = re.findall(r"^(PASSED|FAILED|SKIPPED|ERROR).*::(\w+)(.*)", said, re.M)
    return {test: (outcome, why) for outcome, test, why in found}, said


def test_assignment_fails_its_own_tests_and_lets_those_of_others_wait(tmp_path):
    numbers = ["1", "4", "8"]
    handout.main([*numbers, "--out", str(tmp_path / "copy")])
    names = [handout.ASSIGNMENTS[int(number)][1] for number in numbers]
    # some that need nothing, or a fixture
    others = "ddpm_loss or unguided or schedule or (main and whole)"
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


@pytest.mark.skipif(not SOLVED, reason="the solutions are not in a copy handed out")
def test_assignment_solutions_are_put_back_even_where_a_student_deleted_all(tmp_path):
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
