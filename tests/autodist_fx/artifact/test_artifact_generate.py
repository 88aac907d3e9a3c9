"""generate from an artifact (ranks are threads here): the tokens of the model itself, on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Lfm2Config, Lfm2ForCausalLM, PreTrainedModel, RwkvConfig, RwkvForCausalLM

import autodist_fx as adx
from autodist_fx.api.artifact import Artifact
from autodist_fx.runtime.comm.process_group import JoinedRank
from autodist_fx.simulation.thread_communicator import ThreadWorld
from autodist_fx.startup.from_artifact import share
from tests.support.models import randomized, relative_error, tiny_model
from tests.support.seq2seq import seq2seq_inputs, tiny_seq2seq

IDS = torch.tensor([[9, 10, 11, 12, 13], [0, 0, 14, 15, 16]])
TEXT = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}


def _on_each_rank(directory: Path, work: Any) -> list[Any]:
    def run(rank: int, communicator: Any) -> Any:
        artifact = Artifact(directory)
        return work(share(artifact, JoinedRank(artifact.mesh, rank, torch.device("cpu"), communicator)))

    return ThreadWorld(Artifact(directory).mesh).run(run)


def _same_tokens(model: PreTrainedModel, directory: Path, given: dict[str, Any]) -> None:
    wanted = model.generate(**given).tolist()
    assert all(got.tolist() == wanted for got in _on_each_rank(directory, lambda split: split.generate(**given)))


@torch.no_grad()
def test_a_decoder(tmp_path: Path) -> None:
    """A model that was compiled for whole sequences is saved with what generating takes."""
    model = tiny_model("llama", dtype=torch.float32, num_attention_heads=9, num_key_value_heads=3, hidden_size=72)
    adx.compile(model, tp=2, pp=2).save(tmp_path / "saved")
    _same_tokens(model, tmp_path / "saved", {**TEXT, "max_new_tokens": 6, "do_sample": False})
    _same_tokens(model, tmp_path / "saved", {**TEXT, "max_new_tokens": 6, "num_beams": 3})
    for logits in _on_each_rank(tmp_path / "saved", lambda split: split(**TEXT).logits):
        torch.testing.assert_close(logits, model(**TEXT).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(adx.AutodistError, match=r"no variant for a call with inputs_embeds .it has .*attention_mask"):
        _on_each_rank(tmp_path / "saved", lambda split: split(inputs_embeds=torch.zeros(1, 2, 72)))


@pytest.mark.drawn(1)
@pytest.mark.parametrize("family", ["t5", "whisper"])  # the latter with a generate of its own
@torch.no_grad()
def test_encoder_decoders(family: str, tmp_path: Path) -> None:
    model = tiny_seq2seq(family, dtype=torch.float32)
    for parameter in model.parameters():
        parameter *= 2.5 if parameter.dim() > 1 else 1.0  # so that the next token depends on the ones before
    adx.compile(model, tp=2, pp=2, use_cache=True).save(tmp_path / "saved")
    given = {name: x for name, x in seq2seq_inputs(model).items() if not name.startswith("decoder_")}
    _same_tokens(model, tmp_path / "saved", {**given, "max_new_tokens": 6, "do_sample": False})


@torch.no_grad()
def test_a_cache_of_the_models_own(tmp_path: Path) -> None:
    config = Lfm2Config(
        vocab_size=61, hidden_size=24, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
        intermediate_size=31, layer_types=["conv", "full_attention", "conv"], pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model = randomized(Lfm2ForCausalLM(config).eval())
    adx.compile(model, tp=2, pp=2).save(tmp_path / "saved")
    _same_tokens(model, tmp_path / "saved", {**TEXT, "max_new_tokens": 6, "do_sample": False})


@torch.no_grad()
def test_a_loop_over_a_prompt(tmp_path: Path) -> None:
    config = RwkvConfig(
        vocab_size=61, hidden_size=24, num_hidden_layers=2, attention_hidden_size=24, context_length=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = randomized(RwkvForCausalLM(config).eval())
    adx.compile(model, pp=2, use_cache=True).save(tmp_path / "saved")
    given = {"input_ids": IDS[:1], "max_new_tokens": 6, "do_sample": False}
    _same_tokens(model, tmp_path / "saved", given)


@torch.no_grad()
def test_a_model_without_generation_is_called(tmp_path: Path) -> None:
    from tests.support.encoders import tiny_encoder

    model = tiny_encoder("BertModel", "bert")
    adx.compile(model, tp=2, input_names=("input_ids",)).save(tmp_path / "saved")

    def call(split: Any) -> torch.Tensor:
        with pytest.raises(adx.AutodistError, match="BertModel was split without a cache"):
            split.generate(IDS)
        return split(IDS).last_hidden_state

    for found in _on_each_rank(tmp_path / "saved", call):
        assert relative_error(found, model(IDS).last_hidden_state) <= 1e-9
