"""merge_products: makes one product of those that read the same input, of weights that lie as a product is quickest.

    before  q = linear(x, wq); k = linear(x, wk); v = linear(x, wv)
    after   q, k, v = linear(x, w).split([384, 128, 128], -1)             # wq, wk and wv are views of w

A decode step on a CPU reads every weight once, and waits for memory. float32 weights with more outputs than inputs are
laid out by columns: the same product of one row then reads 13 to 17 GB/s instead of 9 to 11 (MKL, one core of an EPYC
that reads 14: 2048 x 768 in 0.46 ms instead of 0.61, 16000 x 768 in 3.1 instead of 4.6), that of 2 to 32 rows takes 1.0
to 1.9 times less, and that of 128 no more. With fewer outputs than inputs it is the other way round (0.7 to 0.9), and
in bfloat16 always.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.fx import Graph, Node

from autodist_fx.large_memory import empty_large
from passes.fx.arguments import argument

_MOST = 8  # products that become one


@dataclass(frozen=True, slots=True, eq=False)
class _Product:
    """A node linear(x, weight, bias), with its tensors."""

    node: Node
    weight: torch.Tensor  # [outputs, inputs]
    bias: torch.Tensor | None


def merge_products(graph: Graph, values: dict[str, Any], paths: Mapping[Node, str]) -> list[torch.Tensor]:
    """Rewrite `graph` in place, whose get_attr nodes read `values`, and move its weights; return those that were moved:
    their `data` are views of other memory, of the same elements. `paths`: of get_attr nodes, in the model's modules.

    Products become one where their layers stand side by side in one module, so that all graphs of a rank merge alike. A
    weight that the graph reads otherwise, too (a table of embeddings), stays where it is, and so does one that requires
    a gradient.
    """
    moved: list[torch.Tensor] = []
    for group in _groups(graph, values, paths):
        weights = [product.weight for product in group]
        merged = _laid_out(weights)
        if merged is None:
            continue
        moved += weights
        bias = None
        if len(group) > 1:
            biases = [product.bias for product in group if product.bias is not None]
            bias = torch.cat([b.detach() for b in biases]) if biases else None
            _make_one(graph, values, group, merged, bias)
    return moved


def _groups(graph: Graph, values: Mapping[str, Any], paths: Mapping[Node, str]) -> Iterator[list[_Product]]:
    """Yield the products that become one, in the order of the graph; one alone, too."""
    uses: dict[int, int] = {}
    for node in graph.nodes:
        for tensor in _tensors(node, values):
            uses[id(tensor)] = uses.get(id(tensor), 0) + max(1, len(node.users))
    groups: dict[Any, list[_Product]] = {}
    for node in list(graph.nodes):
        product = _product(node, values)
        if product is None or uses[id(product.weight)] > 1:
            continue
        beside = paths.get(argument(node, 1, "weight"), "").split(".")[:-2]
        key = node.args[0], product.weight.dtype, product.bias is None, tuple(beside)
        if len(groups.setdefault(key, [])) == _MOST:
            yield groups.pop(key)
            groups[key] = []
        groups[key].append(product)
    yield from groups.values()


def _tensors(node: Node, values: Mapping[str, Any]) -> list[torch.Tensor]:
    """Return the tensors that a node has of its own."""
    if node.op not in ("get_attr", "call_module"):
        return []
    value = values[str(node.target)]
    if isinstance(value, nn.Module):
        return list(value.parameters())
    return [value] if isinstance(value, torch.Tensor) else []


def _product(node: Node, values: Mapping[str, Any]) -> _Product | None:
    if node.target is not nn.functional.linear:
        return None
    weight, bias = argument(node, 1, "weight"), argument(node, 2, "bias")
    if not node.args or weight.op != "get_attr" or (bias is not None and bias.op != "get_attr"):
        return None
    tensor = values[weight.target]
    if tensor.device.type != "cpu" or tensor.dim() != 2 or tensor.requires_grad or not tensor.numel():
        return None
    return _Product(node, tensor, None if bias is None else values[bias.target])


def _laid_out(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return one weight of the same rows, after moving `weights` into it; None where all is well as it is."""
    first, outputs = weights[0], sum(weight.shape[0] for weight in weights)
    inputs, dtype = first.shape[1], first.dtype
    by_columns = dtype == torch.float32 and outputs > inputs
    strides = (1, outputs) if by_columns else (inputs, 1)
    if _is_laid_out(weights, strides):
        return first.detach().as_strided((outputs, inputs), strides)
    if any(weight.untyped_storage().nbytes() > weight.nbytes for weight in weights):
        return None  # another program's, which has them otherwise
    if len(weights) == 1 and not by_columns:
        return None
    rows = first.detach() if len(weights) == 1 else torch.cat([weight.detach() for weight in weights])
    if by_columns:
        merged = empty_large((inputs, outputs), dtype).copy_(rows.t()).t()
    else:
        merged = empty_large((outputs, inputs), dtype).copy_(rows)
    start = 0
    for weight in weights:
        weight.data = merged[start : start + weight.shape[0]]
        start += weight.shape[0]
    return merged


def _is_laid_out(weights: Sequence[torch.Tensor], strides: tuple[int, int]) -> bool:
    """Return whether the weights lie one behind the other in one memory, with these strides."""
    at, storage = weights[0].data_ptr(), weights[0].untyped_storage().data_ptr()
    for weight in weights:
        if weight.stride() != strides or weight.data_ptr() != at or weight.untyped_storage().data_ptr() != storage:
            return False
        at += weight.shape[0] * strides[0] * weight.itemsize
    return True


def _make_one(
    graph: Graph, values: dict[str, Any], group: Sequence[_Product], weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    first = group[0].node
    number = len(values)
    with graph.inserting_before(first):
        given = [first.args[0]]
        for name, tensor in ((f"t{number}", weight), (f"t{number + 1}", bias)):
            values[name] = tensor
            given.append(None if tensor is None else graph.create_node("get_attr", name))
        product = graph.create_node("call_function", nn.functional.linear, tuple(given), name=f"merged_{first.name}")
        sizes = [one.weight.shape[0] for one in group]
        parts = graph.create_node("call_method", "split", (product, sizes, -1), name=f"parts_{first.name}")
        named = [f"part_{one.node.name}" for one in group]
        found = [
            graph.create_node("call_function", operator.getitem, (parts, place), name=name)
            for place, name in enumerate(named)
        ]
    for one, part in zip(group, found, strict=True):
        one.node.replace_all_uses_with(part)
        unread = [one.node, *(node for node in one.node.all_input_nodes if node.op == "get_attr")]
        for node in unread:
            if not node.users:
                graph.erase_node(node)
