"""Messages from the rank that leads a generation to those that follow: frozen values, each packed into int64s.

Packed, a message is one dim of int64s on the CPU, which needs no pickle:

    FORMAT, command, integers of payload, 12 numbers, the payload, zeros up to BLOCK

A step of decoding fits into one BLOCK. `unpack` believes nothing: a message of another format, command or length, or
with a number out of its bounds, is a CommunicationError that names it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, TypeVar

import torch

from autodist_fx.calls.lengths import Lengths
from autodist_fx.errors import CommunicationError
from autodist_fx.runtime.device.cuda import to_device, to_host

FORMAT = 0x41445804  # "ADX", and the version of this layout
BLOCK = 128  # integers of the first piece of a message: 1 KiB, which a socket takes at once
_NUMBERS = 12
_HEADER_INTEGERS = 3 + _NUMBERS
_HEADER = struct.Struct(f"={_HEADER_INTEGERS}q")
_MOST = 1 << 40  # no size, position or number of a cache goes beyond
_MOST_PAYLOAD = 1 << 32  # integers
_SYMBOLS = "BSPTEK"  # of lengths, in the order of their numbers
_DTYPES = (torch.long, torch.int32, torch.bool, torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MOST_DIMS = 8  # of an input of an encoder, or of a step
_MOST_NAME = 100  # characters of an input's name
_NOT_GIVEN = (-1,) * (1 + _MOST_DIMS)

M = TypeVar("M", bound="Message")


class Command(IntEnum):
    """The kind of a message, as it is on the wire."""

    STEP = 1
    REORDER = 2
    CROP = 3
    END = 4
    ENCODE = 5
    PREPARE = 6
    INPUTS = 7
    GROUPS = 8
    FORGET = 9


class OutputKind(IntEnum):
    """The kinds of output that transformers' generate returns."""

    SEQUENCES = 0  # a tensor
    SAMPLE = 1  # an output with return_dict_in_generate, of greedy search or sampling
    BEAMS = 2  # the same of beam search


class Message:
    """A message: `pack` on the rank that leads, `unpack` on the others."""

    __slots__ = ()
    command: ClassVar[Command]

    def pack(self) -> torch.Tensor:
        """Return the message as int64 [BLOCK or more]."""
        numbers, payload = self._content()
        count = sum(tensor.numel() for tensor in payload)
        header = _HEADER.pack(FORMAT, self.command, count, *numbers, *[0] * (_NUMBERS - len(numbers)))
        # as bytes: half of what tensor operations take, for so few integers
        parts = [header, *(tensor.long().numpy().tobytes() for tensor in to_host(payload))]
        unused = BLOCK - _HEADER_INTEGERS - count
        return torch.frombuffer(bytearray().join([*parts, bytes(8 * max(0, unused))]), dtype=torch.long)

    @classmethod
    def unpack(
        cls: type[M],
        packed: torch.Tensor,
        device: torch.device | str = "cpu",
        receive: Callable[[int], torch.Tensor] | None = None,
    ) -> M:
        """Return the message that was packed, its tensors on `device`. `packed` is all of it, or its first BLOCK and
        `receive(n)` gives the n integers left, where there are more. Raises CommunicationError where it is damaged,
        or not of this class."""
        command, count, *numbers = _header(packed)
        left = max(BLOCK, _HEADER_INTEGERS + count) - packed.shape[0]
        if left > 0 and receive is not None:
            packed = torch.cat([packed, receive(left)])
        elif left:
            raise CommunicationError(f"a message of {packed.shape[0] + left} integers came with {packed.shape[0]}")
        kind = _KINDS.get(command)
        if kind is None or not issubclass(kind, cls):
            came = f"command {command}" if kind is None else kind.__name__
            raise CommunicationError(f"a message came that is a {came}, where a {cls.__name__} was expected")
        payload = packed[_HEADER_INTEGERS : _HEADER_INTEGERS + count]
        return kind._from_content(numbers, to_device(payload, torch.device(device)))

    def _content(self) -> tuple[Sequence[int], Sequence[torch.Tensor]]:
        """Return (up to 12 numbers, payload: int64 tensors of any dims)."""
        raise NotImplementedError

    @classmethod
    def _from_content(cls: type[M], numbers: Sequence[int], payload: torch.Tensor) -> M:
        """Invert `_content`, of 12 numbers and a payload of one dim, both yet to be checked."""
        raise NotImplementedError


def _header(start: torch.Tensor) -> tuple[int, ...]:
    """Return (command, integers of payload, 12 numbers)."""
    if start.dtype != torch.long or start.dim() != 1 or start.shape[0] < BLOCK:
        raise CommunicationError(f"a message begins with {BLOCK} int64s, not with {start.dtype}{list(start.shape)}")
    written, *header = _HEADER.unpack_from(start.numpy())
    if written != FORMAT:
        raise CommunicationError(
            f"a message of format {written:#x} came, and this rank reads {FORMAT:#x}: start all ranks with the same "
            "version of autodist_fx"
        )
    if not 0 <= header[1] <= _MOST_PAYLOAD:
        raise CommunicationError(f"a message came with a payload of {header[1]} integers")
    return tuple(header)


@dataclass(frozen=True, slots=True, eq=False)
class StepMessage(Message):
    """One forward pass, which the others run along."""

    command: ClassVar[Command] = Command.STEP

    cache: int  # its number, from 1 on
    first_position: int  # in the cache, of the first token
    input_ids: torch.Tensor  # int64 [batch, tokens]
    position_ids: torch.Tensor | None = None  # int64 [batch, tokens]; None where the graphs take none
    attention_mask: torch.Tensor | None = None  # int64 [batch, cached + tokens]; None where the graphs take none,
    mask_grown: bool = False  # or where it is that of this cache's last step and a column of ones,
    mask_of_ones: bool = False  # or ones for all tokens
    new_tokens: bool = False  # the last of input_ids were chosen since the step before: a streamer has not seen them
    cache_kept: bool = False  # the leader holds the cache until the end
    encoded: int = 0  # number of what the encoder gave, which the step reads; 0: nothing

    def _content(self) -> tuple[Sequence[int], Sequence[torch.Tensor]]:
        payload, mask_tokens = [self.input_ids], 0
        if self.position_ids is not None:
            payload.append(self.position_ids)
        if self.attention_mask is not None:
            payload.append(self.attention_mask)
            mask_tokens = self.attention_mask.shape[1]
        told = self.mask_grown, self.mask_of_ones, self.new_tokens, self.cache_kept
        sizes = (*self.input_ids.shape, self.position_ids is not None, mask_tokens)
        return (self.cache, self.first_position, self.encoded, *sizes, *told), payload

    @classmethod
    def _from_content(cls, numbers: Sequence[int], payload: torch.Tensor) -> StepMessage:
        cache, first_position, encoded, batch, tokens, has_positions, mask_tokens, grown, ones, new, kept, *_ = numbers
        _check(cls, 1, _MOST, cache=cache, batch=batch, tokens=tokens)
        _check(cls, 0, _MOST, first_position=first_position, encoded=encoded, mask_tokens=mask_tokens)
        _check(cls, 0, 1, position_ids=has_positions, mask_of_ones=ones, new_tokens=new, cache_kept=kept)
        _check(cls, 0, 0 if mask_tokens or ones else 1, mask_grown=grown)
        _check(cls, 0, 0 if mask_tokens else 1, mask_of_ones=ones)
        used = batch * tokens * (1 + has_positions)
        _check_payload(cls, payload, used + batch * mask_tokens)
        mask = payload[used:].view(batch, mask_tokens) if mask_tokens else None
        ids_and_positions = payload[:used] if mask_tokens else payload
        input_ids, *positions = ids_and_positions.view(-1, batch, tokens).unbind()
        return cls(
            cache=cache,
            first_position=first_position,
            input_ids=input_ids,
            position_ids=positions[0] if positions else None,
            attention_mask=mask,
            mask_grown=bool(grown),
            mask_of_ones=bool(ones),
            new_tokens=bool(new),
            cache_kept=bool(kept),
            encoded=encoded,
        )


@dataclass(frozen=True, slots=True, eq=False)
class ReorderMessage(Message):
    """The rows of a cache change places, for beam search."""

    command: ClassVar[Command] = Command.REORDER

    cache: int
    rows: torch.Tensor  # int64 [batch]: the row that each row continues

    def _content(self) -> tuple[Sequence[int], Sequence[torch.Tensor]]:
        return (self.cache,), (self.rows,)

    @classmethod
    def _from_content(cls, numbers: Sequence[int], payload: torch.Tensor) -> ReorderMessage:
        _check(cls, 1, _MOST, cache=numbers[0])
        return cls(numbers[0], payload)


@dataclass(frozen=True, slots=True)
class CropMessage(Message):
    """A cache forgets tokens, as transformers' `crop` does of its argument."""

    command: ClassVar[Command] = Command.CROP

    cache: int
    argument: int

    def _content(self) -> tuple[Sequence[int], Sequence[torch.Tensor]]:
        return (self.cache, self.argument), ()

    @classmethod
    def _from_content(cls, numbers: Sequence[int], payload: torch.Tensor) -> CropMessage:
        _check(cls, 1, _MOST, cache=numbers[0])
        _check(cls, -_MOST, _MOST, argument=numbers[1])
        _check_payload(cls, payload, 0)
        return cls(*numbers[:2])


@dataclass(frozen=True, slots=True, eq=False)
class EndMessage(Message):
    """The generation is over, and these are its tokens."""

    command: ClassVar[Command] = Command.END

    kind: OutputKind
    sequences: torch.Tensor  # int64 [sequences, tokens]
    cache: int = 0  # number of the one that the output holds; 0: none

    def _content(self) -> tuple[Sequence[int], Sequence[torch.Tensor]]:
        return (self.kind, *self.sequences.shape, self.cache), (self.sequences,)

    @classmethod
    def _from_content(cls, numbers: Sequence[int], payload: torch.Tensor) -> EndMessage:
        kind, rows, tokens, cache, *_ = numbers
        _check(cls, 0, len(OutputKind) - 1, kind=kind)
        _check(cls, 0, _MOST, rows=rows, tokens=tokens, cache=cache)
        _check_payload(cls, payload, rows * tokens)
        return cls(OutputKind(kind), payload.view(rows, tokens), cache)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Dtype and shape of a tensor that follows on a channel of its own."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EncodeMessage(Message):
    """The encoder is to run; what it reads follows on Channel.ENCODER_INPUTS."""

    command: ClassVar[Command] = Command.ENCODE

    encoded: int  # number of what it gives, from 1 on
    inputs: tuple[TensorSpec | None, ...]  # of all that it can read, in order; None: not given, and not sent

    def _content(self) -> tuple[Sequence[int], Sequence[torch.Tensor]]:
        rows = [_NOT_GIVEN if spec is None else _row(spec) for spec in self.inputs]
        return (self.encoded, len(rows)), (torch.tensor(rows, dtype=torch.long),)

    @classmethod
    def _from_content(cls, numbers: Sequence[int], payload: torch.Tensor) -> EncodeMessage:
        encoded, count, *_ = numbers
        _check(cls, 1, _MOST, encoded=encoded)
        _check(cls, 0, _MOST, inputs=count)
        _check_payload(cls, payload, count * len(_NOT_GIVEN))
        rows = payload.view(count, len(_NOT_GIVEN)).tolist()
        return cls(encoded, tuple(None if tuple(row) == _NOT_GIVEN else _spec(cls, row) for row in rows))


@dataclass(frozen=True, slots=True)
class InputsMessage(Message):
    """The next step has inputs besides tokens, mask and positions (images, say), or positions of several kinds; they
    follow on Channel.STEP_INPUTS, in this order."""

    command: ClassVar[Command] = Command.INPUTS

    inputs: tuple[tuple[str, TensorSpec], ...]  # by the names of forward's arguments

    def _content(self) -> tuple[Sequence[int], Sequence[torch.Tensor]]:
        rows = [[*_row(spec), *name.encode().ljust(_MOST_NAME, b" ")] for name, spec in self.inputs]
        return (len(rows),), (torch.tensor(rows, dtype=torch.long),)

    @classmethod
    def _from_content(cls, numbers: Sequence[int], payload: torch.Tensor) -> InputsMessage:
        count, width = numbers[0], len(_NOT_GIVEN)
        _check(cls, 1, _MOST, inputs=count)
        _check_payload(cls, payload, count * (width + _MOST_NAME))
        found = []
        for row in payload.view(count, -1).tolist():
            for character in row[width:]:
                _check(cls, 32, 126, character=character)
            found.append((bytes(row[width:]).decode().strip(), _spec(cls, row[:width])))
        return cls(tuple(found))


def _row(spec: TensorSpec) -> Sequence[int]:
    """Return [number of the dtype, sizes], padded with -1."""
    if spec.dtype not in _DTYPES or len(spec.shape) > _MOST_DIMS:
        raise CommunicationError(f"a model over ranks reads no {spec.dtype}{list(spec.shape)}")
    return [_DTYPES.index(spec.dtype), *spec.shape, *[-1] * (_MOST_DIMS - len(spec.shape))]


def _spec(message: type[Message], row: Sequence[int]) -> TensorSpec:
    """Invert `_row`. Raises CommunicationError for numbers out of their bounds."""
    dtype, *sizes = row
    dims = next((dim for dim, size in enumerate(sizes) if size == -1), _MOST_DIMS)
    _check(message, 0, len(_DTYPES) - 1, dtype=dtype)
    for size in sizes[:dims]:
        _check(message, 0, _MOST, size=size)
    for size in sizes[dims:]:
        _check(message, -1, -1, size=size)
    return TensorSpec(_DTYPES[dtype], tuple(sizes[:dims]))


@dataclass(frozen=True, slots=True)
class PrepareMessage(Message):
    """A step of these sizes comes next, for which there is no program yet: all ranks make one together."""

    command: ClassVar[Command] = Command.PREPARE

    lengths: Lengths

    def _content(self) -> tuple[Sequence[int], Sequence[torch.Tensor]]:
        return [self.lengths.get(symbol, -1) for symbol in _SYMBOLS], ()

    @classmethod
    def _from_content(cls, numbers: Sequence[int], payload: torch.Tensor) -> PrepareMessage:
        lengths = dict(zip(_SYMBOLS, numbers, strict=False))
        _check(cls, -1, _MOST, **lengths)
        _check_payload(cls, payload, 0)
        return cls({symbol: n for symbol, n in lengths.items() if n >= 0})


@dataclass(frozen=True, slots=True)
class GroupsMessage(Message):
    """The rows are generated in groups: steps of several come in turns. A streamer gets all tokens at the end."""

    command: ClassVar[Command] = Command.GROUPS

    prompt_tokens: int  # columns of the sequences that a streamer gets first

    def _content(self) -> tuple[Sequence[int], Sequence[torch.Tensor]]:
        return (self.prompt_tokens,), ()

    @classmethod
    def _from_content(cls, numbers: Sequence[int], payload: torch.Tensor) -> GroupsMessage:
        _check(cls, 0, _MOST, prompt_tokens=numbers[0])
        _check_payload(cls, payload, 0)
        return cls(numbers[0])


@dataclass(frozen=True, slots=True)
class ForgetMessage(Message):
    """A group has ended, and what it held goes: a cache, and what an encoder gave (0: nothing)."""

    command: ClassVar[Command] = Command.FORGET

    cache: int
    encoded: int = 0

    def _content(self) -> tuple[Sequence[int], Sequence[torch.Tensor]]:
        return (self.cache, self.encoded), ()

    @classmethod
    def _from_content(cls, numbers: Sequence[int], payload: torch.Tensor) -> ForgetMessage:
        _check(cls, 0, _MOST, cache=numbers[0], encoded=numbers[1])
        _check_payload(cls, payload, 0)
        return cls(*numbers[:2])


_KINDS: dict[int, type[Message]] = {
    kind.command: kind
    for kind in (
        StepMessage, ReorderMessage, CropMessage, EndMessage, EncodeMessage, PrepareMessage, InputsMessage,
        GroupsMessage, ForgetMessage,
    )
}  # fmt: skip


def _check(message: type[Message], lowest: int, highest: int, /, **numbers: int) -> None:
    """Raise CommunicationError that names the first number which is out of bounds."""
    for name, number in numbers.items():
        if not lowest <= number <= highest:
            raise CommunicationError(f"a {message.__name__} came with {name}={number}")


def _check_payload(message: type[Message], payload: torch.Tensor, integers: int) -> None:
    if payload.shape[0] != integers:
        raise CommunicationError(
            f"a {message.__name__} came with a payload of {payload.shape[0]} integers, not {integers}"
        )
