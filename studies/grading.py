"""Tests as an autograder for assignments (studies/handout.py): a plugin of pytest, and comparisons
that say what is wrong.

A function whose body is `raise NotImplementedError` fails its own tests with its claim for a
message. Tests that need it, themselves, in a fixture or in another process, are skipped.
"""
import re
import traceback

import pytest
import torch

from studies.assignments import claims

pytest_plugins = () if torch.cuda.is_available() else ("studies.halves",)  # no fork has a GPU
CLAIMS = claims()


# -- Comparisons -----------------------------------------------------------------------------------

def explained(actual, expected):
    """In a few words, how wrong numbers differ from the expected ones; "" if there is no such word.
    """
    actual, expected = [torch.as_tensor(value).detach().double() for value in (actual, expected)]
    if actual.shape != expected.shape or not (actual.isfinite() & expected.isfinite()).all():
        return ""
    size = expected.abs().max() if expected.numel() else 0
    if size == 0:
        return ""

    def alike(x, y):
        return torch.allclose(x, y, rtol=1e-5, atol=1e-5 * size)
    factor = ((actual * expected).sum() / expected.square().sum()).item()  # by least squares
    if alike(actual, expected) or abs(factor) < 1e-4:
        return ""
    if alike(actual, factor * expected):
        if abs(factor - 2) < 1e-4:
            return "twice what is expected"
        if abs(factor + 1) < 1e-4:
            return "minus what is expected"
        if (expected != 0).sum() > 1:                      # a lone number has some factor always
            return f"a constant factor of {factor:.4g}"
    if alike(actual.flatten().sort()[0], expected.flatten().sort()[0]):
        return "the right values in another order"
    return ""


def compared(actual, expected, rtol, atol):
    """Raise AssertionError if tensors differ, and say first how, where there is a word for it."""
    __tracebackhide__ = True                               # pytest would print both tensors
    try:
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
        return
    except AssertionError as error:
        said = str(error)
    how = explained(actual, expected)
    raise AssertionError(f"{how}\n{said}" if how else said)


def close(actual, expected, atol=1e-8):
    """Tensors are equal but for rounding."""
    __tracebackhide__ = True
    compared(actual, expected, 1e-5, atol)


def same(actual, expected):
    """Tensors are equal to the last bit."""
    __tracebackhide__ = True
    compared(actual, expected, 0, 0)


# -- The plugin ------------------------------------------------------------------------------------

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
