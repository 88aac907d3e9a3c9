"""A rank's runtime class is chosen in one place: a model and its artifact become the same, with the same plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Lfm2Config, Lfm2ForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

import autodist_fx as adx
from autodist_fx.api.artifact import Artifact
from autodist_fx.calls.cache_names import CACHE_FIELD
from autodist_fx.compiler.compile_options import CompileOptions
from autodist_fx.compiler.generation_traits import follow_mask, last_logits_only
from autodist_fx.runtime.comm.alone_communicator import AloneCommunicator
from autodist_fx.runtime.comm.process_group import JoinedRank
from autodist_fx.runtime.generation.causal_lm import DistributedCausalLM
from autodist_fx.runtime.generation.recurrent_lm import DistributedOwnCacheLM
from autodist_fx.runtime.generation.seq2seq_lm import DistributedSeq2SeqLM
from autodist_fx.startup.from_artifact import share
from autodist_fx.startup.from_checkpoint import distribute
from autodist_fx.startup.rank import RankStartup
from autodist_fx.weights.sources.module_source import ModuleSource
from cost_model.costs.hardware import CPU_GLOO
from cost_model.mesh import Mesh
from cost_model.request.plan_request import PlanRequest
from tests.support.models import randomized, tiny_config, tiny_model
from tests.support.seq2seq import tiny_seq2seq

IDS = torch.arange(3, 21).view(2, 9)
REQUEST = PlanRequest(Mesh(), CPU_GLOO)


def alone() -> JoinedRank:
    return JoinedRank(Mesh(), 0, torch.device("cpu"), AloneCommunicator())


def saved(model: PreTrainedModel, directory: Path) -> Artifact:
    asked = last_logits_only(model)
    adx.compile(model, use_cache=True, concrete_args=asked, hardware="cpu-gloo").save(directory)
    return Artifact(directory)


def lfm2() -> PreTrainedModel:
    config = Lfm2Config(
        vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
        intermediate_size=31, layer_types=["conv", "full_attention"], pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return randomized(Lfm2ForCausalLM(config).eval())


@pytest.mark.drawn(2)
@pytest.mark.parametrize(
    ("make", "kind", "name"),
    [
        (lambda: tiny_model("llama"), DistributedCausalLM, "LlamaForCausalLM"),
        (lambda: tiny_seq2seq("t5"), DistributedSeq2SeqLM, "T5ForConditionalGeneration"),
        (lambda: tiny_seq2seq("whisper"), WhisperGenerationMixin, "WhisperForConditionalGeneration"),
        (lfm2, DistributedOwnCacheLM, "Lfm2ForCausalLM"),
    ],
    ids=["decoder", "encoder and decoder", "a generate of its own", "a cache of its own"],
)
@torch.no_grad()
def test_a_model_and_its_artifact_become_the_same(make, kind: type, name: str, tmp_path: Path) -> None:
    model = make()
    of_model = distribute(model, alone(), REQUEST, CompileOptions())
    of_artifact = share(saved(model, tmp_path / "saved"), alone())
    for split in (of_model, of_artifact):
        assert isinstance(split, kind) and type(split).__name__ == name  # by which libraries know it
        assert split.positions_follow_mask == follow_mask(type(model))
        held = {p.data_ptr(): p.numel() * p.element_size() for p in split.parameters()}  # both programs' is one tensor
        assert split.load_report.shard_bytes >= sum(held.values()) > 0
    assert of_model.plan == of_artifact.plan


class Doubling(LlamaForCausalLM):
    """Takes another way where there are few tokens."""

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, cache=None, **keywords):
        given = {"attention_mask": attention_mask, CACHE_FIELD: cache if past_key_values is None else past_key_values}
        output = super().forward(input_ids=input_ids, **given, **keywords)
        if input_ids.shape[1] < 6:
            output.logits = output.logits.flip(-1)
        return output


@torch.no_grad()
def test_what_an_artifact_lacks_is_made_where_the_model_is_at_hand(tmp_path: Path) -> None:
    """As for an entry of the cache, whose checkpoint is there."""
    model = randomized(Doubling(tiny_config("llama")).double().eval())
    artifact = saved(model, tmp_path / "saved")
    opened = []

    def maker() -> RankStartup:
        opened.append(1)
        return RankStartup(model, lambda: ModuleSource(model), alone(), REQUEST, CompileOptions())

    split = share(artifact, alone(), maker)
    assert not opened, "nothing is made before it is asked for"
    for length in (9, 4):  # the steps after a prompt are of one token, and take the other way
        ids = IDS[:, :length]
        given = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(split.generate(ids, **given), model.generate(ids, **given))
        torch.testing.assert_close(split(ids).logits, model(ids).logits, rtol=1e-9, atol=1e-9)
    assert opened
