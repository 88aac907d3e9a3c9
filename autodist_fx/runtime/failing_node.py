"""Names the node of a rank's graph that raised, and what it was given: fx's own traceback ends in generated code."""

from __future__ import annotations

import linecache
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import fx

from passes.fx.text import node_text


def name_failing_node(
    error: Exception, graph_module: fx.GraphModule, rank: int, bound: fx.GraphModule | None = None
) -> None:
    """Add a note to what a run of `graph_module` raised: rank, node, and the dtype and shape (of whole numbers on
    the CPU also the range) of each tensor that the node was given. `bound`: the graph made of it that was run
    (execution/bound_graph.py), whose nodes are called by the names that they have in `graph_module`."""
    running = graph_module if bound is None else bound
    node, values = _failing(error.__traceback__, running)
    if node is None:
        node, values = _failing(error.__traceback__, graph_module)
    if node is not None:
        emitted = {n.name: n for n in graph_module.graph.nodes}.get(node.name)
        text = node_text(running, node) if emitted is None else node_text(graph_module, emitted)
        given = ", ".join(_described(values[arg.name]) for arg in node.all_input_nodes if arg.name in values)
        error.add_note(f"on rank {rank}, in {text}, which was given {given}")


def _failing(
    traceback: TracebackType | None, graph_module: fx.GraphModule
) -> tuple[fx.Node | None, Mapping[str, Any]]:
    """Return the node that the graph's own code was at, and the values at hand there, by the names of their nodes."""
    nodes = {node.name: node for node in graph_module.graph.nodes}
    code = getattr(type(graph_module).forward, "__code__", None)
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code is code:
            line = linecache.getline(frame.f_code.co_filename, traceback.tb_lineno)
            name = line.partition("=")[0].partition(":")[0].strip()
            return nodes.get(name), frame.f_locals
        traceback = traceback.tb_next
    return None, {}


def _described(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    text = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if value.dtype not in (torch.int64, torch.int32) or value.device.type != "cpu" or not value.numel():
        return text
    return f"{text} from {int(value.min())} to {int(value.max())}"
