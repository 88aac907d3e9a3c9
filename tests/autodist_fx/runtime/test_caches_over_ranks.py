"""A cache that is handed from call to call over ranks (threads here) is what it is to the model itself, on either
version of transformers: under both of its names, cropped, reset, with rows chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer

from autodist_fx.calls.cache_names import CACHE_FIELD, cache_of
from autodist_fx.errors import AutodistError
from cost_model.mesh import Mesh
from tests.support.models import tiny_model
from tests.support.ranks import on_ranks

IDS = torch.randint(3, 100, (2, 6), generator=torch.Generator().manual_seed(6))
MORE = torch.randint(3, 100, (2, 3), generator=torch.Generator().manual_seed(3))
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
LENGTH = {"num_hidden_layers": 2, "max_position_embeddings": 128}


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama", **LENGTH)


def shorter(cache: Any, tokens: int) -> None:
    """Crop as the installed transformers means it: to a length, or (5) by a number of tokens."""
    by_number = "tokens_to_remove" in DynamicLayer.crop.__code__.co_varnames
    cache.crop(-tokens if by_number else cache.get_seq_length() - tokens)


def turns(model: Any, cache: Any) -> list[list[list[int]]]:
    """Three turns that share a cache, the second of which is taken back before the third."""
    first = model.generate(IDS, **GREEDY, **{CACHE_FIELD: cache})
    second = model.generate(torch.cat([first, MORE], 1), **GREEDY, **{CACHE_FIELD: cache})
    shorter(cache, 5 + MORE.shape[1])
    third = model.generate(torch.cat([first, MORE.flip(1)], 1), **GREEDY, num_beams=1, **{CACHE_FIELD: cache})
    return [x.tolist() for x in (first, second, third)]


@pytest.mark.drawn(1)
@pytest.mark.parametrize("mesh", [Mesh(tp=2), Mesh(pp=3)], ids=str)
def test_turns_that_share_a_cache_and_take_one_back(mesh: Mesh, llama: PreTrainedModel) -> None:
    """On 3 stages of 2 layers, one has no cache layer to ask."""
    assert on_ranks(llama, mesh, lambda split: turns(split, split.new_cache())) == [
        turns(llama, DynamicCache(config=llama.config))
    ] * mesh.size


def test_either_name_and_never_both(llama: PreTrainedModel) -> None:
    expected = llama.generate(IDS, **GREEDY).tolist()
    whole = llama(torch.cat([IDS, MORE], 1)).logits[:, -1:]

    def work(split: Any) -> list[Any]:
        generated = [split.generate(IDS, **GREEDY, **{name: split.new_cache()}).tolist()
                     for name in ("cache", "past_key_values")]  # fmt: skip
        for name in ("cache", "past_key_values"):
            first = split(input_ids=IDS, use_cache=True)
            second = split(input_ids=MORE, **{name: cache_of(first)})
            torch.testing.assert_close(second.logits, whole)
        with pytest.raises(AutodistError, match="both past_key_values and cache: pass one of them"):
            split(input_ids=IDS, cache=split.new_cache(), past_key_values=split.new_cache())
        return generated

    assert on_ranks(llama, Mesh(tp=2), work) == [[expected] * 2] * 2


def test_a_window_that_was_passed_cannot_be_cropped_on_any_rank() -> None:
    """Nor on a stage that has full layers alone, which could."""
    config = {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True, "sliding_window": 4}
    model = tiny_model("qwen2", **LENGTH)
    for name, value in config.items():
        setattr(model.config, name, value)
    model = type(model)(model.config).double().eval()

    def work(split: Any) -> int:
        cache = cache_of(split(input_ids=IDS, use_cache=True))
        with pytest.raises((RuntimeError, ValueError), match=r"crop"):
            shorter(cache, 2)
        return int(cache.get_seq_length())

    assert on_ranks(model, Mesh(pp=2), work) == [6, 6]


def test_rows_are_chosen_and_repeated(llama: PreTrainedModel) -> None:
    rows = torch.tensor([1, 0])
    cache = DynamicCache(config=llama.config)
    llama(IDS, **{CACHE_FIELD: cache})
    cache.batch_select_indices(rows)
    cache.batch_repeat_interleave(2)
    expected = llama(MORE.repeat(2, 1), **{CACHE_FIELD: cache}).logits[:, -1:]

    def work(split: Any) -> None:
        kept = cache_of(split(input_ids=IDS, use_cache=True))
        kept.batch_select_indices(rows)
        kept.batch_repeat_interleave(2)
        torch.testing.assert_close(split(input_ids=MORE.repeat(2, 1), cache=kept).logits, expected)

    on_ranks(llama, Mesh(tp=2), work)


def test_a_cache_that_was_reset_is_as_long_on_every_rank_as_transformers_leaves_it(llama: PreTrainedModel) -> None:
    cache = DynamicCache(config=llama.config)
    llama(IDS, **{CACHE_FIELD: cache})
    cache.reset()

    def work(split: Any) -> int:
        kept = cache_of(split(input_ids=IDS, use_cache=True))
        kept.reset()
        return int(kept.get_seq_length())

    assert on_ranks(llama, Mesh(pp=3), work) == [cache.get_seq_length()] * 3


def test_static_caches_and_continuous_batching(llama: PreTrainedModel) -> None:
    """A static cache that generate would make is one of the ranks' own; one of one process is refused, and so are
    pages."""
    expected = llama.generate(IDS, **GREEDY).tolist()

    def work(split: Any) -> Any:
        static = StaticCache(llama.config, max_cache_len=32)
        for call in (split, lambda **given: split.generate(**given, **GREEDY)):
            with pytest.raises(AutodistError, match=r"the cache is a StaticCache of one process: use model\.new_cache"):
                call(input_ids=IDS, **{CACHE_FIELD: static})
        for batching in (
            lambda: split.generate_batch(IDS.tolist()),
            lambda: split.init_continuous_batching(),
            lambda: split.continuous_batching_context_manager(),
        ):
            with pytest.raises(AutodistError, match="continuous batching keeps keys and values in pages of one "):
                batching()
        with pytest.raises((AutodistError, ValueError), match=r"continuous batching|paged"):  # 4.57 itself has none
            split.generate(IDS, cache_implementation="paged", **GREEDY)
        return split.generate(IDS, cache_implementation="static", **GREEDY).tolist()

    assert on_ranks(llama, Mesh(tp=2), work) == [expected] * 2
