"""The model shapes that the benchmarks use, as transformers configs, and the one checkpoint all contenders load."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)


def bench_llama() -> LlamaConfig:
    """125M parameters: small enough for two CPU cores, wide enough that the products dominate a forward pass."""
    return LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        # No end token: random weights would stop anywhere, and every contender must produce all 64 tokens.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def llama_3_70b(num_hidden_layers: int = 80) -> LlamaConfig:
    """Llama-3-70B's shape."""
    return LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        dtype="bfloat16",
    )


def qwen_2_5_7b(num_hidden_layers: int = 28) -> Qwen2Config:
    """Qwen2.5-7B's shape: 4 KV heads, so that at tp=8 each is held by two ranks."""
    return Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        max_position_embeddings=32768,
        dtype="bfloat16",
    )


def qwen_2_5_0_5b() -> Qwen2Config:
    """Qwen2.5-0.5B's shape: tied embeddings that are a quarter of all weights."""
    return Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def mixtral_8x7b(num_hidden_layers: int = 32) -> MixtralConfig:
    """Mixtral-8x7B's shape: 8 experts a layer, 2 for each token."""
    return MixtralConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=32000,
        max_position_embeddings=32768,
        rope_theta=1e6,
        dtype="bfloat16",
    )


def qwen_3_30b_a3b(num_hidden_layers: int = 48) -> Qwen3MoeConfig:
    """Qwen3-30B-A3B's shape: 128 experts a layer, 8 for each token."""
    return Qwen3MoeConfig(
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        vocab_size=151936,
        max_position_embeddings=40960,
        rope_theta=1e6,
        dtype="bfloat16",
    )


def deepseek_v3(num_hidden_layers: int = 61) -> DeepseekV3Config:
    """DeepSeek-V3's shape: 256 experts in all layers but the first three, 8 for each token, beside a shared one."""
    return DeepseekV3Config(num_hidden_layers=num_hidden_layers, dtype="bfloat16")  # the other sizes are its defaults


def write_checkpoint(config: PretrainedConfig, path: Path) -> None:
    """Random float32 weights from a fixed seed, written once so that every contender loads the same ones."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
