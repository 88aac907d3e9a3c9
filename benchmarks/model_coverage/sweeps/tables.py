"""The sweeps' part of a version's section: totals by kind, a table a task, and what to say of each verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markdown_table import escaped, table

from model_coverage.sweeps import calls, generation

_KINDS = {
    "generation": ("Generating", tuple(kind.name for kind in generation.KINDS)),
    "calls": ("Calls", calls.KINDS),
}
_VERDICTS = ("right", "right*", "refused", "wrong", "crashed")
Result = dict[str, Any]


def verdict(entries: Mapping[str, Any] | None) -> str:
    """Returns one word for a kind: the worst of where it was tried; "right*" by another truth than transformers'
    generate with its cache; "-" where nothing was."""
    if not entries or "transformers" in entries:
        return "-"
    found = {entry["verdict"] + "*" * ("truth" in entry) for entry in entries.values()}
    return max(found, key=_VERDICTS.index)


def of_task(results: Sequence[Result]) -> list[str]:
    """Returns a table for each sweep that these results have, and the lines about other truths."""
    parts = []
    for sweep, (title, kinds) in _KINDS.items():
        found = sorted((r for r in results if r["built"] and r.get("sweeps", {}).get(sweep)), key=lambda r: r["type"])
        if not found:
            continue
        rows = [[r["type"], *(verdict(_entries(r, sweep, kind)) for kind in kinds)] for r in found]
        parts += [f"#### {title}", table(["type", *kinds], rows)]
        if lines := [line for r in found for line in _other_truths(r, sweep)]:
            parts += ["Another truth than transformers' own generate:", "\n".join(lines)]
        if lines := [line for r in found for line in _unasked(r, sweep)]:
            parts += ["What transformers itself cannot do:", "\n".join(lines)]
    return parts


def totals(by_task: Sequence[tuple[str, Sequence[Result]]]) -> str:
    """Returns the table of verdicts by task and kind; "" without any."""
    rows = []
    for task, results in by_task:
        for sweep, (title, kinds) in _KINDS.items():
            swept = [r for r in results if r["built"] and sweep in r.get("sweeps", {})]
            for kind in kinds if swept else ():
                counts = Counter(verdict(_entries(r, sweep, kind)) for r in swept)
                asked = sum(counts.values()) - counts["-"]
                rows.append([task, f"{title.lower()}: {kind}", asked, *(counts[name] for name in _VERDICTS)])
    return table(["task", "what", "asked", *_VERDICTS], rows) if rows else ""


def not_right(result: Result) -> Iterator[tuple[str, Any]]:
    """Yields (where, entry) of all that is neither right nor transformers' own."""
    for sweep, kinds in result.get("sweeps", {}).items():
        for kind, entries in kinds.items():
            for mesh, entry in entries.items():
                if entry["verdict"] not in ("right", "none"):
                    yield f"{sweep}: {kind} {mesh}", entry


def _entries(result: Result, sweep: str, kind: str) -> Mapping[str, Any] | None:
    found = result["sweeps"][sweep]
    return found.get(kind, found.get("all"))


def _other_truths(result: Result, sweep: str) -> Iterator[str]:
    found: dict[str, list[str]] = {}
    for kind, entries in result["sweeps"][sweep].items():
        for mesh, entry in entries.items():
            if "truth" in entry:
                found.setdefault(entry["reason"], []).append(f"{kind} {mesh}")
    for reason, where in found.items():
        yield f"- **{result['type']}** ({', '.join(where)}): {escaped(reason)}"


def _unasked(result: Result, sweep: str) -> Iterator[str]:
    found: dict[str, list[str]] = {}
    for kind, entries in result["sweeps"][sweep].items():
        if "transformers" in entries:
            found.setdefault(entries["transformers"]["reason"], []).append(kind)
    for reason, kinds in found.items():
        yield f"- **{result['type']}** ({', '.join(kinds)}): {escaped(reason)}"


__all__ = ["not_right", "of_task", "totals", "verdict"]
