"""Tiny encoders of text and images, with random numbers in every parameter and in every running mean and variance."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from tests.support.models import relative_error

_TINY = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "dim": 48, "hidden_dim": 80, "n_layers": 2, "n_heads": 6, "max_position_embeddings": 64, "type_vocab_size": 2,
    "image_size": 16, "patch_size": 4, "projection_dim": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_labels": 5,
}  # fmt: skip
BATCH, SEQ = 2, 12
_DISENTANGLED = {
    "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4, "norm_rel_ebd": "layer_norm",
    "share_att_key": True, "type_vocab_size": 0,
}  # fmt: skip
ENCODERS = {
    "BertForMaskedLM": ("bert", {}),
    "RobertaForMaskedLM": ("roberta", {"type_vocab_size": 1}),
    "DistilBertForMaskedLM": ("distilbert", {}),
    "ElectraForMaskedLM": ("electra", {"embedding_size": 24}),
    "AlbertForMaskedLM": ("albert", {"embedding_size": 24, "num_hidden_layers": 3}),  # one layer's weights, three times
    "DebertaV2ForMaskedLM": ("deberta-v2", _DISENTANGLED),
    "XLMWithLMHeadModel": ("xlm", {"emb_dim": 48}),  # asserts what depends on the ids; makes a cache of its own
    "IBertForMaskedLM": ("ibert", {"type_vocab_size": 1}),  # calls linear with keyword arguments
    "BertForSequenceClassification": ("bert", {}),
    "RobertaForSequenceClassification": ("roberta", {"type_vocab_size": 1}),
}
_WINDOWS = {
    "embed_dim": 12, "hidden_size": 24, "depths": [1, 2], "num_layers": 2, "num_heads": [2, 3], "window_size": 2,
    "patch_size": 2,
}  # fmt: skip
_MOBILE = {
    "hidden_sizes": [12, 24, 36], "neck_hidden_sizes": [8, 8, 8, 12, 12, 24, 48], "image_size": 64, "patch_size": 2,
    "num_attention_heads": 3,
}  # fmt: skip
_CONVOLUTIONS = {"image_size": 32, "embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 2]}
VISION = {
    "ViTForImageClassification": ("vit", {}),
    "Dinov2ForImageClassification": ("dinov2", {}),
    "DeiTForImageClassificationWithTeacher": ("deit", {}),
    "BeitForImageClassification": ("beit", {}),
    "SwinForImageClassification": ("swin", _WINDOWS),  # attention within windows: batches of B * (number of windows)
    "MobileViTForImageClassification": ("mobilevit", _MOBILE),  # rounds the image's height up to whole patches
    "ResNetForImageClassification": ("resnet", _CONVOLUTIONS),  # convolutions and batch norms
    "RegNetForImageClassification": ("regnet", {**_CONVOLUTIONS, "groups_width": 4}),  # in groups of channels
    "MobileNetV1ForImageClassification": ("mobilenet_v1", {"depth_multiplier": 0.25}),  # one channel a group
    "PoolFormerForImageClassification": (
        "poolformer", {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1], "image_size": 64},
    ),
}  # fmt: skip


def tiny_config(kind: str, **changes: Any) -> PretrainedConfig:
    """`kind` is the config's model_type. Nested configs (of text, of images) are made tiny, too."""
    config = AutoConfig.for_model(kind)
    _shrink(config)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def _shrink(config: PretrainedConfig) -> None:
    for name, value in _TINY.items():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, value)
    for nested in vars(config).values():
        if isinstance(nested, PretrainedConfig):
            _shrink(nested)


def tiny_encoder(class_name: str, kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """An instance of the class of transformers, in float64 and eval mode."""
    generator = torch.Generator().manual_seed(seed)
    model = getattr(transformers, class_name)(tiny_config(kind, **changes)).to(torch.float64).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() > 1:
                value = noise * parameter[0].numel() ** -0.5
            else:
                value = noise * 0.3 + (1.0 if name.endswith("weight") else 0.0)
            parameter.copy_(value)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator, dtype=torch.float64))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, dtype=torch.float64))
    return model


def text_batch() -> dict[str, torch.Tensor]:
    """Two sequences, the first with padding at its end."""
    ids = torch.randint(5, 90, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def segments() -> torch.Tensor:
    """token_type_ids: the second half of each sequence is of the second segment."""
    return (torch.arange(SEQ) >= SEQ // 2).long().expand(BATCH, SEQ).contiguous()


def images(size: int = 16, channels: int = 3) -> torch.Tensor:
    return torch.randn(BATCH, channels, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def output_error(got: Any, wanted: Any) -> float:
    """The largest relative error of any tensor anywhere in `wanted`, which `got` must have the same tensors as."""
    if isinstance(wanted, torch.Tensor):
        assert got.shape == wanted.shape
        return relative_error(got, wanted)
    if isinstance(wanted, (dict, ModelOutput)):
        assert set(got) == set(wanted)
        return max(output_error(got[name], wanted[name]) for name in wanted)
    assert len(got) == len(wanted)
    return max(output_error(a, b) for a, b in zip(got, wanted, strict=True))
