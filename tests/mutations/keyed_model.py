"""A language model in which a value that each rank has a term of meets one that is whole: its one KV head lies in a
fused q|k|v, and something learned is added to the keys. No model of transformers does both."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from tests.support.graphs.small import Attention


class KeyedConfig(PretrainedConfig):
    model_type = "keyed"

    def __init__(self, vocab_size: int = 128, hidden_size: int = 48, num_hidden_layers: int = 2, **more: Any) -> None:
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        super().__init__(**more)


class KeyedAttention(Attention):
    def __init__(self, d: int) -> None:
        super().__init__(d, heads=6, groups=1, size=8, fused="thirds")
        self.key_part = nn.Linear(d, 8)

    def qkv_heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = super().qkv_heads(x)
        return q, k + torch.tanh(self.key_part(x))[:, None], v


class KeyedLM(PreTrainedModel):
    config_class = KeyedConfig

    def __init__(self, config: KeyedConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(KeyedAttention(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
    ) -> CausalLMOutput:  # fmt: skip
        """Every token sees all others; `attention_mask` and `use_cache` are for the look of it."""
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)["y"]
        logits = self.head(x)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return CausalLMOutput(loss=loss, logits=logits)
