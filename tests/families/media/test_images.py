"""Language models that read images or sounds, simulated, give what the model gives on one device, in float64."""

from __future__ import annotations

import pytest
import torch

import autodist_fx as adx
from autodist_fx.calls.cache_names import CACHE_FIELD
from tests.support.media.images import FAMILIES, question, vision_model
from tests.support.models import relative_error

TOLERANCE = 1e-6  # norms and rotary tables of most of these are float32 whatever the model's dtype


@pytest.mark.drawn(1)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_text_and_images(family: str) -> None:
    """Rows with one image, with none, and with two; then the cache of a prompt, and a token that goes on with it."""
    model = vision_model(family)
    compiled = adx.compile(model, tp=2, use_cache=True)
    batch = question(family, (1, 0, 2))
    with torch.no_grad():
        wanted = model(**batch, use_cache=True)
        found = compiled.simulate(**batch, use_cache=True)
        assert relative_error(found.logits, wanted.logits) <= TOLERANCE
        token = wanted.logits[:, -1:].argmax(-1)
        mask = torch.cat([batch["attention_mask"], torch.ones_like(token)], dim=1)
        positions = {} if "_vl" not in family else {"position_ids": torch.full((3, 3, 1), 20)}
        more = {"input_ids": token, "attention_mask": mask, **positions}
        after = model(**more, **{CACHE_FIELD: wanted[CACHE_FIELD]}).logits
        assert relative_error(compiled.simulate(**more, past_key_values=found[CACHE_FIELD]).logits, after) <= TOLERANCE


def test_one_graph_for_calls_alike_and_another_for_more_images() -> None:
    model = vision_model("llava")
    compiled = adx.compile(model, pp=2)
    made = []
    for images in ((1,), (1,), (2, 1), (0,)):
        batch = question("llava", images)
        batch = {n: x if n != "pixel_values" else x + len(made) for n, x in batch.items()}
        with torch.no_grad():
            assert relative_error(compiled.simulate(**batch).logits, model(**batch).logits) <= TOLERANCE
        made.append(len(compiled.variants))
    assert made == [2, 2, 3, 3]


@pytest.mark.drawn(1)
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_audio"])
def test_values_that_python_asks_for_have_graphs_of_their_own(family: str) -> None:
    """The size of an image; how much of a sound is heard."""
    model = vision_model(family)
    compiled = adx.compile(model, tp=2)
    first = question(family, (1,))
    other = {name: tensor.clone() for name, tensor in first.items()}
    if family == "qwen2_vl":
        other["image_grid_thw"] = first["image_grid_thw"][:, [0, 2, 1]]
    else:
        other["feature_attention_mask"][0, -4:] = 0
        other["input_ids"][0, 3] = 5  # one token fewer is of a sound
    for batch in (first, other, first):
        with torch.no_grad():
            assert relative_error(compiled.simulate(**batch).logits, model(**batch).logits) <= TOLERANCE
    assert len(compiled.variants) == 3


def test_paligemma_without_token_types() -> None:
    """transformers 5 lets its tokens attend to later ones where nothing is padded, and only there."""
    model = vision_model("paligemma")
    compiled = adx.compile(model, tp=2)
    asked = [question("paligemma", images, mask=True) for images in ((0,), (1,), (1, 0))]
    for batch in (*asked, {"input_ids": asked[0]["input_ids"]}):  # the last is text alone, without a mask
        with torch.no_grad():
            assert relative_error(compiled.simulate(**batch).logits, model(**batch).logits) <= TOLERANCE
