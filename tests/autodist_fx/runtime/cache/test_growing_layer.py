"""GrowingLayer against transformers' DynamicLayer: the same tokens after any operations, and nobody's view is written
into."""

import copy
import inspect
import random

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from autodist_fx.runtime.cache.growing_layer import GrowingLayer

CROPS_BY_NUMBER_LEFT = "max_length" in inspect.signature(DynamicLayer.crop).parameters  # 4.57


def step(draw, layer, tokens):
    """The same new tokens for every layer that is handed the same `draw`."""
    rows = layer.keys.shape[0] if layer.keys is not None and layer.keys.numel() else 2
    new = [torch.tensor([draw.random() for _ in range(rows * 3 * tokens * size)]) for size in (4, 2)]
    return layer.update(*(x.view(rows, 3, tokens, -1) for x in new))


def crop(layer, tokens):
    layer.crop(layer.get_seq_length() - tokens if CROPS_BY_NUMBER_LEFT else -tokens)


OPERATIONS = (
    lambda draw, layer: step(draw, layer, 1),
    lambda draw, layer: step(draw, layer, 1),
    lambda draw, layer: step(draw, layer, draw.randint(2, 90)),
    lambda draw, layer: crop(layer, 1),
    lambda draw, layer: layer.reorder_cache(torch.tensor([1, 0])),
)


@pytest.mark.parametrize("seed", range(8))
def test_any_operations_in_any_order(seed):
    """Each of several copies of a layer goes on by itself, as copies of transformers' layer do."""
    draw = random.Random(seed)
    layers = [(GrowingLayer(), DynamicLayer())]
    step(random.Random(0), layers[0][0], 5), step(random.Random(0), layers[0][1], 5)
    seen = []
    for number in range(60):
        ours, theirs = pair = draw.choice(layers)
        if draw.random() < 0.1:
            copied = draw.choice((copy.copy, copy.deepcopy))
            layers.append((copied(ours), copied(theirs)))
            continue
        if ours.keys is not None and draw.random() < 0.5:
            seen.append((ours.keys, ours.keys.clone()))
        operation = draw.choice(OPERATIONS)
        for layer in pair:
            operation(random.Random(seed * 1000 + number), layer)
        for one, other in layers:
            assert one.get_seq_length() == other.get_seq_length()
            for name in ("keys", "values"):
                mine, true = getattr(one, name), getattr(other, name)
                assert (mine is None) == (true is None) and (mine is None or torch.equal(mine, true))
        assert all(torch.equal(held, was) for held, was in seen)


def test_a_step_moves_its_own_tokens_alone():
    layer = GrowingLayer()
    step(random.Random(0), layer, 100)
    step(random.Random(1), layer, 1)
    places = {layer.keys.data_ptr()}
    for number in range(20):
        step(random.Random(number), layer, 1)
        places.add(layer.keys.data_ptr())
    assert len(places) == 1 and layer.keys.shape[-2] == 121


def test_gradients_come_back_through_all_steps():
    layer, given = GrowingLayer(), [torch.ones(1, 1, 2, 2, requires_grad=True) for _ in range(3)]
    for x in given:
        keys, _ = layer.update(x, x.detach())
    keys.sum().backward()
    assert all(torch.equal(x.grad, torch.ones_like(x)) for x in given)


def test_steps_in_and_out_of_inference_mode():
    layer = GrowingLayer()
    for inference in (True, True, False, True):
        with torch.inference_mode(inference):
            step(random.Random(0), layer, 1)
    assert layer.get_seq_length() == 4


def test_reset_forgets_what_transformers_forgets_and_writes_into_nobodys_view():
    pair = GrowingLayer(), DynamicLayer()
    for layer in pair:
        step(random.Random(0), layer, 3), step(random.Random(1), layer, 1)
    held, was = pair[0].keys, pair[0].keys.clone()
    for layer in pair:
        layer.reset(), step(random.Random(2), layer, 2)
    assert torch.equal(pair[0].keys, pair[1].keys) and torch.equal(held, was)
