"""Shows the compiler at work: what one of its passes changed in a rank's graph.

`adx.compile(model, ..., dump_dir=DIR)` writes each rank's graph after each pass, "04_insert_collectives.rank0.txt".
"""

from __future__ import annotations

import difflib
import tempfile
from pathlib import Path
from typing import Any

import autodist_fx as adx
from autodist_fx.errors import AutodistError
from passes.fx.text import graph_text


def pass_diff(model: Any, name: str, *, rank: int = 0, context: int = 0, lines: int = 0, **options: Any) -> str:
    """Compile `model` with the options of adx.compile, and return what the pass `name` changed in a rank's graph: lines
    with - before it, with + after it.

    context: lines to show around each change. lines: leave out all behind so many; 0: none. Raises AutodistError where
    there is no such pass.
    """
    with tempfile.TemporaryDirectory() as folder:
        compiled = adx.compile(model, dump_dir=folder, verify=False, **options)
        compiled.rank(rank)
        dumps = sorted(path for path in Path(folder).glob(f"*_*.rank{rank}.txt"))
        graphs = [graph_text(compiled.graph), *(path.read_text(encoding="utf-8") for path in dumps)]
    names = [path.name.split("_", 1)[1].split(".")[0] for path in dumps]
    if name not in names:
        raise AutodistError(f"no pass {name!r} makes a rank's graph: use one of {', '.join(names)}")
    at = names.index(name)
    before, after = (text.splitlines() for text in graphs[at : at + 2])
    found = list(difflib.unified_diff(before, after, "before", f"after {name}", lineterm="", n=context))
    found = [line for line in found if not line.startswith("@@")]
    if lines and len(found) > lines:
        found = [*found[:lines], f"... and {len(found) - lines} lines more"]
    return "\n".join(found)


__all__ = ["pass_diff"]
