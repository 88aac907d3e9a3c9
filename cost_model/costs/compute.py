"""FLOPs and seconds of one op on one rank: a roofline (S. Williams et al., CACM 52(4), 2009) plus a fixed cost per op.

`seconds = max(FLOPs / peak, bytes / memory bandwidth) / utilisation + fixed cost`, from the shapes that the rank really
holds. A multiply and an add count as two FLOPs. Utilisation is 1 for a preset, and comes from tables for a machine that
was measured (costs/tables.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log, prod, sqrt

from cost_model.costs.hardware import Hardware
from cost_model.costs.tables import Bound, Sizes, Table
from cost_model.graph.op_graph import DTYPE_BYTES, SOURCES, Op, TensorSpec

# Kinds below are those of cost_model/rules. An op that no handler knows is "opaque.<torch's name>", and costs what that
# name costs; "scalar.<name>" makes a number from shapes, in Python.
# Ops that change shape, strides or metadata: nothing is computed or allocated. A view may copy, but seldom does.
VIEWS = frozenset({
    "view", "permute", "slice", "split", "unbind", "expand", "identity", "getitem", "reshape", "flatten",
    "unflatten", "transpose", "squeeze", "unsqueeze", "select", "narrow", "chunk", "detach", "diagonal", "view_as_real",
    "view_as_complex", "output",
})  # fmt: skip
# Ops that read the rows which integers name, never the whole table.
GATHERS = frozenset({"embedding", "gather", "index_select", "index", "take_along_dim"})
# Ops that move elements without arithmetic.
COPIES = frozenset({
    "cat", "stack", "clone", "contiguous", "to", "type_as", "repeat", "repeat_interleave", "roll", "flip", "pad",
    "tril_triu", "masked_fill", "where", "fill", "zeros", "ones", "full", "empty", "arange", "index_copy", "index_put",
    "scatter", "cache_update",
})  # fmt: skip
# Kind -> position of the left matrix among the inputs; the product sums over its last dim.
MATMULS = {"linear": 0, "conv1d": 0, "matmul": 0, "bmm": 0, "mm": 0, "dot": 0, "addmm": 1, "baddbmm": 1, "addbmm": 1}
# Kind -> FLOPs per element: exp, sum, subtract, divide and so on. Kinds that are not listed count one.
PER_ELEMENT = {
    "softmax": 5, "log_softmax": 5, "layer_norm": 8, "rms_norm": 5, "group_norm": 8, "batch_norm": 4, "gelu": 10,
    "silu": 5, "sigmoid": 4, "tanh": 5, "exp": 4, "cos": 4, "sin": 4, "rsqrt": 2, "pow": 2, "cross_entropy": 5,
    "dropout": 27, "seeded_uniform": 27,  # Philox: ten rounds of ten for four elements (passes/ops/random.py)
}  # fmt: skip
# Calls of torch that passes/ops/experts.py makes for each expert: rows, two products, halves, the activation.
_CALLS_PER_EXPERT = 7
SOFTMAX_FLOPS = PER_ELEMENT["softmax"]
# Kinds of measured tables, and what they are measured with (autodist_fx/measure).
PRODUCT, ATTENTION, GROUPED_ATTENTION, STREAM = "linear", "sdpa", "sdpa_gqa", "add"
HEAD_DIM, GQA_GROUP = 64, 4
_TRANSCENDENTAL = 4  # FLOPs per element from which on arithmetic shows
_BATCHED = ("matmul", "bmm", "baddbmm", "addbmm")  # a product for each of a batch, where the right side has one


def op_flops(op: Op, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> float:
    """Returns the FLOPs of `op` on tensors of these (local) shapes; 0.0 for sources, views, gathers and copies.

    linear        x [..., i], weight [o, i]                         2 * out * i
    conv1d        x [..., i], weight [i, o] (transformers' Conv1D, which is "linear" with attr `transposed`): the same
    matmul, bmm   a [..., m, k], b [..., k, n]                      2 * out * k;   addmm, baddbmm: after the bias
    conv          x [b, i, ...], weight [o, i/groups, ...]          2 * out * i/groups * the kernel's positions
    sdpa          q [b, h, s, d], k [b, g, t, d], v [b, g, t, e]    2 * b*h*s*t * (d + e), and a softmax
    experts       x [n, h], index [n, k], weights, up, down, ...    2 * n*k * share of experts * elements of one
    einsum        `attrs["equation"]`                               2 * the product of all its letters
    otherwise     a few per output element (PER_ELEMENT); a reduction one per input element
    """
    kind = _plain(op.kind)
    if kind in SOURCES or kind in VIEWS or kind in GATHERS or kind in COPIES or not outputs:
        return 0.0
    out = float(outputs[0].numel)
    if kind in MATMULS and len(inputs) > MATMULS[kind]:
        left = inputs[MATMULS[kind]].shape
        return 2.0 * out * (left[-1] if left else 1)
    if kind == "conv" and len(inputs) >= 2:  # every element of the larger side meets the weights of its channel
        side = inputs[0].numel if op.attrs["transposed"] else out
        return 2.0 * side * prod(inputs[1].shape[1:])
    if kind == "sdpa" and len(inputs) >= 3:
        q, k, v = (spec.shape for spec in inputs[:3])
        scores = prod(q[:-1]) * k[-2]  # b * h * s * t: every query head meets every key, grouped or not
        return float(scores * (2 * q[-1] + 2 * v[-1] + SOFTMAX_FLOPS))
    if kind == "experts":
        return 2.0 * rows_of_experts(op, inputs) * sum(prod(spec.shape[1:]) for spec in inputs[3:])
    if kind == "einsum":
        return _einsum_flops(op, inputs, out)
    elements = sum(o.numel for o in outputs)
    if inputs and elements < inputs[0].numel:  # sum, mean, argmax, ...: reads more than it writes
        elements = inputs[0].numel
    return float(elements * PER_ELEMENT.get(kind, 1))


def op_bytes(op: Op, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> float:
    """Returns the bytes that `op` reads and writes on tensors of these (local) shapes; 0.0 for sources and views."""
    kind = _plain(op.kind)
    if kind in SOURCES or kind in VIEWS:
        return 0.0
    written = sum(spec.nbytes for spec in outputs)
    if kind in GATHERS:  # rows, read and written, and their numbers
        return float(2 * written + sum(spec.nbytes for spec in inputs if "float" not in spec.dtype))
    if kind == "experts":  # each row comes and goes, with what is inside; experts without rows are not read
        weights = sum(spec.nbytes for spec in inputs[3:]) / max(1, inputs[3].shape[0])
        return bytes_inside_experts(op, inputs) + float(_experts_met(op, inputs) * weights + written)
    if kind == "cache_update":  # keys and values so far, which are no input of the op, are read and written again
        return float(2 * written)
    return float(written + sum(spec.nbytes for spec in inputs))


def op_seconds(op: Op, local_inputs: Sequence[TensorSpec], local_outputs: Sequence[TensorSpec], hw: Hardware) -> float:
    """Returns the seconds of `op` on one rank of `hw`. Sources cost nothing, views their dispatch."""
    if op.kind in SOURCES:
        return 0.0
    if _plain(op.kind) in VIEWS or op.kind.startswith("scalar."):
        return hw.view_seconds
    # The inputs' dtype, not the output's: a bfloat16 product that is written as float32 runs at bfloat16's rate.
    dtype = _compute_dtype(local_inputs, local_outputs)
    work = _work_seconds(op, local_inputs, local_outputs, dtype, hw)
    fixed = hw.fixed_seconds(measured_as(op, local_inputs), dtype)
    if op.kind == "experts":  # several for each expert that some row was sent to
        fixed *= _CALLS_PER_EXPERT * max(1.0, _experts_met(op, local_inputs))
    # Where the host dispatches the next op meanwhile, the longer of both counts.
    return max(work, fixed) if hw.dispatches_ahead else work + fixed


def measured_as(op: Op, inputs: Sequence[TensorSpec] = ()) -> tuple[str, ...]:
    """Returns the kinds of tables that an op's seconds are looked up in: its own, then those that stand for it."""
    kind = _plain(op.kind)
    if kind in MATMULS or kind in ("conv", "einsum", "experts"):
        return (PRODUCT,)
    if kind == ATTENTION:
        grouped = len(inputs) > 1 and inputs[0].shape[-3:-2] != inputs[1].shape[-3:-2]
        return (GROUPED_ATTENTION, ATTENTION) if grouped else (ATTENTION,)
    if kind in GATHERS:
        return (kind, "embedding", STREAM)
    if kind in COPIES:
        return (kind, "cat", STREAM)
    return (kind, "silu", STREAM) if PER_ELEMENT.get(kind, 1) >= _TRANSCENDENTAL else (kind, STREAM)


def table_bound(table: Table, hw: Hardware) -> Bound:
    """Returns the seconds that the peak rates of `hw` allow, by the sizes along the axes of a table of this kind.

    linear          (rows, inner, columns)
    sdpa, sdpa_gqa  (queries, keys, heads), heads of HEAD_DIM elements; GQA_GROUP query heads to one of the keys
    otherwise       (bytes read and written,)
    """
    kind, peak, bandwidth = table.kind, hw.flops_of(table.dtype), hw.memory_bandwidth
    element = DTYPE_BYTES.get(table.dtype, 4)

    def product(at: Sizes) -> float:
        m, k, n = at
        return max(2 * m * k * n / peak, element * (m * k + k * n + m * n) / bandwidth)

    def attention(at: Sizes) -> float:
        queries, keys, heads = at
        key_heads = heads / GQA_GROUP if kind == GROUPED_ATTENTION else heads
        flops = heads * queries * keys * (4 * HEAD_DIM + SOFTMAX_FLOPS)
        return max(flops / peak, 2 * element * HEAD_DIM * (heads * queries + key_heads * keys) / bandwidth)

    if kind == PRODUCT:
        return product
    return attention if kind in (ATTENTION, GROUPED_ATTENTION) else lambda at: at[0] / bandwidth


def _work_seconds(
    op: Op, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], dtype: str, hw: Hardware
) -> float:
    """Returns the seconds of an op without its fixed cost."""
    flops, nbytes = op_flops(op, inputs, outputs), op_bytes(op, inputs, outputs)
    bound = max(flops / hw.flops_of(dtype), nbytes / hw.memory_bandwidth)
    if hw.measured is None or not bound:
        return bound
    kinds, sizes = measured_as(op, inputs), _table_sizes(op, inputs, outputs, flops, nbytes)
    if len(sizes) == 1:  # an elementwise op's arithmetic is in its utilisation of the memory's bandwidth
        bound = nbytes / hw.memory_bandwidth
    return bound / hw.utilisation(kinds, dtype, sizes, lambda table: table_bound(table, hw))


def _table_sizes(
    op: Op, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], flops: float, nbytes: float
) -> Sizes:
    """Returns an op's sizes along the axes of its table (see `table_bound`)."""
    kind, out = _plain(op.kind), outputs[0].shape if outputs else ()
    if kind == ATTENTION:
        q, k = inputs[0].shape, inputs[1].shape
        return (q[-2], k[-2], prod(q[:-2]))
    if kind == "experts":
        rows = rows_of_experts(op, inputs) / max(1.0, _experts_met(op, inputs))
        return (max(1.0, rows), inputs[0].shape[-1], max(inputs[3].shape[1:]))
    if measured_as(op) != (PRODUCT,):
        return (max(1.0, nbytes),)
    batched = kind in _BATCHED and len(inputs) > 1 and len(inputs[-1].shape) > 2
    columns = out[-1] if out else 1
    rows = out[-2] if batched and len(out) > 1 else prod(out) / max(1, columns)
    return (max(1.0, rows), max(1.0, flops / 2 / max(1, prod(out))), max(1.0, columns))


def rows_of_experts(op: Op, inputs: Sequence[TensorSpec]) -> float:
    """Returns how many pairs of row and expert the busiest rank is expected to have, which holds as many experts.

    m pairs thrown into n ranks: the fullest has about m/n + sqrt(2 m/n ln n) (M. Raab, A. Steger, "Balls into bins - a
    simple and tight analysis", 1998).
    """
    pairs, ranks = float(inputs[1].numel), int(op.attrs["experts"]) / max(1, inputs[3].shape[0])
    return min(pairs, pairs / ranks + sqrt(2 * pairs / ranks * log(ranks)))


def bytes_inside_experts(op: Op, inputs: Sequence[TensorSpec]) -> float:
    """Returns the bytes of all pairs of row and expert on the busiest rank: the row, what `up` makes of it, what is
    inside, and what the expert makes of it."""
    hidden, up, down = inputs[0].shape[-1], inputs[3], inputs[4]
    inside = (prod(up.shape[1:]) + prod(down.shape[1:])) // max(1, hidden)
    return rows_of_experts(op, inputs) * (2 * hidden + inside) * DTYPE_BYTES.get(down.dtype, 4)


def _experts_met(op: Op, inputs: Sequence[TensorSpec]) -> float:
    """Returns how many of the experts in these inputs are expected to get a row, if each is as likely."""
    return float(inputs[3].shape[0] * (1 - (1 - 1 / int(op.attrs["experts"])) ** inputs[1].numel))


def _plain(kind: str) -> str:
    return kind.removeprefix("opaque.")


def _compute_dtype(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> str:
    """Returns the widest floating dtype among the inputs, else among the outputs; float32 where there is none."""
    for specs in (inputs, outputs):
        floats = [spec.dtype for spec in specs if "float" in spec.dtype]
        if floats:
            return max(floats, key=lambda dtype: DTYPE_BYTES.get(dtype, 4))
    return "float32"


def _einsum_flops(op: Op, inputs: Sequence[TensorSpec], out: float) -> float:
    """Returns 2 x the product of the lengths of all letters; `out`, one per output element, for no plain equation."""
    equation = str(op.attrs.get("equation", ""))
    terms = equation.split("->")[0].replace(" ", "").split(",")
    sizes: dict[str, int] = {}
    for term, spec in zip(terms, inputs):
        if len(term) != len(spec.shape) or not term.isalpha():  # an ellipsis, say
            return out
        sizes.update(zip(term, spec.shape))
    return 2.0 * prod(sizes.values()) if sizes else out
