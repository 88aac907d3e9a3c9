"""Results as lines of JSON, each with the state of the code that it was found with."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
_CODE = ("autodist_fx", "passes", "cost_model", "benchmarks/model_coverage")
Result = dict[str, Any]


def state() -> str:
    """Versions, and a digest of the packages as they stand in the working tree."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in _CODE for path in (ROOT / folder).rglob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    versions = f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{versions}, code {digest.hexdigest()[:12]}"


def read(path: Path) -> dict[tuple[str, str], Result]:
    """The last result of each (task, type); a line cut short by an interruption is passed over."""
    found: dict[tuple[str, str], Result] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                result = json.loads(line)
                found[result["task"], result["type"]] = result
            except (ValueError, KeyError):
                continue
    return found


def swept(sweeps: Iterable[str], meshes: Iterable[str]) -> list[str]:
    """Returns what a result has that was made with these sweeps on these meshes: "calls 2x1", say."""
    on = list(meshes)
    return [f"{sweep} {mesh}" for sweep in sweeps for mesh in on]


def usable(
    results: Iterable[Result], meshes: Iterable[str], wanted_state: str | None, sweeps: Iterable[str] = ()
) -> dict[tuple[str, str], Result]:
    """Those that have all the meshes and sweeps (as `swept` says them) and, unless `wanted_state` is None, were found
    with that state of the code."""
    wanted, wanted_sweeps = set(meshes), set(sweeps)
    return {
        (result["task"], result["type"]): result
        for result in results
        if (wanted_state is None or result.get("state") == wanted_state)
        and (
            not result["built"] or (wanted <= result["meshes"].keys() and wanted_sweeps <= set(result.get("swept", ())))
        )
    }


def append(path: Path, result: Result) -> None:
    """Adds a line; an interrupted one before it ends there."""
    cut_short = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * cut_short + json.dumps(result) + "\n")
