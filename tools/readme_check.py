"""Runs the marked commands of README.md and compares what they print with what stands there.

A block is marked by a comment in front of it; what may vary is named there, and nowhere else:

    <!-- readme-check, varies: \\d+ ms -->
    ```console
    $ command
    what it prints
    ...
    ```

A line that is "..." stands for any lines, or none. `python tools/readme_check.py [FILE ...]`; exit code 1 where
anything differs.
"""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(r"^<!-- readme-check(?:, varies: (?P<varies>.+?))? -->\n```\w*\n(?P<body>.*?)^```$", re.M | re.S)
ANYTHING = "..."
TIMEOUT_SECONDS = 900


@dataclass(frozen=True, slots=True)
class Block:
    """A command and what it is to print; `varies` matches what may differ, None where nothing may."""

    command: str
    expected: tuple[str, ...]
    varies: re.Pattern[str] | None

    def plain(self, lines: Sequence[str]) -> list[str]:
        """Return lines in which what may vary is replaced by a mark, and blanks at their ends are gone."""
        return [(self.varies.sub("~", line) if self.varies else line).rstrip() for line in lines]


def blocks_of(text: str) -> Iterator[Block]:
    """Yield the commands of a document's marked blocks; one block may have several. Raises ValueError for a block that
    begins with no command."""
    for found in MARK.finditer(text):
        varies = re.compile(found["varies"]) if found["varies"] else None
        first, *parts = re.split(r"(?m)^\$ ", found["body"])
        if first or not parts:
            raise ValueError(f"a marked block begins with no command: {found['body']!r}")
        for part in parts:
            command, *expected = part.rstrip("\n").split("\n")
            yield Block(command, tuple(expected), varies)


def agrees(expected: Sequence[str], printed: Sequence[str]) -> bool:
    """Return whether lines match, where "..." stands for any lines."""
    if not expected:
        return not printed
    if expected[0] == ANYTHING:
        return any(agrees(expected[1:], printed[n:]) for n in range(len(printed) + 1))
    return bool(printed) and expected[0] == printed[0] and agrees(expected[1:], printed[1:])


def difference(block: Block, output: str) -> str:
    """Return how the output differs from what the block says; "" where it does not."""
    expected, printed = block.plain(block.expected), block.plain(output.rstrip("\n").split("\n"))
    if agrees(expected, printed):
        return ""
    return "\n".join(difflib.unified_diff(expected, printed, "written", "printed", lineterm="", n=1))


def stale_figures(readme: str, benchmarks: str) -> list[str]:
    """Return the figures of the README's row of measurements that are no medians in the benchmarks' page."""
    row = re.search(r"(?m)^\| decode, .*$", readme)
    figures = re.findall(r"(?<![\d.])\d+\.\d(?![\d.])", row[0]) if row else ["the row itself"]
    return [figure for figure in figures if f" {figure} (" not in benchmarks]


def run(command: str, home: str) -> str:
    """Run a command as a user with nothing kept yet would, and return its standard output."""
    environment = {**os.environ, "HF_HOME": home, "COLUMNS": "120", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
    for name in ("ADX_CACHE", "ADX_HARDWARE"):
        environment.pop(name, None)
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=TIMEOUT_SECONDS, cwd=ROOT
    )
    return done.stdout if done.returncode == 0 else f"{done.stdout}exit code {done.returncode}\n{done.stderr}"


def main(paths: Sequence[str]) -> int:
    """Check the documents; return the exit code."""
    wrong = 0
    if stale := stale_figures((ROOT / "README.md").read_text(), (ROOT / "docs" / "benchmarks.md").read_text()):
        print(f"DIFFERS          README.md, decode: docs/benchmarks.md has no {', '.join(stale)}")
        wrong += 1
    for path in paths or [str(ROOT / "README.md")]:
        blocks = list(blocks_of(Path(path).read_text(encoding="utf-8")))
        if not blocks:
            print(f"{path}: no block is marked")
            wrong += 1
        for block in blocks:
            with tempfile.TemporaryDirectory() as home:
                began = time.perf_counter()
                differs = difference(block, run(block.command, home))
            print(f"{'DIFFERS' if differs else 'same':<8} {time.perf_counter() - began:5.1f} s  $ {block.command}")
            if differs:
                print(differs)
                wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
