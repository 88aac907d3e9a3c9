"""Predicts the bytes that a rank holds at the worst moment of a forward: liveness over ops in execution order, and the
workspace of the op that needs most.

A tensor lives from the op that makes it to the last op that reads it, itself or through a view; then its memory is free
again, as it is under reference counting once the emitted graph deletes it. Allocators round up and fragment; no
constant for that is added here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from math import prod

from cost_model.costs.compute import VIEWS, bytes_inside_experts
from cost_model.graph.op_graph import SOURCES, Op, TensorRef, TensorSpec
from cost_model.graph.placement import Placement

CACHE_KIND = "cache_update"


def peak_live_bytes(order: Sequence[str], produces: Mapping[str, int], last_use: Mapping[str, int]) -> int:
    """Returns the largest sum of living bytes over the steps of `order`.

    `produces[name]` bytes are allocated at the step of `name` (0 where it is not listed). They are freed after step
    `last_use[name]`, a position in `order`; after their own step where it is not listed or lies before it. What an op
    reads lives while it runs, so inputs and outputs of one op count together.
    """
    freed_after: list[int] = [0] * len(order)
    live = peak = 0
    for step, name in enumerate(order):
        nbytes = produces.get(name, 0)
        live += nbytes
        peak = max(peak, live)
        freed_after[min(max(step, last_use.get(name, step)), len(order) - 1)] += nbytes
        live -= freed_after[step]
    return peak


def last_uses(
    order: Sequence[str], reads: Mapping[str, Iterable[str]], views: Collection[str], kept: Iterable[str] = ()
) -> dict[str, int]:
    """Returns, for each name, the position in `order` of the last op that reads it, itself or through `views` of it.

    `reads[name]` are the ops whose outputs `name` reads; `kept` live to the end (what the stage returns or sends last).
    """
    last: dict[str, int] = {}
    end = len(order) - 1
    for name in kept:
        last[name] = end
    # Backwards, so that a view's own last use is known when it is handed on to what it is a view of.
    for step in range(end, -1, -1):
        name = order[step]
        until = max(step, last.get(name, step)) if name in views else step
        for source in reads.get(name, ()):
            last[source] = max(last.get(source, -1), until)
    return last


def peak_activation_bytes(
    ops: Sequence[Op],
    nbytes: Callable[[TensorRef], int],
    kept: Iterable[TensorRef] = (),
    received: Iterable[TensorRef] = (),
) -> int:
    """Returns the peak bytes of a stage's activations. Parameters, inputs, and the KV cache are counted elsewhere.

    `ops` in execution order; `nbytes(ref)` of one output as one rank holds it (its whole copy too, where the plan
    gathers it); `kept` live to the end; `received` come from other stages and live from the start.
    """
    arrived = list(dict.fromkeys(ref.op for ref in received))
    order = arrived + [op.name for op in ops]
    produces: dict[str, int] = {}
    for ref in set(received):
        produces[ref.op] = produces.get(ref.op, 0) + nbytes(ref)
    views: set[str] = set()
    reads: dict[str, set[str]] = {}
    for op in ops:
        reads[op.name] = {ref.op for ref in op.inputs}
        if op.kind in VIEWS:
            views.add(op.name)
        elif op.kind not in SOURCES and op.kind != CACHE_KIND:  # its outputs are the cache
            produces[op.name] = sum(nbytes(TensorRef(op.name, j)) for j in range(len(op.outputs)))
    return peak_live_bytes(order, produces, last_uses(order, reads, views, (ref.op for ref in kept)))


def kv_cache_bytes(ops: Iterable[Op], nbytes: Callable[[TensorRef], int]) -> int:
    """Returns the bytes of the KV cache that `ops` keep on one rank: all keys and values of their cache updates."""
    return sum(nbytes(TensorRef(op.name, j)) for op in ops if op.kind == CACHE_KIND for j in range(len(op.outputs)))


def workspace_bytes(op: Op, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> int:
    """Returns the bytes that `op`, on tensors of these (local) shapes, needs beside inputs and outputs while it runs.

    cache_update  the keys (or values) so far, until the longer ones are made: the larger of its outputs
    sdpa          the log-sum-exp of every query and head, float32 (FlashAttention-2, Dao 2023, section 3.1): 4 * b*h*s
    experts       each pair of row and expert: the row, gate and up, what is inside, and what the expert makes of it
    otherwise     0: what libraries take once and keep (cuBLAS' workspace, NCCL's buffers) is not counted
    """
    if op.kind == CACHE_KIND:
        return max((spec.nbytes for spec in outputs), default=0)
    if op.kind == "sdpa" and inputs:
        return 4 * prod(inputs[0].shape[:-1])
    if op.kind == "experts":
        return round(bytes_inside_experts(op, inputs))
    return 0


def collective_workspace_bytes(placement: Placement, whole_bytes: int, local_bytes: int, ranks: int) -> int:
    """Returns the bytes beside a collective's input and output, as the runtime's communicators run it.

    all_reduce (of a P): the sum beside the summands. all_gather (of an S): every rank's shard, as long as the longest,
    before they are glued. An upper bound: large sums are made in place, and large shards arrive in pieces.
    """
    return whole_bytes if placement.is_partial else ranks * local_bytes
