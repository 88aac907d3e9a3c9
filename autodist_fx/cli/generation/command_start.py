"""Finds when the command that a user typed began, also in the
ranks that it started: "ready in" counts from that time."""

from __future__ import annotations

import os
import time
from pathlib import Path

VARIABLE = "ADX_COMMAND_STARTED"  # seconds of the machine's monotonic clock, which all of its processes share
_IMPORTED = time.monotonic()


def command_started() -> float:
    """Return the seconds of `time.monotonic` at which the command
    began; in a rank, at which the process that started it did."""
    said = os.environ.get(VARIABLE, "")
    try:
        return float(said)
    except ValueError:
        return process_started()


def process_started() -> float:
    """Return the seconds of `time.monotonic` at which this process began.

    Where the system does not tell (anything but Linux), it returns those at which this file was imported.
    """
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        since_boot = ticks / os.sysconf("SC_CLK_TCK")
        return since_boot - time.clock_gettime(time.CLOCK_BOOTTIME) + time.monotonic()
    except (OSError, ValueError, IndexError, AttributeError):
        return _IMPORTED
