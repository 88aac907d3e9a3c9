"""The site's plots show the numbers of the tables that they are drawn from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tools.site import charts, plots

ROOT = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ElementTree.Element]:
    folder = tmp_path_factory.mktemp("plots")
    plots.write_plots(folder)
    return {path.stem: ElementTree.parse(path).getroot() for path in folder.glob("*.svg")}


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def test_bars_are_as_long_as_what_was_measured(drawn: dict[str, ElementTree.Element]) -> None:
    rows = re.findall(
        r"(?m)^\| (\S.*?) +\|(?:.*\|){3} +([\d.]+) \([^)]*\) +\| yes", (ROOT / "docs/benchmarks.md").read_text()
    )
    measured = {name: float(value) for name, value in rows}
    assert len(measured) >= 5
    root = drawn["decode"]
    widths = [float(bar.get("width", "")) for bar in root.iter(f"{SVG}rect") if bar.get("height") == "20"]
    assert [text for text in texts(root) if text in measured] == list(measured)
    for width, value in zip(widths, measured.values(), strict=True):
        assert width / widths[0] == pytest.approx(value / next(iter(measured.values())), abs=0.01)
    ours, others = next(iter(root.iter(f"{SVG}rect"))), list(root.iter(f"{SVG}rect"))[1:]
    coloured = [bar.get("fill") for bar in others].count(charts.COLOURS[0])
    assert ours.get("fill") == "#fff" and coloured == sum(name.startswith(plots.OURS) for name in measured)


def test_nothing_is_drawn_beyond_the_card(drawn: dict[str, ElementTree.Element]) -> None:
    for name, root in drawn.items():
        height = float(root.get("viewBox", "").split()[3])
        for element in root.iter():
            for key, most in (("x", charts.WIDTH), ("y", height), ("cx", charts.WIDTH), ("cy", height)):
                assert 0 <= float(element.get(key, 0)) <= most, (name, element.attrib)
        for bar in root.iter(f"{SVG}rect"):
            assert float(bar.get("x", 0)) + float(bar.get("width", 0)) <= charts.WIDTH


def test_curves_say_how_far_they_are_apart(drawn: dict[str, ElementTree.Element]) -> None:
    data = json.loads((ROOT / "docs/data/loss_curves.json").read_text())
    curves = list(data["losses"].values())
    apart = max(abs(a[i] - b[i]) for a in curves for b in curves for i in range(data["steps"]))
    assert any(f"differ by {apart:.1g} at most" in text for text in texts(drawn["loss_curves"]))
    assert len(list(drawn["loss_curves"].iter(f"{SVG}polyline"))) == len(curves)


def test_points_lie_on_the_diagonal_where_the_prediction_is_right() -> None:
    points = [(0.001, 0.001), (0.02, 0.02), (3.0, 3.0)]
    root = ElementTree.fromstring(charts.scatter("t", "measured", "predicted", [("decode", points)]))
    dots = [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in root.iter(f"{SVG}circle")]
    assert len({round(x + y, 1) for x, y in dots}) == 1 and dots == sorted(dots)
