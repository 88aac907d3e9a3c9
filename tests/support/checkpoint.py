"""A tiny model as a checkpoint: safetensors, config, and a tokenizer whose words are w3, w4, ... by token id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from tests.support.models import tiny_model


def save_tiny(directory: Path, family: str, **changes: Any) -> Path:
    """float32, and with a vocabulary of 128 unless `changes` say otherwise."""
    model = tiny_model(family, dtype=torch.float32, **changes)
    model.save_pretrained(directory)
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, model.config.vocab_size))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(directory)
    return directory
