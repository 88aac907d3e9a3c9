"""A saved and loaded model computes, bit for bit, what it did before: every family, with and without a cache."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import autodist_fx as adx
from autodist_fx.api.compiled_model import CompiledModel
from autodist_fx.artifact.directory import new_directory
from tests.support.encoders import text_batch, tiny_encoder
from tests.support.models import FAMILIES, padded_batch, tiny_model
from tests.support.moe import tiny_moe_model
from tests.support.seq2seq import seq2seq_inputs, tiny_seq2seq
from tests.support.state_space import state_space_model

MOE = ("mixtral", "deepseek_v2", "gpt_oss")  # loops over hit experts, runs of rows, all tokens to all experts


def _decoded(compiled: Any, ids: torch.Tensor, mask: torch.Tensor, prompt: int = 5) -> list[torch.Tensor]:
    cache, logits = None, []
    for start, stop in [(0, prompt), *((at, at + 1) for at in range(prompt, ids.shape[1]))]:
        step = compiled.simulate(input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
        cache = step.past_key_values
        logits.append(step.logits)
    return logits


def _reloaded(compiled: CompiledModel, directory: Path) -> adx.Artifact:
    compiled.save(directory)
    artifact = adx.load(directory)
    assert isinstance(artifact, adx.Artifact)
    assert artifact.plan == compiled.plan
    artifact.verify()
    return artifact


@pytest.mark.drawn(2)
@pytest.mark.parametrize("family", [*FAMILIES, *MOE])
@torch.no_grad()
def test_decoders(family: str, tmp_path: Path) -> None:
    model = tiny_moe_model(family) if family in MOE else tiny_model(family)
    ids, mask = padded_batch()
    compiled = adx.compile(model, tp=2, pp=2, use_cache=True)
    before = compiled.simulate(input_ids=ids, attention_mask=mask).logits
    decoded = _decoded(compiled, ids, mask)
    artifact = _reloaded(compiled, tmp_path / "saved")
    assert torch.equal(artifact.simulate(input_ids=ids, attention_mask=mask).logits, before)
    for after, then in zip(_decoded(artifact, ids, mask), decoded, strict=True):
        assert torch.equal(after, then)
    assert {saved.name for saved in artifact.variants.values()} == {"decode", "whole"}
    for rank in range(4):
        assert artifact.rank(rank).code == compiled.rank(rank).code


@torch.no_grad()
def test_experts_that_are_dealt_to_ranks(tmp_path: Path) -> None:
    """A rank has the nodes of its own experts alone; verify knows what stands for what."""
    four = {"num_hidden_layers": 1, "n_routed_experts": 4}
    compiled = adx.compile(tiny_moe_model("deepseek_v2", **four), tp=2, use_cache=True)
    rank_has_own = "experts(" if importlib.util.find_spec("transformers.integrations.moe") else "join_own_rows"
    assert rank_has_own in compiled.rank(0).code
    ids, mask = padded_batch()
    before = _decoded(compiled, ids, mask)
    artifact = _reloaded(compiled, tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(_decoded(artifact, ids, mask), before, strict=True))


@pytest.mark.drawn(2)
@pytest.mark.parametrize("family", ["t5", "bart", "m2m_100", "whisper", "t5gemma"])
@torch.no_grad()
def test_encoder_decoders(family: str, tmp_path: Path) -> None:
    """Two programs a rank, of one plan."""
    model = tiny_seq2seq(family)
    inputs = seq2seq_inputs(model)
    inputs.pop("decoder_attention_mask", None)
    ids = inputs.pop("decoder_input_ids")
    compiled = adx.compile(model, tp=2, pp=2, use_cache=True)

    def run(split: Any) -> list[torch.Tensor]:
        first = split.simulate(**inputs, decoder_input_ids=ids[:, :3], use_cache=True)
        second = split.simulate(decoder_input_ids=ids[:, 3:4], past_key_values=first.past_key_values)
        return [first.encoder_last_hidden_state, first.logits, second.logits]

    before = run(compiled)
    artifact = _reloaded(compiled, tmp_path / "saved")
    assert {saved.name for saved in artifact.variants.values()} == {"decode", "encode"}
    assert all(torch.equal(a, b) for a, b in zip(run(artifact), before, strict=True))


@pytest.mark.drawn(1)
@pytest.mark.parametrize("family", ["bamba", "lfm2"])
@torch.no_grad()
def test_models_with_a_cache_of_their_own(family: str, tmp_path: Path) -> None:
    model = state_space_model(family)
    ids, mask = padded_batch(seq=8)
    compiled = adx.compile(model, tp=2, pp=2, use_cache=True)
    before = _decoded(compiled, ids, mask)
    artifact = _reloaded(compiled, tmp_path / "saved")
    assert {saved.name for saved in artifact.variants.values()} == {"step", "prompt", "whole"}
    assert all(torch.equal(a, b) for a, b in zip(_decoded(artifact, ids, mask), before, strict=True))


@torch.no_grad()
def test_an_encoder(tmp_path: Path) -> None:
    compiled = adx.compile(tiny_encoder("BertForSequenceClassification", "bert"), tp=2, pp=2)
    before = compiled.simulate(**text_batch()).logits
    artifact = _reloaded(compiled, tmp_path / "saved")
    assert torch.equal(artifact.simulate(**text_batch()).logits, before)


_FILL_UNTIL_KILLED = """
import sys, time
from pathlib import Path
from autodist_fx.artifact.directory import new_directory
with new_directory(Path(sys.argv[1])) as staging:
    staging.write("weights.bin", b"x" * 1000)
    print("written", flush=True)
    time.sleep(60)
"""


def test_scratch_of_a_killed_process_is_removed_by_the_next_save(tmp_path: Path) -> None:
    target = tmp_path / "saved"
    command = [sys.executable, "-c", _FILL_UNTIL_KILLED, str(target)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == b"written\n"
        processes[0].kill()
        processes[0].wait(10)
        left = list(tmp_path.iterdir())
        assert len(left) == 2 and not target.exists()
        for path in left:
            os.utime(path, (1, 1))
        with new_directory(target) as staging:
            staging.write("a.json", "{}")
        kept = [path for path in tmp_path.iterdir() if path != target]
        assert len(kept) == 1 and (kept[0] / "weights.bin").exists()  # of the process that still writes
        assert [path.name for path in target.iterdir()] == ["a.json"]
    finally:
        for process in processes:
            process.kill()
            process.communicate(timeout=10)


@torch.no_grad()
def test_used_variants_are_saved_and_other_calls_are_refused(tmp_path: Path) -> None:
    model: PreTrainedModel = tiny_model("llama")
    compiled = adx.compile(model, tp=2)
    ids, mask = padded_batch()
    embeds = model.get_input_embeddings()(ids)
    before = compiled.simulate(inputs_embeds=embeds, attention_mask=mask).logits
    artifact = _reloaded(compiled, tmp_path / "saved")
    assert torch.equal(artifact.simulate(inputs_embeds=embeds, attention_mask=mask).logits, before)
    with pytest.raises(adx.AutodistError, match="no variant for a call with input_ids, attention_mask, output_hidden_"):
        artifact.simulate(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    with pytest.raises(adx.AutodistError, match="takes no colour"):
        artifact.simulate(input_ids=ids, colour=1)


@torch.no_grad()
def test_ids_outside_the_vocabulary_are_named_as_before(tmp_path: Path) -> None:
    artifact = _reloaded(adx.compile(tiny_model("llama"), tp=2), tmp_path / "saved")
    ids, mask = padded_batch()
    with pytest.raises(adx.AutodistError, match=r"input_ids holds 128, and model.embed_tokens has 128 rows"):
        artifact.simulate(input_ids=ids.masked_fill(ids == ids[0, 3], 128), attention_mask=mask)
