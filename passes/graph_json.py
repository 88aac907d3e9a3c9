"""graph_json: a graph as JSON and back, over an allow-list of what it may call. Nothing in a file is imported or run.

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

import functools
import json
import keyword
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
import torch.fx
from torch import nn
from torch.fx import Node

from cost_model.errors import AutodistError
from passes.arguments import fetch, place
from passes.graph_targets import METHODS, NAMED, functions, names
from passes.loop_graphs import LoopError, LoopGraphs
from passes.module_kinds import KINDS, Kinds, described, made

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,300}\Z")
_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+){0,40}\Z")
_KEY = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*\Z")  # of a dict: output names, "hidden_states.0"
_TAKEN = frozenset({"self", "torch", "device", "inf", "nan", "math", "typing", "fx_pytree", "pytree", "NoneType"})
_DEVICE = re.compile(r"(cpu|meta|cuda(:[0-9]{1,3})?)\Z")
_DEEPEST, _LONGEST_TEXT, _LARGEST = 12, 2000, 2**63 - 1
_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_OPS = ("placeholder", "get_attr", "call_function", "call_method", "call_module", "output")
_LAYOUTS = {"contiguous_format": torch.contiguous_format, "preserve_format": torch.preserve_format,
            "channels_last": torch.channels_last}  # fmt: skip


class GraphFormatError(AutodistError):
    """A graph cannot be saved, or what was read is no saved graph; the message names the node."""


# -- writing ----------------------------------------------------------------------------------------------------------


def graph_to_json(module: torch.fx.GraphModule, kinds: Kinds = KINDS) -> dict[str, Any]:
    """Plain data for json.dumps; tensors are described, their values are not in it.

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
                    "has no place in a saved graph (passes/module_kinds.py lists what has): use the model itself"
                )
            modules[str(node.target)] = {k: _encoded(v, node) for k, v in description.items()}
    return {
        "class": type(module).__name__,
        "modules": modules,
        "tensors": _tensors_to_json(module),
        "nodes": [_node_to_json(node) for node in module.graph.nodes],
    }


def _tensors_to_json(module: torch.fx.GraphModule) -> list[dict[str, Any]]:
    """Those that the graph reads, or a layer that it calls has."""
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
    """By path, what a graph reads and what the layers that it calls have."""
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
                f"{node.name} ({node.meta.get('source', 'no source line')}) calls {called}, which a saved graph may "
                "not: it was made while this model was traced, or passes/graph_targets.py does not list it; use the "
                "model itself"
            )
        _check_named(target, node.args, node.kwargs, node.name)
    elif node.op == "call_method" and target not in METHODS:
        raise GraphFormatError(f"{node.name} calls the method {target}, which passes/graph_targets.py does not list")
    data: dict[str, Any] = {"op": node.op, "name": node.name, "target": target}
    if node.args:
        data["args"] = [_encoded(a, node) for a in node.args]
    if node.kwargs:
        data["kwargs"] = {k: _encoded(v, node) for k, v in node.kwargs.items()}
    if "val" in node.meta and (known := _meta_value(node.meta["val"])) is not None:
        data["val"] = known[0]
    if "symbols" in node.meta:
        data["symbols"] = _encoded(node.meta["symbols"], node)
    if node.meta.get("source"):
        data["source"] = str(node.meta["source"])
    if node.meta.get("constant"):
        data["constant"] = True
    if node.meta.get("stands_for"):
        data["stands_for"] = str(node.meta["stands_for"])
    if node.op != "call_module" and (stack := node.meta.get("nn_module_stack")):
        data["module"] = str(next(reversed(stack.values()))[0])
    return data


def _loop_to_json(node: Node) -> dict[str, Any]:
    """A loop over a length, in place of the name of a function."""
    target: Any = node.target
    try:
        graphs: LoopGraphs = target.graphs if hasattr(target, "graphs") else target.source.graphs(node.args)
    except LoopError as error:
        raise GraphFormatError(
            f"{node.name} ({node.meta.get('source', 'no source line')}) calls {target.__module__}.{target.__name__}, a "
            f"loop that cannot be saved as a graph ({error}): use the model itself"
        ) from error
    data: dict[str, Any] = {name: getattr(graphs, name) for name in ("name", "counter")}
    data |= {name: list(getattr(graphs, name)) for name in ("inputs", "own")}
    data |= {name: graph_to_json(getattr(graphs, name)) for name in ("bounds", "results")}
    return {"loop": {**data, "bodies": [graph_to_json(body) for body in graphs.bodies]}}


def _meta_value(value: Any) -> tuple[Any] | None:
    """An example value in a tuple of one; None for what none is kept of (a cache)."""
    if isinstance(value, torch.Tensor):
        return ({"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape)]},)
    if isinstance(value, (tuple, list)):
        inner = [_meta_value(v) for v in value]
        if any(v is None for v in inner):
            return None
        plain = [v[0] for v in inner if v is not None]
        return ({"tuple": plain} if isinstance(value, tuple) else plain,)
    try:
        return (_encoded(value, None),)
    except GraphFormatError:
        return None


def _encoded(value: Any, node: Node | None) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, (tuple, torch.Size)):
        return {"tuple": [_encoded(v, node) for v in value]}
    if isinstance(value, list):
        return [_encoded(v, node) for v in value]
    if isinstance(value, dict) and all(isinstance(key, str) and _KEY.match(key) for key in value):
        return {"dict": {k: _encoded(v, node) for k, v in value.items()}}
    if isinstance(value, slice):
        return {"slice": [_encoded(v, node) for v in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    where = f"{node.name} has an argument" if node is not None else "there is a value"
    raise GraphFormatError(f"{where} of type {type(value).__name__}, which has no place in a saved graph")


# -- reading ----------------------------------------------------------------------------------------------------------


def graph_from_json(
    data: Any, tensors: Callable[[str, str, tuple[int, ...], torch.dtype], torch.Tensor], kinds: Kinds = KINDS
) -> torch.fx.GraphModule:
    """Inverse of `graph_to_json`, in eval mode.

    `tensors(name, kind, shape, dtype)` gives each parameter and buffer, on meta or with its values. GraphFormatError,
    which names the node or the field, for all that is not a graph which `graph_to_json` could have written.
    """
    fields = _object(data, "the graph", ("class", "modules", "tensors", "nodes"))
    root = nn.Module()
    for path, description in _object(fields["modules"], "modules").items():
        place(root, _matching(path, _PATH, "the module path"), _module(path, description, kinds))
    held = _tensors_from_json(root, fields["tensors"], tensors)
    graph = torch.fx.Graph()
    nodes: dict[str, Node] = {}
    reserved = {str(n.get("name")) for n in _list(fields["nodes"], "nodes") if isinstance(n, dict)}
    for number, node in enumerate(fields["nodes"]):
        if nodes and next(reversed(nodes.values())).op == "output":
            _refuse(f"nodes[{number}] comes behind the output")
        _add_node(graph, nodes, node, number, root, held)
    if not nodes or next(reversed(nodes.values())).op != "output" or len(reserved) != len(nodes):
        _refuse("the graph does not end with its output")
    name = _matching(fields["class"], _NAME, "the class")
    if keyword.iskeyword(name):
        _refuse(f"{name!r} is no name of a class")
    return torch.fx.GraphModule(root, graph, name).eval()


def _module(path: str, description: Any, kinds: Kinds) -> nn.Module:
    fields = _object(description, f"module {path}")
    plain = {key: _decoded(value, {}, f"module {path}") for key, value in fields.items()}
    if not isinstance(plain.get("class"), str) or plain["class"] not in kinds:
        _refuse(f"module {path} is a {_shown(plain.get('class'))}, which is not on the list of layers")
    try:
        return made(plain, kinds)
    except KeyError as error:
        _refuse(f"module {path}, a {plain['class']}, has no {_shown(error.args[0])}")


def _tensors_from_json(
    root: nn.Module, entries: Any, tensors: Callable[[str, str, tuple[int, ...], torch.dtype], torch.Tensor]
) -> dict[str, torch.Tensor]:
    held: dict[str, torch.Tensor] = {}
    for entry in _list(entries, "tensors"):
        fields = _object(entry, "a tensor")
        name, kind = _matching(fields.get("name"), _PATH, "the tensor"), fields.get("kind")
        if name in held or kind not in ("parameter", "buffer"):
            _refuse(f"tensor {name} is there twice, or is neither a parameter nor a buffer")
        if "same_as" in fields:
            if not isinstance(fields["same_as"], str) or fields["same_as"] not in held:
                _refuse(f"tensor {name} is the same as {_shown(fields['same_as'])}, which is not there")
            value = held[fields["same_as"]]
        else:
            shape = tuple(_whole(n, f"tensor {name}") for n in _list(fields.get("shape"), f"the shape of {name}"))
            if len(shape) > 16 or math.prod(shape) > _LARGEST // 64 or fields.get("dtype") not in _DTYPES:
                _refuse(f"tensor {name}: no tensor has shape {_shown(shape)} and dtype {_shown(fields.get('dtype'))}")
            value = tensors(name, kind, shape, _DTYPES[fields["dtype"]])
        held[name] = value
        owner = _owner(root, name)
        leaf = name.rpartition(".")[2]
        if hasattr(owner, leaf) and leaf not in owner._parameters and leaf not in owner._buffers:
            _refuse(f"tensor {name} would hide an attribute of that name")
        if kind == "parameter" and not isinstance(value, nn.Parameter):
            value = held[name] = nn.Parameter(value, requires_grad=value.is_floating_point() and value.is_meta)
        owner._parameters.pop(leaf, None)
        owner._buffers.pop(leaf, None)
        (owner._parameters if kind == "parameter" else owner._buffers)[leaf] = value
    return held


def _owner(root: nn.Module, name: str) -> nn.Module:
    """The module that a tensor of that path belongs to; made on the way where no layer is called there."""
    owner = root
    for atom in name.split(".")[:-1]:
        child = owner._modules.get(atom)
        if child is None:
            if hasattr(owner, atom):
                _refuse(f"tensor {name} would hide an attribute of that name")
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
    fields = _object(data, f"nodes[{number}]")
    name, op = _matching(fields.get("name"), _NAME, f"the name of nodes[{number}]"), fields.get("op")
    if op not in _OPS or name in nodes:
        _refuse(f"node {name} is there twice, or is no op of a graph")
    args = tuple(_decoded(a, nodes, f"node {name}") for a in _list(fields.get("args", []), f"the args of {name}"))
    kwargs = {
        _identifier(key, f"a keyword of {name}"): _decoded(value, nodes, f"node {name}")
        for key, value in _object(fields.get("kwargs", {}), f"the keywords of {name}").items()
    }
    target = _target(op, fields.get("target"), name, args, kwargs, root, held)
    made_node = graph.create_node(op, target, args, kwargs, name=name)
    if made_node.name != name:
        _refuse(f"node {name}: no node may have that name")
    nodes[name] = made_node
    _set_meta(made_node, fields, name)


def _target(
    op: str, target: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], root: nn.Module, held: Any
) -> Any:
    if op == "call_function" and isinstance(target, dict):
        called = _loop(json.dumps(target, sort_keys=True), name)
        if kwargs or len(args) != len(called.graphs.inputs):
            _refuse(f"the loop of {name} takes other arguments than it is given")
        return called
    if not isinstance(target, str):
        _refuse(f"node {name} calls {_shown(target)}")
    if op == "call_function":
        if target not in functions():
            _refuse(f"node {name} calls {_shown(target)}, which is not on the list of functions")
        _check_named(target, args, kwargs, name)
        return functions()[target]
    if op == "call_method":
        if target not in METHODS or not args or not isinstance(args[0], Node):
            _refuse(f"node {name} calls the method {_shown(target)}, which is not on the list of methods")
    elif op == "call_module":
        if not isinstance(root.get_submodule(target) if _is_module(root, target) else None, nn.Module):
            _refuse(f"node {name} calls the module {_shown(target)}, which is not there")
    elif op == "get_attr":
        if target not in held:
            _refuse(f"node {name} reads {_shown(target)}, which is no tensor of the graph")
    elif op == "placeholder":
        if kwargs or len(args) > 1 or any(a is not None for a in args):
            _refuse(f"node {name}: an input has no arguments")
        _identifier(target, f"the input {name}", _TAKEN)
    elif target != "output" or len(args) != 1 or kwargs:
        _refuse(f"node {name} is no output")
    return target


@functools.lru_cache(maxsize=256)
def _loop(text: str, name: str) -> Any:
    """What `_loop_to_json` wrote: one function for one text, so that graphs which call the same loop are seen to."""
    where, target = f"the loop of {name}", json.loads(text)
    keys = ("name", "inputs", "own", "counter", "bounds", "bodies", "results")
    fields = _object(_object(target, where, ("loop",))["loop"], where, keys)

    def no_tensor(tensor: str, *_: Any) -> torch.Tensor:
        _refuse(f"{where} reads a tensor, {_shown(tensor)}")

    def names_in(key: str) -> tuple[str, ...]:
        return tuple(_matching(n, _NAME, f"a variable of {where}") for n in _list(fields[key], where))

    parts = [fields["bounds"], *_list(fields["bodies"], where), fields["results"]]
    if len(parts) < 3:
        _refuse(f"{where} has no body")
    bounds, *bodies, results = (graph_from_json(part, no_tensor, {}) for part in parts)
    graphs = LoopGraphs(
        name=_identifier(fields["name"], where, _TAKEN),
        inputs=names_in("inputs"),
        own=names_in("own"),
        counter=_matching(fields["counter"], _NAME, where),
        bounds=bounds,
        bodies=tuple(bodies),
        results=results,
    )
    if not set(graphs.own) <= set(graphs.inputs) or not graphs.is_sound():
        _refuse(f"a body of {where} does not give its variables")
    return graphs.function()


def _is_module(root: nn.Module, target: str) -> bool:
    try:
        called = fetch(root, target)
    except AttributeError:
        return False
    return isinstance(called, nn.Module) and type(called) is not nn.Module


def _check_named(target: str, args: Any, kwargs: Any, name: str) -> None:
    """`getattr` and its like: an attribute of the list, written out."""
    if target in NAMED and (len(args) < 2 or not isinstance(args[1], str) or args[1] not in NAMED[target] or kwargs):
        _refuse(f"node {name} asks {target} for {_shown(args[1] if len(args) > 1 else None)}, which is not on its list")
    if target == "builtins.getattr" and len(args) != 2:
        _refuse(f"node {name}: getattr with {len(args)} arguments")


def _set_meta(node: Node, fields: Mapping[str, Any], name: str) -> None:
    if "val" in fields:
        node.meta["val"] = _decoded(fields["val"], None, f"the example of {name}")
    if "symbols" in fields:
        node.meta["symbols"] = _decoded(fields["symbols"], None, f"the symbols of {name}")
    if "source" in fields:
        node.meta["source"] = _printable(fields["source"], f"the source of {name}")
    if fields.get("constant") is True:
        node.meta["constant"] = True
    if "stands_for" in fields:
        node.meta["stands_for"] = _printable(fields["stands_for"], f"what {name} stands for")
    if "module" in fields:
        path = _printable(fields["module"], f"the module of {name}")
        node.meta["nn_module_stack"] = {path: (path, "")}


def _decoded(value: Any, nodes: Mapping[str, Node] | None, where: str, depth: int = 0) -> Any:
    """`nodes` are those that may be referred to; None where an example is read, which may be of meta tensors."""
    if depth > _DEEPEST:
        _refuse(f"{where}: values in values, more than {_DEEPEST} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return _whole(value, where, low=-_LARGEST)
    if isinstance(value, float):
        if not math.isfinite(value):
            _refuse(f"{where}: {value} is no number of JSON")
        return value
    if isinstance(value, str):
        return _printable(value, where)
    if isinstance(value, list):
        return [_decoded(v, nodes, where, depth + 1) for v in value]
    if not isinstance(value, dict) or len(value) != 1:
        _refuse(f"{where}: {_shown(value)} is no value")
    ((kind, inner),) = value.items()
    if kind == "node":
        if nodes is None or not isinstance(inner, str) or inner not in nodes:
            _refuse(f"{where} takes {_shown(inner)}, which is no node before it")
        return nodes[inner]
    if kind == "tuple":
        return tuple(_decoded(v, nodes, where, depth + 1) for v in _list(inner, where))
    if kind == "slice" and len(_list(inner, where)) == 3:
        return slice(*(_decoded(v, nodes, where, depth + 1) for v in inner))
    if kind == "dict":
        found = _object(inner, where)
        return {_matching(k, _KEY, f"a key of {where}"): _decoded(v, nodes, where, depth + 1) for k, v in found.items()}
    if kind == "tensor" and nodes is None:
        return _example(inner, where)
    return _constant(kind, inner, where)


def _constant(kind: str, inner: Any, where: str) -> Any:
    if kind == "dtype" and isinstance(inner, str) and inner in _DTYPES:
        return _DTYPES[inner]
    if kind == "device" and isinstance(inner, str) and _DEVICE.match(inner):
        return torch.device(inner)
    if kind == "memory_format" and isinstance(inner, str) and inner in _LAYOUTS:
        return _LAYOUTS[inner]
    if kind == "float" and inner in ("inf", "-inf", "nan"):
        return float(inner)
    if kind == "ellipsis" and inner is True:
        return Ellipsis
    _refuse(f"{where}: {_shown({kind: inner})} is no value")


def _example(inner: Any, where: str) -> torch.Tensor:
    if len(_list(inner, where)) != 2 or inner[0] not in _DTYPES:
        _refuse(f"{where}: {_shown(inner)} is no tensor")
    shape = [_whole(n, where) for n in _list(inner[1], where)]
    if len(shape) > 16 or math.prod(shape) > _LARGEST // 64:
        _refuse(f"{where}: no tensor is as large as {_shown(shape)}")
    return torch.empty(shape, dtype=_DTYPES[inner[0]], device="meta")


# -- checks -----------------------------------------------------------------------------------------------------------


def _refuse(message: str) -> NoReturn:
    raise GraphFormatError(message)


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _object(value: Any, what: str, keys: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(value, dict) or any(key not in value for key in keys):
        _refuse(f"{what} is no object{' of ' + ', '.join(keys) if keys else ''}")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        _refuse(f"{what}: {_shown(value)} is no list")
    return value


def _whole(value: Any, what: str, low: int = 0) -> int:
    if type(value) is not int or not low <= value <= _LARGEST:
        _refuse(f"{what}: {_shown(value)} is no whole number of the kind that stands there")
    return value


def _matching(value: Any, pattern: re.Pattern[str], what: str) -> str:
    if not isinstance(value, str) or not pattern.match(value):
        _refuse(f"{what}: {_shown(value)} is no name")
    return value


def _identifier(value: Any, what: str, taken: frozenset[str] = frozenset()) -> str:
    name = _matching(value, _NAME, what)
    if keyword.iskeyword(name) or name in taken or name.startswith("__"):
        _refuse(f"{what}: {_shown(value)} may not be a name there")
    return name


def _printable(value: Any, what: str) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT or not value.isprintable():
        _refuse(f"{what}: {_shown(value)} is no text that can be printed")
    return value


