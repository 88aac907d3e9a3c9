"""Reads a graph that write_graph.py wrote; every name in it is checked before torch.fx makes Python of it."""

from __future__ import annotations

import functools
import json
import keyword
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.fx import Node

from passes.fx import node_meta
from passes.fx.arguments import fetch, place
from passes.fx.lazy_graph_module import LazyGraphModule
from passes.ops.experts import is_gate
from passes.ops.loops import LoopGraphs
from passes.serialize.modules import KINDS, Kinds, made
from passes.serialize.targets import METHODS, NAMED, functions
from passes.serialize.values import (
    DTYPES,
    LARGEST,
    NAME,
    PATH,
    TAKEN,
    decoded,
    identifier,
    list_of,
    matching,
    object_of,
    printable,
    refuse,
    shown,
    whole,
)

_OPS = ("placeholder", "get_attr", "call_function", "call_method", "call_module", "output")


def graph_from_json(
    data: Any, tensors: Callable[[str, str, tuple[int, ...], torch.dtype], torch.Tensor], kinds: Kinds = KINDS
) -> torch.fx.GraphModule:
    """Inverts `graph_to_json`; the graph is in eval mode.

    `tensors(name, kind, shape, dtype)` gives each parameter and buffer, on meta or with its values. GraphFormatError,
    which names the node or the field, for all that is not a graph which `graph_to_json` could have written.
    """
    fields = object_of(data, "the graph", ("class", "modules", "tensors", "nodes"))
    root = nn.Module()
    for path, description in object_of(fields["modules"], "modules").items():
        place(root, matching(path, PATH, "the module path"), _module(path, description, kinds))
    held = _tensors_from_json(root, fields["tensors"], tensors)
    graph = torch.fx.Graph()
    nodes: dict[str, Node] = {}
    reserved = {str(n.get("name")) for n in list_of(fields["nodes"], "nodes") if isinstance(n, dict)}
    for number, node in enumerate(fields["nodes"]):
        if nodes and next(reversed(nodes.values())).op == "output":
            refuse(f"nodes[{number}] comes behind the output")
        _add_node(graph, nodes, node, number, root, held)
    if not nodes or next(reversed(nodes.values())).op != "output" or len(reserved) != len(nodes):
        refuse("the graph does not end with its output")
    name = matching(fields["class"], NAME, "the class")
    if keyword.iskeyword(name):
        refuse(f"{name!r} is no name of a class")
    return LazyGraphModule(root, graph, name).eval()


def _module(path: str, description: Any, kinds: Kinds) -> nn.Module:
    fields = object_of(description, f"module {path}")
    plain = {key: decoded(value, {}, f"module {path}") for key, value in fields.items()}
    if not isinstance(plain.get("class"), str) or plain["class"] not in kinds:
        refuse(f"module {path} is a {shown(plain.get('class'))}, which is not on the list of layers")
    try:
        return made(plain, kinds)
    except KeyError as error:
        refuse(f"module {path}, a {plain['class']}, has no {shown(error.args[0])}")


def _tensors_from_json(
    root: nn.Module, entries: Any, tensors: Callable[[str, str, tuple[int, ...], torch.dtype], torch.Tensor]
) -> dict[str, torch.Tensor]:
    held: dict[str, torch.Tensor] = {}
    for entry in list_of(entries, "tensors"):
        fields = object_of(entry, "a tensor")
        name, kind = matching(fields.get("name"), PATH, "the tensor"), fields.get("kind")
        if name in held or kind not in ("parameter", "buffer"):
            refuse(f"tensor {name} is there twice, or is neither a parameter nor a buffer")
        if "same_as" in fields:
            if not isinstance(fields["same_as"], str) or fields["same_as"] not in held:
                refuse(f"tensor {name} is the same as {shown(fields['same_as'])}, which is not there")
            value = held[fields["same_as"]]
        else:
            shape = tuple(whole(n, f"tensor {name}") for n in list_of(fields.get("shape"), f"the shape of {name}"))
            if len(shape) > 16 or math.prod(shape) > LARGEST // 64 or fields.get("dtype") not in DTYPES:
                refuse(f"tensor {name}: no tensor has shape {shown(shape)} and dtype {shown(fields.get('dtype'))}")
            value = tensors(name, kind, shape, DTYPES[fields["dtype"]])
        held[name] = value
        owner = _owner(root, name)
        leaf = name.rpartition(".")[2]
        if hasattr(owner, leaf) and leaf not in owner._parameters and leaf not in owner._buffers:
            refuse(f"tensor {name} would hide an attribute of that name")
        if kind == "parameter" and not isinstance(value, nn.Parameter):
            value = held[name] = nn.Parameter(value, requires_grad=value.is_floating_point() and value.is_meta)
        owner._parameters.pop(leaf, None)
        owner._buffers.pop(leaf, None)
        (owner._parameters if kind == "parameter" else owner._buffers)[leaf] = value
    return held


def _owner(root: nn.Module, name: str) -> nn.Module:
    """Returns the module that a tensor of that path belongs to; made on the way where no layer is called there."""
    owner = root
    for atom in name.split(".")[:-1]:
        child = owner._modules.get(atom)
        if child is None:
            if hasattr(owner, atom):
                refuse(f"tensor {name} would hide an attribute of that name")
            child = owner._modules[atom] = nn.Module()
        owner = child
    return owner


def _add_node(
    graph: torch.fx.Graph,
    nodes: dict[str, Node],
    data: Any,
    number: int,
    root: nn.Module,
    held: Mapping[str, torch.Tensor],
) -> None:
    fields = object_of(data, f"nodes[{number}]")
    name, op = matching(fields.get("name"), NAME, f"the name of nodes[{number}]"), fields.get("op")
    if op not in _OPS or name in nodes:
        refuse(f"node {name} is there twice, or is no op of a graph")
    args = tuple(decoded(a, nodes, f"node {name}") for a in list_of(fields.get("args", []), f"the args of {name}"))
    kwargs = {
        identifier(key, f"a keyword of {name}"): decoded(value, nodes, f"node {name}")
        for key, value in object_of(fields.get("kwargs", {}), f"the keywords of {name}").items()
    }
    target = _target(op, fields.get("target"), name, args, kwargs, root, held)
    made_node = graph.create_node(op, target, args, kwargs, name=name)
    if made_node.name != name:
        refuse(f"node {name}: no node may have that name")
    nodes[name] = made_node
    _set_meta(made_node, fields, name)


def _target(
    op: str, target: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], root: nn.Module, held: Any
) -> Any:
    if op == "call_function" and isinstance(target, dict):
        called = _loop(json.dumps(target, sort_keys=True), name)
        if kwargs or len(args) != len(called.graphs.inputs):
            refuse(f"the loop of {name} takes other arguments than it is given")
        return called
    if not isinstance(target, str):
        refuse(f"node {name} calls {shown(target)}")
    if op == "call_function":
        if target not in functions():
            refuse(f"node {name} calls {shown(target)}, which is not on the list of functions")
        check_named(target, args, kwargs, name)
        return functions()[target]
    if op == "call_method":
        if target not in METHODS or not args or not isinstance(args[0], Node):
            refuse(f"node {name} calls the method {shown(target)}, which is not on the list of methods")
    elif op == "call_module":
        if not isinstance(root.get_submodule(target) if _is_module(root, target) else None, nn.Module):
            refuse(f"node {name} calls the module {shown(target)}, which is not there")
    elif op == "get_attr":
        if target not in held:
            refuse(f"node {name} reads {shown(target)}, which is no tensor of the graph")
    elif op == "placeholder":
        if kwargs or len(args) > 1 or any(a is not None for a in args):
            refuse(f"node {name}: an input has no arguments")
        identifier(target, f"the input {name}", TAKEN)
    elif target != "output" or len(args) != 1 or kwargs:
        refuse(f"node {name} is no output")
    return target


@functools.lru_cache(maxsize=256)
def _loop(text: str, name: str) -> Any:
    """Reads what `_loop_to_json` wrote: one function for one text, so that graphs which call the same loop are seen
    to."""
    where, target = f"the loop of {name}", json.loads(text)
    keys = ("name", "inputs", "own", "counter", "bounds", "bodies", "results")
    fields = object_of(object_of(target, where, ("loop",))["loop"], where, keys)

    def no_tensor(tensor: str, *_: Any) -> torch.Tensor:
        refuse(f"{where} reads a tensor, {shown(tensor)}")

    def names_in(key: str) -> tuple[str, ...]:
        return tuple(matching(n, NAME, f"a variable of {where}") for n in list_of(fields[key], where))

    parts = [fields["bounds"], *list_of(fields["bodies"], where), fields["results"]]
    if len(parts) < 3:
        refuse(f"{where} has no body")
    bounds, *bodies, results = (graph_from_json(part, no_tensor, {}) for part in parts)
    graphs = LoopGraphs(
        name=identifier(fields["name"], where, TAKEN),
        inputs=names_in("inputs"),
        own=names_in("own"),
        counter=matching(fields["counter"], NAME, where),
        bounds=bounds,
        bodies=tuple(bodies),
        results=results,
    )
    if not set(graphs.own) <= set(graphs.inputs) or not graphs.is_sound():
        refuse(f"a body of {where} does not give its variables")
    return graphs.function()


def _is_module(root: nn.Module, target: str) -> bool:
    try:
        called = fetch(root, target)
    except AttributeError:
        return False
    return isinstance(called, nn.Module) and type(called) is not nn.Module


def check_named(target: str, args: Any, kwargs: Any, name: str) -> None:
    """Refuses a call by name (`getattr` and its like) of anything but an attribute of the list, written out."""
    if target in NAMED and (len(args) < 2 or not isinstance(args[1], str) or args[1] not in NAMED[target] or kwargs):
        refuse(f"node {name} asks {target} for {shown(args[1] if len(args) > 1 else None)}, which is not on its list")
    if target == "ours.experts" and (len(args) < 9 or not is_gate(args[7], args[8])):
        refuse(f"node {name}: {shown(args[7:9])} is no gate of experts")
    if target == "builtins.getattr" and len(args) != 2:
        refuse(f"node {name}: getattr with {len(args)} arguments")


def _set_meta(node: Node, fields: Mapping[str, Any], name: str) -> None:
    if "val" in fields:
        node_meta.set_val(node, decoded(fields["val"], None, f"the example of {name}"))
    if "symbols" in fields:
        node_meta.set_symbols(node, decoded(fields["symbols"], None, f"the symbols of {name}"))
    if "source" in fields:
        node_meta.set_source(node, printable(fields["source"], f"the source of {name}"))
    if fields.get("constant") is True:
        node_meta.set_constant(node)
    if "stands_for" in fields:
        node_meta.set_stands_for(node, printable(fields["stands_for"], f"what {name} stands for"))
    if "module" in fields:
        path = printable(fields["module"], f"the module of {name}")
        node_meta.set_module_stack(node, {path: (path, "")})
