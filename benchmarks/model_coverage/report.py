"""The results of a run as a section of a markdown page, one for each version of transformers: totals, then a row a
type, then every reason."""

from __future__ import annotations

import datetime
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import transformers
from markdown_table import escaped, table

from model_coverage.sweeps import tables
from model_coverage.tasks import TASKS, Task

SHARE_BAR, REDUCE_BAR = 0.9, 3.0  # of a plan worth having: matmul weight bytes sharded, all_reduces per layer
# Causal types wanted, by transformers' major version: right on all meshes, of these worth having, KV cache right.
_CAUSAL_BARS = {4: (127, 119, 117), 5: (183, 178, 175)}
GATHER_MARK = 2.0  # all_gathers per layer that are worth knowing of; no bar
Result = dict[str, Any]


_SECTION = "## transformers "


def page(sections: Mapping[str, str]) -> str:
    """Returns the whole page. `sections` by version of transformers, the newest of which comes first."""
    ordered = sorted(sections, key=lambda version: [int(n) for n in re.findall(r"\d+", version)], reverse=True)
    parts = ["# Coverage: every type of transformers' mappings on every mesh", _HOW]
    parts += [f"{_SECTION}{version}\n\n{sections[version].strip()}" for version in ordered]
    return "\n\n".join(parts) + "\n"


def sections_of(page: str) -> dict[str, str]:
    """Returns the sections of a page that was written before, by version of transformers."""
    found = re.split(rf"^{_SECTION}(\S+)\n", page, flags=re.MULTILINE)
    return {version: text.strip() for version, text in zip(found[1::2], found[2::2], strict=True)}


def section(
    results: Sequence[Result], meshes: Sequence[str], command: str, state: str, seconds: float, jobs: int
) -> str:
    """Returns what the page says of one version. `meshes` as "2x1"; `seconds` the wall-clock time of the run, 0 when it
    ran nothing."""
    by_task = {name: [r for r in results if r["task"] == name] for name in TASKS}
    shown = [task for task in TASKS.values() if by_task[task.name]]
    built = [r for r in results if r["built"]]
    median = statistics.median(r["seconds"] for r in built) if built else 0.0
    parts = [
        f"Written by `{command}` on {datetime.date.today().isoformat()}, {os.cpu_count()} cores, {jobs} at a time; "
        + f"{state}."
        + (f" Wall clock: {seconds / 60:.1f} min." if seconds else "")
        + f" Median {median:.1f} s a type.",
        "### Totals",
        _totals(shown, by_task, meshes),
        *(_causal_bars(by_task["causal-lm"], meshes) if by_task["causal-lm"] else ()),
    ]
    if sweep_totals := tables.totals([(task.name, by_task[task.name]) for task in shown]):
        parts += ["### Totals of generating and of calls", sweep_totals]
    for task in shown:
        parts += [f"### {task.title} ({task.name})", _type_table(task, by_task[task.name], meshes)]
        parts += tables.of_task(by_task[task.name])
        parts += _reasons(by_task[task.name], meshes)
    return "\n\n".join(parts)


_HOW = """\
Each type is built tiny from its config class, with random numbers in every parameter, run by itself, split over each
mesh (tp x pp), simulated, and compared: **right** is a relative error of at most 1e-6 in float64, or 1e-4 where the
model itself cannot run in float64 (marked f32). *Sharded* is the share of the bytes of matmul weights and embeddings
that no rank of 2x1 holds whole; *AR* and *AG* the all_reduces and all_gathers per layer of a forward there. *KV cache*
is a prompt, then token by token, against the whole sequence at once (or against the model's own cache, where that gives
something else). *HF* says which plans transformers itself has for the type: tp (base_model_tp_plan), pp
(base_model_pp_plan), or none. **refused** is an error on purpose, **crashed** is not; both give their reasons below.
"no pads": the model's own output is not finite with padding. "rounds": parts of the model compute in float32 whatever
its dtype, and a difference, up to 1e-4, is no larger than what rounding its weights to float32 does to its own output;
all ranks were then compared with its graph where everything is in float64.

*Generating* and *calls* are what users do, on 2x1, with matrices 1.6 times as large, so that what a token attends to
decides about the next one. Generating: the ranks, threads with the runtime of processes, give the same tokens as
transformers' own generate of the whole model: two rows of three tokens and three more, within the window of six where a
type has one; one padded on the left; rows of 14 tokens, one with five pads, and eight more, past the window. Calls
without a cache: no mask; a row padded on the right; two sequences packed into a row by position ids, without a mask;
labels. Each is simulated and, where the type generates, made over those ranks; all outputs are compared with those of
the whole model called with use_cache=False. **right\\***: transformers itself fails, or answers in two ways, where it
should in one: generate with its cache and without it, or by sdpa and by eager attention; a call with use_cache=False
and by default. The truth is then the other way, and a line says which. **-**: transformers itself cannot do it, or the
model takes no positions or labels.

A run writes the section of its version of transformers."""


def is_right(result: Result, meshes: Iterable[str]) -> bool:
    return result["built"] and all(result["meshes"].get(mesh, {}).get("verdict") == "right" for mesh in meshes)


def decodes_right(result: Result) -> bool:
    decoding = result.get("decoding") or {}
    return bool(decoding) and all(entry["verdict"] == "right" for entry in decoding.values())


def _is_worth_it(result: Result) -> bool:
    """Sharded enough, with few enough collectives."""
    reduces = result.get("all_reduces_per_layer")
    return result.get("share_sharded", 0.0) >= SHARE_BAR and reduces is not None and reduces <= REDUCE_BAR


def _totals(tasks: Sequence[Task], by_task: dict[str, list[Result]], meshes: Sequence[str]) -> str:
    rows = []
    for task in tasks:
        found = by_task[task.name]
        built = [r for r in found if r["built"]]
        right = sum(is_right(r, meshes) for r in built)
        counts = [sum(_verdict(r, mesh) == "right" for r in built) for mesh in meshes]
        wrong = sum(any(_verdict(r, mesh) == "wrong" for mesh in meshes) for r in built)
        share = f"{right / len(built):.0%}" if built else "-"
        decoding = str(sum(map(decodes_right, built))) if task.decodes else ""
        worth = str(sum(is_right(r, meshes) and _is_worth_it(r) for r in built))
        gathers = str(sum((r.get("all_gathers_per_layer") or 0.0) > GATHER_MARK for r in built))
        own = [sum(plan in r.get("own_plans", ()) for r in built) for plan in ("tp", "pp")]
        row = [task.name, len(found), len(built), f"{right} ({share})", *counts, wrong, worth, gathers, decoding]
        rows.append([*row, *own])
    header = ["task", "types", "built", "right on all", *meshes, "wrong on any"]
    worth_it = f"of the right: >= {SHARE_BAR:.0%} sharded, AR <= {REDUCE_BAR:.0f}"
    return table([*header, worth_it, f"AG > {GATHER_MARK:.0f}", "KV cache right", "HF tp", "HF pp"], rows)


def _causal_bars(results: Sequence[Result], meshes: Sequence[str]) -> list[str]:
    built = [r for r in results if r["built"]]
    right = [r for r in built if is_right(r, meshes)]
    wanted_right, wanted_worth, wanted_decoding = _CAUSAL_BARS[int(transformers.__version__.partition(".")[0])]
    numbers = [
        ("types that build here without extra packages", len(built), None),
        (f"of them right on {', '.join(meshes)}", len(right), wanted_right),
        (f"of these >= {SHARE_BAR:.0%} sharded and <= {REDUCE_BAR:.0f} all_reduces per layer",
         sum(map(_is_worth_it, right)), wanted_worth),
        ("of the types that build, KV-cache decoding right", sum(map(decodes_right, built)), wanted_decoding),
    ]  # fmt: skip
    lines = [f"- {text}: **{count}**" + (f" (wanted: {bar})" if bar else "") for text, count, bar in numbers]
    return ["Causal language models:", "\n".join(lines)]


def _type_table(task: Task, results: Sequence[Result], meshes: Sequence[str]) -> str:
    rows = []
    for result in sorted((r for r in results if r["built"]), key=lambda r: r["type"]):
        share, reduces = result.get("share_sharded"), result.get("all_reduces_per_layer")
        notes = ["f32"] * (result.get("dtype") == "float32") + ["no pads"] * (result.get("padded") is False)
        entries = (*result["meshes"].values(), *(result.get("decoding") or {}).values())
        notes += ["rounds"] * any(entry.get("rounds", False) for entry in entries)
        row = [result["type"], *(_verdict(result, mesh) for mesh in meshes)]
        gathers = result.get("all_gathers_per_layer")
        row += ["-" if share is None else f"{share:.0%}"]
        row += ["-" if count is None else f"{count:.3g}" for count in (reduces, gathers)]
        if task.decodes:
            row.append(_decoding(result))
        rows.append([*row, " ".join(result.get("own_plans", ())), ", ".join(notes), f"{result['seconds']:.1f}"])
    header = ["type", *meshes, "sharded", "AR", "AG", *(["KV cache"] if task.decodes else []), "HF", "", "s"]
    return table(header, rows)


def _decoding(result: Result) -> str:
    decoding = result.get("decoding") or {}
    if not decoding:
        return "none"
    verdicts = list(dict.fromkeys(entry["verdict"] for entry in decoding.values()))
    if len(verdicts) == 1:
        return verdicts[0]
    return ", ".join(f"{entry['verdict']} {mesh}" for mesh, entry in decoding.items())


def _verdict(result: Result, mesh: str) -> str:
    return result.get("meshes", {}).get(mesh, {}).get("verdict", "-")


def failures(result: Result, meshes: Sequence[str]) -> list[tuple[str, str, str]]:
    """(where, verdict, reason) of everything of this type that is not right, like reasons put together."""
    found: dict[tuple[str, str], list[str]] = {}
    for kind, entries in (("", result.get("meshes", {})), ("KV cache ", result.get("decoding") or {})):
        for mesh, entry in entries.items():
            if entry["verdict"] != "right" and (kind or mesh in meshes):
                found.setdefault((entry["verdict"], entry["reason"]), []).append(kind + mesh)
    for where, entry in tables.not_right(result):
        found.setdefault((entry["verdict"], entry["reason"]), []).append(where)
    return [(", ".join(where), verdict, reason) for (verdict, reason), where in found.items()]


def _reasons(results: Sequence[Result], meshes: Sequence[str]) -> list[str]:
    parts = []
    lines = [
        f"- **{result['type']}** ({where}) {verdict}: {escaped(reason)}"
        for result in sorted(results, key=lambda r: r["type"])
        if result["built"]
        for where, verdict, reason in failures(result, meshes)
    ]
    if lines:
        parts += ["#### Not right, and why", "\n".join(lines)]
    lines = [
        f"- **{result['type']}** ({result['class']}): {escaped(result['reason'])}"
        for result in sorted(results, key=lambda r: r["type"])
        if not result["built"]
    ]
    if lines:
        parts += ["#### Not built, and why", "\n".join(lines)]
    return parts
