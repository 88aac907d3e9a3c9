"""An engine over real processes."""

from pathlib import Path

import pytest

from tests.support.processes import WORKERS, run_ranks

pytestmark = pytest.mark.distributed


@pytest.mark.one_for_each()
@pytest.mark.parametrize(
    ("tp", "pp", "dp", "schedule"),
    [(1, 2, 2, "1f1b"), (2, 1, 2, "1f1b"), (2, 2, 1, "zbv_zero_bubble"), (1, 2, 2, "interleaved_1f1b")],
)
def test_steps_are_those_of_one_process(tp: int, pp: int, dp: int, schedule: str, tmp_path: Path) -> None:
    """And those of another mesh that goes on with what was saved."""
    run_ranks(tp * pp * dp, WORKERS / "training_worker.py", tp, pp, dp, schedule, tmp_path, timeout=120)
