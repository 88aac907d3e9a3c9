"""Tells what an op's backward pass costs, and which tensors autograd keeps for it, on one rank.

Work is told in multiples of the op's own forward pass: a product's gradients are products of the same size, one for
each factor. S. Narayanan et al., "Efficient large-scale language model training on GPU clusters using Megatron-LM", SC
2021, section 5.1, count a backward pass as twice a forward for the same reason; attention's five products for two are
T. Dao, "FlashAttention-2", 2023, section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cost_model.costs.compute import COPIES, MATMULS, VIEWS
from cost_model.graph.op_graph import Op, TensorRef

# Kinds of which autograd keeps what the op returned, and nothing that it read (torch's derivatives.yaml: `result`).
KEEPS_OUTPUT = frozenset({
    "softmax", "log_softmax", "exp", "expm1", "sqrt", "rsqrt", "tanh", "sigmoid", "relu", "reciprocal", "hardsigmoid",
})  # fmt: skip
_CONDITIONS = {"where": 0, "masked_fill": 1}  # kind -> the input that is a mask, which is all that is kept
# Kinds whose gradient depends on no value: linear ones, and copies.
KEEPS_NOTHING = frozenset({
    "add", "sub", "neg", "scale", "identity", "reduce", "cumsum", "output", "seeded_uniform", "floor", "round", "ceil",
    "trunc", "sign", "pool", "dropout", "cross_entropy",  # the last two keep what is no tensor of the graph
}) | VIEWS | (COPIES - _CONDITIONS.keys())  # fmt: skip
_PRODUCTS = frozenset(MATMULS) | {"mul", "div", "einsum", "conv"}
ATTENTION_PRODUCTS = 2.5  # of a backward pass, for each of the forward pass


@dataclass(frozen=True, slots=True)
class BackwardWork:
    """An op's backward pass, in multiples of its forward pass: the gradients of values, and those of parameters."""

    inputs: float
    weights: float


def backward_work(op: Op, needed: Sequence[bool], is_weight: Sequence[bool]) -> BackwardWork:
    """Returns the work of the gradients that an op's backward pass computes.

    `needed[i]`: input i has a gradient at all; `is_weight[i]`: it is a parameter.
    """
    kind = op.kind.removeprefix("opaque.")
    values = sum(n and not w for n, w in zip(needed, is_weight, strict=True))
    weights = sum(n and w for n, w in zip(needed, is_weight, strict=True))
    if kind == "sdpa":
        return BackwardWork(ATTENTION_PRODUCTS * bool(values), 0.0)
    if kind == "experts":  # the rows' gradient and those of both tensors of weights: each is as much as the forward
        return BackwardWork(1.0 * bool(values), 1.0 * bool(weights))
    if kind == "linear":  # a bias is a sum, far less than a product
        return BackwardWork(1.0 * bool(values), 1.0 * bool(weights))
    if kind in _PRODUCTS:
        return BackwardWork(float(values), float(weights))
    return BackwardWork(1.0 * bool(values), 1.0 * bool(weights))


def kept_tensors(op: Op, inputs: Sequence[TensorRef], needed: Sequence[bool]) -> list[TensorRef]:
    """Returns the tensors that autograd keeps from an op's forward pass to its backward pass.

    `inputs` are those that it really reads (of a fused op, what the ops read whose work it does); `needed` as above.
    Kept are: of a product, each factor whose other one has a gradient; the output of an op whose derivative is told by
    it; the condition of a choice; else every input. A parameter among them is there anyway.
    """
    kind = op.kind.removeprefix("opaque.")
    if not any(needed) or kind in KEEPS_NOTHING:
        return []
    if kind in _CONDITIONS:
        return list(inputs[_CONDITIONS[kind] : _CONDITIONS[kind] + 1])
    if len(inputs) != len(op.inputs):  # fused: rms_norm keeps what it normalizes, attention its q, k, v
        return [*inputs, *outputs_of(op)] if kind == "matmul" else list(inputs)
    if kind in KEEPS_OUTPUT:
        return outputs_of(op)
    if kind == "sdpa":
        return [*inputs, *outputs_of(op)[:1]]
    if kind == "div" and len(inputs) == 2:
        return list(inputs) if needed[1] else [inputs[1]]
    if kind in _PRODUCTS:
        slots = range(len(inputs))
        return [inputs[i] for i in slots if any(needed[j] for j in slots if j != i)]
    return list(inputs)


def outputs_of(op: Op) -> list[TensorRef]:
    """Returns an op's outputs."""
    return [TensorRef(op.name, j) for j in range(len(op.outputs))]
