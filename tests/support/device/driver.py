"""torch.cuda and NCCL as a pretended GPU has them: each call is written down, and does what it says.

A process group of NCCL's is one of Gloo's that takes tensors of the device alone and, as NCCL, knows no channels. A
captured graph is the recorded call: replayed, it runs again, and its new results are written over those of its capture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from autodist_fx.runtime.device import cuda
from tests.support.device.pretended import Events, OnDevice, pretended_cuda

_GLOO, _INIT = dist.ProcessGroupGloo, dist.init_process_group


@dataclass
class Driver:
    """The calls in order, as texts, and the events of the device (pretended.py). `uuid` names this process's GPU."""

    uuid: str
    events: Events
    calls: list[str] = field(default_factory=list)

    def note(self, call: str, result: Any = None) -> Any:
        self.calls.append(call)
        return result


@contextlib.contextmanager
def driver(uuid: str = "GPU-0", devices: int = 1) -> Iterator[Driver]:
    """Lets this process have a GPU, all of torch.cuda that the runtime calls, and NCCL."""
    with pretended_cuda(devices) as events, contextlib.ExitStack() as patches:
        made = Driver(uuid, events)
        for name, function in _cuda(made).items():
            patches.enter_context(mock.patch.object(torch.cuda, name, function))
        patches.enter_context(mock.patch.object(dist, "ProcessGroupNCCL", _nccl(made), create=True))
        patches.enter_context(mock.patch.object(dist, "init_process_group", _init(made)))
        patches.enter_context(mock.patch.object(cuda.Pool, "_capture", _capture(made)))
        yield made


def _cuda(made: Driver) -> dict[str, Any]:
    def stream(*device: Any) -> Any:
        return SimpleNamespace(synchronize=lambda: made.note("stream.synchronize"))

    return {
        "set_device": lambda device: made.note(f"set_device {device}"),
        "get_device_properties": lambda device: made.note("properties", SimpleNamespace(uuid=made.uuid)),
        "current_stream": stream,
        "Stream": stream,
        "graph_pool_handle": lambda: made.note("graph_pool_handle", (0, 1)),
    }


def _init(made: Driver) -> Callable[..., None]:
    def init_process_group(*, backend: str, device_id: Any = None, **options: Any) -> None:
        seconds = options["timeout"].total_seconds()
        made.note(f"init_process_group {backend} device_id={device_id} timeout={seconds:g}")
        _INIT(backend="gloo", **options)

    return init_process_group


def _nccl(made: Driver) -> type:
    class Group:
        """A process group of NCCL's."""

        class Options:
            _timeout = timedelta(minutes=10)

        def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
            self._inner = _GLOO(store, rank, size, timeout=options._timeout)
            made.note(f"ProcessGroupNCCL of {size} timeout={options._timeout.total_seconds():g}")

        def eager_connect_single_device(self, device: torch.device) -> None:
            made.note(f"connect {device}")

        def allreduce(self, tensors: list[OnDevice], options: Any) -> Any:
            return made.note("allreduce", self._inner.allreduce([x.held for x in tensors], options))

        def send(self, tensors: list[OnDevice], to: int, channel: int) -> Any:
            return made.note("send", self._inner.send([x.held for x in tensors], to, 0))

        def recv(self, tensors: list[OnDevice], source: int, channel: int) -> Any:
            return made.note("recv", self._inner.recv([x.held for x in tensors], source, 0))

        def _allgather_base(self, whole: OnDevice, part: OnDevice) -> Any:
            return made.note("allgather", self._inner._allgather_base(whole.held, part.held))

        def abort(self) -> None:
            made.note("abort")

    return Group


def _capture(made: Driver) -> Callable[[cuda.Pool, Callable[[], Any]], tuple[Callable[[], None], Any]]:
    """Returns what stands for Pool._capture: it calls `run` as often, and once more at each replay. A GPU's would
    refuse to wait for it meanwhile, or to copy from memory that is not page-locked; so does this one."""

    def capture(pool: cuda.Pool, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        run(), run()
        before = len(made.events.seen)
        result = made.note("capture", run())
        refused = made.events.seen[before:]
        if refused:
            raise RuntimeError(f"a stream that is captured cannot do this: {refused[0]}")

        def replay() -> None:
            made.note("replay")
            for old, new in zip(_tensors(result), _tensors(run()), strict=True):
                old.copy_(new)

        return replay, result

    return capture


def _tensors(found: Any) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(found) if isinstance(x, torch.Tensor)]
