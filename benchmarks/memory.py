"""Memory and bytes read of this process, from Linux's /proc."""

import contextlib
import os
from pathlib import Path


def _field(file: str, name: str) -> int:
    for line in Path(file).read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise KeyError(f"{name} in {file}")


def peak_rss_bytes() -> int:
    """The highest RSS of this program so far.

    Not `ru_maxrss`: that also counts what the parent held between fork and exec, so it differs with who starts us.
    """
    return _field("/proc/self/status", "VmHWM") * 1024


def reset_peak_rss() -> int:
    """Start the peak again from the current RSS, and return it; where the kernel forbids that, the peak so far."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_rss_bytes()


def drop_from_page_cache(file: Path) -> None:
    """Let the next reader of the file read it from the disk, so that the kernel counts its bytes."""
    with file.open("rb") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_bytes() -> dict[str, int]:
    """`read`: bytes through read(2) and its like, also from the page cache; `disk`: bytes fetched from the disk.

    What is read through a mapping is in `disk` only, with read-ahead, and only if no other process fetched it first.
    """
    return {"read": _field("/proc/self/io", "rchar"), "disk": _field("/proc/self/io", "read_bytes")}
