"""Tests of several processes: those that share the story's stages, and those that share tests."""
import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock, call

import pytest
import torch

import train
import unet
from attacks import PROTECTIONS, Protection
from studies.programs import run
from test_le import HERE, SMALL, configured, seeded, small_run

pytest_plugins = "studies.grading"
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only there a process is forked")


# -- The story -------------------------------------------------------------------------------------

@pytest.mark.parametrize("threads, helpers", [(1, 0), (2, 1), (4, 3), (9, 3)])
def test_start_helpers_starts_a_fork_for_each_protection_or_further_thread(
        monkeypatch, threads, helpers):
    fork = Mock()
    monkeypatch.setattr(train, "TEAM", SimpleNamespace())
    monkeypatch.setattr(train, "shared_store", lambda: SimpleNamespace(port=7))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(train.multiprocessing, "get_context", lambda how: fork)
    c = configured("--protections", "em-class,em-sample,cp-class")
    train.start_helpers(c, {})
    one = call(name="helper", target=train.help_out, args=(c, {}, 7), daemon=True)
    assert fork.Process.call_args_list == helpers * [one]
    assert fork.Process().start.call_count == len(train.TEAM.helpers) == helpers


def test_help_out_begins_with_what_the_first_process_comes_to_last(monkeypatch):
    team, seen = SimpleNamespace(), []

    def spy(c, kind, name, images, sets):
        seen.append((name, images, team.waits))
        if name == "em-sample-ue":
            raise BlockingIOError                          # somebody else has begun it
    monkeypatch.setattr(train, "TEAM", team)
    monkeypatch.setattr(train, "shared_store", lambda port: f"of {port}")
    monkeypatch.setattr(train, "train_victim", spy)
    monkeypatch.setattr(train, "protect", lambda c, name, sets: f"UEs of {name}")
    monkeypatch.setattr(train, "story", lambda c, sets: seen.append((c.protections, team.waits)))
    names = ["em-class", "em-sample", "cp-class"]
    train.help_out(configured("--protections", ",".join(names)), dict(protected="x"), 7)
    assert seen == [(f"{name}-ue", f"UEs of {name}", False) for name in names[::-1]] + 3 * [
        ("clean", "x", False)] + [(names[::-1], True)] and team.store == "of 7"


def helped(monkeypatch, *command):
    """`train.main` as a command that has a second thread, and so a fork of this process."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(train, "TEAM", SimpleNamespace(store=None, waits=True, helpers=[]))
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, command)])
    train.main()
    train.TEAM.helpers[0].join()                           # until it has said all


@pytest.mark.parametrize("how", ["torchrun", pytest.param("forks", marks=on_linux)])
def test_main_by_two_processes_makes_each_stage_once_and_the_same_bit_for_bit(
        tmp_path, small_run, monkeypatch, capfd, how):
    if how == "torchrun":
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        said = run(HERE, *torchrun, "train.py", *SMALL, "--out", tmp_path, threads=2)
    else:
        helped(monkeypatch, *SMALL, "--out", tmp_path)
        said = capfd.readouterr().out
    names = sorted((file.stem for file in small_run.glob("*.pt")), key=len, reverse=True)
    made = re.findall(f"({'|'.join(names)}): made in", said)  # lines of two may run together
    assert sorted(made) == sorted(names) and len(names) == 20
    one, two = [json.loads((out / "results.json").read_text()) for out in (small_run, tmp_path)]
    assert one["rows"] == two["rows"] and one["floor"] == two["floor"]
    for name in names:
        parts = [unet.read(out / f"{name}.pt")["parts"] for out in (small_run, tmp_path)]
        assert parts[0] == parts[1]


def ends(images, labels, victim, *, epsilon, seed, report):
    """A protection that ends the process which has begun it; never the first, which is pytest's."""
    assert train.multiprocessing.current_process().name == "helper"
    os.kill(os.getpid(), signal.SIGKILL)


@on_linux
@pytest.mark.parametrize("broken, said", [
    (lambda images, *_, **how: images[:1], "broken gave (1, 3, 32, 32), expected (4, 3, 32, 32)"),
    (ends, "broken: the process that began it has failed")])
def test_main_ends_when_a_process_that_it_has_started_fails(
        tmp_path, monkeypatch, capfd, broken, said):
    monkeypatch.setitem(PROTECTIONS, "broken", Protection(broken))
    with pytest.raises(SystemExit) as stop:
        helped(monkeypatch, *SMALL, "--protections", "em-class,broken", "--out", tmp_path)
    errors = capfd.readouterr().err
    assert stop.value.code == 2 and said in errors and "Traceback" not in errors


# -- The tests -------------------------------------------------------------------------------------

SHARED = """
import os, pathlib, pytest, time
@pytest.mark.parametrize("k", range(200))
def test_one(k):
    if k == 199:
        pathlib.Path("last").touch()
    end = time.monotonic() + 20
    while k == 0 and not pathlib.Path("last").exists():    # which the other process makes
        assert time.monotonic() < end
        time.sleep(0.01)
    {fault}
"""


@pytest.mark.skipif(sys.platform != "linux" or os.cpu_count() < 2, reason="one process has all")
@pytest.mark.parametrize("fault, options, code, said", [
    ("assert k not in (0, 199)", [], 1, "2 failed, 198 passed"),
    ("assert k != 199; time.sleep(0.1)", ["-x"], 1, r"1 failed, \d\d? passed"),
    ("k != 199 or os._exit(7)", [], 2, "second process ended with exit code 7 !*\n199 passed")])
def test_halves_show_all_tests_stop_together_and_notice_the_end_of_a_process(
        tmp_path, fault, options, code, said):
    (tmp_path / "test_shared.py").write_text(SHARED.format(fault=fault))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "studies.halves", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(HERE)})
    assert done.returncode == code and re.search(said, done.stdout), done.stdout
