"""What the rank that drives a generation tells the others: a few integers a step, in one message where they fit."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch

from autodist_fx import errors
from autodist_fx.errors import AutodistError, RemoteRankError
from autodist_fx.runtime.comm.channels import Channel
from passes.ops.comm import Communicator

_INTEGERS = 128  # of a message: 1 KiB, which a socket takes at once
_NUMBERS = 8  # that a message may carry beside its payload
_HEADER = 2 + _NUMBERS


class Command(IntEnum):
    STEP = 1  # run the graph
    REORDER = 2  # the rows of a cache
    CROP = 3  # a cache
    END = 4  # of the generation: these are the sequences
    ERROR = 5  # raise it
    ENCODE = 6  # run the encoder's graph
    PREPARE = 7  # a graph for these lengths


class StepChannel:
    """From the driver to every other rank of the mesh. Integers only, on the CPU, without pickle."""

    def __init__(self, communicator: Communicator, driver: int, followers: Sequence[int]) -> None:
        self._communicator, self._driver, self._followers = communicator, driver, tuple(followers)
        self._padding = torch.zeros(_INTEGERS, dtype=torch.long)

    def say(self, command: Command, numbers: Sequence[int] = (), payload: Sequence[torch.Tensor] = ()) -> None:
        """`numbers`: up to 8. `payload`: int64 tensors, which arrive as one of one dim."""
        flat = [p.reshape(-1) if p.device.type == "cpu" else p.reshape(-1).cpu() for p in payload]
        count = sum(p.numel() for p in flat)
        header = torch.tensor([command, count, *numbers, *[0] * (_NUMBERS - len(numbers))])
        inline = count <= _INTEGERS - _HEADER
        used = _HEADER + count if inline else _HEADER
        message = torch.cat([header, *(flat if inline else ()), self._padding[used:]])
        rest = None if inline else torch.cat(flat)
        for rank in self._followers:
            self._communicator.send(message, rank, Channel.STEPS)
            if rest is not None:
                self._communicator.send(rest, rank, Channel.STEPS)

    def hear(self) -> tuple[Command, list[int], torch.Tensor]:
        """(command, its 8 numbers, its payload); waits for it."""
        receive = self._communicator.recv
        message = receive((_INTEGERS,), torch.long, "cpu", self._driver, Channel.STEPS)
        command, count, *numbers = message[:_HEADER].tolist()
        if count <= _INTEGERS - _HEADER:
            payload = message[_HEADER : _HEADER + count]
        else:
            payload = receive((count,), torch.long, "cpu", self._driver, Channel.STEPS)
        return Command(command), numbers, payload

    def say_error(self, error: BaseException) -> None:
        """`error` ends the generation everywhere."""
        text = f"{type(error).__name__}\n{error}".encode()
        padded = text + b"\0" * (-len(text) % 8)
        self.say(Command.ERROR, (len(text),), (torch.frombuffer(bytearray(padded), dtype=torch.long),))

    def heard_error(self, numbers: Sequence[int], payload: torch.Tensor) -> Exception:
        """The error that the driver raised, of the same class where that is a built-in or one of ours."""
        text = payload.clone().view(torch.uint8)[: numbers[0]].numpy().tobytes().decode(errors="replace")
        name, _, message = text.partition("\n")
        kind: Any = getattr(errors, name, None) or getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, (AutodistError, *_PLAIN_ERRORS)):
            error: Exception = kind(message)
        else:
            error = RemoteRankError(f"{name}: {message}")
        error.add_note(f"raised on rank {self._driver}, which drives the generation")
        return error


_PLAIN_ERRORS = (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError, NotImplementedError)
