"""generate over ranks (threads here) against generate of the model itself: the same tokens, on every rank."""

import copy
import inspect

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.generation import BaseStreamer, LogitsProcessor

import autodist_fx as adx
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.generation.causal_lm import DistributedCausalLM
from autodist_fx.runtime.generation.guarded_programs import only
from autodist_fx.runtime.generation.step_runner import RunnerParts
from autodist_fx.simulation.thread_communicator import ThreadWorld
from autodist_fx.weights.load import load_rank
from autodist_fx.weights.sources.module_source import ModuleSource

VOCAB = 61


def tiny_llama():
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=128,
        initializer_range=0.4,  # so that the next token depends on the ones before
        pad_token_id=0,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def tiny_gpt2():
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=128, initializer_range=0.4, eos_token_id=2
    )
    config.pad_token_id = 0
    return GPT2LMHeadModel(config)


def tiny_opt():
    config = OPTConfig(
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCAB,
        max_position_embeddings=128,
        init_std=0.4,
        pad_token_id=1,
    )
    return OPTForCausalLM(config)


def tiny_mistral():
    config = MistralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=128,
        initializer_range=0.4,
        sliding_window=6,
        pad_token_id=0,
    )
    return MistralForCausalLM(config)


class Ranks:
    """A model, and the same model split over the threads of a ThreadWorld."""

    def __init__(self, model, tp, pp):
        self.model = model.double().eval()
        fixed = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        compiled = adx.compile(self.model, tp=tp, pp=pp, use_cache=True, concrete_args=fixed)
        self.mesh = compiled.mesh
        self.programs = [compiled.program(rank) for rank in range(self.mesh.size)]
        buffers = dict(compiled.graph.named_buffers(remove_duplicate=False))
        for program in self.programs:
            load_rank(program, ModuleSource(model), buffers=buffers, base_model_prefix=model.base_model_prefix)

    def each(self, work):
        """`work(rank, the rank's DistributedCausalLM)`, by rank."""

        def run(rank, communicator):
            program, config = self.programs[rank], copy.deepcopy(self.model.config)
            return work(rank, DistributedCausalLM(RunnerParts(program, communicator, config), only(program)))

        return ThreadWorld(self.mesh).run(run)

    def same(self, **kwargs):
        """Returns what generate gives, which must be the same on the model and on every rank."""
        torch.manual_seed(7)
        expected = self.model.generate(**kwargs)

        def work(rank, model):
            if model.is_driver:
                torch.manual_seed(7)  # of a process each has its own; threads share one
            return model.generate(**kwargs)

        results = self.each(work)
        for result in results:
            assert torch.equal(result, expected), f"{result.tolist()} instead of {expected.tolist()}"
        return expected


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return Ranks(tiny_llama(), tp=2, pp=2)


def prompts(rows=1, tokens=7):
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(rows + tokens))


def left_padded(lengths=(3, 8, 5)):
    ids, mask = prompts(len(lengths), max(lengths)), torch.ones(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, : max(lengths) - length] = 0
        mask[row, : max(lengths) - length] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_greedy(llama):
    tokens = llama.same(input_ids=prompts(), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert len(set(tokens[0, 7:].tolist())) > 3  # no repetition that any model would give


def test_batch_with_left_padding_and_eos_per_row(llama):
    inputs = left_padded()
    free = llama.same(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=None)
    eos = free[1, 8 + 4].item()  # ends the second row after five tokens at most
    ended = llama.same(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=eos)
    assert (ended[1, 8 + 5 :] == 0).all()


def test_a_prompt_longer_than_one_message(llama):
    llama.same(input_ids=prompts(2, 100), max_new_tokens=4, do_sample=False)


def test_sampling_takes_the_random_numbers_of_one_process(llama):
    llama.same(**left_padded(), max_new_tokens=12, do_sample=True, temperature=1.3, top_k=20, top_p=0.9)


def test_two_samples_of_each_prompt(llama):
    llama.same(input_ids=prompts(2), max_new_tokens=6, do_sample=True, num_return_sequences=2)


def test_beam_search_reorders_every_ranks_cache(llama):
    llama.same(**left_padded(), max_new_tokens=10, num_beams=3, do_sample=False)


def test_without_a_cache(llama):
    llama.same(input_ids=prompts(), max_new_tokens=5, do_sample=False, use_cache=False)


def test_prefill_in_chunks(llama):
    llama.same(input_ids=prompts(2, 11), max_new_tokens=5, do_sample=False, prefill_chunk_size=4)


def letters():
    """A tokenizer of which every id is one character."""
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{chr(64 + i): i for i in range(3, VOCAB)}}
    tokenizer = Tokenizer(BPE(words, [], unk_token="<pad>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def test_stop_strings(llama):
    tokenizer, options = letters(), {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    free = llama.same(input_ids=prompts(), max_new_tokens=12, **options)
    stop = tokenizer.decode(free[0, 7 + 3 : 7 + 5])
    ended = llama.same(
        input_ids=prompts(), max_new_tokens=12, stop_strings=[stop], tokenizer=tokenizer, **options
    )
    assert ended.shape[1] <= 7 + 5 < free.shape[1]


def test_token_healing_which_generates_within_generate(llama):
    llama.same(
        input_ids=prompts(), max_new_tokens=5, do_sample=False, token_healing=True, tokenizer=letters(), pad_token_id=0
    )


def test_processors_that_call_the_model(llama):
    llama.same(input_ids=prompts(), max_new_tokens=6, do_sample=False, guidance_scale=1.5, repetition_penalty=1.2)


@pytest.mark.drawn(2)
@pytest.mark.parametrize(
    ("make", "tp", "pp"),
    [(tiny_gpt2, 2, 1), (tiny_gpt2, 3, 1), (tiny_opt, 1, 2), (tiny_mistral, 2, 2), (tiny_llama, 1, 1)],
)
def test_families(make, tp, pp):
    torch.manual_seed(1)
    ranks = Ranks(make(), tp, pp)
    inputs = left_padded()
    inputs["input_ids"][inputs["attention_mask"] == 0] = ranks.model.config.pad_token_id
    ranks.same(**inputs, max_new_tokens=9, do_sample=False)


class Recorder(BaseStreamer):
    def __init__(self):
        self.said = []

    def put(self, value):
        self.said.append(value.tolist())

    def end(self):
        self.said.append("end")


def test_every_rank_streams_the_same(llama):
    kwargs = {"input_ids": prompts(), "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = Recorder()
    llama.model.generate(**kwargs, streamer=expected)
    streamers = [Recorder() for _ in range(llama.mesh.size)]
    llama.each(lambda rank, model: model.generate(**kwargs, streamer=streamers[rank]))
    assert all(streamer.said == expected.said for streamer in streamers)


def test_scores_are_the_drivers_and_the_sequences_everyones(llama):
    kwargs = {"input_ids": prompts(), "max_new_tokens": 4, "return_dict_in_generate": True, "output_scores": True}
    expected = llama.model.generate(**kwargs, do_sample=False)
    results = llama.each(lambda rank, model: (model.is_driver, model.generate(**kwargs, do_sample=False)))
    for is_driver, result in results:
        assert torch.equal(result.sequences, expected.sequences)
        if is_driver:
            assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(result.scores, expected.scores))


def test_going_on_with_a_cache(llama):
    first = prompts()
    whole = llama.model.generate(input_ids=first, max_new_tokens=12, do_sample=False, eos_token_id=None)

    def work(rank, model):
        cache = model.new_cache()
        half = model.generate(
            input_ids=first, max_new_tokens=6, do_sample=False, eos_token_id=None, past_key_values=cache
        )
        return model.generate(
            input_ids=half, max_new_tokens=6, do_sample=False, eos_token_id=None, past_key_values=cache
        )

    assert all(torch.equal(result, whole) for result in llama.each(work))


def test_calling_the_model(llama):
    ids, more = prompts(2), prompts(2, 1)
    with torch.no_grad():
        expected = llama.model(input_ids=ids)
        expected_more = llama.model(input_ids=more, past_key_values=expected.past_key_values)

    @torch.no_grad()
    def work(rank, model):
        first = model(input_ids=ids)
        second = model(input_ids=more, past_key_values=first.past_key_values)
        model.logits_on_every_rank = True
        return first.logits, second.logits, model(input_ids=ids).logits

    results = llama.each(work)
    for rank, (first, second, shared) in enumerate(results):
        assert torch.allclose(shared, expected.logits[:, -1:], rtol=1e-9)
        if rank < 2:
            assert first is None
        else:
            assert torch.allclose(first, expected.logits[:, -1:], rtol=1e-9)
            assert torch.allclose(second, expected_more.logits, rtol=1e-9)


class Failing(LogitsProcessor):
    def __init__(self, error):
        self.error = error

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > 9:
            raise self.error
        return scores


class Own(Exception):
    pass


@pytest.mark.parametrize("error", [ValueError("no ä"), Own("mine")])
def test_an_error_on_the_driver_is_raised_on_every_rank(llama, error):
    def work(rank, model):
        with pytest.raises(type(error), match=str(error)):
            model.generate(
                input_ids=prompts(),
                max_new_tokens=8,
                do_sample=False,
                eos_token_id=None,
                logits_processor=LogitsProcessorList([Failing(error)]),
            )
        return model.generate(input_ids=prompts(), max_new_tokens=3, do_sample=False)  # all are still in step

    results = llama.each(work)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompt_lookup_num_tokens": 2}, "assisted generation"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"no_such_option": 1}, "no_such_option"),
        ({"cache_implementation": "quantized"}, "quantized"),
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "starts from input_ids"),
        ({"token_type_ids": torch.zeros(1, 7, dtype=torch.long)}, "return_token_type_ids=False"),
    ],
)
def test_refused_arguments_raise_on_every_rank(llama, kwargs, message):
    def work(rank, model):
        with pytest.raises((AutodistError, ValueError), match=message):
            model.generate(input_ids=prompts(), max_new_tokens=3, **kwargs)

    llama.each(work)


def test_a_position_that_the_table_has_not_is_named():
    def work(rank, model):
        with pytest.raises(AutodistError, match=r"holds 128, and transformer.wpe has 128 rows: 0 to 127 are allowed"):
            model.generate(input_ids=prompts(1, 130), max_new_tokens=2)

    Ranks(tiny_gpt2(), 1, 1).each(work)


def test_an_error_in_a_graph_names_the_node_and_its_inputs():
    ranks = Ranks(tiny_gpt2(), 1, 1)
    [notes] = ranks.each(lambda rank, model: _notes(model, prompts(1, 8)))
    [note] = notes
    assert "on rank 0, in transformer_wpe : f64[B, S, 32] = transformer.wpe(" in note
    assert "which was given int64[1, 8] from 0 to 7" in note


def _notes(model, ids):
    def forward(positions):
        raise ValueError("of a module's own")

    model.graph_module.get_submodule("transformer.wpe").forward = forward
    with pytest.raises(ValueError, match="of a module's own") as raised:
        model.generate(input_ids=ids, max_new_tokens=2)
    return raised.value.__notes__
