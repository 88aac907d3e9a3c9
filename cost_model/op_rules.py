"""One rule an op kind: which dims of its tensors correspond, hence which ways to shard it there are.

A rule lists *letters*, in the sense of an einsum. A letter is one coordinate that runs through some dims of the inputs
and outputs; sharding the op along it shards all of these together, and leaves an output that does not carry it either
impossible or, where the op sums over the letter, Partial. A dim that no letter names is never cut.

    linear        "... i, o i, o? -> ... o"      o: column parallel.  i: row parallel, output P
    softmax       "... !n -> ... n"              !: never cut
    sdpa          "b h q d, b g k d, b g k e, mask -> b h q e"     g follows h in whole groups
    embedding     "..., v d -> ... d"            v: each rank looks up its own rows, the rest is zero: output P

An op without a row is Replicate in and out: slower, never wrong. `tests/cost_model/test_op_rules.py` proves every row
by running it on real shards.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cost_model.op_graph import Op, TensorSpec

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class DimLink:
    """One dim of one tensor of the op, and how its elements belong to the letter's.

    `pairs` is two arrays (elements of the dim, elements of the letter) of equal length, or None for the identity.
    `cover` marks the dim of a tensor that is read through a repetition (the KV heads of grouped attention): where it
    has too few elements to be dealt out, a rank holds each element that its part of the letter reads, so that an
    element may live on several ranks.
    """

    slot: int
    dim: int
    pairs: tuple[IntArray, IntArray] | None = None
    cover: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Letter:
    """A shardable coordinate of `size` elements. `reduces`: outputs without it are sums over it.

    `alternatives` names a group of letters that use the same dim in different ways (the factors of a split view):
    only one of the group can be in force, and the outermost that no op blocks is taken.

    `filled`: every rank must have some element of it, since torch refuses an op on nothing.
    """

    name: str
    size: int
    inputs: tuple[DimLink, ...]
    outputs: tuple[DimLink, ...]
    reduces: bool = False
    alternatives: str = ""
    filled: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class OpRule:
    """All letters of one op, and which sets of inputs may be Partial together so that the outputs are Partial."""

    letters: tuple[Letter, ...] = ()
    linear_in: tuple[tuple[int, ...], ...] = ()


Shape = tuple[int, ...]
RuleFunction = Callable[[Sequence[Shape], Sequence[Shape], Mapping[str, Any]], OpRule]
RULES: dict[str, RuleFunction] = {}


def rule(*kinds: str) -> Callable[[RuleFunction], RuleFunction]:
    def register(function: RuleFunction) -> RuleFunction:
        for kind in kinds:
            RULES[kind] = function
        return function

    return register


class RuleTable:
    """Rules of ops, computed once per distinct (kind, shapes, attributes): the layers of a model share them."""

    def __init__(self) -> None:
        self._cache: dict[tuple[Any, ...], OpRule] = {}
        self._exact: dict[tuple[Any, ...], OpRule] = {}  # by lengths as they are: each op is asked for several times

    def __call__(self, op: Op, inputs: Sequence[TensorSpec]) -> OpRule:
        attributes = tuple(sorted(op.attrs.items()))
        exact = (op.kind, tuple(inputs), op.outputs, attributes)
        known = self._exact.get(exact)
        if known is None:
            known = self._exact[exact] = self._at_small_lengths(op, inputs, attributes)
        return known

    def _at_small_lengths(self, op: Op, inputs: Sequence[TensorSpec], attributes: tuple[Any, ...]) -> OpRule:
        shapes, outs = _with_small_lengths(tuple(inputs), op.outputs)
        key = (op.kind, shapes, outs, attributes)
        found = self._cache.get(key)
        if found is None:
            function = RULES.get(op.kind)
            found = OpRule() if function is None else function(shapes, outs, op.attrs)
            self._cache[key] = found
        return found


def _with_small_lengths(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> tuple[tuple[Shape, ...], tuple[Shape, ...]]:
    """The shapes, where a length that depends on values is a small prime that nothing else there has.

    Such lengths are never sharded, and their examples are huge and all different (each expert's rows): the rules of
    equal ops would not be shared, and their arrays would be as long.
    """
    specs = (*inputs, *outputs)
    follow = {n: symbol for s in specs for n, symbol in zip(s.shape, s.symbols, strict=False) if "?" in symbol}
    unknown = {n: 0 for n, symbol in follow.items() if "~" in symbol}
    if unknown:
        taken = {n for s in specs for n in s.shape}
        primes = (p for p in itertools.count(11, 2) if p not in taken and all(p % k for k in range(3, p, 2)))
        # viewed as [rows, an equal part for each]: the small length has such parts, too
        for n, prime in zip(sorted(unknown), primes):
            unknown[n] = prime * math.lcm(*(n // part for part in follow if _is_part(part, n)))

    def small(spec: TensorSpec) -> Shape:
        if not unknown or not spec.symbols:
            return spec.shape
        shape = []
        for n, symbol in zip(spec.shape, spec.symbols, strict=True):
            whole = next((u for u in unknown if n % u == 0), None) if "?" in symbol else None
            part = next((u for u in unknown if _is_part(n, u)), None) if "?" in symbol else None
            if whole is not None:
                n = n // whole * unknown[whole]
            elif part is not None:
                n = unknown[part] // (part // n)
            shape.append(n)
        return tuple(shape)

    return tuple(map(small, inputs)), tuple(map(small, outputs))


def _is_part(part: int, whole: int) -> bool:
    """Whether a made-up length is so many times another; they are huge, and the times no more than sequences."""
    return whole % part == 0 and whole <= 1024 * part


def _passing(in_slot: int, out_slot: int, shape: Shape, in_dim: int, out_dim: int, name: str = "") -> Letter:
    """A dim that goes through unchanged."""
    return Letter(name or f"d{out_dim}", shape[in_dim], (DimLink(in_slot, in_dim),), (DimLink(out_slot, out_dim),))


# --- elementwise -------------------------------------------------------------------------------------------------

_UNARY_LINEAR = ("neg", "scale", "identity", "clone")
_UNARY = (
    "to", "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "cos", "sin", "tanh", "sigmoid", "silu", "gelu", "relu",
    "erf", "softplus", "logical_not", "clamp", "square", "pow", "leaky_relu", "elu", "mish", "hardtanh", "floor",
    "round", "dropout", "softcap", "sign", "log1p", "expm1", "isnan", "isinf", "bitwise_not", "relu6", "log_sigmoid",
    "hardswish", "hardsigmoid", "quick_gelu", "nan_to_num", "ceil", "trunc", "fill",
)  # fmt: skip
_NARY = (
    "maximum", "minimum", "where", "masked_fill", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor",
    "floordiv", "mod", "atan2", "lerp", "addcmul", "type_as",
)  # fmt: skip


def _broadcast_letters(inputs: Sequence[Shape], out: Shape) -> tuple[Letter, ...]:
    letters = []
    for dim, size in enumerate(out):
        links = []
        for slot, shape in enumerate(inputs):
            own = dim - (len(out) - len(shape))
            if own >= 0 and shape[own] == size:
                links.append(DimLink(slot, own))
        if links:
            letters.append(Letter(f"d{dim}", size, tuple(links), (DimLink(0, dim),)))
    return tuple(letters)


@rule(*_NARY, *_UNARY)
def elementwise(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    linear: tuple[tuple[int, ...], ...] = ()
    return OpRule(_broadcast_letters(inputs, outputs[0]), linear)


@rule(*_UNARY_LINEAR)
def linear_unary(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    return OpRule(_broadcast_letters(inputs, outputs[0]), ((0,),))


@rule("mul")
def mul(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    # a sum of products with the same factor is the product with the sum
    return OpRule(_broadcast_letters(inputs, outputs[0]), ((0,), (1,)) if len(inputs) == 2 else ())


@rule("div")
def div(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    return OpRule(_broadcast_letters(inputs, outputs[0]), ((0,),) if len(inputs) == 2 else ())


@rule("add", "sub")
def add(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    # a + b is Partial only when both are: R + P would count R once per rank
    return OpRule(_broadcast_letters(inputs, outputs[0]), (tuple(range(len(inputs))),) if len(inputs) == 2 else ())


# --- products ----------------------------------------------------------------------------------------------------


@rule("linear")
def linear(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """x [..., i], weight [o, i] (or [i, o] with attr `transposed`), bias [o] -> [..., o]."""
    x, weight = inputs[0], inputs[1]
    o_dim, i_dim = (1, 0) if attrs.get("transposed") else (0, 1)
    last = len(x) - 1
    letters = [_passing(0, 0, x, d, d) for d in range(last)]
    bias = (DimLink(2, 0),) if len(inputs) > 2 else ()
    letters.append(Letter("column", weight[o_dim], (DimLink(1, o_dim), *bias), (DimLink(0, last),)))
    letters.append(Letter("row", weight[i_dim], (DimLink(0, last), DimLink(1, i_dim)), (), reduces=True))
    return OpRule(tuple(letters))


@rule("matmul")
def matmul(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """[..., m, k] @ [..., k, n], batch dims broadcast."""
    a, b, out = inputs[0], inputs[1], outputs[0]
    if len(a) < 2 or len(b) < 2:
        return OpRule()
    letters = []
    for dim in range(len(out) - 2):
        links = []
        for slot, shape in ((0, a), (1, b)):
            own = dim - (len(out) - len(shape))
            if own >= 0 and shape[own] == out[dim]:
                links.append(DimLink(slot, own))
        letters.append(Letter(f"d{dim}", out[dim], tuple(links), (DimLink(0, dim),)))
    letters.append(Letter("m", a[-2], (DimLink(0, len(a) - 2),), (DimLink(0, len(out) - 2),)))
    letters.append(Letter("n", b[-1], (DimLink(1, len(b) - 1),), (DimLink(0, len(out) - 1),)))
    letters.append(Letter("k", a[-1], (DimLink(0, len(a) - 1), DimLink(1, len(b) - 2)), (), reduces=True))
    return OpRule(tuple(letters))


def _repeat_pairs(groups: int, size: int) -> tuple[IntArray, IntArray]:
    letter = np.arange(size, dtype=np.int64)
    return letter // (size // groups), letter


@rule("sdpa")
def sdpa(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """q [b,h,s,d], k [b,g,t,d], v [b,g,t,e], mask broadcast to [b,h,s,t] -> [b,h,s,e]; only heads are cut."""
    q = inputs[0]
    head = len(q) - 3
    if head < 0:
        return OpRule()
    links = [DimLink(0, head)]
    for slot in (1, 2):
        groups = inputs[slot][head]
        if groups == q[head]:
            links.append(DimLink(slot, head))
        else:
            links.append(DimLink(slot, head, _repeat_pairs(groups, q[head]), cover=True))
    if len(inputs) > 3 and len(inputs[3]) >= 3 and inputs[3][-3] == q[head]:
        links.append(DimLink(3, len(inputs[3]) - 3))
    letters = [Letter("heads", q[head], tuple(links), (DimLink(0, head),))]
    return OpRule(tuple(letters))


@rule("embedding")
def embedding(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """ids [...], table [v, d] -> [..., d]."""
    table, last = inputs[1], len(outputs[0]) - 1
    return OpRule((
        Letter("vocab", table[0], (DimLink(1, 0),), (), reduces=True),
        Letter("hidden", table[1], (DimLink(1, 1),), (DimLink(0, last),)),
    ))  # fmt: skip


# --- norms, reductions, scans --------------------------------------------------------------------------------------


@rule("layer_norm", "rms_norm")
def layer_norm(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """The last `normalized` dims are normalised, never cut."""
    x = inputs[0]
    return OpRule(tuple(_passing(0, 0, x, d, d) for d in range(len(x) - int(attrs["normalized"]))))


@rule("softmax", "log_softmax", "cumsum", "sort", "flip", "roll", "topk", "tril_triu")
def along(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """Works along `dims`; every other dim goes through, in each output."""
    x = inputs[0]
    cut = {d % len(x) for d in attrs["dims"]}
    letters = []
    for d in range(len(x)):
        if d not in cut:
            letters.append(Letter(f"d{d}", x[d], (DimLink(0, d),), tuple(DimLink(j, d) for j in range(len(outputs)))))
    return OpRule(tuple(letters), ((0,),) if attrs.get("linear") else ())


@rule("sum", "mean", "reduce")
def reduce(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """Over `dims`. A sum (or mean) over a sharded dim leaves a Partial; other reductions ("reduce") don't add up."""
    x, keep = inputs[0], bool(attrs["keepdim"])
    dims = sorted(d % len(x) for d in attrs["dims"])
    adds_up = attrs["op"] in ("sum", "mean")
    letters = []
    for d in range(len(x)):
        if d in dims:
            if adds_up:
                letters.append(Letter(f"sum{d}", x[d], (DimLink(0, d),), (), reduces=True))
        else:
            out_dim = d if keep else d - sum(1 for c in dims if c < d)
            links = tuple(DimLink(j, out_dim) for j in range(len(outputs)))
            letters.append(Letter(f"d{d}", x[d], (DimLink(0, d),), links))
    return OpRule(tuple(letters), ((0,),) if adds_up else ())


# --- views and movement --------------------------------------------------------------------------------------------


@rule("permute")
def permute(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """Output dim j is input dim `order[j]`; -1 marks a new dim of size 1 (unsqueeze); missing dims were squeezed."""
    x = inputs[0]
    letters = [_passing(0, 0, x, d, j) for j, d in enumerate(attrs["order"]) if d >= 0]
    return OpRule(tuple(letters), ((0,),))


@rule("expand")
def expand(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    return OpRule(_broadcast_letters(inputs[:1], outputs[0]), ((0,),))


def view_groups(source: Shape, target: Shape) -> list[tuple[list[int], list[int]]]:
    """The finest pairs of (input dims, output dims) with equal products, left to right: [2,3,4] -> [6,4] gives
    ([0,1],[0]), ([2],[1]). Raises ValueError when the element counts differ."""
    if math.prod(source) != math.prod(target):
        raise ValueError(f"cannot view {list(source)} as {list(target)}")
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(source) and j < len(target):
        ins, outs = [i], [j]
        a, b = source[i], target[j]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a *= source[i]
                ins.append(i)
                i += 1
            else:
                b *= target[j]
                outs.append(j)
                j += 1
        groups.append((ins, outs))
    # what is left on one side are dims of size 1
    if groups:
        groups[-1][0].extend(range(i, len(source)))
        groups[-1][1].extend(range(j, len(target)))
    return groups


def _mixed_pairs(outer: int, n: int, inner: int) -> tuple[IntArray, IntArray]:
    elements = np.arange(outer * n * inner, dtype=np.int64)
    return elements, (elements // inner) % n


@rule("view")
def view(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """Computed from the shapes: each factor of a split dim, or each dim that merges, is a letter of its own."""
    source, target = inputs[0], outputs[0]
    if math.prod(source) == 0:
        return OpRule((), ((0,),))
    letters: list[Letter] = []
    for number, (ins, outs) in enumerate(view_groups(source, target)):
        if len(ins) == 1 and len(outs) == 1:
            letters.append(_passing(0, 0, source, ins[0], outs[0]))
        elif len(ins) == 1 or len(outs) == 1:
            split = len(ins) == 1  # one dim into many; else many into one
            one, many = (ins[0], outs) if split else (outs[0], ins)
            sizes = [(target if split else source)[d] for d in many]
            for k, d in enumerate(many):
                pairs = _mixed_pairs(math.prod(sizes[:k]), sizes[k], math.prod(sizes[k + 1 :]))
                mixed, plain = DimLink(0, one, pairs), DimLink(0, d)
                links = ((mixed,), (plain,)) if split else ((plain,), (mixed,))
                letters.append(Letter(f"g{number}.{k}", sizes[k], *links, alternatives=f"g{number}"))
    return OpRule(tuple(letters), ((0,),))


@rule("slice")
def slice_(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """Basic indexing. `dims` lists (input dim, output dim, start, step) of the dims that remain."""
    x, out = inputs[0], outputs[0]
    letters = []
    for in_dim, out_dim, start, step in attrs["dims"]:
        n = out[out_dim]
        if n == x[in_dim]:
            letters.append(_passing(0, 0, x, in_dim, out_dim))
        elif step > 0:
            own = np.arange(n, dtype=np.int64)
            link = DimLink(0, in_dim, (start + step * own, own))
            letters.append(Letter(f"d{out_dim}", n, (link,), (DimLink(0, out_dim),)))
    return OpRule(tuple(letters), ((0,),))


@rule("split")
def split(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """Along `dim` into consecutive pieces (split, chunk)."""
    x, dim = inputs[0], attrs["dim"]
    letters = []
    for d in range(len(x)):
        if d != dim:
            links = tuple(DimLink(j, d) for j in range(len(outputs)))
            letters.append(Letter(f"d{d}", x[d], (DimLink(0, d),), links))
            continue
        outs, start = [], 0
        for j, shape in enumerate(outputs):
            own = np.arange(shape[d], dtype=np.int64)
            outs.append(DimLink(j, d, (own, own + start)))
            start += shape[d]
        letters.append(Letter("split", x[d], (DimLink(0, d),), tuple(outs)))
    return OpRule(tuple(letters), ((0,),))


@rule("cat")
def cat(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    out, dim = outputs[0], attrs["dim"]
    letters = []
    for d in range(len(out)):
        if d != dim:
            links = tuple(DimLink(i, d) for i in range(len(inputs)))
            letters.append(Letter(f"d{d}", out[d], links, (DimLink(0, d),)))
            continue
        ins, start = [], 0
        for i, shape in enumerate(inputs):
            own = np.arange(shape[d], dtype=np.int64)
            ins.append(DimLink(i, d, (own, own + start)))
            start += shape[d]
        letters.append(Letter("cat", out[d], tuple(ins), (DimLink(0, d),)))
    return OpRule(tuple(letters), (tuple(range(len(inputs))),))


@rule("unbind")
def unbind(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    x, dim = inputs[0], attrs["dim"]
    letters = []
    for d in range(len(x)):
        if d != dim:
            links = tuple(DimLink(j, d - (d > dim)) for j in range(len(outputs)))
            letters.append(Letter(f"d{d}", x[d], (DimLink(0, d),), links))
    return OpRule(tuple(letters), ((0,),))


@rule("stack")
def stack(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    x, dim = inputs[0], attrs["dim"]
    letters = []
    for d in range(len(x)):
        links = tuple(DimLink(i, d) for i in range(len(inputs)))
        letters.append(Letter(f"d{d}", x[d], links, (DimLink(0, d + (d >= dim)),)))
    return OpRule(tuple(letters), (tuple(range(len(inputs))),))


@rule("repeat_interleave")
def repeat_interleave(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """Each element of `dim` `repeats` times in a row: what turns KV heads into query heads."""
    x, out, dim = inputs[0], outputs[0], attrs["dim"]
    letters = []
    for d in range(len(x)):
        if d != dim:
            letters.append(_passing(0, 0, x, d, d))
            continue
        link = DimLink(0, d, _repeat_pairs(x[d], out[d]), cover=True)
        letters.append(Letter("repeat", out[d], (link,), (DimLink(0, d),)))
    return OpRule(tuple(letters), ((0,),))


# --- the KV cache --------------------------------------------------------------------------------------------------


@rule("cache_update")
def cache_update(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """k [b,g,s,d], v [b,g,s,e] -> all keys [b,g,t,d], all values [b,g,t,e]; heads stay where they are."""
    k, v = inputs[0], inputs[1]
    if len(k) != 4 or len(v) != 4 or k[1] != v[1]:
        return OpRule()
    return OpRule((Letter("heads", k[1], (DimLink(0, 1), DimLink(1, 1)), (DimLink(0, 1), DimLink(1, 1))),))


@rule("cache_read")
def cache_read(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """Keys [b,g,t,d] and values [b,g,t,e] as an update has left them."""
    k, v = outputs
    if len(k) != 4 or len(v) != 4 or k[1] != v[1]:
        return OpRule()
    return OpRule((Letter("heads", k[1], (), (DimLink(0, 1), DimLink(1, 1))),))


from cost_model import op_rules_indexing  # noqa: E402, F401  registers its rules
