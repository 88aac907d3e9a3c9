"""Steps that are captured and replayed give what steps give: the device and the captures are pretended (driver.py), all
else is what runs on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import autodist_fx as adx
from autodist_fx.errors import AutodistError, RuntimeSetupError
from autodist_fx.runtime.device import decode_graphs
from cost_model.mesh import Mesh
from passes.fx.nodes import op_name
from passes.program import regions
from passes.program.static_cache import static_cache
from tests.support.device.driver import driver
from tests.support.float64 import in_float64
from tests.support.models import padded_batch, relative_error, tiny_model
from tests.support.ranks import on_ranks
from tests.support.seq2seq import tiny_seq2seq

IDS, MASK = padded_batch(seq=5)
ASKED = {
    "max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "return_dict_in_generate": True,
    "output_logits": True,
}  # fmt: skip


def _generated(model: Any, **options: Any) -> tuple[list[list[int]], torch.Tensor | None]:
    """Tokens, and the logits of all steps where the rank has them."""
    device = model.device
    found = model.generate(input_ids=IDS.to(device), attention_mask=MASK.to(device), **{**ASKED, **options})
    logits = found.get("logits")
    return found.sequences.cpu().tolist(), None if logits is None else torch.stack(logits).cpu()


def _replayed(model: PreTrainedModel, mesh: Mesh, **options: Any) -> tuple[list[Any], list[str]]:
    with driver() as made:
        found = on_ranks(model, mesh, lambda split: _generated(split, **options), "cuda:0", cuda_graphs=True)
    return found, made.calls


@pytest.mark.drawn(1)
@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tp=2), Mesh(pp=2)], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "qwen3", "phi3"])
@in_float64()
def test_replayed_steps_give_what_steps_give(family: str, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is full after three tokens more, and gets room for twice as many."""
    monkeypatch.setattr(decode_graphs, "LEAST_CAPACITY", 8)
    model = tiny_model(family)
    tokens, logits = _generated(model)
    found, calls = _replayed(model, mesh)
    assert [each for each, _ in found] == [tokens] * mesh.size
    (own,) = (x for _, x in found if x is not None)
    assert logits is not None and relative_error(own, logits) <= 1e-9
    # 6 steps of one token on each rank, of which the first for each of two sizes runs as it is
    captures, replays = calls.count("capture"), calls.count("replay")
    assert captures >= 2 * mesh.size and replays == 2 * captures


def test_beams_change_places_in_the_static_cache() -> None:
    model = tiny_model("gpt2")
    options = {"num_beams": 3, "output_logits": False}
    (tokens, _), (found, calls) = _generated(model, **options), _replayed(model, Mesh(tp=2), **options)
    assert [each for each, _ in found] == [tokens] * 2
    assert calls.count("replay") >= 8


def test_a_program_that_reads_rows_without_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that forgets its mask, say: by a trial, since the first step runs in both ways."""

    def without_masks(*args: Any) -> torch.fx.GraphModule:
        made = static_cache(*args)
        for node in made.graph.nodes:
            if op_name(node) == "scaled_dot_product_attention":
                node.kwargs = {**node.kwargs, "attn_mask": None}
        made.recompile()
        return made

    monkeypatch.setattr(decode_graphs, "static_cache", without_masks)
    with pytest.raises(AutodistError, match=r"gives another logits than the step itself .*: generate without"):
        _replayed(tiny_model("gpt2", num_hidden_layers=1), Mesh())


@pytest.mark.drawn(1)
@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tp=2)], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_run_between_graphs(family: str, mesh: Mesh) -> None:
    """Which rows an expert gets is known when the router has run: sizes of other steps."""
    model = tiny_model(family, num_experts=4, num_local_experts=4, num_experts_per_tok=2)
    tokens, logits = _generated(model)
    found, calls = _replayed(model, mesh)
    assert [each for each, _ in found] == [tokens] * mesh.size
    (own,) = (x for _, x in found if x is not None)
    assert logits is not None and relative_error(own, logits) <= 1e-6  # routers cast to float32
    assert calls.count("replay") == 5 * calls.count("capture") >= 5 * 3 * mesh.size  # of 6 steps, the first as it is


def test_what_no_graph_can_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "WAITING", frozenset())
    with pytest.raises(AutodistError, match=r"a CUDA graph cannot hold this step \(.*\): generate without cuda_graphs"):
        _replayed(tiny_model("mixtral", num_hidden_layers=1), Mesh())


def test_a_window_ends_the_replays_before_it_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral's of 10 tokens: a cache of 8 has room for all that it sees, one of 16 has not."""
    monkeypatch.setattr(decode_graphs, "LEAST_CAPACITY", 8)
    model = tiny_model("mistral", sliding_window=10)
    tokens, logits = _generated(model)
    with pytest.warns(UserWarning, match="a window of 10 tokens is reached: from here on steps run without"):
        ((found, own),), calls = _replayed(model, Mesh())
    assert found == tokens and logits is not None and own is not None and relative_error(own, logits) <= 1e-6
    assert calls.count("capture") == 1 and calls.count("replay") == 2


def test_where_there_are_no_graphs_to_capture() -> None:
    model = tiny_model("gpt2", num_hidden_layers=1)
    with pytest.raises(RuntimeSetupError, match="captures steps on CUDA devices, and rank 0 runs on cpu: leave it out"):
        adx.compile(model).to_distributed(device="cpu", cuda_graphs=True)
    with pytest.raises(AutodistError, match="and T5ForConditionalGeneration is none: leave it out"):
        _replayed(tiny_seq2seq("t5", layers=1), Mesh())
