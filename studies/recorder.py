"""A plugin of pytest by which `studies.grade` learns what becomes of each test: a line of JSON for
everything that happens, so that much is known of a process that ends before its time.

It also limits what a student's function can use up: memory, and the size of a file.
"""
import json
import os
import re

import pytest

try:
    import resource
except ImportError:                                        # Windows does not have it
    resource = None

# {"path": the file of notes, "name": the function, "memory": bytes}
ORDERS = json.loads(os.environ["STUDIES_RECORDER"])
LARGEST_FILE = 2 ** 28                                     # bytes: 256 MB
FAILED = []                                                # tests that bear the function's name


def note(test, outcome, said=""):
    """Write a line of what has become of a test."""
    lines = [" ".join(line.split()) for line in said[:4000].splitlines()]
    short = "; ".join(line for line in lines if line)[:300]
    with open(ORDERS["path"], "a", encoding="utf-8") as file:
        file.write(json.dumps(dict(test=test, outcome=outcome, said=short)) + "\n")


def limit(kind, most):
    """Let this process, and those that it starts, have so much of something and no more."""
    _, allowed = resource.getrlimit(kind)
    if allowed == resource.RLIM_INFINITY or allowed > most:
        resource.setrlimit(kind, (most, most))


def pytest_configure(config):
    if resource:
        limit(resource.RLIMIT_DATA, ORDERS["memory"])
        limit(resource.RLIMIT_FSIZE, LARGEST_FILE)


def pytest_collectreport(report):
    if report.failed:
        lines = re.findall(r"^E +(.*)$", str(report.longrepr), re.M) or [str(report.longrepr)]
        note("", "failed", lines[-1])


def pytest_collection_finish(session):
    for item in session.items:
        note(item.nodeid, "collected")


def pytest_runtest_logstart(nodeid):
    note(nodeid, "started")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Once the function fails a test of its own, those that need it show nothing new."""
    if FAILED and ORDERS["name"] not in item.name:
        pytest.skip(f"{ORDERS['name']} fails its own tests")


def pytest_runtest_logreport(report):
    crash = getattr(report.longrepr, "reprcrash", None)
    said = crash.message if crash else str(report.longrepr or "")
    if report.failed and ORDERS["name"] in report.nodeid.partition("::")[2]:
        FAILED.append(report.nodeid)
    if report.when == "call" or not report.passed:
        note(report.nodeid, report.outcome, said)
