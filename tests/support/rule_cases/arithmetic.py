"""Cases of elementwise ops, products, norms, reductions and scans."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from hypothesis import strategies as st
from torch.nn import functional as F

from passes.ops.experts import PARTS, Gate, experts
from passes.ops.losses import cross_entropy_part
from passes.ops.random import random_state, seeded_dropout
from tests.support.rule_cases.case import (
    Case,
    CaseMaker,
    Cases,
    Outputs,
    Share,
    broadcast_to_same,
    dims,
    picked,
    shapes,
    values,
)

CASES = case = Cases()

# -- elementwise -------------------------------------------------------------------------------------------------------

UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "neg": torch.neg, "scale": lambda x: x * 2.5, "identity": lambda x: x,
    "to": lambda x: x.to(torch.float32), "abs": torch.abs, "exp": torch.exp, "log": torch.log, "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt, "reciprocal": torch.reciprocal, "cos": torch.cos, "sin": torch.sin, "tanh": torch.tanh,
    "sigmoid": torch.sigmoid, "silu": F.silu, "gelu": F.gelu, "relu": F.relu, "erf": torch.erf, "softplus": F.softplus,
    "clamp": lambda x: x.clamp(0.5, 1.5), "square": torch.square, "pow": lambda x: x**3, "leaky_relu": F.leaky_relu,
    "elu": F.elu, "mish": F.mish, "hardtanh": F.hardtanh, "floor": torch.floor, "round": torch.round,
    "sign": torch.sign, "log1p": torch.log1p, "expm1": torch.expm1, "isnan": torch.isnan, "isinf": torch.isinf,
    "relu6": F.relu6, "log_sigmoid": F.logsigmoid, "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid,
    "nan_to_num": torch.nan_to_num, "ceil": torch.ceil, "trunc": torch.trunc,
    "logical_not": lambda x: torch.logical_not(x > 1),
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
        bias = x[2] if has_bias and not (share.factor == "row" and share.rank > 0) else None
        return F.linear(x[0], x[1].t() if transposed else x[1], bias)

    return Case((values(*batch, i), weight, *bias), run, {"transposed": transposed})


@case("matmul")
def _matmul(data: st.DataObject) -> Case:
    batches = broadcast_to_same(data, 2) if data.draw(st.booleans()) else [[], []]
    if data.draw(st.booleans()):
        batches.reverse()
    m, k, n = (data.draw(dims) for _ in range(3))
    return Case((values(*batches[0], m, k), values(*batches[1], k, n)), lambda x, share: torch.matmul(x[0], x[1]))


@case("dropout")
def _dropout(data: st.DataObject) -> Case:
    """Cuts a row's elements, or whole rows; the cut is said in runs of one element."""
    shape = tuple(data.draw(shapes))
    row = (data.draw(st.integers(0, len(shape) - 1)), 1, 1)

    def run(x: Sequence[torch.Tensor], share: Share) -> torch.Tensor:
        own = [(dim, places.tolist()) for (slot, dim), places in share.ins.items() if slot == 0]
        cut = next(((dim, shape[dim], [(place, place + 1) for place in places]) for dim, places in own), None)
        return seeded_dropout(x[0], x[1], 7, 0.5, len(shape), row, cut)

    return Case((values(*shape), random_state(1, 2)), run, {"p": 0.5, "drawn": len(shape)})


@case("experts")
def _experts(data: st.DataObject) -> Case:
    rows, hidden, inner, count = (data.draw(dims) for _ in range(4))
    chosen, parts = data.draw(st.integers(1, count)), data.draw(st.sampled_from(PARTS))
    transposed, biased = data.draw(st.booleans()), data.draw(st.booleans())
    gate: Gate = (("silu", "up"),) if parts == "one" else (("silu", "gate"), ("mul", "%0", "up"))
    index = torch.stack([torch.randperm(count)[:chosen] for _ in range(rows)])
    width = inner if parts == "one" else 2 * inner
    up, down = values(count, width, hidden), values(count, hidden, inner)
    weights = (up.mT, down.mT) if transposed else (up, down)
    biases = (values(count, width), values(count, hidden)) if biased else ()

    def run(x: Sequence[torch.Tensor], share: Share) -> torch.Tensor:
        own = share.ins.get((3, 0))
        held = None if own is None else [(e, e + 1) for e in own.tolist()]
        up_bias, down_bias = x[5:] if biased else (None, None)
        if share.factor == "inner" and share.rank > 0:
            down_bias = None  # added once: rank 0's
        return experts(x[0], x[1], x[2], x[3], x[4], up_bias, down_bias, gate, parts, transposed, count, held)

    attrs = {"gate": gate, "parts": parts, "transposed": transposed, "experts": count}
    return Case((values(rows, hidden), index, values(rows, chosen), *weights, *biases), run, attrs)


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
        keys, vals = (picked(x[i], share, head, each, i) for i in (1, 2))
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


@case("cross_entropy")
def _cross_entropy(data: st.DataObject) -> Case:
    rows, classes, more = data.draw(dims), data.draw(dims), data.draw(st.lists(dims, max_size=1))
    scores, target = values(rows, classes, *more), torch.randint(0, classes, (rows, *more))
    target.view(-1)[1::2] = -100  # one at least counts
    settings = {
        "ignore_index": -100,
        "reduction": data.draw(st.sampled_from(["none", "sum", "mean"])),
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.2])),
    }

    def run(x: Sequence[torch.Tensor], share: Share) -> torch.Tensor:
        own = share.ins.get((0, 1))
        if own is None:
            return F.cross_entropy(x[0], x[1], **settings)
        cut = classes, [(c, c + 1) for c in own.tolist()]
        return cross_entropy_part(x[0], x[1], scores.logsumexp(1), cut, **settings)

    return Case((scores, target), run, settings)


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
        functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "softmax": lambda x: x.softmax(dim), "log_softmax": lambda x: x.log_softmax(dim),
            "cumsum": lambda x: x.cumsum(dim), "flip": lambda x: x.flip((dim,)), "roll": lambda x: x.roll(1, dim),
        }  # fmt: skip
        linear = kind in ("cumsum", "flip", "roll")
        return Case((values(*shape),), lambda x, share: functions[kind](x[0]), {"dims": (dim,), "linear": linear})

    return make


CASES.update({kind: _along(kind) for kind in ("softmax", "log_softmax", "cumsum", "flip", "roll")})

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


# Half of the draws are of the two that add up over ranks.
CASES["reduce"] = _reduce([*REDUCTIONS, *ONE_DIM_REDUCTIONS, *("sum", "mean") * 6])
