"""Traces Python that runs as often as tensor values say: loops over what a mask selects, and its early exits.

    for expert in (mask.sum((-1, -2)) > 0).nonzero():      every expert has its nodes; one that no token was sent to
        rows = torch.where(mask[expert].squeeze(0))        selects no rows, computes nothing and adds nothing
        out.index_add_(0, rows, f(x[rows]))

    sizes = counts.tolist(); x.split(sizes)                the pieces are as many as there are counts; their lengths are
                                                           known when the graph runs

A loop is unrolled only over the classes of a `one_hot` that count at least once. Where its body selects by the same
classes, as it must to do anything with them, a class that counts nowhere selects nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node
from torch.nn import functional as F

from autodist_fx.calls.value_guards import known_value
from autodist_fx.tracing.control_flow.constants import constant
from autodist_fx.tracing.control_flow.fixed_bounds import guard_bounds, guard_squeeze
from autodist_fx.tracing.control_flow.same_selection import selected_before
from autodist_fx.tracing.control_flow.value_ranges import value_range
from autodist_fx.tracing.versions.tracer_base import SymbolicProxy, SymbolicTracer
from passes.ops.data_dependent import bincount, expectation, join_rows, piece_length, selected, split_rows
from passes.ops.strided import strided

_REORDERED = ("permute", "transpose", "to", "int", "long", "bool", "contiguous")
_PART = ("getitem", "squeeze", "select", *_REORDERED)


class UnrolledIndex:
    """One element of a `nonzero()` that a loop runs over: a tensor [1] whose value is known while tracing."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __index__(self) -> int:
        return self.index

    __int__ = __index__

    def __getitem__(self, at: Any) -> int:
        return self.index

    def __eq__(self, other: object) -> bool:
        return self.index == other

    def __hash__(self) -> int:
        return hash(self.index)

    def item(self) -> int:
        """Return the index."""
        return self.index

    def squeeze(self, *dims: int) -> int:
        """Return the index as a number, which has no dims."""
        return self.index

    def tolist(self) -> list[int]:
        """Return the index in a list."""
        return [self.index]


class Counts(list[Any]):
    """The list counts.tolist(), whose length alone is known while tracing. `proxy` is the tensor."""

    def __init__(self, proxy: SymbolicProxy, length: int) -> None:
        super().__init__(proxy[i] for i in range(length))
        self.proxy = proxy


class Lengths(list[Any]):
    """A list of sizes where a model has a tensor of counts."""

    def tolist(self) -> Lengths:
        """Return the sizes."""
        return self


class Offset:
    """The place where the run of rows numbered `index` begins: the sum of the counts before it."""

    def __init__(self, counts: SymbolicProxy, index: int) -> None:
        self.counts, self.index = counts, index


class RunLength:
    """One of the counts that a loop runs over. Python may add it to where its run begins, and ask whether it is 0.

    The answer is no: an empty run has nodes, too, which compute nothing.
    """

    def __init__(self, counts: SymbolicProxy, index: int) -> None:
        self.counts, self.index = counts, index

    def __radd__(self, start: Any) -> Offset:
        begins = start.index if isinstance(start, Offset) and start.counts.node is self.counts.node else start
        if begins != self.index or (begins != 0 and not isinstance(start, Offset)):
            raise TypeError(f"count {self.index} of {self.counts.node} is added to something else than its run's begin")
        return Offset(self.counts, self.index + 1)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return hash(self.index)

    def __gt__(self, other: object) -> bool:
        return other == 0


def rewritten(tracer: SymbolicTracer, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what stands in the graph for a call that depends on values; None for any other call."""
    if kind not in ("call_function", "call_method"):
        return None
    name = target if kind == "call_method" else getattr(target, "__name__", "")
    if name == "where" and len(args) + len(kwargs) == 1:
        return _selected(tracer, *args, *kwargs.values())
    if name in ("nonzero", "argwhere"):
        indices = _selected(tracer, *args[:1], *((kwargs["input"],) if not args else ()))
        if kwargs.get("as_tuple", False):
            return indices
        return tracer.create_proxy("call_function", torch.stack, (tuple(indices[i] for i in _dims(indices)), -1), {})
    if name == "histc" and not args[0]._metadata.is_floating_point():
        # which dtype a count asks for depends on the device, and a CPU has one for floating point alone
        return tracer.create_proxy(kind, target, (args[0].to(torch.float32), *args[1:]), kwargs)
    if name == "tolist" and (listed := known_value(args[0])) is not None:
        return listed
    if name == "tolist" and len(_shape(args[0]) or ()) == 1:
        return Counts(args[0], int(constant(tracer.create_proxy("call_method", "size", (args[0], 0), {}))))
    if name in ("split", "split_with_sizes") and len(args) > 1 and isinstance(args[1], Counts):
        counts: Counts = args[1]
        number = _number(tracer, len(counts))
        pieces = tracer.create_proxy("call_function", split_rows, (args[0], counts.proxy, len(counts), number), {})
        tracer.whole_of_split[pieces.node] = args[0]
        return pieces
    if name == "unique_consecutive" and (found := value_range(args[0].node, tracer)) and found[0] == found[1]:
        values = torch.tensor([found[0]], dtype=args[0]._metadata.dtype)  # one value, as often as there are elements
        return (values, Lengths([args[0].shape[0]])) if kwargs.get("return_counts") else values
    if name in ("split", "split_with_sizes") and len(args) > 1 and isinstance(args[1], Lengths) and len(args[1]) == 1:
        return args[:1]
    if name in ("cat", "concat") and args and isinstance(args[0], (list, tuple)):
        split = _one_split_of(args[0])
        if split is not None:
            rows = tracer.create_proxy("call_method", "size", (tracer.whole_of_split[split], 0), {})
            lengths = SymbolicProxy(split.args[1], tracer)
            lengths.install_metadata(tracer.examples_of[split.args[1]])
            return tracer.create_proxy("call_function", join_rows, (list(args[0]), rows, lengths), {})
    if name == "bincount" and isinstance(kwargs.get("minlength"), int):
        return tracer.create_proxy("call_function", bincount, (args[0], kwargs["minlength"]), {})
    if name == "as_strided":
        return tracer.create_proxy("call_function", strided, args, kwargs)
    if name == "stride" and kind == "call_method":
        return _contiguous_strides(*args, **kwargs)
    if name == "item" and (number := known_value(args[0])) is not None:
        return number
    if name == "item" and _is_truth(args[0]):
        return args[0]  # Python asks it for its truth (decisions.py)
    if name in ("div", "divide") and kwargs.get("rounding_mode") in ("trunc", "floor") and all(map(_is_length, args)):
        return args[0] // args[1]  # lengths are not negative
    if name in ("cpu", "numpy") and kind == "call_method":
        return args[0]  # asked for to loop over it: the graph's nodes stay where they are
    if name in ("getitem", "setitem") and isinstance(args[1], slice):
        run = _run(args[1])
        if run is not None and name == "getitem":
            return _runs(tracer, args[0], run)[run.index - 1]
        if run is not None:
            device = {"device": args[0].device}
            everywhere = tracer.create_proxy("call_function", torch.arange, (len_of(tracer, args[0]),), device)
            rows = _runs(tracer, everywhere, run)[run.index - 1]
            return tracer.create_proxy(kind, target, (args[0], rows, args[2]), {})
    if name == "squeeze":
        squeezed, *dims = args or (kwargs.get("input"),)
        guard_squeeze(tracer, squeezed, dims or [kwargs[n] for n in ("dim",) if n in kwargs])
    if name == "getitem" and _has_unrolled(args[1]):
        return tracer.create_proxy(kind, target, (args[0], _as_index(args[1])), kwargs)
    if name == "getitem" and isinstance(args[0], SymbolicProxy):
        guard_bounds(tracer, args[0], args[1])
        items = args[1] if isinstance(args[1], tuple) else (args[1],)
        if any(map(_ends_before_the_end, items)) and all(isinstance(i, (slice, int)) for i in items):
            counted = tuple(_from_the_start(args[0], d, i) for d, i in enumerate(items))
            return tracer.create_proxy(kind, target, (args[0], counted), kwargs)
        if any(map(_is_mask, items)):  # x[mask, :] is x[rows, columns, :] of where the mask is set
            spelled = tuple(i for item in items for i in (_coordinates(tracer, item) if _is_mask(item) else (item,)))
            return tracer.create_proxy(kind, target, (args[0], spelled), kwargs)
    return None


def _coordinates(tracer: SymbolicTracer, mask: SymbolicProxy) -> list[SymbolicProxy]:
    """Return the coordinates of the elements that are set, one tensor a dim."""
    indices = _selected(tracer, mask)
    return [indices[d] for d in _dims(indices)]


def _contiguous_strides(x: SymbolicProxy, dim: int | None = None) -> Any:
    """Return the strides that `strided` goes by, those of a contiguous tensor."""
    strides: list[Any] = [1]
    for size in range(x.dim() - 1, 0, -1):
        strides.insert(0, strides[0] * x.shape[size])
    return tuple(strides) if dim is None else strides[dim]


def _ends_before_the_end(index: Any) -> bool:
    """Return whether an index is x[:-n], where n is a size."""
    known = getattr(index.stop, "_metadata", None) if isinstance(index, slice) else None
    return type(known) is int and known < 0


def _from_the_start(x: SymbolicProxy, dim: int, index: Any) -> Any:
    """Return x[: len(x) - n] for x[:-n]: also where n is 0, of which the model asks (`if padding: x =
    x[:-padding]`)."""
    return slice(index.start, x.shape[dim] + index.stop, index.step) if _ends_before_the_end(index) else index


def _is_truth(value: Any) -> bool:
    known = getattr(value, "_metadata", None)
    return isinstance(known, torch.Tensor) and known.dtype == torch.bool and known.dim() == 0


def _is_length(value: Any) -> bool:
    return type(getattr(value, "_metadata", value)) is int


def _is_mask(index: Any) -> bool:
    known = getattr(index, "_metadata", None) if isinstance(index, SymbolicProxy) else None
    return isinstance(known, torch.Tensor) and known.dtype == torch.bool and known.dim() > 0


def _runs(tracer: SymbolicTracer, rows: SymbolicProxy, run: Offset) -> SymbolicProxy:
    """Return the runs of `rows`, split once for all of them."""
    key = (rows.node, run.counts.node)
    if key not in tracer.runs:
        count = (_shape(run.counts) or (0,))[0]
        number = _number(tracer, count)
        pieces = tracer.create_proxy("call_function", split_rows, (rows, run.counts, count, number), {})
        tracer.runs[key], tracer.whole_of_split[pieces.node] = pieces, rows
    return tracer.runs[key]


def len_of(tracer: SymbolicTracer, rows: SymbolicProxy) -> SymbolicProxy:
    """Return the number of rows of a proxy."""
    return tracer.create_proxy("call_method", "size", (rows, 0), {})


def _run(index: slice) -> Offset | None:
    """Return the end of the run that a slice takes: from one cumulative count to the next."""
    start, stop = _offset(index.start), _offset(index.stop)
    if stop is None or index.step is not None:
        return None
    if start is None:
        return stop if stop.index == 1 and index.start in (None, 0) else None
    return stop if start.index == stop.index - 1 and start.counts.node is stop.counts.node else None


def _offset(value: Any) -> Offset | None:
    """Return the offset that a value is, also where it is an element of cat((zeros(1), cumsum(counts, 0)))."""
    if isinstance(value, Offset):
        return value
    node = value.node if isinstance(value, SymbolicProxy) else None
    if node is None or _called(node) != "getitem" or type(node.args[1]) is not int:
        return None
    whole = node.args[0]
    if not isinstance(whole, Node) or _called(whole) not in ("cat", "concat") or len(whole.args[0]) != 2:
        return None
    zero, ends = whole.args[0]
    if _called(zero) != "zeros" or zero.args != (1,) or _called(ends) != "cumsum":
        return None
    counts = SymbolicProxy(ends.args[0], value.tracer)
    counts.install_metadata(value.tracer.examples_of[ends.args[0]])
    return Offset(counts, node.args[1])


def unrolled(tracer: SymbolicTracer, proxy: Any) -> Iterator[UnrolledIndex | RunLength] | None:
    """Return the elements that a loop over `proxy` runs over, if these are the classes that a one_hot counts at all,
    or counts of rows, as many for all inputs."""
    known = getattr(proxy, "_metadata", None)
    if isinstance(known, torch.Tensor) and known.dim() == 1 and not known.is_floating_point():
        count = int(constant(tracer.create_proxy("call_method", "size", (proxy, 0), {})))
        return iter([RunLength(proxy, i) for i in range(count)])
    node: Node = proxy.node
    while _called(node) == "getitem" and node.args[1] == slice(None):
        node = node.args[0]
    if node.target is not torch.stack or len(node.args[0]) != 1:
        return None
    picked = node.args[0][0].args[0]  # stack((getitem(selected(mask), 0),))
    if picked.target is not selected:
        return None
    compared = picked.args[0]
    if _called(compared) not in ("gt", "greater", "ne", "not_equal") or compared.args[1] != 0:
        return None
    counted = compared.args[0]
    if _called(counted) not in ("sum", "any"):
        return None
    one_hot = _one_hot_of(counted.args[0], _REORDERED)
    counted_once = expectation((_shape(proxy) or (0,))[0])  # of how many elements
    if one_hot is None or counted_once is None or counted_once[0] != _classes(one_hot):
        return None
    return iter([UnrolledIndex(i) for i in range(_occurring(one_hot, tracer))])


def _selected(tracer: SymbolicTracer, mask: SymbolicProxy) -> SymbolicProxy:
    if mask.tracer.values and (count := known_value((mask != 0).sum())) is not None:
        places = tracer.create_proxy("call_function", torch.nonzero_static, (mask,), {"size": count})
        return tracer.create_proxy("call_method", "unbind", (places, -1), {})
    if (before := selected_before(tracer, mask.node)) is not None:
        return before
    one_hot = _one_hot_of(mask.node, _PART)
    share = 1 if one_hot is None else _occurring(one_hot, tracer)
    return tracer.create_proxy("call_function", selected, (mask, _number(tracer, 1), share), {})


def _number(tracer: SymbolicTracer, count: int) -> int:
    """Return the first of `count` numbers that no other call has."""
    tracer.data_dependent_calls += count
    return tracer.data_dependent_calls - count


def _one_hot_of(node: Any, through: tuple[str, ...]) -> Node | None:
    """Return the one_hot of a known number of classes that `node` is a part of."""
    while isinstance(node, Node):
        if node.target is F.one_hot:
            return node if isinstance(_classes(node), int) else None
        if _called(node) not in through:
            return None
        node = node.args[0]
    return None


def _classes(one_hot: Node) -> Any:
    return one_hot.kwargs.get("num_classes", one_hot.args[1] if len(one_hot.args) > 1 else None)


def _occurring(one_hot: Node, tracer: SymbolicTracer) -> int:
    """Return how many of the classes there can be any of: transformers 5 has one more, for experts of other ranks."""
    found = value_range(one_hot.args[0] if one_hot.args else one_hot.kwargs["tensor"], tracer)
    return _classes(one_hot) if found is None else int(min(found[1] + 1, _classes(one_hot)))


def _called(node: Node) -> str:
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")


def _dims(indices: SymbolicProxy) -> range:
    return range(len(indices._metadata))


def _shape(proxy: Any) -> tuple[int, ...] | None:
    known = getattr(proxy, "_metadata", None) if isinstance(proxy, SymbolicProxy) else None
    return tuple(known.shape) if isinstance(known, torch.Tensor) else None


def _one_split_of(pieces: Any) -> Node | None:
    """Return what split rows into runs that `pieces`, one for each, are computed from in order; None for anything
    else."""
    split = None
    for i, piece in enumerate(pieces):
        node: Any = piece.node if isinstance(piece, SymbolicProxy) else None
        while isinstance(node, Node) and not (_called(node) == "getitem" and _is_split(node.args[0])):
            node = node.args[0] if node.args else None
        if not isinstance(node, Node) or node.args[1] != i or (split is not None and node.args[0] is not split):
            return None
        split = node.args[0]
        rows = piece_length((_shape(piece.tracer.whole_of_split[split]) or (0,))[0], split.args[3] + i, len(pieces))
        if split.args[2] != len(pieces) or (_shape(piece) or (0,))[0] != rows:
            return None  # something else than all runs, row for row
    return split


def _is_split(node: Any) -> bool:
    return isinstance(node, Node) and node.target is split_rows


def _has_unrolled(index: Any) -> bool:
    return isinstance(index, UnrolledIndex) or (
        isinstance(index, tuple) and any(isinstance(i, UnrolledIndex) for i in index)
    )


def _as_index(index: Any) -> Any:
    """Return what an index tensor [1] is in an index: by itself it picks what a slice does; beside other index
    tensors it is broadcast."""
    if isinstance(index, UnrolledIndex):
        return slice(index.index, index.index + 1)
    return tuple([i.index] if isinstance(i, UnrolledIndex) else i for i in index)
