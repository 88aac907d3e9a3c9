"""localize_cache: renumbers the cache layers of a stage, whose cache has only its own, from 0, in the order in which
it writes them.

before  (stage 1 of 2 layers)  %kv = %past_key_values.update(%k, %v, 1)
after                          %kv = %past_key_values.update(%k, %v, 0)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.fx

from cost_model.errors import PlanError
from passes.fx.nodes import is_pure
from passes.fx.run_passes import GraphEdit, PassResult
from passes.partition.context import RankContext

# Methods of transformers' Cache that take a layer's index, and the index's position among the arguments.
_LAYER_ARGUMENT = {"update": 3, "read": 1, "get_seq_length": 1, "get_mask_sizes": 2}
_OWNS = ("update", "read")  # what is done where a layer lies


def localize_cache(module: torch.fx.GraphModule, ctx: RankContext, *, layer_kinds: Sequence[str]) -> PassResult:
    """Rewrites `module` in place and notes in `ctx.cache_layers` which global layers the rank's cache has.

    `layer_kinds[i]` says what kind of cache layer i is ("full", "sliding:4096"): a question about a layer that the
    stage does not have is put to one of its own of the same kind, which holds as many tokens. Where it has none (an
    embedding alone on its stage, whose positions begin at the cache's length), it is put to a layer that counts tokens
    and holds nothing, one for each kind in `ctx.length_kinds`, behind the others. Matches are the calls. Raises
    PlanError for the length of what an encoder gave: nobody can count that.
    """
    edit = GraphEdit(module)
    calls = [n for n in module.graph.nodes if n.op == "call_method" and n.target in _LAYER_ARGUMENT]
    owned = list(dict.fromkeys(_layer(n) for n in calls if n.target in _OWNS))
    local = {layer: i for i, layer in enumerate(owned)}
    counting: list[str] = []
    for node in calls:
        layer = _layer(node)
        if layer in local:
            _set_layer(node, local[layer])
            continue
        kind = layer_kinds[layer]
        twins = [i for i in owned if _answers_for(node, layer_kinds[i], kind)]
        if not twins and _erased(node):
            continue
        if twins:
            _set_layer(node, local[twins[0]])
            continue
        if kind == "cross":
            raise PlanError(
                f"stage {ctx.stage} asks for the length of cache layer {layer} ({kind}) and has no layer of that kind: "
                f"cut the pipeline elsewhere or use fewer stages"
            )
        if kind not in counting:
            counting.append(kind)
        _set_layer(node, len(owned) + counting.index(kind))
    ctx.cache_layers, ctx.length_kinds = tuple(owned), tuple(counting)
    return edit.result(len(calls))


def _answers_for(node: torch.fx.Node, kind: str, asked: str) -> bool:
    """Returns whether a layer of `kind` gives the answer of one of kind `asked`.

    All layers of keys and values have seen as many tokens, however many of them they hold; only those of
    cross-attention are filled with an encoder's output.
    """
    return kind == asked or (node.target == "get_seq_length" and "cross" not in (kind, asked))


def _erased(node: torch.fx.Node) -> bool:
    """Takes a length query, and all that follows from it, out of the graph, if nothing that is left uses any of it;
    returns whether it did.

    Such is the mask for layers that run on later stages, which make it themselves.
    """
    following = {node: None}
    for user in list(node.graph.nodes):
        if any(source in following for source in user.all_input_nodes):
            if not is_pure(user):
                return False
            following[user] = None
    for user in reversed(following):
        node.graph.erase_node(user)
    return True


def _set_layer(node: torch.fx.Node, index: int) -> None:
    position = _LAYER_ARGUMENT[str(node.target)]
    if len(node.args) > position:
        args = list(node.args)
        args[position] = index
        node.args = tuple(args)
    else:
        node.kwargs = {**node.kwargs, "layer_idx": index}


def _layer(node: torch.fx.Node) -> int:
    position = _LAYER_ARGUMENT[str(node.target)]
    return int(node.args[position] if len(node.args) > position else node.kwargs.get("layer_idx", 0))
