"""Real processes over Gloo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed
HERE = Path(__file__).parent


@pytest.mark.parametrize(("tp", "pp"), [(3, 1), (2, 2)])
def test_what_it_computes(tp, pp):
    command = [sys.executable, str(HERE / "launch_worker.py"), str(tp * pp), "communicator_worker.py", str(tp), str(pp)]
    env = {**os.environ, "PYTHONPATH": str(HERE.parent.parent)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "all well\n"
