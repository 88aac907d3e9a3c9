"""The models of the course: a tiny Llama to run, and the shapes of two real ones to look at."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(
    *, layers: int = 2, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float64
) -> LlamaForCausalLM:
    """Return a Llama with heads of 8, random weights in every parameter, always the same, in evaluation mode."""
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=8 * heads,
        intermediate_size=20 * heads,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=8,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            is_matrix = parameter.dim() > 1
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if is_matrix else 1 + 0.3 * noise)
    return model


def smollm2() -> LlamaConfig:
    """Return the shape of SmolLM2-135M: 30 layers, 9 heads, 3 KV heads. No weights, and nothing is downloaded."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        tie_word_embeddings=True,
        dtype=torch.float32,
    )


def llama_8b(layers: int = 32) -> LlamaConfig:
    """Return the shape of Llama-3-8B, in bfloat16: 32 layers, or fewer of them, of 32 heads and 8 KV heads."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        dtype=torch.bfloat16,
    )


__all__ = ["llama_8b", "smollm2", "tiny_llama"]
