"""A rank's cache has its stage's layers, each of its own kind."""

import torch
from transformers import LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from autodist_fx.runtime.cache.growing_layer import GrowingLayer
from autodist_fx.runtime.cache.kv_cache import SplitCache, local_cache
from cost_model.mesh import Mesh
from passes.program.rank_program import RankProgram


def program(cache_layers):
    return RankProgram(0, Mesh(), torch.fx.GraphModule({}, torch.fx.Graph()), (), {}, cache_layers)


def test_only_the_layers_of_the_stage():
    cache = local_cache(LlamaConfig(num_hidden_layers=5), program((2, 3)))
    assert [type(layer) for layer in cache.layers] == [GrowingLayer] * 2
    assert local_cache(LlamaConfig(num_hidden_layers=5), program(())).layers == []


def test_sliding_layers_stay_sliding():
    config = MistralConfig(num_hidden_layers=4, sliding_window=8)
    config.layer_types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    cache = local_cache(config, program((1, 2)))
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, GrowingLayer]
    assert cache.layers[0].sliding_window == 8


def test_layers_that_count_tokens_are_changed_as_others_are():
    """A stage without attention, which is asked where positions begin."""
    split = RankProgram(0, Mesh(), torch.fx.GraphModule({}, torch.fx.Graph()), (), {}, (), (), ("full", "sliding:2"))
    cache = local_cache(LlamaConfig(num_hidden_layers=5), split, SplitCache)
    lengths = []
    for tokens in (torch.zeros(2, 3), torch.zeros(2, 1)):
        cache.note(tokens)
        lengths.append([cache.get_seq_length(layer) for layer in (0, 1)])
    assert lengths == [[3, 3], [4, 4]]
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    cache.note(torch.zeros(3, 1))
    assert [cache.get_seq_length(layer) for layer in (0, 1)] == [5, 5]
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(3, 1, 5, 1), (3, 1, 1, 1)]
