"""Passes return counts, and a pipeline stamps, checks and counts around each."""

from __future__ import annotations

import functools
import operator
from pathlib import Path

import pytest
import torch
import torch.fx
from torch import nn

from passes.fx import node_meta
from passes.fx.node_meta import MetaError, PassRecord, Phase
from passes.fx.run_passes import GraphEdit, PassContext, PassResult, history_text, pass_file, pass_name, run_passes
from passes.normalize.eliminate_dead_code import eliminate_dead_code
from passes.normalize.pipeline import PASSES
from passes.partition.fuse_ops import fuse_ops
from passes.partition.insert_collectives import insert_collectives
from passes.partition.pipeline import emit_rank, rank_passes
from tests.support.graphs.small import Mlp, normalized, plan_for


class Arithmetic(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        unread = x - 1  # noqa: F841  for a pass to remove
        return (x * 2 + 1) * x


def traced() -> torch.fx.GraphModule:
    """%sub = %x - 1; %mul = %x * 2; %add = %mul + 1; %mul_1 = %add * %x."""
    return torch.fx.symbolic_trace(Arithmetic())


def nodes(module: torch.fx.GraphModule) -> dict[str, torch.fx.Node]:
    return {node.name: node for node in module.graph.nodes}


def double_again(graph_module: torch.fx.GraphModule, ctx: PassContext) -> PassResult:
    """%mul = %x * 2 is then read through a %neg of itself, and %add adds 5."""
    edit, found = GraphEdit(graph_module), nodes(graph_module)
    with graph_module.graph.inserting_after(found["mul"]):
        negative = graph_module.graph.call_function(operator.neg, (found["mul"],))
    found["add"].args = (found["mul"], 5)
    found["mul_1"].args = (negative, found["x"])
    return edit.result(matches=2)


def test_counts_are_those_of_a_graph_counted_by_hand() -> None:
    module = traced()
    assert double_again(module, PassContext(Phase.TRACED)) == PassResult(module, matches=2, inserted=1, removed=0)
    # what nothing reads any more: sub, add
    assert eliminate_dead_code(module, PassContext(Phase.TRACED)) == PassResult(module, 2, 0, 2)
    assert list(nodes(module)) == ["x", "mul", "neg", "mul_1", "output"]


def test_new_changed_and_rewired_nodes_are_told_apart() -> None:
    module, ctx = traced(), PassContext(Phase.TRACED)
    run_passes((double_again,), module, ctx)
    file = double_again.__module__.replace(".", "/")
    stamps = {name: (node_meta.made_by(n), node_meta.wired_by(n)) for name, n in nodes(module).items()}
    assert stamps == {
        "x": ("", ""), "sub": ("", ""), "mul": ("", ""), "output": ("", ""),
        "neg": (file, file),  # made
        "add": (file, file),  # another number
        "mul_1": ("", file),  # reads another node, and is what it was
    }  # fmt: skip
    assert ctx.history == [PassRecord("test_run_passes", 2, 1, 0)]


def test_the_last_pass_that_changed_a_node_is_its_maker() -> None:
    def change(number: int, graph_module: torch.fx.GraphModule, ctx: PassContext) -> PassResult:
        nodes(graph_module)["add"].args = (nodes(graph_module)["mul"], number)
        return PassResult(graph_module, 1)

    change.__module__ = "passes.one"
    other = functools.partial(change, 7)
    module, ctx = traced(), PassContext(Phase.TRACED)
    run_passes((double_again, other), module, ctx)
    assert node_meta.made_by(nodes(module)["add"]) == "one" and [r.name for r in ctx.history][-1] == "one"


def test_a_pass_that_leaves_an_undeclared_key_is_named_by_the_traceback_and_nothing_runs_after_it() -> None:
    ran: list[str] = []

    def careless(graph_module: torch.fx.GraphModule, ctx: PassContext) -> PassResult:
        node_meta.set_reads_for(nodes(graph_module)["mul"], None, 0)  # type: ignore[arg-type]
        return PassResult(graph_module, 1)

    def next_one(graph_module: torch.fx.GraphModule, ctx: PassContext) -> PassResult:
        ran.append("next_one")
        return PassResult(graph_module)

    with pytest.raises(MetaError, match="node mul has the key 'reads_for' in the phase TRACED"):
        run_passes((careless, next_one), traced(), PassContext(Phase.TRACED))
    assert ran == []


def test_every_pass_is_named_after_its_file() -> None:
    for one in (*PASSES, *rank_passes(traced(), {}, (), True)):
        function = one.func if isinstance(one, functools.partial) else one
        assert function.__name__ == pass_name(one)  # type: ignore[attr-defined]
        assert (Path(__file__).parents[3] / f"passes/{pass_file(one)}.py").is_file()


def test_a_split_mlp_counts_one_collective_and_stamps_it(tmp_path: Path) -> None:
    whole = normalized(Mlp(), x=("B", "S", 8))
    program = emit_rank(whole, plan_for(whole, tp=2), 0, dump_dir=tmp_path)
    found = {record.name: record for record in node_meta.history(program.graph_module)}
    assert found["extract_stage"] == PassRecord("extract_stage", len(list(whole.graph.nodes)), 0, 0)
    assert found["shard_parameters"].matches == 4
    assert found["insert_collectives"] == PassRecord("insert_collectives", 1, 1, 0)
    (reduce,) = [n for n in program.graph_module.graph.nodes if n.name.startswith("all_reduce")]
    (add,) = reduce.users
    assert node_meta.made_by(reduce) == "partition/insert_collectives"
    assert (node_meta.made_by(add), node_meta.wired_by(add)) == (
        "partition/extract_stage", "partition/insert_collectives",
    )  # fmt: skip
    summary = (tmp_path / "passes.rank0.txt").read_text().splitlines()
    assert summary == history_text((*node_meta.history(whole), *node_meta.history(program.graph_module))).splitlines()
    assert summary[0].split() == ["pass", "matches", "inserted", "removed"]
    assert summary[2].split()[0] == "functionalize" and summary[-1].split()[0] == "fuse_ops"


def test_a_mesh_of_one_rank_has_no_collectives_to_insert() -> None:
    whole = normalized(Mlp(), x=("B", "S", 8))
    history = node_meta.history(emit_rank(whole, plan_for(whole), 0).graph_module)
    assert PassRecord(insert_collectives.__name__, 0, 0, 0) in history
    assert PassRecord(fuse_ops.__name__, 0, 0, 0) in history
