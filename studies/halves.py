"""A plugin of pytest: two processes share the tests, where there are many of them and two cores.

One begins with the first test; the other, a fork of it, with the last. Each leaves out what the
other has begun, so all are done where they meet. The first then shows what the second has seen.
"""
import gc
import multiprocessing
import os
import pickle
import sys
import tempfile
from contextlib import suppress

import pytest

MANY = 200                                                 # tests: fewer are soon done by one


class Half:
    """The tests of one process, which leaves out those that are not free any more."""

    def __init__(self, free):
        self.free = free

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self):
        with self.free:
            self.free.value -= 1
            return self.free.value < 0 or None             # True: there is nothing to be done


class SecondHalf(Half):
    """The same of a process that shows nothing: what becomes of its tests is written to a file."""

    def __init__(self, free, session, file):
        super().__init__(free)
        self.file = file
        session.items.reverse()
        plugins = session.config.pluginmanager
        plugins.unregister(name="terminalreporter")
        capture = plugins.getplugin("capturemanager")      # what tests print is its own, too
        capture.stop_global_capturing()
        capture.start_global_capturing()

    def pytest_runtest_logreport(self, report):
        pickle.dump(report, self.file)


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    options, count = session.config.option, len(session.items)
    two = sys.platform == "linux" and os.cpu_count() > 1
    if not two or count < MANY or options.collectonly or options.usepdb:
        return (yield)
    gc.freeze()                                            # torch stays, so nobody looks at it
    free, file = multiprocessing.Value("i", count), tempfile.TemporaryFile(buffering=0)
    sys.stdout.flush()                                     # or both would write what waits there
    second = os.fork()
    half = Half(free) if second else SecondHalf(free, session, file)
    session.config.pluginmanager.register(half)
    try:
        return (yield)
    finally:
        free.value = 0                                     # who stops early stops both
        if second:
            show(session, second, file)


def show(session, second, file):
    """Wait for the end of the second process, and show what has become of its tests."""
    _, status = os.waitpid(second, 0)
    file.seek(0)
    hook = session.config.hook
    with suppress(EOFError):
        while True:
            report = pickle.load(file)
            if report.when == "setup":
                hook.pytest_runtest_logstart(nodeid=report.nodeid, location=report.location)
            hook.pytest_runtest_logreport(report=report)
    code = os.waitstatus_to_exitcode(status)
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise session.Interrupted(f"the second process ended with exit code {code}")
