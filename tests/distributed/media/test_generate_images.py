"""Real processes over Gloo, two ranks: questions about images are answered with the tokens of one process.

LLaVA has a graph for any image of its size; Qwen2-VL counts positions along height and width of each, and has a graph
for each size. One image, rows with several and without, text alone, beams.
"""

from __future__ import annotations

import pytest

from tests.support.processes import WORKERS, run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize("tp, pp, family", [(2, 1, "llava"), (1, 2, "qwen2_vl")])
def test_same_tokens_on_two_ranks(tp: int, pp: int, family: str) -> None:
    run_ranks(2, WORKERS / "media" / "images_worker.py", tp, pp, family)
