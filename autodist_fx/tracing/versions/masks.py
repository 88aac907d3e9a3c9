"""Makes attention masks traceable: by broadcasting index tensors, which vmap is not, and for every input alike."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from transformers import masking_utils

from autodist_fx.tracing.versions.tracer_base import SymbolicProxy

try:
    from transformers.modeling_attn_mask_utils import AttentionMaskConverter
except ImportError:  # transformers 5 makes all masks in masking_utils
    AttentionMaskConverter = None

Patch = Callable[[Any, str, Any], None]  # (owner, name, value), undone when tracing is over


def patch_masks(patch: Patch) -> None:
    """Patch transformers so that a mask is always made, and made without vmap.

    A mask that is skipped for one input (nothing is padded) must not be left out of a graph for all.
    """
    for name in ("_vmap_for_bhqkv", "_vmap_expansion_sdpa"):  # 4.57's name, and 5's
        if hasattr(masking_utils, name):
            patch(masking_utils, name, _broadcast_for_bhqkv)
    patch(masking_utils, "_ignore_causal_mask_sdpa", _never)
    if hasattr(masking_utils, "_ignore_bidirectional_mask_sdpa"):  # 5's
        patch(masking_utils, "_ignore_bidirectional_mask_sdpa", _masks_nothing)
    patch(masking_utils, "TransformGetItemToIndex", contextlib.nullcontext)
    if AttentionMaskConverter is not None:
        patch(AttentionMaskConverter, "_ignore_causal_mask_sdpa", staticmethod(_never))


def _never(*args: Any, **kwargs: Any) -> bool:
    return False


def _masks_nothing(padding_mask: Any, kv_length: Any, local_attention_size: int | None = None) -> bool:
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
