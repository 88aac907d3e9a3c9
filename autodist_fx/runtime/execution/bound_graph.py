"""`BoundGraph`: runs a rank's graph with its weights bound, which spares what Python does for each node beside the op.

    as emitted  q_proj = self.model.layers.3.self_attn.q_proj(rms_norm)       # five lookups of modules, Module.__call__
    bound       q_proj = torch.nn.functional.linear(rms_norm, self.t17)

The nodes keep their names and order; the graph that was proven stays as it is, and whatever is changed in it (a tensor
put in another's place, a hook registered) is seen at the next run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.fx import Graph, GraphModule, Node

from autodist_fx.runtime.execution.merge_products import merge_products
from autodist_fx.runtime.execution.share_masks import share_masks
from passes.fx.arguments import submodule
from passes.fx.lazy_graph_module import LazyGraphModule
from passes.ops.parallel_layers import ColumnParallelLinear, RowParallelLinear

_LINEARS = (nn.Linear, ColumnParallelLinear, RowParallelLinear)


class BoundGraph:
    """The graph of `source` with its weights bound. `module` is what runs: its node names are those of `source`."""

    def __init__(self, source: GraphModule) -> None:
        self._source = source
        self.module = self._bind()

    def __call__(self, inputs: Mapping[str, Any]) -> Any:
        """Return what `source(**inputs)` returns. With hooks on `source`, or on all modules, that itself is run."""
        source = self._source
        if source._forward_hooks or source._forward_pre_hooks or nn.modules.module._has_any_global_hook():
            LazyGraphModule.force_recompile(source)  # else its first run is two calls
            return source(**inputs)
        return self.current().forward(**inputs)

    def current(self) -> GraphModule:
        """Return what runs, bound anew where something was changed since."""
        if not self._is_current():
            self.module = self._bind()
        return self.module

    def _bind(self) -> GraphModule:
        binding = _Binding(self._source)
        with torch.inference_mode(False), torch.no_grad():  # weights stay such that graphs of any mode may read them
            module = binding.module()
        self._held, self._hooks = tuple(binding.held.values()), tuple(binding.hooks)
        self._moved = tuple((tensor, tensor.data_ptr()) for tensor in binding.moved)
        return module

    def _is_current(self) -> bool:
        """Return whether every tensor is where it was, and nobody hooked into a module that was left out."""
        for owner, name, tensor in self._held:
            if owner.get(name) is not tensor:
                return False
        for tensor, place in self._moved:
            if tensor.data_ptr() != place:
                return False
        return not any(self._hooks)


class _Binding:
    """A graph in the making, and what has to stay as it is while that is used."""

    def __init__(self, source: GraphModule) -> None:
        self._source, self._graph = source, Graph()
        self._values: dict[str, Any] = {}  # by the name that the new graph has them under
        self._names: dict[int, str] = {}  # of tensors, by identity
        self.held: dict[tuple[int, str], tuple[dict[str, Any], str, torch.Tensor]] = {}
        self.hooks: list[dict[int, Any]] = []
        self.moved: list[torch.Tensor] = []  # weights that lie in other memory than they did
        self._copies: dict[Node, Node] = {}
        self._paths: dict[Node, str] = {}  # of what a node reads, in the modules of `source`

    def module(self) -> GraphModule:
        """Return the bound graph as a module, whose tensors are plain attributes: to no module's state."""
        for node in self._source.graph.nodes:
            self._copies[node] = self._copy(node)
        share_masks(self._graph)
        self.moved = merge_products(self._graph, self._values, self._paths)
        module = GraphModule(self._values, self._graph, type(self._source).__name__)
        for name in self._values:
            for registered in (module._parameters, module._buffers, module._modules):
                if name in registered:
                    module.__dict__[name] = registered.pop(name)
        return module

    def _copy(self, node: Node) -> Node:
        if node.op == "get_attr":
            return self._tensor(str(node.target), node.name)
        if node.op == "call_module":
            called = submodule(self._source, str(node.target))
            if len(node.args) == 1 and not node.kwargs and _is_plain_linear(called):
                return self._linear(node, called)
            return self._call(node, called)
        return self._graph.node_copy(node, self._copies.__getitem__)

    def _tensor(self, path: str, node_name: str) -> Node:
        """Make a node that reads a tensor, or whatever else stands there."""
        place, _, name = path.rpartition(".")
        owner = submodule(self._source, place) if place else self._source
        held = next((d for d in (owner._parameters, owner._buffers) if name in d), owner.__dict__)
        value = held[name]
        self.held[id(held), name] = (held, name, value)
        attribute = self._names.setdefault(id(value), f"t{len(self._names)}")
        self._values[attribute] = value
        node = self._graph.create_node("get_attr", attribute, name=node_name)
        self._paths[node] = path
        return node

    def _linear(self, node: Node, called: nn.Module) -> Node:
        x = self._copies[node.args[0]]
        weight = self._tensor(f"{node.target}.weight", f"{node.name}_weight")
        bias = None if called.bias is None else self._tensor(f"{node.target}.bias", f"{node.name}_bias")
        self.hooks += [called._forward_hooks, called._forward_pre_hooks]
        return self._graph.create_node("call_function", nn.functional.linear, (x, weight, bias), name=node.name)

    def _call(self, node: Node, called: nn.Module) -> Node:
        attribute = self._names.setdefault(id(called), f"t{len(self._names)}")
        self._values[attribute] = called
        copy = self._graph.node_copy(node, self._copies.__getitem__)
        copy.target = attribute
        return copy


def _is_plain_linear(called: nn.Module) -> bool:
    """Return whether a module computes x @ weight.T + bias, and nothing else happens when it is called."""
    return (
        type(called) in _LINEARS
        and not getattr(called, "transposed", False)
        and "forward" not in called.__dict__
        and not (called._forward_hooks or called._forward_pre_hooks)
    )
