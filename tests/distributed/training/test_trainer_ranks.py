"""transformers' Trainer over an engine, in two processes."""

from pathlib import Path

import pytest

from tests.support.processes import WORKERS, run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_a_curve_is_that_of_one_process(tmp_path: Path) -> None:
    run_ranks(2, WORKERS / "training" / "trainer_worker.py", tmp_path, timeout=120)
