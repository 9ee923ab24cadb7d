"""Tests as an autograder for assignments (studies/handout.py): a plugin of pytest.

A function whose body is `raise NotImplementedError` fails its own tests with its claim for a
message. Tests that need it, themselves, in a fixture or in another process, are skipped.
"""
import importlib
import re
import traceback

import pytest

from studies.handout import ASSIGNMENTS


def claims():
    """{function or method: the first paragraph of its docstring} of all assignments."""
    found = {}
    for file, name in ASSIGNMENTS.values():
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        function = getattr(module, name, None) or getattr(module.PerceptualDistance, name)
        found[name] = " ".join((function.__doc__ or "").split("\n\n")[0].split())
    return found


CLAIMS = claims()


def missing_function(error):
    """The name of the assignment whose missing body an exception comes from, or None."""
    said = "".join(traceback.format_exception(error))
    # a process of torchrun writes its rank before each line
    names = re.findall(r"in (\w+)\s+(?:\[rank\d+\]:\s+)?raise NotImplementedError", said)
    return next((name for name in reversed(names) if name in CLAIMS), None)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    missing = missing_function(call.excinfo.value) if call.excinfo else None
    report = outcome.get_result()
    if not missing:
        if report.failed:                                  # a body that is wrong
            report.sections += [(name, CLAIMS[name]) for name in CLAIMS if name in item.name]
        return
    if missing in item.name:
        report.outcome = "failed"
        report.longrepr = f"{missing} is yours to write: {CLAIMS[missing]}"
    else:
        report.outcome = "skipped"
        report.longrepr = str(item.path), item.location[1], f"Skipped: needs {missing}"
