"""Every op rule is proven by running the op on real shards, gluing the results and comparing with the whole op.

For each kind there is a case: torch code for the op, and a strategy that draws shapes and attributes. A rule's letter
is tried with any dealing of its elements to ranks, uneven, empty and out of order, since that is what a rule claims:
that the op falls apart along the letter. Float64 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_cases import IMAGE_CASES
from torch.nn import functional as F

from cost_model.graph.op_graph import Op, TensorSpec
from cost_model.rules.rule import DimLink, Letter, OpRule
from cost_model.rules.table import RULES, RuleTable
from passes.ops.data_dependent import join_rows, split_rows

Outputs = tuple[torch.Tensor, ...]


@dataclass
class Share:
    """What a rank has of the op: for each cut dim of each tensor, the elements it holds, ascending."""

    rank: int = 0
    ins: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    outs: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    out_shapes: tuple[tuple[int, ...], ...] = ()
    letter: str = ""


@dataclass
class Case:
    """Inputs, attributes, and the op itself on a share of them (sizes that stand in its arguments are the share's)."""

    inputs: tuple[torch.Tensor, ...]
    run: Callable[[Sequence[torch.Tensor], Share], torch.Tensor | Outputs]
    attrs: dict[str, Any] = field(default_factory=dict)

    def __call__(self, inputs: Sequence[torch.Tensor], share: Share) -> Outputs:
        out = self.run(inputs, share)
        return out if isinstance(out, tuple) else (out,)


CASES: dict[str, Callable[[st.DataObject], Case]] = {}
CaseMaker = Callable[[st.DataObject], Case]


def case(*kinds: str) -> Callable[[CaseMaker], CaseMaker]:
    def register(maker: CaseMaker) -> CaseMaker:
        for kind in kinds:
            CASES[kind] = maker
        return maker

    return register


# -- drawing -----------------------------------------------------------------------------------------------------------

dims = st.integers(1, 5)
shapes = st.lists(dims, min_size=1, max_size=4)


def values(*shape: int) -> torch.Tensor:
    """Positive, away from 0 and from each other's multiples: fit for log and division, and sorted in one way only."""
    return torch.rand(*shape, dtype=torch.float64) * 2 + 0.1


def broadcast_to_same(data: st.DataObject, count: int) -> list[list[int]]:
    """`count` shapes that broadcast against each other: dims of 1, and leading dims left out; the first is whole."""
    whole = data.draw(shapes)
    found = [whole]
    for _ in range(count - 1):
        start = data.draw(st.integers(0, len(whole) - 1))
        found.append([n if data.draw(st.booleans()) else 1 for n in whole[start:]])
    return found


# -- elementwise -------------------------------------------------------------------------------------------------------

UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "neg": torch.neg, "scale": lambda x: x * 2.5, "identity": lambda x: x, "clone": torch.clone,
    "to": lambda x: x.to(torch.float32), "abs": torch.abs, "exp": torch.exp, "log": torch.log, "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt, "reciprocal": torch.reciprocal, "cos": torch.cos, "sin": torch.sin, "tanh": torch.tanh,
    "sigmoid": torch.sigmoid, "silu": F.silu, "gelu": F.gelu, "relu": F.relu, "erf": torch.erf, "softplus": F.softplus,
    "clamp": lambda x: x.clamp(0.5, 1.5), "square": torch.square, "pow": lambda x: x**3, "leaky_relu": F.leaky_relu,
    "elu": F.elu, "mish": F.mish, "hardtanh": F.hardtanh, "floor": torch.floor, "round": torch.round,
    "dropout": lambda x: F.dropout(x, 0.5, training=False), "softcap": lambda x: 3 * torch.tanh(x / 3),
    "sign": torch.sign, "log1p": torch.log1p, "expm1": torch.expm1, "isnan": torch.isnan, "isinf": torch.isinf,
    "relu6": F.relu6, "log_sigmoid": F.logsigmoid, "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "nan_to_num": torch.nan_to_num, "ceil": torch.ceil,
    "trunc": torch.trunc, "fill": lambda x: torch.full_like(x, 7.0), "logical_not": lambda x: torch.logical_not(x > 1),
    "bitwise_not": lambda x: torch.bitwise_not((x * 10).long()),
}  # fmt: skip
NARY: dict[str, tuple[int, Callable[..., torch.Tensor]]] = {
    "add": (2, torch.add), "sub": (2, torch.sub), "mul": (2, torch.mul), "div": (2, torch.div),
    "maximum": (2, torch.maximum), "minimum": (2, torch.minimum), "floordiv": (2, torch.floor_divide),
    "mod": (2, torch.remainder), "atan2": (2, torch.atan2), "lerp": (3, torch.lerp), "addcmul": (3, torch.addcmul),
    "eq": (2, torch.eq), "ne": (2, torch.ne), "lt": (2, torch.lt), "le": (2, torch.le), "gt": (2, torch.gt),
    "ge": (2, torch.ge), "and": (2, lambda a, b: (a > 1) & (b > 1)), "or": (2, lambda a, b: (a > 1) | (b > 1)),
    "xor": (2, lambda a, b: (a > 1) ^ (b > 1)), "where": (3, lambda a, b, c: torch.where(a > 1, b, c)),
    "masked_fill": (2, lambda a, b: a.masked_fill(b > 1, -9.0)), "type_as": (2, lambda a, b: a.type_as(b.float())),
}  # fmt: skip


def _unary(kind: str) -> CaseMaker:
    return lambda data: Case((values(*data.draw(shapes)),), lambda x, share: UNARY[kind](x[0]))


def _nary(kind: str) -> CaseMaker:
    count, function = NARY[kind]
    return lambda data: Case(
        tuple(values(*shape) for shape in broadcast_to_same(data, count)), lambda x, share: function(*x)
    )


CASES.update({kind: _unary(kind) for kind in UNARY})
CASES.update({kind: _nary(kind) for kind in NARY})


# -- products ----------------------------------------------------------------------------------------------------------


@case("linear")
def _linear(data: st.DataObject) -> Case:
    batch, i, o = data.draw(st.lists(dims, max_size=2)), data.draw(dims), data.draw(dims)
    transposed, has_bias = data.draw(st.booleans()), data.draw(st.booleans())
    weight = values(i, o) if transposed else values(o, i)
    bias = (values(o),) if has_bias else ()

    def run(x: Sequence[torch.Tensor], share: Share) -> torch.Tensor:
        # a row-parallel linear's bias is added once: rank 0's
        bias = x[2] if has_bias and not (share.letter == "row" and share.rank > 0) else None
        return F.linear(x[0], x[1].t() if transposed else x[1], bias)

    return Case((values(*batch, i), weight, *bias), run, {"transposed": transposed})


@case("matmul")
def _matmul(data: st.DataObject) -> Case:
    batches = broadcast_to_same(data, 2) if data.draw(st.booleans()) else [[], []]
    if data.draw(st.booleans()):
        batches.reverse()
    m, k, n = (data.draw(dims) for _ in range(3))
    return Case((values(*batches[0], m, k), values(*batches[1], k, n)), lambda x, share: torch.matmul(x[0], x[1]))


def _picked(x: torch.Tensor, share: Share, head: int, each: int, slot: int, query_slot: int = 0) -> torch.Tensor:
    """The KV heads that the rank's query heads read, one for each query head, out of those that it holds."""
    if (query_slot, head) not in share.ins and (0, head) not in share.outs:
        return x.repeat_interleave(each, head)
    queries = share.ins.get((query_slot, head), share.outs.get((0, head))) if slot else share.outs[0, head]
    held = share.ins.get((slot, head), torch.arange(x.shape[head]))
    return x.index_select(head, torch.searchsorted(held, queries // each))


@case("sdpa")
def _sdpa(data: st.DataObject) -> Case:
    b, g, each, s, t, d, e = (data.draw(st.integers(1, 3)) for _ in range(7))
    h = g * each
    lead = [b] if data.draw(st.booleans()) else []
    head = len(lead)
    q, k, v = values(*lead, h, s, d), values(*lead, g, t, d), values(*lead, g, t, e)
    form = data.draw(st.sampled_from(["none", "[s,t]", "[1,s,t]", "[h,s,t]"]))
    mask = {"none": (), "[s,t]": (s, t), "[1,s,t]": (1, s, t), "[h,s,t]": (h, s, t)}[form]
    if len(mask) == 3 and lead and data.draw(st.booleans()):
        mask = (b, *mask)
    masks = (values(*mask),) if mask else ()

    def run(x: Sequence[torch.Tensor], share: Share) -> torch.Tensor:
        keys, vals = (_picked(x[i], share, head, each, i) for i in (1, 2))
        return F.scaled_dot_product_attention(x[0], keys, vals, attn_mask=x[3] if masks else None)

    return Case((q, k, v, *masks), run)


@case("embedding")
def _embedding(data: st.DataObject) -> Case:
    rows, width = data.draw(st.integers(1, 8)), data.draw(dims)
    ids = torch.randint(0, rows, data.draw(shapes))

    def run(x: Sequence[torch.Tensor], share: Share) -> torch.Tensor:
        held = share.ins.get((1, 0), torch.arange(rows))
        found = torch.zeros(*x[0].shape, x[1].shape[1], dtype=x[1].dtype)
        for place, row in enumerate(held.tolist()):  # rows of other ranks are zero: they are owed
            found[x[0] == row] = x[1][place]
        return found

    return Case((ids, values(rows, width)), run)


# -- norms, reductions, scans ------------------------------------------------------------------------------------------


@case("layer_norm", "rms_norm")
def _norm(data: st.DataObject) -> Case:
    shape = data.draw(shapes)
    count = data.draw(st.integers(1, len(shape)))
    width = shape[-count:]
    function = data.draw(st.sampled_from([F.layer_norm, F.rms_norm]))
    return Case(
        (values(*shape), values(*width)), lambda x, share: function(x[0], width, x[1]), {"normalized": count}
    )


def _along(kind: str) -> CaseMaker:
    def make(data: st.DataObject) -> Case:
        shape = data.draw(shapes)
        dim = data.draw(st.integers(-len(shape), len(shape) - 1))
        given = (dim,)
        if kind == "tril_triu":
            shape = [*shape, 3]
            given = (-2, -1)
        functions: dict[str, Callable[[torch.Tensor], torch.Tensor | Outputs]] = {
            "softmax": lambda x: x.softmax(dim), "log_softmax": lambda x: x.log_softmax(dim),
            "cumsum": lambda x: x.cumsum(dim), "flip": lambda x: x.flip((dim,)), "roll": lambda x: x.roll(1, dim),
            "sort": lambda x: tuple(x.sort(dim)), "topk": lambda x: tuple(x.topk(1, dim)),
            "tril_triu": lambda x: x.tril() + x.triu(1) * 2,
        }  # fmt: skip
        linear = kind in ("cumsum", "flip", "roll", "tril_triu")
        return Case((values(*shape),), lambda x, share: functions[kind](x[0]), {"dims": given, "linear": linear})

    return make


CASES.update({
    kind: _along(kind) for kind in ("softmax", "log_softmax", "cumsum", "flip", "roll", "sort", "topk", "tril_triu")
})  # fmt: skip

REDUCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "sum": torch.sum, "mean": torch.mean, "amax": torch.amax, "amin": torch.amin, "var": torch.var, "std": torch.std,
    "logsumexp": torch.logsumexp, "any": lambda x, d, keepdim: torch.any(x > 1, d, keepdim=keepdim),
    "all": lambda x, d, keepdim: torch.all(x > 0.5, d, keepdim=keepdim),
    "norm": lambda x, d, keepdim: torch.linalg.vector_norm(x, 2, d, keepdim=keepdim),
}  # fmt: skip
ONE_DIM_REDUCTIONS: dict[str, Callable[..., torch.Tensor | Outputs]] = {
    "prod": torch.prod, "argmax": torch.argmax, "argmin": torch.argmin,
    "max": lambda x, d, keepdim: tuple(torch.max(x, d, keepdim=keepdim)),
}  # fmt: skip


def _reduce(names: Sequence[str]) -> CaseMaker:
    def make(data: st.DataObject) -> Case:
        name, keep = data.draw(st.sampled_from(names)), data.draw(st.booleans())
        shape = [max(n, 2) for n in data.draw(shapes)]  # the variance of one number is none
        many = st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True)
        chosen = data.draw(many)[: None if name in REDUCTIONS else 1]
        signed = tuple(d - len(shape) if data.draw(st.booleans()) else d for d in chosen)
        count = math.prod(shape[d] for d in chosen)

        def run(x: Sequence[torch.Tensor], share: Share) -> torch.Tensor | Outputs:
            if name == "mean":  # the number of all elements, wherever they are
                return x[0].sum(signed, keepdim=keep) / count
            if name in REDUCTIONS:
                return REDUCTIONS[name](x[0], signed, keepdim=keep)
            return ONE_DIM_REDUCTIONS[name](x[0], signed[0], keepdim=keep)

        return Case((values(*shape),), run, {"op": name, "dims": signed, "keepdim": keep})

    return make


CASES.update({"sum": _reduce(["sum"]), "mean": _reduce(["mean"])})
CASES["reduce"] = _reduce([*REDUCTIONS, *ONE_DIM_REDUCTIONS])


# -- views and movement ------------------------------------------------------------------------------------------------


@case("permute")
def _permute(data: st.DataObject) -> Case:
    shape = data.draw(shapes)
    kept = [d for d in range(len(shape)) if not (shape[d] == 1 and data.draw(st.booleans()))]  # others: squeezed
    order = data.draw(st.permutations(kept))
    for _ in range(data.draw(st.integers(0, 2))):
        order.insert(data.draw(st.integers(0, len(order))), -1)  # unsqueezed

    def run(x: Sequence[torch.Tensor], share: Share) -> torch.Tensor:
        gone = [d for d in range(len(shape)) if d not in order]
        out = x[0].permute(*[d for d in order if d >= 0], *gone)
        for _ in gone:
            out = out.squeeze(-1)
        for place, d in enumerate(order):
            out = out.unsqueeze(place) if d < 0 else out
        return out

    return Case((values(*shape),), run, {"order": tuple(order)})


@case("expand")
def _expand(data: st.DataObject) -> Case:
    target, source = broadcast_to_same(data, 2)
    return Case((values(*source),), lambda x, share: x[0].broadcast_to((*share.out_shapes, target)[0]))


@case("view")
def _view(data: st.DataObject) -> Case:
    """Runs of factors, each kept as it is, split or merged or both; and ones anywhere."""
    source: list[int] = []
    target: list[int] = []
    for _ in range(data.draw(st.integers(1, 3))):
        factors = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
        form = data.draw(st.sampled_from(["same", "split", "merge", "mixed"]))
        whole = [math.prod(factors)]
        source += whole if form == "split" else factors
        target += {"same": factors, "split": factors, "merge": whole, "mixed": factors[::-1]}[form]
    return Case((values(*source),), lambda x, share: x[0].reshape((*share.out_shapes, target)[0]))


@case("slice")
def _slice(data: st.DataObject) -> Case:
    shape = data.draw(shapes)
    index: list[Any] = []
    kept: list[tuple[int, int, int, int]] = []
    for d, n in enumerate(shape):
        if data.draw(st.integers(0, 3)) == 0:
            index.append(None)
        form = data.draw(st.sampled_from(["whole", "range", "step", "number"]))
        start = data.draw(st.integers(0, n - 1))
        stop = data.draw(st.integers(start + 1, n))
        step = 2 if form == "step" else 1
        if form == "number":
            index.append(start)
            continue
        item = slice(None) if form == "whole" else slice(start, stop, step)
        kept.append((d, len([i for i in index if not isinstance(i, int)]), item.start or 0, step))
        index.append(item)

    def run(x: Sequence[torch.Tensor], share: Share) -> torch.Tensor:
        local, d = [], 0
        for item in index:
            if isinstance(item, slice) and item.start is not None and (0, d) in share.ins:
                held = share.ins[0, d]
                taken = torch.arange(shape[d])[item]
                item = torch.nonzero(torch.isin(held, taken))[:, 0]
            local.append(item)
            d += item is not None
        return x[0][tuple(local)]

    return Case((values(*shape),), run, {"dims": tuple(kept)})


def _with_dim(data: st.DataObject) -> tuple[list[int], int]:
    shape = data.draw(shapes)
    return shape, data.draw(st.integers(0, len(shape) - 1))


@case("split")
def _split(data: st.DataObject) -> Case:
    shape, dim = _with_dim(data)
    pieces = data.draw(st.lists(dims, min_size=1, max_size=4))
    shape[dim] = sum(pieces)

    def run(x: Sequence[torch.Tensor], share: Share) -> Outputs:
        return torch.split(x[0], [s[dim] for s in share.out_shapes] or pieces, dim)

    return Case((values(*shape),), run, {"dim": dim})


@case("cat")
def _cat(data: st.DataObject) -> Case:
    shape, dim = _with_dim(data)
    lengths = data.draw(st.lists(dims, min_size=1, max_size=4))
    inputs = tuple(values(*shape[:dim], n, *shape[dim + 1 :]) for n in lengths)

    def run(x: Sequence[torch.Tensor], share: Share) -> torch.Tensor:
        return torch.cat(list(x), dim)

    return Case(inputs, run, {"dim": dim})


@case("unbind")
def _unbind(data: st.DataObject) -> Case:
    shape, dim = _with_dim(data)
    return Case((values(*shape),), lambda x, share: tuple(x[0].unbind(dim)), {"dim": dim})


@case("stack")
def _stack(data: st.DataObject) -> Case:
    shape, dim = _with_dim(data)
    inputs = tuple(values(*shape) for _ in range(data.draw(st.integers(1, 3))))
    dim += data.draw(st.integers(0, 1))
    return Case(inputs, lambda x, share: torch.stack(list(x), dim), {"dim": dim})


@case("repeat_interleave")
def _repeat_interleave(data: st.DataObject) -> Case:
    shape, dim = _with_dim(data)
    each = data.draw(st.integers(1, 4))

    def run(x: Sequence[torch.Tensor], share: Share) -> torch.Tensor:
        if (0, dim) not in share.outs:
            return x[0].repeat_interleave(each, dim)
        return _picked(x[0], share, dim, each, slot=0)

    return Case((values(*shape),), run, {"dim": dim, "repeats": each})


@case("index")
def _index(data: st.DataObject) -> Case:
    """One or two index tensors among whole dims and new ones: together they stand in place, apart in front."""
    shape, form = data.draw(st.lists(dims, min_size=3, max_size=3)), data.draw(st.sampled_from("abcdef"))
    rows = data.draw(dims)
    at = [torch.randint(0, n, (rows,)) for n in shape]
    index, kept = {
        "a": ((0,), [(1, 1), (2, 2)]), "b": ((None, 0), [(1, 2), (2, 3)]), "c": ((0, 1, None), [(2, 2)]),
        "d": ((":", 1), [(0, 0), (2, 2)]), "e": ((0, ":", 2), [(1, 1)]), "f": ((":", 1, 2), [(0, 0)]),
    }[form]  # fmt: skip
    used = [i for i in index if isinstance(i, int)]

    def run(x: Sequence[torch.Tensor], share: Share) -> torch.Tensor:
        tensors = iter(x[1:])
        return x[0][tuple(slice(None) if i == ":" else None if i is None else next(tensors) for i in index)]

    return Case((values(*shape), *(at[i] for i in used)), run, {"dims": tuple(kept)})


@case("index_add")
def _index_add(data: st.DataObject) -> Case:
    shape, dim = _with_dim(data)
    index = torch.randint(0, shape[dim], (data.draw(dims),))
    source = values(*shape[:dim], len(index), *shape[dim + 1 :])
    return Case((values(*shape), index, source), lambda x, share: x[0].index_add(dim, x[1], x[2]), {"dim": dim})


@case("index_put")
def _index_put(data: st.DataObject) -> Case:
    shape, dim = _with_dim(data)
    index = torch.randperm(shape[dim])[: data.draw(st.integers(1, shape[dim]))]
    source = values(*shape[:dim], len(index), *shape[dim + 1 :])
    return Case((values(*shape), index, source), lambda x, share: x[0].index_copy(dim, x[1], x[2]), {"dim": dim})


def _places(data: st.DataObject, shape: list[int], dim: int) -> torch.Tensor:
    """An index for gather or scatter: no place twice along `dim`, other dims as long as they are or shorter."""
    cut = [n if data.draw(st.booleans()) else data.draw(st.integers(1, n)) for n in shape]
    return torch.rand(shape).argsort(dim)[tuple(slice(n) for n in cut)]


@case("gather")
def _gather(data: st.DataObject) -> Case:
    shape, dim = _with_dim(data)
    return Case((values(*shape), _places(data, shape, dim)), lambda x, share: x[0].gather(dim, x[1]), {"dim": dim})


@case("scatter")
def _scatter(data: st.DataObject) -> Case:
    shape, dim = _with_dim(data)
    index, form = _places(data, shape, dim), data.draw(st.sampled_from(["number", "write", "add"]))
    source = () if form == "number" else (values(*index.shape),)

    def run(x: Sequence[torch.Tensor], share: Share) -> torch.Tensor:
        if form == "number":
            return x[0].scatter(dim, x[1], 3.0)
        return (x[0].scatter if form == "write" else x[0].scatter_add)(dim, x[1], x[2])

    return Case((values(*shape), index, *source), run, {"dim": dim, "adds": form == "add"})


@case("split_rows")
def _split_rows(data: st.DataObject) -> Case:
    shape = data.draw(shapes)
    counts = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4)))
    return Case((values(int(counts.sum()), *shape), counts), lambda x, share: split_rows(x[0], x[1], len(counts), 0))


@case("join_rows")
def _join_rows(data: st.DataObject) -> Case:
    shape, counts = data.draw(shapes), data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    pieces = tuple(values(n, *shape) for n in counts)
    return Case((*pieces, torch.tensor(counts)), lambda x, share: join_rows(x[:-1], sum(counts), x[-1]))


@case("cache_update")
def _cache_update(data: st.DataObject) -> Case:
    b, g, s, d, e, past = (data.draw(st.integers(1, 3)) for _ in range(6))
    before = values(b, g, past, d), values(b, g, past, e)

    def run(x: Sequence[torch.Tensor], share: Share) -> Outputs:
        heads = share.ins.get((0, 1), torch.arange(g))
        return tuple(torch.cat([old.index_select(1, heads), new], 2) for old, new in zip(before, x))

    return Case((values(b, g, s, d), values(b, g, s, e)), run, {"layer": 0})


@case("cache_read")
def _cache_read(data: st.DataObject) -> Case:
    b, g, t, d, e = (data.draw(st.integers(1, 3)) for _ in range(5))
    keys, held_values = values(b, g, t, d), values(b, g, t, e)

    def run(x: Sequence[torch.Tensor], share: Share) -> Outputs:
        heads = share.outs.get((0, 1), torch.arange(g))  # of the cache that the rank filled
        return keys.index_select(1, heads), held_values.index_select(1, heads)

    return Case((), run, {"layer": 0})


# -- the proof ---------------------------------------------------------------------------------------------------------


# -- images (image_cases.py) -------------------------------------------------------------------------------------------


def _of_images(kind: str) -> CaseMaker:
    return lambda data: Case(*IMAGE_CASES[kind](data))


CASES.update({kind: _of_images(kind) for kind in IMAGE_CASES})


def rule_of(kind: str, made: Case, outputs: Outputs) -> OpRule:
    """By way of the table that the searches use, which also shows that the attributes can be hashed."""

    def specs(tensors: Sequence[torch.Tensor]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in tensors)

    return RuleTable()(Op("op", kind, (), specs(outputs), made.attrs), specs(made.inputs))


def elements_of(link: DimLink, held: np.ndarray, size: int, ranks: int, rank: int) -> torch.Tensor:
    """Elements of the link's dim that go with the letter's elements `held`. What belongs to none of them (the rest of
    a sliced dim) may lie anywhere: it is dealt out in turns."""
    if link.pairs is None:
        return torch.from_numpy(held)
    own, letter = link.pairs
    if not link.cover:
        assert len(np.unique(own)) == len(own), "an element of this dim belongs to two of the letter's"
    mine = np.unique(own[np.isin(letter, held)])
    rest = np.setdiff1d(np.arange(size), own)
    return torch.from_numpy(np.sort(np.concatenate([mine, rest[rest % ranks == rank]])))


def shares_of(made: Case, outputs: Outputs, letter: Letter, owner: np.ndarray, ranks: int) -> list[Share]:
    found = []
    for rank in range(ranks):
        held = np.flatnonzero(owner == rank)
        share = Share(rank, letter=letter.name)
        for links, tensors, own in ((letter.inputs, made.inputs, share.ins), (letter.outputs, outputs, share.outs)):
            for link in links:
                size = tensors[link.slot].shape[link.dim]
                if link.pairs is None:
                    assert size == letter.size, f"dim {link.dim} of tensor {link.slot} is not of the letter's size"
                own[link.slot, link.dim] = elements_of(link, held, size, ranks, rank)
        cut = [list(t.shape) for t in outputs]
        for (slot, dim), elements in share.outs.items():
            cut[slot][dim] = len(elements)
        share.out_shapes = tuple(tuple(s) for s in cut)
        found.append(share)
    return found


def local_inputs(made: Case, share: Share) -> list[torch.Tensor]:
    local = list(made.inputs)
    for (slot, dim), elements in share.ins.items():
        local[slot] = local[slot].index_select(dim, elements)
    return local


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def check_letter(made: Case, outputs: Outputs, letter: Letter, owner: np.ndarray, ranks: int) -> None:
    shares = shares_of(made, outputs, letter, owner, ranks)
    results = [made(local_inputs(made, share), share) for share in shares]
    linked = {link.slot: link.dim for link in letter.outputs}
    for slot, expected in enumerate(outputs):
        parts = [result[slot] for result in results]
        if slot in linked:
            dim, glued = linked[slot], torch.zeros_like(expected)
            filled = torch.zeros(expected.shape[dim], dtype=torch.long)
            for share, part in zip(shares, parts):
                elements = share.outs[slot, dim]
                assert part.shape[dim] == len(elements)
                glued.index_copy_(dim, elements, part)
                filled[elements] += 1
            assert (filled == 1).all(), "an output element is made by no rank, or by two"
            assert_equal(glued, expected)
        elif letter.reduces:
            assert_equal(torch.stack(parts).sum(0), expected)
        else:
            pytest.fail(f"letter {letter.name} says nothing of output {slot}")


@pytest.mark.filterwarnings("ignore:std.. degrees of freedom")  # a rank without elements
@pytest.mark.parametrize("kind", CASES)
@settings(max_examples=30)
@given(data=st.data())
def test_every_letter_falls_apart(kind: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 9)))
    made = CASES[kind](data)
    outputs = made(made.inputs, Share())
    ranks = data.draw(st.integers(2, 4))
    for letter in rule_of(kind, made, outputs).letters:
        deal = st.lists(st.integers(0, ranks - 1), min_size=letter.size, max_size=letter.size)
        check_letter(made, outputs, letter, np.array(data.draw(deal), dtype=np.int64), ranks)


@pytest.mark.parametrize("kind", CASES)
@settings(max_examples=15)
@given(data=st.data())
def test_sums_over_ranks_go_through_what_is_linear(kind: str, data: st.DataObject) -> None:
    """`linear_in` names inputs which, when all are sums still owed, leave the outputs as sums still owed."""
    torch.manual_seed(data.draw(st.integers(0, 9)))
    made = CASES[kind](data)
    outputs = made(made.inputs, Share())
    for slots in rule_of(kind, made, outputs).linear_in:
        first = [torch.randn_like(x) if i in slots else x for i, x in enumerate(made.inputs)]
        second = [x - a if i in slots else x for i, (x, a) in enumerate(zip(made.inputs, first))]
        for a, b, expected in zip(made(first, Share()), made(second, Share()), outputs):
            torch.testing.assert_close(a + b, expected, rtol=1e-10, atol=1e-10)


def test_every_rule_has_a_case_and_every_case_a_rule() -> None:
    assert set(CASES) == set(RULES)


_GROUPS = {n: {"groups": n, "transposed": False} for n in (1, 2)}


# Rules that have nothing to say are proven by everything above: these say what must be there.
@pytest.mark.parametrize(
    "kind, inputs, outputs, attrs, letters",
    [
        ("linear", [(2, 3, 8), (6, 8), (6,)], [(2, 3, 6)], {"transposed": False}, {"d0", "d1", "column", "row"}),
        ("embedding", [(2, 3), (9, 4)], [(2, 3, 4)], {}, {"vocab", "hidden"}),
        ("sdpa", [(2, 6, 3, 8), (2, 2, 5, 8), (2, 2, 5, 8)], [(2, 6, 3, 8)], {}, {"heads"}),
        ("matmul", [(2, 3, 4), (2, 4, 5)], [(2, 3, 5)], {}, {"d0", "m", "n", "k"}),
        ("view", [(2, 3, 12)], [(2, 3, 4, 3)], {}, {"d0", "d1", "g2.0", "g2.1"}),
        ("view", [(2, 3, 4, 3)], [(2, 3, 12)], {}, {"d0", "d1", "g2.0", "g2.1"}),
        ("softmax", [(2, 3, 4)], [(2, 3, 4)], {"dims": (-1,)}, {"d0", "d1"}),
        ("reduce", [(2, 3)], [(2,)], {"op": "mean", "dims": (-1,), "keepdim": False}, {"d0", "sum1"}),
        ("reduce", [(2, 3)], [(2,)], {"op": "amax", "dims": (-1,), "keepdim": False}, {"d0"}),
        ("split", [(2, 9)], [(2, 3)] * 3, {"dim": 1}, {"d0", "split"}),
        ("cat", [(2, 3)] * 3, [(2, 9)], {"dim": 1}, {"d0", "cat"}),
        ("repeat_interleave", [(2, 3)], [(2, 6)], {"dim": 1, "repeats": 2}, {"d0", "repeat"}),
        ("slice", [(2, 9)], [(2, 3)], {"dims": ((0, 0, 0, 1), (1, 1, 3, 1))}, {"d0", "d1"}),
        ("slice", [(2, 9)], [(2, 5)], {"dims": ((0, 0, 0, 1), (1, 1, 0, 2))}, {"d0", "d1"}),
        ("index", [(5, 3), (4,)], [(4, 3)], {"dims": ((1, 1),)}, {"d1"}),
        ("index_add", [(5, 3), (4,), (4, 3)], [(5, 3)], {"dim": 0}, {"d1"}),
        ("index_put", [(5, 3), (4,), (4, 3)], [(5, 3)], {"dim": 0}, {"d1"}),
        ("gather", [(5, 3), (5, 2)], [(5, 2)], {"dim": 1}, {"d0"}),
        ("scatter", [(5, 3), (5, 2), (5, 2)], [(5, 3)], {"dim": 1, "adds": False}, {"d0"}),
        ("split_rows", [(5, 3), (2,)], [(1, 3), (4, 3)], {}, {"d1"}),
        ("join_rows", [(1, 3), (4, 3), (2,)], [(5, 3)], {}, {"d1"}),
        ("cache_update", [(2, 3, 4, 5)] * 2, [(2, 3, 9, 5)] * 2, {"layer": 0}, {"heads"}),
        ("layer_norm", [(2, 3, 4), (4,), (4,)], [(2, 3, 4)], {"normalized": 1}, {"d0", "d1"}),
        ("mul", [(2, 3), (3,)], [(2, 3)], {}, {"d0", "d1"}),
        ("expand", [(2, 1, 3)], [(2, 4, 3)], {}, {"d0", "d2"}),
        ("permute", [(2, 3, 4)], [(4, 1, 2, 3)], {"order": (2, -1, 0, 1)}, {"d0", "d2", "d3"}),
        ("stack", [(2, 3)] * 2, [(2, 2, 3)], {"dim": 1}, {"d0", "d1"}),
        ("unbind", [(2, 3)], [(3,)] * 2, {"dim": 0}, {"d1"}),
        ("conv", [(2, 6, 9, 9), (8, 6, 3, 3), (8,)], [(2, 8, 7, 7)], _GROUPS[1], {"d0", "column", "row"}),
        ("conv", [(2, 6, 9, 9), (8, 3, 3, 3)], [(2, 8, 7, 7)], _GROUPS[2], {"d0", "groups"}),
        ("batch_norm", [(2, 6, 9), (6,), (6,)], [(2, 6, 9)], {"statistics": True}, {"c", "d0", "d2"}),
        ("batch_norm", [(2, 6, 9)], [(2, 6, 9)], {"statistics": False}, {"c"}),
        ("group_norm", [(2, 6, 9), (6,), (6,)], [(2, 6, 9)], {"groups": 3}, {"d0", "groups"}),
        ("pool", [(2, 6, 9, 9)], [(2, 6, 1, 1)], {"spatial": 2, "linear": True}, {"d0", "d1"}),
        ("opaque.unknown", [(2, 3)], [(2, 3)], {}, set()),
    ],
)
def test_letters_that_must_be_there(
    kind: str,
    inputs: list[tuple[int, ...]],
    outputs: list[tuple[int, ...]],
    attrs: dict[str, Any],
    letters: set[str],
) -> None:
    op = Op("op", kind, (), tuple(TensorSpec(s, "float32") for s in outputs), attrs)
    rule = RuleTable()(op, tuple(TensorSpec(s, "float32") for s in inputs))
    assert {letter.name for letter in rule.letters} == letters


def test_no_letter_where_a_step_or_a_regrouping_mixes_elements() -> None:
    specs = TensorSpec((4, 6), "float32"), TensorSpec((6, 4), "float32")
    assert RuleTable()(Op("op", "view", (), (specs[1],)), (specs[0],)).letters == ()


def test_equal_ops_share_one_rule() -> None:
    """Layers repeat: the layouts are solved once only if the letters' arrays are the same objects."""
    table, spec = RuleTable(), TensorSpec((2, 12), "float32")
    ops = [Op(name, "view", (), (TensorSpec((2, 3, 4), "float32"),)) for name in "ab"]
    assert table(ops[0], (spec,)) is table(ops[1], (spec,))
