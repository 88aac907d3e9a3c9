"""Which tp and pp: candidates are what planning each mesh gives, and ranked by what was asked for."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

import autodist_fx as adx
from cost_model.costs.hardware import H100
from cost_model.errors import MeshError, NoPlanFits, PlanError
from cost_model.mesh import Mesh
from tests.support.models import tiny_config

SHAPES: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 32000, "max_position_embeddings": 8192,
}  # fmt: skip
LARGE = tiny_config("llama", num_hidden_layers=2, dtype="bfloat16", **SHAPES)


def choose(objective: str, devices: int = 4, **options: Any) -> adx.MeshChoice:
    return adx.choose_mesh(LARGE, devices, hardware="h100", objective=objective, **options)


plain_choice = cache(choose)


def test_latency_is_that_of_the_plan_compile_makes() -> None:
    choice = plain_choice("latency")
    meshes = {(c.mesh.tp, c.mesh.pp) for c in choice.candidates}
    assert meshes == {(1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 1)}, "all whose ranks divide 4"
    assert [c.seconds for c in choice.candidates] == sorted(c.seconds for c in choice.candidates)
    for c in choice.candidates:
        assert c.seconds == c.plan.predicted_seconds and c.memory_bytes == max(s.memory_bytes for s in c.plan.stages)
        if c.mesh in (Mesh(4, 1), Mesh(2, 2)):
            limit = [int(0.9 * H100.memory_bytes)] * c.mesh.pp
            options: dict[str, Any] = {"hardware": "h100", "objective": "latency", "max_memory": limit, "verify": False}
            assert c.plan == adx.compile(LARGE, tp=c.mesh.tp, pp=c.mesh.pp, use_cache=True, **options).plan
    assert adx.compile(LARGE, plan=choice.best.plan, use_cache=True, verify=False).plan == choice.best.plan
    assert choice.best.mesh.pp == 1, "stages of one request work one after the other"
    assert choice.best.mesh.tp == 4 and choice.best.seconds < choice.candidates[-1].seconds


def test_a_prompt_is_predicted_at_its_length() -> None:
    choice = choose("latency", devices=2, sizes={"P": 300})
    for c in choice.candidates:
        at = {"B": 1, "S": 300, "P": 0}
        plan = adx.compile(
            LARGE, tp=c.mesh.tp, pp=c.mesh.pp, hardware="h100", use_cache=True, verify=False, sizes=at,
            pin={op.module: op.role for op in c.plan.ops if op.role} if c.mesh.tp > 1 else None,
        ).plan  # fmt: skip
        assert c.prompt_seconds == pytest.approx(plan.predicted_seconds, rel=0.02)


def test_throughput_counts_copies_and_a_full_pipeline() -> None:
    choice = choose("throughput", sequences=64)
    for c in choice.candidates:
        assert c.copies * c.mesh.size == 4 and c.copies * c.sequences == 64
        batch = dict(c.plan.sizes)["B"]
        assert batch * c.mesh.pp == c.sequences, "a micro-batch for each stage"
        slowest = max(stage.seconds for stage in c.plan.stages)
        assert c.tokens_per_second == pytest.approx(c.copies * batch / slowest, rel=1e-9)
        whole_cache = 2 * 2 * 2 * 8 * 128 * 513 * c.sequences  # k and v, bfloat16, layers, KV heads, positions
        held = sum(stage.kv_cache_bytes for stage in c.plan.stages) * c.mesh.tp
        assert held == pytest.approx(whole_cache, rel=1e-9), "all micro-batches in flight"
    tokens = [c.tokens_per_second for c in choice.candidates]
    assert tokens == sorted(tokens, reverse=True)


def test_under_load_a_mesh_has_as_many_sequences_as_fit() -> None:
    roomy, tight = choose("throughput", devices=2), choose("throughput", devices=2, max_memory="2GiB")
    assert {c.sequences * c.copies for c in roomy.candidates} == {512}, "256 a device"
    assert all(c.fits and c.memory_bytes <= 2 * 2**30 for c in tight.candidates)
    alone = next(c for c in tight.candidates if c.mesh == Mesh(1, 1))
    assert 16 <= alone.sequences < 256
    twice = {"B": 2 * alone.sequences}
    more = adx.compile(LARGE, hardware="h100", use_cache=True, verify=False, sizes=twice).plan.stages[0].memory_bytes
    assert more > 2 * 2**30, "twice as many do not fit"


def test_memory_takes_the_mesh_whose_fullest_rank_is_emptiest() -> None:
    choice = plain_choice("memory")
    full = [c.memory_bytes for c in choice.candidates]
    assert full == sorted(full) and choice.best.mesh.size == 4


def test_what_does_not_fit_is_never_chosen_unless_nothing_does() -> None:
    candidates = plain_choice("memory").candidates
    least = candidates[0].memory_bytes
    alone = next(c.memory_bytes for c in candidates if c.mesh == Mesh(1, 1))
    choice = choose("latency", max_memory=(least + alone) // 2)
    assert [c.fits for c in choice.candidates] == sorted((c.fits for c in choice.candidates), reverse=True)
    assert choice.best.fits and not choice.candidates[-1].fits
    assert "does not fit" in str(choice)
    with pytest.raises(NoPlanFits, match=r"fits on no mesh of 1 devices: the least is .* use more devices"):
        choose("latency", devices=1, max_memory=alone // 2)


def test_pins_and_cuts_hold_for_every_mesh() -> None:
    choice = choose("latency", pin={"q_proj": "column"}, cuts=[1])
    assert {c.mesh.pp for c in choice.candidates} == {2}
    assert all(c.plan.op(op).role == "column" for c in choice.candidates for op in ("model_layers_0_self_attn_q_proj",))
    assert [mesh for mesh, _ in choice.impossible] == [Mesh(1, 2)]
    assert "tp=1 x pp=2: model.layers.0.self_attn.q_proj cannot be column: tp=1 cuts nothing" in str(choice)
    with pytest.raises(PlanError, match="matches no linear"):
        choose("latency", pin={"nothing_proj_at_all": "column"})
    with pytest.raises(PlanError, match="no mesh is chosen for objective 'shard'"):
        choose("shard")
    with pytest.raises(MeshError, match="no mesh of 2 devices has pp=3"):
        choose("latency", devices=2, cuts=[1, 2])


def test_text_and_json() -> None:
    choice = plain_choice("latency")
    text = str(choice)
    assert all(len(line) <= 120 for line in text.splitlines())
    assert text.startswith("LlamaForCausalLM on 4 h100, by latency; predicted at B=1, S=1, P=512")
    data = json.loads(json.dumps(choice.to_dict()))
    assert [(c["tp"], c["pp"]) for c in data["candidates"]] == [(c.mesh.tp, c.mesh.pp) for c in choice.candidates]
