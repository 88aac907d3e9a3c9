"""divide_rows: proves that a graph computes each row of a batch by itself, by following the rows through its ops.

Every tensor is found to be one of these, from what its op reads and the op's rule:

    the same for all rows     parameters, tables, inputs without a size "B", and what is made of these alone
    rows along a dim          element i of the dim, or block i of as many elements, belongs to row i of the batch, and
                              follows from row i of the inputs alone
    numbers of the rows       arange(rows): an index that takes row i's own elements, and good for nothing else
    mixed                     all else: sums over rows, ops whose rule has no such dim, ops without a rule

Where no output is mixed, parts of a batch may be run one by one. A graph is refused rather than guessed at: what is
missing here costs speed, never a right answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.fx
from torch.fx import Node

from cost_model.graph.op_graph import Op, OpGraph, TensorRef
from cost_model.rules.table import RuleTable, has_rule
from cost_model.rules.views import view_groups
from passes.fx import node_meta
from passes.fx.arguments import argument, tensor_source
from passes.fx.nodes import op_name
from passes.op_graph.following import front_of, index_tensors, is_link_of, named, size_of
from passes.op_graph.indexing import index_by_tensors, spelled_index
from passes.program.row_division import RowDivision

_ROWS = "B"  # the size symbol of a batch's rows
# Kinds whose numbers are sizes of what they make, which its size symbols tell.
_SIZED = frozenset({"view", "expand"})
_FILLS = frozenset({
    "zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full", "zeros_like", "ones_like",
    "empty_like", "full_like",
})  # fmt: skip
_FILL_VALUE = {"full": 1, "full_like": 1, "new_full": 2}  # the position of the number that fills
_PER_ROW = {"topk": 2, "sort": 1, "argsort": 1, "cummax": 1, "cummin": 1, "diff": 2}  # the position of their dim
_KEEPS_NUMBERS = frozenset({"view", "permute", "expand", "slice", "to", "identity"})  # of rows, as an index


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows along `dim`; with `numbers`, the values are the numbers of the rows."""

    dim: int
    numbers: bool = False


@dataclass(frozen=True, slots=True)
class _Mixed:
    """Something that is not known to be computed row by row, and why."""

    reason: str


_State = _Rows | _Mixed | None  # None: the same for all rows


def divide_rows(graph_module: torch.fx.GraphModule, graph: OpGraph) -> RowDivision:
    """Returns where a normalised graph has rows, or why they cannot be divided. `graph` is its op graph."""
    return _Follower(graph_module, graph).division()


class _Follower:
    """Follows rows through one graph."""

    def __init__(self, graph_module: torch.fx.GraphModule, graph: OpGraph) -> None:
        self._module, self._graph = graph_module, graph
        self._nodes: dict[str, Node] = {node.name: node for node in graph_module.graph.nodes}
        self._rules = RuleTable()
        self._states: dict[TensorRef, _State] = {}
        self._varies: set[str] = set()  # ops that give numbers which depend on rows, or on how many there are

    def division(self) -> RowDivision:
        inputs: dict[str, int] = {}
        for op in self._graph:
            if op.outputs:
                for index, state in enumerate(self._followed(op)):
                    self._states[TensorRef(op.name, index)] = state
            elif self._number_varies(op):
                self._varies.add(op.name)
            if op.kind == "input" and op.outputs:
                state = self._states[TensorRef(op.name)]
                if isinstance(state, _Rows):
                    inputs[str(self._nodes[op.name].target)] = state.dim
        if not inputs:
            return RowDivision(reason="no input has rows")
        return self._of_outputs(inputs)

    def _of_outputs(self, inputs: dict[str, int]) -> RowDivision:
        found: dict[str, int] = {}
        is_cached = False
        for op in self._graph:  # what is kept counts as what is given
            states = [self._states[TensorRef(op.name, j)] for j in range(len(op.outputs))]
            mixed = next((state for state in states if isinstance(state, _Mixed)), None)
            if op.mutates and mixed is not None:
                return RowDivision(reason=mixed.reason)
            is_cached = is_cached or (op.kind == "cache_update" and bool(states))
        output = next(node for node in reversed(self._module.graph.nodes) if node.op == "output")
        for name, value in output.args[0].items():
            state = self._state_of(value) if isinstance(value, Node) else None
            if isinstance(state, _Rows) and not state.numbers:
                found[name] = state.dim
            elif state is not None:
                reason = state.reason if isinstance(state, _Mixed) else "its values are the numbers of the rows"
                return RowDivision(reason=f"{name}: {reason}")
        return RowDivision(inputs, found) if found or is_cached else RowDivision(reason="no output has rows")

    def _state_of(self, node: Node) -> _State:
        """Returns the state of an output's node; that of a cache is None, since it has its own rows."""
        ref = TensorRef(*tensor_source(node))
        if ref in self._states:
            return self._states[ref]
        if node.op == "get_attr":
            return None
        if node_meta.is_tensor(node):
            return _Mixed(f"{node.name} is no op of the plan")
        return _Mixed(f"{node.name} is a number of rows") if node.name in self._varies else None

    # -- numbers ---------------------------------------------------------------------------------------------------

    def _number_varies(self, op: Op) -> bool:
        """Returns whether an op without tensors gives what depends on rows: their number, or what is read off them."""
        node = self._nodes[op.name]
        symbol = size_of(node)
        if op.kind == "input" or symbol == "":
            return False
        if symbol is not None and not symbol.startswith("?"):
            return _ROWS in symbol.split("*")
        if node.target is getattr and node.args[1] in ("device", "dtype", "ndim"):
            return False
        reads_rows = any(self._states.get(ref) is not None for ref in op.inputs)
        return reads_rows or any(number in self._varies for number in op.numbers)

    # -- tensors ---------------------------------------------------------------------------------------------------

    def _followed(self, op: Op) -> Sequence[_State]:
        """Returns the state of each output."""
        if op.kind in ("param", "buffer"):
            return [None]
        if op.kind == "input":
            return [self._input(op)]
        states = [self._states[ref] for ref in op.inputs]
        mixed = next((s for s in states if isinstance(s, _Mixed)), None)
        plain = op.kind.removeprefix("opaque.")
        if plain in _FILLS:
            return [self._filled(op, plain)]
        if mixed is not None:
            return [mixed] * len(op.outputs)
        if plain == "arange":
            return [self._counted(op)]
        counts = any(number in self._varies for number in op.numbers)
        if all(state is None for state in states):
            return self._of_shared(op, counts)
        if counts and op.kind not in _SIZED:
            return self._refused(op, "reads the number of rows")
        rows = [state if isinstance(state, _Rows) else None for state in states]
        found = self._by_kind(op, plain, rows)
        return self._checked(op, found)

    def _input(self, op: Op) -> _State:
        dims = self._row_dims(op, 0)
        if not dims:
            return None
        if len(dims) > 1 or op.outputs[0].symbols[dims[0]] != _ROWS:
            return _Mixed(f"{op.name} has rows in several dims, or several elements a row")
        return _Rows(dims[0])

    def _filled(self, op: Op, plain: str) -> _State:
        """Returns the state of a tensor that is one number everywhere."""
        at = _FILL_VALUE.get(plain)
        value = None if at is None else argument(self._nodes[op.name], at, "fill_value")
        if isinstance(value, Node) and (value.name in self._varies or self._states.get(TensorRef(value.name))):
            return _Mixed(f"{named(op)} is filled with what depends on rows")
        return self._made(op)

    def _made(self, op: Op) -> _State:
        """Returns the state of a tensor all of whose rows, where it has any, are alike."""
        dims = self._row_dims(op, 0)
        if len(dims) > 1:
            return _Mixed(f"{named(op)} has a line for each pair of rows")
        return _Rows(dims[0]) if dims else None

    def _counted(self, op: Op) -> _State:
        """Returns the state of arange(...)."""
        node, dims = self._nodes[op.name], self._row_dims(op, 0)
        counts = any(number in self._varies for number in op.numbers)
        if not dims:
            return _Mixed(f"{named(op)} counts rows") if counts else None
        starts = [node.kwargs.get("start", 0), *node.args[:-1]][-1] if len(node.args) < 3 else None
        if op.outputs[0].symbols[0] != _ROWS or starts != 0 or node.kwargs.get("step", 1) != 1:
            return _Mixed(f"{named(op)} counts elements of all rows")
        return _Rows(0, numbers=True)

    def _of_shared(self, op: Op, counts: bool) -> Sequence[_State]:
        """Returns the states of what is made of tensors that are the same for all rows."""
        has_rows = any(self._row_dims(op, j) for j in range(len(op.outputs)))
        if op.kind == "expand" and has_rows:
            return [self._made(op)]
        if op.kind == "cache_read":
            return [_Rows(dims[0]) if (dims := self._row_dims(op, j)) else None for j in range(len(op.outputs))]
        if has_rows or counts:
            return self._refused(op, "depends on the number of rows")
        return [None] * len(op.outputs)

    def _by_kind(self, op: Op, plain: str, states: Sequence[_Rows | None]) -> Sequence[_State]:
        if any(state is not None and state.numbers for state in states) and op.kind != "index":
            if op.kind not in _KEEPS_NUMBERS:
                return self._refused(op, "computes with the numbers of the rows")
        own: dict[str, Callable[[Op, Sequence[_Rows | None]], Sequence[_State]]] = {
            "view": self._viewed, "index": self._indexed, "sdpa": self._attended, "embedding": self._embedded,
            "cache_update": self._cached, "one_hot": self._embedded, **dict.fromkeys(_PER_ROW, self._along),
        }  # fmt: skip
        if op.mutates and op.kind != "cache_update":
            return self._refused(op, "changes what is kept from call to call")
        if plain in own:
            return own[plain](op, states)
        return self._by_rule(op, states)

    def _by_rule(self, op: Op, states: Sequence[_Rows | None]) -> Sequence[_State]:
        """Returns the states by the factor of the op's rule that runs through the rows of all inputs."""
        for factor in self._rules(op, self._graph.input_specs(op)).factors:
            links = {slot: [link for link in factor.inputs if link.slot == slot] for slot in range(len(states))}
            fits = all(is_link_of(links[slot], state.dim if state else None) for slot, state in enumerate(states))
            out = {link.slot: link for link in factor.outputs if link.pairs is None}
            if fits and not factor.reduces and out.keys() == set(range(len(op.outputs))):
                numbers = any(state is not None and state.numbers for state in states)
                return [_Rows(out[j].dim, numbers) for j in range(len(op.outputs))]
        return self._refused(op, "goes over rows" if has_rule(op.kind) else "has no rule for its rows")

    def _viewed(self, op: Op, states: Sequence[_Rows | None]) -> Sequence[_State]:
        """Follows a view: rows must be the outermost of the dims that are split and merged together."""
        source, target = self._graph.spec(op.inputs[0]).shape, op.outputs[0].shape
        state = states[0]
        assert state is not None
        for ins, outs in view_groups(source, target):
            if state.dim in ins:
                outer = [d for d in ins if source[d] > 1 or d == state.dim]
                first = next((d for d in outs if d in self._row_dims(op, 0)), None)
                in_front = [d for d in outs if first is not None and d < first and target[d] > 1]
                if outer[0] == state.dim and first is not None and not in_front:
                    return [_Rows(first, state.numbers)]
        return self._refused(op, "merges rows with what lies outside of them")

    def _indexed(self, op: Op, states: Sequence[_Rows | None]) -> Sequence[_State]:
        """Follows x[...] with tensors of integers in the index: rows of the index and of x must be the same rows."""
        node = self._nodes[op.name]
        if op_name(node) != "getitem":
            return self._by_rule(op, states)
        pairs = index_by_tensors(node)
        if pairs is None or any(isinstance(item, list) for item in spelled_index(node)):
            return self._refused(op, "picks by a mask or a list")
        whole, tensors, front = dict(pairs), index_tensors(node), front_of(node)
        index_rank = max(node_meta.tensor(item).dim() for item in tensors.values())
        source = states[0]
        found = {whole[source.dim]} if source is not None and source.dim in whole else set[int]()
        reached = source is None or source.dim in whole
        for dim, item in tensors.items():
            state, of_rows = self._state_of(item), source is not None and dim == source.dim
            if isinstance(state, _Mixed):
                return [state]
            if state is None and not of_rows:
                continue
            if state is None or state.numbers != of_rows:
                return self._refused(op, "picks rows of the batch")
            reached = reached or of_rows
            found.add(front + index_rank - node_meta.tensor(item).dim() + state.dim)
        return [_Rows(found.pop())] if len(found) == 1 and reached else self._refused(op, "pairs rows with other rows")

    def _attended(self, op: Op, states: Sequence[_Rows | None]) -> Sequence[_State]:
        """Follows attention: its leading dims are the batch's, aligned from the right in queries, keys and mask."""
        ranks = [len(self._graph.spec(ref).shape) for ref in op.inputs]
        from_right = {rank - state.dim for rank, state in zip(ranks, states, strict=True) if state is not None}
        if len(from_right) != 1 or min(from_right) <= 3:
            return self._refused(op, "attends over rows")
        return [_Rows(len(op.outputs[0].shape) - from_right.pop())]

    def _embedded(self, op: Op, states: Sequence[_Rows | None]) -> Sequence[_State]:
        """Follows what makes a vector of each id."""
        if states[0] is None or any(state is not None for state in states[1:]):
            return self._refused(op, "has a table for each row")
        return [_Rows(states[0].dim)]

    def _cached(self, op: Op, states: Sequence[_Rows | None]) -> Sequence[_State]:
        """Follows keys and values into a cache, which has rows in front."""
        if any(state is None or state.dim != 0 for state in states[:2]):
            return self._refused(op, "caches what has no rows in front")
        return [_Rows(0)] * len(op.outputs)

    def _along(self, op: Op, states: Sequence[_Rows | None]) -> Sequence[_State]:
        """Follows what picks, orders or subtracts elements along one dim, of tensors of one rank."""
        node, state = self._nodes[op.name], states[0]
        rank = len(self._graph.spec(op.inputs[0]).shape)
        dim = argument(node, _PER_ROW[op.kind.removeprefix("opaque.")], "dim", -1)
        if state is None or set(states) != {state} or type(dim) is not int or dim % rank == state.dim:
            return self._refused(op, "picks among rows")
        return [_Rows(state.dim)] * len(op.outputs)

    # -- checks ----------------------------------------------------------------------------------------------------

    def _checked(self, op: Op, states: Sequence[_State]) -> Sequence[_State]:
        """Returns the states where they agree with the outputs' own size symbols."""
        for j, state in enumerate(states):
            if isinstance(state, _Rows) and self._row_dims(op, j) != [state.dim]:
                return self._refused(op, "has rows in other dims than its rule says")
        return states

    def _row_dims(self, op: Op, output: int) -> list[int]:
        """Returns the dims whose length follows the number of rows."""
        symbols = op.outputs[output].symbols
        return [d for d, symbol in enumerate(symbols) if _ROWS in symbol.partition("~")[0].split("*")]

    def _refused(self, op: Op, why: str) -> Sequence[_State]:
        return [_Mixed(f"{named(op)} {why}")] * len(op.outputs)
