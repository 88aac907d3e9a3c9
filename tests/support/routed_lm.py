"""A small language model with a layer of routed experts that transformers 5 would mark: traced as one node on any
version. Weights the other way round, gate and up by turns, biases, clamps, as GPT-OSS has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from tests.support.models import randomized


class RoutedConfig(PretrainedConfig):
    model_type = "routed"

    def __init__(
        self, vocab_size: int = 127, hidden_size: int = 24, num_experts: int = 4, inner_size: int = 10, **more: Any
    ) -> None:
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_experts, self.inner_size, self.num_hidden_layers = num_experts, inner_size, 1
        super().__init__(**more)


class RoutedExperts(nn.Module):
    def __init__(self, config: RoutedConfig) -> None:
        super().__init__()
        count, hidden, inner = config.num_experts, config.hidden_size, config.inner_size
        self.gate_up_proj = nn.Parameter(torch.empty(count, hidden, 2 * inner))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(count, 2 * inner))
        self.down_proj = nn.Parameter(torch.empty(count, inner, hidden))
        self.down_proj_bias = nn.Parameter(torch.empty(count, hidden))
        # what `use_experts_implementation` of transformers 5 says
        self.has_gate = self.has_bias = self.is_transposed = True
        self.is_concatenated = self.has_post_expert_norm = self._is_expert_parallel = False

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up[..., ::2].clamp(max=0.8), gate_up[..., 1::2].clamp(min=-0.8, max=0.8)
        return (up + 1) * gate * torch.sigmoid(gate * 1.702)

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x)
        for e in range(len(self.down_proj)):
            rows, place = torch.where(index == e)
            inside = self._apply_gate(x[rows] @ self.gate_up_proj[e] + self.gate_up_proj_bias[e])
            made = inside @ self.down_proj[e] + self.down_proj_bias[e]
            total = total.index_add(0, rows, made * weights[rows, place, None])
        return total


class RoutedLM(PreTrainedModel):
    config_class = RoutedConfig

    def __init__(self, config: RoutedConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = RoutedExperts(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
    ) -> CausalLMOutput:  # fmt: skip
        """Tokens do not see each other; `attention_mask` and `use_cache` are for the look of it."""
        x = self.embed(input_ids)
        rows = x.reshape(-1, x.shape[-1])
        scores, index = torch.topk(self.router(rows), 2, dim=-1)
        x = x + self.experts(rows, index, scores.softmax(-1)).view(x.shape)
        logits = self.head(x)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return CausalLMOutput(loss=loss, logits=logits)


def routed_lm(num_experts: int = 4) -> PreTrainedModel:
    """In float64, with random numbers in every parameter."""
    return randomized(RoutedLM(RoutedConfig(num_experts=num_experts)).to(torch.float64).eval())
