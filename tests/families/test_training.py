"""Families over meshes and schedules in training: five steps of AdamW with clipping and accumulation, of batches of two
lengths, are those of one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.float64 import in_float64
from tests.support.training.families import task
from tests.support.training.one_process import check_training

FAMILIES = ("llama", "qwen3", "gemma3_text", "gpt2", "phi3", "mixtral", "deepseek_v3", "t5", "bert")
MESHES = ((2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2), (3, 1, 1), (1, 3, 1))
# Name -> stages a rank.
SCHEDULES = {
    "gpipe": 1, "1f1b": 1, "interleaved_1f1b": 2, "interleaved_zero_bubble": 1, "zbv_zero_bubble": 2,
}  # fmt: skip


def cases() -> Iterator[Any]:
    for family in FAMILIES:
        for tp, pp, dp in MESHES:
            for schedule, stages in SCHEDULES.items() if pp > 1 else [("1f1b", 1)]:
                mesh = {"tp": tp, "pp": pp, "dp": dp, "schedule": schedule}
                name = f"{family}-{tp}x{pp}x{dp}" + (f"-{schedule}" if pp > 1 else "")
                yield pytest.param(family, {**mesh, "stages_per_rank": stages}, id=name)


@pytest.mark.slow
@pytest.mark.drawn(1)
@pytest.mark.parametrize(("family", "mesh"), list(cases()))
def test_five_steps_are_those_of_one_process(family: str, mesh: dict[str, Any]) -> None:
    layers = max(2, mesh["pp"] * mesh["stages_per_rank"])
    with in_float64():
        model, steps, count = task(family, layers, 5)
        check_training(model, steps, count, {**mesh, "microbatches": max(2, mesh["pp"])})
