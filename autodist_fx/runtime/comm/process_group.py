"""Joining the other ranks: who am I, on which device, and a communicator to the rest of the mesh."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from autodist_fx.errors import CommunicationError, RuntimeSetupError
from autodist_fx.runtime.comm.alone_communicator import AloneCommunicator
from autodist_fx.runtime.comm.dist_communicator import DistCommunicator
from autodist_fx.runtime.comm.join_options import JoinOptions
from autodist_fx.runtime.comm.watchdog import Watchdog
from cost_model.mesh import Mesh

_LAST_SENDS = timedelta(seconds=30)


@dataclass(frozen=True, slots=True)
class Place:
    """Where this process stands among the ranks."""

    rank: int
    world_size: int
    local_rank: int  # among the ranks of this machine
    master_addr: str
    master_port: int


@dataclass(frozen=True, slots=True)
class JoinedRank:
    """This process, as one rank of a mesh."""

    mesh: Mesh
    rank: int
    device: torch.device
    communicator: DistCommunicator | AloneCommunicator

    def close(self) -> None:
        """Lets go of this mesh's communicator; the process group stays, for another mesh, until the process ends."""
        self.communicator.close()


class _World:
    """The process group that we started, its watchdog, and the communicators on it. One per process."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog = watchdog
        self.communicators: list[DistCommunicator] = []

    def leave(self, failure: str | None = None) -> None:
        for communicator in self.communicators:
            if failure is None:  # what we sent last may still be on its way; a rank that fails too is not waited for
                with contextlib.suppress(CommunicationError):
                    communicator.finish_sends(_LAST_SENDS)
        self.watchdog.close(failure)
        for communicator in self.communicators:
            communicator.close()
        if dist.is_initialized():
            dist.destroy_process_group()


_world: _World | None = None


def join(mesh: Mesh, options: JoinOptions) -> JoinedRank:
    """Become one rank of `mesh`, and wait until every other rank has joined.

    Who we are is said by the options or, where they are None, by torchrun's environment variables; a mesh of one rank
    needs neither. A process group that exists already is used, and left alone at the end.

    Raises RuntimeSetupError, which says what to do.
    """
    global _world
    place = _place(mesh, options)
    chosen = choose_device(options.device, place.local_rank, _ranks_here(place))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if mesh.size == 1 and not dist.is_initialized():
        return JoinedRank(mesh, 0, chosen, AloneCommunicator())
    if not dist.is_initialized():
        _world = _start(place, chosen, options.timeout)
    elif dist.get_world_size() != mesh.size:
        raise RuntimeSetupError(_wrong_world_size(mesh, dist.get_world_size()))
    explain = _world.watchdog.explain if _world is not None else None
    communicator = DistCommunicator(mesh, chosen, timedelta(seconds=options.timeout), explain)
    if _world is not None:
        _world.communicators.append(communicator)
    return JoinedRank(mesh, dist.get_rank(), chosen, communicator)


def leave(failure: str | None = None) -> None:
    """Leave the process group that `join` started; happens by itself when the process ends.

    With `failure`, the other ranks end too, with that message.
    """
    global _world
    if _world is not None:
        world, _world = _world, None
        world.leave(failure)


def started_by_torchrun() -> bool:
    """Whether the environment says which rank this process is."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _place(mesh: Mesh, options: JoinOptions) -> Place:
    env, rank, world_size = os.environ, options.rank, options.world_size
    if dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
    rank = _number("RANK", env.get("RANK")) if rank is None else rank
    world_size = _number("WORLD_SIZE", env.get("WORLD_SIZE")) if world_size is None else world_size
    if rank is None and world_size is None:
        if mesh.size > 1:
            raise RuntimeSetupError(
                f"{mesh} needs {mesh.size} processes, and this is one alone: start it with `torchrun --nproc-per-node "
                f"{mesh.size} ...`, or name rank, world_size, master_addr and master_port"
            )
        rank, world_size = 0, 1
    if rank is None or world_size is None:
        raise RuntimeSetupError("rank and world_size must be given together (RANK and WORLD_SIZE in the environment)")
    if world_size != mesh.size:
        raise RuntimeSetupError(_wrong_world_size(mesh, world_size))
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
    return Place(rank, world_size, rank if local_rank is None else local_rank, addr or "127.0.0.1", port or 0)


def _ranks_here(place: Place) -> int:
    """How many ranks share this machine's devices, as far as is known."""
    return _number("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_WORLD_SIZE")) or place.local_rank + 1


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


def choose_device(device: str | torch.device | None, local_rank: int, ranks_here: int) -> torch.device:
    """This rank's own device. CUDA devices are those that CUDA_VISIBLE_DEVICES leaves visible, one per rank."""
    wanted = torch.device(device) if device is not None else None
    if wanted is None:
        wanted = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted.type != "cuda":
        return wanted
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    by = f" (CUDA_VISIBLE_DEVICES={shown})" if shown is not None else ""
    if not visible:
        raise RuntimeSetupError(f"device cuda was asked for, and no CUDA device is visible{by}: use device cpu")
    if wanted.index is not None:
        if wanted.index >= visible:
            raise RuntimeSetupError(f"device {wanted} was asked for, and {visible} are visible{by}")
        return wanted
    if max(ranks_here, local_rank + 1) > visible:
        raise RuntimeSetupError(
            f"{max(ranks_here, local_rank + 1)} ranks on this machine, and {visible} CUDA device"
            f"{'s are' if visible > 1 else ' is'} visible{by}: use fewer ranks, show more devices, or use device cpu "
            "(ranks on several machines: set LOCAL_RANK, or name cuda:N)"
        )
    return torch.device("cuda", local_rank)


def _start(place: Place, device: torch.device, timeout_seconds: float) -> _World:
    timeout = timedelta(seconds=timeout_seconds)
    try:
        store = _meeting_place(place, timeout)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=place.rank,
            world_size=place.world_size,
            timeout=timeout,
        )
    except (RuntimeError, ValueError, dist.DistError) as error:
        where, reason = f"{place.master_addr}:{place.master_port}", str(error).strip().splitlines()[0]
        if "EADDRINUSE" in reason:
            raise RuntimeSetupError(
                f"rank 0 is to listen at {where}, where another process does (another rank 0?): choose a free port"
            ) from error
        raise RuntimeSetupError(
            f"rank {place.rank} could not meet the other {place.world_size - 1} at {where} within "
            f"{timeout_seconds:g} s: {reason}"
        ) from error
    watchdog = Watchdog(place.rank, place.world_size)
    watchdog.start(store, place.master_addr, timeout_seconds)
    _tell_of_uncaught_errors()
    atexit.register(leave)
    return _World(watchdog)


def _meeting_place(place: Place, timeout: timedelta) -> dist.Store:
    """Where the ranks tell each other their addresses (torchrun's own store, or one that rank 0 keeps), when all came.

    Raises RuntimeSetupError for ranks that did not come, and for a rank that has come already or that counts other
    ranks than rank 0: they would be waited for in vain.
    """
    where = f"{place.master_addr}:{place.master_port}"
    if _is_environment(place):
        store, *_ = next(dist.rendezvous("env://", place.rank, place.world_size, timeout=timeout))
    else:
        store = dist.TCPStore(
            place.master_addr,
            place.master_port,
            is_master=place.rank == 0,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
        )
    store.set_timeout(timeout)
    store = dist.PrefixStore("autodist_fx", store)
    came = [f"rank/{rank}" for rank in range(place.world_size)]
    if store.add(came[place.rank], 1) > 1 and not dist.is_torchelastic_launched():  # torchrun counts them itself
        raise RuntimeSetupError(
            f"another rank {place.rank} has come to {where} already: start each of the ranks 0 to "
            f"{place.world_size - 1} once"
        )
    if place.rank == 0:
        store.set("world_size", str(place.world_size))
    elif (of_rank_0 := int(store.get("world_size"))) != place.world_size:
        raise RuntimeSetupError(
            f"rank {place.rank} is one of {place.world_size}, and rank 0 one of {of_rank_0}: start all ranks with the "
            "same tp, pp and world size"
        )
    try:
        store.wait(came)
    except dist.DistStoreError as error:
        missing = [str(rank) for rank, key in enumerate(came) if not store.check([key])]
        if not missing:
            raise
        raise RuntimeSetupError(
            f"rank{'s' if len(missing) > 1 else ''} {', '.join(missing)} did not come to {where} within "
            f"{timeout.total_seconds():g} s: start every rank from 0 to {place.world_size - 1}"
        ) from error
    return store


def _is_environment(place: Place) -> bool:
    """Whether torchrun's variables say the same: then its own store is used, which also outlives rank 0."""
    env = os.environ
    said = (env.get("RANK"), env.get("WORLD_SIZE"), env.get("MASTER_ADDR"), env.get("MASTER_PORT"))
    return said == (str(place.rank), str(place.world_size), place.master_addr, str(place.master_port))


def _tell_of_uncaught_errors() -> None:
    """A rank that ends with a traceback takes the others with it, and they say why."""
    before = sys.excepthook

    def hook(kind, error, traceback):  # type: ignore[no-untyped-def]
        before(kind, error, traceback)
        if not hasattr(sys, "ps1"):  # at a prompt the process goes on
            leave("; ".join([f"{kind.__name__}: {error}", *getattr(error, "__notes__", ())]))

    sys.excepthook = hook
