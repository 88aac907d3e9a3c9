"""graph_changes counts exactly the edits that were made, and what the passes do to a whole model adds up."""

from __future__ import annotations

import copy
import operator
import random
from collections import Counter

import pytest
import torch

import autodist_fx as adx
from passes.fx.changes import graph_changes
from passes.partition.pipeline import emit_rank
from tests.support.graphs.small import Mlp, Stack, normalized, plan_for
from tests.support.models import census, tiny_config

EDITS = ("insert", "replace", "remove", "change", "rewire")


def chain(length: int) -> torch.fx.GraphModule:
    """y = ((x + 1) + 2) ..., with x to be read by each."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    y = x
    for i in range(length):
        y = graph.call_function(torch.add, (y, i + 1))
    graph.output(y)
    return torch.fx.GraphModule(torch.nn.Module(), graph)


@pytest.mark.parametrize("seed", range(20))
def test_the_edits_that_were_made_are_counted(seed: int) -> None:
    rng = random.Random(seed)
    before = chain(30)
    after = copy.deepcopy(before)
    nodes = [node for node in after.graph.nodes if node.op == "call_function"]
    x = next(iter(after.graph.nodes))
    expected: Counter[str] = Counter()
    # every third node is edited, so that an edit shows on one node and on the reader of what was inserted or removed
    for node in nodes[1:-1:3]:
        edit = rng.choice(EDITS)
        if edit == "insert":
            with after.graph.inserting_after(node):
                new = after.graph.call_function(torch.relu, (node,))
            node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
            expected.update(["inserted relu", "rewired add"])
        elif edit == "replace":
            node.target = torch.mul
            expected["replaced add -> mul"] += 1
        elif edit == "remove":
            node.replace_all_uses_with(node.args[0])
            after.graph.erase_node(node)
            expected.update(["removed add", "rewired add"])
        elif edit == "change":
            node.args = (node.args[0], 1000)
            expected["changed add"] += 1
        else:
            node.args = (x, node.args[1])
            expected["rewired add"] += 1
    counts = graph_changes(before, after).to_dict()
    found = Counter({f"{part} {kind}": n for part, kinds in counts.items() for kind, n in kinds.items()})
    assert found == expected
    assert bool(graph_changes(before, after)) == bool(expected)


def test_the_same_graph_has_no_changes() -> None:
    graph = chain(3)
    changes = graph_changes(graph, copy.deepcopy(graph))
    assert not changes and str(changes) == ""
    other = copy.deepcopy(graph)
    other.graph.output_node().args = (operator.itemgetter,)
    assert str(graph_changes(graph, other)) == "changed   return: 1"


def test_a_split_stack_counts_like_its_layers() -> None:
    whole = normalized(Stack([Mlp(), Mlp(), Mlp()]), x=("B", "S", 8))
    for rank in (0, 1):
        program = emit_rank(whole, plan_for(whole, tp=2), rank)
        assert str(graph_changes(whole, program.graph_module)) == (
            "inserted  all_reduce: 3\n"
            "replaced  Linear -> ColumnParallelLinear: 3, Linear -> RowParallelLinear: 3\n"
            "rewired   add: 3"
        )


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (2, 2)])
def test_counts_of_a_model_add_up(tp: int, pp: int) -> None:
    compiled = adx.compile(tiny_config("llama"), tp=tp, pp=pp, hardware="cpu-gloo", verify=False)
    for rank in range(tp * pp):
        changes, emitted = compiled.graph_changes(rank).to_dict(), compiled.rank(rank)
        inserted, removed = sum(changes["inserted"].values()), sum(changes["removed"].values())
        assert len(emitted.graph.nodes) == len(compiled.graph.graph.nodes) + inserted - removed
        assert {k: n for k, n in changes["inserted"].items() if k in census(emitted)} == dict(census(emitted))
        layers = [type(m).__name__ for m in emitted.modules()]
        for role in ("ColumnParallelLinear", "RowParallelLinear"):
            assert changes["replaced"].get(f"Linear -> {role}", 0) == layers.count(role)
