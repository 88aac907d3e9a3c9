"""Reads this process's resident memory, now and at its peak."""

from __future__ import annotations

import resource
import sys


def rss_bytes() -> int:
    """Return the resident memory now, in bytes; 0 where the system does not tell (anything but Linux)."""
    return _status_bytes("VmRSS")


def peak_rss_bytes() -> int:
    """Return the most resident memory that this process ever had, in bytes.

    It reads VmHWM, not getrusage: on Linux a child's ru_maxrss starts at its parent's, so it would say nothing about a
    rank that a large process started.
    """
    peak = _status_bytes("VmHWM")
    if peak:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status_bytes(field: str) -> int:
    """Read one field of /proc/self/status; 0 where there is none."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith(f"{field}:"):
                    return int(line.split()[1]) * 1024  # "kB" there means KiB
    except OSError:
        pass
    return 0
