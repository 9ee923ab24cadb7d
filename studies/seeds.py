"""Mean and spread of the table over seeds: after `python train.py`, `--seed 1` and `--seed 2`.

    python -m studies.seeds runs/shapes runs/shapes-seed1 runs/shapes-seed2

Each folder holds a run whose images, networks and noise are of another seed. The table is that of
`train.py`, with the mean of each cell and, behind ±, the standard deviation over the runs.
"""
import argparse
import json
import sys
from pathlib import Path

if not __package__:
    print("expected `python -m studies.seeds`, from the project's folder", file=sys.stderr)
    sys.exit(2)

import torch

import le
from unet import BadInput
from studies.run import print_table

COLUMNS = {"clean": "{:.1f}", "ue": "{:.1f}", "le": "{:.1f}", "recovery": "{:.2f}",
           "psnr_ue": "{:.1f}", "psnr_le": "{:.1f}"}
HEADINGS = {"ue": "UE", "le": "LE", "psnr_ue": "PSNR UE, dB", "psnr_le": "PSNR LE, dB"}


def results_of(folder):
    """What `train.py` has written about the run in a folder."""
    path = folder / "results.json"
    if not path.is_file():
        raise BadInput(f"{path}: no such file; first `python train.py` with this seed")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found["config"]["seed"], {row["protection"]: row for row in found["rows"]}
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"{path}: not the results of train.py") from None


def mean_and_spread(form, values):
    """Numbers as a text, in a form such as "{:.1f}"; what one of the runs cannot know is a dash."""
    if None in values:
        return "-"
    mean, spread = torch.tensor(values).mean().item(), torch.tensor(values).std().item()
    return f"{form.format(mean)} ± {form.format(spread)}"


def rows_over(runs):
    """The rows of the table over {seed: {protection: row}}, of the protections that all have."""
    first, *others = runs.values()
    rows = []
    for name in first:
        if all(name in other for other in others):
            values = {key: [run[name].get(key) for run in runs.values()] for key in COLUMNS}
            cells = {HEADINGS.get(key, key): mean_and_spread(form, values[key])
                     for key, form in COLUMNS.items()}
            rows.append({"protection": name} | cells)
    return rows


def main(argv=None):
    parser = le.Parser(prog="studies.seeds", description=__doc__, allow_abbrev=False,
                       formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    options = parser.parse_args(argv)
    with le.one_line_errors("studies.seeds"):
        runs = {}
        for folder in options.folders:
            seed, rows = results_of(folder)
            if seed in runs:
                raise BadInput(f"{folder}: seed {seed} again; expected runs of different seeds")
            runs[seed] = rows
        if len(runs) < 2:
            raise BadInput("a spread needs runs of two seeds at least")
        rows = rows_over(runs)
        if not rows:
            raise BadInput("the runs have no protection in common")
        print_table(f"seeds {', '.join(map(str, runs))}", rows)


if __name__ == "__main__":
    main()
