"""split_encoder: makes two graphs of a model whose decoder reads an encoder's output through a cache.

    before  %e = encoder(%input_ids); %kv = %past.update(k(%e), v(%e), 1);  %x = attention(q(%d), %kv[0], %kv[1])
    after   %e = encoder(%input_ids); %kv = %past.update(k(%e), v(%e), 1);  return {}
            %kv = %past.read(1);                                            %x = attention(q(%d), %kv[0], %kv[1])

The first runs once for an input, the second at each step. Both keep the names of the nodes, so that one plan goes for
both, and what the first writes lies where the second reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
import torch.fx
from torch.fx import Node

from passes.fx import node_meta
from passes.fx.lazy_graph_module import LazyGraphModule
from passes.fx.nodes import is_pure

_ENCODED = ("encoder_last_hidden_state",)  # outputs that the first graph has


def split_encoder(
    whole: torch.fx.GraphModule, layers: Collection[int]
) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    """Returns (the graph that writes the cache `layers`, the graph of everything else); `whole`, a normalised graph,
    is left as it is."""
    encoder, step = _copy(whole), _copy(whole)
    _keep_outputs(encoder, lambda name: name in (*_ENCODED, "past_key_values"))
    _clean(encoder, {n for n in encoder.graph.nodes if _writes(n, layers)})
    _keep_outputs(step, lambda name: name not in _ENCODED)
    for node in step.graph.nodes:
        if _writes(node, layers):
            node.target, node.args, node.kwargs = "read", (node.args[0], node.args[3]), {}
    _clean(step, {n for n in step.graph.nodes if not is_pure(n)})
    return encoder, step


def _writes(node: Node, layers: Collection[int]) -> bool:
    return node.op == "call_method" and node.target == "update" and node.args[3] in layers


def _copy(whole: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Copies a graph with nodes of its own under the same names, and the same parameters."""
    graph = torch.fx.Graph()
    env: dict[Node, Node] = {}
    for node in whole.graph.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
        env[node].name = node.name
    return LazyGraphModule(whole, graph, class_name=whole.__class__.__name__)


def _keep_outputs(module: torch.fx.GraphModule, wanted: Callable[[str], bool]) -> None:
    output = next(n for n in reversed(module.graph.nodes) if n.op == "output")
    output.args = ({name: value for name, value in output.args[0].items() if wanted(name)},)


def _clean(module: torch.fx.GraphModule, roots: Collection[Node]) -> None:
    """Drops what neither an output nor one of `roots` needs, inputs too; sizes are read off inputs that stay."""
    graph = module.graph
    graph.eliminate_dead_code(is_impure_node=lambda n: n in roots or n.op in ("placeholder", "output"))
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    read = [n for n in inputs if not all(_asks_for_size(user) for user in n.users)]
    for node in inputs:
        if node not in read:
            for user in list(node.users):
                _ask_another(user, read)
    for node in inputs:
        if not node.users and node not in read and not _is_cache(node):
            graph.erase_node(node)
    graph.lint()
    module.recompile()


def _is_cache(node: Node) -> bool:
    return not node_meta.is_tensor(node)


def _asks_for_size(node: Node) -> bool:
    """Returns whether a node asks for a size or device, which is the same of any input that has such a dim."""
    return node.op == "call_function" and (
        node.target is torch.ops.aten.sym_size.int or (node.target is getattr and node.args[1] == "device")
    )


def _ask_another(node: Node, inputs: Collection[Node]) -> None:
    """Puts a node's question to one of `inputs` that knows the answer."""
    if node.target is getattr:
        other = next((n for n in inputs if not _is_cache(n)), None)
        if other is not None:
            node.args = (other, "device")
        return
    source, dim = node.args
    symbol = node_meta.symbols(source)[dim]
    for other in inputs:
        if not _is_cache(other) and symbol in node_meta.symbols(other):
            node.args = (other, node_meta.symbols(other).index(symbol))
            return
