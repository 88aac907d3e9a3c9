"""Another distribution's `passes` in front of ours is named at import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def imported(*path: Path, cwd: Path) -> str:
    """Returns what importing autodist_fx says, with these folders in front of Python's path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-c", "import autodist_fx"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_package_of_another_distribution_is_named(tmp_path: Path) -> None:
    (tmp_path / "passes").mkdir()
    (tmp_path / "passes" / "__init__.py").touch()
    info = tmp_path / "compiler_lab-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: compiler-lab\nVersion: 1.0\n")
    (info / "top_level.txt").write_text("passes\n")
    said = imported(tmp_path, ROOT, cwd=tmp_path)
    assert said.count("RuntimeWarning") == 1
    assert f"autodist_fx's package passes is shadowed by {tmp_path / 'passes'} of the distribution compiler-lab" in said


def test_nothing_is_said_where_the_packages_are_ours(tmp_path: Path) -> None:
    assert imported(ROOT, cwd=tmp_path) == ""
