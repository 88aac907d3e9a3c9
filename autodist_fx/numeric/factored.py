"""`Factored`: a weight of any size that never exists whole, as the product of two thin float64 matrices.

W = left @ right.T with `left` [..., n, r] and `right` [..., m, r]. A slice of W along a dim is a slice of one factor,
and x @ W.T is (x @ right) @ left.T, so that a model of 70 B parameters runs at its true sizes in megabytes.

A result for factored weights holds for full matrices, too. A program is a function of its weights, and where two
programs differ for some weights, they differ for almost all factored ones, as long as r is no less than the degree to
which a weight enters (matrices of rank one alone span all; those of rank r are dense enough for polynomials of degree
r).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from autodist_fx.errors import AutodistError
from cost_model.graph.placement import Interval

RANK = 16
_MOST_ELEMENTS = 2**27  # the largest product made for an op without a line in _OPS: 1 GiB of float64


class Factored(torch.Tensor):
    """A tensor of shape [..., n, m] held as two factors. Ops in `_OPS` work on the factors; all others get the product,
    or raise AutodistError where it is too large."""

    left: torch.Tensor
    right: torch.Tensor

    @staticmethod
    def __new__(cls, left: torch.Tensor, right: torch.Tensor) -> Factored:
        shape = (*left.shape[:-1], right.shape[-2])
        made: Factored = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=left.dtype, device=left.device)
        made.left, made.right = left, right
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        keywords = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            if name == "__get__" or name in _OF_SHAPE:
                return func(*args, **keywords)
            run = _OPS.get(name)
            result = NotImplemented if run is None else run(*args, **keywords)
            return func(*args, **keywords) if result is NotImplemented else result

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an op that has no line in `_OPS` on the whole product."""
        return func(*(_product(a) for a in args), **{k: _product(v) for k, v in (kwargs or {}).items()})

    def __repr__(self) -> str:
        return f"Factored({list(self.shape)})"


_OF_SHAPE = ("size", "dim", "numel", "stride", "is_floating_point", "element_size", "__len__", "ndimension")


def draw(shape: Sequence[int], generator: torch.Generator) -> Factored:
    """Draw a weight of this shape (two dims or more) whose
    elements have mean 0 and variance 1 / shape[-1], in float64."""
    *batch, n, m = shape
    left = torch.randn((*batch, n, RANK), generator=generator, dtype=torch.float64)
    right = torch.randn((*batch, m, RANK), generator=generator, dtype=torch.float64)
    return Factored(left, right * (m * RANK) ** -0.5)


def sliced(weight: torch.Tensor, dim: int, intervals: Sequence[Interval]) -> torch.Tensor:
    """Return the elements `intervals` ([start, stop)) of a weight
    along `dim`, concatenated; plain tensors are taken, too."""
    if not isinstance(weight, Factored):
        pieces = [weight.narrow(dim, start, stop - start) for start, stop in intervals]
        return pieces[0] if len(pieces) == 1 else torch.cat([weight.narrow(dim, 0, 0), *pieces], dim)
    left, right, rank = weight.left, weight.right, weight.dim()
    if dim != rank - 1:
        left = sliced(left, dim, intervals)
    if dim != rank - 2:
        right = sliced(right, min(dim, rank - 2), intervals)
    return Factored(left, right)


def _product(value: Any) -> Any:
    """Multiply the factors out, also inside tuples and lists. Raises AutodistError above _MOST_ELEMENTS elements."""
    if isinstance(value, (tuple, list)):
        return type(value)(_product(v) for v in value)
    if not isinstance(value, Factored):
        return value
    if math.prod(value.shape) > _MOST_ELEMENTS:
        raise AutodistError(
            f"the numeric check cannot make a whole weight {list(value.shape)}, which an op takes that has no line in "
            f"autodist_fx/numeric/factored.py: check a smaller config of the same model"
        )
    return value.left @ value.right.mT


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(x, Factored) or not isinstance(weight, Factored) or weight.dim() != 2:
        return NotImplemented
    y = x.matmul(weight.right).matmul(weight.left.t())
    return y if bias is None else y + bias


def _matmul(x: Any, weight: Any) -> Any:
    if isinstance(x, Factored) or not isinstance(weight, Factored):
        return NotImplemented
    return x.matmul(weight.left).matmul(weight.right.mT)


def _addmm(bias: Any, x: Any, weight: Any, **scales: Any) -> Any:
    return NotImplemented if scales or isinstance(bias, Factored) else _add(bias, _matmul(x, weight))


def _add(bias: Any, product: Any) -> Any:
    return product if product is NotImplemented else bias + product


def _embedding(ids: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    return F.embedding(ids, weight.left).matmul(weight.right.t())


def _transpose(weight: Any, a: int = 0, b: int = 1) -> Any:
    rank = weight.dim()
    return Factored(weight.right, weight.left) if {a % rank, b % rank} == {rank - 1, rank - 2} else NotImplemented


def _getitem(weight: Any, index: Any) -> Any:
    if type(index) is int and weight.dim() > 2:
        return Factored(weight.left[index], weight.right[index])
    return NotImplemented


def _same(weight: Any, *args: Any, **kwargs: Any) -> Any:
    return weight


_OPS: dict[str, Callable[..., Any]] = {
    "linear": _linear, "matmul": _matmul, "mm": _matmul, "bmm": _matmul, "__matmul__": _matmul, "addmm": _addmm,
    "embedding": _embedding, "t": _transpose, "transpose": _transpose, "swapaxes": _transpose, "getitem": _getitem,
    "__getitem__": _getitem, "to": _same, "double": _same, "detach": _same, "contiguous": _same,
}  # fmt: skip
