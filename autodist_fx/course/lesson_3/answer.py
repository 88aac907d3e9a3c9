"""Lesson 3: column, row, all_reduce. Give each rank a part of a weight, and add up what the parts give.

Fill in the four holes, then run

    autodist-fx course check 3
"""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule, Tracer
from torch.nn import functional as F

from passes.ops.comm import all_reduce


def share(size: int, tp_rank: int, tp: int) -> slice:
    """Return which of `size` rows are this rank's: ranks in order, as equal as can be, the first have one more.

    share(7, 0, 2) is slice(0, 4), share(7, 1, 2) is slice(4, 7).
    """
    # hole
    each, left = divmod(size, tp)
    start = tp_rank * each + min(tp_rank, left)
    return slice(start, start + each + (tp_rank < left))
    # end


class ColumnParallelLinear(nn.Module):
    """A part of a linear's outputs: x [..., inputs] -> y [..., own outputs].

    outputs: which of the linear's outputs are this rank's. `linear.weight` is [outputs, inputs].
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, outputs: slice) -> None:
        super().__init__()
        # hole
        self.weight = nn.Parameter(linear.weight[outputs].detach().clone())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias[outputs].detach().clone())
        # end

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """A part of a linear's inputs: x [..., own inputs] -> y [..., outputs], one term of a sum over the ranks.

    inputs: which of the linear's inputs this rank has. The sum of all ranks' results is the linear's result.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, inputs: slice, tp_rank: int) -> None:
        super().__init__()
        # hole
        self.weight = nn.Parameter(linear.weight[:, inputs].detach().clone())
        has_bias = linear.bias is not None and tp_rank == 0  # else the sum would add it once for each rank
        self.bias = nn.Parameter(linear.bias.detach().clone()) if has_bias else None
        # end

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


def insert_all_reduce(module: GraphModule) -> None:
    """Insert `all_reduce(y, "tp")` behind each call of a RowParallelLinear; all that read y then read the sum.

    A node that calls a module has node.op == "call_module", and the module is module.get_submodule(node.target).
    """
    # hole
    for node in list(module.graph.nodes):
        if node.op == "call_module" and isinstance(module.get_submodule(node.target), RowParallelLinear):
            with module.graph.inserting_after(node):
                total = module.graph.call_function(all_reduce, (node, "tp"))
            node.replace_all_uses_with(total)
            total.args = (node, "tp")  # the all_reduce is one of the readers, and would now read itself
    module.graph.lint()
    module.recompile()
    # end


class _KeepLinears(Tracer):
    """A tracer that writes a parallel linear as one node, and does not look inside."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_linear = isinstance(m, (ColumnParallelLinear, RowParallelLinear))
        return is_linear or super().is_leaf_module(m, module_qualified_name)


def trace(module: nn.Module) -> GraphModule:
    """Return the module as a graph in which parallel linears are nodes."""
    return GraphModule(module, _KeepLinears().trace(module))
