"""Runs the course's notebooks and writes them, and a page of each, into docs/course (`make course`).

The source of both is autodist_fx/course/lesson_N/lesson.md. It needs course_requirements.txt.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from autodist_fx.course.lessons import LESSONS, Lesson
from autodist_fx.course.notebook import make_notebook, make_page

PAGES = Path(__file__).resolve().parents[1] / "docs" / "course"
TIMEOUT_SECONDS = 300  # of a cell
QUIET = {"PYTHONWARNINGS": "ignore:IProgress not found", "HF_HUB_OFFLINE": "1"}  # tqdm would like a widget


def build(lesson: Lesson) -> None:
    """Run a lesson's notebook and write lesson_N.ipynb, its page and its drawings."""
    notebook = nbformat.reads(json.dumps(make_notebook(lesson)), as_version=4)
    nbformat.validate(notebook)
    with tempfile.TemporaryDirectory() as folder:  # cells write files where they run
        options = {"timeout": TIMEOUT_SECONDS, "startup_timeout": TIMEOUT_SECONDS}
        NotebookClient(notebook, resources={"metadata": {"path": folder}}, **options).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran: another one each time
    plain = json.loads(nbformat.writes(notebook))
    text = json.dumps(plain, indent=1, ensure_ascii=False) + "\n"
    (PAGES / f"{lesson.page}.ipynb").write_text(text, encoding="utf-8")

    def save(number: int, svg: str) -> str:
        name = f"images/lesson_{lesson.number}_{number}.svg"
        (PAGES / name).write_text(svg + "\n", encoding="utf-8")
        return name

    (PAGES / f"{lesson.page}.md").write_text(make_page(plain, save), encoding="utf-8")


def main() -> int:
    os.environ |= QUIET
    wanted = {int(number) for number in sys.argv[1:]}
    for lesson in LESSONS:
        if not wanted or lesson.number in wanted:
            started = time.monotonic()
            build(lesson)
            print(f"lesson {lesson.number}: ran in {time.monotonic() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
