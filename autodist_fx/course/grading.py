"""Grades a reader's file: loads it, runs the lesson's checks on it, and says of each whether it is right.

A file is the reader's own Python, and is run. A hole that is still open, an exception and a wrong result are told
apart, each with the line of the file that it comes from.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

from autodist_fx.course.lessons import Lesson
from autodist_fx.errors import AutodistError


@dataclass(frozen=True, slots=True)
class Check:
    """A test of a lesson: `claim` is what holds of a right answer; `test(answer)` raises where it does not."""

    claim: str
    test: Callable[[Any], None]


class Mark(Enum):
    """A verdict's kind; its value is what is printed."""

    RIGHT = "right"
    HOLE = "hole"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of one check; `reason` is empty where it is right."""

    claim: str
    mark: Mark
    reason: str = ""

    def __str__(self) -> str:
        lines = [f"{self.mark.value:<6} {self.claim}", *(f"           {line}" for line in self.reason.splitlines())]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Report:
    """The verdicts on a file, in the order of the lesson's checks."""

    lesson: Lesson
    file: str
    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        """Returns whether every check is right."""
        return all(verdict.mark is Mark.RIGHT for verdict in self.verdicts)

    def __str__(self) -> str:
        right = sum(verdict.mark is Mark.RIGHT for verdict in self.verdicts)
        head = f"Lesson {self.lesson.number}, {self.lesson.title}: {self.file}"
        return "\n".join([head, *map(str, self.verdicts), f"{right} of {len(self.verdicts)} right"])


def grade_file(lesson: Lesson, path: Path) -> Report:
    """Grade a file on disk. Raises AutodistError where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        way_out = f"write it with `autodist-fx course start {lesson.number}`, or name another file"
        raise AutodistError(f"cannot read {path} ({getattr(error, 'strerror', None) or error}): {way_out}") from error
    return grade_text(lesson, text, str(path))


def grade_text(lesson: Lesson, text: str, name: str = "") -> Report:
    """Grade an answer that is given as text; `name` is what the report calls it."""
    name = name or lesson.file_name
    checks: tuple[Check, ...] = importlib.import_module(f"{lesson.package}.grade").CHECKS
    try:
        answer = _module(lesson, text, name)
    except Exception as error:
        where = f"{name}:{error.lineno}" if isinstance(error, SyntaxError) else _where(error, name)
        return Report(lesson, name, (Verdict("the file can be imported", Mark.WRONG, _reason(error, where)),))
    return Report(lesson, name, tuple(_verdict(check, answer, name) for check in checks))


def _module(lesson: Lesson, text: str, name: str) -> ModuleType:
    """Run the text as a module of its own. Raises what it raises."""
    module = ModuleType(f"course_lesson_{lesson.number}")
    module.__file__ = name
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(text, name, "exec"), module.__dict__)
    return module


def _verdict(check: Check, answer: ModuleType, name: str) -> Verdict:
    try:
        check.test(answer)
    except NotImplementedError as error:
        where = _where(error, name)
        return Verdict(check.claim, Mark.HOLE, f"{where or name}: to be written")
    except Exception as error:
        return Verdict(check.claim, Mark.WRONG, _reason(error, _where(error, name)))
    return Verdict(check.claim, Mark.RIGHT)


def _where(error: BaseException, name: str) -> str:
    """Name the last line of the reader's file on the way to an error: "lesson_1.py:41, insert_send"; "" for none."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == name]
    if not frames:
        return ""
    inside = "" if frames[-1].name == "<module>" else f", {frames[-1].name}"
    return f"{name}:{frames[-1].lineno}{inside}"


def _reason(error: BaseException, where: str) -> str:
    """Say an error in a few lines. An AssertionError of a check says all that there is to say."""
    said = str(error).strip() or type(error).__name__
    if not isinstance(error, (AssertionError, AutodistError)):
        said = f"{type(error).__name__}: {said}"
    notes = list(getattr(error, "__notes__", ()))
    return "\n".join([f"{where}: {said}" if where else said, *notes])


__all__ = ["Check", "Mark", "Report", "Verdict", "grade_file", "grade_text"]
