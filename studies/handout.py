"""A copy of the project for a course, in which some functions are to be written.

    python -m studies.handout 1 2 3 --out DIR      assignments 1, 2 and 3 of the README
    python -m studies.handout 1 --out DIR --solutions    put the solution of 1 back into DIR

The body of each becomes its docstring and `raise NotImplementedError`; its tests, which are there
too, fail and say what is expected.
"""
import argparse
import ast
import shutil
from pathlib import Path

import le
from le import BadInput

HERE = Path(__file__).parent.parent
# As numbered in the README: the file, and the function or method
ASSIGNMENTS = {
    1: ("unet.py", "q_sample"), 2: ("unet.py", "posterior"), 3: ("unet.py", "ddpm_loss"),
    4: ("perceptual.py", "embed"), 5: ("attacks.py", "noise_step"),
    6: ("attacks.py", "nt_xent_scores"), 7: ("le.py", "guidance"),
    8: ("le.py", "joint_conditioned_mean"), 9: ("train.py", "linear_probe"),
    10: ("unet.py", "ddim")}


def body_of(source, name):
    """(first, last) line of what follows the docstring of a function, counted from 0, and its
    indentation."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node.body[1].lineno - 1, node.end_lineno, node.body[1].col_offset
    raise BadInput(f"{name}: no such function")


def with_body(source, name, lines):
    """The source, where the function's body is these lines."""
    first, last, _ = body_of(source, name)
    kept = source.splitlines(keepends=True)
    return "".join(kept[:first] + lines + kept[last:])


def hand_out(numbers, out):
    """Write a new copy of the project without the bodies of these assignments."""
    if out.exists():
        raise BadInput(f"--out {out}: is there already; expected a new folder")
    left_out = shutil.ignore_patterns(".*", "runs", "__pycache__", "venv", out.name)
    shutil.copytree(HERE, out, ignore=left_out)
    for number in numbers:
        file, name = ASSIGNMENTS[number]
        source = (out / file).read_text()
        indent = " " * body_of(source, name)[2]
        missing = f"{indent}raise NotImplementedError\n"
        (out / file).write_text(with_body(source, name, [missing]))


def solve(numbers, out):
    """Put the bodies of these assignments back into a copy."""
    for number in numbers:
        file, name = ASSIGNMENTS[number]
        whole = (HERE / file).read_text()
        first, last, _ = body_of(whole, name)
        solution = whole.splitlines(keepends=True)[first:last]
        (out / file).write_text(with_body((out / file).read_text(), name, solution))


def main(argv=None):
    parser = le.Parser(prog="studies.handout", description=__doc__, allow_abbrev=False,
                       formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", type=int, nargs="+", choices=ASSIGNMENTS, metavar="1 .. 10")
    parser.add_argument("--out", type=Path, required=True, help="a new folder, no default")
    parser.add_argument("--solutions", action="store_true", help="put them back into --out")
    options = parser.parse_args(argv)
    with le.one_line_errors("studies.handout"):
        (solve if options.solutions else hand_out)(options.numbers, options.out)


if __name__ == "__main__":
    main()
