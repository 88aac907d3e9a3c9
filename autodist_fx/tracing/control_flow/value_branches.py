"""Traces both branches of an `if` over the values of a tensor, in a module without parameters; the graph selects.

    model   if position_ids.max() + 1 > 4096: self.inv_freq = self.long_inv_freq
    graph   where(max(position_ids) + 1 > 4096, long_inv_freq, inv_freq)

The module's code runs once for each way that it can go; what it returns and what it leaves on the module are joined by
`torch.where`. Such modules are small (rotary tables), and what both ways share is merged by normalize.

An attribute that a call leaves for the next one (the longest sequence so far) becomes a buffer, which the graph reads,
and writes with `write_buffers`: each rank keeps it as the model itself does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import Node, Proxy

from autodist_fx.tracing.versions.tracer_base import SymbolicProxy
from passes.ops.buffers import write_buffers

_MOST_PATHS = 32
_PREFIX = "kept_"  # of the buffers that hold what a call leaves for the next
_register_buffer = nn.Module.register_buffer  # while a model is traced, hide_buffer stands in its place
_setattr = nn.Module.__setattr__  # and set_attribute in its
_PLAIN = (bool, int, float, str, type(None))
_Attribute = tuple[nn.Module, str]


class Answers:
    """The answers to conditions in one run of a module's code: as `given`, and True beyond."""

    def __init__(self, given: tuple[bool, ...]) -> None:
        self.given = given
        self.conditions: list[SymbolicProxy] = []
        self._known: dict[Any, bool] = {}

    def __len__(self) -> int:
        return len(self.conditions)

    def answer(self, condition: SymbolicProxy) -> bool:
        """Return the answer to a condition; one that is asked again has the same."""
        node = condition.node
        question = (node.target, node.args, tuple(node.kwargs.items())) if _is_comparison(node) else node
        if question not in self._known:
            place = len(self.conditions)
            self._known[question] = self.given[place] if place < len(self.given) else True
            self.conditions.append(condition)
        return self._known[question]


def trace_both_ways(tracer: Any, module: nn.Module, run: Callable[[], Any]) -> Any:
    """Return what `run()`, code of `module`, returns for either outcome of the conditions on values that it asks.

    A module with parameters is traced one way only; a condition on values in it is refused as ever. Raises TypeError
    where `run` returns, or leaves on the module, what no tensor can say which of it is.
    """
    if next(module.parameters(), None) is not None:
        return run()
    start = _Attributes(module)
    result, left, is_one_way = _explored(tracer, module, run)
    changed = [key for key, value in left.items() if isinstance(value, Proxy) and value is not start.values.get(key)]
    changed = [key for key in changed if start.values.get(key) is not None]
    if is_one_way or not changed:
        return result
    read = {key: _kept_buffer(tracer, key, left[key], start.values[key]) for key in changed}
    if any(read[key] is not start.values[key] for key in changed):
        start.restore()  # once more, with what a call leaves for the next one read from its buffer
        _set(read)
        result, left, _ = _explored(tracer, module, run)
    needed = [key for key in changed if _is_read(tracer, key)]
    if needed:
        buffers = [tracer.kept_buffers[key] for key in needed]
        written = tracer.create_proxy("call_function", write_buffers, ([left[key] for key in needed], buffers), {})
        tracer.buffer_writes += 1
        _set({key: written[place] for place, key in enumerate(needed)})
    return result


def _explored(tracer: Any, module: nn.Module, run: Callable[[], Any]) -> tuple[Any, Mapping[_Attribute, Any], bool]:
    """Return (result, attributes left, whether there is one way only) of all ways that `run` can go, joined; the
    module has these attributes then."""
    start, before, writes = _Attributes(module), tracer.answers, tracer.buffer_writes
    paths = 0

    def explore(given: tuple[bool, ...]) -> tuple[Any, dict[_Attribute, Any]]:
        nonlocal paths
        paths += 1
        if paths > _MOST_PATHS:
            raise TypeError(f"{type(module).__name__} asks for the values of tensors in more than {_MOST_PATHS} ways")
        if given:
            start.restore()
        tracer.answers = answers = Answers(given)
        result, left = run(), _Attributes(module).values
        if answers.conditions:
            changed = (key for key, value in left.items() if value is not start.values.get(key, left))
            tracer.left_by_calls.update(_path(tracer, key) for key in changed)
        taken = (*given, *(True for _ in range(len(answers) - len(given))))
        for place in reversed(range(len(given), len(answers))):
            otherwise, left_otherwise = explore((*taken[:place], False))
            condition = answers.conditions[place]
            result = _select(condition, result, otherwise)
            left = {key: _select(condition, left[key], left_otherwise[key]) for key in left if key in left_otherwise}
        return result, left

    try:
        result, left = explore(())
    finally:
        tracer.answers = before
    if paths > 1:
        if tracer.buffer_writes != writes:
            raise TypeError(f"a value decides whether {type(module).__name__} leaves something for the next call")
        start.restore()
        _set(left)
    return result, left, paths == 1


def _select(condition: SymbolicProxy, if_true: Any, if_false: Any) -> Any:
    """Return `if_true` or `if_false`, as the condition comes out when the graph runs."""
    if if_true is if_false or _are_equal(if_true, if_false):
        return if_true
    if isinstance(if_true, (tuple, list)) and type(if_true) is type(if_false) and len(if_true) == len(if_false):
        return type(if_true)(_select(condition, a, b) for a, b in zip(if_true, if_false, strict=True))
    for value in (if_true, if_false):
        if not isinstance(getattr(value, "_metadata", value), (torch.Tensor, bool, int, float)):
            raise TypeError(f"{condition.node} decides between {if_true} and {if_false}, which no graph can select")
    if condition._metadata.dtype != torch.bool:
        condition = condition != 0
    return torch.where(condition, if_true, if_false)


def _are_equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.device == b.device and not a.is_meta and torch.equal(a, b)
    return type(a) is type(b) and isinstance(a, _PLAIN) and a == b


def _is_comparison(node: Node) -> bool:
    return getattr(node.target, "__name__", node.target) in ("gt", "ge", "lt", "le", "eq", "ne")


# -- what a module has ------------------------------------------------------------------------------------------------


class _Attributes:
    """The public attributes and the buffers of a module and of those in it; an attribute hides a buffer of its name."""

    def __init__(self, module: nn.Module) -> None:
        self._parts = [(part, _public(part), dict(part._buffers)) for part in module.modules()]
        self.values: dict[_Attribute, Any] = {
            (part, name): value for part, own, buffers in self._parts for name, value in {**buffers, **own}.items()
        }

    def restore(self) -> None:
        """Set all attributes to what they were."""
        for part, own, buffers in self._parts:
            for name in _public(part):
                vars(part).pop(name)
            vars(part).update(own)
            part._buffers.update(buffers)


def _public(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}


def _set(attributes: Mapping[_Attribute, Any]) -> None:
    for (part, name), value in attributes.items():
        if part._buffers.get(name) is not value:
            vars(part)[name] = value  # not setattr: it hides the buffer, which stays for the graph to read


def hide_buffer(module: nn.Module, name: str, tensor: Any, persistent: bool = True) -> None:
    """Set a buffer that a module replaces in the course of a call; stands for nn.Module.register_buffer meanwhile."""
    vars(module)[name] = tensor


def set_attribute(module: nn.Module, name: str, value: Any) -> None:
    """Stands for nn.Module.__setattr__, which refuses to put a traced value in the place of a buffer."""
    if not isinstance(value, Proxy) or name not in module._buffers:
        _setattr(module, name, value)
    elif getattr(module, name) is not value:  # else it is the buffer itself, which was moved to where it is
        vars(module)[name] = value


def _kept_buffer(tracer: Any, key: _Attribute, left: SymbolicProxy, start: Any) -> Any:
    """Return what stands for an attribute at the start of a call: its buffer, which has the value that it has now."""
    if isinstance(start, Proxy):  # left there by an earlier use of the module in this call
        return start
    if key not in tracer.kept_buffers:
        part, name = key
        kind, value = left._metadata, torch.as_tensor(start)
        path = _path(tracer, (part, f"{_PREFIX}{name}"))
        if kind.shape != value.shape:
            raise TypeError(f"{path} is left as {list(kind.shape)} for the next call, and was {list(value.shape)}")
        value = value.detach().to(kind.dtype, copy=True)
        _register_buffer(part, f"{_PREFIX}{name}", value, persistent=False)
        tracer.kept_buffers[key] = tracer.create_proxy("get_attr", path, (), {})
    return tracer.kept_buffers[key]


def _path(tracer: Any, key: _Attribute) -> str:
    return f"{tracer.path_of_module(key[0])}.{key[1]}"


def _is_read(tracer: Any, key: _Attribute) -> bool:
    """Return whether a call depends on what the one before left there."""
    kept = tracer.kept_buffers.get(key)
    return kept is not None and bool(kept.node.users)
