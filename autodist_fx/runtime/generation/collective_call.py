"""Makes a call one of all ranks: they compare their arguments, and what one of them raises, all of them raise.

Without this a rank that raises leaves the others waiting for it, and ranks that were given other inputs compute an
answer to neither. Both cost two short exchanges a call, never one a token.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch

from autodist_fx.calls.ambient import refuse_autocast
from autodist_fx.errors import DisagreementError
from autodist_fx.runtime.comm.agreement import Facts, agree, over
from autodist_fx.runtime.comm.channels import Channel
from autodist_fx.runtime.comm.remote_error import CallBroken, ErrorReport
from autodist_fx.runtime.generation.call_facts import arguments_of, facts_of_call
from autodist_fx.runtime.microbatches.bounded_sends import SendingCommunicator
from cost_model.mesh import Mesh
from passes.ops.comm import Communicator, Parts

T = TypeVar("T")
_WORDS = 4  # int64 of an exchange: a digest of 24 bytes, and whether all is well
_WAY_OUT = "call every rank with the same arguments (a streamer may differ)"


class CallCommunicator(Communicator, SendingCommunicator, Protocol):
    """A communicator that can end what all ranks wait for, and be used again afterwards."""

    def begin(self) -> None:
        """Repair, before a call, what was broken off. Raises CallBroken where this is the call that was."""

    def break_off(self, error: BaseException, call: int) -> ErrorReport:
        """End what all ranks are doing; return the error that counts, which may be another rank's."""


class CollectiveCalls:
    """The calls of one rank's model. Calls within a call are parts of it."""

    def __init__(self, communicator: CallCommunicator, mesh: Mesh, rank: int, device: torch.device) -> None:
        self._communicator, self._mesh, self._rank = communicator, mesh, rank
        self._gathers = device.type == "cpu" and mesh.size == mesh.tp  # one tp group, whose collectives are quick
        self._parts: Parts = tuple(((r * _WORDS, (r + 1) * _WORDS),) for r in range(mesh.tp))
        self._inside = False
        self._number = 0  # of the call, alike on all ranks
        self._owed: ErrorReport | None = None  # what ended the next call, elsewhere

    def run(self, name: str, arguments: Callable[[], Mapping[str, Any]], call: Callable[[], T]) -> T:
        """Return `call()`, when every rank was called with the same; what it raises on any rank is raised on all.

        Raises DisagreementError, on all ranks, for arguments that differ; AutodistError under torch.autocast.
        """
        if self._inside:
            return call()
        if self._mesh.size == 1:
            refuse_autocast(name)
            return call()
        self._inside, self._number = True, self._number + 1
        try:
            self._begin()
            self._compare({"the call": name, **facts_of_call(arguments())})
            refuse_autocast(name)
            result = call()
            self._end()
            return result
        except _Differ as differ:  # on all ranks at once, and nothing is on its way
            raise differ.error from None
        except CallBroken as broken:
            error: Exception = broken.report.error()
            raise error from None
        except BaseException as error:
            counts = self._communicator.break_off(error, self._number)
            if counts.rank == self._rank:
                raise
            raise counts.error() from None
        finally:
            self._inside = False

    def _begin(self) -> None:
        owed, self._owed = self._owed, None
        if owed is not None:
            raise CallBroken(owed)
        self._communicator.begin()

    def _end(self) -> None:
        """Wait for all ranks: from here on the call cannot fail any more."""
        try:
            self._exchange(bytes(24))
        except CallBroken as broken:
            if broken.report.call <= self._number:
                raise
            self._owed = broken.report  # whose rank knows already that this call has ended well on all

    def _compare(self, facts: Facts) -> None:
        digest = hashlib.blake2b("\0".join(f"{k}\0{v}" for k, v in facts.items()).encode(), digest_size=24).digest()
        if self._exchange(digest):
            return
        try:
            agree(over(self._communicator, self._rank, self._mesh.size), self._rank, facts, way_out=_WAY_OUT)
        except DisagreementError as error:
            raise _Differ(error) from None

    def _exchange(self, digest: bytes) -> bool:
        """Return whether all ranks have the same digest, when all have come."""
        mine = torch.tensor([*memoryview(digest).cast("q"), 1])
        if self._gathers:
            rows = self._communicator.all_gather(mine, "tp", 0, self._parts).view(-1, _WORDS)
            return bool((rows == rows[0]).all())
        others = range(1, self._mesh.size)
        receive = functools.partial(self._communicator.recv, (_WORDS,), torch.long, "cpu")
        if self._rank != 0:
            self._communicator.send(mine, 0, Channel.CALLS)
            return bool(receive(0, Channel.CALLS)[-1])
        same = all([torch.equal(receive(other, Channel.CALLS), mine) for other in others])
        verdict = torch.tensor([*[0] * (_WORDS - 1), int(same)])
        for other in others:
            self._communicator.send(verdict, other, Channel.CALLS)
        return same


class _Differ(Exception):
    def __init__(self, error: DisagreementError) -> None:
        super().__init__(str(error))
        self.error = error


Method = TypeVar("Method", bound=Callable[..., Any])


def collective(method: Method, takes: Callable[..., Any] | None = None) -> Method:
    """Make a method of a model with `calls` one that is called on every rank with the same arguments: those of
    `takes`."""
    signature = inspect.signature(takes or method)

    @functools.wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls: CollectiveCalls = self.calls
        arguments = functools.partial(arguments_of, signature, self, args, kwargs)
        return calls.run(method.__name__, arguments, functools.partial(method, self, *args, **kwargs))

    return called  # type: ignore[return-value]
