"""`Promised`: a tensor that is not read yet, for code that puts tensors together.

transformers' conversion of a checkpoint is Python over tensors: torch.stack of all experts' w1, torch.cat with all w3,
torch.chunk of a fused q|k|v. Run on promised tensors it reads nothing, and says what each result consists of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from autodist_fx.weights.sources.expressions import Expression, Joined, Part, Permuted, Reshaped

aten = torch.ops.aten


class NotFollowedError(Exception):
    """An op that no expression stands for, or one that writes into a tensor."""


class Promised(torch.Tensor):
    """A tensor without memory, of an expression's shape; what is done to it is an expression, too.

    `dtype`: what the code is to see; it may differ from the stored one, since values are cast when they are read.
    Raises NotFollowedError for ops that do more than move elements.
    """

    expression: Expression

    @staticmethod
    def __new__(cls, expression: Expression, dtype: torch.dtype) -> Promised:
        made = torch.Tensor._make_wrapper_subclass(cls, expression.shape, dtype=dtype, device="cpu")
        made.expression = expression
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        move = _MOVES.get(func)
        if move is None:
            raise NotFollowedError(str(func))
        tensors = args[0] if isinstance(args[0], (list, tuple)) else args[:1]
        if not all(isinstance(tensor, Promised) for tensor in tensors):
            raise NotFollowedError(f"{func} of a tensor that is there already")
        moved = move(*args, **(kwargs or {}))
        if isinstance(moved, list):
            return [cls(each, tensors[0].dtype) for each in moved]
        return cls(moved, tensors[0].dtype)


def _same(x: Promised, **_: Any) -> Expression:
    return x.expression


def _cat(tensors: list[Promised], dim: int = 0) -> Expression:
    return Joined([x.expression for x in tensors], dim % tensors[0].ndim)


def _stack(tensors: list[Promised], dim: int = 0) -> Expression:
    return Joined([_unsqueeze(x, dim) for x in tensors], dim % (tensors[0].ndim + 1))


def _unsqueeze(x: Promised, dim: int) -> Expression:
    dim %= x.ndim + 1
    return Reshaped(x.expression, (*x.shape[:dim], 1, *x.shape[dim:]))


def _squeeze(x: Promised, dim: int) -> Expression:
    dim %= x.ndim
    return Reshaped(x.expression, (*x.shape[:dim], *x.shape[dim + 1 :])) if x.shape[dim] == 1 else x.expression


def _slice(x: Promised, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Expression:
    if step != 1:
        raise NotFollowedError("a slice with steps")
    dim %= x.ndim
    first, last, _ = slice(start, end).indices(x.shape[dim])
    return Part(x.expression, dim, first, max(first, last))


def _select(x: Promised, dim: int, index: int) -> Expression:
    dim, index = dim % x.ndim, index % x.shape[dim]
    return Reshaped(Part(x.expression, dim, index, index + 1), (*x.shape[:dim], *x.shape[dim + 1 :]))


def _unbind(x: Promised, dim: int = 0) -> list[Expression]:
    return [_select(x, dim, index) for index in range(x.shape[dim])]


def _split(x: Promised, size: int, dim: int = 0) -> list[Expression]:
    whole = x.shape[dim]
    return _split_with_sizes(x, [min(size, whole - start) for start in range(0, whole, size)], dim)


def _split_with_sizes(x: Promised, sizes: list[int], dim: int = 0) -> list[Expression]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [Part(x.expression, dim % x.ndim, end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _transpose(x: Promised, a: int, b: int) -> Expression:
    order = list(range(x.ndim))
    order[a], order[b] = order[b], order[a]
    return Permuted(x.expression, order)


def _t(x: Promised) -> Expression:
    return _transpose(x, 0, -1) if x.ndim == 2 else x.expression


def _permute(x: Promised, order: list[int]) -> Expression:
    return Permuted(x.expression, [d % x.ndim for d in order])


def _view(x: Promised, shape: list[int]) -> Expression:
    return Reshaped(x.expression, torch.empty(x.shape, device="meta").reshape(shape).shape)


_MOVES: dict[Any, Callable[..., Expression | list[Expression]]] = {
    aten.alias.default: _same,
    aten.clone.default: _same,
    aten.detach.default: _same,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split_with_sizes,
    aten.transpose.int: _transpose,
    aten.t.default: _t,
    aten.permute.default: _permute,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
}
