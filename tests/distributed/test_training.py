"""An engine over real processes."""

import pytest

from tests.support.processes import WORKERS, run_ranks

pytestmark = pytest.mark.distributed


@pytest.mark.one_for_each()
@pytest.mark.parametrize(("tp", "pp", "dp"), [(1, 2, 2), (2, 1, 2), (2, 2, 1)])
def test_steps_are_those_of_one_process(tp: int, pp: int, dp: int) -> None:
    run_ranks(tp * pp * dp, WORKERS / "training_worker.py", tp, pp, dp, timeout=120)
