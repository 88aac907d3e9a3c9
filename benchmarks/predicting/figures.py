"""The figures: errors of predictions, the order of plans, what a choice by them costs, memory, and tables of all."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from math import log

from markdown_table import escaped, table

from cost_model.costs.hardware import Hardware
from cost_model.costs.leave_one_out import left_out_errors
from predicting.points import KINDS, Point


def ninth_decile(values: Sequence[float]) -> float:
    """The value below which nine of ten lie."""
    return statistics.quantiles(values, n=10, method="inclusive")[-1] if len(values) > 1 else values[0]


def spearman(pairs: Sequence[tuple[float, float]]) -> float:
    """The correlation of ranks, equal values sharing the mean of theirs."""
    a, b = (_ranks([pair[side] for pair in pairs]) for side in (0, 1))
    return statistics.correlation(a, b)


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(x < v for x in values) + (sum(x == v for x in values) + 1) / 2 for v in values]


def groups(points: Iterable[Point]) -> dict[tuple[str, str], list[Point]]:
    """Plans of one shape and kind of work, among which one chooses."""
    found: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        found.setdefault((point.shape, point.kind), []).append(point)
    return found


def order_of_plans(points: Iterable[Point]) -> float:
    """Spearman's correlation over all plans, of their seconds relative to the mean of all plans for the same work."""
    pairs: list[tuple[float, float]] = []
    for group in groups(points).values():
        predicted, measured = ([log(s) for s in side] for side in zip(*map(_seconds, group), strict=True))
        low, high = statistics.fmean(predicted), statistics.fmean(measured)
        pairs += [(p - low, m - high) for p, m in zip(predicted, measured, strict=True)]
    return spearman(pairs)


def _seconds(point: Point) -> tuple[float, float]:
    return point.predicted_seconds, point.measured_seconds


def regrets(points: Iterable[Point]) -> list[float]:
    """By how much the plan that is predicted fastest is slower than the fastest, for each shape and kind."""
    found = []
    for group in groups(points).values():
        chosen = min(group, key=lambda p: p.predicted_seconds)
        found.append(chosen.measured_seconds / min(p.measured_seconds for p in group) - 1)
    return found


def summary(points: Sequence[Point], machine: Hardware) -> str:
    """The figures beside their bars, as a table."""
    errors = [abs(p.error) for p in points]
    apart = [error for _, _, error in left_out_errors(machine)] if machine.measured is not None else []
    held = [abs(p.predicted_bytes / p.measured_bytes - 1) for p in points if p.predicted_bytes and p.measured_bytes]
    regret = regrets(points)
    rows = [
        [f"error of seconds, median of {len(points)}", f"{statistics.median(errors):.1%}", "10 %"],
        ["... ninth decile", f"{ninth_decile(errors):.1%}", "20 %"],
        ["order of plans, Spearman", f"{order_of_plans(points):.3f}", "0.95"],
        ["order of all points, Spearman", f"{spearman(list(map(_seconds, points))):.3f}", ""],
        [f"regret of the chosen plan, mean of {len(regret)}", f"{statistics.fmean(regret):.1%}", "5 %"],
        ["... largest", f"{max(regret):.1%}", ""],
        [f"error of memory, median of {len(held)}", f"{statistics.median(held):.1%}" if held else "-", ""],
        ["... largest", f"{max(held):.1%}" if held else "-", "10 %"],
    ]
    if apart:
        rows += [
            [f"an op, left out of its table, median of {len(apart)}", f"{statistics.median(apart):.1%}", ""],
            ["... ninth decile", f"{ninth_decile(apart):.1%}", ""],
        ]
    return table(["", "here", "bar"], rows)


def by_kind(points: Sequence[Point]) -> str:
    """Errors of each kind of work; the mean has a sign, which says whether predictions are too fast."""
    rows = []
    for kind in KINDS:
        of_kind = [p for p in points if p.kind == kind]
        if of_kind:
            errors = [abs(p.error) for p in of_kind]
            rows.append([
                kind, len(of_kind), f"{statistics.median(errors):.1%}", f"{ninth_decile(errors):.1%}",
                f"{statistics.fmean(p.error for p in of_kind):+.1%}",
            ])  # fmt: skip
    return table(["", "points", "median error", "ninth decile", "mean, with its sign"], rows)


def all_points(points: Sequence[Point]) -> str:
    """Every point."""
    rows = [
        [
            p.shape, escaped(p.way), p.kind, f"{p.predicted_seconds * 1e3:.1f}", f"{p.measured_seconds * 1e3:.1f}",
            f"{p.error:+.1%}", _mebibytes(p.predicted_bytes), _mebibytes(p.measured_bytes),
        ]
        for p in points
    ]  # fmt: skip
    return table(["shape", "plan", "work", "predicted ms", "measured ms", "error", "predicted MiB", "peak MiB"], rows)


def _mebibytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:.0f}" if nbytes else ""
