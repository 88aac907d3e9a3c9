"""`make readme-check` finds what differs, and lets nothing vary that is not marked."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.readme_check import blocks_of, difference, stale_figures

ROOT = Path(__file__).resolve().parents[2]
TEXT = """
<!-- readme-check, varies: \\d+(\\.\\d+)? (s|ms) -->
```console
$ say --tokens 8
ready in 7.8 s; 46.0 ms a token; 8 tokens
...
the end
```
"""


@pytest.mark.parametrize(
    ("output", "is_same"),
    [
        ("ready in 12 s; 1.5 ms a token; 8 tokens\nthe end\n", True),
        ("ready in 12 s; 1.5 ms a token; 8 tokens\nmore\nand more\nthe end\n", True),
        ("ready in 12 s; 1.5 ms a token; 9 tokens\nthe end\n", False),
        ("ready in 12 s; 1.5 ms a token; 8 tokens\n", False),
        ("ready in 12 s; 1.5 ms a token; 8 tokens\nthe end\nand more\n", False),
        ("", False),
    ],
)
def test_what_differs(output: str, is_same: bool) -> None:
    (block,) = blocks_of(TEXT)
    assert block.command == "say --tokens 8"
    assert (difference(block, output) == "") == is_same


def test_nothing_varies_that_is_not_marked() -> None:
    (block,) = blocks_of(TEXT.replace(", varies: \\d+(\\.\\d+)? (s|ms)", ""))
    assert difference(block, "ready in 7.8 s; 46.0 ms a token; 8 tokens\nthe end\n") == ""
    assert "+ready in 7.9 s" in difference(block, "ready in 7.9 s; 46.0 ms a token; 8 tokens\nthe end\n")


def test_the_readme_has_marked_blocks_and_the_test_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [block.command.split()[:2] for block in blocks_of(text)] == [["autodist-fx", "plan"], ["autodist-fx", "run"]]
    assert "\n    make test " in text and "make test " in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_a_figure_that_was_measured_otherwise_is_named() -> None:
    row = "| decode, tp=2 | **40.0 tokens/s** | 11.8 (4.57.6) | 16.3 |"
    table = "| a | 40.0 (36 to 41) | 11.8 (11 to 12) |"
    assert stale_figures(row, table) == ["16.3"]
    assert stale_figures(row, table + " 16.3 (15 to 17) |") == []
    assert stale_figures("no row", table) != []
