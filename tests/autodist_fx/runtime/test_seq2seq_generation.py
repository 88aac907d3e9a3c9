"""generate of encoder-decoder models over ranks (threads here): the tokens of the model itself, on every rank."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

import autodist_fx as adx
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.generation.guarded_programs import only
from autodist_fx.runtime.generation.seq2seq_lm import seq2seq_class
from autodist_fx.runtime.generation.step_runner import RunnerParts
from autodist_fx.simulation.thread_communicator import ThreadWorld
from autodist_fx.tracing import meta_copy
from autodist_fx.weights.load import load_rank
from autodist_fx.weights.share import share_weights
from autodist_fx.weights.sources.module_source import ModuleSource
from tests.support.seq2seq import seq2seq_inputs, tiny_seq2seq


class Ranks:
    """A model, and the same model split over the threads of a ThreadWorld."""

    def __init__(self, family: str, tp: int, pp: int, **changes: Any) -> None:
        # Large tables, so that the next token depends on the ones before.
        self.model = tiny_seq2seq(family, **changes)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter *= 2.5 if parameter.dim() > 1 else 1.0
        compiled = adx.compile(self.model, tp=tp, pp=pp, use_cache=True)
        self.mesh = compiled.mesh
        self.programs = []
        source = ModuleSource(self.model)
        for rank in range(self.mesh.size):
            program, encoder = compiled.program(rank), compiled.encoder_program(rank)
            assert encoder is not None
            load_rank(program, source, buffers=compiled.buffers, base_model_prefix=self.model.base_model_prefix)
            left = share_weights(program, encoder)
            load_rank(left, source, buffers=compiled.buffers, base_model_prefix=self.model.base_model_prefix)
            self.programs.append((program, encoder))

    def each(self, work: Callable[[int, Any], Any]) -> list[Any]:
        """`work(rank, the rank's model)`, by rank."""

        def run(rank: int, communicator: Any) -> Any:
            program, encoder = self.programs[rank]
            config, generation_config = map(copy.deepcopy, (self.model.config, self.model.generation_config))
            split = seq2seq_class(type(self.model))(
                RunnerParts(program, communicator, config, generation_config),
                only((encoder, program)),
                encoder=encoder,
                main_input_name=self.model.main_input_name,
                skeleton=meta_copy(self.model) if "Whisper" in type(self.model).__name__ else None,
            )
            return work(rank, split)

        return ThreadWorld(self.mesh).run(run)

    def same(self, **kwargs: Any) -> torch.Tensor:
        """Returns what generate gives, which must be the same on the model and on every rank."""
        torch.manual_seed(7)
        expected = self.model.generate(**kwargs)

        def work(rank: int, model: Any) -> torch.Tensor:
            if model.is_driver:
                torch.manual_seed(7)  # of a process each has its own; threads share one
            return model.generate(**kwargs)

        for result in self.each(work):
            assert torch.equal(result, expected), f"{result.tolist()} instead of {expected.tolist()}"
        return expected


def prompt(model: Any) -> dict[str, torch.Tensor]:
    """Returns what the encoder reads: three sequences, one with padding."""
    inputs = seq2seq_inputs(model, batch=3)
    return {name: value for name, value in inputs.items() if not name.startswith("decoder_")}


@pytest.fixture(scope="module", params=[("t5", 2, 1), ("t5", 2, 2), ("bart", 1, 2), ("t5", 1, 5)], ids=str)
def ranks(request: pytest.FixtureRequest) -> Ranks:
    return Ranks(*request.param)


@pytest.mark.drawn(2)
def test_greedy_with_padding_and_early_ends(ranks: Ranks) -> None:
    given = {**prompt(ranks.model), "max_new_tokens": 12, "do_sample": False}
    tokens = ranks.same(**given)
    assert len({tuple(row) for row in tokens.tolist()}) == 3  # the rows differ: each reads its own input
    ends = tokens[:, 4].tolist()
    shorter = ranks.same(**given, eos_token_id=ends)
    assert shorter.tolist() != tokens.tolist()


def test_no_mask(ranks: Ranks) -> None:
    ids = prompt(ranks.model)["input_ids"]
    expected = ranks.model.generate(ids, max_new_tokens=5, do_sample=False)

    def work(rank: int, model: Any) -> torch.Tensor:
        model._prepare_attention_mask_for_generation = lambda *_: None  # which makes one for any prompt
        return model.generate(ids, max_new_tokens=5, do_sample=False)

    assert all(torch.equal(result, expected) for result in ranks.each(work))


def test_sampling_and_several_answers(ranks: Ranks) -> None:
    ranks.same(**prompt(ranks.model), max_new_tokens=8, do_sample=True, num_return_sequences=2, top_k=20)


def test_beams(ranks: Ranks) -> None:
    """Each row of what the encoder gave is read by three beams, which change places."""
    ranks.same(**prompt(ranks.model), max_new_tokens=8, num_beams=3, num_return_sequences=2, do_sample=False)


def test_a_start_of_the_answer_and_no_cache(ranks: Ranks) -> None:
    start = torch.tensor([[1, 5, 6], [1, 7, 8], [1, 9, 10]])
    given = {**prompt(ranks.model), "decoder_input_ids": start, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(ranks.same(**given), ranks.same(**given, use_cache=False))


def test_the_encoder_runs_once(ranks: Ranks) -> None:
    def work(rank: int, model: Any) -> tuple[int, int]:
        calls = [0, 0]
        for position, module in enumerate((model.encoder_module, model.graph_module)):
            module.register_forward_pre_hook(lambda *_, at=position: calls.__setitem__(at, calls[at] + 1))
        model.generate(**prompt(ranks.model), max_new_tokens=5, min_new_tokens=5, do_sample=False)
        return calls[0], calls[1]

    assert ranks.each(work) == [(1, 5)] * ranks.mesh.size


@torch.no_grad()
def test_logits_of_a_whole_sequence_and_step_by_step(ranks: Ranks) -> None:
    inputs = seq2seq_inputs(ranks.model, batch=3)
    inputs.pop("decoder_attention_mask")
    expected = ranks.model(**inputs, use_cache=False).logits

    def work(rank: int, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        whole = model(**inputs).logits
        given = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
        encoded = model.get_encoder()(**given)
        ids, cache, steps = inputs["decoder_input_ids"], model.new_cache(), []
        for at in range(ids.shape[1]):
            step = model(encoder_outputs=encoded, decoder_input_ids=ids[:, at : at + 1], past_key_values=cache)
            steps.append(step.logits)
        return whole, torch.cat(steps, 1)

    for whole, steps in ranks.each(work):
        torch.testing.assert_close(whole, expected)
        torch.testing.assert_close(steps, expected)


def test_a_streamer_gets_the_tokens_on_every_rank() -> None:
    class Kept(BaseStreamer):
        def __init__(self) -> None:
            self.got: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.got += value.flatten().tolist()

        def end(self) -> None:
            self.got.append(-1)

    ranks = Ranks("t5", 2, 1)
    given = {name: value[1:2] for name, value in prompt(ranks.model).items()}
    given |= {"max_new_tokens": 6, "do_sample": False}
    expected = [*ranks.model.generate(**given)[0].tolist(), -1]

    def work(rank: int, model: Any) -> list[int]:
        streamer = Kept()
        model.generate(**given, streamer=streamer)
        return streamer.got

    assert ranks.each(work) == [expected] * 2


def test_an_error_of_the_driver_is_raised_on_all_ranks() -> None:
    ranks = Ranks("bart", 2, 1)

    def work(rank: int, model: Any) -> None:
        with pytest.raises(ValueError, match="model_kwargs"):
            model.generate(**prompt(ranks.model), no_such_option=1)
        with pytest.raises(AutodistError, match="nothing for the decoder to read"):
            model(decoder_input_ids=torch.ones(1, 1, dtype=torch.long))

    ranks.each(work)


def test_speech() -> None:
    """Spectrograms, and a generate of the family's own, which cuts recordings into segments."""
    ranks = Ranks("whisper", 2, 2)
    features = prompt(ranks.model)["input_features"]
    ranks.same(input_features=features, max_new_tokens=8, do_sample=False)
