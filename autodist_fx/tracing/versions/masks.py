"""Makes attention masks traceable: by broadcasting index tensors, which vmap is not, and for every input alike."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

from transformers import masking_utils

from autodist_fx.calls.value_guards import assumed, known_value
from autodist_fx.tracing.versions.tracer_base import SymbolicProxy

try:
    from transformers.modeling_attn_mask_utils import AttentionMaskConverter
except ImportError:  # transformers 5 makes all masks in masking_utils
    AttentionMaskConverter = None

Patch = Callable[[Any, str, Any], None]  # (owner, name, value), undone when tracing is over


def patch_masks(patch: Patch, *, both_ways: bool, use_cache: bool) -> None:
    """Patch transformers so that a mask is always made, and made without vmap.

    A mask that is skipped for one input (nothing is padded) must not be left out of a graph for all. `both_ways`: the
    model's tokens attend to later ones where the mask is skipped (PaliGemma's without token types), which is then asked
    of each call (value_guards.py).
    """
    for name in ("_vmap_for_bhqkv", "_vmap_expansion_sdpa"):  # 4.57's name, and 5's
        if hasattr(masking_utils, name):
            patch(masking_utils, name, _broadcast_for_bhqkv)
    own = inspect.signature(masking_utils._ignore_causal_mask_sdpa)
    skips = functools.partial(_hides_nothing, own, use_cache) if both_ways else _never
    patch(masking_utils, "_ignore_causal_mask_sdpa", skips)
    if both_ways:
        patch(masking_utils, "find_packed_sequence_indices", _packed(masking_utils.find_packed_sequence_indices))
    if hasattr(masking_utils, "_ignore_bidirectional_mask_sdpa"):  # 5's
        patch(masking_utils, "_ignore_bidirectional_mask_sdpa", _masks_nothing)
    patch(masking_utils, "TransformGetItemToIndex", contextlib.nullcontext)
    if AttentionMaskConverter is not None:
        patch(AttentionMaskConverter, "_ignore_causal_mask_sdpa", staticmethod(_never))


def _never(*args: Any, **kwargs: Any) -> bool:
    return False


def _packed(find: Callable[..., Any]) -> Callable[..., Any]:
    """Return masking_utils.find_packed_sequence_indices, for which positions that are counted and not given are of one
    sequence: rows of several have a mask, which is not skipped."""

    def of_given_positions(position_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if not _reads(position_ids, "position_ids"):
            return None
        packed, values = find(position_ids, *args, **kwargs), position_ids.tracer.values
        if not values or packed is None:
            return packed
        alone = known_value((packed[:, -1] == 0).all()) if "position_ids" in values else True
        return None if alone else packed

    return of_given_positions


def _reads(value: Any, name: str) -> bool:
    """Return whether a traced value is computed of the input of that name."""
    pending, seen = [getattr(value, "node", None)], set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            if node.op == "placeholder" and node.target == name:
                return True
            seen.add(node)
            pending += node.all_input_nodes
    return False


def _hides_nothing(signature: inspect.Signature, use_cache: bool, *args: Any, **kwargs: Any) -> bool:
    """Return whether transformers skips a causal mask: of a whole sequence, within a window, without any padding.
    `signature`: that of transformers' own function, whose arguments have other places in 4.57 than in 5."""
    given = signature.bind(*args, **kwargs).arguments
    padding_mask, window = given["padding_mask"], given.get("local_attention_size")
    if not isinstance(padding_mask, SymbolicProxy) and not use_cache:
        return window is None or bool(given["kv_length"] < window)  # of a traced length: a guard on it
    traced = [value for value in given.values() if isinstance(value, SymbolicProxy)]
    inputs = {str(n.target): n for n in traced[0].tracer.graph.nodes if n.op == "placeholder"} if traced else {}
    if not {"input_ids", "attention_mask"} <= inputs.keys():
        return False
    ids, mask = (_proxy_of(inputs[name], traced[0].tracer) for name in ("input_ids", "attention_mask"))
    seen, length = mask.shape[-1], ids.shape[1]
    whole = (mask.all() & (length > 1)) & (seen == length)
    return assumed(whole if window is None else whole & (seen < window), False)


def _proxy_of(node: Any, tracer: Any) -> SymbolicProxy:
    proxy = SymbolicProxy(node, tracer)
    proxy.install_metadata(tracer.examples_of[node])
    return proxy


def _masks_nothing(padding_mask: Any, kv_length: Any = None, local_attention_size: int | None = None) -> bool:
    """Return whether a mask in both directions hides no token of any input."""
    return padding_mask is None and local_attention_size is None


def _broadcast_for_bhqkv(mask_function: Callable[..., Any], bh_indices: bool = True) -> Callable[..., Any]:
    """Return what `masking_utils._vmap_for_bhqkv` returns, by broadcasting index tensors instead of mapping over
    them."""

    def mask_BHQK(batch_B: Any, head_H: Any, query_Q: Any, key_K: Any) -> Any:
        if not bh_indices:
            return mask_function(batch_B, head_H, query_Q[:, None], key_K[None, :])
        mask = mask_function(
            batch_B[:, None, None, None], head_H[None, :, None, None], query_Q[None, None, :, None], key_K
        )
        if _known_shape(mask) == tuple(_known_shape(index)[0] for index in (batch_B, head_H, query_Q, key_K)):
            return mask
        # A mask function that never looks at its batch index (no padding mask) leaves that dim at 1.
        return mask.expand(batch_B.shape[0], head_H.shape[0], query_Q.shape[0], key_K.shape[0])

    return mask_BHQK


def _known_shape(value: Any) -> tuple[int, ...]:
    """Return the shape of a tensor; of a proxy, the one that its example has."""
    return tuple((value._metadata if isinstance(value, SymbolicProxy) else value).shape)
