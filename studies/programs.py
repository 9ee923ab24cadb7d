"""For tests: what a program of the project, or of a copy of it, says in a process of its own.

To import torch and its compiler takes 3 seconds, most of what a toy program needs. So where a
process can be forked the program gets a fork of the tests, which has torch and nothing of ours.
"""
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import torch

PROJECT = Path(__file__).parent.parent


def output(folder, *command, threads=1):
    """(exit code, what is said) of `python COMMAND...` in a folder."""
    command = [str(part) for part in command]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        if sys.platform == "linux" and not torch.cuda.is_available():
            sys.stdout.flush()                             # or both would write what waits there
            child = os.fork()
            if not child:
                code = 1
                try:
                    code = ended(said, folder, command, threads)
                finally:                                   # or it would go on with the tests
                    os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        else:
            more = dict(OMP_NUM_THREADS=str(threads), PYTHONIOENCODING="utf-8")
            code = subprocess.run([sys.executable, *command], cwd=folder, stdout=said,
                                  stderr=subprocess.STDOUT, env=os.environ | more).returncode
        said.seek(0)
        return code, said.read()


def run(folder, *command, threads=1):
    """What a program says that ends as it should."""
    code, said = output(folder, *command, threads=threads)
    assert code == 0, said
    return said


def ended(said, folder, command, threads):
    """The exit code of the command line, in this process, which says it to a file."""
    for number in (1, 2):
        os.dup2(said.fileno(), number)
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", closefd=False, buffering=1)
    os.environ["OMP_NUM_THREADS"] = str(threads)           # of programs that it starts in turn
    torch.set_num_threads(1)
    os.chdir(folder)
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(PROJECT):
            del sys.modules[name]
    sys.path[:] = [str(folder), *[path for path in sys.path if Path(path) != PROJECT]]
    sys.argv = command[command[0] == "-m":]
    try:
        if command[0] == "-m":
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(command[0], run_name="__main__")
        return 0
    except SystemExit as end:
        return end.code or 0
    except BaseException:                                  # as Python itself does
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
