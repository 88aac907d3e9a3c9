"""How long the ranks of a pipeline wait in a step of training, on each schedule: predicted, and measured.

pp=2, the 125M Llama shape, a thread a rank. What is predicted is `engine.estimate(batch).timeline`; what is measured,
`engine.idle_seconds()`: for how long a rank waits for what the other sends, and for the other's end.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shapes
import torch
from markdown_table import table
from processes import Ranks, answer, serve

ROWS, TOKENS, MICROBATCHES = 8, 128, 8
# Name -> stages of each rank.
SCHEDULES = {
    "gpipe": 1, "1f1b": 1, "interleaved_1f1b": 2, "interleaved_zero_bubble": 2, "zbv_zero_bubble": 2,
}  # fmt: skip
MOST_ERROR = 0.1  # of the idle time


@dataclass(frozen=True)
class Bubble:
    """A schedule's step, and the idle seconds of both ranks together: predicted and measured, medians."""

    schedule: str
    predicted_seconds: float
    seconds: float
    predicted_idle: float
    idle: float

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return self.predicted_idle / self.idle - 1


def run(rounds: int) -> list[Bubble]:
    """Train a step on each schedule."""
    found = []
    with tempfile.TemporaryDirectory(prefix="adx-bubbles-") as directory:
        path = Path(directory) / "model"
        shapes.write_checkpoint(shapes.bench_llama(), path)
        ranks = Ranks("run.py", ["--training-rank", "bubbles", str(path)], 2, 1, path.parent / "ranks.log")
        try:
            ranks.read()
            for name in SCHEDULES:
                found.append(_bubble(name, ranks.ask("measure", schedule=name, steps=rounds)))
                last = found[-1]
                print(f"bubbles, {name}: idle {last.idle:.2f} s, predicted {last.predicted_idle:.2f}", flush=True)
        finally:
            ranks.close()
    return found


def _bubble(name: str, answers: list[dict[str, Any]]) -> Bubble:
    """Put together what the ranks say: a step takes as long as the slower one, and idle seconds add up in each step."""
    seconds = statistics.median(map(max, zip(*(each["seconds"] for each in answers), strict=True)))
    idle = statistics.median(map(sum, zip(*(each["idle"] for each in answers), strict=True)))
    return Bubble(name, answers[0]["predicted_seconds"], seconds, answers[0]["predicted_idle"], idle)


def results_table(found: list[Bubble]) -> str:
    """Format the results as Markdown."""
    header = ["schedule", "step, s", "predicted, s", "idle, s (both ranks)", "predicted, s", "error", "wanted"]
    rows = [
        [
            b.schedule, f"{b.seconds:.2f}", f"{b.predicted_seconds:.2f}", f"{b.idle:.2f}", f"{b.predicted_idle:.2f}",
            f"{b.error:+.0%}", f"{MOST_ERROR:.0%}",
        ]
        for b in found
    ]  # fmt: skip
    return table(header, rows)


class BubbleRank:
    """One rank: makes an engine for each schedule that it is asked for."""

    def __init__(self) -> None:
        self._path = ""

    def build(self, path: str) -> dict[str, Any]:
        torch.set_num_threads(1)
        self._path = path
        return {}

    def measure(self, schedule: str, steps: int) -> dict[str, Any]:
        """Take some steps behind a first one; return their seconds and this rank's idle ones, and what is predicted."""
        import autodist_fx as adx

        engine = adx.train(
            self._path, pp=2, schedule=schedule, stages_per_rank=SCHEDULES[schedule], microbatches=MICROBATCHES,
            verify=False, device="cpu",
        )  # fmt: skip
        ids = torch.randint(0, 32000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
        batch, seconds, idle = {"input_ids": ids, "labels": ids}, [], []
        engine.step(batch)
        estimate = engine.estimate(batch)
        for _ in range(steps):
            start = time.perf_counter()
            engine.step(batch)
            seconds.append(time.perf_counter() - start)
            idle.append(engine.idle_seconds())
        predicted = sum(map(estimate.timeline.idle_seconds, range(2)))
        return {
            "seconds": seconds, "idle": idle, "predicted_seconds": estimate.seconds, "predicted_idle": predicted,
        }  # fmt: skip


def serve_rank(path: str) -> None:
    """Be one of the ranks."""
    rank = BubbleRank()
    answer(rank.build, path=path)
    serve({"measure": rank.measure})
