"""Families over meshes and schedules, as real processes: five steps are those of one process, to 1e-9 in float64."""

import json
from typing import Any

import pytest

from tests.support.processes import WORKERS, run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "llama-tp": ("llama", 2, {"tp": 2}),
    "qwen3-pp": ("qwen3", 2, {"pp": 2, "schedule": "gpipe"}),
    "gpt2-dp": ("gpt2", 2, {"dp": 2, "zero_stage": 1}),
    "bert-dp": ("bert", 1, {"dp": 2, "microbatches": 1}),
    "llama-tp-pp": ("llama", 2, {"tp": 2, "pp": 2, "schedule": "1f1b"}),
    "mixtral-tp-pp": ("mixtral", 2, {"tp": 2, "pp": 2, "schedule": "interleaved_zero_bubble", "stages_per_rank": 1,
                                   "recompute": "layers"}),
    "t5-tp-dp": ("t5", 1, {"tp": 2, "dp": 2, "zero_stage": 1, "recompute": "layers"}),
    "mixtral-tp-dp": ("mixtral", 1, {"tp": 2, "dp": 2}),
    "gemma3-pp-dp": ("gemma3_text", 2, {"pp": 2, "dp": 2, "schedule": "1f1b", "zero_stage": 1}),
    "phi3-pp-dp": ("phi3", 4, {"pp": 2, "dp": 2, "schedule": "interleaved_1f1b", "zero_stage": 1}),
    "gpt2-pp": ("gpt2", 4, {"pp": 2, "schedule": "zbv_zero_bubble"}),
    "llama-tp-pp-dp": ("llama", 2, {"tp": 2, "pp": 2, "dp": 2, "zero_stage": 1, "recompute": "layers"}),
}  # fmt: skip


@pytest.mark.drawn(1)
@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_one_process(name: str) -> None:
    family, layers, keywords = CASES[name]
    ranks = keywords.get("tp", 1) * keywords.get("pp", 1) * keywords.get("dp", 1)
    run_ranks(ranks, WORKERS / "training" / "families_worker.py", family, layers, json.dumps(keywords), timeout=280)
