"""decompose_modules: turns modules into function calls whose numbers are cut together with their weights.

    before  %y = call_module[conv](%x)                  # Conv2d(8, 8, groups=8)
    after   %y = conv2d(%x, %conv.weight, %conv.bias, (1, 1), (0, 0), (1, 1), 8)

A rank has other groups than the whole, no bias where a sum adds it elsewhere, and its own part of a running mean: all
that is seen, and rewritten, in a call's arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.fx import Node
from torch.nn import functional as F

from passes.fx import node_meta
from passes.fx.run_passes import GraphEdit, PassResult
from passes.fx.shape_propagation import NormalizeContext

# (function, its arguments behind x); a string is an attribute of the module that holds a tensor or None.
Call = tuple[Callable[..., Any], tuple[Any, ...]]


def decompose_modules(graph_module: torch.fx.GraphModule, ctx: NormalizeContext) -> PassResult:
    """Rewrites `graph_module` in place."""
    graph, edit, matches = graph_module.graph, GraphEdit(graph_module), 0
    for node in list(graph.nodes):
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            continue
        module = graph_module.get_submodule(str(node.target))
        spell = _SPELLINGS.get(type(module))
        call = None if spell is None else spell(module)
        if call is None:
            continue
        function, arguments = call
        path = str(node.target)
        values = [_tensor(graph, node, module, path, a) if isinstance(a, _Attribute) else a for a in arguments]
        node.op, node.target, node.args = "call_function", function, (*node.args, *values)
        matches += 1
    return edit.result(matches)


class _Attribute(str):
    """The name of a module's parameter or buffer."""


def _tensor(graph: torch.fx.Graph, node: Node, module: nn.Module, path: str, name: str) -> Node | None:
    if getattr(module, name, None) is None:
        return None
    with graph.inserting_before(node):
        read = graph.get_attr(f"{path}.{name}")
    node_meta.copy(node, read, only=("nn_module_stack", "source"))
    return read


_WEIGHT, _BIAS = _Attribute("weight"), _Attribute("bias")


def _conv(function: Callable[..., Any]) -> Callable[[Any], Call | None]:
    def spell(module: Any) -> Call | None:
        if module.padding_mode != "zeros":
            return None
        return function, (_WEIGHT, _BIAS, module.stride, module.padding, module.dilation, module.groups)

    return spell


def _conv_transpose(function: Callable[..., Any]) -> Callable[[Any], Call | None]:
    def spell(module: Any) -> Call | None:
        padding = (module.stride, module.padding, module.output_padding)
        return function, (_WEIGHT, _BIAS, *padding, module.groups, module.dilation)

    return spell


def _batch_norm(module: Any) -> Call | None:
    if module.training or not module.track_running_stats:
        return None  # writes its running mean, or has none
    mean, variance = _Attribute("running_mean"), _Attribute("running_var")
    return F.batch_norm, (mean, variance, _WEIGHT, _BIAS, False, 0.0, module.eps)


def _group_norm(module: Any) -> Call | None:
    return F.group_norm, (module.num_groups, _WEIGHT, _BIAS, module.eps)


_SPELLINGS: dict[type[nn.Module], Callable[[Any], Call | None]] = {
    nn.Conv1d: _conv(F.conv1d),
    nn.Conv2d: _conv(F.conv2d),
    nn.Conv3d: _conv(F.conv3d),
    nn.ConvTranspose1d: _conv_transpose(F.conv_transpose1d),
    nn.ConvTranspose2d: _conv_transpose(F.conv_transpose2d),
    nn.ConvTranspose3d: _conv_transpose(F.conv_transpose3d),
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.GroupNorm: _group_norm,
    nn.Flatten: lambda module: (torch.flatten, (module.start_dim, module.end_dim)),
    nn.Softmax: lambda module: (F.softmax, (module.dim,)),
}
