"""Models in training mode: the masks are those of the whole batch on one rank, whatever the mesh.

The truth is transformers' own model, which draws from the same generator and knows of no split
(tests/support/graphs/eager_draws.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Dinov2Config,
    Dinov2ForImageClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import autodist_fx as adx
from autodist_fx.calls.call import Call
from autodist_fx.errors import AutodistError
from autodist_fx.simulation.run_ranks import simulate
from passes.fx import node_meta
from passes.fx.randomness import seeded_nodes
from passes.ops.random import RANDOM_STATE, keep_mask, random_state, seeded_dropout
from passes.serialize.read_graph import graph_from_json
from passes.serialize.write_graph import graph_to_json
from tests.support.graphs.eager_draws import seeded
from tests.support.models import randomized, relative_error, tiny_model
from tests.support.training.gradients import batch_of, gradient_errors

Inputs = dict[str, torch.Tensor]
SEED, STEP = 5, 3
_TEXT = {"vocab_size": 128, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 6}


def _gpt2() -> tuple[PreTrainedModel, Inputs]:
    return tiny_model("gpt2", n_layer=1, attn_pdrop=0.2, resid_pdrop=0.1, embd_pdrop=0.1), batch_of()


def _llama() -> tuple[PreTrainedModel, Inputs]:
    return tiny_model("llama", num_hidden_layers=1, attention_dropout=0.2), batch_of()  # KV heads that are shared


def _bert() -> tuple[PreTrainedModel, Inputs]:
    config = BertConfig(**_TEXT, intermediate_size=80, max_position_embeddings=64)
    return BertForMaskedLM(config).double(), batch_of()


def _t5() -> tuple[PreTrainedModel, Inputs]:
    config = T5Config(vocab_size=128, d_model=48, d_kv=8, d_ff=80, num_layers=1, num_heads=6)
    ids = batch_of()["input_ids"]
    return T5ForConditionalGeneration(config).double(), {
        "input_ids": ids, "decoder_input_ids": ids.flip(1), "labels": ids
    }  # fmt: skip


def _dinov2() -> tuple[PreTrainedModel, Inputs]:
    """Stochastic depth, written with torch.rand, beside dropout."""
    config = Dinov2Config(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=6, mlp_ratio=2, image_size=16, patch_size=8,
        drop_path_rate=0.6, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, num_labels=5,
    )  # fmt: skip
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    return Dinov2ForImageClassification(config).double(), {"pixel_values": images, "labels": torch.arange(4)}


# What casts to float32 by itself (T5's softmax) may be off by a last bit of that.
CASES: dict[str, tuple[Callable[[], tuple[PreTrainedModel, Inputs]], float]] = {
    "gpt2": (_gpt2, 1e-9), "llama": (_llama, 1e-6), "bert": (_bert, 1e-9), "t5": (_t5, 1e-6), "dinov2": (_dinov2, 1e-9),
}  # fmt: skip


@pytest.mark.drawn(2)
@pytest.mark.parametrize(
    ("family", "mesh"),
    [("gpt2", (2, 2)), ("gpt2", (3, 1)), ("llama", (2, 1)), ("bert", (1, 2)), ("t5", (2, 1)), ("dinov2", (2, 1))],
)
def test_any_mesh_draws_the_masks_of_one_rank(
    family: str, mesh: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, tolerance = CASES[family]
    model, inputs = make()
    randomized(model).train()
    with seeded(monkeypatch, SEED, STEP) as draws:
        wanted = model(**inputs)
        wanted.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    compiled = adx.compile(model, tp=mesh[0], pp=mesh[1], train=True, input_names=tuple(inputs))
    with torch.no_grad():
        found = compiled.simulate(**inputs, seed=SEED, step=STEP)
    assert relative_error(found.loss, wanted.loss) <= tolerance
    assert relative_error(found.logits, wanted.logits) <= tolerance
    errors = gradient_errors(compiled.gradients(**inputs, seed=SEED, step=STEP), gradients)
    assert max(errors.values()) <= tolerance
    assert len(seeded_nodes(compiled.graph)) == draws.count


@torch.no_grad()
def test_masks_on_ranks_are_pieces_of_the_whole_masks_bit_by_bit() -> None:
    """Each rank's program, read back from JSON, drops of ones what a mask that is drawn whole says; and no two ops have
    one mask."""
    model, inputs = _gpt2()
    compiled = adx.compile(model.train(), tp=3, train=True, input_names=tuple(inputs))
    shapes = {"B": 2, "S": inputs["input_ids"].shape[1]}
    wholes = {}
    for node in seeded_nodes(compiled.graph):
        sizes = zip(node_meta.tensor(node).shape, node_meta.symbols(node), strict=True)
        shape = tuple(shapes.get(symbol, n) for n, symbol in sizes)
        wholes[node.name] = keep_mask(random_state(SEED, STEP), node.args[2], node.args[3], shape, (0, 1, 1))
    cuts = set()
    for rank in range(3):
        program = compiled.program(rank)
        read = graph_from_json(json.loads(json.dumps(graph_to_json(program.graph_module))), lambda *_: torch.empty(0))
        assert len(seeded_nodes(read)) == len(wholes)
        for node in seeded_nodes(read):
            whole = wholes[node.name]
            cut = node.args[6] if len(node.args) > 6 else None
            mine = whole
            if cut is not None:
                mine = torch.cat([whole.narrow(cut[0], a, b - a) for a, b in cut[2]], cut[0])
            args = [a if not isinstance(a, torch.fx.Node) else None for a in node.args[2:]]
            drawn = seeded_dropout(torch.ones(mine.shape), random_state(SEED, STEP), *args)  # type: ignore[arg-type]
            assert torch.equal(drawn != 0, mine)
            if cut is not None:
                cuts.add((mine.dim(), cut[0]))
    assert cuts == {(4, 1), (3, 2)}  # attention's by heads, hidden states inside
    hidden = [m for m in wholes.values() if m.dim() == 3]
    assert len(hidden) == 3 and not any(torch.equal(a, b) for a in hidden for b in hidden if a is not b)


@torch.no_grad()
def test_microbatches_draw_the_rows_of_the_whole_batch() -> None:
    model, inputs = _gpt2()
    inputs = {"input_ids": inputs["input_ids"].repeat(2, 1)}  # four rows, two of them twice
    compiled = adx.compile(model.train(), tp=2, train=True, input_names=tuple(inputs))
    whole = compiled.simulate(**inputs, seed=SEED, step=STEP).logits
    assert not torch.allclose(whole[0], whole[2])  # rows draw for themselves
    programs = list(compiled.variant_for(_call(inputs), 0).programs.values())
    for start, stop in ((0, 1), (1, 4)):
        given = {"input_ids": inputs["input_ids"][start:stop], RANDOM_STATE: random_state(SEED, STEP, start)}
        found = simulate(programs, [given] * 2)[0]["logits"]
        assert relative_error(found, whole[start:stop]) <= 1e-12
    other = compiled.simulate(**inputs, seed=SEED, step=STEP + 1).logits
    assert not torch.allclose(other, whole)
    assert torch.equal(compiled.simulate(**inputs).logits, compiled.simulate(**inputs, seed=0, step=0).logits)


def _call(inputs: Inputs) -> Call:
    return Call(inputs, {}, False, None, True)


def test_what_draws_numbers_is_refused_where_nobody_gives_their_state() -> None:
    """Programs that are not to be trained, and those with a cache."""
    model, inputs = _gpt2()
    with pytest.raises(AutodistError, match=r"draws random numbers .*train=True"):
        adx.compile(model.train(), tp=2)
    compiled = adx.compile(model, tp=2, train=True, input_names=("input_ids",))
    with pytest.raises(AutodistError, match=r"draws random numbers .*without a cache"):
        compiled.simulate(input_ids=inputs["input_ids"], use_cache=True)
