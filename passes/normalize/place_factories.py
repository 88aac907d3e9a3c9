"""place_factories: makes tensors on the device that the graph's inputs are on, where the model names none.

before  scale = torch.tensor(8, dtype=torch.float32); steps = torch.arange(seq)
after   device = getattr(input_ids, "device")
        scale = torch.full((), 8, dtype=torch.float32, device=device); steps = torch.arange(seq, device=device)

On a GPU such a tensor is in main memory: copied at each step where it is an index, refused where it has dims and meets
others. `full` fills there what `tensor` would copy there.
"""

from __future__ import annotations

import torch
import torch.fx
from torch.fx import Node

from passes.fx import node_meta
from passes.fx.run_passes import GraphEdit, PassResult
from passes.fx.shape_propagation import NormalizeContext

_FACTORIES = (
    torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.logspace, torch.ones, torch.range,
    torch.scalar_tensor, torch.tensor, torch.tril_indices, torch.triu_indices, torch.zeros,
)  # fmt: skip


def place_factories(graph_module: torch.fx.GraphModule, ctx: NormalizeContext) -> PassResult:
    """Rewrites `graph_module` in place; a graph without tensors among its inputs stays as it is. Matches are the
    factories."""
    graph, edit = graph_module.graph, GraphEdit(graph_module)
    made = [n for n in graph.nodes if n.op == "call_function" and n.target in _FACTORIES and not n.kwargs.get("device")]
    anchor = next((n for n in graph.nodes if n.op == "placeholder" and node_meta.is_tensor(n)), None)
    if anchor is None or not made:
        return edit.result(0)
    device = _device_of(anchor)
    for node in made:
        node.kwargs = {**node.kwargs, "device": device}
        if node.target is torch.tensor and isinstance(node.args[0], (int, float)):
            node.target, node.args = torch.full, ((), node.args[0])
    return edit.result(len(made))


def _device_of(anchor: Node) -> Node:
    """Returns the node of an input's device, in front of all that is computed; made where there is none."""
    graph = anchor.graph
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    for node in graph.nodes:
        if node.op == "call_function" and node.target is getattr and node.args[1:] == ("device",):
            if node.args[0].op == "placeholder":
                last.append(node)
                return node
    with graph.inserting_after(last):
        device = graph.call_function(getattr, (anchor, "device"))
    node_meta.set_val(device, node_meta.tensor(anchor).device)
    return device
