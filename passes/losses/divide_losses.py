"""divide_losses: turns means over a microbatch that the loss is made of into parts of the means over a whole batch.

    before  %loss = cross_entropy(%x, %labels)                     # the mean over this microbatch's labels
    after   %sum = cross_entropy(%x, %labels, reduction="sum")
            %loss = truediv(%sum, %loss_count_0)                   # an input: labels of the whole batch that count

The losses of all microbatches add up to the loss of one batch of all rows, and so do their gradients. What the loss is
linear in decides. A mean over rows becomes a sum and a count; a sum over rows stays; a sum that is divided by a number
which the inputs alone decide (`(x * mask).sum() / mask.sum()`) has that number taken over the whole batch. What is no
sum over rows (the balance of a router's experts) counts equally for each microbatch: %loss_share is one by their
number. Graph outputs other than the loss go.

The counts of one microbatch are a graph of their own over the same inputs (`ctx.counts`), without parameters.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.fx import Node
from torch.nn import functional as F

from cost_model.errors import PlanError
from passes.fx import node_meta
from passes.fx.arguments import fetch, submodule
from passes.fx.lazy_graph_module import LazyGraphModule
from passes.fx.nodes import op_name
from passes.fx.run_passes import GraphEdit, PassContext, PassResult

LOSS = "loss"
SHARE = "loss_share"
COUNT = "loss_count_"
_ROWS = "B"  # the size symbol of a batch's rows
_BY_TARGET = (F.cross_entropy, F.nll_loss)  # their means are over targets that are not ignored
_BY_ELEMENT = (
    F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits,
    F.soft_margin_loss, F.kl_div,
)  # fmt: skip
_MODULES: dict[type[nn.Module], tuple[Callable[..., Any], tuple[str, ...]]] = {
    nn.CrossEntropyLoss: (F.cross_entropy, ("weight", "ignore_index", "reduction", "label_smoothing")),
    nn.NLLLoss: (F.nll_loss, ("weight", "ignore_index", "reduction")),
    nn.MSELoss: (F.mse_loss, ("reduction",)),
    nn.L1Loss: (F.l1_loss, ("reduction",)),
    nn.SmoothL1Loss: (F.smooth_l1_loss, ("reduction", "beta")),
    nn.HuberLoss: (F.huber_loss, ("reduction", "delta")),
    nn.BCELoss: (F.binary_cross_entropy, ("weight", "reduction")),
    nn.BCEWithLogitsLoss: (F.binary_cross_entropy_with_logits, ("weight", "reduction", "pos_weight")),
    nn.SoftMarginLoss: (F.soft_margin_loss, ("reduction",)),
    nn.KLDivLoss: (F.kl_div, ("reduction", "log_target")),
}
_SAME = frozenset({
    "float", "double", "half", "bfloat16", "to", "type", "type_as", "clone", "contiguous", "squeeze", "unsqueeze",
    "reshape", "view", "flatten", "neg", "pos", "positive",
})  # fmt: skip
_SUMS, _PRODUCTS = frozenset({"add", "iadd", "sub"}), frozenset({"mul", "imul"})
_QUOTIENTS = frozenset({"truediv", "div", "itruediv", "true_divide"})


@dataclass
class LossContext(PassContext):
    """The result of this pass, which it sets. `inputs`: the inputs that the graph has now beside the model's, and their
    dtypes. `counts` returns {name of such an input: what one microbatch counts of it}, given that microbatch's own
    inputs; None where nothing is counted."""

    inputs: Mapping[str, torch.dtype] = field(default_factory=dict, kw_only=True)
    counts: torch.fx.GraphModule | None = field(default=None, kw_only=True)


def divide_losses(graph_module: torch.fx.GraphModule, ctx: LossContext) -> PassResult:
    """Rewrites a normalised graph in place; matches are the parts that the loss is the sum of. A graph without a loss
    stays as it is. Raises PlanError for a mean over rows whose number the inputs do not tell."""
    edit = GraphEdit(graph_module)
    output = next(node for node in reversed(graph_module.graph.nodes) if node.op == "output")
    loss = output.args[0].get(LOSS)
    if not isinstance(loss, Node):
        return edit.result(0)
    divider = _Divider(graph_module)
    output.args = ({LOSS: divider.part(loss)},)
    ctx.counts = divider.counts()
    ctx.inputs = {name: node_meta.tensor(node).dtype for name, node in divider.inputs.items()}
    graph_module.recompile()
    return edit.result(divider.parts)


class _Divider:
    def __init__(self, module: torch.fx.GraphModule) -> None:
        self.module, self.graph = module, module.graph
        self._output = next(node for node in reversed(module.graph.nodes) if node.op == "output")
        self.parts = 0
        self._of_batch, self._of_parameters = _dependencies(module)
        self.inputs: dict[str, Node] = {}
        self._counting = torch.fx.Graph()
        self._copied: dict[Node, Node] = {}
        self._counts: dict[str, Node] = {}
        self._known: dict[Node, Node] = {}  # what is divided by -> the input that stands for it
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self._copied[node] = self._counting.placeholder(str(node.target))

    # -- the loss, taken apart -------------------------------------------------------------------------------------

    def part(self, node: Node) -> Node:
        """Returns what a microbatch adds to this value of the whole batch."""
        name, args = op_name(node), node.args
        if node.op in ("call_function", "call_method"):
            if name in _SAME and args and isinstance(args[0], Node) and node_meta.tensor(node).numel() == 1:
                return self._with(node, 0, self.part(args[0]))
            if name in _SUMS and not node.kwargs and len(args) == 2:
                return self._sum(node)
            if name in _PRODUCTS and len(args) == 2:
                for position in (0, 1):
                    if isinstance(args[position], Node) and not self._varies(args[1 - position]):
                        return self._with(node, position, self.part(args[position]))
            if name in _QUOTIENTS and not node.kwargs and len(args) == 2 and isinstance(args[0], Node):
                if not self._varies(args[1]):
                    return self._with(node, 0, self.part(args[0]))
                if self._is_sum(args[0]) and self._is_sum(args[1]) and args[1] not in self._of_parameters:
                    return self._with(node, 1, self._count(args[1], lambda: self._copy(args[1])))
        self.parts += 1
        return self._mean(node) or (node if self._is_sum(node) else self._shared(node))

    def _sum(self, node: Node) -> Node:
        """Returns a sum of parts; a plain number in it is shared, too."""
        made = node
        for position, term in enumerate(node.args):
            if isinstance(term, Node):
                made = self._with(made, position, self.part(term))
            elif term != 0:
                share = self._call(operator.mul, (self._input(SHARE, node), term), {}, node)
                made = self._with(made, position, share)
        return made

    def _with(self, node: Node, position: int, value: Node) -> Node:
        """Returns a copy of `node` with another argument; what else reads the node reads what it read."""
        if node.args[position] is value:
            return node
        return self._call(node.target, (*node.args[:position], value, *node.args[position + 1 :]), node.kwargs, node)

    def _shared(self, node: Node) -> Node:
        return self._call(operator.mul, (node, self._input(SHARE, node)), {}, node)

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], like: Node) -> Node:
        """Returns a new node at the graph's end, of the shape and dtype of `like`."""
        kind = "call_method" if isinstance(target, str) else "call_function"
        with self.graph.inserting_before(self._output):
            made = self.graph.create_node(kind, target, args, dict(kwargs))
        node_meta.copy(like, made, only=("val", "symbols", "source", "nn_module_stack"))
        return made

    # -- means and sums --------------------------------------------------------------------------------------------

    def _mean(self, node: Node) -> Node | None:
        """Returns the quotient that stands for a mean over rows; None for what is none."""
        if op_name(node) == "mean" and node.op != "call_module" and len(node.args) == 1 and not node.kwargs:
            source = node.args[0]
            if not self._has_rows(source):
                return None
            return self._divided(node, torch.sum, (source,), {}, lambda: self._elements(source))
        call = _loss_call(self.module, node)
        if call is None or call.arguments["reduction"] not in ("mean", "batchmean"):
            return None
        count = self._count_of(call)
        if count is None:
            return None
        given = {**call.arguments, "reduction": "sum"}
        positional = given.pop("input"), given.pop("target")
        return self._divided(node, call.function, positional, given, count)

    def _divided(
        self, node: Node, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], count: Callable[[], Node]
    ) -> Node:
        number = self._count(node, count)
        total = self._call(function, args, kwargs, node)
        return self._call(operator.truediv, (total, number), {}, node)

    def _count_of(self, call: _LossCall) -> Callable[[], Node] | None:
        """Returns what makes the count that a mean divides by, for one microbatch; None where the loss is of pairs of
        rows, which no count makes a sum of."""
        scores, target = call.arguments["input"], call.arguments["target"]
        if call.function in _BY_TARGET:
            if node_meta.tensor(scores).dim() > 1 and _ROWS in node_meta.symbols(scores)[1].split("*"):
                return None  # as many classes as rows: each row is compared with all others
            self._refuse_unknown(call.node, target)
            return lambda: self._targets(call)
        if call.arguments["reduction"] == "batchmean":
            return lambda: self._size(scores, 0)
        shape = torch.broadcast_shapes(node_meta.tensor(scores).shape, node_meta.tensor(target).shape)
        widest = target if tuple(node_meta.tensor(target).shape) == tuple(shape) else scores
        if not self._has_rows(widest):
            return None
        return lambda: self._elements(widest)

    def _targets(self, call: _LossCall) -> Node:
        """Returns, in the counting graph, how much the targets of one microbatch weigh."""
        graph, given = self._counting, call.arguments
        target, weight = self._copy(given["target"]), given.get("weight")
        if node_meta.tensor(given["target"]).is_floating_point():  # a share of each class, in every row
            classes = node_meta.tensor(given["input"]).shape[1]
            return graph.call_function(operator.truediv, (graph.call_method("numel", (target,)), classes))
        ignored = given.get("ignore_index", -100)
        ignored = self._copy(ignored) if isinstance(ignored, Node) else ignored
        counted = graph.call_function(torch.ne, (target, ignored))
        if weight is not None:
            found = graph.call_function(torch.mul, (target, counted))  # an ignored one is looked up as class 0
            weights = graph.call_function(operator.getitem, (self._copy(weight), found))
            counted = graph.call_function(torch.mul, (weights, counted))
        return graph.call_function(torch.sum, (counted,))

    def _is_sum(self, node: Any) -> bool:
        """Returns whether a value is a sum over rows, to which each microbatch adds its own."""
        if not isinstance(node, Node) or not node_meta.is_tensor(node):
            return False
        if op_name(node) in _SAME and node.args and node_meta.tensor(node).numel() == 1:
            return self._is_sum(node.args[0])
        if op_name(node) == "sum" and node.op != "call_module" and len(node.args) == 1 and not node.kwargs:
            return self._has_rows(node.args[0])
        call = _loss_call(self.module, node)
        if op_name(node) == "ctc_loss":
            return node.kwargs.get("reduction", "mean") == "sum"
        return call is not None and call.arguments["reduction"] == "sum"

    def _has_rows(self, node: Node) -> bool:
        return any(node_meta.symbols(node))

    def _varies(self, value: Any) -> bool:
        return isinstance(value, Node) and value in self._of_batch

    # -- counts ----------------------------------------------------------------------------------------------------

    def _input(self, name: str, like: Node) -> Node:
        """Returns the input `name`, a number of the dtype of `like`; made at first use."""
        if name not in self.inputs:
            last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
            with self.graph.inserting_after(last):
                made = self.inputs[name] = self.graph.placeholder(name)
            node_meta.set_val(made, torch.empty((), dtype=node_meta.tensor(like).dtype, device="meta"))
            node_meta.set_symbols(made, ())
        return self.inputs[name]

    def _count(self, node: Node, make: Callable[[], Node]) -> Node:
        """Returns the input that has, for the whole batch, what `make` writes into the counting graph."""
        if node not in self._known:
            name = f"{COUNT}{len(self._counts)}"
            self._counts[name] = make()
            self._known[node] = self._input(name, node)
        return self._known[node]

    def _elements(self, node: Node) -> Node:
        """Returns the number of elements of a value, in the counting graph."""
        if node not in self._of_parameters:
            return self._counting.call_method("numel", (self._copy(node),))
        total: Any = 1
        for dim in range(node_meta.tensor(node).dim()):
            total = self._counting.call_function(operator.mul, (total, self._size(node, dim)))
        return total

    def _size(self, node: Node, dim: int) -> Any:
        """Returns a size of a value, in the counting graph. Raises PlanError where the inputs do not tell it."""
        product: Any = 1
        symbol = node_meta.symbols(node)[dim]
        if not symbol:
            return int(node_meta.tensor(node).shape[dim])
        for factor in symbol.split("*"):
            size = self._symbol(factor, node)
            product = self._counting.call_function(operator.mul, (product, size))
        return product

    def _symbol(self, symbol: str, node: Node) -> Any:
        if symbol.isdecimal():
            return int(symbol)
        for given in self.graph.nodes:
            if given.op == "placeholder" and node_meta.is_tensor(given) and symbol in node_meta.symbols(given):
                return self._counting.call_method(
                    "size", (self._copied[given], node_meta.symbols(given).index(symbol))
                )
        raise PlanError(
            f"{node.name} ({node_meta.where(node)}) is averaged over, and how many elements it has (a size {symbol}) "
            "cannot be told from the inputs: a mean over the whole batch needs that number. Write the loss as a sum "
            "divided by a sum over the labels or a mask"
        )

    def _refuse_unknown(self, loss: Node, target: Any) -> None:
        if not isinstance(target, Node) or target in self._of_parameters:
            raise PlanError(
                f"{loss.name} ({node_meta.where(loss)}) is a mean over targets that the model itself computes: how "
                "many of the whole batch count cannot be told from the inputs"
            )

    def _copy(self, node: Node) -> Node:
        """Copies a value, and all that it is made of, into the counting graph."""
        if node not in self._copied:
            for argument in node.all_input_nodes:
                self._copy(argument)
            self._copied[node] = self._counting.node_copy(node, lambda n: self._copied[n])
        return self._copied[node]

    def counts(self) -> torch.fx.GraphModule | None:
        """Returns the graph that counts one microbatch."""
        if not self._counts:
            return None
        self._counting.output(self._counts)
        return LazyGraphModule(self.module, self._counting, class_name="LossCounts")


@dataclass(frozen=True, slots=True)
class _LossCall:
    """A call of one of torch's losses, with all of its arguments by name."""

    node: Node
    function: Callable[..., Any]
    arguments: dict[str, Any]


def _loss_call(module: torch.fx.GraphModule, node: Node) -> _LossCall | None:
    """Returns the loss that a node computes, as a call of torch.nn.functional; None where it is none."""
    if node.op == "call_module":
        owner = submodule(module, str(node.target))
        if type(owner) not in _MODULES:
            return None
        function, names = _MODULES[type(owner)]
        keywords: dict[str, Any] = {}
        for name in names:
            value = getattr(owner, name)
            keywords[name] = _read(node, f"{node.target}.{name}", value) if isinstance(value, torch.Tensor) else value
        bound = inspect.signature(function).bind(*node.args, **{**keywords, **node.kwargs})
    elif node.op == "call_function" and node.target in (*_BY_TARGET, *_BY_ELEMENT):
        function = node.target
        bound = inspect.signature(function).bind(*node.args, **node.kwargs)
    else:
        return None
    arguments: Mapping[str, Any] = bound.arguments
    if any(arguments.get(old) is not None for old in ("size_average", "reduce")):
        return None
    kept = {n: v for n, v in arguments.items() if n not in ("size_average", "reduce") and v is not None}
    return _LossCall(node, function, {"reduction": "mean", **kept})


def _read(node: Node, path: str, value: torch.Tensor) -> Node:
    """Returns a node that reads a buffer of a module."""
    for known in node.graph.nodes:
        if known.op == "get_attr" and known.target == path:
            return known
    first = next(iter(n for n in node.graph.nodes if n.op != "placeholder"))
    with node.graph.inserting_before(first):
        made = node.graph.get_attr(path)
    node_meta.set_val(made, value.to("meta"))
    node_meta.set_symbols(made, ("",) * value.dim())
    return made


def _dependencies(module: torch.fx.GraphModule) -> tuple[set[Node], set[Node]]:
    """Returns the nodes whose values differ from microbatch to microbatch, and those that depend on parameters."""
    of_batch: set[Node] = set()
    of_parameters: set[Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder":
            if not node_meta.is_tensor(node) or node_meta.symbols(node):
                of_batch.add(node)
            continue
        if any(a in of_batch for a in node.all_input_nodes):
            of_batch.add(node)
        own = node.op == "get_attr" and isinstance(fetch(module, str(node.target)), nn.Parameter)
        own = own or (node.op == "call_module" and any(True for _ in submodule(module, str(node.target)).parameters()))
        if own or any(a in of_parameters for a in node.all_input_nodes):
            of_parameters.add(node)
    return of_batch, of_parameters
