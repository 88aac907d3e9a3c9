"""Functions that the rewritten code calls in place of a loop: whether to outline it, and the node that it becomes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.fx import Proxy

from autodist_fx.tracing.control_flow.constants import constant

_UNROLLED = 16  # loops of known counts up to this are written out
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device)


def is_outlined(*counts: Any) -> bool:
    """Return whether a loop over range(*counts) would become a node: one of a size, or one of many steps."""
    try:
        numbers = [constant(c) if isinstance(c, Proxy) else c for c in counts]
    except Exception:  # it follows the inputs, or what it is computed of cannot be computed at other lengths
        return True
    return all(type(n) is int for n in numbers) and len(range(*map(int, numbers))) >= _UNROLLED


def fit_a_node(values: tuple[Any, ...]) -> bool:
    """Return whether the loop's inputs can be arguments of a node."""
    return next(_proxies(values), None) is not None and all(_fits_a_graph(v) for v in values)


def _fits_a_graph(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_fits_a_graph(v) for v in value)
    if isinstance(value, dict):  # what a function's **kwargs hands on
        return all(isinstance(k, str) and _fits_a_graph(v) for k, v in value.items())
    return isinstance(value, (Proxy, torch.Tensor, *_PLAIN))


def as_large_as_before(leaf: Callable[..., Any], written: Sequence[int]) -> Callable[..., Any]:
    """Make a function of a loop that only writes into tensors which are there before it (arguments number
    `written`), also for meta ones: where it looks at values, as for where to write, these leave their shapes."""

    @functools.wraps(leaf)
    def run(*args: Any) -> Any:
        try:
            return leaf(*args)
        except (RuntimeError, TypeError):
            results = tuple(args[i] for i in written)
            if not all(isinstance(r, torch.Tensor) and r.is_meta for r in results):
                raise
            return results[0].clone() if len(results) == 1 else tuple(r.clone() for r in results)

    return run


class OutlinedCall:
    """The call that the rewritten code makes instead of a loop: one node, and an item of it for each output."""

    def __init__(self, leaf: Callable[..., Any], outputs: int) -> None:
        self.leaf, self.outputs = leaf, outputs

    def __call__(self, *args: Any) -> Any:
        tracer = next(_proxies(args)).tracer
        result = tracer.create_proxy("call_function", self.leaf, args, {})
        known = getattr(result, "_metadata", None)
        if any(not isinstance(v, torch.Tensor) for v in (known if isinstance(known, tuple) else (known,))):
            raise TypeError("a loop over a length leaves something else than tensors")
        return result if self.outputs == 1 else tuple(result[i] for i in range(self.outputs))


def _proxies(values: Sequence[Any]) -> Iterator[Proxy]:
    for value in values:
        if isinstance(value, Proxy):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _proxies(value)
