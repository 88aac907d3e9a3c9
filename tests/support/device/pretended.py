"""A pretended CUDA device: tensors that say they lie on "cuda:0" and have their numbers in main memory.

Where there is no GPU, code for one runs here wholly: it takes the branches that it takes there, gives numbers that can
be compared with the CPU's, and is refused what a GPU refuses, tensors of both devices in one op. The kernels alone are
the CPU's. (A fake tensor of torch's has no numbers: what a router chooses, how many elements a mask selects and what a
graph asks of values could not be run; and one that is on the CPU and has no dims would pass unseen.)

`pretended_cuda()` says what happened meanwhile: copies between the devices, waits for the device, and every op with a
tensor that is not on it, each with the line of a rank's graph that it was in.
"""

from __future__ import annotations

import contextlib
import linecache
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from autodist_fx.simulation.thread_communicator import ThreadCommunicator, ThreadWorld

aten = torch.ops.aten
DEVICE, CPU = torch.device("cuda:0"), torch.device("cpu")
# What a GPU is waited for by: the host has to know numbers, or how many there are.
_WAITS = (
    aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten.bincount, aten._unique2,
    aten.unique_dim, aten.unique_consecutive, aten.repeat_interleave,
)  # fmt: skip
_LOOKUPS = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)  # copy indices that are on the CPU


@dataclass(frozen=True, slots=True)
class Event:
    """An event of interest when code runs on a GPU. kind: "to device", "to host", "wait", or "host" for an op
    that a tensor in main memory, which has elements, takes part in. `line`: of the rank's graph that it happened in; ""
    outside of any."""

    kind: str
    op: str
    line: str = ""
    pinned: bool = False  # of a copy: the side in main memory is page-locked
    non_blocking: bool = False


@dataclass
class Events:
    """The events in order, and the memory that is page-locked."""

    seen: list[Event] = field(default_factory=list)
    pinned: dict[int, torch.Tensor] = field(default_factory=dict)  # by address, and kept: none is used again

    def pin(self, x: torch.Tensor) -> torch.Tensor:
        """Takes note that the memory of `x` is page-locked."""
        return self.pinned.setdefault(x.untyped_storage().data_ptr(), x)

    def is_pinned(self, x: torch.Tensor) -> bool:
        """Returns whether the memory that `x` is in is page-locked."""
        return x.untyped_storage().data_ptr() in self.pinned

    def of_graphs(self) -> list[Event]:
        """Returns what happened while a rank's graph ran."""
        return [event for event in self.seen if event.line]


class OnDevice(torch.Tensor):
    """A tensor on the pretended device; `held` has its numbers."""

    held: torch.Tensor
    events = Events()

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, layout=held.layout, device=DEVICE
        )

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"OnDevice({self.held})"

    # torch's own code for these asks CUDA for the current device, and a build for CPUs has none to ask.
    def __getitem__(self, index: Any) -> torch.Tensor:
        _note_index(index)
        with no_dispatch():
            return OnDevice(self.held[tree_map(_held, index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        _note_index(index)
        if isinstance(value, torch.Tensor) and not isinstance(value, OnDevice):
            _note(aten.copy_, [], [value], ())
        with no_dispatch():
            self.held[tree_map(_held, index)] = _held(value)

    def __invert__(self) -> torch.Tensor:
        return torch.bitwise_not(self)

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
        return self if self.held.is_contiguous(memory_format=memory_format) else self.clone(memory_format=memory_format)

    def copy_(self, other: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        return aten.copy_.default(self, other, non_blocking)

    def __bool__(self) -> bool:
        return bool(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __index__(self) -> int:
        return int(self.item())

    def item(self) -> Any:
        self.events.seen.append(Event("wait", "item", _graph_line()))
        return self.held.item()

    def tolist(self) -> Any:
        self.events.seen.append(Event("wait", "tolist", _graph_line()))
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, dict(kwargs or {}))


class _Mode(TorchDispatchMode):
    """Makes what factories make on the device, and sees ops that no tensor on the device takes part in."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, dict(kwargs or {}))

    def __enter__(self) -> Any:
        torch._C._ensureCUDADeviceGuardSet()
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # as FakeTensorMode: torch.tensor(..., device="cuda") is made here
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self._lifted)
        super().__exit__(*error)


@contextlib.contextmanager
def pretended_cuda(devices: int = 1) -> Iterator[Events]:
    """Lets this process have a CUDA device, in this thread and in those of simulated ranks; gives the events."""
    before, OnDevice.events = OnDevice.events, Events()
    run = ThreadWorld.run

    def run_on_device(world: ThreadWorld, work: Callable[[int, ThreadCommunicator], Any]) -> list[Any]:
        def of_rank(rank: int, communicator: ThreadCommunicator) -> Any:
            with _Mode():
                return work(rank, communicator)

        return run(world, of_rank)

    with (
        mock.patch.object(ThreadWorld, "run", run_on_device),
        mock.patch.object(torch.cuda, "_lazy_init", lambda: None),
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.cuda, "device_count", lambda: devices),
        _Mode(),
    ):
        try:
            yield OnDevice.events
        finally:
            OnDevice.events = before


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    packet = func.overloadpacket
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    there = [x for x in given if isinstance(x, OnDevice)]
    host = [x for x in given if not isinstance(x, OnDevice) and not x.is_meta]
    device = kwargs.get("device")
    to_device = _is_cuda(device) if device is not None else bool(there)
    if packet is aten._fused_sdp_choice:
        return 0  # products and a softmax: the fused kernels of a GPU have no like here
    if packet in (aten.is_pinned, aten._pin_memory, aten.pin_memory):
        return _pinned(packet, args[0])
    if packet in (aten._to_copy, aten.copy_):
        _note_copy(packet, args, kwargs)
    else:
        _note(packet, there, host, args)
        if there and host:
            _refuse_mixed(func, packet, host, args)
    if device is not None:
        kwargs["device"] = CPU if _is_cuda(device) else device
    pin = kwargs.pop("pin_memory", None)
    held_args, held_kwargs = tree_map(_held, (tuple(args), kwargs))
    result = func(*held_args, **held_kwargs)
    for x in there:
        if x.held.shape != x.shape or x.held.stride() != x.stride():
            _reshape(x)
    wrappers = {id(x.held): x for x in there}
    to_device = isinstance(args[0], OnDevice) if packet is aten.copy_ else to_device

    def out(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) in wrappers:
            return wrappers[id(x)]
        if pin:
            OnDevice.events.pin(x)
        if not to_device and not x.is_meta:
            _note(packet, [], [x], ())
        return OnDevice(x) if to_device and not x.is_meta else x

    return tree_map(out, result)


def _reshape(x: OnDevice) -> None:
    """Gives a tensor the shape and strides of what it holds, which an op has changed in place."""
    before = torch._C._meta_in_tls_dispatch_include()
    torch._C._set_meta_in_tls_dispatch_include(True)  # as torch.utils._python_dispatch does for such ops
    try:
        with no_dispatch():
            aten.as_strided_.default(x, x.held.size(), x.held.stride(), x.held.storage_offset())
    finally:
        torch._C._set_meta_in_tls_dispatch_include(before)


def _is_cuda(device: Any) -> bool:
    return torch.device(device).type == "cuda"


def _held(x: Any) -> Any:
    return x.held if isinstance(x, OnDevice) else x


def _pinned(packet: Any, x: torch.Tensor) -> Any:
    if packet is aten.is_pinned:
        return not isinstance(x, OnDevice) and OnDevice.events.is_pinned(x)
    assert not isinstance(x, OnDevice), "cannot pin memory of the device: only dense CPU tensors can be pinned"
    return OnDevice.events.pin(x.clone())


def _note_copy(packet: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    if packet is aten.copy_:
        target, source = isinstance(args[0], OnDevice), isinstance(args[1], OnDevice)
        main = args[1] if target else args[0]
        non_blocking = bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking"))
    else:
        device, source = kwargs.get("device"), isinstance(args[0], OnDevice)
        target = source if device is None else _is_cuda(device)
        main, non_blocking = args[0], bool(kwargs.get("non_blocking"))
    if target is source:
        if not target:
            _note(packet, [], [args[0]], ())
        return
    pinned = bool(kwargs.get("pin_memory")) or (not isinstance(main, OnDevice) and OnDevice.events.is_pinned(main))
    if not args[0].numel():
        return
    kind = "to device" if target else "to host"
    OnDevice.events.seen.append(Event(kind, str(packet), _graph_line(), pinned, non_blocking))


def _note(packet: Any, there: Sequence[OnDevice], host: Sequence[torch.Tensor], args: Sequence[Any]) -> None:
    by_values = packet in _LOOKUPS and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if there and (packet in _WAITS or by_values):
        OnDevice.events.seen.append(Event("wait", str(packet), _graph_line()))
    if any(x.numel() for x in host) and (line := _graph_line()):
        OnDevice.events.seen.append(Event("host", str(packet), line))


def _note_index(index: Any) -> None:
    """Takes note of indices that elements are chosen by: their number is waited for; of those in main memory."""
    tensors = [x for x in tree_flatten(index)[0] if isinstance(x, torch.Tensor)]
    _note(aten.index, [x for x in tensors if isinstance(x, OnDevice)], [], (None, tensors))
    _note(aten.index, [], [x for x in tensors if not isinstance(x, OnDevice)], (None, ()))


def _refuse_mixed(func: Any, packet: Any, host: Sequence[torch.Tensor], args: Sequence[Any]) -> None:
    """Raises what torch raises for tensors of two devices; a number as a tensor without dims, and indices, it takes."""
    if all(x.dim() == 0 for x in host) or (packet in _LOOKUPS and isinstance(args[0], OnDevice)):
        return
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and cpu! ({func})"
    )


def _graph_line() -> str:
    """Returns the line of a rank's graph that is being run in this thread; "" where none is."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<eval_with_key>"):
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
            return line.partition(";")[0].strip() or "a graph"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
