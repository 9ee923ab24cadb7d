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

import le
from unet import BadInput
from studies.run import print_table, shown

# Of each value of a row: what it is called, and how many digits it has
COLUMNS = {"clean": ("clean", 1), "ue": ("UE", 1), "le": ("LE", 1), "recovery": ("recovery", 2),
           "psnr_ue": ("PSNR UE, dB", 1), "psnr_le": ("PSNR LE, dB", 1)}


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


def rows_over(runs):
    """The rows of the table over {seed: {protection: row}}, of the protections that all have; what
    one of the runs cannot know is a dash."""
    first, *others = runs.values()
    rows = []
    for name in [name for name in first if all(name in other for other in others)]:
        row = {"protection": name}
        for key, (heading, digits) in COLUMNS.items():
            values = [run[name].get(key) for run in runs.values()]
            row[heading] = "-" if None in values else shown(values, digits)
        rows.append(row)
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
