"""The lessons: their numbers, titles and files, and the problem that each makes of its worked answer.

A lesson is a folder. `answer.py` is the worked answer, in which each hole of the problem stands between two lines,
`# hole` and `# end`; so problem and answer cannot differ in anything else. `grade.py` has the tests, `lesson.md` the
text, of which notebook and page are made.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from importlib.resources import files

from autodist_fx.errors import AutodistError

_HOLE = re.compile(r"(?m)^( *)# hole\n(.*?)^ *# end\n", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Lesson:
    """A lesson, by its number from 1; `about` is its subject in a line, `page` the name of its page."""

    number: int
    title: str
    about: str
    page: str

    @property
    def package(self) -> str:
        """The package that has the lesson's files."""
        return f"autodist_fx.course.lesson_{self.number}"

    @property
    def file_name(self) -> str:
        """The name of the problem's file where the reader works on it."""
        return f"lesson_{self.number}.py"

    @property
    def text(self) -> str:
        """The lesson's text, Markdown whose Python blocks are a notebook's cells."""
        return self._read("lesson.md")

    @property
    def marked_answer(self) -> str:
        """The worked answer, with the lines that mark holes."""
        return self._read("answer.py")

    @property
    def holes(self) -> int:
        """Number of holes."""
        return len(_HOLE.findall(self.marked_answer))

    def problem(self, open_holes: Collection[int] | None = None) -> str:
        """Return the problem: the answer with its holes open, or with those of these numbers, counted from 0."""
        number = iter(range(self.holes))

        def fill(found: re.Match[str]) -> str:
            is_open = open_holes is None or next(number) in open_holes
            return f'{found[1]}raise NotImplementedError("your code")\n' if is_open else found[2]

        return _HOLE.sub(fill, self.marked_answer)

    @property
    def answer(self) -> str:
        """The worked answer: the problem without any open hole."""
        return self.problem(())

    def _read(self, name: str) -> str:
        return files(self.package).joinpath(name).read_text(encoding="utf-8")


LESSONS = (
    Lesson(1, "Two ranks, one model", "pipeline layers: send and recv", "1-send-and-recv"),
    Lesson(2, "Stages", "where to cut a model, and what crosses a cut", "2-stages"),
    Lesson(3, "Column, row, all_reduce", "linears whose weight is dealt to ranks", "3-column-and-row"),
    Lesson(4, "A whole Llama", "tensor parallelism of attention and MLP", "4-a-whole-llama"),
    Lesson(5, "Training on a pipeline", "the 1F1B schedule, memory and throughput", "5-training"),
)


def lesson(number: int) -> Lesson:
    """Return the lesson of this number. Raises AutodistError where there is none."""
    if not 1 <= number <= len(LESSONS):
        raise AutodistError(f"there is no lesson {number}: the course has lessons 1 to {len(LESSONS)}")
    return LESSONS[number - 1]


__all__ = ["LESSONS", "Lesson", "lesson"]
