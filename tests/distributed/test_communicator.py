"""Real processes over Gloo."""

import subprocess
import sys

import pytest

from tests.support.processes import ENV, WORKERS, run_ranks

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(("tp", "pp"), [(3, 1), (2, 2)])
def test_what_it_computes(tp, pp):
    run_ranks(tp * pp, WORKERS / "communicator_worker.py", tp, pp, timeout=120)


def test_a_backward_pass_under_the_launcher():
    command = [sys.executable, str(WORKERS / "launch_worker.py"), "--fork", "4", "gradients_worker.py"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENV)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "all well\n"
