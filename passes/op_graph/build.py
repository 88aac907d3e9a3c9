"""Builds the op graph: the normalised fx graph as ops of kinds that op rules name, with attributes; no torch.

    before  %reshape = torch.reshape(%q_proj, (%batch, %seq, 8, 64))
    after   Op("reshape", "view", inputs=(q_proj,), outputs=([B, S, 8, 64],))

Here fx targets get the names of rows of `cost_model.rules.table`, and their arguments become attributes. A target that
no handler (`passes.op_graph.table`) knows becomes an op without a rule, which is replicated: slower, never wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import torch
import torch.fx
from torch.fx import Node

from cost_model.graph.op_graph import FusedChain, Op, OpGraph, TensorRef, TensorSpec
from passes.fx import node_meta
from passes.fx.arguments import fetch, submodule
from passes.fx.nodes import is_pure, op_name
from passes.op_graph.handlers import Attributes, ModuleHandler
from passes.op_graph.table import HANDLERS, MODULES

# What a matmul may read a weight through: one expert's of all experts' weights, in another dtype, transposed.
_READS_THROUGH = ("slice", "view", "permute", "split", "unbind", "to", "identity", "index")


def build_op_graph(
    graph_module: torch.fx.GraphModule, names: dict[int, str] | None = None, chains: Collection[FusedChain] = ()
) -> OpGraph:
    """Returns the OpGraph of a normalised graph. Op names are node names; parameters and buffers go by their path.

    `names`: `parameter_names` of the model, where the graph is a part of it. `chains`: `removed_by_fusing` of it.
    """
    return _Builder(graph_module, names).build(chains)


def fingerprint(graph: OpGraph) -> str:
    """Returns the SHA-256, in hex, of every op's kind, inputs, shapes, dtypes and attributes: equal for equal graphs
    only."""
    digest = hashlib.sha256()
    for op in graph:
        shapes = [([s or n for n, s in zip(o.shape, o.symbols or o.shape, strict=True)], o.dtype) for o in op.outputs]
        refs = [(r.op, r.index) for r in op.inputs]
        digest.update(repr((op.name, op.kind, refs, shapes, sorted(op.attrs.items()))).encode())
    digest.update(repr(graph.outputs).encode())
    return digest.hexdigest()


def parameter_names(graph_module: torch.fx.GraphModule) -> dict[int, str]:
    """Returns {id of a parameter or buffer: its first path}: tied parameters have one name."""
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

    def build(self, chains: Collection[FusedChain]) -> OpGraph:
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
        return OpGraph(ops, [ref for ref in dict.fromkeys(outputs) if self._has_tensor(ref, ops)], chains)

    @staticmethod
    def _has_tensor(ref: TensorRef, ops: list[Op]) -> bool:
        return any(op.name == ref.op and len(op.outputs) > ref.index for op in ops)

    # -- tensors --------------------------------------------------------------------------------------------------

    def _specs(self, node: Node) -> tuple[TensorSpec, ...]:
        value = node_meta.val(node)
        if isinstance(value, torch.Tensor):
            return (_spec(value, node_meta.symbols(node)),)
        if isinstance(value, (tuple, list)) and value and all(isinstance(v, torch.Tensor) for v in value):
            known = node_meta.element_symbols(node) or (None,) * len(value)
            return tuple(_spec(v, s) for v, s in zip(value, known, strict=True))
        return ()

    def _state(self, tensor: torch.Tensor, node: Node) -> TensorRef:
        name = self.names[id(tensor)]
        if name not in self.state:
            kind = "param" if isinstance(tensor, torch.nn.Parameter) else "buffer"
            spec = _spec(tensor, ("",) * tensor.dim())
            self.ops.append(Op(name, kind, (), (spec,), {}, name.rpartition(".")[0], node_meta.source(node)))
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
            if isinstance(node_meta.val(source), (tuple, list)):
                if source in self.refs and isinstance(node.args[1], int):
                    index = node.args[1] % len(node_meta.val(source))
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
            source=node_meta.source(node),
            mutates=not is_pure(node) and node.op != "placeholder",
            numbers=tuple(n.name for n in node.all_input_nodes if n in self.refs and not self._specs(n)),
        )
        self.ops.append(op)
        self.refs[node] = TensorRef(node.name)

    def _tensor_inputs(self, node: Node) -> list[TensorRef]:
        """Returns every tensor among the arguments, in order; a tensor used twice stands twice."""
        found: list[TensorRef] = []

        def visit(n: Node) -> Node:
            if n in self.refs and (node_meta.is_tensor(n) or n.op == "get_attr"):
                found.append(self.refs[n])
            return n

        torch.fx.node.map_arg((node.args, node.kwargs), visit)
        return found

    def _classify(self, node: Node, specs: tuple[TensorSpec, ...]) -> tuple[str, list[TensorRef], Attributes]:
        """Returns (kind, tensor inputs, attributes) of a node; kind "opaque.<name>" where no rule is known."""
        name = op_name(node)
        inputs = self._tensor_inputs(node)
        if node.op == "call_module":
            return self._classify_module(node, name, inputs)
        if not specs:
            return f"scalar.{name}", inputs, {}
        handler = HANDLERS.get(name)
        found = None if handler is None else handler(self, node, inputs)
        return found or (f"opaque.{name}", inputs, {})

    def _classify_module(
        self, node: Node, name: str, inputs: list[TensorRef]
    ) -> tuple[str, list[TensorRef], Attributes]:
        module = submodule(self.module, str(node.target))
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        state = {attribute: self._state(tensor, node) for attribute, tensor in own}
        handler = _module_handler(module)
        found = None if handler is None else handler(self, module, inputs, state)
        return found or (f"opaque.{name}", [*inputs, *state.values()], {})


def _module_handler(module: torch.nn.Module) -> ModuleHandler | None:
    """Returns the handler of a module's class, or of the class whose `forward` it inherits."""
    forward = type(module).forward
    for known in type(module).__mro__:
        if known.__name__ in MODULES and getattr(known, "forward", None) is forward:
            return MODULES[known.__name__]
    return None


def _spec(tensor: torch.Tensor, symbols: tuple[str, ...] | None) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tuple(symbols or ()))


def _module_path(node: Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    return node_meta.module_path(node)


class Classifier:
    """Classifies single nodes of a graph whose tensors are known, as (kind, attributes): `refs` says what nodes
    stand for."""

    def __init__(self, graph_module: torch.fx.GraphModule, refs: dict[Node, TensorRef]) -> None:
        self._builder = _Builder(graph_module)
        self._builder.refs = refs

    def __call__(self, node: Node) -> tuple[str, Attributes]:
        kind, _, attrs = self._builder._classify(node, self._builder._specs(node))
        return kind, attrs
