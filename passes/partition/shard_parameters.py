"""shard_parameters: makes every parameter of the stage the rank's share of it, on meta until it is loaded.

    before  %q = call_module[self_attn.q_proj](%x)        # Linear(64 -> 64)
    after   %q = call_module[self_attn.q_proj](%x)        # ColumnParallelLinear(64 -> 32)

The module tree of the rank's graph is its own: nothing in it is shared with the model or with other ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.fx
from torch import nn
from torch.fx import Node

from cost_model.graph.placement import Interval, Placement
from cost_model.plan.data import OpPlan
from passes.fx.arguments import argument, fetch, place, tensor_arguments
from passes.fx.run_passes import GraphEdit, PassResult
from passes.ops.parallel_layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from passes.partition.context import RankContext
from passes.program.param_shard import ParamShard

Key = tuple[str, int | None, tuple[Interval, ...]]


def shard_parameters(
    module: torch.fx.GraphModule, ctx: RankContext, *, sources: Mapping[int, str]
) -> PassResult:
    """Rewrites `module` in place. `sources`: id of each parameter and buffer of the model -> its name there.

    Matches are the parameters and buffers that the rank has.
    """
    edit = GraphEdit(module)
    _Sharder(module, ctx, sources).run()
    return edit.result(len(ctx.param_shards))


class _Sharder:
    def __init__(self, module: torch.fx.GraphModule, ctx: RankContext, sources: Mapping[int, str]) -> None:
        self.module, self.ctx, self.sources = module, ctx, sources
        self.plans = {p.name: p for p in ctx.plan.params}
        self.shared: dict[Key, nn.Parameter] = {}  # a tied weight stays one tensor

    def run(self) -> None:
        done: dict[str, nn.Module] = {}
        for node in list(self.module.graph.nodes):
            if node.op == "call_module":
                self._module(node, done)
            elif node.op == "get_attr":
                self._attribute(node)
        for node in list(self.module.graph.nodes):
            if node.op == "call_function" and self.ctx.plan.has_op(node.name):
                self._function(node, self.ctx.plan.op(node.name))
        self.module.recompile()

    # -- one share ---------------------------------------------------------------------------------------------------

    def _share(self, tensor: torch.Tensor, name: str, placement: Placement, layout_index: int) -> nn.Parameter:
        """Returns the rank's meta parameter for `tensor`, to stand at path `name`, and notes where it comes from."""
        layout = self.ctx.plan.layout(layout_index)
        dim: int | None = None
        intervals: tuple[Interval, ...] = ()
        if placement.is_shard and layout is not None:
            dim, intervals = placement.dim, layout.parts[self.ctx.tp_rank]
        source = self.sources[id(tensor)]
        shard = ParamShard(name, source, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), dim, intervals)
        self.ctx.param_shards[name] = shard
        self.ctx.param_layouts[name] = None if dim is None else layout
        key = (source, dim, intervals)
        if key not in self.shared:
            empty = torch.empty(shard.local_shape, dtype=tensor.dtype, device="meta")
            self.shared[key] = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        return self.shared[key]

    def _buffer(self, tensor: torch.Tensor, name: str) -> None:
        self.ctx.param_shards[name] = ParamShard(
            name, self.sources[id(tensor)], tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."),
            is_buffer=True,
        )  # fmt: skip

    # -- uses of parameters ------------------------------------------------------------------------------------------

    def _attribute(self, node: Node) -> None:
        tensor = fetch(self.module, node.target)
        if not isinstance(tensor, torch.Tensor) or node.target in self.ctx.param_shards:
            return
        if not isinstance(tensor, nn.Parameter):
            if id(tensor) in self.sources:
                self._buffer(tensor, node.target)
            return
        plan = self.plans[self.sources[id(tensor)]]
        place(self.module, node.target, self._share(tensor, node.target, plan.placement, plan.layout))

    def _module(self, node: Node, done: dict[str, nn.Module]) -> None:
        target = str(node.target)
        if target in done:
            return
        original = self.module.get_submodule(target)
        op = self.ctx.plan.op(node.name)
        slots = len(tensor_arguments(node))  # then come the module's own tensors
        replacement = self._parallel(original, op, slots, target)
        if replacement is None:
            replacement = self._copied(original, target, op, slots)
        done[target] = replacement
        place(self.module, target, replacement)

    def _parallel(self, original: nn.Module, op: OpPlan, slots: int, target: str) -> nn.Module | None:
        if op.role not in ("column", "row", "vocab") or slots != 1:
            return None
        weight, bias = original.weight, getattr(original, "bias", None)
        local = self._share(weight, f"{target}.weight", op.inputs[1], op.input_layouts[1])
        if op.role == "vocab":
            layout = self.ctx.plan.layout(op.input_layouts[1])
            assert layout is not None
            new: nn.Module = VocabParallelEmbedding(
                layout.parts[self.ctx.tp_rank],
                layout.size,
                weight.shape[1],
                dtype=weight.dtype,
                padding_idx=getattr(original, "padding_idx", None),
            )
        else:
            transposed = not isinstance(original, nn.Linear)  # transformers' Conv1D keeps [i, o]
            rows, columns = local.shape
            i, o = (rows, columns) if transposed else (columns, rows)
            row = op.role == "row"
            has_bias = bias is not None and not (row and self.ctx.tp_rank > 0)
            cls = RowParallelLinear if row else ColumnParallelLinear
            new = cls(i, o, bias=has_bias, dtype=weight.dtype, transposed=transposed)
            if has_bias:
                new.bias = self._share(bias, f"{target}.bias", op.inputs[2], op.input_layouts[2])
        new.weight = local
        return new

    def _copied(self, original: nn.Module, target: str, op: OpPlan, slots: int) -> nn.Module:
        """Returns a module of the same class whose parameters are the rank's own."""
        clone = copy.copy(original)
        clone._parameters, clone._buffers = dict(original._parameters), dict(original._buffers)
        clone._modules = {
            name: self._copied(child, f"{target}.{name}", op, slots)
            for name, child in original._modules.items()
            if child is not None
        }
        for name, parameter in original._parameters.items():
            if parameter is None:
                continue
            slot = op_slot(original, name, slots)
            placement, layout = Placement("R"), -1
            if slot is not None and slot < len(op.inputs):
                placement, layout = op.inputs[slot], op.input_layouts[slot]
            clone._parameters[name] = self._share(parameter, f"{target}.{name}", placement, layout)
        for name, buffer in original._buffers.items():
            if buffer is not None and id(buffer) in self.sources:
                self._buffer(buffer, f"{target}.{name}")
        return clone

    def _function(self, node: Node, op: OpPlan) -> None:
        """Rewrites F.linear, F.embedding and experts on a sharded weight."""
        if op.lone_bias is not None and self.ctx.tp_rank > 0:  # the sum over ranks adds the bias once: rank 0's
            at, bias = op.lone_bias, tensor_arguments(node)[op.lone_bias]
            node.args, node.kwargs = (*node.args[:at], None, *node.args[at + 1 :]), {}
            self._drop_unread(bias)
        elif op.role == "vocab":
            weight = node.args[1]
            layout = self.ctx.plan.layout(op.input_layouts[1])
            assert layout is not None
            table = fetch(self.module, weight.target)
            new = VocabParallelEmbedding(
                layout.parts[self.ctx.tp_rank],
                layout.size,
                table.shape[1],
                dtype=table.dtype,
                padding_idx=argument(node, 2, "padding_idx"),
            )
            new.weight = table
            path = f"{node.name}_table"
            place(self.module, path, new)
            old = self.ctx.param_shards[weight.target]
            self.ctx.param_shards[f"{path}.weight"] = ParamShard(
                f"{path}.weight", old.source, old.shape, old.dtype, old.dim, old.intervals
            )
            self.ctx.param_layouts[f"{path}.weight"] = self.ctx.param_layouts[weight.target]
            node.op, node.target, node.args, node.kwargs = "call_module", path, (node.args[0],), {}
            self._drop_unread(weight)

    def _drop_unread(self, node: Node) -> None:
        """Leaves out a parameter that no op of this rank reads."""
        if node.op != "get_attr" or node.users:
            return
        self.module.graph.erase_node(node)
        path = str(node.target)
        owner, _, name = path.rpartition(".")
        called = any(n.op == "call_module" and n.target == owner for n in self.module.graph.nodes)
        if path in self.ctx.param_shards and not called:
            del self.ctx.param_shards[path]
            del self.ctx.param_layouts[path]
            delattr(self.module.get_submodule(owner), name)


def op_slot(module: nn.Module, name: str, slots: int) -> int | None:
    """Returns which input of the op a module's parameter is: weight, then bias, behind the tensor arguments."""
    order = [n for n in ("weight", "bias") if module._parameters.get(n) is not None]
    return slots + order.index(name) if name in order else None
