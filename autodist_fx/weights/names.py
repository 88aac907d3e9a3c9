"""Maps a model's tensor names to a checkpoint's: prefixes, ties and old names, as transformers does it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence


def resolve_names(
    wanted: Iterable[str],
    available: Iterable[str],
    *,
    base_model_prefix: str = "",
    tied: Sequence[Sequence[str]] = (),
    key_mapping: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Map each name of the model to the checkpoint's name of that tensor. Names that the checkpoint lacks are left out.

    `base_model_prefix`: the model class's. A checkpoint saved from the base model lacks it ("h.0.attn" for
    "transformer.h.0.attn"); one saved from a task model has it.
    `tied`: groups of names for one tensor. All of a group get the first name that the checkpoint has, so put the
    owner (the input embedding) first: it is the one that wins in transformers when a checkpoint holds both.
    `key_mapping`: the model class's `_checkpoint_conversion_mapping`, from patterns over checkpoint names to their
    replacements; the first pattern that matches counts.
    """
    by_name = {modern_name(name, key_mapping): name for name in available}
    by_name.update({name: name for name in available})  # an exact name beats a renamed one
    group_of = {name: tuple(group) for group in tied for name in group}
    resolved = {}
    for name in wanted:
        for candidate in group_of.get(name, (name,)):
            checkpoint_name = _find(candidate, by_name, base_model_prefix)
            if checkpoint_name is not None:
                resolved[name] = checkpoint_name
                break
    return resolved


def modern_name(name: str, key_mapping: Mapping[str, str] | None = None) -> str:
    """Rename a checkpoint's tensor as today's models name it.

    It applies the renames of PreTrainedModel._fix_state_dict_key_on_load (transformers 4.57): TensorFlow's names of a
    LayerNorm's parameters, and weight_norm's from before torch 2.0.
    """
    for old, new in (
        ("LayerNorm.gamma", "LayerNorm.weight"),
        ("LayerNorm.beta", "LayerNorm.bias"),
        ("weight_g", "parametrizations.weight.original0"),
        ("weight_v", "parametrizations.weight.original1"),
    ):
        if name.endswith(old):
            name = name.removesuffix(old) + new
            break
    for pattern, replacement in (key_mapping or {}).items():
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return name


def _find(name: str, by_name: Mapping[str, str], prefix: str) -> str | None:
    """Find a model's name in the checkpoint, with the prefix added or removed where it is not there as it is."""
    if name in by_name:
        return by_name[name]
    if prefix and name.startswith(f"{prefix}."):
        return by_name.get(name.removeprefix(f"{prefix}."))
    return by_name.get(f"{prefix}.{name}") if prefix else None
