"""op_graph: the normalised fx graph in the cost model's words.

    before  %reshape = torch.reshape(%q_proj, (%batch, %seq, 8, 64))
    after   Op("reshape", "view", inputs=(q_proj,), outputs=([B, S, 8, 64],))

Here fx targets get the names of rows of `cost_model.op_rules`, and their arguments become attributes. A target
without a line here becomes an op without a rule, which is replicated: slower, never wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.fx
from torch.fx import Node

from cost_model.errors import PlanError
from cost_model.op_graph import Op, OpGraph, TensorRef, TensorSpec
from passes.arguments import fetch, submodule
from passes.normalize import is_pure, op_name

Attributes = dict[str, Any]

_ELEMENTWISE = {
    "add": "add", "iadd": "add", "add_": "add", "sub": "sub", "isub": "sub", "rsub": "sub", "mul": "mul", "imul": "mul",
    "mul_": "mul", "truediv": "div", "div": "div", "true_divide": "div", "neg": "neg", "floordiv": "floordiv",
    "mod": "mod", "pow": "pow", "maximum": "maximum", "minimum": "minimum", "where": "where",
    "masked_fill": "masked_fill", "masked_fill_": "masked_fill", "eq": "eq", "ne": "ne", "lt": "lt", "le": "le",
    "gt": "gt", "ge": "ge", "and": "and", "or": "or", "xor": "xor", "logical_and": "and", "logical_or": "or",
    "bitwise_and": "and", "bitwise_or": "or", "invert": "logical_not", "logical_not": "logical_not",
    "bitwise_not": "logical_not", "not": "logical_not", "to": "to", "float": "to", "half": "to", "bfloat16": "to",
    "double": "to", "bool": "to", "long": "to", "int": "to", "type": "to", "type_as": "type_as", "clone": "clone",
    "contiguous": "identity", "detach": "identity", "lerp": "lerp", "square": "square", "clamp": "clamp",
    "clip": "clamp", "clamp_min": "clamp", "clamp_max": "clamp", "nan_to_num": "nan_to_num",
}  # fmt: skip
for _name in (
    "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "cos", "sin", "tanh", "sigmoid", "silu", "gelu", "relu", "erf",
    "softplus", "leaky_relu", "elu", "mish", "hardtanh", "floor", "round", "sign", "log1p", "expm1", "isnan", "isinf",
    "relu6", "log_sigmoid", "hardswish", "hardsigmoid", "ceil", "trunc", "dropout",
):  # fmt: skip
    _ELEMENTWISE[_name] = _name
_ELEMENTWISE["logsigmoid"] = "log_sigmoid"
# nn modules that are one elementwise function of their input
_ELEMENTWISE_MODULES = {
    "Dropout": "dropout", "SiLU": "silu", "GELU": "gelu", "ReLU": "relu", "Tanh": "tanh", "Sigmoid": "sigmoid",
    "ReLU6": "relu6", "Softplus": "softplus", "LeakyReLU": "leaky_relu", "ELU": "elu", "Mish": "mish",
    "Hardswish": "hardswish", "Identity": "identity",
}  # fmt: skip

# What a matmul may read a weight through: one expert's of all experts' weights, in another dtype, transposed.
_READS_THROUGH = ("slice", "view", "permute", "split", "unbind", "to", "identity", "index")


def build_op_graph(
    graph_module: torch.fx.GraphModule, names: dict[int, str] | None = None, fused: Collection[str] = ()
) -> OpGraph:
    """The OpGraph of a normalised graph. Op names are node names; parameters and buffers go by their path.

    `names`: `parameter_names` of the model, where the graph is a part of it. `fused`: nodes that fuse_ops will remove.
    """
    return _Builder(graph_module, names).build(fused)


def fingerprint(graph: OpGraph) -> str:
    """sha256 over every op's kind, inputs, shapes, dtypes and attributes: equal for equal graphs only."""
    digest = hashlib.sha256()
    for op in graph:
        shapes = [([s or n for n, s in zip(o.shape, o.symbols or o.shape, strict=True)], o.dtype) for o in op.outputs]
        refs = [(r.op, r.index) for r in op.inputs]
        digest.update(repr((op.name, op.kind, refs, shapes, sorted(op.attrs.items()))).encode())
    digest.update(repr(graph.outputs).encode())
    return digest.hexdigest()


def parameter_names(graph_module: torch.fx.GraphModule) -> dict[int, str]:
    """id of each parameter and buffer -> its first path: tied parameters have one name."""
    names: dict[int, str] = {}
    for named in (graph_module.named_parameters(remove_duplicate=False), graph_module.named_buffers()):
        for name, tensor in named:
            names.setdefault(id(tensor), name)
    return names


class _Builder:
    def __init__(self, graph_module: torch.fx.GraphModule, names: dict[int, str] | None = None) -> None:
        self.module = graph_module
        self.ops: list[Op] = []
        self.refs: dict[Node, TensorRef] = {}
        self.state: dict[str, str] = {}  # parameters and buffers met, by their one name
        self.names = parameter_names(graph_module) if names is None else names
        self.matmul_weights: set[str] = set()

    def build(self, fused: Collection[str]) -> OpGraph:
        outputs: list[TensorRef] = []
        for node in self.module.graph.nodes:
            if node.op == "output":
                torch.fx.node.map_arg(node.args, lambda n: outputs.append(self.refs[n]) if n in self.refs else None)
            else:
                self._add(node)
        # now that all uses are known: which parameters are weights of matmuls, also where a matmul reads a part of one
        for op in reversed(self.ops):
            if op.kind in _READS_THROUGH and op.name in self.matmul_weights:
                self.matmul_weights.add(op.inputs[0].op)
        ops = [
            Op(o.name, o.kind, o.inputs, o.outputs, {"matmul": True}, o.module, o.source)
            if o.kind == "param" and o.name in self.matmul_weights
            else o
            for o in self.ops
        ]
        return OpGraph(ops, [ref for ref in dict.fromkeys(outputs) if self._has_tensor(ref, ops)], fused)

    @staticmethod
    def _has_tensor(ref: TensorRef, ops: list[Op]) -> bool:
        return any(op.name == ref.op and len(op.outputs) > ref.index for op in ops)

    # -- tensors --------------------------------------------------------------------------------------------------

    def _specs(self, node: Node) -> tuple[TensorSpec, ...]:
        value, symbols = node.meta.get("val"), node.meta.get("symbols")
        if isinstance(value, torch.Tensor):
            return (_spec(value, symbols),)
        if isinstance(value, (tuple, list)) and value and all(isinstance(v, torch.Tensor) for v in value):
            return tuple(_spec(v, s) for v, s in zip(value, symbols or (None,) * len(value), strict=True))
        return ()

    def _state(self, tensor: torch.Tensor, node: Node) -> TensorRef:
        name = self.names[id(tensor)]
        if name not in self.state:
            kind = "param" if isinstance(tensor, torch.nn.Parameter) else "buffer"
            spec = _spec(tensor, ("",) * tensor.dim())
            self.ops.append(Op(name, kind, (), (spec,), {}, name.rpartition(".")[0], node.meta.get("source", "")))
            self.state[name] = kind
        return TensorRef(name)

    # -- nodes ------------------------------------------------------------------------------------------------------

    def _add(self, node: Node) -> None:
        specs = self._specs(node)
        if node.op == "get_attr":
            tensor = fetch(self.module, node.target)
            if isinstance(tensor, torch.Tensor):
                self.refs[node] = self._state(tensor, node)
                return
        if op_name(node) == "getitem" and isinstance(node.args[0], Node) and len(specs) == 1:
            source = node.args[0]
            if isinstance(source.meta.get("val"), (tuple, list)):
                if source in self.refs and isinstance(node.args[1], int):
                    index = node.args[1] % len(source.meta["val"])
                    self.refs[node] = TensorRef(self.refs[source].op, index)
                    return
        kind, inputs, attrs = "input", list[TensorRef](), Attributes()
        if node.op != "placeholder":
            kind, inputs, attrs = self._classify(node, specs)
        op = Op(
            name=node.name,
            kind=kind,
            inputs=tuple(inputs),
            outputs=specs,
            attrs=attrs,
            module=_module_path(node),
            source=node.meta.get("source", ""),
            mutates=not is_pure(node) and node.op != "placeholder",
            numbers=tuple(n.name for n in node.all_input_nodes if n in self.refs and not self._specs(n)),
        )
        self.ops.append(op)
        self.refs[node] = TensorRef(node.name)

    def _tensor_inputs(self, node: Node) -> list[TensorRef]:
        """Every tensor among the arguments, in order; a tensor used twice stands twice."""
        found: list[TensorRef] = []

        def visit(n: Node) -> Node:
            if n in self.refs and (isinstance(n.meta.get("val"), torch.Tensor) or n.op == "get_attr"):
                found.append(self.refs[n])
            return n

        torch.fx.node.map_arg((node.args, node.kwargs), visit)
        return found

    def _classify(self, node: Node, specs: tuple[TensorSpec, ...]) -> tuple[str, list[TensorRef], Attributes]:
        """(kind, tensor inputs, attributes); kind "opaque.<name>" where no rule is known."""
        name = op_name(node)
        inputs = self._tensor_inputs(node)
        if node.op == "call_module":
            return self._classify_module(node, name, inputs)
        if not specs:
            return f"scalar.{name}", inputs, {}
        handler = _HANDLERS.get(name)
        if handler is not None:
            found = handler(self, node, inputs)
            if found is not None:
                return found
        elif name in _ELEMENTWISE and len(specs) == 1:
            return self._elementwise(node, name, inputs)
        return f"opaque.{name}", inputs, {}

    def _elementwise(self, node: Node, name: str, inputs: list[TensorRef]) -> tuple[str, list[TensorRef], Attributes]:
        kind = _ELEMENTWISE[name]
        if len(inputs) == 1 and (
            kind == "mul" or (kind == "div" and isinstance(node.args[0], Node) and node.args[0] in self.refs)
        ) and node.kwargs.get("rounding_mode") is None:
            kind = "scale"  # by a number: linear in its one tensor
        elif kind == "div" and len(inputs) == 2 and node.kwargs.get("rounding_mode") is not None:
            kind = "floordiv"
        elif kind == "clone" or kind == "identity":
            kind = "identity"
        return kind, inputs, {}

    def _classify_module(
        self, node: Node, name: str, inputs: list[TensorRef]
    ) -> tuple[str, list[TensorRef], Attributes]:
        module = submodule(self.module, str(node.target))
        state = [self._state(t, node) for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))]
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and len(inputs) == 1:
            known = [self._state(weight, node)]
            bias = getattr(module, "bias", None)
            if isinstance(bias, torch.Tensor):
                known.append(self._state(bias, node))
            if isinstance(module, torch.nn.Linear) and type(module).forward is torch.nn.Linear.forward:
                self.matmul_weights.add(known[0].op)
                return "linear", [*inputs, *known], {"transposed": False}
            if name == "Conv1D" and weight.dim() == 2:  # transformers' own: y = x @ weight + bias
                self.matmul_weights.add(known[0].op)
                return "linear", [*inputs, *known], {"transposed": True}
            if type(module) is torch.nn.Embedding and module.max_norm is None:
                self.matmul_weights.add(known[0].op)
                return "embedding", [*inputs, *known], {}
            if isinstance(module, torch.nn.LayerNorm):
                return "layer_norm", [*inputs, *known], {"normalized": len(module.normalized_shape)}
        if not state and name in _ELEMENTWISE_MODULES and len(inputs) == 1:
            return _ELEMENTWISE_MODULES[name], inputs, {}
        if not state and name in POOLS and len(inputs) == 1:
            return "pool", inputs, POOLS[name]
        return f"opaque.{name}", [*inputs, *state], {}


# nn modules that work on each channel of an image for itself
POOLS = {
    f"{adaptive}{what}Pool{n}d": {"spatial": n, "linear": what == "Avg"}
    for adaptive in ("", "Adaptive") for what in ("Avg", "Max") for n in (1, 2, 3)
}  # fmt: skip


def _spec(tensor: torch.Tensor, symbols: tuple[str, ...] | None) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tuple(symbols or ()))


def _module_path(node: Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else ""


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


# -- one function a target (or a few of one form) -----------------------------------------------------------------

Handler = Callable[[_Builder, Node, list[TensorRef]], tuple[str, list[TensorRef], Attributes] | None]
_HANDLERS: dict[str, Handler] = {}


def _handles(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def _shape(node: Node) -> torch.Size:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        raise PlanError(
            f"{node.name} ({node.meta.get('source')}) is a {type(value).__name__} that the model takes apart itself: "
            f"only tensors can be split; trace with use_cache=False, if it is the cache"
        )
    return value.shape


@_handles("linear")
def _linear(builder: _Builder, node: Node, inputs: list[TensorRef]) -> Any:
    weight = argument(node, 1, "weight")
    if not _shape(weight):
        return None
    builder.matmul_weights.add(inputs[1].op)
    return "linear", inputs, {"transposed": False}


@_handles("matmul", "bmm", "mm")
def _matmul(builder: _Builder, node: Node, inputs: list[TensorRef]) -> Any:
    builder.matmul_weights.update(ref.op for ref in inputs)
    return "matmul", inputs, {}


@_handles("embedding")
def _embedding(builder: _Builder, node: Node, inputs: list[TensorRef]) -> Any:
    if node.target is not torch.nn.functional.embedding:
        return None  # torch.embedding takes the table first
    builder.matmul_weights.add(inputs[1].op)
    return "embedding", inputs, {}


@_handles("scaled_dot_product_attention")
def _sdpa(builder: _Builder, node: Node, inputs: list[TensorRef]) -> Any:
    dropout = argument(node, 4, "dropout_p", 0.0)
    return None if dropout else ("sdpa", inputs, {})


@_handles("layer_norm", "rms_norm")
def _norm(builder: _Builder, node: Node, inputs: list[TensorRef]) -> Any:
    return op_name(node), inputs, {"normalized": len(argument(node, 1, "normalized_shape"))}


@_handles("softmax", "log_softmax", "cumsum", "flip")
def _along(builder: _Builder, node: Node, inputs: list[TensorRef]) -> Any:
    dims = argument(node, 1, "dim", argument(node, 1, "dims"))
    if op_name(node) == "flip" and isinstance(dims, int):
        dims = node.args[1:]  # x.flip(1, 2)
    if not isinstance(dims, (int, tuple, list)):
        return None
    name = op_name(node)
    given = (dims,) if isinstance(dims, int) else tuple(dims)
    return name, inputs, {"dims": given, "linear": name in ("cumsum", "flip")}


@_handles("max", "min")
def _max(builder: _Builder, node: Node, inputs: list[TensorRef]) -> Any:
    """Of two tensors; of all of one; or along a dim, (values, indices)."""
    if len(inputs) == 2:
        return f"{op_name(node)}imum", inputs, {}
    return _reduce(builder, node, inputs)


@_handles("mean", "sum", "amax", "amin", "any", "all", "var", "std", "prod", "argmax", "argmin", "norm", "logsumexp")
def _reduce(builder: _Builder, node: Node, inputs: list[TensorRef]) -> Any:
    name, rank = op_name(node), _shape(node.args[0]).__len__()
    dims = argument(node, 2 if name == "norm" else 1, "dim")  # norm takes p first
    if isinstance(dims, int) and not isinstance(dims, bool):  # x.var(False) is about bias
        dims = (dims,)
    elif not isinstance(dims, (tuple, list)):
        dims = tuple(range(rank))
    out = node.meta["val"]
    keepdim = len((out[0] if isinstance(out, tuple) else out).shape) == rank
    return "reduce", inputs, {"op": name, "dims": tuple(dims), "keepdim": keepdim}


@_handles("reshape", "view", "flatten", "unflatten", "view_as", "reshape_as")
def _view(builder: _Builder, node: Node, inputs: list[TensorRef]) -> Any:
    if isinstance(argument(node, 1, "dtype"), torch.dtype):
        return None
    return "view", inputs[:1], {}


@_handles("broadcast_to", "expand", "expand_as")
def _expand(builder: _Builder, node: Node, inputs: list[TensorRef]) -> Any:
    return "expand", inputs[:1], {}


@_handles("transpose", "swapaxes", "swapdims")
def _transpose(builder: _Builder, node: Node, inputs: list[TensorRef]) -> Any:
    order = list(range(len(_shape(node))))
    a, b = argument(node, 1, "dim0"), argument(node, 2, "dim1")
    order[a], order[b] = order[b], order[a]
    return "permute", inputs, {"order": tuple(order)}


@_handles("permute")
def _permute(builder: _Builder, node: Node, inputs: list[TensorRef]) -> Any:
    dims = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
    rank = len(_shape(node))
    return "permute", inputs, {"order": tuple(d % rank for d in dims)}


@_handles("t")
def _t(builder: _Builder, node: Node, inputs: list[TensorRef]) -> Any:
    return "permute", inputs, {"order": tuple(reversed(range(len(_shape(node)))))}


@_handles("unsqueeze")
def _unsqueeze(builder: _Builder, node: Node, inputs: list[TensorRef]) -> Any:
    rank = len(_shape(node))
    dim = argument(node, 1, "dim") % rank
    return "permute", inputs, {"order": (*range(dim), -1, *range(dim, rank - 1))}


@_handles("squeeze")
def _squeeze(builder: _Builder, node: Node, inputs: list[TensorRef]) -> Any:
    shape = _shape(node.args[0])
    dim = argument(node, 1, "dim")
    gone = [d for d in range(len(shape)) if shape[d] == 1] if dim is None else [dim % len(shape)]
    return "permute", inputs, {"order": tuple(d for d in range(len(shape)) if d not in gone or shape[d] != 1)}


@_handles("getitem")
def _getitem(builder: _Builder, node: Node, inputs: list[TensorRef]) -> Any:
    dims = basic_index(node)
    if dims is not None:
        picks = picked_elements(node)
        return "slice", inputs[:1], {"dims": dims, "picks": picks} if picks else {"dims": dims}
    kept = op_graph_indexing.index_by_tensors(node)
    return None if kept is None else ("index", inputs, {"dims": kept})


def basic_index(node: Node) -> tuple[tuple[int, int, int, int], ...] | None:
    """(input dim, output dim, start, step) of every dim that x[...] keeps; None for anything but slices, integers,
    None and Ellipsis. A start that follows the inputs counts as 0: such dims are never sharded."""
    shape, index = _shape(node.args[0]), spelled_index(node)
    if any(not (i is None or isinstance(i, slice) or type(i) is int) for i in index):
        return None
    dims, in_dim, out_dim = [], 0, 0
    for i in index:
        if i is None:
            out_dim += 1
        elif isinstance(i, slice):
            start = i.start if isinstance(i.start, int) else 0
            dims.append((in_dim, out_dim, start % shape[in_dim] if start < 0 else start, i.step or 1))
            in_dim, out_dim = in_dim + 1, out_dim + 1
        else:
            in_dim += 1
    return tuple(dims)


def picked_elements(node: Node) -> tuple[tuple[int, int], ...]:
    """(input dim, element) of every dim of constant length that x[...] takes one element of."""
    shape, symbols = _shape(node.args[0]), node.args[0].meta.get("symbols")
    items = [item for item in spelled_index(node) if item is not None]
    return tuple(
        (d, item % shape[d]) for d, item in enumerate(items) if type(item) is int and not (symbols and symbols[d])
    )


def spelled_index(node: Node) -> list[Any]:
    """The index of x[...], an item for each dim of x (and None for each new one): without an Ellipsis."""
    rank = len(_shape(node.args[0]))
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    kept = sum(1 for i in index if i is not None and i is not Ellipsis)
    spelled: list[Any] = []
    for i in index:
        spelled += [slice(None)] * (rank - kept) if i is Ellipsis else [i]
    return spelled + [slice(None)] * (rank - sum(1 for i in spelled if i is not None))


@_handles("split", "chunk", "tensor_split", "split_with_sizes")
def _split(builder: _Builder, node: Node, inputs: list[TensorRef]) -> Any:
    return "split", inputs, {"dim": argument(node, 2, "dim", 0) % len(_shape(node.args[0]))}


@_handles("unbind")
def _unbind(builder: _Builder, node: Node, inputs: list[TensorRef]) -> Any:
    return "unbind", inputs, {"dim": argument(node, 1, "dim", 0) % len(_shape(node.args[0]))}


@_handles("cat", "concat")
def _cat(builder: _Builder, node: Node, inputs: list[TensorRef]) -> Any:
    return "cat", inputs, {"dim": argument(node, 1, "dim", node.kwargs.get("axis", 0)) % len(_shape(node))}


@_handles("stack")
def _stack(builder: _Builder, node: Node, inputs: list[TensorRef]) -> Any:
    return "stack", inputs, {"dim": argument(node, 1, "dim", 0) % len(_shape(node))}


@_handles("repeat_interleave")
def _repeat_interleave(builder: _Builder, node: Node, inputs: list[TensorRef]) -> Any:
    repeats, dim = argument(node, 1, "repeats"), argument(node, 2, "dim")
    if not isinstance(repeats, int) or not isinstance(dim, int):
        return None
    return "repeat_interleave", inputs, {"repeats": repeats, "dim": dim % len(_shape(node))}


@_handles("update")
def _cache_update(builder: _Builder, node: Node, inputs: list[TensorRef]) -> Any:
    """Cache.update(key, value, layer, ...)."""
    if node.op != "call_method" or not isinstance(node.args[3], int):
        return None
    return "cache_update", inputs, {"layer": node.args[3]}


@_handles("read")
def _cache_read(builder: _Builder, node: Node, inputs: list[TensorRef]) -> Any:
    """What an update of another graph left in a layer of the cache."""
    if node.op != "call_method" or not isinstance(node.args[1], int):
        return None
    return "cache_read", [], {"layer": node.args[1]}



class Classifier:
    """(kind, attributes) of single nodes of a graph whose tensors are known: `refs` says what nodes stand for."""

    def __init__(self, graph_module: torch.fx.GraphModule, refs: dict[Node, TensorRef]) -> None:
        self._builder = _Builder(graph_module)
        self._builder.refs = refs

    def __call__(self, node: Node) -> tuple[str, Attributes]:
        kind, _, attrs = self._builder._classify(node, self._builder._specs(node))
        return kind, attrs


from passes import op_graph_images as op_graph_images  # noqa: E402  # handlers of their own, which need these
from passes import op_graph_indexing  # noqa: E402  registers its handlers
