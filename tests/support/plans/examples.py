"""Small plans made by hand, and one as large as a 70B model's, for the tests of what reads and prints plans."""

from __future__ import annotations

from dataclasses import replace

from cost_model.graph.placement import PARTIAL, REPLICATE, Layout, shard
from cost_model.mesh import Mesh
from cost_model.partition_plan import PartitionPlan
from cost_model.plan.data import Alternative, CutOption, CutPlan, Device, Hop, OpPlan, ParamPlan, Request, StageSummary

R, P = REPLICATE, PARTIAL
CHOICES = (
    (Alternative("column"), Alternative("row", 0.002, 0), Alternative("replicate", -0.001, 331776)),
    (Alternative("row"), Alternative("column", impossible="no grain to cut"), Alternative("replicate", 0.003, 331776)),
)
HEADS = Layout(576, (((0, 384),), ((384, 576),)))  # 9 heads of 64 with 3 KV heads: 2 groups and 1
HIDDEN = Layout(1536, (((0, 768),), ((768, 1536),)))
VOCAB = Layout(49152, (((0, 24576),), ((24576, 49152),)))
THIRDS = Layout(24, (((0, 4), (8, 12), (16, 20)), ((4, 8), (12, 16), (20, 24))))  # a fused q|k|v


def _linear(name: str, module: str, role: str, layout: int, home: int) -> OpPlan:
    x, w, out = {
        "column": (R, shard(0), shard(2)),
        "row": (shard(2), shard(1), P),
        "replicate": (R, R, R),
    }[role]
    at = {"column": (-1, layout), "row": (layout, layout), "replicate": (-1, -1)}[role]
    return OpPlan(
        name, "linear", home, (home,), (x, w), (out,), (role == "row",), factor="" if role == "replicate" else role,
        role=role, module=module, weight=module + ".weight", input_layouts=at,
        output_layouts=(layout if role == "column" else -1,), compute_seconds=0.00123,
        comm_seconds=0.0005 if role == "row" else 0.0, comm_bytes=589824 if role == "row" else 0,
        choice={"column": 0, "row": 1, "replicate": -1}[role],
    )  # fmt: skip


def small_plan(layers: int = 4, tp: int = 2, pp: int = 2) -> PartitionPlan:
    """A Llama-like plan with a tied embedding, 9 heads on 2 ranks, a recomputed mask and a hop for each border."""
    layouts: tuple[Layout, ...] = (HEADS, HIDDEN, VOCAB, THIRDS)
    if tp != 2:
        layouts = tuple(
            Layout(n, tuple(((n * r // tp, n * (r + 1) // tp),) for r in range(tp))) for n in (576, 1536, 49152, 24)
        )
    first, last = 0, pp - 1
    both = tuple(sorted({first, last}))
    everywhere = tuple(range(pp))
    ops = [
        OpPlan("input_ids", "input", 0, everywhere, (), (R,), (False,)),
        OpPlan("p_embed_weight", "param", 0, both, (), (shard(0),), (False,), output_layouts=(2,)),
        OpPlan("embedding", "embedding", 0, (0,), (R, shard(0)), (P,), (True,), "vocab", "vocab",
               "model.embed_tokens", "model.embed_tokens.weight", (-1, 2), (-1,)),
        OpPlan("mask", "le", 0, everywhere, (R, R), (R,), (False,), module="model"),
    ]  # fmt: skip
    params = [ParamPlan("model.embed_tokens.weight", (49152, 576), "bfloat16", shard(0), 2, both, True)]
    roles = (
        ("self_attn.q_proj", "column", (576, 576), 0),
        ("self_attn.o_proj", "row", (576, 576), 0),
        ("mlp.up_proj", "column", (1536, 576), 1),
        ("mlp.down_proj", "row", (576, 1536), 1),
    )
    per_stage = -(-layers // pp)
    for i in range(layers):
        for path, role, shape, layout in roles:
            module = f"model.layers.{i}.{path}"
            ops.append(_linear(f"linear_{len(ops)}", module, role, layout, i // per_stage))
            placement = shard(0 if role == "column" else 1)
            params.append(
                ParamPlan(module + ".weight", shape, "bfloat16", placement, layout, (i // per_stage,), True)
            )  # fmt: skip
        name = f"model.layers.{i}.input_layernorm.weight"
        params.append(ParamPlan(name, (576,), "bfloat16", R, -1, (i // per_stage,), False))
        ops.append(
            OpPlan(f"add_{i}", "add", i // per_stage, (i // per_stage,), (R, R), (R,), (False,),
                   module=f"model.layers.{i}")
        )  # fmt: skip
    ops.append(
        OpPlan("linear_head", "linear", last, (last,), (R, shard(0)), (shard(2),), (True,), "column", "vocab",
               "lm_head", "model.embed_tokens.weight", (-1, 2), (2,))
    )  # fmt: skip
    hops = tuple(
        Hop(f"add_{(s + 1) * per_stage - 1}", 0, s, s + 1, s, False, 4 * 128 * 576 * 2) for s in range(pp - 1)
    )  # fmt: skip
    stages = tuple(
        StageSummary(
            index=s,
            layers=tuple(f"model.layers.{i}" for i in range(layers) if i // per_stage == s),
            compute_seconds=0.0123 + s / 1000,
            comm_seconds=0.0042,
            recomputed=("mask",) if s else (),
            flops=1.5e9,
            weight_bytes=120 * 2**20,
            kv_cache_bytes=3 * 2**19,
            activation_bytes=6 * 2**20,
            workspace_bytes=2**20,
            collectives=(("all_reduce", 2 * per_stage, 1179648 * per_stage), ("all_gather", 1, 50331648)),
        )
        for s in range(pp)
    )
    cuts = tuple(
        CutPlan(
            tuple(
                CutOption(f"add_{i}", f"model.layers.{i}", 0.01 + i / 1000, 0.12 - i / 1000, 589824)
                for i in (0, (s + 1) * per_stage - 1)
            ),
            1,
        )
        for s in range(pp - 1)
    )
    return PartitionPlan(
        mesh=Mesh(tp=tp, pp=pp), model="LlamaForCausalLM", fingerprint="0123456789abcdef" * 4, hardware="cpu-gloo",
        objective="default", sizes=(("B", 4), ("S", 128), ("T", 128)), ops=tuple(ops), params=tuple(params),
        layouts=layouts, hops=hops, stages=stages, choices=CHOICES, cuts=cuts, one_device_seconds=0.05,
        device_memory_bytes=8 * 2**30,
        request=Request((("*.q_proj", "column"),), tuple(range(1, pp))),
    )  # fmt: skip


def large_plan(ops: int = 8000) -> PartitionPlan:
    """80 layers on tp=8 x pp=4 with `ops` ops in all, for sizes and seconds."""
    plan = small_plan(80, 8, 4)
    more = tuple(
        OpPlan(f"mul_{i}", "mul", i % 4, (i % 4,), (shard(1), R), (shard(1),), (False,), factor="d1",
               module=f"model.layers.{i % 80}.self_attn", input_layouts=(0, -1), output_layouts=(0,))
        for i in range(ops - len(plan.ops))
    )  # fmt: skip
    fixed = Request((), ("model.layers.1", 2, 3), (2**30,) * 4, (Device("h100", 2**31),) * 4)
    return replace(plan, ops=plan.ops + more, request=fixed)


__all__ = ["large_plan", "small_plan"]
