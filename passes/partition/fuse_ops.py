"""fuse_ops: replaces chains that torch has one op for. A decode step on small tensors takes the longer the more nodes
it has.

    before  %p = %x.pow(2); %m = %p.mean(-1, keepdim=True); %a = %m + 1e-06; %r = torch.rsqrt(%a)
            %n = %x * %r; %y = %weight * %n
    after   %y = rms_norm(%x, (64,), %weight, 1e-06)

    before  %kr = repeat_interleave(%k, 4, 1); %vr = repeat_interleave(%v, 4, 1); %o = sdpa(%q, %kr, %vr)
    after   %o = sdpa(%q, %k, %v, enable_gqa=True)

Runs on the rank's finished graph: the searches see the chains, whose parts shard in more ways than the fused op. Only
where nothing else reads the middle of a chain and no dtype changes within, so that the arithmetic stays the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.fx
from torch.fx import Node
from torch.nn import functional as F

from cost_model.graph.op_graph import FusedChain
from passes.fx import node_meta
from passes.fx.arguments import argument
from passes.fx.nodes import op_name
from passes.fx.run_passes import GraphEdit, PassResult
from passes.partition.context import RankContext


def fuse_ops(module: torch.fx.GraphModule, ctx: RankContext) -> PassResult:
    """Rewrites `module` in place. Matches are the chains, and the attentions that repeat heads themselves."""
    edit, matches = GraphEdit(module), 0
    for node in list(module.graph.nodes):
        if op_name(node) == "rsqrt" and (chain := _rms_norm_chain(node)) is not None:
            _fuse_rms_norm(module.graph, chain)
            matches += 1
        elif op_name(node) == "scaled_dot_product_attention" and (repeated := _repeated_heads(node)):
            _fuse_repeated_heads(module.graph, node, *repeated)
            matches += 1
    module.recompile()
    return edit.result(matches)


def removed_by_fusing(module: torch.fx.GraphModule) -> tuple[FusedChain, ...]:
    """Returns the chains of `module` that fuse_ops would make one op of: as ops of their own they cost nothing."""
    found: list[FusedChain] = []
    attentions: set[Node] = set()
    for node in module.graph.nodes:
        if op_name(node) == "rsqrt" and (chain := _rms_norm_chain(node)) is not None:
            removed = tuple(n.name for n in chain.nodes if n is not chain.last)
            found.append(FusedChain(removed, chain.scaled.name, node_meta.tensor(chain.x).dim() - 1))
        elif op_name(node) == "scaled_dot_product_attention" and _repeated_heads(node):
            attentions.add(node)
    for attention in attentions:
        found += [FusedChain((n.name,)) for n in _repeated_heads(attention) if n.users.keys() <= attentions]
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _RmsNormChain:
    x: Node
    scaled: Node  # x times its own scale
    weight: Node | None
    eps: float
    last: Node
    nodes: tuple[Node, ...]  # each after those that read it


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _rms_norm_chain(rsqrt: Node) -> _RmsNormChain | None:
    add: Node = rsqrt.args[0]
    if op_name(add) != "add" or len(add.args) != 2 or _only_user(add) is not rsqrt:
        return None
    mean, eps = add.args if isinstance(add.args[0], Node) else reversed(add.args)
    if not (isinstance(mean, Node) and _is_number(eps) and op_name(mean) == "mean" and _only_user(mean) is add):
        return None
    square = mean.args[0]
    if argument(mean, 1, "dim") not in (-1, [-1], (-1,)) or not argument(mean, 2, "keepdim", False):
        return None
    if (op_name(square) == "pow" and square.args[1] == 2) or op_name(square) == "square":
        x = square.args[0]
    else:
        return None
    scaled = _only_user(rsqrt)
    if scaled is None or _only_user(square) is not mean or op_name(scaled) != "mul" or set(scaled.args) != {x, rsqrt}:
        return None
    value = node_meta.val(x)
    chain: list[Node] = [scaled, rsqrt, add, mean, square]
    if any(node_meta.tensor(n).dtype != value.dtype for n in chain):
        return None
    last, weight = scaled, None
    user = _only_user(scaled)
    if user is not None and op_name(user) == "mul" and len(user.args) == 2:
        other = user.args[0] if user.args[1] is scaled else user.args[1]
        if (
            isinstance(other, Node)
            and other.op == "get_attr"
            and node_meta.tensor(other).shape == value.shape[-1:]
            and node_meta.tensor(other).dtype == value.dtype
        ):
            last, weight = user, other
    return _RmsNormChain(x, scaled, weight, float(eps), last, tuple(dict.fromkeys((last, *chain))))


def _fuse_rms_norm(graph: torch.fx.Graph, chain: _RmsNormChain) -> None:
    last = chain.last
    with graph.inserting_before(last):
        arguments = (chain.x, (node_meta.tensor(chain.x).shape[-1],), chain.weight, chain.eps)
        # a name of its own: the plan knows the last op of the chain by the old one
        fused = graph.create_node("call_function", F.rms_norm, arguments, name=f"fused_{last.name}")
    node_meta.copy(last, fused)
    last.replace_all_uses_with(fused)
    for node in chain.nodes:
        graph.erase_node(node)


def _repeated_heads(attention: Node) -> tuple[Node, ...]:
    """Returns the repetitions of keys and of values that attention itself can do; none where it cannot."""
    if len(attention.args) != 3 or "enable_gqa" in attention.kwargs:
        return ()
    q, k, v = attention.args
    if not all(op_name(n) == "repeat_interleave" and argument(n, 2, "dim") == 1 for n in (k, v)):
        return ()
    repeats = {argument(n, 1, "repeats") for n in (k, v)}
    if len(repeats) != 1:
        return ()
    return (k, v) if isinstance(repeats.pop(), int) and node_meta.tensor(q).dim() == 4 else ()


def _fuse_repeated_heads(graph: torch.fx.Graph, attention: Node, k: Node, v: Node) -> None:
    attention.args = (attention.args[0], k.args[0], v.args[0])
    attention.kwargs = {**attention.kwargs, "enable_gqa": True}
    for node in dict.fromkeys((k, v)):
        if not node.users:
            graph.erase_node(node)
