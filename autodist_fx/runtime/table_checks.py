"""Turns an IndexError from a lookup into an error that names the graph input with the id outside the table."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.fx import Node
from torch.fx.node import map_arg

from autodist_fx.errors import OutOfTableError
from passes.fx import node_meta
from passes.fx.arguments import argument
from passes.fx.nodes import op_name
from passes.ops.losses import cross_entropy_part
from passes.ops.parallel_layers import VocabParallelEmbedding


@contextlib.contextmanager
def lookups_checked(graph_module: torch.fx.GraphModule, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Run code that runs this graph, of a whole model or of a rank. Raises OutOfTableError for an IndexError of it that
    comes of ids outside the table that they are looked up in: it names the input, the id and the table."""
    try:
        yield
    except OutOfTableError:
        raise
    except IndexError as error:
        message = outside_a_table(graph_module, inputs)
        if message is None:
            raise
        raise OutOfTableError(message) from error


def outside_a_table(whole: torch.fx.GraphModule, inputs: Mapping[str, Any]) -> str | None:
    """Return a sentence about the first lookup of a graph that these inputs make fail; None if none is found.

    Only numbers that follow from the inputs without any weight are looked at: token ids, positions, labels.
    """
    placeholders = [node for node in whole.graph.nodes if node.op == "placeholder"]
    known: dict[Node, Any] = {node: inputs.get(str(node.target)) for node in placeholders}
    for node in whole.graph.nodes:
        found = _lookup(whole, node)
        if found is None:
            continue
        index, rows, allowed = found
        values = _value(whole, index, known)
        if not isinstance(values, torch.Tensor) or not values.numel():
            continue
        wrong = values[((values < 0) | (values >= rows)) & (values != allowed)]
        if wrong.numel():
            sources = ", ".join(sorted(_sources(index)))
            what = index.target if index.op == "placeholder" else f"{index}, which follows from {sources},"
            table = f"{node.target} has {rows} rows" if node.op == "call_module" else f"{node} knows {rows} of them"
            where = f" ({node_meta.source(node)})" if node_meta.source(node) else ""
            return f"{what} holds {int(wrong[0])}, and {table}: 0 to {rows - 1} are allowed{where}"
    return None


def lookups(whole: torch.fx.GraphModule) -> dict[str, int]:
    """Return, by input, how many ids it may hold, where it is looked up in tables (the smallest) or names classes."""
    found: dict[str, int] = {}
    for node in whole.graph.nodes:
        lookup = _lookup(whole, node)
        if lookup is not None:
            index = lookup[0]
            while index.op.startswith("call_") and op_name(index) in _KEEP_VALUES:
                index = index.args[0]
            if index.op == "placeholder":
                found[str(index.target)] = min(lookup[1], found.get(str(index.target), lookup[1]))
    return found


_KEEP_VALUES = ("to", "long", "view", "reshape", "contiguous", "clone", "getitem", "pad", "flatten")


def _lookup(whole: torch.fx.GraphModule, node: Node) -> tuple[Node, int, int] | None:
    """Return (what is looked up, number of rows, a number that is allowed besides) of an embedding or a loss."""
    if node.op == "call_module":
        module = whole.get_submodule(str(node.target))
        if isinstance(module, VocabParallelEmbedding):
            return node.args[0], module.rows, 0
        return (node.args[0], module.num_embeddings, 0) if isinstance(module, nn.Embedding) else None
    if node.op != "call_function":
        return None
    if node.target is nn.functional.embedding:
        table = node_meta.val(argument(node, 1, "weight"))
        return (node.args[0], table.shape[0], 0) if isinstance(table, torch.Tensor) else None
    if node.target is nn.functional.cross_entropy:
        scores = node_meta.val(node.args[0])
        classes = scores.shape[min(1, scores.dim() - 1)]
        return argument(node, 1, "target"), classes, argument(node, 4, "ignore_index", -100)
    if node.target is cross_entropy_part:
        return node.args[1], node.args[3][0], node.kwargs["ignore_index"]
    return None


def _value(whole: torch.fx.GraphModule, node: Node, known: dict[Node, Any]) -> Any:
    """Return the node's value; None where it takes weights, a cache, or an input that was not given."""
    if node in known:
        return known[node]
    value = None
    if node.op == "get_attr":
        value = whole
        for atom in str(node.target).split("."):
            value = getattr(value, atom)
        value = None if isinstance(value, torch.Tensor) and value.is_meta else value
    elif node.op in ("call_function", "call_method"):
        given = [_value(whole, n, known) for n in node.all_input_nodes]
        if all(x is not None for x in given):
            args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
            called = getattr(args[0], str(node.target)) if node.op == "call_method" else node.target
            value = called(*(args[1:] if node.op == "call_method" else args), **kwargs)
    known[node] = value
    return value


def _sources(node: Node) -> set[str]:
    found, pending = set[str](), [node]
    while pending:
        one = pending.pop()
        found |= {str(one.target)} if one.op == "placeholder" else set()
        pending += one.all_input_nodes
    return found
