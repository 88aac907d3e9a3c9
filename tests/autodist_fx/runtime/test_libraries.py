"""A rank's share of a model answers what libraries ask of a PreTrainedModel; `make libraries` runs the real ones.

Pipelines are transformers' own. lm-eval's HFLM, TRL's and transformers' trainers are stood in for by what they ask.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import autodist_fx as adx
from autodist_fx.errors import AutodistError
from cost_model.mesh import Mesh
from tests.support.checkpoint import save_tiny
from tests.support.models import relative_error, tiny_model
from tests.support.ranks import on_ranks

TP2 = Mesh(tp=2)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Records that transformers logs, which do not reach the root logger by themselves."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@torch.no_grad()
def test_a_pipeline_takes_a_split_model_without_a_word(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    directory = save_tiny(tmp_path, "llama", num_hidden_layers=1)
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)

    def answer(split: Any) -> Any:
        generate = pipeline("text-generation", model=split, tokenizer=tokenizer, device="cpu")
        return generate(["w5 w6", "w7"], max_new_tokens=3, do_sample=False)

    wanted = answer(model)
    assert on_ranks(model, TP2, answer) == [wanted, wanted]
    assert not [record for record in said.records if record.levelno >= logging.ERROR]


@torch.no_grad()
def test_what_an_evaluation_harness_asks() -> None:
    model = tiny_model("gpt2", n_layer=1)
    model.name_or_path = model.config.name_or_path = "owner/name"
    ids = torch.arange(3, 12).view(1, 9)

    def asked(split: Any) -> tuple[Any, ...]:
        split.eval()
        split.tie_weights()
        table = split.get_input_embeddings()
        counts = split.num_parameters(), split.num_parameters(exclude_embeddings=True)
        assert split.base_model.config is split.config and split.base_model.dtype == torch.float64
        return split.name_or_path, counts, (table.num_embeddings, table.embedding_dim, table.weight.dtype)

    def called(split: Any) -> torch.Tensor:
        with pytest.raises(AutodistError, match="output_hidden_states=True"):
            split.base_model(ids)
        return split(ids).logits

    wanted, logits = asked(model), model(ids).logits
    for facts, got in on_ranks(model, TP2, lambda split: (asked(split), called(split))):
        assert facts == wanted and relative_error(got, logits) < 1e-9


@torch.no_grad()
def test_the_table_of_tokens_has_its_values_where_it_is_whole() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    first, second = on_ranks(model, Mesh(pp=2), lambda split: split.get_input_embeddings().weight)
    assert torch.equal(first, model.get_input_embeddings().weight) and second.is_meta


@torch.no_grad()
def test_what_a_rank_cannot_do_is_one_line_and_not_there_for_hasattr() -> None:
    def asked(split: Any) -> Any:
        assert split.to("cpu") is split and split.double() is split and split.warnings_issued == {}
        with pytest.raises(AutodistError, match=r"float64 on cpu, and float16 on cpu .* dtype="):
            split.half()
        assert not hasattr(split, "save_pretrained") and not hasattr(split, "nonsense")
        with pytest.raises(AutodistError, match="split over ranks has no gradient_checkpointing_enable"):
            split.gradient_checkpointing_enable()
        with pytest.raises(AttributeError, match="nonsense"):
            _ = split.nonsense
        return split.dtype

    assert on_ranks(tiny_model("llama", num_hidden_layers=1), TP2, asked) == [torch.float64] * 2


def test_a_wrapper_of_a_model_is_told_where_its_model_is() -> None:
    embedder = nn.Sequential(nn.ModuleDict({"auto_model": tiny_model("llama", num_hidden_layers=1)}))
    with pytest.raises(AutodistError, match=r"a Sequential: give its module 0\.auto_model"):
        adx.compile(embedder, tp=2)
