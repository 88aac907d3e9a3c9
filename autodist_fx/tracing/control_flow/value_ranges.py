"""Bounds the values of a traced tensor: enough to see that no token is marked as something special.

attention_mask                 0 to 1: transformers' masks hold zeros and ones
(1 - attention_mask) * min     min to 0
(that > 0).any()               False, whatever the mask
cache_position[-1] + 1         1 or more: positions count from 0
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import Node

Range = tuple[float, float]

_SAME = (
    "getitem", "to", "float", "long", "int", "bool", "type_as", "unsqueeze", "squeeze", "view", "reshape", "expand",
    "flatten", "transpose", "permute", "contiguous", "clone", "repeat", "any", "all", "item", "detach",
)  # fmt: skip
_VIEWS = ("getitem", "unsqueeze", "squeeze", "view", "reshape", "expand", "flatten", "transpose", "permute", "detach")
_GIVE_PLACES = ("topk", "sort")  # (values, where they were)
_DRAWN = ("rand", "rand_like")
_FILLED = ("ones", "zeros", "new_ones", "new_zeros", "ones_like", "zeros_like")
_COMPARED = {
    "gt": operator.gt, "lt": operator.lt, "ge": operator.ge, "le": operator.le, "eq": operator.eq, "ne": operator.ne,
}  # fmt: skip
_KNOWN_OPS = frozenset({
    *_SAME, *_DRAWN, *_FILLED, *_COMPARED,
    "arange", "pad", "masked_fill", "where", "type", "neg", "rsub", "add", "sub", "mul",
})  # fmt: skip
_DEEPEST = 200  # ops back from the value that is asked for; further back nothing is looked for


def certain(node: Node, tracer: Any) -> bool | None:
    """Return what a condition is for every input; None where that depends on them."""
    found = value_range(node, tracer)
    return None if found is None or bool(found[0]) != bool(found[1]) or found[0] * found[1] < 0 else bool(found[0])


def value_range(value: Any, tracer: Any) -> Range | None:
    """Return (least, greatest) of the elements of a node, or of a number; None where nothing is known."""
    return _Ranges(tracer).of(value)


class _Ranges:
    """The ranges that one question needs, each found once: values are used several times, and by what is used several
    times. Not kept for the next question, since a value may be written into meanwhile."""

    def __init__(self, tracer: Any) -> None:
        self.tracer = tracer
        self._found: dict[Node, Range | None] = {}
        self._depth = 0

    def of(self, value: Any) -> Range | None:
        """Return what value_range does."""
        if not isinstance(value, Node):
            return (float(value), float(value)) if isinstance(value, (bool, int, float)) else None
        if value not in self._found and self._depth < _DEEPEST:
            self._found[value] = None  # meanwhile: what is written into it may depend on it
            self._depth += 1
            self._found[value] = None if _is_written(value, self) else _computed(value, self)
            self._depth -= 1
        return self._found.get(value)


def _computed(value: Node, ranges_of: _Ranges) -> Range | None:
    """Return the range of what an op makes of its arguments."""
    tracer = ranges_of.tracer
    known = tracer.examples_of.get(value)
    if isinstance(known, float):
        return known, known  # the least number of a dtype, say; lengths are integers
    name = getattr(value.target, "__name__", value.target)
    if value.op == "placeholder":
        if name == "cache_position":
            return 0.0, math.inf
        is_mask = isinstance(known, torch.Tensor) and not known.is_floating_point()
        return (0.0, 1.0) if is_mask and str(name).endswith("attention_mask") else None
    if value.op not in ("call_function", "call_method") or not value.args:
        return None
    if name == "getitem" and _called(value.args[0]) in _GIVE_PLACES:
        return _places(value.args[0], tracer) if value.args[1] == 1 else None
    if name not in _KNOWN_OPS:
        return None
    ranges = [ranges_of.of(a) for a in value.args]
    first = ranges[0]
    if name == "arange" and len(value.args) < 3:
        least = 0.0 if len(value.args) == 1 else None if first is None else first[0]
        return None if least is None else (least, math.inf)
    if name == "pad":
        filled = float(value.kwargs.get("value", value.args[3] if len(value.args) > 3 else 0.0) or 0.0)
        return None if first is None else (min(first[0], filled), max(first[1], filled))
    if name in _DRAWN:
        return 0.0, 1.0
    if name in _FILLED:
        return (1.0, 1.0) if "ones" in str(name) else (0.0, 0.0)
    if name == "masked_fill" and ranges[2] is not None:
        if _is_not_zero(value.args[1], value.args[0]):
            first = (0.0, 0.0)  # of what was not zero, nothing is left
        return None if first is None else (min(first[0], ranges[2][0]), max(first[1], ranges[2][1]))
    if name == "where" and len(ranges) == 3 and ranges[1] is not None and ranges[2] is not None:
        return min(ranges[1][0], ranges[2][0]), max(ranges[1][1], ranges[2][1])
    if first is None:
        return None
    if name == "bool" or (name in ("to", "type") and torch.bool in value.args):
        return _truth(first)
    if name in _SAME:
        return first
    if name in ("neg", "rsub") and len(ranges) == 1:
        return -first[1], -first[0]
    second = ranges[1] if len(ranges) == 2 else None
    if second is None:
        return None
    if name in ("add", "sub", "rsub", "mul"):
        operation = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}.get(str(name))
        ends = [(operation or (lambda x, y: y - x))(x, y) for x in first for y in second]
        return None if any(map(math.isnan, ends)) else (min(ends), max(ends))
    if name in _COMPARED:
        if first[1] < second[0] or first[0] > second[1] or (first[0] == first[1] and second[0] == second[1]):
            answer = float(_COMPARED[str(name)](first[0], second[0]))
            return answer, answer
        if name in ("gt", "le") and first[1] <= second[0]:
            return (0.0, 0.0) if name == "gt" else (1.0, 1.0)
        if name in ("lt", "ge") and first[0] >= second[1]:
            return (0.0, 0.0) if name == "lt" else (1.0, 1.0)
        return 0.0, 1.0
    return None


def _places(node: Node, tracer: Any) -> Range | None:
    """Return the range of the indices that topk gives: 0 to the last of as many as it chooses from, where these are as
    many always."""
    examples = tracer.examples_of.get(node.args[0]), tracer.other_example.value(node.args[0])
    at = 2 if _called(node) == "topk" else 1  # of `dim` among the arguments
    dim = node.kwargs.get("dim", node.args[at] if len(node.args) > at else -1)
    if not all(isinstance(example, torch.Tensor) for example in examples) or not isinstance(dim, int):
        return None
    first, second = (example.shape[dim] for example in examples)
    return (0.0, first - 1.0) if first == second else None


def _called(node: Any) -> str:
    return str(getattr(node.target, "__name__", node.target)) if isinstance(node, Node) else ""


def _is_written(node: Node, ranges_of: _Ranges) -> bool:
    """Return whether something is written into the tensor, or into a view of it: then it is not what made it."""
    for user in node.users:
        if not user.args or user.args[0] is not node:
            continue
        name = str(getattr(user.target, "__name__", user.target))
        if user.target is operator.setitem and _selects_nothing(user.args[1], ranges_of):
            continue
        if user.target is operator.setitem or (user.op == "call_method" and name.endswith("_") and name[-2:] != "__"):
            return True
        if name in _VIEWS and _is_written(user, ranges_of):
            return True
    return False


def _selects_nothing(index: Any, ranges_of: _Ranges) -> bool:
    """Return whether an index is a mask that is set nowhere, for any input."""
    known = ranges_of.tracer.examples_of.get(index) if isinstance(index, Node) else None
    is_mask = isinstance(known, torch.Tensor) and known.dtype == torch.bool
    return is_mask and ranges_of.of(index) == (0.0, 0.0)


def _truth(found: Range) -> Range:
    has_zero = found[0] <= 0 <= found[1]
    return 0.0 if has_zero else 1.0, 0.0 if found == (0.0, 0.0) else 1.0


def _is_not_zero(mask: Any, x: Any) -> bool:
    """Return whether the mask says where `x` is not zero."""
    name = getattr(mask.target, "__name__", mask.target) if isinstance(mask, Node) else ""
    return name in ("bool", "to") and mask.args[0] is x and (name == "bool" or torch.bool in mask.args)
