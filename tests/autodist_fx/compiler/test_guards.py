"""Guards on sizes: a call at which one comes out otherwise than in the traced graph has a graph of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, T5ForConditionalGeneration
from transformers.modeling_outputs import CausalLMOutputWithPast

import autodist_fx as adx
from autodist_fx.calls.cache_names import CACHE_FIELD
from autodist_fx.calls.lengths import with_total
from autodist_fx.compiler.guard_examples import examples_like
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.comm.process_group import JoinedRank
from autodist_fx.simulation.thread_communicator import ThreadWorld
from autodist_fx.startup.from_artifact import share
from cost_model.mesh import Mesh
from passes.fx.guards import Guards
from tests.support.models import randomized, relative_error, tiny_config
from tests.support.ranks import on_ranks
from tests.support.seq2seq import tiny_seq2seq

IDS = torch.arange(3, 21).view(2, 9)


class Doubling(LlamaForCausalLM):
    """Takes another way where there are few tokens, and another one where they come in fours."""

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **keywords):
        given = {"attention_mask": attention_mask, "past_key_values": past_key_values}
        output = super().forward(input_ids=input_ids, **given, **keywords)
        if input_ids.shape[1] < 6:
            output.logits = output.logits * 2
        if input_ids.shape[1] % 4 == 0:
            output.logits = output.logits + 3
        return output


class DoublingByPosition(LlamaForCausalLM):
    """Asks a tensor that holds a length."""

    def forward(self, input_ids=None, attention_mask=None, **keywords):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **keywords)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        if positions[-1] + 1 < 6:
            output.logits = output.logits * 2
        return output


class Remembering(LlamaForCausalLM):
    """Computes otherwise on what is cached, in its layers, too. Its cache comes under transformers 5's name, or 4's."""

    def forward(
        self, input_ids=None, attention_mask=None, past_key_values=None, cache=None, inputs_embeds=None, **keywords
    ):
        embeds, past = self.model.embed_tokens(input_ids), 0
        past_key_values = past_key_values if cache is None else cache
        if past_key_values is not None:
            past = past_key_values.get_seq_length()
        if past > 0:
            embeds = embeds * 2
        output = super().forward(
            inputs_embeds=embeds, attention_mask=attention_mask, past_key_values=past_key_values, **keywords
        )
        if past + input_ids.shape[1] > 7:
            output.logits = output.logits * torch.linspace(-2, 2, output.logits.shape[-1])
        return output


class AskingALayer(LlamaForCausalLM):
    """Computes otherwise where a layer of its cache holds something."""

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **keywords):
        layers = () if past_key_values is None else past_key_values.layers
        held = len(layers) > 1 and layers[1].is_initialized and layers[1].keys.numel() > 0
        output = super().forward(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **keywords
        )
        if held:
            output.logits = output.logits.flip(-1)
        return output


class Looking(T5ForConditionalGeneration):
    """Reads long inputs otherwise, and writes otherwise after some tokens."""

    def forward(
        self, input_ids=None, attention_mask=None, decoder_input_ids=None, past_key_values=None, cache=None, **keywords
    ):
        embeds = self.shared(input_ids)
        past_key_values = past_key_values if cache is None else cache
        if input_ids.shape[1] > 6:
            embeds = embeds.flip(-1)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        output = super().forward(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            past_key_values=past_key_values,
            **keywords,
        )
        if past > 2:
            output.logits = output.logits.flip(-1)
        return output


class Unsure(LlamaForCausalLM):
    """Its other way cannot be traced."""

    def forward(self, input_ids=None, past_key_values=None, cache=None, **keywords):
        past_key_values = past_key_values if cache is None else cache
        output = super().forward(input_ids=input_ids, past_key_values=past_key_values, **keywords)
        if input_ids.shape[1] < 6 and bool((output.logits > 0).any()):
            output.logits = output.logits * 2
        return output


def model_of(cls: type[LlamaForCausalLM]) -> Any:
    return randomized(cls(tiny_config("llama")).double().eval())


@pytest.mark.drawn(1)
@pytest.mark.parametrize(("kind", "ways"), [(Doubling, 4), (DoublingByPosition, 2)])
@torch.no_grad()
def test_whole_sequences_of_any_length(kind: type[LlamaForCausalLM], ways: int) -> None:
    model = model_of(kind)
    compiled = adx.compile(model, tp=2, pp=2, input_names=("input_ids",))
    for length in (9, 5, 8, 4, 7, 3):
        ids = IDS[:, :length]
        found, expected = compiled.simulate(input_ids=ids).logits, model(input_ids=ids).logits
        assert relative_error(found, expected) <= 1e-6, length
    assert len(compiled.variants) == ways, "one for each way, and no more"


@pytest.mark.drawn(1)
@pytest.mark.parametrize(("kind", "ways"), [(Remembering, 3), (AskingALayer, 2)])
@torch.no_grad()
def test_guards_on_cached_tokens_choose_variants_that_share_a_cache(kind: type[LlamaForCausalLM], ways: int) -> None:
    model = model_of(kind)
    compiled = adx.compile(model, tp=2, pp=2, use_cache=True)
    theirs, ours = None, None
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 9)):
        expected = model(input_ids=IDS[:, start:stop], past_key_values=theirs, use_cache=True)
        found = compiled.simulate(input_ids=IDS[:, start:stop], past_key_values=ours)
        theirs, ours = expected.past_key_values, found.past_key_values
        assert relative_error(found.logits, expected.logits) <= 1e-6, start
    assert len(compiled.variants) == ways


@pytest.mark.drawn(1)
@pytest.mark.parametrize("mesh", (Mesh(tp=2), Mesh(pp=2)), ids=str)
def test_generating_over_ranks(mesh: Mesh) -> None:
    """The ways change while it generates; whole sequences have theirs, too."""
    model = model_of(Remembering)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2.0 if parameter.dim() > 1 else 1.0
        expected = model.generate(IDS[:, :4], max_new_tokens=7, do_sample=False, pad_token_id=0)
        whole = [model(input_ids=IDS[:, :n], use_cache=False).logits for n in (9, 5)]

    def work(split: Any) -> Any:
        tokens = split.generate(IDS[:, :4], max_new_tokens=7, do_sample=False, pad_token_id=0)
        return tokens, [split(IDS[:, :n]).logits for n in (9, 5)]

    for tokens, logits in on_ranks(model, mesh, work):
        assert tokens.tolist() == expected.tolist()
        for found, wanted in zip(logits, whole, strict=True):
            assert relative_error(found, wanted) <= 1e-6


def looking() -> Any:
    model = tiny_seq2seq("t5", layers=1)
    model.__class__ = Looking
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2.0 if parameter.dim() > 1 else 1.0
    return model


@torch.no_grad()
def test_guards_on_encoder_length_choose_variants() -> None:
    model = looking()
    compiled = adx.compile(model, tp=2, use_cache=True)
    for length, steps in ((5, 5), (8, 2)):
        whole = {"input_ids": IDS[:, :length], "attention_mask": torch.ones(2, length, dtype=torch.long)}
        ours, theirs = None, None
        for at in range(steps):
            step = {**whole, "decoder_input_ids": IDS[:, at : at + 1]}
            cache = theirs.past_key_values if theirs is not None else _new_cache()
            again = {} if theirs is None else {"encoder_outputs": (theirs.encoder_last_hidden_state,)}
            theirs = model(**step, **again, past_key_values=cache, use_cache=True)
            given = step if ours is None else {"decoder_input_ids": step["decoder_input_ids"]}
            ours = compiled.simulate(**given, past_key_values=None if ours is None else ours.past_key_values)
            assert relative_error(ours.logits, theirs.logits) <= 1e-9, (length, at)


def _new_cache() -> Any:
    from transformers import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def test_encoder_and_decoder_over_ranks() -> None:
    model = looking()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        expected = [_generated_by_forward(model, IDS[:, :n]) for n in (5,)]

    def work(split: Any) -> list[list[list[int]]]:
        return [split.generate(IDS[:, :n], **options).tolist() for n in (5,)]

    for tokens in on_ranks(model, Mesh(tp=2), work):
        assert tokens == expected


def _generated_by_forward(model: Any, ids: torch.Tensor) -> list[list[int]]:
    """Greedy; generate itself would call the encoder alone, without what this forward does before it."""
    cache, tokens = _new_cache(), torch.ones(len(ids), 1, dtype=torch.long)
    mask, encoded = torch.ones_like(ids), {}
    for _ in range(5):
        output = model(input_ids=ids, attention_mask=mask, decoder_input_ids=tokens[:, -1:], past_key_values=cache,
                       use_cache=True, **encoded)  # fmt: skip
        encoded = {"encoder_outputs": (output.encoder_last_hidden_state,)}
        logits = output.logits[:, -1].clone()
        logits[:, 2] = -torch.inf  # min_new_tokens
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    return tokens.tolist()


def test_all_ranks_raise_when_a_variant_cannot_be_traced() -> None:
    model = model_of(Unsure)
    expected = model.generate(IDS[:, :7], max_new_tokens=1, do_sample=False, pad_token_id=0)

    def work(split: Any) -> Any:
        messages = []
        for _ in range(2):
            with pytest.raises(AutodistError) as caught:
                split.generate(IDS[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
            messages.append(str(caught.value))
        return messages, split.generate(IDS[:, :7], max_new_tokens=1, do_sample=False, pad_token_id=0)

    for messages, tokens in on_ranks(model, Mesh(tp=2), work):
        assert all(Path(__file__).name in message for message in messages)
        assert tokens.tolist() == expected.tolist()


@torch.no_grad()
def test_an_artifact_holds_the_variants_used_and_refuses_others(tmp_path: Path) -> None:
    model = model_of(Doubling)
    compiled = adx.compile(model, tp=2)
    expected = [compiled.simulate(input_ids=IDS[:, :length]).logits for length in (9, 5)]
    compiled.save(tmp_path / "saved")
    artifact = adx.load(tmp_path / "saved")
    for length, wanted in zip((9, 5), expected, strict=True):
        assert torch.equal(artifact.simulate(input_ids=IDS[:, :length]).logits, wanted)
    with pytest.raises(AutodistError, match=r"tokens: 8.*guards of \w+ at test_guards.py:\d+.*no variant for that"):
        artifact.simulate(input_ids=IDS[:, :8])

    def run(rank: int, communicator: Any) -> list[torch.Tensor]:
        split = share(artifact, JoinedRank(artifact.mesh, rank, torch.device("cpu"), communicator))
        with pytest.raises(AutodistError, match="no variant for that"):
            split.generate(IDS[:, :8], max_new_tokens=2)
        with pytest.raises(AutodistError, match="no variant for that"):
            split(IDS[:, :8])
        return [split(IDS[:, :9]).logits]

    for (logits,) in ThreadWorld(artifact.mesh).run(run):
        assert relative_error(logits, expected[0]) <= 1e-9


# -- choosing example lengths ----------------------------------------------------------------------------------------

USUAL = ({"B": 11, "S": 23, "P": 29}, {"B": 13, "S": 31, "P": 43})


def asked(*questions: str) -> Guards:
    """Makes Guards of Python expressions over S and P."""
    graph = torch.fx.Graph()
    s, p = (graph.placeholder(letter) for letter in "SP")
    graph.output(tuple(eval(question, {"S": torch.fx.Proxy(s), "P": torch.fx.Proxy(p)}).node for question in questions))
    count = len(questions)
    return Guards(torch.fx.GraphModule({}, graph), ("S", "P"), (True,) * count, ("",) * count)


@pytest.mark.drawn(14)
@pytest.mark.parametrize("call", [(1, 5), (6, 0), (8, 0), (3, 64), (2049, 0), (17, 1), (4, 4), (512, 513)])
@pytest.mark.parametrize(
    "questions", [("P > 0",), ("S > 2048", "S + P > 2048"), ("S % 8 == 0",), ("S * P == 16",), ("(S + 7) // 8 > 2",)]
)
def test_examples_answer_as_the_call_does(call: tuple[int, int], questions: tuple[str, ...]) -> None:
    guards, lengths = asked(*questions), with_total({"B": 2, "S": call[0], "P": call[1]})
    first, second, fixed = examples_like([guards], lengths, USUAL)
    for example in (first, second):
        assert guards.answers(example) == guards.answers(lengths)
        assert example["T"] == example["S"] + example["P"]
        assert all(example[letter] == number == lengths[letter] for letter, number in fixed.items())
    steps = [second[k] - first[k] for k in "BSP" if k not in fixed]
    assert 0 not in steps and len(set(steps)) == len(steps)


def test_a_length_is_fixed_only_where_no_two_will_do() -> None:
    lengths = with_total({"B": 2, "S": 6, "P": 0})
    assert examples_like([asked("P > 0")], lengths, USUAL)[2] == {"P": 0}
    assert examples_like([asked("S > 5")], lengths, USUAL)[2] == {}
    assert examples_like([asked("S == 6")], lengths, USUAL)[2] == {"S": 6}


@pytest.mark.skipif(CACHE_FIELD != "cache", reason="transformers 4.57 has the older name")
def test_a_forward_that_generate_would_hand_no_cache_is_refused_on_every_rank() -> None:
    with pytest.raises(AutodistError, match=r"AskingALayer.forward calls its cache past_key_values"):
        on_ranks(model_of(AskingALayer), Mesh(tp=2), lambda split: split.generate(IDS))


class Cut(LlamaForCausalLM):
    """A model that counts what is left of its mask when it is cut at fixed places."""

    cut = slice(None)

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        logits = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs).logits
        return CausalLMOutputWithPast(logits=logits * (1 + attention_mask[:, self.cut].shape[-1]))


@pytest.mark.parametrize("cut", [slice(-6, None), slice(6), slice(4, None), slice(-6, -2)], ids=str)
@torch.no_grad()
def test_slices_with_fixed_bounds_of_sequences_of_any_length(cut):
    model = randomized(Cut(tiny_config("llama"))).double().eval()
    model.cut = cut
    compiled = adx.compile(model, tp=2)
    for tokens in (9, 3, 6, 5, 2, 12):
        ids = torch.randint(5, 50, (2, tokens), generator=torch.Generator().manual_seed(tokens))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert relative_error(compiled.simulate(**inputs).logits, model(**inputs).logits) < 1e-9, tokens
    assert len(compiled.variants) <= 4


class Squeezed(LlamaForCausalLM):
    """A model that computes otherwise where a dim of one element is left out."""

    dims: Any = ()

    def forward(self, input_ids=None, **kwargs):
        logits = super().forward(input_ids=input_ids, **kwargs).logits
        left = torch.squeeze(input=input_ids, dim=1) if self.dims == "by name" else input_ids.squeeze(*self.dims)
        return CausalLMOutputWithPast(logits=logits * (2 + left.dim()) + left.sum(0, keepdim=True).shape[-1])


@pytest.mark.parametrize("dims", [(), (0,), (1,), (-1,), ((0, 1),), "by name"], ids=str)
@torch.no_grad()
def test_squeezed_lengths(dims):
    model = randomized(Squeezed(tiny_config("llama", num_hidden_layers=1))).double().eval()
    model.dims = dims
    compiled = adx.compile(model, tp=2)
    for rows, tokens in ((2, 9), (2, 1), (1, 9), (3, 4), (2, 1), (1, 5)):
        inputs = {"input_ids": IDS.repeat(2, 1)[:rows, :tokens]}
        assert relative_error(compiled.simulate(**inputs).logits, model(**inputs).logits) < 1e-9, (rows, tokens)
    assert len(compiled.variants) <= 5
