"""Inputs that people pass to a model: embeddings, positions, masks of every kind, labels, flags; and mistakes in them.

The truth is the model itself, run with the very same arguments.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import autodist_fx as adx
from autodist_fx.api.compiled_model import CompiledModel
from autodist_fx.calls.input_shapes import input_dims
from autodist_fx.calls.input_spec import size_of
from autodist_fx.calls.input_specs import ModelFacts, specs_of
from autodist_fx.calls.lengths import lengths_of
from autodist_fx.errors import AutodistError
from tests.support.models import padded_batch, relative_error, tiny_model

IDS, MASK = padded_batch(2, 9)
B, S = IDS.shape
_CAUSAL = torch.ones(S, S, dtype=torch.bool).tril()
_MASK_4D = _CAUSAL & (torch.arange(S) != 4) | torch.eye(S, dtype=torch.bool)  # nobody else sees token 4
_ADDED_4D = torch.zeros(S, S, dtype=torch.float64).masked_fill(~_MASK_4D, -1e30)
_LABELS = IDS.masked_fill(MASK == 0, -100)
_RIGHT = torch.ones_like(IDS).index_fill(1, torch.tensor([7, 8]), 0)
_PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])


def _embeddings(width: int = 48) -> torch.Tensor:
    return torch.randn(B, S, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


CASES: dict[str, dict[str, Any]] = {
    "no mask": {"input_ids": IDS},
    "padded on the right": {"input_ids": IDS, "attention_mask": _RIGHT},
    "a mask of booleans": {"input_ids": IDS, "attention_mask": MASK.bool()},
    "int32": {"input_ids": IDS.int(), "attention_mask": MASK.int()},
    "embeddings": {"inputs_embeds": _embeddings(), "attention_mask": MASK},
    "embeddings and labels": {"inputs_embeds": _embeddings(), "labels": _LABELS},
    "labels": {"input_ids": IDS, "attention_mask": MASK, "labels": _LABELS},
    "positions": {"input_ids": IDS, "attention_mask": MASK, "position_ids": (MASK.cumsum(-1) - 1).clamp(min=0)},
    "one row of positions": {"input_ids": IDS, "position_ids": torch.arange(3, 3 + S)[None]},
    "packed": {"input_ids": IDS, "position_ids": _PACKED},
    "packed, one row": {"input_ids": IDS[:1], "position_ids": _PACKED, "labels": _LABELS[:1]},
    "4D, booleans": {"input_ids": IDS, "attention_mask": _MASK_4D.expand(B, 1, S, S)},
    "4D, added": {"input_ids": IDS, "attention_mask": _ADDED_4D.expand(B, 1, S, S)},
    "4D, one for all": {"input_ids": IDS, "attention_mask": _MASK_4D[None, None]},
    "4D, for each head": {"input_ids": IDS, "attention_mask": _MASK_4D.expand(B, 6, S, S)},
    "hidden states": {"input_ids": IDS, "attention_mask": MASK, "output_hidden_states": True},
    "logits of the last": {"input_ids": IDS, "logits_to_keep": 1},
    "logits of some": {"input_ids": IDS, "logits_to_keep": torch.tensor([0, 4, 7])},
    "a tuple": {"input_ids": IDS, "labels": _LABELS, "output_hidden_states": True, "return_dict": False},
    "one token": {"input_ids": IDS[:1, :1], "attention_mask": MASK[:1, -1:]},
    "another batch": {"input_ids": IDS[:1, :3].expand(5, 3), "attention_mask": MASK[1:, :3].expand(5, 3)},
}
FEWER = ("embeddings and labels", "one row of positions", "packed", "4D, added", "a tuple", "logits of some")


@functools.cache
def _model(family: str, attention: str = "sdpa") -> Any:
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    return model


@functools.cache
def _compiled(family: str, mesh: tuple[int, int], attention: str = "sdpa") -> CompiledModel:
    return adx.compile(_model(family, attention), tp=mesh[0], pp=mesh[1])


def _tensors(value: Any, name: str = "") -> dict[str, Any]:
    """Every tensor of nested outputs by its path; None where there is none."""
    if isinstance(value, torch.Tensor) or value is None:
        return {name: value}
    pairs = value.items() if hasattr(value, "items") else enumerate(value)
    return {path: x for key, below in pairs for path, x in _tensors(below, f"{name}/{key}").items()}


def _assert_equal(found: Any, expected: Any, tolerance: float) -> None:
    assert isinstance(found, tuple) == isinstance(expected, tuple)
    a, b = _tensors(found), _tensors(expected)
    assert list(a) == list(b)  # in the same order, too
    for name, value in b.items():
        assert (a[name] is None) == (value is None), name
        if value is not None:
            assert a[name].dtype == value.dtype and a[name].shape == value.shape, name
            assert relative_error(a[name], value) <= tolerance, name


@pytest.mark.drawn(4)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_simulate_equals_eager_for_each_kind_of_input(case: str) -> None:
    found = _compiled("llama", (2, 2)).simulate(**CASES[case])
    _assert_equal(found, _model("llama")(**CASES[case], use_cache=False), 1e-6)


@pytest.mark.drawn(3)
@pytest.mark.parametrize("family, mesh", [("gpt2", (2, 1)), ("gpt2", (2, 2)), ("opt", (1, 2)), ("mistral", (2, 1))])
@pytest.mark.parametrize("case", FEWER)
@torch.no_grad()
def test_other_models(family: str, mesh: tuple[int, int], case: str) -> None:
    inputs = dict(CASES[case])
    if family == "opt":  # it takes no list of positions to keep, and its mask must be of two dims to count positions
        if case.startswith(("4D", "logits")):
            pytest.skip("the model itself does not take this")
    _assert_equal(_compiled(family, mesh).simulate(**inputs), _model(family)(**inputs, use_cache=False), 1e-6)


@torch.no_grad()
def test_segments() -> None:
    inputs = {"input_ids": IDS, "token_type_ids": IDS % 2}
    _assert_equal(_compiled("gpt2", (2, 2)).simulate(**inputs), _model("gpt2")(**inputs, use_cache=False), 1e-9)


@pytest.mark.drawn(1)
@pytest.mark.parametrize("family, mesh", [("llama", (2, 2)), ("gpt2", (2, 1)), ("opt", (2, 1))])
@torch.no_grad()
def test_attention_maps(family: str, mesh: tuple[int, int]) -> None:
    """They are a tensor of all heads a layer, of which each rank computes its own."""
    inputs = {"input_ids": IDS, "attention_mask": _RIGHT, "output_attentions": True}
    found = _compiled(family, mesh, "eager").simulate(**inputs)
    assert len(found.attentions) == 2 and found.attentions[0].shape == (B, 6, S, S)
    _assert_equal(found, _model(family, "eager")(**inputs, use_cache=False), 1e-6)


@torch.no_grad()
def test_flags_given_to_compile_hold_for_every_call_and_calls_may_say_otherwise() -> None:
    model = _model("gpt2")
    compiled = adx.compile(model, tp=2, concrete_args={"output_hidden_states": True})
    assert len(compiled.simulate(input_ids=IDS, attention_mask=MASK).hidden_states) == 3
    assert len(compiled.simulate(input_ids=IDS).hidden_states) == 3  # another graph
    assert "hidden_states" not in compiled.simulate(input_ids=IDS, output_hidden_states=False)


@torch.no_grad()
def test_hidden_states_that_the_config_asks_for() -> None:
    model = tiny_model("llama", output_hidden_states=True)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    _assert_equal(adx.compile(model, pp=2).simulate(**inputs), model(**inputs, use_cache=False), 1e-6)


# -- what is refused ---------------------------------------------------------------------------------------------------

_OUTSIDE = IDS.index_fill(1, torch.tensor([3]), 500)
_NEGATIVE = IDS.index_fill(1, torch.tensor([3]), -2)
WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "neither input_ids nor inputs_embeds"),
    ({"input_ids": IDS, "inputs_embeds": _embeddings()}, "both input_ids and inputs_embeds"),
    ({"input_ids": IDS, "speed": 3}, "takes no speed: it takes input_ids, "),
    ({"input_ids": IDS.tolist()}, "input_ids is a list: pass a tensor"),
    ({"input_ids": IDS[0]}, r"input_ids is \[9\], which has 1 dims"),
    ({"input_ids": IDS.double()}, "input_ids is float64: it should hold integers"),
    ({"input_ids": IDS, "attention_mask": MASK[:, :7]}, r"attention_mask is \[2, 7\]: dim 1 should be 9"),
    ({"input_ids": IDS, "attention_mask": MASK[:1]}, r"attention_mask is \[1, 9\]: dim 0 should be 2"),
    ({"input_ids": IDS, "attention_mask": _MASK_4D[None, None, :, :8]}, "attention_mask is .*: dim 3 should be 9"),
    ({"input_ids": IDS, "attention_mask": _MASK_4D[None, None].long()}, "refuses these inputs: Expected attn_mask"),
    ({"input_ids": IDS, "position_ids": _PACKED[:, :4]}, r"position_ids is \[1, 4\]: dim 1 should be 9"),
    ({"input_ids": IDS, "labels": IDS[:, :5]}, r"labels is \[2, 5\]: dim 1 should be 9"),
    ({"inputs_embeds": _embeddings(40)}, r"inputs_embeds is \[2, 9, 40\]: dim 2 should be 48"),
    ({"inputs_embeds": _embeddings().float()}, "inputs_embeds is float32, and the model's weights are float64"),
    ({"input_ids": _OUTSIDE}, "input_ids holds 500, and transformer.wte has 128 rows"),
    ({"input_ids": _NEGATIVE}, "input_ids holds -2, and transformer.wte has 128 rows"),
    ({"input_ids": _OUTSIDE, "use_cache": True}, "input_ids holds 500"),
    ({"input_ids": IDS, "labels": _OUTSIDE}, "follows from labels, holds 500, and cross_entropy"),
    ({"input_ids": IDS, "position_ids": torch.arange(60, 69)[None]}, "position_ids holds 64, .*wpe has 64 rows"),
    ({"input_ids": IDS[:, :1].expand(2, 70)}, "follows from input_ids, holds 64, and transformer.wpe has 64 rows"),
]  # fmt: skip


@pytest.mark.parametrize("inputs, message", WRONG, ids=[message for _, message in WRONG])
@torch.no_grad()
def test_refused_inputs_are_named(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(AutodistError, match=message):
        _compiled("gpt2", (2, 2)).simulate(**inputs)


@torch.no_grad()
def test_an_id_outside_a_table_whose_rows_lie_in_pieces() -> None:
    """Each rank holds several runs of rows: an id that is nobody's is no row of zeros."""
    from passes.ops.parallel_layers import VocabParallelEmbedding

    table = VocabParallelEmbedding([(0, 2), (5, 6)], 8, 4, dtype=torch.float64).to_empty(device="cpu")
    torch.nn.init.ones_(table.weight)
    assert table(torch.tensor([0, 5, 3, 7])).sum(-1).tolist() == [4, 4, 0, 0]
    for outside in (-1, 8):
        with pytest.raises(IndexError):
            table(torch.tensor([outside]))


def test_dropout_in_training_mode_is_refused() -> None:
    model = tiny_model("gpt2", resid_pdrop=0.1, embd_pdrop=0.0, attn_pdrop=0.0).train()
    with pytest.raises(AutodistError, match=r"draws random numbers .*modeling_gpt2.py.* model.eval\(\)"):
        adx.compile(model, tp=2)


@torch.no_grad()
def test_training_mode_without_dropout_and_with_gradient_checkpointing() -> None:
    model = tiny_model("llama", attention_dropout=0.0).train()
    model.gradient_checkpointing_enable()
    inputs = {"input_ids": IDS, "labels": _LABELS}
    _assert_equal(adx.compile(model, tp=2, pp=2).simulate(**inputs), model(**inputs, use_cache=False), 1e-6)


def test_several_ids_of_a_token_and_the_spectrograms_of_an_encoder_have_their_sizes_from_the_config() -> None:
    sound = SimpleNamespace(decoder_config=SimpleNamespace(num_channels=9), encoder_config=SimpleNamespace())
    assert input_dims("decoder_input_ids", sound, True) == (("B", "S", 9), False)
    assert input_dims("input_features", sound, True) is None
    spectra = SimpleNamespace(encoder_config=SimpleNamespace(num_mel_bins=16))
    assert input_dims("input_features", spectra, True) == (("B", "E", 16), True)
    codes = SimpleNamespace(codebook_vocab_size=40, num_codebooks=2)
    assert input_dims("input_ids", codes, False) == (("B", "S", 3), False)
    assert input_dims("attention_mask", codes, False) == (("B", "T"), False)


def test_frames_of_sound_that_tokens_take_are_a_multiple_of_them() -> None:
    config = SimpleNamespace(audio_length_per_tok=8, audio_config=SimpleNamespace(num_mel_bins=16))
    model = ModelFacts(config, has_encoder=False, embedding_dim=32, dtype=torch.float64)
    spoken = {"input_features": torch.zeros(2, 16, 104, dtype=torch.float64), "input_ids": torch.ones(2, 13).long()}
    specs = specs_of(spoken, model, past=0)
    assert specs["input_features"].dims == ("B", 16, "S*8")
    assert lengths_of(specs, spoken, past=0) == {"P": 0, "B": 2, "S": 13, "T": 13}
    assert size_of("S*8", {"S": 5}) == 40
    with pytest.raises(AutodistError, match="dim 2 should be 96"):
        specs_of({**spoken, "input_ids": torch.ones(2, 12).long()}, model, past=0)
    with pytest.raises(AutodistError, match="dim 2 should be a multiple of 8"):
        specs_of({"input_features": spoken["input_features"][:, :, :99]}, model, past=0)
