"""Reads a .gguf file's config, tokenizer and tensors, as transformers
understands them; the file is parsed once per process."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers.modeling_gguf_pytorch_utils as gguf_support
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from autodist_fx.errors import CheckpointError


def gguf_config(path: Path) -> PretrainedConfig:
    """Read the model's config. Raises CheckpointError for a file
    that is no GGUF, and for a family that transformers lacks."""
    with _reading(path):
        return AutoConfig.for_model(**dict(_metadata(path)["config"]))


def gguf_tokenizer(path: Path, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer in the file, with the special tokens that the file names.

    transformers 4.57 (GGUFLlamaConverter) names the bos token as eos too, and prepends bos whatever the file says: a
    chat template's text would begin with two of them, and generation would not know its end. It also reads the file
    anew for the config, the tokenizer and the tensors, seconds each: see _reading.
    Raises CheckpointError when the file has no tokenizer.
    """
    with _reading(path):
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, config=config)
        fields = _metadata(path)["tokenizer"]
        tokens = fields["tokens"]
        for kind in ("bos", "eos", "unk", "pad"):
            token_id = fields.get(f"{kind}_token_id")
            if token_id is not None:
                setattr(tokenizer, f"{kind}_token", tokens[token_id])
        for option in ("add_bos_token", "add_eos_token"):
            value = _reader(path).get_field(f"tokenizer.ggml.{option}")
            if value is not None and hasattr(tokenizer, option):
                setattr(tokenizer, option, bool(value.contents()))
        tokenizer.clean_up_tokenization_spaces = False  # transformers would turn " ." into "." in the answer
        return tokenizer


def gguf_tensors(path: Path, skeleton: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Dequantize every tensor of the file to float32, under its name
    in `skeleton` (the model on meta). Raises CheckpointError."""
    with _reading(path):
        loaded = gguf_support.load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=skeleton)
        return loaded["tensors"]


def forget() -> None:
    """Free the parsed file: some 100 MB of small arrays for a vocabulary of 50 000."""
    _reader.cache_clear()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Make transformers read `path` by our cached reader and
    silently; turn its errors into one-line CheckpointErrors."""
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(f"reading {path.name} needs the package gguf: pip install 'autodist-fx[gguf]'")
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    gguf: Any = importlib.import_module("gguf")
    original, bar, verbosity = gguf.GGUFReader, gguf_support.tqdm, logging.get_verbosity()
    name_map = gguf.get_tensor_name_map
    # load_gguf_checkpoint looks GGUFReader up on each call. It is called for the config, the tokenizer and the tensors.
    gguf.GGUFReader = lambda name, *_: _reader(Path(name))
    # transformers asks for the map once per submodule, 20 ms each: six of the seven seconds that SmolLM2 takes.
    gguf.get_tensor_name_map = lru_cache(name_map)
    gguf_support.tqdm = lambda tensors, **_: tensors  # every rank would draw one
    logging.set_verbosity_error()
    try:
        yield
    except (ValueError, KeyError, IndexError, OSError, TypeError, ImportError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"transformers cannot read {path}: {reason}; use the safetensors checkpoint of this model"
        ) from error
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = original, name_map
        gguf_support.tqdm = bar
        logging.set_verbosity(verbosity)


@lru_cache(maxsize=1)
def _metadata(path: Path) -> dict[str, Any]:
    return gguf_support.load_gguf_checkpoint(str(path))


@lru_cache(maxsize=1)
def _reader(path: Path) -> Any:
    """Parse the file with gguf's reader over a plain array: it takes
    100 000 slices for the vocabulary, and slicing np.memmap is slow."""
    gguf_reader: Any = importlib.import_module("gguf.gguf_reader")

    class Reader(gguf_reader.GGUFReader):
        @property
        def data(self) -> np.ndarray:
            return self._plain

        @data.setter
        def data(self, mapped: np.memmap) -> None:
            self._plain = mapped.view(np.ndarray)

    return Reader(str(path))
