"""An artifact on disk, and a copy of it to be damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import autodist_fx as adx
from tests.support.models import tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("artifact") / "saved"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")))
    adx.compile(tiny_model("llama"), tp=2).save(directory, tokenizer=tokenizer)
    return directory


@pytest.fixture
def artifact(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "artifact")
    return tmp_path / "artifact"
