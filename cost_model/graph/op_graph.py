"""The op graph, the model in the cost model's words: a networkx DAG of ops on tensors of known shapes, without torch.

Graph inputs, parameters and buffers are ops too ("input", "param", "buffer"), so that a weight's placement is a choice
of the search like any other, and a tied weight is one op with two users.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import networkx as nx

from cost_model.graph.symbols import length

SOURCES = ("input", "param", "buffer")
DTYPE_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint8": 1, "bool": 1, "complex64": 8, "complex128": 16, "float8_e4m3fn": 1, "float8_e5m2": 1,
}  # fmt: skip


# Tuples, as placements are: a large model has millions of them hashed and compared, which for tuples is done in C.
class TensorSpec(NamedTuple):
    """A tensor's shape at the example sizes, its dtype, and the size symbol of each dim.

    A symbol is "B", "S", "B*16", ... (`cost_model.graph.symbols`), or "" for a constant dim. `symbols` has one entry
    for each dim, or none where all dims are constant.
    """

    shape: tuple[int, ...]
    dtype: str
    symbols: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Number of elements at the example sizes."""
        n = 1
        for s in self.shape:
            n *= s
        return n

    @property
    def nbytes(self) -> int:
        """Bytes at the example sizes; 4 an element for a dtype that DTYPE_BYTES lacks."""
        return self.numel * DTYPE_BYTES.get(self.dtype, 4)

    def is_dynamic(self, dim: int) -> bool:
        """True if the dim has a size symbol: its length follows the model's inputs, or values."""
        return bool(self.symbols) and bool(self.symbols[dim])

    def at(self, sizes: Mapping[str, int]) -> TensorSpec:
        """Returns the spec at other sizes, by symbol; a dim with a symbol that `sizes` lacks keeps its example."""
        if not any(self.symbols):
            return self
        shape = tuple(length(sym, n, sizes) if sym else n for n, sym in zip(self.shape, self.symbols, strict=True))
        return TensorSpec(shape, self.dtype, self.symbols)


class TensorRef(NamedTuple):
    """A reference to one tensor: output `index` of op `op`."""

    op: str
    index: int = 0  # type: ignore[assignment]  # hides tuple.index


@dataclass(frozen=True, slots=True)
class Op:
    """An op. `kind` names a row of the table of rules; `attrs` are its plain arguments (dims, sizes, flags)."""

    name: str
    kind: str
    inputs: tuple[TensorRef, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    attrs: Mapping[str, Any] = field(default_factory=dict)
    module: str = ""  # qualified path of the module that ran it, e.g. "model.layers.0.self_attn"
    source: str = ""  # the user's line, e.g. "modeling_x.py:241"
    mutates: bool = False  # has side effects (writes a cache or buffer, draws random numbers): run once, never moved
    numbers: tuple[str, ...] = ()  # names of ops whose results, Python numbers and no tensors, this op reads

    def __str__(self) -> str:
        shapes = ", ".join(f"{o.dtype}{list(o.shape)}" for o in self.outputs)
        return f"{self.kind} ({self.name}, {shapes or 'no tensor'}{', ' + self.source if self.source else ''})"


@dataclass(frozen=True, slots=True)
class FusedChain:
    """A chain that is one op in the emitted graph, because the op that reads the last of `ops` does their work: they
    cost nothing, and it reads their inputs in their place.

    `scaled` is the op that multiplies a tensor by a number of its own (a norm's), in `ops` or right behind. Where that
    is cut along `dim`, over which the number is taken, collectives come to stand in the chain, and all of it runs.
    """

    ops: tuple[str, ...]
    scaled: str = ""
    dim: int = -1


class OpGraph:
    """Ops in execution order over a `networkx.DiGraph` whose edges are data dependencies (attribute `refs`).

    `chains`: those that the emitted graph will have as one op; `fused`: the ops that it will not have for that.
    Raises ValueError when two ops share a name, or when an op reads one that does not stand before it.
    """

    def __init__(self, ops: list[Op], outputs: list[TensorRef], chains: Collection[FusedChain] = ()) -> None:
        self.ops: dict[str, Op] = {}
        self.graph: nx.DiGraph[str] = nx.DiGraph()
        self.users: dict[TensorRef, list[tuple[str, int]]] = {}  # tensor -> (op, input slot) of each of its readers
        self.number_users: dict[str, list[str]] = {}
        self.outputs = tuple(outputs)
        self.fused = frozenset(name for chain in chains for name in chain.ops)
        self.chains = {chain.scaled: chain for chain in chains if chain.scaled}  # by the op that can break them
        for op in ops:
            if op.name in self.ops:
                raise ValueError(f"two ops named {op.name}")
            self.ops[op.name] = op
            self.graph.add_node(op.name)
            for slot, ref in enumerate(op.inputs):
                if ref.op not in self.ops:
                    raise ValueError(f"{op.name} uses {ref.op} before it is defined")
                self.graph.add_edge(ref.op, op.name)
                self.users.setdefault(ref, []).append((op.name, slot))
            for number in op.numbers:
                self.number_users.setdefault(number, []).append(op.name)

    def __iter__(self) -> Iterator[Op]:
        return iter(self.ops.values())

    def __len__(self) -> int:
        return len(self.ops)

    def __getitem__(self, name: str) -> Op:
        return self.ops[name]

    @cached_property
    def state(self) -> dict[str, tuple[str, ...]]:
        """Maps each buffer that an op writes to all its readers and writers, in execution order; one stage keeps it."""
        written = {
            ref.op for op in self if op.mutates for ref in op.inputs if self.ops[ref.op].kind == "buffer"
        }
        return {name: tuple(dict.fromkeys(user for user, _ in self.users[TensorRef(name)])) for name in written}

    @cached_property
    def from_weights(self) -> frozenset[str]:
        """The names of the parameters, and of the ops downstream of one."""
        found: set[str] = set()
        for op in self:
            if op.kind == "param" or any(ref.op in found for ref in op.inputs):
                found.add(op.name)
        return frozenset(found)

    def spec(self, ref: TensorRef) -> TensorSpec:
        """Returns the spec of one tensor. Raises KeyError or IndexError where the graph has no such tensor."""
        return self.ops[ref.op].outputs[ref.index]

    def input_specs(self, op: Op) -> tuple[TensorSpec, ...]:
        """Returns the specs of the op's inputs, in the order of their slots."""
        return tuple(self.spec(ref) for ref in op.inputs)


def is_norm(graph: OpGraph, op: Op) -> bool:
    """Returns whether an op is the last of a chain that fuse_ops makes a norm of: it scales
    what the others normalize."""
    return op.kind == "mul" and any(ref.op in graph.fused for ref in op.inputs)
