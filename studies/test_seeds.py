"""Tests of mean and spread over seeds."""
import json

import pytest

from studies import seeds
from test_le import refusal


def run_of(folder, seed, rows):
    folder.mkdir()
    text = json.dumps(dict(config=dict(seed=seed), rows=rows, floor=10.0))
    (folder / "results.json").write_text(text)
    return str(folder)


def row(name, *values):
    return dict(protection=name) | dict(zip(seeds.COLUMNS, values))


def test_main_prints_mean_and_spread_of_each_column(tmp_path, capsys):
    one = run_of(tmp_path / "one", 0, [row("em-class", 99.0, 10.0, 97.0, 0.98, 30.0, 20.0),
                                       row("rot", 50.0, 40.0, 45.0, 0.5, 31.0, None)])
    two = run_of(tmp_path / "two", 1, [row("rot", 52.0, 41.0, 47.0, 0.6, 33.0, 21.0),
                                       row("em-class", 99.4, 14.0, 99.0, 1.0, 30.0, 22.0),
                                       row("cp-class", 98.0, 60.0, 96.0, 0.9, 30.0, 22.0)])
    seeds.main([one, two])
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "| em-class | 99.2 ± 0.3 | 12.0 ± 2.8 | 98.0 ± 1.4 | 0.99 ± 0.01 | 30.0 ± 0.0 "
        "| 21.0 ± 1.4 |",
        "| rot | 51.0 ± 1.4 | 40.5 ± 0.7 | 46.0 ± 1.4 | 0.55 ± 0.07 | 32.0 ± 1.4 | - |"]


@pytest.mark.parametrize("folders, expected", [
    (["one"], "a spread needs runs of two seeds at least"),
    (["one", "again"], "again: seed 0 again; expected runs of different seeds"),
    (["one", "none"], "results.json: no such file; first `python train.py` with this seed"),
    (["one", "cut"], "results.json: not the results of train.py"),
    (["one", "other"], "the runs have no protection in common")])
def test_main_refuses_runs_without_a_spread(tmp_path, folders, expected, capsys):
    values = (99.0, 10.0, 97.0, 0.98, 30.0, 20.0)
    for name, seed, protection in (("one", 0, "em-class"), ("again", 0, "em-class"),
                                   ("other", 1, "rot"), ("cut", 2, "rot")):
        run_of(tmp_path / name, seed, [row(protection, *values)])
    (tmp_path / "cut" / "results.json").write_text('{"config": {}}')
    said = refusal(seeds.main, [str(tmp_path / name) for name in folders], capsys)
    assert said.startswith("studies.seeds: ") and expected in said
