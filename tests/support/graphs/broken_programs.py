"""Rank programs to be broken on purpose, and the tools to break them with."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.fx import Node

import autodist_fx as adx
from autodist_fx.api.compiled_model import CompiledModel
from cost_model.costs.hardware import CPU_GLOO, Link
from cost_model.errors import VerificationError
from cost_model.graph.placement import Interval
from passes.fx import node_meta
from passes.fx.arguments import place
from passes.ops.comm import COMM_OPS
from passes.partition.pipeline import emit_rank
from passes.program.rank_program import RankProgram
from passes.verify.verify import verify
from tests.support.models import tiny_config

Programs = list[RankProgram]
# Configs beside the families' own: 10 query heads on 2 KV heads fall on 3 ranks in groups that are cut apart; an op
# takes all that another returns (cat(chunk(x))); stages of a single layer send the embedding's sum, and its shards.
_VARIANTS: dict[str, tuple[str, dict[str, int]]] = {
    "uneven": ("llama", {"num_attention_heads": 10, "num_key_value_heads": 2}),
    "tuples": ("diffllama", {"num_attention_heads": 8, "num_key_value_heads": 4}),
    "opt-1": ("opt", {"num_hidden_layers": 1}),
    "llama-1": ("llama", {"num_hidden_layers": 1}),
    "phi3-1kv": ("phi3", {"num_key_value_heads": 1}),
}


# What is broken is found at certain places of the programs, so these must not move when a preset is measured anew.
_HARDWARE = dataclasses.replace(CPU_GLOO, name="slow links", tp_link=Link(30e-6, 1.1e9, 60e-6))


@functools.cache
def compiled(family: str, tp: int, pp: int, use_cache: bool = False) -> CompiledModel:
    name, changes = _VARIANTS.get(family, (family, {}))
    config = tiny_config(name, **changes)
    return adx.compile(config, tp=tp, pp=pp, use_cache=use_cache, hardware=_HARDWARE, verify=False)


def emitted(family: str, tp: int, pp: int, use_cache: bool = False) -> Programs:
    """Fresh programs: they may be changed."""
    model = compiled(family, tp, pp, use_cache)
    kinds = model.main.traced.layer_kinds
    return [emit_rank(model.graph, model.plan, rank, layer_kinds=kinds) for rank in range(tp * pp)]


def check(programs: Programs, family: str, tp: int, pp: int, use_cache: bool = False) -> None:
    model = compiled(family, tp, pp, use_cache)
    verify(programs, model.plan, model.op_graph, model.graph)


# -- finding nodes -----------------------------------------------------------------------------------------------------


def calls(program: RankProgram, *targets: Any) -> list[Node]:
    """Nodes that call one of the targets: functions, methods by name, or modules by the end of their path."""
    found = []
    for node in program.graph_module.graph.nodes:
        by_path = node.op == "call_module" and any(str(node.target).endswith(str(t)) for t in targets)
        if by_path or (node.op in ("call_function", "call_method") and node.target in targets):
            found.append(node)
    return found


def comms(program: RankProgram) -> list[Node]:
    return calls(program, *COMM_OPS)


# -- changing nodes ----------------------------------------------------------------------------------------------------


def bypass(node: Node) -> None:
    """Take the node out; its users read what it read."""
    node.replace_all_uses_with(node.args[0])
    node.graph.erase_node(node)


def with_argument(node: Node, position: int, value: Any) -> None:
    args = list(node.args)
    args[position] = value
    node.args = tuple(args)


def with_keyword(node: Node, **changes: Any) -> None:
    node.kwargs = {**node.kwargs, **changes}


def add_after(node: Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Node:
    """A call that nothing uses."""
    with node.graph.inserting_after(node):
        new = node.graph.call_function(target, args, kwargs or {})
    node_meta.copy(node, new)
    return new


def with_slice(program: RankProgram, name: str, intervals: Sequence[Interval]) -> None:
    """Let the rank hold other elements of a parameter, and everything in its module agree with that."""
    old = program.param_shards[name]
    new = dataclasses.replace(old, intervals=tuple(intervals))
    tensor = torch.nn.Parameter(torch.empty(new.local_shape, dtype=getattr(torch, new.dtype), device="meta"))
    for path, shard in list(program.param_shards.items()):
        if (shard.source, shard.intervals) == (old.source, old.intervals):
            program.param_shards[path] = dataclasses.replace(new, name=path)  # type: ignore[index]
            place(program.graph_module, path, tensor)


# -- cases: a family's programs, a change that breaks them, and what verify must say -----------------------------------

Break = Callable[[Programs], object]


@dataclasses.dataclass(frozen=True, slots=True)
class BrokenProgram:
    """`change` breaks the programs of `family` on tp x pp; `message` is a pattern of what verify must say of them."""

    family: str
    tp: int
    pp: int
    message: str
    use_cache: bool
    change: Break

    def __str__(self) -> str:
        return f"{self.change.__name__}-{self.family}"


class BrokenPrograms:
    """Collects the broken programs of one test file: a decorator of the functions that break them."""

    def __init__(self) -> None:
        self.cases: list[BrokenProgram] = []

    def __call__(
        self, family: str, tp: int, pp: int, message: str, *, use_cache: bool = False
    ) -> Callable[[Break], Break]:
        def register(change: Break) -> Break:
            self.cases.append(BrokenProgram(family, tp, pp, message, use_cache, change))
            return change

        return register


def check_refused(case: BrokenProgram) -> None:
    """The programs pass verify as they are, and once broken are refused with the case's message."""
    programs = emitted(case.family, case.tp, case.pp, case.use_cache)
    check(programs, case.family, case.tp, case.pp, case.use_cache)
    case.change(programs)
    with pytest.raises(VerificationError) as caught:
        check(programs, case.family, case.tp, case.pp, case.use_cache)
    assert re.search(case.message, str(caught.value)), str(caught.value)
