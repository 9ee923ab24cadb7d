"""Grades of what students hand in: a line for each folder, and perhaps a table.

    python -m studies.grade submissions/*                   all that somebody has written
    python -m studies.grade anna ben --only 1 2 8 --csv grades.csv

A folder holds a student's copy of the project, or only the files that were to be changed. Of these
the assigned functions are taken, with what they need of their own file, and each is judged in a
clean copy of the project, in a process of its own; what several have written alike is judged once.
Two thirds of its points are for the tests that bear its name, the last third if those of NEEDED
pass as well, so that the rest works with it.

It is no prison: a function runs as the user who grades, and one that is out to deceive can. Who
does not trust the students runs this in a container, and reads what they wrote.
"""
import argparse
import csv
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cache, partial
from pathlib import Path

if not __package__:
    print("expected `python -m studies.grade`, from the project's folder", file=sys.stderr)
    sys.exit(2)

import le
from studies import handout, submissions
from studies.assignments import ASSIGNMENTS, HERE, own_tests, tests_in
from unet import BadInput

POINTS = {1: 3, 2: 6, 3: 3, 4: 6, 5: 3, 6: 6, 7: 6, 8: 6, 9: 6, 10: 3, 11: 6}
STORY = "test_main_tells_the_whole_story"
UNGUIDED = "test_purify_with_zero_weights_is_unguided"
# Quick tests which do not bear an assignment's name, and do not pass without it
NEEDED = {
    1: ["test_ddpm_loss_shows_the_network_the_diffused_images_and_their_levels", UNGUIDED, STORY],
    2: ["test_p_sample_to_level_zero_is_the_clipped_prediction",
        "test_sample_strided_over_all_levels_is_ancestral_sampling", UNGUIDED, STORY],
    3: ["test_train_unet_averages_the_weights_with_a_decay_that_ramps_up", STORY],
    4: ["test_guidance_by_level_and_both_at_once", "test_purify_guidance_pulls_towards_the_UE",
        STORY],
    5: ["test_min_min_is_what_its_gradients_by_hand_lead_to",
        "test_min_min_lowers_the_loss_within_epsilon", STORY],
    6: ["test_partner_scores_teach_noise_that_makes_views_agree", STORY],
    7: ["test_purify_is_8_bit_and_leaves_its_input_alone",
        "test_purify_computes_only_the_gradient_in_use", STORY],
    8: ["test_purify_is_8_bit_and_leaves_its_input_alone",
        "test_purify_guidance_pulls_towards_the_UE", STORY],
    9: [STORY],
    10: ["test_deterministic_goes_through_all_rounds"],
    11: []}


def needed_tests(number):
    """The tests of NEEDED, as pytest names them."""
    places = {test.partition("::")[2]: test for test in tests_in(HERE)}
    missing = [test for test in NEEDED[number] if test not in places]
    if missing:
        raise BadInput(f"there is no test {missing[0]}; expected all of NEEDED in studies/grade.py")
    return [places[test] for test in NEEDED[number]]


# -- One function of one submission ----------------------------------------------------------------

def wait(process, seconds, stopped):
    """What ended a process: its own exit code in words, or the end of its time. Nothing of it, and
    of the processes that it started, is left."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end and not stopped.is_set():
        time.sleep(0.05)
    ended = process.poll()
    if hasattr(os, "killpg"):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except OSError:                                    # nobody is left
            pass
    process.kill()
    process.wait()
    if ended is None:
        return f"did not end within {seconds:g} s"
    return f"ended the process, exit code {ended}"


def run_tests(number, source, options, stopped):
    """(notes of studies/recorder.py, what ended it): the tests of an assignment in a clean copy of
    the project, one file of which has this source."""
    file, name = ASSIGNMENTS[number]
    tests = list(dict.fromkeys(own_tests(name) + needed_tests(number)))
    with tempfile.TemporaryDirectory(prefix="grade-", ignore_cleanup_errors=True) as folder:
        project, temporary, notes = [Path(folder, part) for part in ("project", "tmp", "notes")]
        handout.copy(options.files, project)
        (project / file).write_text(source, encoding="utf-8")
        temporary.mkdir()
        orders = dict(path=str(notes), name=name, memory=int(options.memory * 2 ** 30))
        left_out = ("PYTEST_ADDOPTS", "PYTHONSAFEPATH", "WORLD_SIZE", "RANK")
        kept = {key: value for key, value in os.environ.items() if key not in left_out}
        environment = kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                              "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(temporary),
                              "STUDIES_RECORDER": json.dumps(orders)}
        command = [sys.executable, "-m", "pytest", "-q", "-s", "--tb=short", "-p",
                   "no:cacheprovider", "-p", "studies.recorder", *tests]
        # what a function prints goes nowhere, so that it can fill neither memory nor disk
        process = subprocess.Popen(command, cwd=project, env=environment, start_new_session=True,
                                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        ended = wait(process, options.seconds, stopped)
        return read_notes(notes), ended


def read_notes(path):
    """The lines of a file of notes, the first 2 MB; a line that is not whole does not count."""
    if not path.exists():
        return []
    notes = []
    with open(path, "rb") as file:
        lines = file.read(2 ** 21).splitlines()
    for line in lines:
        try:
            notes.append(json.loads(line))
        except ValueError:
            pass
    return notes


def points_of(number, notes, ended):
    """(points, the first thing that is wrong or "") of an assignment, by what became of its tests.
    """
    own, needed = own_tests(ASSIGNMENTS[number][1]), needed_tests(number)
    of_one = Counter((note["test"], note["outcome"]) for note in notes)
    collected = [note["test"] for note in notes if note["outcome"] == "collected"]
    bad = {test for test in collected
           if not of_one[test, "passed"] or of_one[test, "failed"] or of_one[test, "skipped"]}
    passed = {test for test in own + needed
              if any(is_of(one, test) for one in collected)
              and not any(is_of(one, test) for one in bad)}
    share = len(passed & set(own)) / len(own)
    works = passed >= set(own) | set(needed)
    points = POINTS[number] * ((2 * share + works) / 3 if needed else share)
    wrong = "" if works else first_wrong(notes, ended)
    return math.floor(10 * points + 0.5) / 10, wrong


def is_of(one, test):
    """Whether a test that ran is this one, or this one with some parameters."""
    return one.partition("[")[0] == test


def first_wrong(notes, ended):
    """The first of the notes that tells of something wrong; else the test that did not end."""
    for note in notes:
        if note["outcome"] in ("failed", "skipped"):
            said = note["said"].removeprefix("AssertionError: ")
            return f"{note['test'].partition('::')[2]}: {said}".removeprefix(": ")
    running = [note["test"].partition("::")[2] for note in notes if note["outcome"] == "started"]
    return f"{running[-1] if running else 'before the first test'}: {ended}"


def judged(number, source, fault, options, stopped):
    """(points, what is wrong) of one assignment of a submission. Whatever its fault, it is the
    only one to lose by it."""
    try:
        if fault:
            return 0, fault
        return points_of(number, *run_tests(number, source, options, stopped))
    except Exception as error:                             # of whatever a stranger's code has left
        return 0, f"cannot be judged ({type(error).__name__}: {error})"


# -- All of them -----------------------------------------------------------------------------------

def one_line(text):
    """A text as a part of a line, whatever is in it."""
    kept = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(kept.split())[:200]


def assigned(everything):
    """The assignments in which any of the submissions differs from the project."""
    found = [number for number in ASSIGNMENTS
             if any(parts[number].changed for parts in everything.values())]
    if not found:
        raise BadInput("nothing differs from the project; expected --only, for example --only 1 2")
    return found


def grade(everything, numbers, options):
    """Yields of one submission after the other its folder, and {assignment: (points, what is
    wrong)}."""
    stopped, pool = threading.Event(), ThreadPoolExecutor(options.jobs)
    # what is alike is begun once
    begin = cache(partial(pool.submit, judged, options=options, stopped=stopped))
    try:
        work = {folder: {number: begin(number, parts[number].source, parts[number].fault)
                         for number in numbers} for folder, parts in everything.items()}
        for folder, results in work.items():
            yield folder, {number: result.result() for number, result in results.items()}
    except KeyboardInterrupt:
        raise BadInput("interrupted") from None
    finally:                                               # nothing is left running
        stopped.set()
        pool.shutdown(cancel_futures=True)


def report(rows, numbers, table):
    """Print a line for each submission, and write it to a table as soon as it is known."""
    most = sum(POINTS[number] for number in numbers)
    names = [f"{number} {ASSIGNMENTS[number][1]}" for number in numbers]
    writer = csv.writer(table)
    writer.writerow(["submission", "points", "of", *names, "what is wrong"])
    print(f"{most} points: {', '.join(names)}", flush=True)
    for folder, results in rows:
        total = f"{sum(points for points, _ in results.values()):g}"
        cells = [f"{points:g}" for points, _ in results.values()]
        wrong = [f"{ASSIGNMENTS[number][1]}: {said}" for number, (_, said) in results.items()
                 if said]
        faults = [one_line(fault) for fault in wrong]
        writer.writerow([folder, total, most, *cells, "; ".join(faults)])
        table.flush()
        said = "".join(faults[:1]) + f" (and {len(faults) - 1} more)" * (len(faults) > 1)
        print(f"{one_line(str(folder))}: {total} of {most}  {said}".rstrip(), flush=True)


def main(argv=None):
    parser = le.Parser(prog="studies.grade", description=__doc__, allow_abbrev=False,
                       formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--only", type=int, nargs="+", choices=ASSIGNMENTS, metavar="1 .. 11",
                        help="assignments; default: those in which a folder differs from here")
    parser.add_argument("--csv", type=Path, help="a table to write, a row for each folder")
    parser.add_argument("--seconds", type=float, default=60, help="for one assignment")
    parser.add_argument("--memory", type=float, default=4, help="in GB, of one process")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error("--jobs: expected 1 or more")
    with le.one_line_errors("studies.grade"):
        for file, name in ASSIGNMENTS.values():
            if submissions.unwritten(submissions.in_project(HERE / file, name)):
                raise BadInput(f"{HERE / file}: {name} is left out here; expected the project")
        options.files = [file for file in handout.present(HERE) if file.suffix != ".png"]
        everything = {folder: {number: submissions.handed_in(folder, HERE, *ASSIGNMENTS[number])
                               for number in options.only or ASSIGNMENTS}
                      for folder in options.folders}
        numbers = options.only or assigned(everything)
        for number in numbers:                             # here, since two threads of Python 3.11
            needed_tests(number)                           # cannot parse at once (gh-106905)
        with (open(options.csv or os.devnull, "w", encoding="utf-8", newline="") as table,
              closing(grade(everything, numbers, options)) as rows):
            report(rows, numbers, table)


if __name__ == "__main__":
    main()
