"""Draws charts as SVG, readable on a phone: bars with their spread, points against a diagonal, lines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, PAD, FONT = 560, 16, 15
COLOURS = ("#3949ab", "#ef6c00", "#00897b", "#8e24aa", "#c62828", "#546e7a")
INK, FAINT = "#222", "#d0d4dc"


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar: its label, value, and the least and most that were measured."""

    label: str
    value: float
    low: float
    high: float
    is_ours: bool = False


def bars(title: str, unit: str, rows: Sequence[Bar], form: str = "{:.0f}") -> str:
    """Draw horizontal bars, a label above each, and a line from the least to the most."""
    step, top = 50, 54
    height = top + step * len(rows) + PAD
    room = WIDTH - 2 * PAD - 96
    scale = room / max((row.high for row in rows), default=1.0)
    parts = [_text(PAD, 28, title, weight="600"), _text(WIDTH - PAD, 28, unit, anchor="end", fill="#555")]
    for number, row in enumerate(rows):
        y = top + step * number
        colour = COLOURS[0] if row.is_ours else COLOURS[5]
        parts += [
            _text(PAD, y + 13, row.label),
            f'<rect x="{PAD}" y="{y + 19}" width="{scale * row.value:.1f}" height="20" rx="2" fill="{colour}"/>',
            _line(PAD + scale * row.low, y + 29, PAD + scale * row.high, y + 29, INK, 1.5),
            _text(PAD + scale * row.high + 8, y + 34, form.format(row.value), weight="600"),
        ]
    return _svg(height, parts, f"{title}, {unit}: " + "; ".join(f"{r.label} {form.format(r.value)}" for r in rows))


def grouped_bars(title: str, groups: Sequence[str], series: Sequence[tuple[str, Sequence[float | None]]]) -> str:
    """Draw shares, 0 to 1, of each group: a thin bar for each series, under the group's name."""
    thin, gap, top = 20, 30, 54 + 24 * len(series)
    step = gap + thin * len(series)
    height = top + step * len(groups) + PAD
    room = WIDTH - 2 * PAD - 64
    parts = [_text(PAD, 28, title, weight="600"), *_legend([name for name, _ in series], 50)]
    for g, group in enumerate(groups):
        y = top + step * g
        parts.append(_text(PAD, y + 4, group))
        for s, (_, shares) in enumerate(series):
            share, at = shares[g], y + 10 + thin * s
            if share is not None:
                box = f'x="{PAD}" y="{at}" width="{room * share:.1f}" height="{thin - 4}" rx="2"'
                parts.append(f'<rect {box} fill="{COLOURS[s]}"/>')
                parts.append(_text(PAD + room * share + 8, at + 13, f"{share:.0%}"))
    return _svg(height, parts, title)


def scatter(title: str, x_name: str, y_name: str, series: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> str:
    """Draw points on two logarithmic axes with the same range, and the diagonal on which both are equal."""
    values = [v for _, points in series for point in points for v in point]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    side, left, top = 420, 92, 50 + 24 * len(series)

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = ((math.log10(v) - low) / (high - low) for v in (x, y))
        return left + side * across, top + side * (1 - up)

    parts = [_text(PAD, 28, title, weight="600"), *_legend([name for name, _ in series], 50)]
    for power in range(low, high + 1):
        (x, y), label = place(10.0**power, 10.0**power), _seconds(10.0**power)
        parts += [_line(x, top, x, top + side, FAINT), _line(left, y, left + side, y, FAINT)]
        parts += [_text(x, top + side + 22, label, anchor="middle"), _text(left - 8, y + 5, label, anchor="end")]
    for factor in (0.8, 1.0, 1.25):
        ends = [(10.0**low, 10.0**low * factor), (10.0**high, 10.0**high * factor)]
        (x1, y1), (x2, y2) = (place(*end) for end in ends)
        parts.append(_line(x1, y1, x2, y2, "#888", 1.5 if factor == 1 else 0.8, "" if factor == 1 else "4 4"))
    for s, (_, points) in enumerate(series):
        for x, y in (place(*point) for point in points):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{COLOURS[s]}" fill-opacity=".75"/>')
    parts.append(_text(left + side / 2, top + side + 46, x_name, anchor="middle"))
    parts.append(_text(0, 0, y_name, anchor="middle", extra=f'transform="translate(22 {top + side / 2}) rotate(-90)"'))
    return _svg(top + side + 60, parts, f"{title}: {y_name} against {x_name}; {len(values) // 2} points")


def lines(title: str, x_name: str, y_name: str, series: Sequence[tuple[str, Sequence[float]]], note: str) -> str:
    """Draw a curve for each series over its steps, the later ones thinner and dashed, so that equal ones all show."""
    values = [v for _, curve in series for v in curve]
    low, high, most = min(values), max(values), max(len(curve) for _, curve in series)
    left, top, across, down = 70, 50 + 24 * len(series), 460, 280

    def place(step: int, value: float) -> tuple[float, float]:
        share = (value - low) / ((high - low) or 1.0)
        return left + across * step / max(most - 1, 1), top + down * (1 - share)

    parts = [_text(PAD, 28, title, weight="600"), *_legend([name for name, _ in series], 50)]
    for part in range(5):
        value = low + (high - low) * part / 4
        _, y = place(0, value)
        parts += [_line(left, y, left + across, y, FAINT), _text(left - 8, y + 5, f"{value:.2f}", anchor="end")]
    for step in range(0, most, max(1, most // 5)):
        x, _ = place(step, low)
        parts.append(_text(x, top + down + 22, str(step + 1), anchor="middle"))
    for s, (_, curve) in enumerate(series):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(i, v) for i, v in enumerate(curve)))
        width, dashes = 7.0 - 1.8 * s, f"{12 - 2 * s} {4 * s}" if s else ""
        parts.append(_polyline(path, COLOURS[s], width, dashes))
    parts.append(_text(left + across / 2, top + down + 46, x_name, anchor="middle"))
    parts.append(_text(0, 0, y_name, anchor="middle", extra=f'transform="translate(20 {top + down / 2}) rotate(-90)"'))
    parts.append(_text(PAD, top + down + 74, note, fill="#555"))
    return _svg(top + down + 90, parts, f"{title}: {note}")


def empty(title: str, reason: str) -> str:
    """Draw a card that says why there is nothing to draw."""
    return _svg(96, [_text(PAD, 34, title, weight="600"), _text(PAD, 66, reason, fill="#555")], f"{title}: {reason}")


def _legend(names: Sequence[str], top: float) -> Iterable[str]:
    for s, name in enumerate(names):
        yield f'<rect x="{PAD}" y="{top + 24 * s - 11}" width="14" height="14" rx="2" fill="{COLOURS[s]}"/>'
        yield _text(PAD + 22, top + 24 * s + 1, name)


def _seconds(value: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9)):
        if value >= factor * 0.999:
            return f"{value / factor:.0f} {unit}"
    return f"{value:.0e} s"


def _text(
    x: float, y: float, said: str, *, anchor: str = "start", weight: str = "400", fill: str = INK, extra: str = ""
) -> str:
    place = extra or f'x="{x:.1f}" y="{y:.1f}"'
    return f'<text {place} text-anchor="{anchor}" font-weight="{weight}" fill="{fill}">{escape(said)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1.0, dashes: str = "") -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dashes}"/>'


def _polyline(points: str, colour: str, width: float, dashes: str) -> str:
    style = f'stroke="{colour}" stroke-width="{width:.1f}" stroke-dasharray="{dashes}" stroke-linejoin="round"'
    return f'<polyline points="{points}" fill="none" {style}/>'


def _svg(height: float, parts: Iterable[str], label: str) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img"'
    font = f'font-family="system-ui, sans-serif" font-size="{FONT}"'
    card = f'<rect width="{WIDTH}" height="{height:.0f}" rx="8" fill="#fff" stroke="{FAINT}"/>'
    named = escape(label, {'"': "&quot;"})
    return "\n".join([f'{head} {font} aria-label="{named}">', card, *parts, "</svg>"]) + "\n"
