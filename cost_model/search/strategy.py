"""Strategies, the ways to shard an op, and the result of the tensor-parallel search."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cost_model.graph.op_graph import Op, TensorRef, TensorSpec
from cost_model.graph.placement import Placement
from cost_model.rules.losses import EXCHANGED
from cost_model.search.elimination import Elimination, Table

INFEASIBLE = np.inf


@dataclass(frozen=True, slots=True)
class Strategy:
    """A way to run one op on the tp axis: the placements of its inputs and outputs.

    `gather[j]`: a collective also makes output j whole on every rank, by all_reduce of a P, all_gather of an S.
    """

    factor: str  # the sharded factor of the op's rule, "" for none
    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]
    gather: tuple[bool, ...]


def form(strategy: Strategy) -> tuple[object, ...]:
    """Returns a key under which strategies are equal if they differ only in the rank that owns tensors."""
    kinds = tuple(p.kind if p.is_owned else p for p in (*strategy.inputs, *strategy.outputs))
    return strategy.factor, kinds, strategy.gather


def whole_strategy(strategies: Sequence[Strategy]) -> int | None:
    """Returns the index of the strategy whose inputs and outputs are all whole; None without any."""
    whole = (k for k, s in enumerate(strategies) if all(p.is_replicate for p in (*s.inputs, *s.outputs)))
    return next(whole, None)


def exchanged_bytes(op: Op, strategy: Strategy, spec: Callable[[TensorRef], TensorSpec], tp: int) -> int:
    """Returns the bytes of all ranks' numbers that each has to have before it can compute its part of an op
    (rules/losses.py), where `spec` gives whole tensors; 0 for most ops."""
    if not strategy.factor or EXCHANGED.get(op.kind) != strategy.factor:
        return 0
    whole = spec(op.inputs[0])
    return tp * whole.nbytes // whole.shape[strategy.inputs[0].dim]


@dataclass(frozen=True, slots=True)
class TensorParallelResult:
    """The chosen strategy of every op, and the optimum's cost in seconds (price of memory included).

    `elimination` knows what other choices from the `domains` would cost.
    """

    strategies: Mapping[str, Strategy]
    cost: float
    domains: Mapping[str, Sequence[Strategy]]
    elimination: Elimination
    variable: Mapping[str, str]  # op -> the op whose variable, and choice, it shares: itself, but for alike experts
    # Seconds of agreement (TensorParallelSearch.agreement), over all ops of a variable together.
    reading: Mapping[str, Table]  # [choices]: with ops that have no choice
    pairs: Mapping[tuple[str, str], Table]  # [choices of one, choices of the other]: between two variables
