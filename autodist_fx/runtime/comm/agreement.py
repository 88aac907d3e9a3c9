"""Compares what all ranks are about to do: a wrong start is one error on every rank, not a hang."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch

from autodist_fx.errors import AutodistError, CommunicationError, DisagreementError
from autodist_fx.runtime.comm.channels import Channel
from autodist_fx.runtime.comm.remote_error import ErrorReport, said_by
from passes.ops.comm import Communicator

T = TypeVar("T")
Facts = Mapping[str, str]  # what a rank is about to do, by name; the value is shown where ranks differ
Everyone = Callable[[str], list[str]]  # every rank's text, by rank; called on every rank

_MOST_SHOWN = 4  # facts that an error names
_SAME = (
    "start all ranks with the same model files, arguments and versions of torch, transformers and autodist_fx, or give "
    "all the same saved plan"
)


def digest(text: str | bytes) -> str:
    """Return a short digest of a text, as a fact's value where the text is too long to be shown."""
    data = text.encode() if isinstance(text, str) else text
    return f"sha256 {hashlib.sha256(data).hexdigest()[:16]}"


def agree(
    everyone: Everyone,
    rank: int,
    facts: Facts,
    *,
    failure: Exception | None = None,
    check: Callable[[], None] | None = None,
    way_out: str = _SAME,
) -> None:
    """Return when all ranks hold the same `facts`, none has a `failure`, and `check`, run on rank 0, raised nothing.

    Otherwise raises on every rank: DisagreementError, which names each fact that differs with every rank's value, else
    the failure of the first rank that has one (of the same class and text), else what `check` raised. A fact is
    compared among the ranks that state it. Called on every rank.
    """
    answers = [json.loads(text) for text in everyone(statement(rank, facts, failure))]
    raise_difference(rank, dict(enumerate(answers)), failure, way_out)
    if check is None:
        return
    verdict: Exception | None = None
    if rank == 0:
        try:
            check()
        except AutodistError as error:
            verdict = error
    answers = [json.loads(text) for text in everyone(statement(rank, {}, verdict))]
    raise_difference(rank, dict(enumerate(answers)), verdict, way_out)


def together(
    everyone: Everyone,
    rank: int,
    work: Callable[[], tuple[T, Facts]],
    *,
    check: Callable[[T], None] | None = None,
) -> T:
    """Return what `work` returns, when it has succeeded on all ranks with the same facts; see `agree` for what is
    raised.

    `check(value)` runs on rank 0.
    """
    try:
        value, facts = work()
    except Exception as error:
        agree(everyone, rank, {}, failure=error)
        raise
    agree(everyone, rank, facts, check=None if check is None else functools.partial(check, value))
    return value


def statement(rank: int, facts: Facts, failure: Exception | None = None) -> str:
    """Return what a rank tells the others, as JSON."""
    told = None if failure is None else ErrorReport.of(rank, failure).to_text()
    return json.dumps({"facts": dict(facts), "failure": told})


def raise_difference(
    rank: int, answers: Mapping[int, Mapping[str, Any]], failure: Exception | None, way_out: str = _SAME
) -> None:
    """Raise as `agree` does where the ranks' statements (parsed, by rank) fail or differ; `failure` is our own."""
    found = differences({r: answer["facts"] for r, answer in answers.items()})
    if found:
        more = f" (and {len(found) - _MOST_SHOWN} more)" if len(found) > _MOST_SHOWN else ""
        error = DisagreementError(f"the ranks do not agree: {'; '.join(found[:_MOST_SHOWN])}{more}: {way_out}")
        said_by(error, min(answers))
        raise error
    failed = next((r for r in sorted(answers) if answers[r]["failure"] is not None), None)
    if failed is not None:
        if failed == rank and failure is not None:
            raise failure
        raise ErrorReport.from_text(answers[failed]["failure"]).error()


def differences(facts: Mapping[int, Facts]) -> list[str]:
    """Return a line for each fact that differs, such as "dtype is float32 on rank 0, and bfloat16 on ranks 1, 2"."""
    lines = []
    for name in dict.fromkeys(name for of_rank in facts.values() for name in of_rank):
        ranks: dict[str, list[int]] = {}
        for rank in sorted(facts):
            if name in facts[rank]:
                ranks.setdefault(facts[rank][name], []).append(rank)
        if len(ranks) > 1:
            told = ", and ".join(f"{value or 'nothing'} on {name_ranks(held)}" for value, held in ranks.items())
            lines.append(f"{name} is {told}")
    return lines


def name_ranks(ranks: Sequence[int]) -> str:
    """Format ranks for a message: "rank 0", "ranks 1, 2"."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def over(communicator: Communicator, rank: int, world_size: int) -> Everyone:
    """Return a function that gathers every rank's text by way of rank 0, as bytes in messages of the communicator."""

    def everyone(text: str) -> list[str]:
        if rank != 0:
            _send(communicator, text, 0)
            texts: list[str] = json.loads(_receive(communicator, 0))
            return texts
        texts = [text, *(_receive(communicator, other) for other in range(1, world_size))]
        together = json.dumps(texts)
        for other in range(1, world_size):
            _send(communicator, together, other)
        return texts

    return everyone


def _send(communicator: Communicator, text: str, to: int) -> None:
    data = text.encode()
    communicator.send(torch.tensor([len(data)]), to, Channel.AGREEMENT)
    if data:
        communicator.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), to, Channel.AGREEMENT)


def _receive(communicator: Communicator, source: int) -> str:
    length = int(communicator.recv((1,), torch.long, "cpu", source, Channel.AGREEMENT)[0])
    if not length:
        return ""
    return communicator.recv((length,), torch.uint8, "cpu", source, Channel.AGREEMENT).numpy().tobytes().decode()


def failed_wait(
    what: str, others: Sequence[int], ended: Sequence[int], error: Exception, timeout: timedelta
) -> CommunicationError:
    """Return the error of a wait for `others` that torch gave up with `error`; `ended`: those that are no more."""
    if ended:
        return CommunicationError(
            f"{what} waits for {name_ranks(ended)}, which ended before: what is called on one rank is called on all"
        )
    where = f" with {name_ranks(others)}" if others else ""
    cause = re.sub(r"^\[\S+\.(cc|cpp|h):\d+\] ", "", str(error).strip()).split("\n")[0] or type(error).__name__
    return CommunicationError(
        f"{what}{where} failed: {cause}. It ended, waits elsewhere, or needs longer than the time-out of "
        f"{timeout.total_seconds():g} s"
    )
