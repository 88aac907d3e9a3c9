"""Memory for large tensors on the CPU in pages of 2 MiB, where Linux gives them (transparent_hugepage: madvise).

A page of 4 KiB is some 1 to 2 us to have in a virtual machine: 40 ms for the logits of 4 x 128 tokens, which take 7 to
write. And such a tensor's memory is the system's again when nothing holds it, where the heap would keep it.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Sequence

import torch

_LARGE_BYTES = 4 * 1024 * 1024  # below, the heap has memory that it has used before
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)


def empty_large(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialised tensor on the CPU."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _LARGE_BYTES or _ADVICE is None:
        return torch.empty(tuple(shape), dtype=dtype)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # which the tensor keeps alive
    with contextlib.suppress(OSError):  # a kernel without such pages
        memory.madvise(_ADVICE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(tuple(shape))


def give_back_freed() -> None:
    """Give the system what the heap has free, where it is glibc's (malloc_trim); what is held stays where it is."""
    with contextlib.suppress(OSError, AttributeError):  # no libc to be loaded by name, or one without that
        ctypes.CDLL(None).malloc_trim(0)
