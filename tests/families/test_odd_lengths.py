"""Models with lengths that no input has, or that values decide: equal to the model by itself, over tp and pp.

One a mechanism: the last token of each sentence, found by its id; frames that convolutions leave of sound; chunks of a
padded sequence, which overlap; images in patches, each of its own aspect ratio.
"""

from __future__ import annotations

import pytest
import torch

import autodist_fx as adx
from tests.support.encoders import output_error, text_batch, tiny_encoder

BART = {"d_model": 48, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80,
        "encoder_attention_heads": 6, "decoder_attention_heads": 6}  # fmt: skip
SOUND = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}  # fmt: skip


def _sentences() -> dict[str, torch.Tensor]:
    """Each with two ends, of which the second counts."""
    ids = text_batch()["input_ids"]
    ids[0, [3, 9]] = 2
    ids[1, [5, 11]] = 2
    return {"input_ids": ids}


def _sound(samples: int) -> dict[str, torch.Tensor]:
    noise = torch.randn(2, samples, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return {"input_values": noise}


def _patches() -> dict[str, torch.Tensor]:
    """One image of 2 x 6 patches, and one of 4 x 3; of 16 that there may be."""
    shapes = torch.tensor([[2, 6], [4, 3]])
    noise = torch.randn(2, 16, 3 * 4 * 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    mask = (torch.arange(16) < shapes.prod(-1, keepdim=True)).long()
    return {"pixel_values": noise, "pixel_attention_mask": mask, "spatial_shapes": shapes}


CASES = {
    "ends of sentences": ("BartForSequenceClassification", "bart", BART, _sentences()),
    "frames of sound": ("Wav2Vec2ForCTC", "wav2vec2", SOUND, _sound(400)),
    "overlapping chunks": ("LongformerForMaskedLM", "longformer", {"attention_window": [4, 4]}, text_batch()),
}


@pytest.mark.drawn(1)
@pytest.mark.filterwarnings("ignore:for these lengths")  # which need no padding to whole chunks, as the traced ones do
@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_model(case: str) -> None:
    class_name, kind, changes, inputs = CASES[case]
    model = tiny_encoder(class_name, kind, **changes)
    with torch.no_grad():
        expected = model(**inputs)
    for tp, pp in ((2, 1), (1, 2), (2, 2)):
        got = adx.compile(model, tp=tp, pp=pp, input_names=tuple(inputs)).simulate(**inputs)
        assert output_error(got.logits, expected.logits) < 1e-6, (tp, pp)


def test_images_in_patches() -> None:
    model = tiny_encoder("Siglip2VisionModel", "siglip2_vision_model", num_patches=16)
    inputs = _patches()
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
    got = adx.compile(model, tp=2, input_names=tuple(inputs)).simulate(**inputs).last_hidden_state
    kept = inputs["pixel_attention_mask"].bool()
    assert output_error(got[kept], expected[kept]) < 1e-6
