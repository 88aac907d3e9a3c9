"""Lets the ranks meet in one store and compare what each was asked for; what differs is said on all of them, in
seconds.

The store is torchrun's own, one that rank 0 keeps, or that of a process group which exists already. Nothing else is
connected before all ranks have said there what they are about to do, so that nothing waits for a rank that does another
thing.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from autodist_fx.errors import RuntimeSetupError
from autodist_fx.runtime.comm.agreement import Facts, name_ranks, raise_difference, statement
from autodist_fx.runtime.comm.remote_error import said_by
from autodist_fx.runtime.device import cuda

_PAUSE_SECONDS = 0.02  # between two looks for who has come
_GRACE_SECONDS = 2.0  # for the others to come too, once something is wrong: so that all ranks name all of them
_WAY_OUT = "start all ranks with the same arguments and versions"


@dataclass(frozen=True, slots=True)
class Place:
    """This process's place among the ranks."""

    rank: int
    world_size: int
    local_rank: int  # among the ranks of this machine
    master_addr: str
    master_port: int

    @property
    def where(self) -> str:
        """Return the address and port of the meeting, for messages."""
        return f"{self.master_addr}:{self.master_port}"


class MeetingPlace:
    """The store where the ranks meet, of one process; kept for further meetings."""

    def __init__(self, place: Place, store: dist.Store) -> None:
        self.place = place
        self.store = dist.PrefixStore("autodist_fx", store)
        self._meetings = 0

    def meet(self, facts: Facts, timeout_seconds: float, failure: Exception | None = None) -> str:
        """Return the meeting's name when all ranks have come with the same `facts` and none with a `failure`.

        Raises what `agreement.agree` does, and RuntimeSetupError for ranks that did not come within `timeout_seconds`.
        The nth meeting of a rank is the nth of all.
        """
        try:
            return self._meet(facts, timeout_seconds, failure)
        except dist.DistError as error:
            raise RuntimeSetupError(
                f"rank {self.place.rank} lost the other ranks at {self.place.where} while they met: has rank 0 ended?"
            ) from error

    def _meet(self, facts: Facts, timeout_seconds: float, failure: Exception | None) -> str:
        self._meetings += 1
        name, rank, size = f"meeting{self._meetings}", self.place.rank, self.place.world_size
        keys = [f"{name}/{r}" for r in range(size)]
        facts = {"world size": str(size), **facts}
        self.store.set(keys[rank], statement(rank, facts, failure))
        answers: dict[int, dict] = {}
        began, wrong_since = time.monotonic(), None
        while True:
            for r in range(size):
                if r not in answers and self.store.check([keys[r]]):
                    answers[r] = json.loads(self.store.get(keys[r]))
            now = time.monotonic()
            if wrong_since is None and _is_wrong(answers):
                wrong_since = now
            if len(answers) == size or (wrong_since is not None and now - wrong_since > _GRACE_SECONDS):
                break
            if now - began > timeout_seconds:
                missing = RuntimeSetupError(
                    f"{name_ranks([r for r in range(size) if r not in answers])} did not come to {self.place.where} "
                    f"within {timeout_seconds:g} s: start every rank from 0 to {size - 1}"
                )
                said_by(missing, min(answers))
                raise missing
            time.sleep(_PAUSE_SECONDS)
        self.store.add(f"{name}/read", 1)
        try:
            raise_difference(rank, answers, failure, _WAY_OUT)
        except BaseException:
            self._stay(f"{name}/read", len(answers))
            raise
        return name

    def _stay(self, key: str, ranks: int) -> None:
        """Keep the store open until all have read what was said first: it is gone when rank 0 is, where rank 0 keeps
        it. A rank that was told of more ranks than this one waits a grace for them before it reads."""
        if self.place.rank == 0:
            deadline = time.monotonic() + 2 * _GRACE_SECONDS
            while self.store.add(key, 0) < ranks and time.monotonic() < deadline:
                time.sleep(_PAUSE_SECONDS)


def _is_wrong(answers: dict[int, dict]) -> bool:
    try:
        raise_difference(-1, answers, None)
    except Exception:
        return True
    return False


def open_meeting_place(place: Place, timeout: timedelta) -> MeetingPlace:
    """Open the store where the ranks tell each other who they are: torchrun's own, or one that rank 0 keeps.

    Raises RuntimeSetupError for a rank that has come already: it would be waited for in vain.
    """
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
    found = MeetingPlace(place, store)
    came = found.store.add(f"rank/{place.rank}", 1)
    if came > 1 and not dist.is_torchelastic_launched():  # torchrun counts them itself
        raise RuntimeSetupError(
            f"another rank {place.rank} has come to {place.where} already: start each of the ranks 0 to "
            f"{place.world_size - 1} once"
        )
    return found


def _is_environment(place: Place) -> bool:
    """Return whether there is a store of torchrun's, and its variables say the same: it outlives rank 0."""
    env = os.environ
    said = (env.get("RANK"), env.get("WORLD_SIZE"), env.get("MASTER_ADDR"), env.get("MASTER_PORT"))
    same = said == (str(place.rank), str(place.world_size), place.master_addr, str(place.master_port))
    return same and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def make_group(timeout: timedelta, store: dist.Store, name: str, rank: int, size: int, device: torch.device) -> Any:
    """Return a new process group of `size` ranks, which meet under `name`: Gloo's for the CPU, else NCCL's on
    `device`."""
    store = dist.PrefixStore(name, store)
    if device.type == "cpu":
        return dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
    return cuda.nccl_group(store, rank, size, timeout, device)
