"""Chooses how many microbatches a call is run in, by the plan's own costs: the same number on all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from autodist_fx.runtime.microbatches.divided_call import spans
from cost_model.schedule.fill import Filling, best_filling, pipeline_seconds, round_seconds


class StageSeconds(Protocol):
    """The predicted seconds of each stage's pass."""

    def __call__(self, sizes: Mapping[str, int], /, *, at_once: bool = False) -> Sequence[float]:
        """Return the seconds by stage, at lengths by size symbol ("B", "S", "P"); `at_once`: while all stages
        compute."""


def by_rows(stage_seconds: StageSeconds, sizes: Mapping[str, int]) -> Filling:
    """Return how many microbatches a batch is best run in."""
    return best_filling(lambda count: pipeline_seconds(_rows(stage_seconds, sizes, count)), sizes["B"])


def by_groups(
    stage_seconds: StageSeconds, prompt: Mapping[str, int], step: Mapping[str, int], steps: int, expanded: int = 1
) -> Filling:
    """Return in how many groups of rows a batch is best generated: a pass over its `prompt`, then so many `steps` at
    the sizes of `step`, of `expanded` rows for each of the batch (beams)."""

    def seconds(count: int) -> float:
        first = pipeline_seconds(_rows(stage_seconds, prompt, count))
        return first + (steps * round_seconds(_rows(stage_seconds, step, count, expanded)) if steps else 0.0)

    return best_filling(seconds, prompt["B"])


def by_tokens(stage_seconds: StageSeconds, sizes: Mapping[str, int], least: int) -> Filling:
    """Return in how many chunks of `least` tokens or more a prompt is best run."""

    def seconds(count: int) -> float:
        past = sizes.get("P", 0)
        return pipeline_seconds([
            stage_seconds({**sizes, "S": stop - start, "P": past + start}, at_once=count > 1)
            for start, stop in spans(sizes["S"], count)
        ])  # fmt: skip

    return best_filling(seconds, max(1, sizes["S"] // least))


def _rows(
    stage_seconds: StageSeconds, sizes: Mapping[str, int], count: int, expanded: int = 1
) -> list[Sequence[float]]:
    """Return the seconds of each of `count` parts of the rows, by stage."""
    return [
        stage_seconds({**sizes, "B": (stop - start) * expanded}, at_once=count > 1)
        for start, stop in spans(sizes["B"], count)
    ]
