"""Real processes over Gloo."""

import subprocess
import sys

import pytest

from tests.support.processes import ENV, WORKERS

pytestmark = pytest.mark.distributed


def run_workers(ranks: int, worker: str, *arguments: str) -> None:
    command = [sys.executable, str(WORKERS / "launch_worker.py"), str(ranks), worker, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENV)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "all well\n"


@pytest.mark.parametrize(("tp", "pp"), [(3, 1), (2, 2)])
def test_what_it_computes(tp, pp):
    run_workers(tp * pp, "communicator_worker.py", str(tp), str(pp))


def test_a_backward_pass():
    run_workers(4, "gradients_worker.py")
