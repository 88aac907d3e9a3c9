"""Graphs of a few nodes for the tests of searches and passes: small modules, traced by torch.fx alone and normalised.

`x=("B", "S", 8)` describes an input: letters are lengths that follow the inputs (B batch, S tokens, P tokens cached
before, T all tokens), numbers are constant. Modules return a dict, as traced models do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from autodist_fx.simulation.run_ranks import simulate
from cost_model.costs.hardware import CPU_GLOO, Hardware, Link
from cost_model.graph.op_graph import OpGraph
from cost_model.mesh import Mesh
from cost_model.partition_plan import PartitionPlan
from cost_model.request.plan_request import PlanRequest
from cost_model.search.planner import plan as make_plan
from passes.fx.arguments import fetch, place
from passes.fx.shape_propagation import Example
from passes.normalize.pipeline import normalize
from passes.op_graph.build import build_op_graph, fingerprint
from passes.partition.pipeline import emit_rank
from passes.program.param_shard import ParamShard
from passes.program.rank_program import RankProgram
from passes.verify.verify import verify

Shape = tuple[int | str, ...]
# On such a machine nothing but bytes has a cost: whatever can be sharded is. On others a matrix of some bytes is not
# worth a collective.
FREE = replace(
    CPU_GLOO, name="free", op_seconds=0.0, view_seconds=0.0, tp_link=Link(0.0, 1e18), pp_link=Link(0.0, 1e18)
)
LENGTHS = ({"B": 11, "S": 23, "P": 29, "T": 52}, {"B": 13, "S": 31, "P": 43, "T": 74})


class Ids:
    """An input of integers: `ids=Ids("B", "S")`."""

    def __init__(self, *shape: int | str) -> None:
        self.shape = shape


def examples(inputs: Mapping[str, Any]) -> tuple[Example, Example]:
    """Meta tensors at two choices of lengths; an input that is a function is called with the lengths (a cache)."""

    def one(lengths: Mapping[str, int]) -> Example:
        used: set[str] = set()

        def make(given: Any) -> Any:
            if callable(given):
                used.update("PS")
                return given(lengths)
            dtype = torch.long if isinstance(given, Ids) else torch.float64
            shape = given.shape if isinstance(given, Ids) else given
            used.update(n for n in shape if isinstance(n, str))
            return torch.empty([lengths[n] if isinstance(n, str) else n for n in shape], dtype=dtype, device="meta")

        made = {name: make(given) for name, given in inputs.items()}
        return Example(made, {name: n for name, n in lengths.items() if name in used})

    return one(LENGTHS[0]), one(LENGTHS[1])


class _Tracer(torch.fx.Tracer):
    proxy_buffer_attributes = True  # a buffer is a node, as for transformers' tracer


def traced(module: nn.Module) -> torch.fx.GraphModule:
    """As torch.fx sees it, before any pass."""
    module = module.double().eval()
    return torch.fx.GraphModule(module, _Tracer().trace(module), type(module).__name__)


def normalized(module: nn.Module, **inputs: Any) -> torch.fx.GraphModule:
    return normalize(traced(module), examples(inputs))


def op_graph_of(module: nn.Module, **inputs: Any) -> OpGraph:
    return build_op_graph(normalized(module, **inputs))


def plan_for(
    whole: torch.fx.GraphModule, tp: int = 1, pp: int = 1, hardware: Hardware = CPU_GLOO, **request: Any
) -> PartitionPlan:
    graph = build_op_graph(whole)
    wanted = PlanRequest(Mesh(tp, pp), hardware, **request)
    return make_plan(graph, wanted, model=type(whole).__name__, fingerprint=fingerprint(graph))


def fill(rank_module: torch.fx.GraphModule, shards: Mapping[str, ParamShard], whole: nn.Module) -> None:
    """Give a rank's module its share of `whole`'s parameters and buffers."""
    for name, shard in shards.items():
        tensor = fetch(whole, shard.source).detach()
        if shard.dim is not None:
            held = [i for start, stop in shard.intervals for i in range(start, stop)]
            tensor = tensor.index_select(shard.dim, torch.tensor(held, dtype=torch.long))
        assert tuple(tensor.shape) == shard.local_shape
        if shard.is_buffer:
            place(rank_module, name, tensor)
        else:
            *path, last = name.split(".")
            owner = rank_module.get_submodule(".".join(path))
            owner._parameters[last] = nn.Parameter(tensor.clone(), requires_grad=False)


def run_split(
    whole: torch.fx.GraphModule,
    plan: PartitionPlan,
    inputs: Mapping[str, Any],
    emit: Callable[[int], RankProgram] | None = None,
) -> dict[str, Any]:
    """Returns what all ranks together compute from `inputs` (for a cache of its own per rank: a list of them)."""
    ranks = range(plan.mesh.size)
    programs = [emit(r) if emit is not None else emit_rank(whole, plan, r) for r in ranks]
    for program in programs:
        fill(program.graph_module, program.param_shards, whole)
    per_rank = [{k: v[r] if isinstance(v, list) else v for k, v in inputs.items()} for r in ranks]
    merged: dict[str, Any] = {}
    for outputs in simulate(programs, per_rank):
        for name, value in outputs.items():
            merged.setdefault(name, value)
    return merged


def assert_split_equals_whole(
    whole: torch.fx.GraphModule, plan: PartitionPlan, inputs: Mapping[str, torch.Tensor]
) -> None:
    """In float64, to 1e-12; and `verify` finds nothing to say against the programs."""
    verify([emit_rank(whole, plan, r) for r in range(plan.mesh.size)], plan, build_op_graph(whole), whole)
    with torch.no_grad():
        found, expected = run_split(whole, plan, inputs), whole(**inputs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


# -- modules -----------------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """x [B, S, d] -> y [B, S, d]"""

    def __init__(self, d: int = 8, wide: int = 12, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, wide, bias), nn.Linear(wide, d, bias)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x + self.down(torch.relu(self.up(x)))}


class Attention(nn.Module):
    """x [B, S, d] -> y [B, S, d], with `heads` query heads of `size` on `groups` KV heads.

    `fused` says how q, k and v lie in one product: "" (three products), "thirds" (all q, all k, all v), "heads" (q, k
    and v of each head; heads == groups) or "groups" (the q heads of a group, its k, its v).
    """

    def __init__(self, d: int = 12, heads: int = 4, groups: int = 2, size: int = 3, fused: str = "") -> None:
        super().__init__()
        self.heads, self.groups, self.size, self.fused = heads, groups, size, fused
        if fused:
            self.qkv = nn.Linear(d, (heads + 2 * groups) * size)
        else:
            self.q, self.k, self.v = (nn.Linear(d, n * size) for n in (heads, groups, groups))
        self.o = nn.Linear(heads * size, d)

    def qkv_heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q [B, heads, S, size]; k, v [B, groups, S, size]"""
        batch, seq = x.shape[0], x.shape[1]
        h, g, n = self.heads, self.groups, self.size
        if self.fused in ("heads", "groups"):
            grouped = self.qkv(x).view(batch, seq, g, h // g + 2, n)
            q, k, v = grouped[:, :, :, :-2], grouped[:, :, :, -2:-1], grouped[:, :, :, -1:]
            parts = [(part.reshape(batch, seq, -1, n), 0) for part in (q, k, v)]
        elif self.fused:
            pieces = self.qkv(x).split((h * n, g * n, g * n), dim=-1)
            parts = [(pieces[i], m) for i, m in enumerate((h, g, g))]
        else:
            parts = [(self.q(x), h), (self.k(x), g), (self.v(x), g)]
        return tuple((part.view(batch, seq, m, n) if m else part).transpose(1, 2) for part, m in parts)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        q, k, v = self.qkv_heads(x)
        if self.heads != self.groups:
            k, v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v))
        a = nn.functional.scaled_dot_product_attention(q, k, v)
        return {"y": x + self.o(a.transpose(1, 2).reshape(x.shape[0], x.shape[1], self.heads * self.size))}


class Stack(nn.Module):
    """The layers one after the other, between an embedding and a head where there is a vocabulary."""

    def __init__(self, layers: Sequence[nn.Module], d: int = 0, vocab: int = 0, tied: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if vocab:
            self.embed, self.head = nn.Embedding(vocab, d), nn.Linear(d, vocab, bias=False)
            if tied:
                self.head.weight = self.embed.weight
        self.vocab = vocab

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(x) if self.vocab else x
        for layer in self.layers:
            x = layer(x)["y"]
        return {"y": self.head(x) if self.vocab else x}
