"""A copy of the project for a course, in which some functions are to be written.

    python -m studies.handout 1 2 3 --out DIR      assignments 1, 2 and 3 of the README
    python -m studies.handout 1 --out DIR --solutions    put the solution of 1 back into DIR

The body of each becomes its docstring and `raise NotImplementedError`; its tests, which are there
too, fail and say what is expected.
"""
import argparse
import ast
import shutil
import sys
from functools import partial
from pathlib import Path

if not __package__:
    print("expected `python -m studies.handout`, from the project's folder", file=sys.stderr)
    sys.exit(2)

import le
from le import BadInput

HERE = Path(__file__).parent.parent
# As numbered in the README: the file, and the function or method
ASSIGNMENTS = {
    1: ("unet.py", "q_sample"), 2: ("unet.py", "posterior"), 3: ("unet.py", "ddpm_loss"),
    4: ("perceptual.py", "embed"), 5: ("attacks.py", "noise_step"),
    6: ("attacks.py", "nt_xent_scores"), 7: ("le.py", "guidance"),
    8: ("le.py", "joint_conditioned_mean"), 9: ("train.py", "linear_probe"),
    10: ("unet.py", "ddim"), 11: ("attacks.py", "rotation_scores")}


def function_in(source, name):
    """The syntax of a function or method."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    raise BadInput(f"{name}: no such function")


def with_body(source, name, lines):
    """The source, where what follows the function's signature is these lines."""
    body = function_in(source, name).body
    kept = source.splitlines(keepends=True)
    return "".join(kept[:body[0].lineno - 1] + lines + kept[body[-1].end_lineno:])


def body_of(source, name):
    """The lines of a function's docstring, and those of what follows it."""
    first, *others = function_in(source, name).body
    lines = source.splitlines(keepends=True)
    docstring = lines[first.lineno - 1:first.end_lineno]
    return docstring, lines[first.end_lineno:others[-1].end_lineno]


def left_out(folder, names, out):
    """What of a folder is not copied: runs and the like, and the copy itself."""
    here = {name for name in names if (Path(folder) / name).resolve() == out}
    return here | shutil.ignore_patterns(".*", "runs", "__pycache__", "venv")(folder, names)


def hand_out(numbers, out):
    """Write a new copy of the project without the bodies of these assignments."""
    if out.exists():
        raise BadInput(f"--out {out}: is there already; expected a new folder")
    shutil.copytree(HERE, out, ignore=partial(left_out, out=out.resolve()))
    for number in numbers:
        file, name = ASSIGNMENTS[number]
        source = (out / file).read_text(encoding="utf-8")
        docstring, body = body_of(source, name)
        indent = docstring[0][:-len(docstring[0].lstrip())]
        lines = [*docstring, f"{indent}raise NotImplementedError\n"]
        (out / file).write_text(with_body(source, name, lines), encoding="utf-8")


def solve(numbers, out):
    """Put the bodies of these assignments back into a copy, with their docstrings."""
    for number in numbers:
        file, name = ASSIGNMENTS[number]
        docstring, body = body_of((HERE / file).read_text(encoding="utf-8"), name)
        if body[-1].strip() == "raise NotImplementedError":
            raise BadInput(f"{HERE / file}: {name} is left out here, too; expected the project")
        source = (out / file).read_text(encoding="utf-8")
        try:
            solved = with_body(source, name, docstring + body)
        except SyntaxError as error:
            raise BadInput(f"{out / file}: line {error.lineno}: {error.msg}") from None
        (out / file).write_text(solved, encoding="utf-8")


def main(argv=None):
    parser = le.Parser(prog="studies.handout", description=__doc__, allow_abbrev=False,
                       formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", type=int, nargs="+", choices=ASSIGNMENTS, metavar="1 .. 11")
    parser.add_argument("--out", type=Path, required=True, help="a new folder, no default")
    parser.add_argument("--solutions", action="store_true", help="put them back into --out")
    options = parser.parse_args(argv)
    with le.one_line_errors("studies.handout"):
        (solve if options.solutions else hand_out)(options.numbers, options.out)
        names = " or ".join(ASSIGNMENTS[number][1] for number in options.numbers)
        print(f'In {options.out}, `python -m pytest -k "{names}"` grades.')


if __name__ == "__main__":
    main()
