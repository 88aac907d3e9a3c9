"""`Checkpoint`: a checkpoint that was located, with its config, its files and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from autodist_fx.errors import CheckpointError
from autodist_fx.weights.sources.gguf_file import gguf_tokenizer
from autodist_fx.weights.sources.gguf_source import GGUFSource
from autodist_fx.weights.sources.safetensors_source import SafetensorsSource
from autodist_fx.weights.sources.source import WeightSource


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The result of `resolve`. `name` is as the user gave it, `paths` are the weight files, all inside `directory`."""

    name: str
    config: PretrainedConfig
    source_kind: Literal["safetensors", "gguf"]
    directory: Path
    paths: tuple[Path, ...]
    generation_config: GenerationConfig
    trust_remote_code: bool = False


def open_source(checkpoint: Checkpoint) -> WeightSource:
    """Open the checkpoint's weights. Raises CheckpointError when they cannot be read."""
    if checkpoint.source_kind == "gguf":
        return GGUFSource(checkpoint.paths[0], checkpoint.config)
    return SafetensorsSource(checkpoint.paths)


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Load the checkpoint's tokenizer, set up for batches of
    prompts: padding on the left, by eos where it has no pad token.

    Raises CheckpointError when it has none.
    """
    if checkpoint.source_kind == "gguf":
        tokenizer = gguf_tokenizer(checkpoint.paths[0], checkpoint.config)
    else:
        try:
            trusted = checkpoint.trust_remote_code
            tokenizer = AutoTokenizer.from_pretrained(str(checkpoint.directory), trust_remote_code=trusted)
        except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise CheckpointError(
                f"no tokenizer could be loaded from {checkpoint.directory} ({reason}): "
                "save it there with tokenizer.save_pretrained"
            ) from error
    tokenizer.padding_side = "left"  # a generated token must follow its prompt
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
