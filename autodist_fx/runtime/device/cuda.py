"""CUDA as a rank uses it: everything that the runtime asks of torch.cuda and of NCCL, and nothing else.

Copies between a GPU and main memory go through page-locked memory, without waiting where nobody needs the numbers yet;
a process group of NCCL's is bound to the rank's GPU from its start. Tests put a pretended GPU in the place of torch's
(tests/support/device) and hold what is called here, and in which order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from autodist_fx.errors import AutodistError

T = TypeVar("T")
_CYCLES = 2e9  # of a GPU's clock in a second, at most: fast ones have 1.98e9
_WARM_UPS = 2  # runs before a capture: libraries choose kernels and take workspaces in them, which no capture may


def visible_devices() -> int:
    """Return the number of CUDA devices that this process sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def claim(device: torch.device) -> None:
    """Make `device` this process's current one, before anything (NCCL, a stream) takes the current device for its
    own."""
    torch.cuda.set_device(device)


def identity(device: torch.device) -> str:
    """Return a name of a GPU that is the same in all processes, whatever number CUDA_VISIBLE_DEVICES gives it."""
    return str(torch.cuda.get_device_properties(device).uuid)


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `x` on `device`. From main memory it is copied through page-locked memory, in the stream's order: nobody
    waits, and `x` may be written at once."""
    if x.device.type != "cpu" or device.type == "cpu" or not x.numel():
        return x.to(device)
    return (x if x.is_pinned() else x.pin_memory()).to(device, non_blocking=True)


def to_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return tensors of one device in main memory, after one wait for all of them; those that are there stay as they
    are."""
    found, devices = [], []
    for x in tensors:
        if x.device.type == "cpu":
            found.append(x)
            continue
        found.append(torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True))
        devices.append(x.device)
    for device in dict.fromkeys(devices):
        torch.cuda.current_stream(device).synchronize()
    return found


def default_group_options(device: torch.device) -> dict[str, Any]:
    """Return init_process_group's arguments for ranks with a GPU each: the group is bound to this one, so that
    barriers and collectives of objects take it, and a GPU that cannot be reached is said at the start."""
    return {"backend": "cpu:gloo,cuda:nccl", "device_id": device}


def nccl_group(store: dist.Store, rank: int, size: int, timeout: timedelta, device: torch.device) -> Any:
    """Return a process group of NCCL's, connected, on `device`; work in it that takes longer than `timeout` ends with
    an error. Raises RuntimeError where the ranks cannot connect."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    group = dist.ProcessGroupNCCL(store, rank, size, options)
    group.eager_connect_single_device(device)
    return group


def queued_seconds(work: Callable[[], object], device: torch.device, launch_seconds: float) -> float:
    """Return the seconds that a GPU takes for what `work` launches, which takes the host `launch_seconds` at most: it
    begins when all is in the stream. `work` may not wait for the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        torch.cuda._sleep(int(launch_seconds * _CYCLES))
        start.record()
        work()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1e3


class Pool:
    """The memory that a rank's captured graphs share: what one leaves in it, the next may read, in the order of their
    capture."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._handle, self._stream = device, torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def capture(self, run: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Return (a function that does again what `run` does on the device, what `run` returned).

        `run` is called some times first: it may write what it writes twice. Afterwards its tensors stay where they
        are, and hold new numbers after each replay, computed of what is then in the tensors that `run` read. Other
        threads (NCCL's watchdog) may call CUDA meanwhile. Raises AutodistError for what a capture cannot hold: to wait
        for the device, to copy from memory that is not page-locked.
        """
        try:
            return self._capture(run)
        except RuntimeError as error:
            said = str(error).partition("\n")[0].rstrip(".")
            raise AutodistError(f"a CUDA graph cannot hold this step ({said}): generate without cuda_graphs") from error

    def _capture(self, run: Callable[[], T]) -> tuple[Callable[[], None], T]:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                run()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._handle, stream=self._stream, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result
