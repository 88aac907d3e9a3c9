"""Finds numbers of a traced model that are the same for all inputs, as Python numbers: `int(features.shape[-2])`.

A proxy's example alone does not tell a constant from a length. So the number is computed once more, for inputs of other
sizes: what comes out equal is constant, and Python may look at it; what differs follows the inputs, and may not.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.fx import Node
from torch.fx.node import map_arg
from transformers import Cache

from autodist_fx.tracing.versions.tracer_base import SymbolicProxy, SymbolicTracer
from passes.fx import node_meta


class OtherExample:
    """The values of a graph's nodes, while it is being traced, for another set of example inputs; computed when asked
    for.

    Tensors are on meta. Raises what an op raises.
    """

    def __init__(self, tracer: SymbolicTracer, inputs: dict[str, Any]) -> None:
        self.tracer, self.inputs = tracer, inputs
        self._values: dict[Node, Any] = {}

    def value(self, node: Node) -> Any:
        """Return the node's value; tensors are on meta."""
        needed, pending = set[Node](), [node]
        while pending:
            one = pending.pop()
            if one not in needed and one not in self._values:
                needed.add(one)
                pending += one.all_input_nodes
                pending += self._asked_before(one)
        for one in [n for n in self.tracer.graph.nodes if n in needed]:
            self._values[one] = self._computed(one)
        return self._values[node]

    def _asked_before(self, node: Node) -> list[Node]:
        """Return what is asked of a cache before the node, which may add to it: how long it is has to be computed
        first, though nothing needs it yet."""
        caches = [n for n in node.all_input_nodes if isinstance(self.inputs.get(str(n.target)), Cache)]
        return [user for cache in caches for user in cache.users if user < node]

    def _computed(self, node: Node) -> Any:
        if node.op == "placeholder":
            return self.inputs[str(node.target)]
        if getattr(node.target, "__name__", "") == "state_input":  # one in all but name (phases.py)
            return self.inputs[str(node.args[0])]
        quiet = ("_disable_module_getattr", "_disable_call_module")  # or what is read and called here is traced, too
        before = {name: getattr(self.tracer, name, False) for name in quiet}
        for name in quiet:
            setattr(self.tracer, name, True)
        try:
            with torch.device("meta"):  # also what is made of numbers alone
                return self._run(node)
        finally:
            for name, value in before.items():
                setattr(self.tracer, name, value)

    def _attribute(self, path: str) -> Any:
        """Return what the graph reads there: the model's own, where it has set the attribute to something traced, or
        hides a buffer behind that (a "dynamic" rotary table)."""
        for tensor, name in self.tracer.tensor_attrs.items():
            if name == path:
                return tensor
        parent, _, name = path.rpartition(".")
        owner = self.tracer.root.get_submodule(parent)
        return owner._buffers[name] if owner._buffers.get(name) is not None else getattr(owner, name)

    def _run(self, node: Node) -> Any:
        if node.op == "get_attr":
            value = self._attribute(str(node.target))
            return value.to("meta") if isinstance(value, torch.Tensor) else value
        args, kwargs = map_arg((node.args, node.kwargs), self._values.__getitem__)
        if node.op == "call_module":
            module = self.tracer.root.get_submodule(str(node.target))
            buffers = {name: buffer.to("meta") for name, buffer in module.named_buffers()}
            return torch.func.functional_call(module, buffers, args, kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)


def constant(proxy: SymbolicProxy) -> int | float:
    """Return the number that the proxy is for all inputs. Raises TypeError where it is none, or follows the inputs."""
    known = getattr(proxy, "_metadata", None)
    if not isinstance(known, (int, float)):
        raise TypeError(f"{proxy.node} is a traced value, which is known only when the graph runs")
    other = proxy.tracer.other_example.value(proxy.node)
    if type(other) is not type(known) or other != known:
        raise TypeError(f"{proxy.node} follows the inputs ({known} and {other} at two example sizes)")
    if _may_bend(proxy.node, proxy.tracer):
        node_meta.set_guard_outcome((proxy - known == 0).node, True)
    return known


_BENDING = ("mod", "floordiv", "max", "min")


def _may_bend(node: Node, tracer: SymbolicTracer) -> bool:
    """Return whether a number comes of an op that gives one number for many lengths, and another one beyond: there are
    as many blocks of 64 tokens in 7 as in 23, and more in 65."""
    pending, seen = [node], set[Node]()
    while pending:
        one = pending.pop()
        if one in seen or not isinstance(tracer.examples_of.get(one), (int, float)):
            continue
        seen.add(one)
        if one.op == "call_function" and getattr(one.target, "__name__", "") in _BENDING:
            return True
        pending += one.all_input_nodes
    return False


def constant_or_none(proxy: SymbolicProxy) -> Any:
    """Return the number that the proxy is for all inputs; None where it is none, or follows the inputs."""
    try:
        return constant(proxy)
    except Exception:  # whatever an op raises for the other example
        return None


def _converted(convert: Callable[[Any], Any]) -> Callable[[SymbolicProxy], Any]:
    return lambda proxy: convert(constant(proxy))


def _index(proxy: SymbolicProxy) -> int:
    number = constant(proxy)
    if not isinstance(number, int):
        raise TypeError(f"{proxy.node} is {number}, and an index must be an integer")
    return number


# What Python calls to make a number of something. `patches` gives these to HFProxy while it traces.
CONVERSIONS: dict[str, Callable[[SymbolicProxy], Any]] = {
    "__int__": _converted(int),
    "__float__": _converted(float),
    "__index__": _index,
    "__ceil__": _converted(math.ceil),
    "__floor__": _converted(math.floor),
    "__trunc__": _converted(math.trunc),
    "__round__": lambda proxy, *digits: round(constant(proxy), *digits),
}


_OPERATORS = {
    "add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "divide": operator.truediv,
    "floor_divide": operator.floordiv, "remainder": operator.mod,
}  # fmt: skip


def numpy_ufunc(proxy: SymbolicProxy, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
    """Return what a ufunc gives where one of its arguments is traced, for `np.sqrt(q.shape[-1])`, `np.int64(8) -
    x.shape[1]`.

    Arithmetic is the graph's; anything else is computed of numbers that are the same for all inputs.
    """
    operation = _OPERATORS.get(ufunc.__name__)
    if operation is not None and method == "__call__" and not kwargs:
        return operation(*(x.item() if isinstance(x, np.generic) else x for x in inputs))
    if operation is not None and method == "reduce":  # np.prod(x.shape[1:])
        return functools.reduce(operation, proxy)
    return getattr(ufunc, method)(*(constant(x) if isinstance(x, SymbolicProxy) else x for x in inputs), **kwargs)


def check_fill(filled: Any, value: Any = None) -> None:
    """Raise TypeError where `filled.fill_(value)` is of a number that its dtype has not, as it does when it runs: a
    meta tensor takes any."""
    known, number = getattr(filled, "_metadata", None), getattr(value, "_metadata", value)
    if isinstance(known, torch.Tensor) and known.dtype.is_floating_point and type(number) is float:
        if math.isfinite(number) and abs(number) > torch.finfo(known.dtype).max:
            raise TypeError(f"{str(known.dtype).removeprefix('torch.')} has no number {number:.3g}")


def within_range(args: tuple[Any, ...], dtype: torch.dtype | None) -> tuple[Any, ...]:
    """Return arguments of torch.full whose value is infinite where the dtype has none such: `full(n,
    finfo(float64).min)`.

    torch makes float32 of a number without a dtype, and refuses what overflows. A model does that for masks which a
    trace has always, and the model itself only where something is masked.
    """
    dtype = dtype or torch.get_default_dtype()
    value = getattr(args[1], "_metadata", args[1]) if len(args) == 2 else None
    if type(value) is not float or not dtype.is_floating_point:
        return args
    overflows = math.isfinite(value) and abs(value) > torch.finfo(dtype).max
    return (args[0], math.copysign(math.inf, value)) if overflows else args
