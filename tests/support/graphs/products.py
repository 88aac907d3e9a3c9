"""The work that a run of any graph does, counted below the level at which graphs differ in how they spell it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Work = tuple[str, tuple[int, ...], int]  # (kind, sizes that do not depend on the inputs' lengths, rows)
_aten = torch.ops.aten


class CountedWork(TorchDispatchMode):
    """Counts, while it is active, what is computed of parameters and which of them are read.

    `calls` and `rows`: by kind and sizes, how often, and over how many rows in all. A product of [rows, inner] and
    [inner, columns] is ("product", (inner, columns)), batched or not; attention is the two products that it makes, in
    whichever kernel. `read`: indices of the parameters given whose memory any op read.
    """

    def __init__(self, parameters: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, tuple[int, ...]]] = Counter()
        self.rows: Counter[tuple[str, tuple[int, ...]]] = Counter()
        self.read: set[str] = set()
        self._named = {x.untyped_storage().data_ptr(): name for name, x in reversed(parameters.items())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self.read |= {self._named.get(leaf.untyped_storage().data_ptr(), "")} - {""}
        for kind, sizes, rows in _WORK.get(func.overloadpacket.__name__, _none)(args):
            self.calls[kind, sizes] += 1
            self.rows[kind, sizes] += rows
        return func(*args, **(kwargs or {}))


def _none(args: Any) -> list[Work]:
    return []


def _product(a: torch.Tensor, b: torch.Tensor) -> list[Work]:
    return [("product", tuple(b.shape[-2:]), math.prod(a.shape[:-1]))]


def _attention(args: Any) -> list[Work]:
    query, key, value = args[:3]
    return [*_product(query, key.transpose(-1, -2)), *_product(query.new_empty(*query.shape[:-1], 0), value)]


_WORK: dict[str, Callable[[Any], list[Work]]] = {
    "mm": lambda args: _product(*args[:2]),
    "bmm": lambda args: _product(*args[:2]),
    "addmm": lambda args: _product(*args[1:3]),
    "baddbmm": lambda args: _product(*args[1:3]),
    "grouped_mm_fallback": lambda args: _product(*args[:2]),  # transformers' own, of experts' rows
    "embedding": lambda args: [("embedding", tuple(args[0].shape), args[1].numel())],
    "convolution": lambda args: [("convolution", tuple(args[1].shape), args[0].shape[0] * args[0].shape[-1])],
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
}
