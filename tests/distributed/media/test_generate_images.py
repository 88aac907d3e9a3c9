"""Real processes over Gloo, two ranks: questions about images and sounds are answered with the tokens of one process.

One image, rows with several and without, text alone, beams. LLaVA's kin have a graph for any image of its size; Qwen-VL
counts positions along height and width of each, and has a graph for each size.
"""

from __future__ import annotations

import pytest

from tests.support.media.images import FAMILIES
from tests.support.processes import WORKERS, run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.drawn(1)
@pytest.mark.parametrize("tp, pp", [(2, 1), (1, 2)], ids=["tp", "pp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_on_two_ranks(family: str, tp: int, pp: int) -> None:
    run_ranks(2, WORKERS / "media" / "images_worker.py", tp, pp, family)
