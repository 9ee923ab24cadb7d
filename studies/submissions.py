"""What is taken of a student's files for `studies.grade`: an assigned function, and what it needs
of its own file. Files are read as text here; nothing of them runs.
"""
import ast
import builtins
import io
import re
import tokenize
import warnings
from dataclasses import dataclass
from pathlib import Path

from studies.assignments import defined, scope_of, scopes
from unet import BadInput

LARGEST = 2 ** 20                                          # bytes of a file: 1 MB
UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)


@dataclass
class Part:
    """What a submission has of one assignment."""
    source: str = ""               # the project's file with the function in place of its own
    fault: str = ""                # why there is no such file
    changed: bool = False          # whether the function is another than the project's


# -- Reading ---------------------------------------------------------------------------------------

def file_of(folder, file):
    """Where a submission has a file of the project: in its folder, or at the top, as somebody
    hands in who sends single files. Links could lead to anywhere and are not followed."""
    if not folder.is_dir():
        raise BadInput("not a folder")
    for path in (folder / file, folder / Path(file).name):
        if path.is_file() and path.resolve() == folder.resolve() / path.relative_to(folder):
            return path
    raise BadInput(f"{file} is not there")


def pieces(source):
    """The syntax of those parts of a broken file that Python can read: each begins where a line
    does not begin with a blank. So a mistake in one function costs no other."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
    except SyntaxError:
        encoding = "utf-8"
    text = source.decode(encoding, errors="replace").removeprefix("\ufeff")
    whole = ast.parse("")
    for part in re.split(r"^(?=[A-Za-z_@])", text, flags=re.M):
        try:
            whole.body += ast.parse(part).body
        except UNREADABLE:
            pass
    return whole


def syntax_of(path):
    """(the syntax of a file, what Python says if it cannot read all of it)."""
    if path.stat().st_size > LARGEST:
        raise BadInput(f"{path.name} has more than {LARGEST} bytes")
    source = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                    # of an odd backslash, for example
        try:
            return ast.parse(source), ""
        except UNREADABLE as error:
            line = getattr(error, "lineno", None)
            place = f" line {line}:" if line else ""
            said = getattr(error, "msg", None) or str(error) or type(error).__name__
            return pieces(source), f"{path.name}:{place} {said}"


def in_project(path, name):
    """The function or method of this name in a file of the project."""
    tree = ast.parse(path.read_bytes())
    return defined(scopes(tree)[scope_of(tree, name)], name)


def after_docstring(function):
    """The statements of a function that follow its docstring, if it has one."""
    return function.body[1:] if ast.get_docstring(function) is not None else function.body


def unwritten(function):
    """Whether the body of a function is `raise NotImplementedError`, as in a copy for students."""
    body = after_docstring(function)
    return len(body) == 1 and ast.unparse(body[0]) == "raise NotImplementedError"


def handed_in(folder, project, file, name):
    """The part of a submission that an assignment asks for."""
    part = Part()
    try:
        theirs, broken = syntax_of(file_of(folder, file))
        part.changed = True
        tree = ast.parse((project / file).read_bytes())
        scope = scope_of(tree, name)
        function = defined(scopes(theirs).get(scope, []), name)
        if function is None:
            part.fault = broken or f"{file} has no function of this name"
        elif unwritten(function):
            part.fault = "is not written yet"
        else:
            ours = defined(scopes(tree)[scope], name)
            part.changed = dumped(function) != dumped(ours)
            part.source = with_function(tree, scope, ours, function, theirs)
    except Exception as error:                             # whatever a stranger's file leads to
        part.fault = str(error) or type(error).__name__
    return part


def dumped(function):
    """The arguments and statements of a function as text, but for its docstring."""
    return [ast.dump(part) for part in (function.args, *after_docstring(function))]


# -- What a function needs of its file -------------------------------------------------------------

def single(statements):
    """The statements, where each import is of one name."""
    found = []
    for statement in statements:
        if isinstance(statement, ast.Import):
            found += [ast.Import([alias]) for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            found += [ast.ImportFrom(statement.module, [alias], statement.level)
                      for alias in statement.names]
        else:
            found.append(statement)
    return found


def given(nodes):
    """The names that pieces of syntax give a meaning to."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler)):
            names.add(node.name)
    return names


def bound_by(statement):
    """The names that a statement gives a meaning to in the scope that it stands in."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return {statement.name}
    return given(ast.walk(statement))


def names_in(node):
    """The names that a piece of code looks up and does not give a meaning to itself."""
    looked_up = {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
    return looked_up - given(ast.walk(node))


def attributes_in(node):
    """The names that a piece of code looks up in `self`."""
    return {one.attr for one in ast.walk(node) if isinstance(one, ast.Attribute)
            and isinstance(one.value, ast.Name) and one.value.id == "self"}


def needed(statements, known, wanted, looked_up):
    """Those statements, in their order, which give a meaning to what is wanted and not known, and
    to what these look up in turn. (`import *` may give any.)"""
    statements = single(statements)
    everything = set().union(*map(bound_by, statements)) | known
    taken, wanted = set(), wanted - known
    while True:
        if wanted - everything:
            wanted = wanted | {"*"}
        more = {place for place, statement in enumerate(statements)
                if place not in taken and bound_by(statement) & wanted}
        if not more:
            return [statements[place] for place in sorted(taken)]
        taken |= more
        for place in more:
            wanted |= looked_up(statements[place]) - known


def bound_in(statements):
    return set().union(*map(bound_by, statements))


def with_function(tree, scope, ours, function, theirs):
    """The source of a file of the project, of which a function, `ours`, in a scope is replaced by a
    student's, with the project's docstring, and with what it needs of the student's file."""
    body = scopes(tree)[scope]
    function.body = ours.body[:1] + after_docstring(function)
    added = [function]
    if scope:                                              # a method: others of its class
        added = needed(scopes(theirs)[scope], bound_in(body), attributes_in(function),
                       attributes_in) + added
    wanted = set().union(*map(names_in, added))
    known = bound_in(tree.body) | set(dir(builtins)) | {"__file__", "__name__"}
    above = needed(theirs.body, known, wanted, names_in)
    outermost = next(place for place, node in enumerate(tree.body)
                     if node is ours or ours in getattr(node, "body", []))
    place = body.index(ours)
    body[place:place + 1] = added
    tree.body[outermost:outermost] = above
    futures = [statement for statement in theirs.body
               if isinstance(statement, ast.ImportFrom) and statement.module == "__future__"]
    tree.body[1:1] = futures                               # which must follow the docstring at once
    return ast.unparse(ast.fix_missing_locations(tree))
