"""Joins the other ranks: which rank this process is, on which device, and a communicator to the rest of the mesh."""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
import transformers
from torch.distributed.distributed_c10d import _get_default_store

from autodist_fx.errors import CommunicationError, RuntimeSetupError
from autodist_fx.own_version import own_version
from autodist_fx.runtime.comm.agreement import Facts, over, together
from autodist_fx.runtime.comm.alone_communicator import AloneCommunicator
from autodist_fx.runtime.comm.dist_communicator import DistCommunicator
from autodist_fx.runtime.comm.join_options import JoinOptions
from autodist_fx.runtime.comm.launch import ONE_STDERR
from autodist_fx.runtime.comm.meeting import MeetingPlace, Place, open_meeting_place
from autodist_fx.runtime.comm.remote_error import speaker
from autodist_fx.runtime.comm.watchdog import Watchdog
from autodist_fx.runtime.device import cuda
from autodist_fx.runtime.device.choice import choose_device, shared_devices
from autodist_fx.runtime.device.staged_communicator import StagedCommunicator
from cost_model.mesh import Mesh

T = TypeVar("T")
_LAST_SENDS = timedelta(seconds=30)
_LAST_WORDS_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class JoinedRank:
    """This process, as one rank of a mesh."""

    mesh: Mesh
    rank: int
    device: torch.device
    communicator: DistCommunicator | StagedCommunicator | AloneCommunicator
    cuda_graphs: bool = False  # steps that generate are captured

    def everyone(self, text: str) -> list[str]:
        """Return every rank's text, by rank; called on every rank."""
        return over(self.communicator, self.rank, self.mesh.size)(text)

    def together(
        self, work: Callable[[], tuple[T, Facts]], *, check: Callable[[T], None] | None = None
    ) -> T:
        """Return what `work` returns beside its facts, when it has succeeded on all ranks alike; see
        `agreement.together`."""
        return together(self.everyone, self.rank, work, check=check)

    def close(self) -> None:
        """Let go of this mesh's communicator; the process group stays, for another mesh, until the process ends."""
        self.communicator.close()


class _World:
    """This process's connections to the other ranks, made once: the process group if we started it, the watchdog,
    and a communicator for each mesh that was joined."""

    def __init__(self) -> None:
        self.watchdog: Watchdog | None = None
        self.owns_group = False
        self.communicators: list[DistCommunicator | StagedCommunicator] = []

    def start(self, place: Place, store: dist.Store, device: torch.device, timeout_seconds: float) -> Watchdog:
        """Start the process group, where there is none yet, and the watchdog."""
        if self.watchdog is None:
            self.owns_group = not dist.is_initialized()
            if self.owns_group:
                _start_group(place, store, device, timeout_seconds)
            watchdog = Watchdog(place.rank, place.world_size, fatal=self.owns_group)
            watchdog.start(store, place.master_addr, timeout_seconds)
            self.watchdog = watchdog
            _tell_of_uncaught_errors()
            atexit.register(leave)
        return self.watchdog

    def leave(self, failure: str | None = None, *, is_said: bool = False) -> None:
        """Close communicators, watchdog and process group; with `failure`, the other ranks end, too."""
        for communicator in self.communicators:
            if failure is None:  # what we sent last may still be on its way; a rank that fails too is not waited for
                with contextlib.suppress(CommunicationError):
                    communicator.finish_sends(_LAST_SENDS)
        if self.watchdog is not None:
            self.watchdog.close(failure, is_said=is_said)
        for communicator in self.communicators:
            communicator.close()
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()


_world: _World | None = None
_meeting_places: dict[Place, MeetingPlace] = {}


def join(mesh: Mesh, options: JoinOptions, facts: Facts | None = None) -> JoinedRank:
    """Become one rank of `mesh`, and wait until every other rank has joined.

    Who we are is said by the options or, where they are None, by torchrun's environment variables; a mesh of one rank
    needs neither. A process group that exists already is used, and left alone at the end. `facts`: what all ranks must
    be asked for alike, beside mesh, kind of device, time-out and versions; compared before anything is connected.

    Raises RuntimeSetupError, which says what to do, on all ranks that have come; DisagreementError, which is one, names
    what differs.
    """
    global _world
    place = _place(mesh, options)
    if place.world_size == 1 and not dist.is_initialized():
        if mesh.size > 1:
            raise RuntimeSetupError(_wrong_world_size(mesh, 1))
        return JoinedRank(mesh, 0, _own_device(options, place), AloneCommunicator(), options.cuda_graphs)
    meeting, failure, chosen = _meeting_place(place, options.timeout), None, torch.device("cpu")
    try:
        if place.world_size != mesh.size:
            raise RuntimeSetupError(_wrong_world_size(mesh, place.world_size))
        chosen = _own_device(options, place)
    except RuntimeSetupError as error:
        failure = error
    asked = {
        "mesh": f"tp={mesh.tp}, pp={mesh.pp}" + (f", dp={mesh.dp}" if mesh.dp > 1 else ""),
        "device": torch.device(options.device).type if options.device is not None else chosen.type,
        "timeout": f"{options.timeout:g} s",
        "cuda_graphs": str(options.cuda_graphs),
        **_versions(),
        **(facts or {}),
    }
    name = meeting.meet(asked, options.timeout, failure)
    store, timeout = dist.PrefixStore(name, meeting.store), timedelta(seconds=options.timeout)
    world = _world = _world or _World()
    transport = _transport(place, store, chosen)
    watchdog = world.start(place, store, transport, options.timeout)
    communicator: DistCommunicator | StagedCommunicator
    if transport == chosen:
        communicator = DistCommunicator(mesh, place.rank, chosen, store, watchdog, timeout, name)
    else:
        inner = DistCommunicator(mesh, place.rank, transport, store, watchdog, timeout, name)
        communicator = StagedCommunicator(inner, chosen)
    world.communicators.append(communicator)
    return JoinedRank(mesh, place.rank, chosen, communicator, options.cuda_graphs)


def fail_to_join(error: Exception, options: JoinOptions) -> NoReturn:
    """Raise `error`, which keeps this process from knowing its mesh, after the other ranks were told of it."""
    place = None
    with contextlib.suppress(RuntimeSetupError):
        place = _place(None, options)
    if place is not None and place.world_size > 1:
        _meeting_place(place, options.timeout).meet({}, options.timeout, error)
    raise error


def leave(failure: str | None = None, *, is_said: bool = False) -> None:
    """Leave the process group that `join` started; happens by itself when the process ends.

    With `failure`, the other ranks end too, with that message; without one where this rank's stderr, on which it
    `is_said` already, is theirs, too.
    """
    global _world
    if _world is not None:
        world, _world = _world, None
        world.leave(failure, is_said=is_said and ONE_STDERR in os.environ)


def is_said_elsewhere(error: BaseException) -> bool:
    """Return whether another rank says this error on the stderr that `launch_local` gives them all.

    Waits for that rank to leave, which ends this process, too; it returns where the ranks have not met."""
    rank = speaker(error)
    if ONE_STDERR not in os.environ or rank is None or str(rank) == os.environ.get("RANK"):
        return False
    if _world is not None:
        time.sleep(_LAST_WORDS_SECONDS)
    return True


def started_by_torchrun() -> bool:
    """Return whether the environment says which rank this process is."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _place(mesh: Mesh | None, options: JoinOptions) -> Place:
    env, rank, world_size = os.environ, options.rank, options.world_size
    if dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
    rank = _number("RANK", env.get("RANK")) if rank is None else rank
    world_size = _number("WORLD_SIZE", env.get("WORLD_SIZE")) if world_size is None else world_size
    if rank is None and world_size is None:
        if mesh is not None and mesh.size > 1:
            raise RuntimeSetupError(
                f"{mesh} needs {mesh.size} processes, and this is one alone: start it with `torchrun --nproc-per-node "
                f"{mesh.size} ...`, or name rank, world_size, master_addr and master_port"
            )
        rank, world_size = 0, 1
    if rank is None or world_size is None:
        raise RuntimeSetupError("rank and world_size must be given together (RANK and WORLD_SIZE in the environment)")
    if not 0 <= rank < world_size:
        raise RuntimeSetupError(f"rank {rank} of {world_size}: ranks are 0 to {world_size - 1}")
    addr = options.master_addr or env.get("MASTER_ADDR")
    port = options.master_port if options.master_port is not None else _number("MASTER_PORT", env.get("MASTER_PORT"))
    if world_size > 1 and not dist.is_initialized() and (addr is None or port is None):
        raise RuntimeSetupError(
            "where do the ranks meet? Name master_addr and master_port, the address of rank 0 and a free port there "
            "(MASTER_ADDR and MASTER_PORT in the environment)"
        )
    local_rank = _number("LOCAL_RANK", env.get("LOCAL_RANK"))
    if addr is None:
        addr = socket.gethostname() if dist.is_initialized() else "127.0.0.1"
    return Place(rank, world_size, rank if local_rank is None else local_rank, addr, port or 0)


def _meeting_place(place: Place, timeout_seconds: float) -> MeetingPlace:
    """Return where the ranks meet; opened once, since meetings are counted. Raises RuntimeSetupError."""
    if place not in _meeting_places:
        try:
            if _world is None and dist.is_initialized():
                _meeting_places[place] = MeetingPlace(place, _get_default_store())
            else:
                _meeting_places[place] = open_meeting_place(place, timedelta(seconds=timeout_seconds))
        except (RuntimeError, ValueError, dist.DistError) as error:
            raise _not_met(place, timeout_seconds, error) from error
    return _meeting_places[place]


def _versions() -> dict[str, str]:
    """Return the versions of what decides the numbers that a graph gives."""
    found = {"torch": torch.__version__, "transformers": transformers.__version__}
    found["autodist_fx"] = own_version()
    return {f"version of {name}": str(version) for name, version in found.items()}


def _own_device(options: JoinOptions, place: Place) -> torch.device:
    chosen = choose_device(options.device, place.local_rank)
    if options.cuda_graphs and chosen.type != "cuda":
        raise RuntimeSetupError(
            f"cuda_graphs=True captures steps on CUDA devices, and rank {place.rank} runs on {chosen}: leave it out"
        )
    if chosen.type == "cuda":
        cuda.claim(chosen)
    return chosen


def _transport(place: Place, store: dist.Store, device: torch.device) -> torch.device:
    """Return the device whose process groups carry the ranks' tensors, the same kind on all ranks: the rank's own, or
    the CPU where ranks share a GPU, of which rank 0 warns."""
    if device.type == "cpu":
        return device
    store.set(f"device/{place.rank}", cuda.identity(device))
    told = shared_devices({rank: store.get(f"device/{rank}").decode() for rank in range(place.world_size)})
    if told is None:
        return device
    if place.rank == 0:
        warnings.warn(told, stacklevel=3)
    return torch.device("cpu")


def _number(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal():
        raise RuntimeSetupError(f"{name}={text!r} in the environment is not a number")
    return int(text)


def _wrong_world_size(mesh: Mesh, world_size: int) -> str:
    return (
        f"{mesh} needs {mesh.size} process{'es' if mesh.size > 1 else ''}, and {world_size} "
        f"{'were' if world_size > 1 else 'was'} started: use `torchrun --nproc-per-node {mesh.size}`, or a tp and pp "
        f"whose product is {world_size}"
    )


def _start_group(place: Place, store: dist.Store, device: torch.device, timeout_seconds: float) -> None:
    """Start torch.distributed's default group, for whoever asks it for ranks; our own traffic has groups of its own."""
    backend = cuda.default_group_options(device) if device.type == "cuda" else {"backend": "gloo"}
    try:
        dist.init_process_group(
            store=store,
            rank=place.rank,
            world_size=place.world_size,
            timeout=timedelta(seconds=timeout_seconds),
            **backend,
        )
    except (RuntimeError, ValueError, dist.DistError) as error:
        raise _not_met(place, timeout_seconds, error) from error


def _not_met(place: Place, timeout_seconds: float, error: Exception) -> RuntimeSetupError:
    reason = str(error).strip().splitlines()[0]
    if "EADDRINUSE" in reason:
        return RuntimeSetupError(
            f"rank 0 is to listen at {place.where}, where another process does (another rank 0?): choose a free port"
        )
    return RuntimeSetupError(
        f"rank {place.rank} could not meet the other {place.world_size - 1} at {place.where} within "
        f"{timeout_seconds:g} s: {reason}"
    )


def _tell_of_uncaught_errors() -> None:
    """Set sys.excepthook, so that a rank that ends with a traceback takes the others with it, and they say why."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        before(kind, error, traceback)
        if not hasattr(sys, "ps1"):  # at a prompt the process goes on
            leave("; ".join([f"{kind.__name__}: {error}", *getattr(error, "__notes__", ())]))

    sys.excepthook = hook
