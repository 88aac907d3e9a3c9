"""Families that prepare the inputs of a step of generating by code of their own: asked, and followed or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
    XLMRobertaXLConfig,
    XLMRobertaXLForCausalLM,
)

import autodist_fx as adx
from autodist_fx.compiler.generation_traits import last_logits_only
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.comm.process_group import JoinedRank
from autodist_fx.simulation.thread_communicator import ThreadWorld
from autodist_fx.startup.from_artifact import share
from cost_model.mesh import Mesh
from tests.support.models import randomized
from tests.support.ranks import on_ranks

TRAINED = 16  # LongRoPE's original_max_position_embeddings
SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FACTORS = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 3.0, 6.0, 20.0]}
LENGTHS = {"max_position_embeddings": 64, "original_max_position_embeddings": TRAINED}
GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


def _loud(model: PreTrainedModel) -> PreTrainedModel:
    """So that the next token depends on those before, and on where they stand."""
    with torch.no_grad():
        for parameter in randomized(model).parameters():
            parameter *= 2.5 if parameter.dim() > 1 else 1.0
    return model.double().eval()


def phi3() -> PreTrainedModel:
    return _loud(Phi3ForCausalLM(Phi3Config(**SIZES, **LENGTHS, rope_scaling=FACTORS)))


def phimoe() -> PreTrainedModel:
    more = {"rope_type": "longrope", "short_mscale": 1.1, "long_mscale": 1.3}
    more |= {"original_max_position_embeddings": TRAINED}
    return _loud(PhimoeForCausalLM(PhimoeConfig(**SIZES, **LENGTHS, num_local_experts=4, rope_scaling=FACTORS | more)))


def xlm_roberta_xl() -> PreTrainedModel:
    config = XLMRobertaXLConfig(**{**SIZES, "pad_token_id": 1, "bos_token_id": 0}, is_decoder=True,
                                max_position_embeddings=64)  # fmt: skip
    return _loud(XLMRobertaXLForCausalLM(config))


def _ids(tokens: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(3, 61, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def _generated(model: Any, **options: Any) -> list[Any]:
    """From prompts well before the length where the frequencies change, just before, and behind."""
    return [
        model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, **options).tolist()
        for ids in map(_ids, (10, TRAINED, TRAINED + 1))
    ]


@pytest.mark.drawn(1)
@pytest.mark.parametrize("make", [phi3, phimoe, xlm_roberta_xl])
def test_the_same_tokens_as_the_model(make: Any) -> None:
    model = make()
    assert on_ranks(model, Mesh(tp=2), _generated) == [_generated(model)] * 2


def test_the_cache_is_dropped_once_where_the_frequencies_change() -> None:
    """Seen from the steps: one token each, and once the whole sequence."""
    model = phi3()

    def work(split: Any) -> list[int]:
        seen: list[int] = []
        run = split.run_variant

        def noted(step: Any, variant: Any) -> Any:
            seen.append(step.input_ids.shape[1])
            return run(step, variant)

        split.run_variant = noted
        split.generate(_ids(10), attention_mask=torch.ones_like(_ids(10)), **GREEDY)
        return seen

    assert on_ranks(model, Mesh(tp=2), work) == [[10, 1, 1, 1, 1, 1, 1, TRAINED + 1, 1, 1, 1, 1]] * 2


def test_rows_padded_on_the_left_across_that_length_are_those_without_a_cache() -> None:
    """The truth is the model without a cache: transformers 4.57's own step there, of a whole sequence with one
    cache_position, lets padded batches attend to later tokens."""
    model, ids = phi3(), _ids(12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0

    def generated(split: Any) -> list[list[int]]:
        return split.generate(ids, attention_mask=mask, **GREEDY).tolist()

    expected, seen = ids, mask
    with torch.no_grad():
        for _ in range(GREEDY["max_new_tokens"]):
            positions = (seen.cumsum(1) - 1).masked_fill(seen == 0, 1)
            found = model(input_ids=expected, attention_mask=seen, position_ids=positions, use_cache=False).logits
            found[:, -1, SIZES["eos_token_id"]] = -torch.inf  # min_new_tokens
            expected = torch.cat([expected, found[:, -1:].argmax(-1)], 1)
            seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
    assert on_ranks(model, Mesh(tp=2), generated) == [expected.tolist()] * 2


def test_beams_and_an_artifact(tmp_path: Path) -> None:
    model = phi3()
    expected = _generated(model, num_beams=2)
    compiled = adx.compile(model, tp=2, use_cache=True, concrete_args=last_logits_only(model))
    compiled.save(tmp_path / "saved")
    artifact = adx.load(tmp_path / "saved")

    def of_rank(rank: int, communicator: Any) -> list[Any]:
        split = share(artifact, JoinedRank(artifact.mesh, rank, torch.device("cpu"), communicator))
        return _generated(split, num_beams=2)

    assert ThreadWorld(artifact.mesh).run(of_rank) == [expected] * 2


class Biased(Phi3ForCausalLM):
    """Gives its forward something of its own at each step."""

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        found = super().prepare_inputs_for_generation(input_ids, **kwargs)
        return {**found, "head_bias": torch.ones(4)}


def test_an_input_that_no_graph_takes_is_refused_by_name() -> None:
    model = _loud(Biased(Phi3Config(**SIZES)))
    with pytest.raises(AutodistError, match="Biased gives itself head_bias, which the ranks' graphs do not take"):
        on_ranks(model, Mesh(tp=1), lambda split: split.generate(_ids(4), **GREEDY))
