"""Draws the site's plots from the tables of docs/benchmarks.md and docs/coverage.md and the files in docs/data/."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from tools.site import charts

DOCS = Path(__file__).resolve().parents[2] / "docs"
OURS = "autodist_fx"
_SPREAD = re.compile(r"([\d.]+) \(([\d.]+) to ([\d.]+)\)")


def write_plots(folder: Path) -> None:
    """Write every plot into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = {
        "decode": against_peers("decode, tok/s", "Decode on two ranks: more is better", "tokens/s", "{:.1f}"),
        "forward": against_peers("forward, ms", "Forward, 4 x 128 tokens, two ranks: less is better", "ms", "{:.0f}"),
        "predictions": predictions(),
        "loss_curves": loss_curves("loss_curves.json", "Loss by step", "benchmarks/loss_curves.py"),
        "training_curve": loss_curves(
            "training_curve.json", "Fine-tuning SmolLM2", "benchmarks/fine_tuning/training_curve.py"
        ),
        "coverage": coverage(),
    }
    for name, drawn in plots.items():
        (folder / f"{name}.svg").write_text(drawn, encoding="utf-8")


def tables(text: str) -> Iterator[list[dict[str, str]]]:
    """Yield each table of a Markdown text, as rows by column."""
    for block in re.findall(r"(?m)(?:^\|.*\n?)+", text):
        lines = [line.strip().removeprefix("|").removesuffix("|") for line in block.splitlines()]
        header, _, *rows = [[cell.strip() for cell in line.split("|")] for line in lines]
        yield [dict(zip(header, row)) for row in rows]


def against_peers(column: str, title: str, unit: str, form: str) -> str:
    """Draw a column of the benchmarks' first table that has it."""
    text = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    table = next((table for table in tables(text) if table and column in table[0]), [])
    rows = []
    for row in table:
        if found := _SPREAD.search(row.get(column, "")):
            rows.append(charts.Bar(row[""], *map(float, found.groups()), is_ours=row[""].startswith(OURS)))
    return charts.bars(title, unit, rows, form) if rows else charts.empty(title, f"docs/benchmarks.md has no {column}")


def predictions() -> str:
    """Draw predicted against measured seconds, a colour for each kind of work."""
    path, title = DOCS / "data" / "predictions.json", "Predicted against measured"
    if not path.is_file():
        return charts.empty(title, f"docs/data/{path.name} is not there yet: make bench writes it")
    by_kind: dict[str, list[tuple[float, float]]] = {}
    for point in json.loads(path.read_text(encoding="utf-8"))["points"]:
        by_kind.setdefault(point["kind"], []).append((point["measured_seconds"], point["predicted_seconds"]))
    return charts.scatter(title, "measured", "predicted", list(by_kind.items()))


def loss_curves(name: str, title: str, made_by: str) -> str:
    """Draw the loss of each step on several meshes, of a file in docs/data/."""
    path = DOCS / "data" / name
    if not path.is_file():
        return charts.empty(title, f"docs/data/{name} is not there: {made_by} writes it")
    data = json.loads(path.read_text(encoding="utf-8"))
    curves = [(name, losses) for name, losses in data["losses"].items()]
    furthest = max(max(step) - min(step) for step in zip(*(losses for _, losses in curves)))
    note = f"{data['model']}, {data['dtype']}; the curves differ by {furthest:.1g} at most"
    return charts.lines(title, "step", "loss", curves, note)


def coverage() -> str:
    """Draw, by task, the share of types that are right on all meshes, of those that build, with each transformers."""
    text = (DOCS / "coverage.md").read_text(encoding="utf-8")
    tasks: dict[str, None] = {}
    series = []
    for section in re.split(r"(?m)^## (?=transformers )", text)[1:]:
        rows = next(table for table in tables(section) if "right on all" in table[0])
        shares = {row["task"]: int(row["right on all"].split()[0]) / max(1, int(row["built"])) for row in rows}
        series.append((section.split("\n", 1)[0].strip(), shares))
        tasks |= dict.fromkeys(shares)
    titled = [(name, [shares.get(task) for task in tasks]) for name, shares in series]
    return charts.grouped_bars("Model types right on all of four meshes", list(tasks), titled)
