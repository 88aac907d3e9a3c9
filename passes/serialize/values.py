"""Writes and reads values of a graph as JSON (see write_graph.py), and checks what was read."""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
import torch.fx
from torch.fx import Node

from cost_model.errors import AutodistError

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,300}\Z")
PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+){0,40}\Z")
_KEY = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*\Z")  # of a dict: output names, "hidden_states.0"
TAKEN = frozenset({"self", "torch", "device", "inf", "nan", "math", "typing", "fx_pytree", "pytree", "NoneType"})
_DEVICE = re.compile(r"(cpu|meta|cuda(:[0-9]{1,3})?)\Z")
_DEEPEST, _LONGEST_TEXT, LARGEST = 12, 2000, 2**63 - 1
DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_LAYOUTS = {"contiguous_format": torch.contiguous_format, "preserve_format": torch.preserve_format,
            "channels_last": torch.channels_last}  # fmt: skip


class GraphFormatError(AutodistError):
    """A graph that cannot be saved, or what was read and is no saved graph; the message names the node."""


def encoded_example(value: Any) -> tuple[Any] | None:
    """Returns an example value in a tuple of one; None for what none is kept of (a cache)."""
    if isinstance(value, torch.Tensor):
        return ({"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape)]},)
    if isinstance(value, (tuple, list)):
        inner = [encoded_example(v) for v in value]
        if any(v is None for v in inner):
            return None
        plain = [v[0] for v in inner if v is not None]
        return ({"tuple": plain} if isinstance(value, tuple) else plain,)
    try:
        return (encoded(value, None),)
    except GraphFormatError:
        return None


def encoded(value: Any, node: Node | None) -> Any:
    """Returns a value as plain data for json.dumps; `node` is whom an error names. Raises GraphFormatError."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, (tuple, torch.Size)):
        return {"tuple": [encoded(v, node) for v in value]}
    if isinstance(value, list):
        return [encoded(v, node) for v in value]
    if isinstance(value, dict) and all(isinstance(key, str) and _KEY.match(key) for key in value):
        return {"dict": {k: encoded(v, node) for k, v in value.items()}}
    if isinstance(value, slice):
        return {"slice": [encoded(v, node) for v in (value.start, value.stop, value.step)]}
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


def decoded(value: Any, nodes: Mapping[str, Node] | None, where: str, depth: int = 0) -> Any:
    """Inverts `encoded`. `nodes` are those that may be referred to; None where an example is read, which may be of
    meta tensors."""
    if depth > _DEEPEST:
        refuse(f"{where}: values in values, more than {_DEEPEST} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return whole(value, where, low=-LARGEST)
    if isinstance(value, float):
        if not math.isfinite(value):
            refuse(f"{where}: {value} is no number of JSON")
        return value
    if isinstance(value, str):
        return printable(value, where)
    if isinstance(value, list):
        return [decoded(v, nodes, where, depth + 1) for v in value]
    if not isinstance(value, dict) or len(value) != 1:
        refuse(f"{where}: {shown(value)} is no value")
    ((kind, inner),) = value.items()
    if kind == "node":
        if nodes is None or not isinstance(inner, str) or inner not in nodes:
            refuse(f"{where} takes {shown(inner)}, which is no node before it")
        return nodes[inner]
    if kind == "tuple":
        return tuple(decoded(v, nodes, where, depth + 1) for v in list_of(inner, where))
    if kind == "slice" and len(list_of(inner, where)) == 3:
        return slice(*(decoded(v, nodes, where, depth + 1) for v in inner))
    if kind == "dict":
        found = object_of(inner, where)
        return {matching(k, _KEY, f"a key of {where}"): decoded(v, nodes, where, depth + 1) for k, v in found.items()}
    if kind == "tensor" and nodes is None:
        return _example(inner, where)
    return _constant(kind, inner, where)


def _constant(kind: str, inner: Any, where: str) -> Any:
    if kind == "dtype" and isinstance(inner, str) and inner in DTYPES:
        return DTYPES[inner]
    if kind == "device" and isinstance(inner, str) and _DEVICE.match(inner):
        return torch.device(inner)
    if kind == "memory_format" and isinstance(inner, str) and inner in _LAYOUTS:
        return _LAYOUTS[inner]
    if kind == "float" and inner in ("inf", "-inf", "nan"):
        return float(inner)
    if kind == "ellipsis" and inner is True:
        return Ellipsis
    refuse(f"{where}: {shown({kind: inner})} is no value")


def _example(inner: Any, where: str) -> torch.Tensor:
    if len(list_of(inner, where)) != 2 or inner[0] not in DTYPES:
        refuse(f"{where}: {shown(inner)} is no tensor")
    shape = [whole(n, where) for n in list_of(inner[1], where)]
    if len(shape) > 16 or math.prod(shape) > LARGEST // 64:
        refuse(f"{where}: no tensor is as large as {shown(shape)}")
    return torch.empty(shape, dtype=DTYPES[inner[0]], device="meta")


def refuse(message: str) -> NoReturn:
    """Raises GraphFormatError with a message."""
    raise GraphFormatError(message)


def shown(value: Any) -> str:
    """Formats a value for a message, cut to a few characters."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def object_of(value: Any, what: str, keys: tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns a JSON object that has at least these keys. Raises GraphFormatError."""
    if not isinstance(value, dict) or any(key not in value for key in keys):
        refuse(f"{what} is no object{' of ' + ', '.join(keys) if keys else ''}")
    return value


def list_of(value: Any, what: str) -> list[Any]:
    """Returns a JSON list. Raises GraphFormatError."""
    if not isinstance(value, list):
        refuse(f"{what}: {shown(value)} is no list")
    return value


def whole(value: Any, what: str, low: int = 0) -> int:
    """Returns an int of at least `low`. Raises GraphFormatError."""
    if type(value) is not int or not low <= value <= LARGEST:
        refuse(f"{what}: {shown(value)} is no whole number of the kind that stands there")
    return value


def matching(value: Any, pattern: re.Pattern[str], what: str) -> str:
    """Returns a text that matches `pattern` in full. Raises GraphFormatError."""
    if not isinstance(value, str) or not pattern.match(value):
        refuse(f"{what}: {shown(value)} is no name")
    return value


def identifier(value: Any, what: str, taken: frozenset[str] = frozenset()) -> str:
    """Returns a Python identifier that is not taken yet. Raises GraphFormatError."""
    name = matching(value, NAME, what)
    if keyword.iskeyword(name) or name in taken or name.startswith("__"):
        refuse(f"{what}: {shown(value)} may not be a name there")
    return name


def printable(value: Any, what: str) -> str:
    """Returns a text of printable characters. Raises GraphFormatError."""
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT or not value.isprintable():
        refuse(f"{what}: {shown(value)} is no text that can be printed")
    return value
