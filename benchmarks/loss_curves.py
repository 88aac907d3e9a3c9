"""Trains one tiny model on several meshes, all ranks in this process; writes the losses to docs/data/loss_curves.json.

In float64, so that what remains between two curves is rounding: anything else would be seen.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import autodist_fx as adx

PATH = Path(__file__).resolve().parents[1] / "docs" / "data" / "loss_curves.json"
STEPS, ROWS, TOKENS = 40, 8, 24
MESHES = {
    "one process": {},
    "tp=2": {"tp": 2},
    "pp=2, 1F1B, 4 microbatches": {"pp": 2, "microbatches": 4},
    "tp=2 x pp=2 x dp=2": {"tp": 2, "pp": 2, "dp": 2, "microbatches": 2},
}


def batch(step: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Make a step's batch: each row counts up from a number of its own, and some rows are padded."""
    draw = torch.Generator().manual_seed(step)
    starts = torch.randint(3, vocabulary, (ROWS, 1), generator=draw)
    ids = 3 + (starts + torch.arange(TOKENS)) % (vocabulary - 3)
    lengths = torch.randint(TOKENS // 2, TOKENS + 1, (ROWS, 1), generator=draw)
    mask = (torch.arange(TOKENS) < lengths).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def losses(options: dict[str, int]) -> list[float]:
    """Train on one mesh, and return each step's loss."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
        head_dim=8, vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).double()
    optimizer = functools.partial(torch.optim.AdamW, lr=3e-3)
    engine = adx.train(model, **options, simulate=True, optimizer=optimizer, max_grad_norm=1.0)
    return [engine.step(batch(step, config.vocab_size)).loss for step in range(STEPS)]


def main() -> None:
    """Train on every mesh and write the curves."""
    curves = {name: losses(options) for name, options in MESHES.items()}
    data = {"model": "a Llama of 2 layers", "dtype": "float64", "steps": STEPS, "losses": curves}
    PATH.parent.mkdir(parents=True, exist_ok=True)
    PATH.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {PATH}; the last losses: {[curve[-1] for curve in curves.values()]}")


if __name__ == "__main__":
    main()
