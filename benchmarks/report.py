"""The measurements as markdown tables, the same in the terminal and in docs/benchmarks.md."""

import datetime
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from contenders import ENTRIES
from turns import NEW_TOKENS, Result

MIB = 2**20
NOTHING = "not available"
SHARDED = ", logits left in shards"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table whose columns line up in a terminal too."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def missing(reasons: Sequence[tuple[str, str]]) -> str:
    """Below a table: why rows in it have no figures."""
    return "".join(f"\n\n{title}: {reason}" for title, reason in dict(reasons).items())


def machine(command: str) -> str:
    """Where, when and with what the figures came about."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return "\n".join(
        [
            f"- {datetime.date.today().isoformat()}, `{command}`",
            f"- {cpu}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
            f"- Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}",
            f"- ours: plans for {_planned_for()}",
        ]
    )


def _planned_for() -> str:
    said = os.environ.get("ADX_HARDWARE", "")
    return "this machine as `autodist-fx measure` finds it" if Path(said).is_file() else said or "the default hardware"


def spread(values: Sequence[float], form: str) -> str:
    """Median and range."""
    low, middle, high = (format(f(values), form) for f in (min, statistics.median, max))
    return f"{middle} ({low} to {high})"


def speed_table(results: Sequence[Result]) -> str:
    """Formats what each contender takes."""
    rows = []
    for result in results:
        title = ENTRIES[result.name].title
        if result.error:
            rows.append([title, *[NOTHING] * 5])
            continue
        rows.append(
            [
                title,
                spread([s * 1e3 for s in result.forward], ".0f"),
                spread([s * 1e3 for s in result.prefill], ".0f"),
                spread([s * 1e3 for s in result.step], ".1f"),
                spread([NEW_TOKENS / s for s in result.decode], ".1f"),
                "yes" if result.agrees else f"NO: logits off by {result.logit_error:.1e}",
            ]
        )
        if result.forward_sharded:
            rows.append([title + SHARDED, spread([s * 1e3 for s in result.forward_sharded], ".0f"), *[""] * 4])
    reasons = [(ENTRIES[r.name].title, r.error) for r in results if r.error]
    header = ["", "forward, ms", "prefill, ms", "decode step, ms", "decode, tok/s", "same output"]
    return table(header, rows) + missing(reasons)


def ratio_table(results: Sequence[Result]) -> str:
    """How much longer the others take than ours on as many stages, round by round; without ours, than the hand-written
    split."""
    usable = {result.name: result for result in results if not result.error}
    if "ours" not in usable and "megatron_tp" not in usable:
        return "No ratios: the contender to compare with gave no figures."

    def ratios(theirs: list[float], ours: list[float]) -> str:
        return spread([t / o for t, o in zip(theirs, ours, strict=True)], ".2f")

    rows = []
    for other in usable.values():
        title, against = ENTRIES[other.name].title, ENTRIES[other.name].against
        base = usable.get(against) or usable.get("ours") or usable["megatron_tp"]
        named = f"{title} / {ENTRIES[base.name].title}"
        if other is not base:
            pairs = zip(other.measures, base.measures, strict=True)
            rows.append([named, *(ratios(theirs, ours) for theirs, ours in pairs)])
        if other.forward_sharded:
            rows.append([title + SHARDED, ratios(other.forward_sharded, base.forward), *[""] * 3])
    return table(["time / time", "forward", "prefill", "decode step", "decode"], rows)


def collectives_table(results: Sequence[Result]) -> str:
    """How often each contender communicates."""

    def census(counts: dict[str, float]) -> str:
        return ", ".join(f"{n:g} {name}" for name, n in sorted(counts.items())) or "none"

    rows = [
        [ENTRIES[r.name].title, census(r.collectives["forward"]), census(r.collectives["step"])]
        for r in results
        if r.collectives
    ]
    return table(["", "forward", "decode step"], rows) if rows else "None counted."


def compile_table(results: Sequence[dict[str, Any]]) -> str:
    """Seconds and memory for all rank programs of a large model."""
    rows = []
    for r in results:
        title = [r["shape"], str(r["layers"]), r["mesh"]]
        if "error" in r:
            rows.append([*title, *[NOTHING] * 8])
            continue
        seconds = [f"{r[f'{what}_seconds']:.1f}" for what in ("plan", "emit", "verify", "total", "cpu")]
        per_layer = f"{r['total_seconds'] / r['layers'] * 1e3:.0f}"
        rows.append([*title, *seconds, per_layer, f"{r['peak_rss'] / MIB:.0f}", f"{r['imports_rss'] / MIB:.0f}"])
    header = ["shape", "layers", "tp x pp", "trace and plan, s", "emit, s", "verify, s", "total, s", "CPU seconds"]
    reasons = [(f"{r['shape']}, {r['layers']} layers", r["error"]) for r in results if "error" in r]
    return table([*header, "ms a layer", "peak RSS, MiB", "of it imports"], rows) + missing(reasons)


def loading_table(results: Sequence[dict[str, Any]]) -> str:
    """Memory and bytes read of each rank while loading."""
    rows = []
    for r in results:
        if "error" in r:
            rows.append([r["side"], *[NOTHING] * 8])
            continue
        reported = r.get("reported_bytes_read")
        rows.append(
            [
                r["side"],
                str(r["rank"]),
                f"{r['shard_bytes'] / MIB:.0f}",
                f"{r['peak_above_imports'] / MIB:.0f}",
                f"{r['peak_above_imports'] / r['shard_bytes']:.2f}",
                "-" if reported is None else f"{reported / MIB:.0f}",
                f"{r['read'] / MIB:.0f}",
                f"{r['disk'] / MIB:.0f}",
                f"{r['file_bytes'] / MIB:.0f}",
            ]
        )
    header = ["", "rank", "shard, MiB", "peak above imports, MiB", "peak / shard", "bytes read as reported, MiB"]
    reasons = [(r["side"], r["error"]) for r in results if "error" in r]
    return table([*header, "by read(2), MiB", "from disk, MiB", "checkpoint, MiB"], rows) + missing(reasons)
