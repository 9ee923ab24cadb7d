"""What the assignments of the README are, read from files alone: nothing of the project is
imported here, so a file that somebody has broken stops nobody who asks."""
import ast
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent.parent
# As numbered in the README: the file, and the function or method
ASSIGNMENTS = {
    1: ("unet.py", "q_sample"), 2: ("unet.py", "posterior"), 3: ("unet.py", "ddpm_loss"),
    4: ("perceptual.py", "embed"), 5: ("attacks.py", "noise_step"),
    6: ("attacks.py", "nt_xent_scores"), 7: ("le.py", "guidance"),
    8: ("le.py", "joint_conditioned_mean"), 9: ("train.py", "linear_probe"),
    10: ("studies/purifiers.py", "ddim"), 11: ("studies/rotation.py", "rotation_scores")}
TEST_FILES = ("test_le.py", "studies/test_studies.py", "studies/test_scenarios.py")


def scopes(tree):
    """Where a function of an assignment may stand: {name of a class, or "" for the file's own
    level: its statements}."""
    classes = {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}
    return {"": tree.body} | classes


def defined(statements, name):
    """The function of this name among statements, the last one, as Python would take it; or None.
    """
    found = [node for node in statements if isinstance(node, ast.FunctionDef)]
    return next((node for node in reversed(found) if node.name == name), None)


def scope_of(tree, name):
    """The name of the scope that a function or method stands in, or None."""
    here = (scope for scope, body in scopes(tree).items() if defined(body, name))
    return next(here, None)


def syntax_of(path):
    """The syntax of a file, as Python reads it; of one that it cannot read, that of an empty one.
    """
    try:
        return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.parse("")


def claims():
    """{function or method: the first paragraph of its docstring, or ""} of all assignments."""
    found = {}
    for file, name in ASSIGNMENTS.values():
        tree = syntax_of(HERE / file)
        function = defined(scopes(tree).get(scope_of(tree, name), []), name)
        docstring = ast.get_docstring(function) if function else None
        found[name] = " ".join((docstring or "").split("\n\n")[0].split())
    return found


@cache
def tests_in(project):
    """Every test of a project, as pytest names it: (file::test, ...)."""
    return tuple(f"{file}::{node.name}" for file in TEST_FILES
                 for node in syntax_of(project / file).body
                 if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))


def own_tests(name):
    """The tests that bear the name of a function, in all files of tests: [file::test]."""
    return [test for test in tests_in(HERE) if name in test.partition("::")[2]]
