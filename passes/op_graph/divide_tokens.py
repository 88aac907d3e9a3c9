"""divide_tokens: proves that a step of many tokens may be run as steps of some of them, one after the other.

A graph with a cache is followed from its tokens on, as divide_rows follows rows. Run on tokens a to b of a step, after
those before a, every tensor must be what it is for the whole step, cut to these tokens and to the keys up to b:

    along tokens       embeddings, norms, products: each token by itself; its place in the sequence may be among it
    along keys         what is cached, masks of all tokens so far, their places
    tokens by keys     masks. Attention reads keys behind b in the whole step, and may not look at them: a part of its
                       mask must be "the key's place is not behind the token's"
    of the last token  what the model goes on with after its last layer

Whatever looks at several tokens in another way (the greatest position, by which frequencies are chosen, a sum, a
convolution) or is not known here leaves a step whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch.fx
from torch.fx import Node

from cost_model.graph.op_graph import Op, OpGraph, TensorRef
from cost_model.rules.table import RuleTable
from cost_model.rules.views import view_groups
from passes.fx import node_meta
from passes.fx.arguments import argument, tensor_source
from passes.fx.nodes import op_name
from passes.op_graph.following import front_of, index_tensors, is_link_of, named, size_of
from passes.op_graph.indexing import index_by_tensors, spelled_index

_TOKENS, _KEYS, _PAST = "S", "T", "P"  # size symbols
_SIZED = frozenset({"view", "expand", "zeros", "ones", "empty", "new_zeros", "new_ones", "zeros_like", "ones_like"})
_KEEPS = frozenset({"view", "permute", "expand", "slice", "to", "identity"})  # move elements, and change none
_PICKS = {"topk": 2, "sort": 1, "argsort": 1, "diff": 2}  # the position of the dim that they go along


@dataclass(frozen=True, slots=True)
class _State:
    """Dims along `tokens` and along `keys`, None where there is none; both None: alike for all, or `last`.

    `places`: the values are places in the sequence; `relative`: places counted from the step's first token; `causal`:
    false wherever a key lies behind the token; `cached`: keys or values as the cache gives them. `order`: the size
    symbols that were merged into the tokens' dim.
    """

    tokens: int | None = None
    keys: int | None = None
    places: bool = False
    relative: bool = False
    causal: bool = False
    cached: bool = False
    last: bool = False
    order: tuple[str, ...] = ()

    @property
    def is_alike(self) -> bool:
        """Whether it is the same for every part of a step."""
        return self.tokens is None and self.keys is None and not self.last


_ALIKE = _State()


class _Refused(Exception):
    """A tensor is not known to be the same in parts of a step."""


def why_tokens_stay(graph_module: torch.fx.GraphModule, graph: OpGraph) -> str:
    """Returns why a step of a normalised graph with a cache is to be run whole, in words; "" where its tokens may be
    divided. `graph` is its op graph."""
    follower = _Follower(graph_module, graph)
    try:
        for op in graph:
            follower.follow(op)
        follower.check_outputs()
    except _Refused as refused:
        return str(refused)
    return "" if follower.is_cached else "there is no cache that steps go on with"


class _Follower:
    """Follows tokens through one graph."""

    def __init__(self, graph_module: torch.fx.GraphModule, graph: OpGraph) -> None:
        self._graph = graph
        self._nodes: dict[str, Node] = {node.name: node for node in graph_module.graph.nodes}
        self._rules = RuleTable()
        self._states: dict[TensorRef, _State] = {}
        self._varies: set[str] = set()  # ops that give numbers which differ from part to part
        self.is_cached = False

    def follow(self, op: Op) -> None:
        """Finds the states of an op's outputs, all of which what follows may read. Raises _Refused."""
        if not op.outputs:
            if self._number_varies(op):
                self._varies.add(op.name)
            return
        states = self._followed(op)
        for j, state in enumerate(states):
            dims = [d for d, symbol in enumerate(op.outputs[j].symbols) if _is_length(symbol)]
            if dims != sorted(d for d in (state.tokens, state.keys) if d is not None):
                raise _Refused(f"{named(op)} is as long as tokens in a way that is not known")
            self._states[TensorRef(op.name, j)] = state

    def check_outputs(self) -> None:
        """Raises _Refused for an output that is not of tokens."""
        for ref in self._graph.outputs:
            if self._states[ref].keys is not None:
                raise _Refused(f"{ref.op} is given for all tokens so far")

    def _number_varies(self, op: Op) -> bool:
        node = self._nodes[op.name]
        symbol = size_of(node)
        if op.kind == "input" or symbol == "":
            return False
        if symbol is not None and not symbol.startswith("?"):
            return bool({_TOKENS, _KEYS, _PAST} & set(symbol.split("*")))
        if node.target is getattr and node.args[1] in ("device", "dtype", "ndim"):
            return False
        return any(not self._states[ref].is_alike for ref in op.inputs) or op_name(node) in _OF_CACHE or any(
            number in self._varies for number in op.numbers
        )

    def _followed(self, op: Op) -> Sequence[_State]:
        if op.kind in ("param", "buffer"):
            return [_ALIKE]
        if op.kind == "input":
            return [self._input(op)]
        plain = op.kind.removeprefix("opaque.")
        if plain == "arange":
            return [self._counted(op)]
        states = [self._states[ref] for ref in op.inputs]
        if all(state.is_alike for state in states) and plain in _SIZED:
            return [self._made(op)]
        own: dict[str, Callable[[Op, Sequence[_State]], Sequence[_State]]] = {
            "view": self._viewed, "index": self._indexed, "sdpa": self._attended, "embedding": self._embedded,
            "one_hot": self._embedded, "cache_update": self._cached, "slice": self._sliced, "add": self._added,
            "and": self._both, **dict.fromkeys(_PICKS, self._picked),
            **dict.fromkeys(("le", "lt", "ge", "gt"), self._compared),
        }  # fmt: skip
        if op.mutates and op.kind != "cache_update":
            raise _Refused(f"{named(op)} changes what is kept from step to step")
        if plain in own:
            return own[plain](op, states)
        return self._by_rule(op, states)

    def _input(self, op: Op) -> _State:
        symbols = op.outputs[0].symbols
        tokens, keys = (
            next((d for d, symbol in enumerate(symbols) if symbol == wanted), None) for wanted in (_TOKENS, _KEYS)
        )
        return _State(tokens, keys, places=self._nodes[op.name].target == "cache_position")

    def _counted(self, op: Op) -> _State:
        symbol = op.outputs[0].symbols[0] if op.outputs[0].symbols else ""
        node = self._nodes[op.name]
        if not _is_length(symbol) and not any(number in self._varies for number in op.numbers):
            return _ALIKE
        if len(node.args) != 1 or set(node.kwargs) - {"device", "dtype"}:
            raise _Refused(f"{named(op)} counts from a start that is not known")
        if symbol == _TOKENS:
            return _State(tokens=0, places=True, relative=True)
        if symbol == _KEYS or (symbol.startswith("?") and self._is_of_cache(node.args[0])):
            return _State(keys=0, places=True)
        raise _Refused(f"{named(op)} counts what is not known")

    def _is_of_cache(self, number: object) -> bool:
        """Returns whether a number is what the cache says of its own lengths."""
        while isinstance(number, Node) and op_name(number) == "getitem":
            number = number.args[0]
        return isinstance(number, Node) and op_name(number) in _OF_CACHE

    def _made(self, op: Op) -> _State:
        """Returns the state of one number, or one tensor, repeated."""
        symbols = op.outputs[0].symbols
        tokens = [d for d, symbol in enumerate(symbols) if symbol == _TOKENS]
        keys = [d for d, symbol in enumerate(symbols) if symbol == _KEYS]
        return _State(tokens[0] if tokens else None, keys[0] if keys else None)

    # -- by rules ----------------------------------------------------------------------------------------------------

    def _by_rule(self, op: Op, states: Sequence[_State]) -> Sequence[_State]:
        """Returns the states by the factors of the op's rule that run through tokens and through keys of all inputs."""
        self._check_numbers(op)
        if op.kind not in _KEEPS and any(state.relative for state in states):
            raise _Refused(f"{named(op)} computes with places that are counted from the step's first token")
        ways = [[s.tokens for s in states], [s.keys for s in states]]
        if any(s.last for s in states):
            if any(dim is not None for dims in ways for dim in dims):
                raise _Refused(f"{named(op)} brings the last token together with others")
            return [_State(last=True)] * len(op.outputs)
        tokens, keys = (self._passed(op, dims) for dims in ways)
        first = next((s for s in states if not s.is_alike), _ALIKE)
        order = {s.order for s in states if s.tokens is not None} or {()}
        if len(order) > 1:
            raise _Refused(f"{named(op)} brings tokens together that lie in other orders")
        kept = first if op.kind in (*_KEEPS, "repeat_interleave") and len(states) == 1 else _ALIKE
        return [
            replace(kept, tokens=tokens[j], keys=keys[j], order=next(iter(order))) for j in range(len(op.outputs))
        ]

    def _passed(self, op: Op, dims: Sequence[int | None]) -> Sequence[int | None]:
        """Returns the dim of each output that goes with dims of the inputs. Raises _Refused where none does."""
        if all(dim is None for dim in dims):
            return [None] * len(op.outputs)
        for factor in self._rules(op, self._graph.input_specs(op)).factors:
            links = [[link for link in factor.inputs if link.slot == slot] for slot in range(len(dims))]
            out = {link.slot: link.dim for link in factor.outputs if link.pairs is None}
            fits = all(is_link_of(own, dim) for own, dim in zip(links, dims, strict=True))
            if fits and not factor.reduces and len(out) == len(op.outputs):
                return [out[j] for j in range(len(op.outputs))]
        raise _Refused(f"{named(op)} looks at several tokens")

    def _check_numbers(self, op: Op) -> None:
        if op.kind.removeprefix("opaque.") not in _SIZED and any(number in self._varies for number in op.numbers):
            raise _Refused(f"{named(op)} reads a number of tokens")

    # -- by kind -----------------------------------------------------------------------------------------------------

    def _added(self, op: Op, states: Sequence[_State]) -> Sequence[_State]:
        """Follows a sum: of places and the number of tokens before, or of keys' places and where the cache begins."""
        args = self._nodes[op.name].args
        numbers = [arg for arg in args if not (isinstance(arg, Node) and node_meta.is_tensor(arg))]
        if len(states) == 1 and states[0].places and len(numbers) == 1:
            number = numbers[0]
            if states[0].relative and isinstance(number, Node) and size_of(number) == _PAST:
                return [replace(states[0], relative=False)]
            if states[0].keys is not None and (number == 0 or self._is_of_cache(number)):
                return [states[0]]
        return self._by_rule(op, states)

    def _compared(self, op: Op, states: Sequence[_State]) -> Sequence[_State]:
        """Follows a comparison, of the keys' places with the tokens', say."""
        found = self._by_rule(op, states)
        if len(states) == 2 and all(s.places and not s.relative for s in states):
            earlier, later = states if op.kind in ("le", "lt") else states[::-1]
            causal = earlier.keys is not None and later.tokens is not None
            return [replace(found[0], causal=causal)]
        return found

    def _both(self, op: Op, states: Sequence[_State]) -> Sequence[_State]:
        """Follows `and`: causal where one of both is."""
        return [replace(self._by_rule(op, states)[0], causal=any(state.causal for state in states))]

    def _attended(self, op: Op, states: Sequence[_State]) -> Sequence[_State]:
        """Follows attention of tokens to what is cached."""
        ranks = [len(self._graph.spec(ref).shape) for ref in op.inputs]
        if len(states) < 4 or not all(s.cached and s.keys == rank - 2 for s, rank in zip(states[1:3], ranks[1:3])):
            raise _Refused(f"{named(op)} attends without a mask, or not to what is cached")
        mask = states[3]
        if (mask.tokens, mask.keys) != (ranks[3] - 2, ranks[3] - 1) or not mask.causal:
            raise _Refused(f"{named(op)} may look at tokens that come later")
        if states[0] != _State(tokens=ranks[0] - 2):
            raise _Refused(f"{named(op)} asks for other things than tokens")
        return [_State(tokens=len(op.outputs[0].shape) - 2)]

    def _embedded(self, op: Op, states: Sequence[_State]) -> Sequence[_State]:
        """Follows what makes a vector of each id."""
        if states[0].relative or any(not state.is_alike for state in states[1:]):
            raise _Refused(f"{named(op)} has a table for each token")
        return [_State(states[0].tokens, states[0].keys, last=states[0].last)]

    def _cached(self, op: Op, states: Sequence[_State]) -> Sequence[_State]:
        """Follows keys and values into the cache, which gives those of all tokens so far."""
        if any(state != _State(tokens=2) for state in states[:2]) or len(op.outputs[0].shape) != 4:
            raise _Refused(f"{named(op)} caches other things than each token's")
        self.is_cached = True
        return [_State(keys=2, cached=True)] * 2

    def _sliced(self, op: Op, states: Sequence[_State]) -> Sequence[_State]:
        """Follows x[...] of slices: the last of the tokens may be taken, after which there are no others."""
        state, node = states[0], self._nodes[op.name]
        if state.tokens is not None and op_name(node) == "getitem":
            items = [item for item in spelled_index(node) if item is not None]
            item = items[state.tokens]
            is_last = item == slice(-1, None, None) or item == -1
            if is_last and state.keys is None and not state.order:
                return [_State(last=True)]
        return self._by_rule(op, states)

    def _picked(self, op: Op, states: Sequence[_State]) -> Sequence[_State]:
        """Follows what picks, orders or subtracts elements along another dim."""
        rank, state = len(self._graph.spec(op.inputs[0]).shape), states[0]
        dim = argument(self._nodes[op.name], _PICKS[op.kind.removeprefix("opaque.")], "dim", -1)
        if set(states) != {state} or type(dim) is not int or dim % rank in (state.tokens, state.keys) or state.relative:
            raise _Refused(f"{named(op)} picks among tokens")
        return [_State(state.tokens, state.keys, last=state.last, order=state.order)] * len(op.outputs)

    def _viewed(self, op: Op, states: Sequence[_State]) -> Sequence[_State]:
        """Follows a view: tokens may be merged with rows, and taken out again as they were."""
        state, source, target = states[0], self._graph.spec(op.inputs[0]), op.outputs[0]
        if state.is_alike or state.last:
            return [state]
        found: dict[str, int | None] = {"tokens": None, "keys": None}
        order: tuple[str, ...] = ()
        for ins, outs in view_groups(source.shape, target.shape):
            for role, dim in (("tokens", state.tokens), ("keys", state.keys)):
                if dim is None or dim not in ins:
                    continue
                before = [d for d in ins if source.shape[d] > 1 or d == dim]
                after = [d for d in outs if target.shape[d] > 1 or _is_length(_symbol(target.symbols, d))]
                symbols = tuple(_symbol(source.symbols, d) for d in before)
                if len(before) == len(after) == 1:
                    found[role], order = after[0], state.order if role == "tokens" else order
                elif role == "tokens" and len(after) == 1 and not state.order and all(symbols):
                    found[role], order = after[0], symbols
                elif role == "tokens" and tuple(_symbol(target.symbols, d) for d in after) == state.order:
                    found[role] = after[state.order.index(_TOKENS)]
                else:
                    raise _Refused(f"{named(op)} merges tokens with other things")
        return [replace(state, tokens=found["tokens"], keys=found["keys"], order=order)]

    def _indexed(self, op: Op, states: Sequence[_State]) -> Sequence[_State]:
        """Follows x[...] with tensors in the index: keys that are picked by their places, rows of a table by tokens."""
        node = self._nodes[op.name]
        if op_name(node) != "getitem":
            return self._by_rule(op, states)
        pairs = index_by_tensors(node)
        if pairs is None or any(isinstance(item, list) for item in spelled_index(node)):
            raise _Refused(f"{named(op)} picks by a mask or a list")
        whole, tensors, front = dict(pairs), index_tensors(node), front_of(node)
        index_rank = max(node_meta.tensor(item).dim() for item in tensors.values())
        source = states[0]
        tokens = {whole[source.tokens]} if source.tokens is not None and source.tokens in whole else set[int]()
        keys = {whole[source.keys]} if source.keys is not None and source.keys in whole else set[int]()
        for dim, item in tensors.items():
            ref = TensorRef(*tensor_source(item))
            state = self._states.get(ref, _ALIKE)
            by_place = state.places and not state.relative and state.keys is not None
            if dim == source.tokens or (dim == source.keys and not by_place) or state.relative or state.last:
                raise _Refused(f"{named(op)} picks among tokens")
            shift = front + index_rank - node_meta.tensor(item).dim()
            tokens |= set() if state.tokens is None else {shift + state.tokens}
            keys |= set() if state.keys is None else {shift + state.keys}
        lost = (source.tokens is not None and not tokens) or (source.keys is not None and not keys)
        if len(tokens) > 1 or len(keys) > 1 or lost or source.last:
            raise _Refused(f"{named(op)} pairs tokens with others")
        return [_State(next(iter(tokens), None), next(iter(keys), None))]


_OF_CACHE = frozenset({"get_seq_length", "get_mask_sizes", "get_usable_length", "get_max_cache_shape"})


def _symbol(symbols: tuple[str, ...], dim: int) -> str:
    return symbols[dim] if symbols else ""


def _is_length(symbol: str) -> bool:
    """Returns whether a dim's length differs from part to part of a step."""
    return symbol.startswith("?") or bool({_TOKENS, _KEYS, _PAST} & set(symbol.split("*")))
