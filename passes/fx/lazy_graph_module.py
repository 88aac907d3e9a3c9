"""A GraphModule whose Python is generated when it is first run: each pass rewrites the graph, and none reads the code.

fx pickles a GraphModule as its Python, and runs that under a tracer to have the graph again, which our functions
(all_reduce, recv) do not bear. Here the graph itself is pickled, node by node, with what is known of each.
"""

from __future__ import annotations

import copy
import pickle
import sys
import types
from dataclasses import dataclass
from typing import Any

import torch.fx
from torch import nn
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.node import map_aggregate

from passes.fx import node_meta

_STATE = ("training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "meta")


class LazyGraphModule(_LazyGraphModule):
    """A GraphModule that `pickle`, `torch.save` and `copy.deepcopy` copy by its graph: names, order and `meta` of all
    nodes stay, and the weights that there are.

    Pickling raises pickle.PicklingError for a graph with a function that has no name.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        for node in self.graph.nodes:
            _refuse_nameless(node)
        return _made_of, self._parts()

    def __deepcopy__(self, memo: dict[int, Any]) -> LazyGraphModule:
        name, state, nodes = self._parts()
        memo[id(self)] = copied = _made_of(name, copy.deepcopy(state, memo), nodes)
        return copied

    def _parts(self) -> tuple[str, dict[str, Any], list[tuple[Any, ...]]]:
        state = {key: vars(self)[key] for key in _STATE}
        return self._get_name(), state, [_parts_of(node) for node in self.graph.nodes]


@dataclass(frozen=True, slots=True)
class _NodeNamed:
    """A node, in pickled arguments."""

    name: str


@dataclass(frozen=True, slots=True)
class _OpNamed:
    """An operator of torch.ops, in a pickled node: "aten.sym_size.int"."""

    name: str


def _parts_of(node: Node) -> tuple[Any, ...]:
    args, kwargs = map_aggregate((node.args, node.kwargs), lambda x: _NodeNamed(x.name) if isinstance(x, Node) else x)
    target = _OpNamed(str(node.target)) if isinstance(node.target, OpOverload) else node.target
    return node.op, node.name, target, args, kwargs, node_meta.everything(node)


def _refuse_nameless(node: Node) -> None:
    target = node.target
    if isinstance(target, types.FunctionType):
        module = sys.modules.get(target.__module__)
        if getattr(module, target.__qualname__, None) is not target:
            raise pickle.PicklingError(
                f"{node.name} calls {target.__qualname__}, a function that was made for this graph and has no name to "
                "be found by (a loop over a length): save the split with compiled.save(directory)"
            )


def _made_of(name: str, state: dict[str, Any], nodes: list[tuple[Any, ...]]) -> LazyGraphModule:
    graph, made = torch.fx.Graph(), dict[str, Node]()

    def node_of(x: Any) -> Any:
        return made[x.name] if isinstance(x, _NodeNamed) else x

    for op, node_name, target, args, kwargs, meta in nodes:
        args, kwargs = map_aggregate((args, kwargs), node_of)
        node = graph.create_node(op, _found(target), args, dict(kwargs), name=node_name)
        node_meta.set_everything(node, meta)
        made[node_name] = node
    root = nn.Module()
    root.__dict__.update(state)
    module = LazyGraphModule(root, graph, class_name=name)
    module.__dict__.update(state)  # the constructor copies what the graph names, and forgets which buffers are saved
    module.real_recompile()  # torch.compile and torch.export want the code
    return module


def _found(target: Any) -> Any:
    if not isinstance(target, _OpNamed):
        return target
    found: Any = torch.ops
    for part in target.name.split("."):
        found = getattr(found, part)
    return found


__all__ = ["LazyGraphModule"]
