"""Keys of node.meta: what is declared and in its phase passes, everything else is refused; all access goes through."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
import torch.fx
from torch import nn

from cost_model.plan.data import Hop
from passes.fx import node_meta
from passes.fx.node_meta import GRAPH_KEYS, NODE_KEYS, MetaError, Phase, check, drop_ended

ROOT = Path(__file__).parents[3]


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 + x.shape[0]


def annotated() -> torch.fx.GraphModule:
    """%x; shape = getattr(%x, "shape"); size = getitem(shape, 0); mul = %x * 2; add = mul + size."""
    module = torch.fx.symbolic_trace(Scaled())
    for node in module.graph.nodes:
        node.meta = {}
        if node.op == "placeholder" or node.name in ("mul", "add"):
            node_meta.set_val(node, torch.empty(3, 4, device="meta"))
            node_meta.set_symbols(node, ("B", ""))
    return module


def node(module: torch.fx.GraphModule, name: str) -> torch.fx.Node:
    return next(n for n in module.graph.nodes if n.name == name)


def test_an_annotated_graph_is_accepted() -> None:
    check(annotated(), Phase.ANNOTATED)


def test_an_unknown_key_is_refused_with_the_node() -> None:
    module = annotated()
    node(module, "mul").meta["vaal"] = 1
    with pytest.raises(MetaError, match=r"node mul has an unknown key 'vaal': declare it"):
        check(module, Phase.ANNOTATED)
    module = annotated()
    module.meta["found"] = {}
    with pytest.raises(MetaError, match=r"the graph has an unknown key 'found'"):
        check(module, Phase.ANNOTATED)


def test_a_key_whose_phase_is_over_or_has_not_begun_is_refused() -> None:
    module = annotated()
    node_meta.set_hop(node(module, "x"), Hop("x", 0, 0, 1, 0, True, 96))
    check(module, Phase.PARTITIONED)
    with pytest.raises(MetaError, match=r"node x has the key 'hop' in the phase EMITTED; it is valid from PARTITIONED"):
        check(module, Phase.EMITTED)
    with pytest.raises(MetaError, match=r"node x has the key 'hop' in the phase NORMALIZED"):
        check(module, Phase.NORMALIZED)
    drop_ended(module, Phase.EMITTED)
    check(module, Phase.EMITTED)
    assert not node_meta.has_hop(node(module, "x")) and node_meta.symbols(node(module, "x")) == ("B", "")


def test_the_tracers_keys_end_when_shapes_are_known() -> None:
    module = annotated()
    node_meta.set_traced_as_tensor(node(module, "mul"), True)
    with pytest.raises(MetaError, match=r"node mul has the key 'is_tensor' in the phase ANNOTATED"):
        check(module, Phase.ANNOTATED)


@pytest.mark.parametrize("name", ["x", "mul", "add"])
def test_a_tensor_without_its_value_is_refused_and_a_number_is_not(name: str) -> None:
    module = annotated()
    del node(module, name).meta["val"]
    with pytest.raises(MetaError, match=rf"node {name} .* has no 'val'"):
        check(module, Phase.ANNOTATED)


def test_a_new_node_of_a_pass_that_makes_a_tensor_of_numbers_needs_its_value() -> None:
    module = annotated()
    with module.graph.inserting_before(node(module, "add")):
        module.graph.call_function(torch.zeros, (node(module, "getitem"),))
    with pytest.raises(MetaError, match=r"node zeros .* has no 'val'"):
        check(module, Phase.ANNOTATED)


def test_copy_gives_what_is_asked_for_and_nothing_of_its_own_stays() -> None:
    module = annotated()
    mul, x = node(module, "mul"), node(module, "x")
    node_meta.set_source(mul, "modeling_x.py:3")
    node_meta.set_constant(x)
    node_meta.copy(mul, x, without=("symbols",))
    assert node_meta.source(x) == "modeling_x.py:3" and not node_meta.is_constant(x) and node_meta.is_tensor(x)
    assert node_meta.symbols(x) == ()
    node_meta.copy(mul, x, only=("symbols",))
    assert node_meta.symbols(x) == ("B", "") and not node_meta.is_tensor(x) and node_meta.source(x) == ""


def test_symbols_of_tensors_tuples_and_numbers_are_told_apart() -> None:
    x = node(annotated(), "x")
    node_meta.set_symbols(x, "B*2")
    assert node_meta.size_symbol(x) == "B*2" and node_meta.symbols(x) == () and node_meta.shape_symbols(x) is None
    node_meta.set_symbols(x, ())
    assert node_meta.size_symbol(x) is None and node_meta.shape_symbols(x) == ()


def test_every_key_is_declared_once_with_a_writer_and_a_meaning() -> None:
    for keys in (NODE_KEYS, GRAPH_KEYS):
        assert len({key.name for key in keys}) == len(keys)
        assert all(key.writer and key.meaning and key.first <= key.last for key in keys)


def test_nothing_but_node_meta_reads_or_writes_a_meta_dict() -> None:
    """Leaves out this test, which has to write what nobody may."""
    own = {ROOT / "passes/fx/node_meta.py", Path(__file__)}
    found = [
        f"{path.relative_to(ROOT)}:{at.lineno}"
        for folder in ("passes", "autodist_fx", "tests", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path not in own
        for at in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(at, ast.Attribute) and at.attr == "meta"
    ]
    assert found == []
