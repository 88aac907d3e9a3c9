"""Any config on any mesh: random sizes that divide by nothing, on up to 8 ranks.

    ADX_PROPERTY_EXAMPLES=300 pytest tests/families/test_property.py      # CI runs fewer

For each: what the ranks compute together is what the model computes, in a world without float32 (in_float64: norms and
rotary tables are float64, too), to 1e-9, with and without a KV cache; every element of every parameter is on the ranks
that the plan says, with the model's value; and no rank holds more than it must (random_configs.most_held).
"""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import autodist_fx as adx
from autodist_fx.api.compiled_model import CompiledModel
from cost_model.costs.hardware import CPU_GLOO, Hardware
from cost_model.graph.placement import Layout
from passes.fx.arguments import fetch
from passes.program.param_shard import ParamShard
from tests.support.decoding import decoded_logits, positions_of
from tests.support.float64 import in_float64
from tests.support.graphs.random_models import random_costs
from tests.support.graphs.small import FREE
from tests.support.models import padded_batch, relative_error
from tests.support.random_configs import FAMILIES, SEPARATE, Case, cases, most_held

EXAMPLES = int(os.environ.get("ADX_PROPERTY_EXAMPLES", "12"))
# Every example builds a model and its graphs: shrinking one that fails would take minutes.
_property = settings(
    max_examples=-(-EXAMPLES // len(FAMILIES)),
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


def _batch(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sequences, the first padded on the left. Eager attention gets the padding on the right: it takes its softmax
    in float32, where a token that sees nothing but a float64's lowest numbers gets NaN, in the model itself."""
    ids, mask = padded_batch(2, 7, case.vocab)
    return ids, mask.flip(1) if case.attention == "eager" else mask


@in_float64()
def _check(case: Case, use_cache: bool, hardware: Hardware = CPU_GLOO) -> None:
    model = case.model()
    ids, mask = _batch(case)
    tp, pp = case.mesh
    compiled = adx.compile(model, tp=tp, pp=pp, use_cache=use_cache, hardware=hardware)  # which verifies it
    positions = positions_of(model, mask) if use_cache else {}
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False, **positions).logits
    if use_cache:
        logits = decoded_logits(compiled, model, ids, mask)
    else:
        logits = compiled.simulate(input_ids=ids, attention_mask=mask).logits
    kept = mask.bool()  # what padding attends to is nobody's business
    assert relative_error(logits[kept], expected[kept]) <= 1e-9
    _check_every_element(compiled, model)
    _check_shares(compiled, case)


def _check_every_element(compiled: CompiledModel, model: PreTrainedModel) -> None:
    """Each rank's tensors are slices of the model's, and each stage's together are the parameters that it uses."""
    plan = compiled.plan
    planned = {p.name: p for p in plan.params}
    tensors = {id(p): p for p in model.parameters()}
    held: dict[tuple[str, int], dict[int, ParamShard]] = {}  # (parameter, stage) -> tp rank -> what it holds
    for rank in range(plan.mesh.size):
        program = compiled.program(rank)
        for name, shard in program.param_shards.items():
            original = fetch(model, shard.source).detach()
            index = [i for start, stop in shard.intervals for i in range(start, stop)]
            piece = original if shard.dim is None else original.index_select(shard.dim, torch.tensor(index).long())
            assert torch.equal(fetch(program.graph_module, name), piece), f"rank {rank}: {name}"
            if not shard.is_buffer:
                assert shard.source in planned and program.stage in planned[shard.source].stages
                held.setdefault((shard.source, program.stage), {})[program.tp_rank] = shard
    assert {id(fetch(model, name)) for name, _ in held} == set(tensors), "each parameter of the model is somewhere"
    said: dict[str, set[tuple[int, Layout | None]]] = {}  # parameter -> (dim, layout) in the plan
    for param in plan.params:
        said[param.name] = {(param.placement.dim, plan.layout(param.layout))}
    for op in plan.ops:  # an op may take its part of what is planned as whole; then only that part is held
        for ref, placement, index in zip(compiled.op_graph[op.name].inputs, op.inputs, op.input_layouts, strict=True):
            if ref.op in said:
                said[ref.op].add((placement.dim, plan.layout(index)))
    for param in plan.params:
        assert param.stages
        for stage in param.stages:
            shards = held[param.name, stage]
            dim = next(iter(shards.values())).dim
            if dim is None:  # whole on every rank, but for a bias that a sum over ranks adds once
                assert any(layout is None for _, layout in said[param.name])
                assert len(shards) == plan.mesh.tp or (list(shards) == [0] and len(param.shape) == 1)
                continue
            parts = tuple(shards[tp_rank].intervals for tp_rank in range(plan.mesh.tp))
            assert {s.dim for s in shards.values()} == {dim}
            assert (dim, Layout(param.shape[dim], parts)) in said[param.name]
            owners = np.zeros(param.shape[dim], dtype=int)
            for part in parts:
                assert all(a[1] < b[0] for a, b in pairwise(part))
                for start, stop in part:
                    owners[start:stop] += 1
            assert owners.min() >= 1, f"{param.name}: an element is nowhere"


def _check_shares(compiled: CompiledModel, case: Case) -> None:
    """No rank holds more of a matmul's weight than indivisible pieces force upon it."""
    limits = most_held(case)
    for param in compiled.plan.params:
        ending = next((end for end in limits if param.name.endswith(f"{end}.weight")), None)
        if not param.matmul or ending is None:
            continue
        limit, layout = limits[ending], compiled.plan.layout(param.layout)
        if layout is not None:
            dim = param.placement.dim  # one that no limit is known for can be cut anywhere
            assert layout.max_local_size <= limit.get(dim, -(-layout.size // case.mesh[0])), f"{param.name}: {layout}"
        elif compiled.plan.hardware == "free":
            assert any(n >= param.shape[dim] for dim, n in limit.items()), f"{param.name} is on every rank"


@pytest.mark.drawn(3)
@pytest.mark.parametrize("family", FAMILIES)  # a test each: one of 300 examples would run into a test's time limit
@_property
@given(data=st.data())
@torch.no_grad()
def test_any_config_on_any_mesh(family: str, data: st.DataObject) -> None:
    case = data.draw(cases(family))
    use_cache = data.draw(st.sampled_from([False, False, True]), "use_cache")
    plan_seed = data.draw(st.sampled_from([None, None, *range(100)]), "plan_seed")
    if plan_seed is None:
        _check(case, use_cache, data.draw(st.sampled_from([CPU_GLOO, FREE]), "hardware"))
    else:
        with random_costs(plan_seed):  # not the best plan, but any that the search may find
            _check(case, use_cache)


def _plain(family: str, heads: int, kv_heads: int, tp: int, attention: str = "sdpa") -> Case:
    return Case(
        family, (tp, 1), layers=1, heads=heads, kv_heads=kv_heads, head_dim=4, hidden=4 * heads, wide=13, vocab=31,
        attention=attention,
    )  # fmt: skip


@pytest.mark.drawn(3)
@pytest.mark.parametrize("kv_heads", [1, 2, 3])
@pytest.mark.parametrize(
    "family, attention", [*((f, "sdpa") for f in (*SEPARATE, "phi3", "falcon")), ("llama", "eager"), ("phi3", "eager")]
)
@torch.no_grad()
def test_fewer_kv_heads_than_ranks(family: str, attention: str, kv_heads: int) -> None:
    case = _plain(family, 6, kv_heads, 4, attention)
    if family == "falcon":
        case = replace(case, switches=(("new_decoder_architecture", True),))
    if attention == "sdpa":
        _check(case, use_cache=True)
    _check(case, use_cache=False, hardware=FREE)


@pytest.mark.drawn(3)
@pytest.mark.parametrize("tp", [2, 3, 4, 5])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_seven_heads(family: str, tp: int) -> None:
    """On ranks that don't divide them; each with a KV head of its own, then all with one."""
    _check(_plain(family, 7, 1 if family == "falcon" else 7, tp), use_cache=False)
    if family in ("llama", "phi3"):
        _check(_plain(family, 7, 1, tp), use_cache=True)


@pytest.mark.drawn(2)
@pytest.mark.parametrize("mesh", [(8, 1), (3, 2), (1, 4)], ids=lambda m: f"{m[0]}x{m[1]}")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_fewer_of_everything_than_ranks(family: str, mesh: tuple[int, int]) -> None:
    """One layer, two heads, a vocabulary, widths and layers smaller than the mesh: some ranks hold nothing of a weight,
    and stages end inside of the layer."""
    size = 8 if family == "gpt2" else 6  # a multiple of the heads, which transformers 5 wants of llama
    case = Case(family, mesh, layers=1, heads=2, kv_heads=2, head_dim=4, hidden=size, wide=3, vocab=5, tied=True)
    _check(case, use_cache=False, hardware=FREE)
    _check(case, use_cache=True, hardware=FREE)
