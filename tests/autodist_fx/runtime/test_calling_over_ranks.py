"""`model(...)` over ranks answers as the unsplit model does, and as `simulate`; and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import autodist_fx as adx
from autodist_fx.errors import AutodistError
from cost_model.mesh import Mesh
from tests.support.models import padded_batch, relative_error, tiny_model
from tests.support.moe import tiny_moe_model
from tests.support.ranks import on_ranks
from tests.support.seq2seq import seq2seq_inputs, tiny_seq2seq

IDS, MASK = padded_batch(2, 9)
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]]).expand(2, 9).contiguous()
LABELS = IDS.masked_fill(MASK == 0, -100)
MESH = Mesh(tp=2, pp=2)


def assert_alike(got: Any, wanted: Any, tolerance: float = 1e-9) -> None:
    """Every output that is asked for; the loss to float32, in which models compute it."""
    assert [*got] == [name for name in wanted if name != "past_key_values"]
    for name, value in got.items():
        values = [value] if isinstance(value, torch.Tensor) else value
        truths = [wanted[name]] if isinstance(value, torch.Tensor) else wanted[name]
        for one, truth in zip(values, truths, strict=True):
            assert relative_error(one, truth) <= (1e-6 if "loss" in name else tolerance), name


def check(model: PreTrainedModel, calls: list[dict[str, Any]], mesh: Mesh, tolerance: float = 1e-9) -> None:
    """`calls`, one after the other, over ranks and in `simulate`, against the model."""
    wanted = [model(**inputs, use_cache=False) for inputs in calls]
    compiled = adx.compile(model, tp=mesh.tp, pp=mesh.pp, verify=False)
    for inputs, truth in zip(calls, wanted, strict=True):
        assert_alike(compiled.simulate(**inputs), truth, tolerance)
    for outputs in on_ranks(model, mesh, lambda split: [split(**inputs) for inputs in calls]):
        for output, truth in zip(outputs, wanted, strict=True):
            assert_alike(output, truth, tolerance)


@torch.no_grad()
def test_every_rank_returns_what_the_model_does() -> None:
    model = tiny_model("gpt2")
    embeddings = torch.randn(2, 9, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    calls: list[dict[str, Any]] = [
        {"inputs_embeds": embeddings, "labels": IDS},
        {"input_ids": IDS, "attention_mask": MASK, "logits_to_keep": 2},
        {"input_ids": IDS, "attention_mask": MASK, "logits_to_keep": torch.tensor([1, 4])},
        {"input_ids": IDS, "attention_mask": MASK, "output_hidden_states": True},
        {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()},
    ]
    check(model, calls, MESH)


@pytest.mark.drawn(1)
@pytest.mark.parametrize(
    "make, mesh",
    [
        (lambda: tiny_model("llama"), Mesh(tp=2)),
        (lambda: tiny_model("mistral", sliding_window=3), Mesh(pp=2)),
    ],
    ids=["full attention", "sliding windows"],
)
@torch.no_grad()
def test_packed_rows(make: Callable[[], PreTrainedModel], mesh: Mesh) -> None:
    """Positions that begin anew separate rows where there is no mask, and only there: one of ones is another call."""
    model = make()
    rows = {"input_ids": IDS, "position_ids": PACKED}
    calls = [rows, {**rows, "attention_mask": torch.ones_like(IDS)}, {"input_ids": IDS}, rows]
    wanted = [model(**inputs, use_cache=False).logits for inputs in calls]
    assert relative_error(wanted[0], wanted[1]) > 1e-3
    check(model, calls, mesh, tolerance=1e-6)  # they compute norms in float32


@pytest.mark.drawn(1)
@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_model("llama"),
        lambda: tiny_model("opt"),
        lambda: tiny_moe_model("mixtral", output_router_logits=True, router_aux_loss_coef=0.5),
        lambda: tiny_moe_model("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.5),
        lambda: tiny_seq2seq("bart"),
        lambda: tiny_seq2seq("t5"),
        lambda: tiny_seq2seq("mbart"),
        lambda: tiny_seq2seq("whisper"),
    ],
    ids=["llama", "opt", "mixtral", "qwen3_moe", "bart", "t5", "mbart", "whisper"],
)
@torch.no_grad()
def test_the_loss_is_the_models_own(make: Callable[[], PreTrainedModel]) -> None:
    """Shifted or not, of the decoder's tokens, with what routers owe."""
    model = make()
    inputs: dict[str, Any] = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
    if model.config.is_encoder_decoder:
        given = seq2seq_inputs(model)
        inputs = {name: value for name, value in given.items() if not name.startswith("decoder_")}
        inputs["labels"] = given["decoder_input_ids"]
    check(model, [inputs], Mesh(tp=2), tolerance=1e-6)  # some compute norms in float32


@torch.no_grad()
def test_arguments_by_position_are_in_the_models_own_order() -> None:
    model = tiny_model("gpt2")  # whose second is a cache
    wanted = model(IDS, None, None, MASK, use_cache=False)
    for output in on_ranks(model, Mesh(tp=2), lambda split: split(IDS, None, None, MASK)):
        assert_alike(output, wanted)


@torch.no_grad()
def test_a_tuple_where_one_is_asked_for() -> None:
    model = tiny_model("llama")
    wanted = model(input_ids=IDS, labels=IDS, use_cache=False, return_dict=False)
    for output in on_ranks(model, MESH, lambda split: split(input_ids=IDS, labels=IDS, return_dict=False)):
        assert isinstance(output, tuple) and len(output) == len(wanted) == 2
        assert relative_error(output[1], wanted[1]) <= 1e-9


@torch.no_grad()
def test_what_is_refused() -> None:
    """By name, on every rank; and the next call is right."""
    model = tiny_model("gpt2")
    four = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"input_ids": IDS, "labels": IDS[:, :4]}, r"labels is \[2, 4\].* should be 9"),
        ({"input_ids": IDS, "attention_mask": MASK[:, :7]}, r"attention_mask is \[2, 7\]"),
        ({"input_ids": IDS, "labels": IDS, "use_cache": True}, "with a KV cache a distributed model takes no labels"),
        ({"input_ids": IDS, "use_cache": True, "output_hidden_states": True}, "takes no output_hidden_states"),
        ({"input_ids": IDS, "use_cache": True, "attention_mask": four}, "with a KV cache .* takes it with 2 dims"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 9, 48)}, "both input_ids and inputs_embeds"),
        ({"input_ids": IDS, "pixel_values": IDS}, "forward takes no pixel_values"),
    ]

    def work(split: Any) -> Any:
        for inputs, message in cases:
            with pytest.raises(AutodistError, match=message):
                split(**inputs)
        return split(input_ids=IDS, attention_mask=MASK)

    wanted = model(input_ids=IDS, attention_mask=MASK, use_cache=False)
    for output in on_ranks(model, Mesh(tp=2), work):
        assert_alike(output, wanted)


def test_autocast_is_refused_on_every_rank_and_the_next_call_works() -> None:
    model = tiny_model("gpt2")
    wanted = model(IDS, attention_mask=MASK).logits

    def work(split: Any) -> float:
        given = {"input_ids": IDS, "attention_mask": MASK}
        for call in (split, lambda **inputs: split.generate(**inputs, max_new_tokens=2)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                with pytest.raises(AutodistError, match=r"(forward|generate) computes .*autocast is on \(cpu\)"):
                    call(**given)
        return relative_error(split(**given).logits, wanted)

    for mesh in (Mesh(tp=2), Mesh()):
        assert max(on_ranks(model, mesh, work)) < 1e-9


@torch.no_grad()
def test_a_config_that_asks_for_router_logits_still_generates() -> None:
    """In one process such a config keeps transformers 4.57.6 from generating: the truth is that without the flag."""
    model = tiny_moe_model("mixtral", output_router_logits=True)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    wanted = model(IDS, labels=IDS, use_cache=False)
    model.config.output_router_logits = False
    tokens = model.generate(IDS, **options)
    model.config.output_router_logits = True
    found = on_ranks(model, Mesh(tp=2), lambda split: (split(IDS, labels=IDS), split.generate(IDS, **options)))
    for outputs, generated in found:
        assert_alike(outputs, wanted)
        assert torch.equal(generated, tokens)
