"""normalize: one spelling for everything that the later passes read, and nothing left in the graph that is constant.

    before  size = x.size(); getitem = size[0]; view = q.view((getitem, getitem_1, -1, 64))
    after   batch = getitem(input_ids.shape, 0); reshape = torch.reshape(q, (batch, seq, 8, 64))

Done in this order, since each step leaves work for the next: constants and lengths are recognised by running the graph
at two sizes; views get their full shapes; heads folded into the batch get a dim of their own; ops that change nothing
go; repeated KV heads become one op; equal computations become one; what nothing uses goes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch.fx import Node
from torch.fx.node import map_arg

from cost_model.errors import PlanError
from passes.arguments import submodule
from passes.conditions import is_condition, take_conditions
from passes.data_dependent import selected, split_rows
from passes.functionalize import functionalize
from passes.shapes import Example, annotate
from passes.spell_out_calls import spell_out_calls
from passes.spell_out_modules import spell_out_modules
from passes.unmerge_batch import unmerge_batch

_RESHAPES = ("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as")
_EXPANDS = ("expand", "expand_as", "broadcast_to")
_DROPOUTS = ("dropout",)
_CONTIGUOUS = ("contiguous",)
_CASTS = ("to", "float", "type_as", "half", "bfloat16", "double", "type")
_MUTATING = frozenset({
    "update", "dropout", "bernoulli", "rand", "randn", "rand_like", "randn_like", "multinomial", "normal", "uniform",
})  # fmt: skip


def op_name(node: Node) -> str:
    """The plain name of what a node calls: "add" for operator.add, torch.add and Tensor.add alike."""
    if node.op in ("call_method",):
        return str(node.target)
    if node.op == "call_function":
        name = getattr(node.target, "__name__", str(node.target))
        return name.strip("_") if name in ("and_", "or_", "not_") else name
    if node.op == "call_module":
        return type(submodule(node.graph.owning_module, str(node.target))).__name__
    return node.op


def is_pure(node: Node) -> bool:
    """False for what writes a cache or draws random numbers: never merged, never computed twice."""
    if is_condition(node):
        return False
    name = op_name(node)
    if node.op == "call_module":
        module = submodule(node.graph.owning_module, str(node.target))
        return not (isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.training and module.p > 0)
    return node.op not in ("placeholder", "output") and name not in _MUTATING


def normalize(graph_module: torch.fx.GraphModule, examples: tuple[Example, Example]) -> torch.fx.GraphModule:
    """Rewrite `graph_module` in place and return it. Afterwards every node has `meta["val"]` and `meta["symbols"]`.

    `examples` are two sets of meta inputs of different sizes; what is equal in both is constant. Conditions on lengths
    that were decided while tracing are in `graph_module.meta["conditions"]` (passes/conditions.py), None without any.
    """
    functionalize(graph_module)
    # what only an assertion read may be a number that no example has
    _drop_unused(graph_module.graph)
    spell_out_modules(graph_module)
    second = annotate(graph_module, examples)
    graph = graph_module.graph
    spell_out_calls(graph)
    _spell_out_tuples(graph, second)
    _fold_scalars(graph, second, examples)
    _drop_unused(graph)
    _drop_unused_cache_arguments(graph)
    _spell_out_views(graph, second)
    unmerge_batch(graph, op_name)
    for step in (_drop_no_ops, _repeat_heads, _merge_equal):
        step(graph)
        _drop_unused(graph)
    _refuse_choices_among_constants(graph)
    graph_module.meta["conditions"] = take_conditions(graph_module)
    _drop_unused(graph)
    graph.lint()
    graph_module.recompile()
    return graph_module


def _drop_unused(graph: torch.fx.Graph) -> None:
    """As eliminate_dead_code, which lints each time, and asks of what is used, too, whether it is pure."""
    for node in reversed(graph.nodes):
        if not node.users and is_pure(node):
            graph.erase_node(node)


def _refuse_choices_among_constants(graph: torch.fx.Graph) -> None:
    """How much is selected of what is equally long for all inputs looks constant at two sizes, and is not."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in (selected, split_rows) and not any(
            node.args[0].meta["symbols"]
        ):
            raise PlanError(
                f"{node.name} ({node.meta.get('source')}) selects elements of {node.args[0].name} by value, whose size "
                f"does not follow the inputs: how many these are cannot be told from a constant. Use torch.where with "
                f"three arguments there"
            )


# -- constants and lengths ----------------------------------------------------------------------------------------


def _fold_scalars(graph: torch.fx.Graph, second: dict[Node, Any], examples: tuple[Example, Example]) -> None:
    """Replace every number, size, dtype and device by a literal or by one of a few nodes at the top."""
    lengths = _length_nodes(graph, second)
    lengths = _WithChunks(graph, second, lengths)
    anchor = next((n for n in graph.nodes if n.op == "placeholder" and isinstance(n.meta["val"], torch.Tensor)), None)
    device: Node | None = None

    def spelled(node: Node, a: Any, b: Any) -> Any:
        """`a` in literals and length nodes; raises KeyError where that can't be said."""
        nonlocal device
        if isinstance(a, torch.Size) or type(a) is tuple or type(a) is list:
            return tuple(spelled(node, x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, torch.device):
            if anchor is None:
                raise KeyError(a)
            if device is None:
                with graph.inserting_after(max(lengths.values(), key=_position(graph), default=anchor)):
                    device = graph.call_function(getattr, (anchor, "device"))
                    device.meta["val"] = a
            return device
        if a is None or isinstance(a, (torch.dtype, str)):
            return a
        if isinstance(a, (bool, float)) and a == b:
            return a
        if isinstance(a, int) and not isinstance(a, bool):
            if a != b and (a, b) not in lengths:
                product = _product(graph, inputs, a, b)
                if product is not None:
                    lengths[a, b], second[product] = product, b
                    known.add(product)
            return a if a == b else lengths[a, b]
        raise KeyError(a)

    inputs = dict(lengths)
    known = set(lengths.values())
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) or not node.users:
            continue
        if node.op in ("placeholder", "output", "get_attr") or node in known or node is device or not is_pure(node):
            continue
        try:
            said = spelled(node, value, second[node])
        except (KeyError, TypeError, ValueError):
            if isinstance(value, int) and not isinstance(value, bool) and (value, second[node]) not in lengths:
                lengths[value, second[node]] = node  # the first to compute this length computes it for all
            continue
        _replace_everywhere(node, said)


def _position(graph: torch.fx.Graph) -> Callable[[Node], int]:
    order = {n: i for i, n in enumerate(graph.nodes)}
    return lambda n: order.get(n, len(order))


def _length_nodes(graph: torch.fx.Graph, second: dict[Node, Any]) -> dict[tuple[int, int], Node]:
    """A node for each distinct length among the graph inputs' dims, right behind the placeholders."""
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    sources: dict[tuple[int, int], tuple[Node, int]] = {}
    for node in inputs:
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            for dim, pair in enumerate(zip(value.shape, second[node].shape, strict=True)):
                if pair[0] != pair[1]:
                    sources.setdefault(pair, (node, dim))
    names = {"B": "batch", "S": "seq", "T": "total"}
    lengths: dict[tuple[int, int], Node] = {}
    for pair, (node, dim) in reversed(sources.items()):
        with graph.inserting_after(inputs[-1]):
            name = names.get(node.meta["symbols"][dim], "length")
            length = graph.create_node("call_function", torch.ops.aten.sym_size.int, (node, dim), name=name)
        length.meta["val"], second[length] = pair
        lengths[pair] = length
    return lengths


class _WithChunks(dict[tuple[int, int], Node]):
    """Lengths by their values at both examples; also the number of chunks that a length of the inputs makes.

    ceil(S / 64), that and one more, and that times 64, are computed from S at the top of the graph, where the model
    may read them off a tensor that not every stage has. The examples tell them from floor(S / 64) and from
    floor(S / 64) + 1: the second length is a multiple of 64, the first is none.
    """

    def __init__(
        self, graph: torch.fx.Graph, second: dict[Node, Any], lengths: dict[tuple[int, int], Node]
    ) -> None:
        super().__init__(lengths)
        self.graph, self.second = graph, second
        self.sizes = {a for n in graph.nodes if op_name(n) in ("mod", "floordiv") for a in n.args if type(a) is int}
        self.inputs = dict(lengths)

    def __missing__(self, pair: tuple[int, int]) -> Node:
        for (a, b), length in self.inputs.items():
            for size in self.sizes:
                if size < 2 or a % size == 0 or b % size:
                    continue
                chunks = (-(-a // size), -(-b // size))
                steps = [(operator.add, size - 1), (operator.floordiv, size)]
                if pair == chunks:
                    return self._make(length, pair, steps)
                if pair == (chunks[0] * size, chunks[1] * size):
                    return self._make(length, pair, [*steps, (operator.mul, size)])
                if pair == (chunks[0] + 1, chunks[1] + 1):
                    return self._make(length, pair, [*steps, (operator.add, 1)])
        raise KeyError(pair)

    def _make(self, length: Node, pair: tuple[int, int], steps: list[tuple[Callable[[int, int], int], int]]) -> Node:
        last = max(self.values(), key=_position(self.graph))
        made = length
        for operation, number in steps:
            with self.graph.inserting_after(last):
                last = self.graph.call_function(operation, (made, number))
            last.meta["val"] = operation(made.meta["val"], number)
            self.second[last] = operation(self.second[made], number)
            made = last
        self[pair] = made
        return made


def _product(graph: torch.fx.Graph, inputs: dict[tuple[int, int], Node], a: int, b: int) -> Node | None:
    """A node for what is `a` and `b` at the two examples, at the top of the graph: lengths of the inputs times each
    other or a number ("B*S", "B*S*2"). So no stage has to know a tensor of another stage for its size."""
    for (x, y), length in inputs.items():
        if not x or not y or a % x or b % y:
            continue
        more = (a // x, b // y)
        rest = more[0] if more[0] == more[1] else inputs.get(more) or _product(graph, inputs, *more)
        if rest is not None:
            last = max((n for n in (length, rest) if isinstance(n, Node)), key=_position(graph))
            with graph.inserting_after(last):
                product = graph.call_function(operator.mul, (length, rest))
            product.meta["val"] = a
            return product
    return None


def _replace_everywhere(node: Node, value: Any) -> None:
    """Like replace_all_uses_with, for a value that may be a literal or a tuple holding nodes."""
    for user in list(node.users):
        user.args = map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = map_arg(user.kwargs, lambda n: value if n is node else n)


def _drop_unused_cache_arguments(graph: torch.fx.Graph) -> None:
    """Rotary tables are handed to Cache.update for cache kinds that left transformers; only positions are read."""
    for node in graph.nodes:
        if node.op == "call_method" and node.target == "update" and len(node.args) > 4:
            extra = node.args[4]
            if isinstance(extra, dict):
                kept = {k: v for k, v in extra.items() if k == "cache_position"}
                node.args = (*node.args[:4], kept)


# -- tuples of tensors -----------------------------------------------------------------------------------------------


def _spell_out_tuples(graph: torch.fx.Graph, second: dict[Node, Any]) -> None:
    """cat(chunk(x)) becomes cat((chunk(x)[0], chunk(x)[1])): each tensor that an op takes is an argument of its own."""
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if type(value) not in (tuple, list) or not value or not all(isinstance(v, torch.Tensor) for v in value):
            continue
        for part in [u for u in node.users if op_name(u) == "getitem" and isinstance(u.args[1], slice)]:
            _spell_out_part(graph, node, part, second)
        takers = [u for u in node.users if u.op.startswith("call") and op_name(u) != "getitem"]
        if not takers:
            continue
        elements: list[Node] = []
        with graph.inserting_after(node):
            for i in reversed(range(len(value))):
                element = graph.call_function(operator.getitem, (node, i))
                element.meta = {**node.meta, "val": value[i], "symbols": node.meta["symbols"][i]}
                second[element] = second[node][i]
                elements.insert(0, element)
        for user in takers:
            user.args = map_arg(user.args, lambda n, node=node, e=elements: tuple(e) if n is node else n)
            user.kwargs = map_arg(user.kwargs, lambda n, node=node, e=elements: tuple(e) if n is node else n)


def _spell_out_part(graph: torch.fx.Graph, node: Node, part: Node, second: dict[Node, Any]) -> None:
    """chunk(x)[1:][0] becomes chunk(x)[1]."""
    numbers = range(len(node.meta["val"]))[part.args[1]]
    elements = []
    with graph.inserting_before(part):
        for i in numbers:
            element = graph.call_function(operator.getitem, (node, i))
            element.meta = {**part.meta, "val": node.meta["val"][i], "symbols": node.meta["symbols"][i]}
            second[element] = second[node][i]
            elements.append(element)
    for user in list(part.users):
        if op_name(user) == "getitem" and isinstance(user.args[1], int):
            user.replace_all_uses_with(elements[user.args[1]])
        else:
            user.args = map_arg(user.args, lambda n: tuple(elements) if n is part else n)
            user.kwargs = map_arg(user.kwargs, lambda n: tuple(elements) if n is part else n)


# -- views --------------------------------------------------------------------------------------------------------


def _spell_out_views(graph: torch.fx.Graph, second: dict[Node, Any]) -> None:
    """Reshapes and expands with every size written: a literal where constant, a length's node where not."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    lengths: dict[tuple[int, int], Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten.sym_size.int:
            source, dim = node.args
            lengths[source.meta["val"].shape[dim], second[source].shape[dim]] = node
        elif node in second and type(node.meta["val"]) is int and node.meta["val"] != second[node]:
            lengths.setdefault((node.meta["val"], second[node]), node)
        if node.op not in ("call_method", "call_function") or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        name = op_name(node)
        if name not in _RESHAPES and name not in _EXPANDS:
            continue
        a, b = node.meta["val"].shape, second[node].shape
        shape: list[Any] = []
        for x, y in zip(a, b, strict=True):
            length = lengths.get((x, y))
            shape.append(x if x == y else length if length is not None and order.get(length, -1) < order[node] else -1)
        if shape.count(-1) > 1 or (name in _EXPANDS and -1 in shape):
            continue
        node.op = "call_function"
        node.target = torch.reshape if name in _RESHAPES else torch.broadcast_to
        node.args, node.kwargs = (node.args[0], tuple(shape)), {}


# -- ops that change nothing ----------------------------------------------------------------------------------------


def _same_tensor(a: Any, b: Any) -> bool:
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape


def _is_no_op(node: Node) -> bool:
    if node.op == "call_module":
        module = submodule(node.graph.owning_module, str(node.target))
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            return not module.training or module.p == 0
        return isinstance(module, torch.nn.Identity)
    if node.op not in ("call_method", "call_function") or not node.args or not isinstance(node.args[0], Node):
        return False
    name, before, after = op_name(node), node.args[0].meta.get("val"), node.meta.get("val")
    if not _same_tensor(before, after) or node.args[0].meta["symbols"] != node.meta["symbols"]:
        return False  # without the symbols, [B, S, 23] viewed as [B, 23, S] would be one where S is 23
    if name in _CONTIGUOUS or name in _RESHAPES or name in _EXPANDS or name in _CASTS:
        return True  # shapes are spelled out and only reshape reads them, so strides don't matter
    if name in _DROPOUTS:
        training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
        p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
        return training is False or p == 0
    if name == "getitem":
        index = node.args[1]
        items = index if isinstance(index, tuple) else (index,)
        if Ellipsis in items:
            return all(i is Ellipsis or _is_whole_slice(i, None) for i in items)
        return all(_is_whole_slice(i, n) for i, n in zip(items, before.shape, strict=False))
    if name in ("mul", "truediv", "div"):
        return len(node.args) == 2 and not node.kwargs and type(node.args[1]) in (int, float) and node.args[1] == 1
    return False


def _is_whole_slice(index: Any, size: int | None) -> bool:
    if not isinstance(index, slice) or index.start not in (None, 0) or index.step not in (None, 1):
        return False
    stop = index.stop
    # the length's own node: example sizes are told apart by two examples, so equal means the same length
    return stop is None or (size is not None and isinstance(stop, Node) and stop.meta.get("val") == size)


def _drop_no_ops(graph: torch.fx.Graph) -> None:
    for node in list(graph.nodes):
        if _is_no_op(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif op_name(node) == "cat" and node.op == "call_function" and isinstance(node.args[0], (tuple, list)):
            _drop_empty(node)
        elif op_name(node) in ("and", "logical_and") and len(node.args) == 2:
            _drop_all_true(node)


def _drop_empty(node: Node) -> None:
    """torch.cat passes over tensors of shape [0], whatever the others are: the keys of a cache that is empty yet."""
    kept = [n for n in node.args[0] if n.meta["val"].shape != (0,)]
    if len(kept) == 1 and _same_tensor(kept[0].meta["val"], node.meta["val"]):
        node.replace_all_uses_with(kept[0])
        node.graph.erase_node(node)
    elif kept:
        node.args = (kept, *node.args[1:])


def _drop_all_true(node: Node) -> None:
    """`mask & ones` is the mask, when the ones don't widen it (masking_utils starts every mask that way)."""
    for ones, other in (node.args, node.args[::-1]):
        if not (isinstance(ones, Node) and isinstance(other, Node) and op_name(ones) == "new_ones"):
            continue
        if ones.meta["val"].dtype == torch.bool and _same_tensor(other.meta["val"], node.meta["val"]):
            node.replace_all_uses_with(other)
            node.graph.erase_node(node)
            return


# -- repeated KV heads ------------------------------------------------------------------------------------------------


def _repeat_heads(graph: torch.fx.Graph) -> None:
    """x[:, :, None] -> broadcast_to(b, g, r, t, d) -> reshape(b, g*r, t, d) becomes repeat_interleave(x, r, 1)."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not torch.reshape:
            continue
        expand = node.args[0]
        if expand.op != "call_function" or expand.target is not torch.broadcast_to:
            continue
        unsqueeze = expand.args[0]
        base = unsqueeze.args[0] if unsqueeze.args and isinstance(unsqueeze.args[0], Node) else None
        if base is None or op_name(unsqueeze) not in ("getitem", "unsqueeze"):
            continue
        x, wide, out = (n.meta["val"] for n in (base, expand, node))
        if not isinstance(x, torch.Tensor):
            continue
        one = unsqueeze.meta["val"].shape
        for dim in range(x.dim()):
            repeats = wide.shape[dim + 1] if wide.dim() == x.dim() + 1 else 0
            if (
                repeats > 0
                and one == (*x.shape[: dim + 1], 1, *x.shape[dim + 1 :])
                and wide.shape == (*x.shape[: dim + 1], repeats, *x.shape[dim + 1 :])
                and out.shape == (*x.shape[:dim], x.shape[dim] * repeats, *x.shape[dim + 1 :])
                and node.meta["symbols"][dim] == ""
                and x.shape[dim] * repeats > x.shape[dim]
            ):
                node.target, node.args = torch.repeat_interleave, (base, repeats, dim)
                break


# -- equal computations ------------------------------------------------------------------------------------------------


def _merge_equal(graph: torch.fx.Graph) -> None:
    """Common subexpressions: masks and tables that every layer derives again."""
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node.op in ("placeholder", "output", "call_module") or not is_pure(node):
            continue
        key = (node.op, node.target, _hashable(node.args), _hashable(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _hashable(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *(_hashable(v) for v in value))
    if isinstance(value, dict):
        return tuple((k, _hashable(v)) for k, v in value.items())
    if isinstance(value, slice):
        return ("slice", _hashable(value.start), _hashable(value.stop), _hashable(value.step))
    # 1, 1.0 and True are equal in Python and different to torch
    return value if isinstance(value, Node) else (type(value).__name__, value)
