"""A step of training against other ways to train on the same two ranks, in turns.

The 125M Llama shape of shapes.py, float32, AdamW (fused), one thread a rank. All start from one checkpoint and see the
same rows, so that their losses are the same at each step.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import shapes
import torch
from contenders import training
from markdown_table import table
from processes import RankError, Ranks, answer, serve

VOCABULARY, MOST_LOSS_ERROR = 32000, 2e-4
STEPS = 2  # a round


@dataclass(frozen=True)
class Other:
    """Another way to train, and how many times as fast ours is to be."""

    name: str
    title: str
    wanted: float


@dataclass
class Group:
    """Ways to train on one kind of mesh: ours, the others, and the seconds of a step in each round, by name."""

    title: str
    ours: str
    rows: int
    tokens: int
    others: tuple[Other, ...]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """Whether all have the same losses, up to rounding."""
        return all(
            max(step) - min(step) <= MOST_LOSS_ERROR * max(step) for step in zip(*self.losses.values(), strict=True)
        )


def groups() -> list[Group]:
    """The comparisons that are made."""
    hand_made = Other("megatron_tp", "hand-written Megatron-style, vocabulary-parallel loss", 1.05)
    return [
        Group("tp=2", "ours_tp", 4, 128, (Other("transformers_tp", 'transformers tp_plan="auto"', 1.3), hand_made)),
        Group("pp=2, 4 microbatches", "ours_pp", 8, 128, (Other("torch_1f1b", "torch's Schedule1F1B", 1.15),)),
        Group("dp=2", "ours_dp", 4, 128, (Other("ddp", "torch's DistributedDataParallel", 1.0),)),
    ]


def run(rounds: int) -> list[Group]:
    """Train in all ways, those of one group in turns."""
    found = groups()
    with tempfile.TemporaryDirectory(prefix="adx-training-") as directory:
        path = Path(directory) / "model"
        shapes.write_checkpoint(shapes.bench_llama(), path)
        for group in found:
            _run(group, path, rounds)
    return found


def _run(group: Group, path: Path, rounds: int) -> None:
    with contextlib.ExitStack() as stack:
        alive: dict[str, Ranks] = {}
        for name in (group.ours, *(other.name for other in group.others)):
            ranks = Ranks("run.py", ["--training-rank", name, str(path)], 2, 1, path.parent / f"{name}.log")
            stack.callback(ranks.close)
            try:
                ranks.read()
                alive[name] = ranks
                _step(group, name, ranks, -1)  # programs are made at the first step
                group.seconds[name].clear()
            except RankError as error:
                alive.pop(name, None)
                group.errors[name] = str(error)
        for number in range(rounds):
            order = list(alive)
            for name in order[number % len(order) :] + order[: number % len(order)]:
                _step(group, name, alive[name], number)
            said = ", ".join(f"{name} {group.seconds[name][-1]:.2f} s" for name in alive)
            print(f"training, {group.title}, round {number + 1} of {rounds}: {said}", flush=True)


def _step(group: Group, name: str, ranks: Ranks, number: int) -> None:
    answers = ranks.ask("train", rows=group.rows, tokens=group.tokens, first=STEPS * (number + 1), steps=STEPS)
    group.seconds.setdefault(name, []).append(max(each["seconds"] for each in answers))
    group.losses.setdefault(name, []).extend(answers[-1]["losses"])


def results_table(found: list[Group]) -> str:
    """Format the results as Markdown: seconds a step, and how many times as fast ours is."""
    rows = []
    for group in found:
        ours = group.seconds.get(group.ours, [])
        for other in group.others:
            theirs = group.seconds.get(other.name, [])
            ratios = [a / b for a, b in zip(theirs, ours)]
            spread = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else "-"
            seconds = [f"{statistics.median(each):.2f}" if each else "-" for each in (ours, theirs)]
            failed = group.errors.get(group.ours) or group.errors.get(other.name)
            same = failed or ("yes" if group.agrees else "**no**")
            rows.append([
                f"{group.title}, {group.rows} x {group.tokens}", other.title, *seconds, spread, f"{other.wanted:.2f}x",
                same,
            ])  # fmt: skip
    return table(["", "against", "ours, s", "theirs, s", "theirs / ours", "wanted", "same losses"], rows)


class TrainingRank:
    """One rank of one way to train."""

    def __init__(self) -> None:
        self._way: Any = None

    def build(self, name: str, path: str) -> dict[str, Any]:
        torch.set_num_threads(1)
        self._way = training.build(name, path)
        return {}

    def train(self, rows: int, tokens: int, first: int, steps: int) -> dict[str, Any]:
        """Take some steps, each on rows of its own; return the median of their seconds, and their losses."""
        seconds, losses = [], []
        for step in range(first, first + steps):
            ids = torch.randint(0, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(step))
            start = time.perf_counter()
            losses.append(self._way.step(ids))
            seconds.append(time.perf_counter() - start)
        return {"seconds": statistics.median(seconds), "losses": losses}


def serve_rank(name: str, path: str) -> None:
    """Be one of the ranks, of a checkpoint's model."""
    rank = TrainingRank()
    answer(rank.build, name=name, path=path)
    serve({"train": rank.train})
