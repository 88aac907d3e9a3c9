"""Computes a layer's forward pass again in its backward pass, instead of keeping what autograd saves of it (Chen et al.
2016, https://arxiv.org/abs/1604.06174).

    before  %h1 = <ops of layer 0>(%h0, %mask);  %h2 = <ops of layer 1>(%h1, %mask)
    after   %layer_0 = layer_0(%h0, %mask);  %h1 = %layer_0[0];  %layer_1 = layer_1(%h1, %mask);  %h2 = %layer_1[0]

As in torch.utils.checkpoint without reentrance, tensors that autograd would save are dropped, and the layer runs again
when they are wanted. Unlike there, it runs again when the backward pass comes to the layer's outputs, as a whole, and
before any other op of the layer: its collectives come again at the same place on all ranks of a tp group. Random ops
are functions of their places (passes/ops/random.py), and draw the same numbers. The graph that gradients go back
through is the first run's own, so a backward pass in two parts finds in it what it looks for.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import Node

from autodist_fx.errors import AutodistError
from passes.fx import node_meta
from passes.fx.differentiable import differentiable
from passes.fx.nodes import op_name
from passes.ops.buffers import written_buffers
from passes.ops.comm import COLLECTIVES, Communicator, current, recv, send, using

NONE, LAYERS, AUTO = "none", "layers", "auto"
RECOMPUTE = {
    NONE: "keep all that a backward pass needs",
    LAYERS: "compute each layer's forward pass again",
    AUTO: "do so where a device is predicted to be too small otherwise",
}

_WRITES = (
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.iand, operator.ior
)  # fmt: skip


# -- which nodes are a layer -------------------------------------------------------------------------------------------


def layers_of(module: torch.fx.GraphModule) -> list[list[Node]]:
    """Return the nodes of each layer that can be computed again, in order: between its first and last node with a
    gradient.

    A layer is an element of the outermost nn.ModuleList or nn.Sequential. Layers whose nodes lie among each other's are
    one. What talks to other stages, or outlives a call, divides a layer; one that writes into a tensor from outside of
    it, or reads a buffer that the graph writes, is none.
    """
    needs = differentiable(module, lambda n: n.target is recv and bool(n.kwargs.get("gradient")))
    nodes = list(module.graph.nodes)
    places: dict[str, list[int]] = {}
    for place, node in enumerate(nodes):
        if (layer := _layer(node)) and node in needs and node.op != "get_attr" and not _divides(node):
            places.setdefault(layer, []).append(place)
    joined: list[list[int]] = []
    for start, stop in sorted((own[0], own[-1] + 1) for own in places.values()):
        if joined and start < joined[-1][1]:
            joined[-1][1] = max(stop, joined[-1][1])
        else:
            joined.append([start, stop])
    found = []
    for start, stop in joined:
        for divides, run in itertools.groupby(nodes[start:stop], _divides):
            part = list(run)
            if not divides and _can_run_again(module, part):
                found.append(part)
    return found


def collectives_of(module: torch.fx.GraphModule) -> str:
    """Format which of a graph's collectives, by their numbers, each layer has: alike on all ranks of a tp group."""
    number = {n: i for i, n in enumerate(n for n in module.graph.nodes if n.target in COLLECTIVES)}
    return "; ".join(" ".join(str(number[n]) for n in layer if n in number) for layer in layers_of(module))


def _layer(node: Node) -> str:
    """Return the path of the outermost element of a list of modules that a node belongs to; "" for none."""
    paths = (path for path, _ in node_meta.module_stack(node).values())
    return next((path for path in paths if path.rpartition(".")[2].isdecimal()), "")


def _divides(node: Node) -> bool:
    return node.op == "placeholder" or node.target in (send, recv) or (
        node.target not in COLLECTIVES and node.is_impure()
    )  # fmt: skip


def _can_run_again(module: torch.fx.GraphModule, layer: Sequence[Node]) -> bool:
    own, buffers = set(layer), set(written_buffers(module))
    for node in layer:
        if node.op == "get_attr" and node.target in buffers:
            return False
        if any(n.op == "get_attr" and n.target in buffers for n in node.all_input_nodes):
            return False
        if _writes(module, node):
            base = node.args[0]
            while isinstance(base, Node) and base in own:
                base = base.args[0] if base.args else None
            if isinstance(base, Node):
                return False
    return True


def _writes(module: torch.fx.GraphModule, node: Node) -> bool:
    """Return whether an op writes into its first argument."""
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = op_name(node)
    return node.target in _WRITES or bool(node.kwargs.get("inplace")) or (name.endswith("_") and name[-2:-1] != "_")


# -- the graph with its layers as modules ------------------------------------------------------------------------------


def with_recomputed_layers(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Return a graph that computes the same with the same parameters, and its layers again in its backward pass."""
    layers = layers_of(module)
    first = {layer[0]: number for number, layer in enumerate(layers)}
    inside = {node for layer in layers for node in layer}
    graph, copies, targets = torch.fx.Graph(), dict[Node, Node](), dict[str, Any]()
    for node in module.graph.nodes:
        if node in first:
            name = f"layer_{first[node]}"
            inputs, outputs, targets[name] = _part(module, layers[first[node]])
            called = graph.call_module(name, tuple(copies[n] for n in inputs))
            copies |= {n: graph.call_function(operator.getitem, (called, at)) for at, n in enumerate(outputs)}
        if node not in inside:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op in ("get_attr", "call_module"):
                targets[str(node.target)] = _fetch(module, str(node.target))
    made = torch.fx.GraphModule(targets, graph)
    made.training = module.training
    return made


def _part(module: torch.fx.GraphModule, layer: Sequence[Node]) -> tuple[list[Node], list[Node], RecomputedLayer]:
    """Return (what a layer reads of the graph around it, what that reads of the layer, the layer as a module)."""
    own, graph = set(layer), torch.fx.Graph()
    inputs = list(dict.fromkeys(n for node in layer for n in node.all_input_nodes if n not in own))
    outputs = [node for node in layer if any(user not in own for user in node.users)]
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node in layer:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    return inputs, outputs, RecomputedLayer(torch.fx.GraphModule(module, graph))


def _fetch(module: nn.Module, target: str) -> Any:
    owner, _, name = target.rpartition(".")
    return getattr(module.get_submodule(owner), name)


class RecomputedLayer(nn.Module):
    """A part of a graph, from tensors and numbers to a tuple of such, that runs again in its backward pass."""

    def __init__(self, part: torch.fx.GraphModule) -> None:
        super().__init__()
        self.part = part

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            return self.part(*inputs)
        run = _Run(self.part, inputs, current())
        with saved_tensors_hooks(run.pack, run.unpack):
            outputs = list(self.part(*inputs))
        needing = [at for at, x in enumerate(outputs) if isinstance(x, torch.Tensor) and x.requires_grad]
        if needing:
            for at, x in zip(needing, _Begin.apply(run, *(outputs[at] for at in needing)), strict=True):
                outputs[at] = x
        return tuple(outputs)


# -- one run -----------------------------------------------------------------------------------------------------------


class _Saved:
    """The place of a tensor that autograd has saved: empty until the run is done again."""

    __slots__ = ("__weakref__", "value")

    def __init__(self) -> None:
        self.value: torch.Tensor | None = None


class _Run:
    """One run of a layer, whose saved tensors are there after `again`, each for as long as autograd's graph keeps its
    place."""

    def __init__(self, work: Callable[..., Iterable[Any]], inputs: Sequence[Any], communicator: Communicator) -> None:
        self._work, self._communicator = work, communicator
        self._inputs: list[tuple[Any, bool]] | None = [
            (x.detach(), x.requires_grad) if isinstance(x, torch.Tensor) else (x, False) for x in inputs
        ]
        self._places: list[weakref.ref[_Saved]] = []

    def pack(self, x: torch.Tensor) -> _Saved:
        saved = _Saved()
        self._places.append(weakref.ref(saved))
        return saved

    def unpack(self, saved: _Saved) -> torch.Tensor:
        if saved.value is None:
            self.again()
        assert saved.value is not None
        return saved.value

    def again(self) -> None:
        """Run the layer once more, from the same inputs, and keep what autograd saves. A second call does nothing.

        Raises AutodistError where it saves other tensors than the first time.
        """
        if self._inputs is None:
            return
        inputs, self._inputs = self._inputs, None
        count = 0

        def keep(x: torch.Tensor) -> int:
            nonlocal count
            place = self._places[count]() if count < len(self._places) else None
            if place is not None:
                place.value = x.detach()
            count += 1
            return count

        fresh = [x.detach().requires_grad_(needs) if isinstance(x, torch.Tensor) else x for x, needs in inputs]
        with using(self._communicator), torch.enable_grad(), saved_tensors_hooks(keep, _never):
            self._work(*fresh)
        if count != len(self._places):
            raise AutodistError(
                f"a layer saved {len(self._places)} tensors for its backward pass, and {count} when it was computed "
                "again: use recompute='none'"
            )


def _never(number: int) -> torch.Tensor:
    raise AutodistError("a layer that is computed again went backward while it ran: use recompute='none'")


class _Begin(Function):
    """The identity of a layer's outputs, with which its backward pass begins."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.run = run
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        ctx.run.again()
        return None, *gradients
