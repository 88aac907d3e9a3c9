"""Encoder-decoder models, text and speech: every mesh gives what the model gives on one device, in float64."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

import autodist_fx as adx
from autodist_fx.tracing import empty_model
from cost_model.errors import VerificationError
from cost_model.graph.placement import REPLICATE
from passes.verify.cache_handover import verify_handover
from tests.support.models import relative_error
from tests.support.seq2seq import seq2seq_inputs, tiny_seq2seq

FAMILIES = ("t5", "bart", "m2m_100", "whisper")
# Of float64: norms and softmaxes of the first two cast to float32.
TOLERANCE = {"t5": 1e-6, "t5gemma": 1e-6}
MESHES = ((2, 1), (3, 1), (1, 2), (2, 2))


@functools.cache
def _model(family: str) -> PreTrainedModel:
    return tiny_seq2seq(family)


def _names_of_the_table(model: PreTrainedModel) -> set[str]:
    """Return the names that modules have for the weight that embeds tokens."""
    table = model.get_input_embeddings().weight
    return {name for name, weight in model.named_parameters(remove_duplicate=False) if weight is table}


@pytest.mark.one_for_each("family")
@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"{m[0]}x{m[1]}")
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_forward_equals_eager(family: str, mesh: tuple[int, int]) -> None:
    model = _model(family)
    compiled = adx.compile(model, tp=mesh[0], pp=mesh[1])
    inputs = seq2seq_inputs(model)
    assert inputs.keys() <= set(compiled.program(0).input_names)
    got = compiled.simulate(**inputs)
    expected = model(**inputs, use_cache=False)
    assert relative_error(got.logits, expected.logits) <= TOLERANCE.get(family, 1e-9)
    last = expected.encoder_last_hidden_state
    assert relative_error(got.encoder_last_hidden_state, last) <= TOLERANCE.get(family, 1e-9)
    if mesh[0] > 1:
        weights = [p for p in compiled.plan.params if p.matmul]
        assert all(p.placement.is_shard for p in weights)


@pytest.mark.drawn(1)
@pytest.mark.parametrize("family, mesh", [("longt5", (2, 2)), ("prophetnet", (2, 1)), ("pegasus_x", (2, 1))])
@torch.no_grad()
def test_forward_of_odd_attention(family: str, mesh: tuple[int, int]) -> None:
    """Blocks of keys, padded to whole ones; several streams of queries; masks that are written row by row."""
    torch.set_default_dtype(torch.float64)  # one makes a mask of finfo's smallest in the default dtype
    try:
        model = tiny_seq2seq(family)
        compiled = adx.compile(model, tp=mesh[0], pp=mesh[1])
        for source in (9, 14):
            inputs = seq2seq_inputs(model, source=source)
            expected = model(**inputs, use_cache=False).logits
            assert relative_error(compiled.simulate(**inputs).logits, expected) <= 1e-6
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.drawn(2)
@pytest.mark.parametrize(
    "family, mesh",
    [("t5", (2, 1)), ("t5", (1, 2)), ("t5", (2, 2)), ("t5", (1, 5)), ("bart", (3, 1)), ("bart", (2, 2))]
    + [("whisper", (2, 2)), ("whisper", (1, 5)), ("t5gemma", (2, 2))],
)
@torch.no_grad()
def test_decoding_with_a_cache_equals_eager(family: str, mesh: tuple[int, int]) -> None:
    """The encoder runs in the first call alone; the steps read what it left in the cache, whatever they are given."""
    model = _model(family)
    compiled = adx.compile(model, tp=mesh[0], pp=mesh[1], use_cache=True)
    inputs = seq2seq_inputs(model)
    inputs.pop("decoder_attention_mask", None)
    expected = model(**inputs, use_cache=False)
    ids = inputs.pop("decoder_input_ids")
    step = compiled.simulate(**inputs, decoder_input_ids=ids[:, :3], use_cache=True)
    tolerance = TOLERANCE.get(family, 1e-9)
    assert relative_error(step.encoder_last_hidden_state, expected.encoder_last_hidden_state) <= tolerance
    logits = [step.logits]
    for at in range(3, ids.shape[1]):
        again = inputs if at % 2 else {}
        step = compiled.simulate(**again, decoder_input_ids=ids[:, at : at + 1], past_key_values=step.past_key_values)
        logits.append(step.logits)
    assert relative_error(torch.cat(logits, 1), expected.logits) <= tolerance
    step_weights = {s.source for r in range(mesh[0] * mesh[1]) for s in compiled.program(r).param_shards.values()}
    of_encoder = {name for name in step_weights if "encoder." in name and not name.startswith("model.decoder")}
    assert of_encoder <= _names_of_the_table(model)  # which the decoder reads, too


@pytest.mark.drawn(1)
@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
def test_two_sums_an_encoder_layer_and_three_a_decoder_layer(family: str) -> None:
    """Counted as what two more layers of each cost: embeddings and the head have sums of their own."""
    counts = []
    for layers in (1, 3):
        compiled = adx.compile(tiny_seq2seq(family, layers=layers).config, tp=2)
        assert type(empty_model(_model(family).config)) is type(_model(family))
        counts.append(sum(count for name, count, _ in compiled.plan.stages[0].collectives if name == "all_reduce"))
    assert counts[1] - counts[0] == 2 * (2 + 3)


def test_shared_embeddings_live_on_every_stage_that_reads_them() -> None:
    """Encoder, decoder and head have one table."""
    compiled = adx.compile(_model("t5").config, pp=2)
    (table,) = (p for p in compiled.plan.params if p.name in _names_of_the_table(_model("t5")))
    assert table.stages == (0, 1)


@torch.no_grad()
def test_a_cache_that_is_read_otherwise_than_written_is_refused() -> None:
    compiled = adx.compile(_model("t5").config, tp=2, use_cache=True, verify=False)
    encoder = compiled.main.encoder
    assert encoder is not None
    (update, *_) = (op for op in encoder.plan.ops if op.kind == "cache_update")
    apart = replace(update, outputs=(REPLICATE, REPLICATE), output_layouts=(-1, -1))
    plan = replace(encoder.plan, ops=tuple(apart if op is update else op for op in encoder.plan.ops))
    programs = [compiled.encoder_program(rank) for rank in range(2)]
    steps = [compiled.program(rank) for rank in range(2)]
    read = compiled.main.plan, compiled.main.graph
    verify_handover(programs, (encoder.plan, encoder.graph), steps, read)
    with pytest.raises(VerificationError, match="cache layer 1 is written as"):
        verify_handover(programs, (plan, encoder.graph), steps, read)
    moved = [replace(program, cache_layers=(3,)) for program in programs]
    with pytest.raises(VerificationError, match=r"rank 0 .*reads cache layer 1, which is written on another rank"):
        verify_handover(moved, (encoder.plan, encoder.graph), steps, read)
