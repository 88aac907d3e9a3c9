"""graph_to_json: writes a graph as JSON over an allow-list of what it may call. Nothing in a file is imported or run.

    {"class": "LlamaForCausalLM",
     "modules": {"lm_head": {"class": "ColumnParallelLinear", "in_features": 64, "out_features": 48, ...}},
     "tensors": [{"name": "lm_head.weight", "dtype": "float32", "shape": [48, 64], "kind": "parameter"}, ...],
     "nodes": [{"op": "call_function", "name": "add_1", "target": "operator.add", "args": [{"node": "x"}, 1.0],
                "val": {"tensor": ["float32", [2, 8]]}, "symbols": ["B", "S"], "source": "modeling_x.py:41"}, ...]}

Values: numbers, texts, true, false and null are themselves, a list is a list; {"tuple": [...]}, {"node": name},
{"slice": [a, b, c]}, {"dict": {...}}, {"dtype": "float32"}, {"device": "cpu"}, {"float": "inf"}, {"ellipsis": true}.

torch.fx writes Python from a graph's names and runs it. So every name that comes from a file is an identifier, every
keyword and attribute one of a list, and everything else a value that is written as a literal.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch.fx import Node

from passes.fx import node_meta
from passes.fx.arguments import fetch
from passes.ops.loops import LoopError, LoopGraphs
from passes.serialize.modules import KINDS, Kinds, described
from passes.serialize.read_graph import check_named
from passes.serialize.targets import METHODS, names
from passes.serialize.values import GraphFormatError, encoded, encoded_example


def graph_to_json(module: torch.fx.GraphModule, kinds: Kinds = KINDS) -> dict[str, Any]:
    """Returns plain data for json.dumps; tensors are described, their values are not in it.

    GraphFormatError names the first op or module that is not on the allow-list: one made for this model while it was
    traced (a loop over a length), or a class of its own.
    """
    modules: dict[str, Any] = {}
    for node in module.graph.nodes:
        if node.op == "call_module" and node.target not in modules:
            called = module.get_submodule(str(node.target))
            description = described(called, kinds)
            if description is None:
                raise GraphFormatError(
                    f"{node.name} calls {node.target}, a {type(called).__module__}.{type(called).__qualname__}, which "
                    "has no place in a saved graph (passes/serialize/modules.py lists what has): use the model itself"
                )
            modules[str(node.target)] = {k: encoded(v, node) for k, v in description.items()}
    return {
        "class": type(module).__name__,
        "modules": modules,
        "tensors": _tensors_to_json(module),
        "nodes": [_node_to_json(node) for node in module.graph.nodes],
    }


def _tensors_to_json(module: torch.fx.GraphModule) -> list[dict[str, Any]]:
    """Describes the tensors that the graph reads, or that a layer which it calls has."""
    used, first = used_tensors(module), dict[int, str]()
    found = []
    for kind, named in (
        ("parameter", module.named_parameters(remove_duplicate=False)),
        ("buffer", module.named_buffers(remove_duplicate=False)),
    ):
        for name, tensor in named:
            if name not in used:
                continue
            entry: dict[str, Any] = {"name": name, "kind": kind}
            if id(tensor) in first:
                entry["same_as"] = first[id(tensor)]
            else:
                entry |= {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
            first.setdefault(id(tensor), name)
            found.append(entry)
    return found


def used_tensors(module: torch.fx.GraphModule) -> dict[str, torch.Tensor]:
    """Returns, by path, the tensors that a graph reads and those that the layers which it calls have."""
    found: dict[str, torch.Tensor] = {}
    for node in module.graph.nodes:
        target = str(node.target)
        if node.op == "get_attr":
            found[target] = fetch(module, target)
        elif node.op == "call_module":
            called = module.get_submodule(target)
            own = (*called.named_parameters(recurse=False), *called.named_buffers(recurse=False))
            found.update({f"{target}.{name}": tensor for name, tensor in own})
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}


def _node_to_json(node: Node) -> dict[str, Any]:
    target: Any = node.target
    if node.op == "call_function" and (hasattr(target, "graphs") or hasattr(target, "source")):
        target = _loop_to_json(node)
    elif node.op == "call_function":
        target = names().get(target)
        if target is None:
            called = f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__name__', node.target)}"
            raise GraphFormatError(
                f"{node.name} ({node_meta.where(node)}) calls {called}, which a saved graph may "
                "not: it was made while this model was traced, or passes/serialize/targets.py does not list it; use "
                "the model itself"
            )
        check_named(target, node.args, node.kwargs, node.name)
    elif node.op == "call_method" and target not in METHODS:
        raise GraphFormatError(
            f"{node.name} calls the method {target}, which passes/serialize/targets.py does not list"
        )
    data: dict[str, Any] = {"op": node.op, "name": node.name, "target": target}
    if node.args:
        data["args"] = [encoded(a, node) for a in node.args]
    if node.kwargs:
        data["kwargs"] = {k: encoded(v, node) for k, v in node.kwargs.items()}
    if node_meta.has_val(node) and (known := encoded_example(node_meta.val(node))) is not None:
        data["val"] = known[0]
    if (known_symbols := node_meta.shape_symbols(node)) is not None:
        data["symbols"] = encoded(known_symbols, node)
    if node_meta.source(node):
        data["source"] = node_meta.source(node)
    if node_meta.is_constant(node):
        data["constant"] = True
    if node_meta.stands_for(node):
        data["stands_for"] = node_meta.stands_for(node)
    if node.op != "call_module" and node_meta.module_stack(node):
        data["module"] = node_meta.module_path(node)
    return data


def _loop_to_json(node: Node) -> dict[str, Any]:
    """Writes a loop over a size, in place of the name of a function."""
    target: Any = node.target
    try:
        graphs: LoopGraphs = target.graphs if hasattr(target, "graphs") else target.source.graphs(node.args)
    except LoopError as error:
        raise GraphFormatError(
            f"{node.name} ({node_meta.where(node)}) calls {target.__module__}.{target.__name__}, a "
            f"loop that cannot be saved as a graph ({error}): use the model itself"
        ) from error
    data: dict[str, Any] = {name: getattr(graphs, name) for name in ("name", "counter")}
    data |= {name: list(getattr(graphs, name)) for name in ("inputs", "own")}
    data |= {name: graph_to_json(getattr(graphs, name)) for name in ("bounds", "results")}
    return {"loop": {**data, "bodies": [graph_to_json(body) for body in graphs.bodies]}}
