"""Reads our docstrings for mkdocstrings: "tp, pp: ranks ..." in a function's docstring describes its parameters."""

from __future__ import annotations

import re
from typing import Any

import griffe

_DESCRIBED = re.compile(r"^(\*{0,2}[a-z_]\w*(?:, \*{0,2}[a-z_]\w*)*): (.*)$")


class Parameters(griffe.Extension):
    """Turns such lines into the section "Args" of Google's style."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Rewrite a function's docstring."""
        if func.docstring is not None:
            names = {parameter.name for parameter in func.parameters}
            func.docstring.value = with_sections(func.docstring.value, names)


def with_sections(docstring: str, parameters: set[str]) -> str:
    """Return a docstring whose descriptions of `parameters` are one section, behind its paragraphs."""
    described: list[str] = []
    kept: list[str] = []
    is_inside = False
    for line in docstring.splitlines():
        found = _DESCRIBED.match(line)
        starts = found is not None and all(name.lstrip("*") in parameters for name in found[1].split(", "))
        is_inside = starts or (is_inside and line.startswith("    "))
        (described if is_inside else kept).append(line)
    if not described:
        return docstring
    return "\n".join([*kept, "", "Args:", *(f"    {line}" for line in described)])
