"""All ranks say what they are about to do, rank 0 compares: a wrong start is an error on every rank, not a hang."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

import torch

from autodist_fx.errors import AutodistError, RuntimeSetupError
from autodist_fx.runtime.comm.channels import Channel
from passes.ops.comm import Communicator

_CHANNEL = Channel.AGREEMENT
_DIGEST_BYTES = 32


def agree(
    communicator: Communicator,
    rank: int,
    world_size: int,
    facts: Sequence[str],
    *,
    check: Callable[[], None] | None = None,
    what: str = "plan",
) -> None:
    """Returns when all ranks hold the same `facts` and `check`, called on rank 0 alone, has raised nothing.

    Otherwise raises on every rank: RuntimeSetupError naming the ranks that differ, or what `check` raised (of the same
    class on rank 0, an AutodistError of the same text elsewhere). Called on every rank; one message each way, of plain
    bytes.
    """
    mine = hashlib.sha256("\0".join(facts).encode()).digest()
    if rank != 0:
        communicator.send(_tensor(mine), 0, _CHANNEL)
        verdict = _receive(communicator, 0)
        if verdict:
            raise _error(verdict)
        return
    others = range(1, world_size)
    digests = {other: communicator.recv((_DIGEST_BYTES,), torch.uint8, "cpu", other, _CHANNEL) for other in others}
    different = [other for other, digest in digests.items() if _bytes(digest) != mine]
    failure: AutodistError | None = None
    if different:
        many = len(different) > 1
        failure = RuntimeSetupError(
            f"rank{'s' if many else ''} {', '.join(map(str, different))} made another {what} than rank 0: start all "
            "ranks with the same model files, arguments and versions of torch, transformers and autodist_fx, or give "
            "all the same saved plan"
        )
    elif check is not None:
        try:
            check()
        except AutodistError as error:
            failure = error
    for other in others:
        _send(communicator, "" if failure is None else f"{type(failure).__name__}: {failure}", other)
    if failure is not None:
        raise failure


def everyone(communicator: Communicator, rank: int, world_size: int, text: str) -> list[str]:
    """Every rank's `text`, by rank. Called on every rank; through rank 0."""
    if rank != 0:
        _send(communicator, text, 0)
        texts: list[str] = json.loads(_receive(communicator, 0))
        return texts
    texts = [text, *(_receive(communicator, other) for other in range(1, world_size))]
    for other in range(1, world_size):
        _send(communicator, json.dumps(texts), other)
    return texts


def _send(communicator: Communicator, text: str, to: int) -> None:
    data = text.encode()
    communicator.send(torch.tensor([len(data)]), to, _CHANNEL)
    if data:
        communicator.send(_tensor(data), to, _CHANNEL)


def _receive(communicator: Communicator, source: int) -> str:
    length = int(communicator.recv((1,), torch.long, "cpu", source, _CHANNEL)[0])
    return _bytes(communicator.recv((length,), torch.uint8, "cpu", source, _CHANNEL)).decode() if length else ""


def _error(verdict: str) -> AutodistError:
    name, _, message = verdict.partition(": ")
    kinds: list[type[AutodistError]] = [c for c in AutodistError.__subclasses__() if c.__name__ == name]
    error = (kinds or [AutodistError])[0](message)
    error.add_note("found on rank 0")
    return error


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()
