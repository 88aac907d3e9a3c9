"""Take the course: five lessons in which you write what the compiler does, each with tests that grade it.

`list` prints the lessons. `start N` writes lesson_N.py, a file with holes to fill in, and lesson_N.ipynb, the lesson as
a notebook, here or into the directory PATH. `check N` grades lesson_N.py, or the file PATH: exit code 0 when all is
right, 1 when it is not yet.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from autodist_fx.cli.parser import DIFFERENT, SUCCESS
from autodist_fx.course.lessons import LESSONS, lesson
from autodist_fx.errors import AutodistError

EXAMPLES = (
    ("autodist-fx course list", "the five lessons"),
    ("autodist-fx course start 3", "write lesson_3.py and lesson_3.ipynb"),
    ("autodist-fx course check 3", "grade lesson_3.py"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `autodist-fx course`."""
    parser.add_argument("action", choices=("list", "start", "check"), help="what to do")
    numbers = tuple(each.number for each in LESSONS)
    parser.add_argument("number", nargs="?", type=int, choices=numbers, metavar="N", help="the lesson, 1 to 5")
    parser.add_argument("path", nargs="?", metavar="PATH", help="where to start, or what to check")


def run(args: argparse.Namespace) -> int:
    """List, start or check; return the exit code."""
    if args.action == "list":
        for each in LESSONS:
            print(f"{each.number}  {each.title:<24} {each.about}")
        print("\nautodist-fx course start 1    writes lesson_1.py and lesson_1.ipynb; then: autodist-fx course check 1")
        return SUCCESS
    if args.number is None:
        raise AutodistError(f"which lesson? `autodist-fx course {args.action} 1`, say; `autodist-fx course list`")
    if args.action == "start":
        return _start(args.number, Path(args.path or "."))
    from autodist_fx.course.grading import grade_file  # imports the lesson's tests, and torch

    chosen = lesson(args.number)
    report = grade_file(chosen, Path(args.path or chosen.file_name))
    print(report)
    return SUCCESS if report.passed else DIFFERENT


def _start(number: int, directory: Path) -> int:
    """Write a lesson's problem and notebook. Raises AutodistError for a file that is there already."""
    from autodist_fx.course.notebook import make_notebook

    chosen = lesson(number)
    problem, notebook = directory / chosen.file_name, directory / f"lesson_{number}.ipynb"
    for path in (problem, notebook):
        if path.exists():
            raise AutodistError(f"{path} is there already: go on with it, or move it away and start again")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        problem.write_text(chosen.problem(), encoding="utf-8")
        notebook.write_text(json.dumps(make_notebook(chosen), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise AutodistError(f"cannot write into {directory}: {error.strerror or error}") from error
    print(f"wrote {problem}, with {chosen.holes} holes to fill in, and {notebook}, the lesson")
    where = "" if problem.parent == Path(".") else f" {problem}"
    print(f"when it is written: autodist-fx course check {number}{where}")
    return SUCCESS
