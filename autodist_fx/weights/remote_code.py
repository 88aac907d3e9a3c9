"""Reads configs, and classes of models, that are Python files beside a checkpoint: only where the user trusts them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PretrainedConfig,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from autodist_fx.errors import CheckpointError

_CLASSES = (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq)


def needs_code(fields: Mapping[str, Any], trusted: bool) -> bool:
    """True if a config.json of these fields is of a model whose classes are files that `auto_map` names: one that
    transformers does not have, or, where they are trusted, whichever names a class of its own."""
    auto_map = fields.get("auto_map") or {}
    if fields.get("model_type") not in CONFIG_MAPPING:
        return bool(auto_map)
    return trusted and any(c.__name__ in auto_map for c in _CLASSES)


def refuse_code(directory: Path, fields: Mapping[str, Any]) -> CheckpointError:
    """The error for a checkpoint that needs its own code, where that is not trusted."""
    files = sorted({f"{str(name).rpartition('--')[2].split('.')[0]}.py" for name in _names(fields["auto_map"])})
    return CheckpointError(
        f"{directory} has a model of its own, {fields.get('model_type')}, in {', '.join(files)} (auto_map), which is "
        "Python that would be run: read it, and pass trust_remote_code=True (--trust-remote-code)"
    )


def config_with_code(directory: Path) -> PretrainedConfig:
    """Run the config's and the model's files of a directory, as transformers does with trust_remote_code=True, and
    return the config. From then on transformers' mappings have the model's class under the config's, in this process.

    Raises CheckpointError where auto_map names no model that generates; whatever those files raise.
    """
    config = AutoConfig.from_pretrained(str(directory), trust_remote_code=True)
    named = getattr(config, "auto_map", {})
    auto_class = next((c for c in _CLASSES if c.__name__ in named), None)
    if auto_class is None:
        wanted = " or ".join(c.__name__ for c in _CLASSES)
        raise CheckpointError(f"{directory}/config.json: auto_map has {', '.join(named)}, and no {wanted}")
    if type(config).__module__.startswith("transformers."):
        raise CheckpointError(
            f"{directory}/config.json: auto_map has a model's class for {type(config).__name__} of transformers, which "
            "stays with the model it has: load yours by AutoModelForCausalLM.from_pretrained(..., "
            "trust_remote_code=True), and split it by adx.compile(model).to_distributed()"
        )
    model_class = get_class_from_dynamic_module(named[auto_class.__name__], str(directory))
    auto_class.register(type(config), model_class, exist_ok=True)
    return config


def _names(auto_map: Mapping[str, Any]) -> list[str]:
    """Such as "modeling_new.NewForCausalLM"; a tokenizer has a pair of them."""
    found = []
    for value in auto_map.values():
        found += [v for v in value if v] if isinstance(value, (list, tuple)) else [value]
    return found
