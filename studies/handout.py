"""A copy of the project for a course, in which some functions are to be written.

    python -m studies.handout 1 2 3 --out DIR      assignments 1, 2 and 3 of the README
    python -m studies.handout 1 --out DIR --solutions    put the solution of 1 back into DIR

The body of each becomes its docstring and `raise NotImplementedError`; its tests, which are there
too, fail and say what is expected. Copied are the files of the project, and nothing else that lies
beside them.
"""
import argparse
import ast
import shutil
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

if not __package__:
    print("expected `python -m studies.handout`, from the project's folder", file=sys.stderr)
    sys.exit(2)

import le
from studies.assignments import ASSIGNMENTS, HERE, defined, scope_of, scopes
from unet import BadInput

# What a copy consists of: these patterns do not reach into folders of folders
FILES = ("le.py", "unet.py", "perceptual.py", "attacks.py", "train.py", "test_le.py", "README.md",
         "requirements.txt", "constraints.txt", "pytest.ini", "LICENSE", ".gitignore",
         "studies/*.py", "studies/README.md", "findings/README.md", "figures/*.png")


def function_in(source, name):
    """The syntax of a function or method."""
    tree = ast.parse(source)
    scope = scope_of(tree, name)
    if scope is None:
        raise BadInput(f"{name}: no such function")
    return defined(scopes(tree)[scope], name)


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


def tracked(project):
    """The files that git knows of a project which is the root of a repository; None of another, or
    where there is no git."""
    if not (project / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=project, capture_output=True,
                              check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return set(done.stdout.decode(errors="replace").split("\0")) - {""} or None


def present(project):
    """The files of FILES in a project, relative to it; links are not among them."""
    real = project.resolve()
    found = [path for pattern in FILES for path in sorted(project.glob(pattern))]
    return [path.relative_to(project) for path in found
            if path.is_file() and path.resolve() == real / path.relative_to(project)]


def listed(project):
    """The files that a copy consists of: those of FILES, and of them, those that git knows."""
    known = tracked(project)
    return [file for file in present(project) if known is None or file.as_posix() in known]


def copy(files, out):
    """Copy files of the project into a new folder. Their contents alone: what is read-only here is
    to be written to there."""
    for file in files:
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(HERE / file, out / file)


def hand_out(numbers, out):
    """Write a new copy of the project without the bodies of these assignments."""
    if out.exists() or out.is_symlink():
        raise BadInput(f"--out {out}: is there already; expected a new folder")
    # what is not whole yet has another name, in a folder that is there already
    beside = next(folder for folder in out.absolute().parents if folder.exists())
    partial = beside / f".{uuid4().hex}.tmp"
    try:
        copy(listed(HERE), partial)
        for number in numbers:
            file, name = ASSIGNMENTS[number]
            source = (partial / file).read_text(encoding="utf-8")
            docstring, body = body_of(source, name)
            indent = docstring[0][:-len(docstring[0].lstrip())]
            lines = [*docstring, f"{indent}raise NotImplementedError\n"]
            (partial / file).write_text(with_body(source, name, lines), encoding="utf-8")
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
