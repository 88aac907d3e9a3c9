"""Messages of a generation: packed and unpacked they are the same; damaged they are refused."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autodist_fx.errors import CommunicationError
from autodist_fx.runtime.generation.step_messages import (
    BLOCK,
    FORMAT,
    Command,
    CropMessage,
    EncodeMessage,
    EndMessage,
    ForgetMessage,
    GroupsMessage,
    InputsMessage,
    Message,
    OutputKind,
    PrepareMessage,
    ReorderMessage,
    StepMessage,
    TensorSpec,
)

NUMBERS = st.integers(1, 1 << 40)
LONGS = st.integers(-(1 << 63), (1 << 63) - 1)
DTYPES = (torch.long, torch.int32, torch.bool, torch.float32, torch.bfloat16, torch.float16, torch.float64)


@st.composite
def integers(draw: Any, *shape: int) -> torch.Tensor:
    """int64 of that shape, some rows with extremes; a view of more where drawn so."""
    fill = draw(st.lists(LONGS, min_size=1, max_size=5))
    size = int(torch.Size(shape).numel())
    flat = torch.tensor([fill[i % len(fill)] for i in range(size)], dtype=torch.long)
    if draw(st.booleans()) and len(shape) == 2:
        return flat.view(shape[1], shape[0]).t()
    return flat.view(shape)


@st.composite
def steps(draw: Any) -> StepMessage:
    batch, tokens = draw(st.integers(1, 9)), draw(st.sampled_from([1, 1, 2, 30]))
    has_positions, mask = draw(st.booleans()), draw(st.sampled_from(["none", "sent", "grown", "ones"]))
    return StepMessage(
        cache=draw(NUMBERS),
        first_position=draw(st.integers(0, 1 << 40)),
        input_ids=draw(integers(batch, tokens)),
        position_ids=draw(integers(batch, tokens)) if has_positions else None,
        attention_mask=draw(integers(batch, tokens + draw(st.integers(0, 40)))) if mask == "sent" else None,
        mask_grown=mask == "grown",
        mask_of_ones=mask == "ones",
        new_tokens=draw(st.booleans()),
        cache_kept=draw(st.booleans()),
        encoded=draw(st.integers(0, 1 << 40)),
    )


@st.composite
def ends(draw: Any) -> EndMessage:
    sequences = draw(integers(draw(st.integers(0, 5)), draw(st.integers(0, 60))))
    return EndMessage(draw(st.sampled_from(OutputKind)), sequences, draw(st.integers(0, 1 << 40)))


SPECS = st.builds(
    TensorSpec, st.sampled_from(DTYPES), st.lists(st.integers(0, 1 << 40), max_size=8).map(tuple)
)
NAMES = st.from_regex("[a-z_][a-z_0-9]{0,99}", fullmatch=True)
LENGTHS = st.dictionaries(st.sampled_from("BSPTEK"), st.integers(0, 1 << 40))
MESSAGES = st.one_of(
    steps(),
    ends(),
    st.builds(ReorderMessage, NUMBERS, st.integers(0, 200).flatmap(lambda n: integers(n))),
    st.builds(CropMessage, NUMBERS, st.integers(-(1 << 40), 1 << 40)),
    st.builds(EncodeMessage, NUMBERS, st.lists(st.none() | SPECS, max_size=40).map(tuple)),
    st.builds(PrepareMessage, LENGTHS),
    st.builds(GroupsMessage, st.integers(0, 1 << 20)),
    st.builds(ForgetMessage, st.integers(0, 1 << 20), st.integers(0, 1 << 20)),
    st.builds(InputsMessage, st.lists(st.tuples(NAMES, SPECS), min_size=1, max_size=9).map(tuple)),
)


def assert_same(found: Message, expected: Message) -> None:
    assert type(found) is type(expected)
    for field in fields(expected):  # type: ignore[arg-type]
        got, wanted = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(wanted, torch.Tensor):
            assert torch.equal(got, wanted) and got.dtype == torch.long, field.name
        else:
            assert got == wanted and type(got) is type(wanted), field.name


@settings(max_examples=200, deadline=None)
@given(MESSAGES)
def test_every_field_arrives(message: Message) -> None:
    packed = message.pack()
    assert packed.dtype == torch.long and packed.dim() == 1 and packed.shape[0] >= BLOCK
    assert_same(Message.unpack(packed[:BLOCK], receive=lambda left: packed[-left:]), message)
    assert_same(Message.unpack(packed.clone()), message)
    assert_same(type(message).unpack(packed), message)


def test_a_step_of_decoding_fits_into_one_block() -> None:
    ids = torch.ones(50, 1, dtype=torch.long)
    assert StepMessage(1, 4096, ids, ids, mask_grown=True).pack().shape == (BLOCK,)


def step() -> StepMessage:
    ids = torch.arange(6).view(2, 3)
    return StepMessage(4, 7, ids, ids + 1, torch.ones(2, 10, dtype=torch.long), encoded=2)


def damaged(at: int, value: int, message: Message | None = None) -> torch.Tensor:
    packed = (message or step()).pack()
    packed[at] = value
    return packed


GROUPS, FORGET = GroupsMessage(7), ForgetMessage(3, 1)
CROP, PREPARE = CropMessage(3, 5), PrepareMessage({"B": 2, "S": 3})
END = EndMessage(OutputKind.BEAMS, torch.arange(8).view(2, 4))
ENCODE = EncodeMessage(1, (TensorSpec(torch.long, (2, 3)), None))
INPUTS = InputsMessage((("pixel_values", TensorSpec(torch.float32, (1, 3, 8, 8))),))
DAMAGED = {
    "of format 0x41445803 came, and this rank reads 0x41445804": damaged(0, FORMAT - 1),
    "is a command 0, where a Message": damaged(1, 0),
    "is a command 10, where a Message": damaged(1, 10),
    "a payload of -1 integers": damaged(2, -1),
    "a payload of 1152921504606846976 integers": damaged(2, 1 << 60),
    "a message of 315 integers came with 128": damaged(2, 300),
    "StepMessage came with a payload of 31 integers, not 32": damaged(2, 31),
    "StepMessage came with cache=0": damaged(3, 0),
    "StepMessage came with first_position=-1": damaged(4, -1),
    "StepMessage came with encoded=-2": damaged(5, -2),
    "StepMessage came with batch=0": damaged(6, 0),
    "StepMessage came with batch=9223372036854775807": damaged(6, (1 << 63) - 1),
    "StepMessage came with a payload of 32 integers, not 48": damaged(6, 3),
    "StepMessage came with tokens=-3": damaged(7, -3),
    "StepMessage came with position_ids=2": damaged(8, 2),
    "StepMessage came with mask_tokens=-10": damaged(9, -10),
    "StepMessage came with mask_grown=1": damaged(10, 1),
    "StepMessage came with mask_of_ones=1": damaged(11, 1),
    "StepMessage came with new_tokens=4": damaged(12, 4),
    "StepMessage came with cache_kept=-1": damaged(13, -1),
    "ReorderMessage came with cache=0": damaged(3, 0, ReorderMessage(1, torch.zeros(3, dtype=torch.long))),
    "CropMessage came with argument=-9223372036854775808": damaged(4, -(1 << 63), CROP),
    "CropMessage came with a payload of 1 integers, not 0": damaged(2, 1, CROP),
    "EndMessage came with kind=3": damaged(3, 3, END),
    "EndMessage came with a payload of 8 integers, not 12": damaged(4, 3, END),
    "EncodeMessage came with encoded=0": damaged(3, 0, ENCODE),
    "EncodeMessage came with a payload of 18 integers, not 27": damaged(4, 3, ENCODE),
    "EncodeMessage came with dtype=7": damaged(15, 7, ENCODE),
    "EncodeMessage came with size=-2": damaged(16, -2, ENCODE),
    "EncodeMessage came with size=5": damaged(19, 5, ENCODE),
    "InputsMessage came with inputs=0": damaged(3, 0, INPUTS),
    "InputsMessage came with a payload of 109 integers, not 218": damaged(3, 2, INPUTS),
    "InputsMessage came with character=10": damaged(15 + 9, 10, INPUTS),
    "PrepareMessage came with S=-2": damaged(4, -2, PREPARE),
}  # fmt: skip


@pytest.mark.parametrize("said", DAMAGED)
def test_a_damaged_message_is_refused_by_name(said: str) -> None:
    with pytest.raises(CommunicationError, match=said):
        Message.unpack(DAMAGED[said])


@settings(max_examples=100, deadline=None)
@given(MESSAGES, st.integers(0, 2), LONGS)
def test_any_other_format_command_or_length_is_refused(message: Message, at: int, value: int) -> None:
    packed = message.pack()
    if value == packed[at]:
        return
    packed[at] = value
    with pytest.raises(CommunicationError):
        type(message).unpack(packed)


def test_a_message_cut_off_or_of_another_class_is_refused() -> None:
    with pytest.raises(CommunicationError, match=r"begins with 128 int64s, not with torch.int64\[127\]"):
        Message.unpack(step().pack()[:-1])
    with pytest.raises(CommunicationError, match=r"not with torch.float32\[128\]"):
        Message.unpack(step().pack().float())
    with pytest.raises(CommunicationError, match="is a CropMessage, where a StepMessage was expected"):
        StepMessage.unpack(CROP.pack())


def test_every_command_has_its_message() -> None:
    examples = [step(), CROP, PREPARE, ENCODE, INPUTS, END, ReorderMessage(1, torch.arange(3)), GROUPS, FORGET]
    assert sorted(message.command for message in examples) == sorted(Command)
    assert all(type(Message.unpack(message.pack())) is type(message) for message in examples)


def test_an_input_that_an_encoder_cannot_be_sent_is_refused() -> None:
    for spec in (TensorSpec(torch.complex64, (2,)), TensorSpec(torch.long, (1,) * 9)):
        with pytest.raises(CommunicationError, match="reads no"):
            EncodeMessage(1, (spec,)).pack()
