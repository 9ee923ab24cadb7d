"""Tests of a story that several processes tell: torchrun's, or forks of the first."""
import json
import os
import re
import subprocess
import sys

import pytest

import unet
from studies.test_studies import HERE, SMALL, run


@pytest.mark.parametrize("how", ["torchrun", "forks"])
def test_main_by_two_processes_makes_each_stage_once_and_the_same_bit_for_bit(tmp_path, how):
    small = [*SMALL, "--protections", "em-class,em-sample,cp-class"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun * (how == "torchrun"), "train.py", *small, "--out"]
    said = [run(HERE, *command, tmp_path / "two", threads="2"),
            run(HERE, "train.py", *small, "--out", tmp_path / "one")]
    for text in said:
        made = re.findall(r"^([\w-]+): made in", text, re.M)
        assert len(made) == len(set(made)) == 16
    one, two = [json.loads((tmp_path / out / "results.json").read_text()) for out in ("one", "two")]
    assert one["rows"] == two["rows"] and one["floor"] == two["floor"]
    for file in (tmp_path / "one").glob("*.pt"):
        parts = [unet.read(tmp_path / out / file.name)["parts"] for out in ("one", "two")]
        assert parts[0] == parts[1]


BROKEN = """
import os, signal, train
from attacks import PROTECTIONS, Protection
def broken(images, labels, victim, *, epsilon, seed, report):
    {fault}
PROTECTIONS["broken"] = Protection(broken)
train.main()
"""


@pytest.mark.parametrize("fault, said", [
    ("return images[:1]", "broken gave (1, 3, 32, 32), expected (4, 3, 32, 32)"),
    ("os.kill(os.getpid(), signal.SIGKILL)", "broken: the process that began it has failed")])
def test_main_ends_when_a_process_that_it_has_started_fails(tmp_path, fault, said):
    program = tmp_path / "mine.py"
    program.write_text(BROKEN.format(fault=fault))
    command = [sys.executable, program, *SMALL, "--protections", "em-class,broken", "--out",
               tmp_path / "run"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True,
                          env=os.environ | dict(OMP_NUM_THREADS="2", PYTHONPATH=str(HERE)))
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
