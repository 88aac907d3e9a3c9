"""Makes a notebook of a lesson's text, and a page of the notebook once it has run: one source, so that they are alike.

The text is Markdown. A block that begins with ```python is a cell, to be run; any other block stays text. A line
`{{problem: name, name}}` stands for these functions and classes of the problem, `{{answer: name}}` for the worked
answer's. A cell's last line may be a value, which is shown: a text, or a drawing.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from autodist_fx.course.lessons import Lesson
from autodist_fx.errors import AutodistError

Notebook = dict[str, Any]
_CELL = re.compile(r"(?ms)^```python\n(.*?)^```\n")
_SOURCE = re.compile(r"(?m)^\{\{(problem|answer): ([\w, .]+)\}\}$")
_SVG = "image/svg+xml"


def make_notebook(lesson: Lesson) -> Notebook:
    """Return the lesson as a notebook, as JSON-ready values in Jupyter's format 4.5, with no outputs yet."""
    cells = []
    for number, (kind, text) in enumerate(_cells(lesson.text)):
        lines = text.strip("\n").splitlines(keepends=True)
        digest = hashlib.sha256(f"{lesson.number} {number}".encode()).hexdigest()[:8]  # the format wants an id
        cell: dict[str, Any] = {"cell_type": kind, "id": digest, "metadata": {}, "source": lines}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        else:
            cell["source"] = _SOURCE.sub(lambda found: _source(lesson, found), "".join(lines)).splitlines(keepends=True)
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def make_page(notebook: Notebook, save_drawing: Callable[[int, str], str]) -> str:
    """Return a notebook that has run as Markdown, with the outputs behind their cells.

    save_drawing: called with a drawing's number, from 1, and its SVG; returns what the page calls its file.
    """
    parts: list[str] = []
    drawings = 0
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] != "code":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            if _SVG in output.get("data", {}):
                svg = "".join(output["data"][_SVG])
                drawings += 1
                title = re.search(r"<title>(.*?)</title>", svg)
                parts.append(f"![{title[1] if title else 'drawing'}]({save_drawing(drawings, svg)})")
            else:
                parts.append(f"```text\n{_said(output)}\n```")
    return "\n\n".join(parts) + "\n"


def _said(output: dict[str, Any]) -> str:
    """Return the text of a cell's output. Raises AutodistError for a cell that ended with an error."""
    if output["output_type"] == "error":
        raise AutodistError(f"a cell of the course fails: {output['ename']}: {output['evalue']}")
    text = output["text"] if output["output_type"] == "stream" else output["data"]["text/plain"]
    return "".join(text).rstrip("\n")


def _cells(text: str) -> Iterator[tuple[str, str]]:
    """Yield ("markdown" or "code", text); Markdown is cut at its headings, too, so that no cell is long."""
    for i, part in enumerate(_CELL.split(text)):
        if i % 2:
            yield "code", part
        else:
            for piece in re.split(r"(?m)^(?=##? )", part):
                if piece.strip():
                    yield "markdown", piece


def _source(lesson: Lesson, found: re.Match[str]) -> str:
    text = lesson.problem() if found[1] == "problem" else lesson.answer
    names = [name.strip() for name in found[2].split(",")]
    return "```python\n" + "\n\n\n".join(definition(text, name) for name in names) + "\n```"


def definition(text: str, name: str) -> str:
    """Return the source of a function or class in a program, "name" or "Class.method". Raises AutodistError where there
    is none."""
    body, lines = ast.parse(text).body, text.splitlines()
    found: list[str] = []
    for part in name.split("."):
        named = [n for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == part]
        if not named:
            raise AutodistError(f"the lesson's text names {name}, which its program has not")
        body, found = named[0].body, lines[named[0].lineno - 1 : named[0].end_lineno]
    return "\n".join(found)  # methods stay indented, as they stand in their class


__all__ = ["definition", "make_notebook", "make_page"]
