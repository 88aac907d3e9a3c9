"""Real processes over Gloo, two ranks: the tokens of one process, for the ways in which q, k, v and MLPs are laid out.

Heads that two ranks cannot share evenly wherever the family lets us.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.distributed.families.families_worker import generated
from tests.support.models import randomized
from tests.support.processes import WORKERS, run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 28, "n_head": 7, "n_layer": 2, "n_positions": 128},
    "phi3": {
        "hidden_size": 28, "num_attention_heads": 7, "num_key_value_heads": 1, "num_hidden_layers": 2,
        "intermediate_size": 31,
    },
    "falcon": {
        "hidden_size": 24, "num_attention_heads": 6, "num_kv_heads": 3, "num_hidden_layers": 2,
        "new_decoder_architecture": True,
    },
    "gpt_neox": {"hidden_size": 40, "num_attention_heads": 5, "num_hidden_layers": 2, "intermediate_size": 31},
    "bloom": {"hidden_size": 40, "n_head": 5, "n_layer": 2},
    "mixtral": {
        "hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 2,
        "intermediate_size": 31, "num_local_experts": 3,
    },
}  # fmt: skip
# with caches of their own: recurrences alone, beside attention in a layer, and between layers of attention
OWN_CACHES: dict[str, dict[str, Any]] = {
    "mamba": {"hidden_size": 24, "num_hidden_layers": 3, "state_size": 5, "time_step_rank": 3},
    "falcon_h1": {
        "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 31, "num_attention_heads": 6, "head_dim": 8,
        "num_key_value_heads": 3, "mamba_n_heads": 3, "mamba_d_head": 8, "mamba_d_ssm": 24, "mamba_d_state": 7,
        "mamba_n_groups": 1, "mamba_chunk_size": 4,
    },
    "lfm2": {
        "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3,
        "intermediate_size": 31, "layer_types": ["conv", "full_attention", "conv"],
    },
    "rwkv": {"hidden_size": 24, "num_hidden_layers": 3, "attention_hidden_size": 24, "context_length": 64},
}  # fmt: skip
WAYS = ("greedy", "sampled")
TOKENS = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.drawn(1)
@pytest.mark.parametrize(
    "shapes, tp, pp",
    ((SHAPES, 2, 1), (OWN_CACHES, 2, 1), (OWN_CACHES, 1, 2)),
    ids=("tp", "caches-of-their-own-tp", "caches-of-their-own-pp"),
)
def test_same_tokens_on_two_ranks(shapes: dict[str, dict[str, Any]], tp: int, pp: int, tmp_path: Path) -> None:
    checkpoints, results = tmp_path / "checkpoints", tmp_path / "results"
    expected = {}
    results.mkdir()
    for family, shape in shapes.items():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TOKENS, **shape))
        randomized(model.float().eval()).save_pretrained(checkpoints / family)
        expected[family] = generated(model, WAYS)
    run_ranks(2, WORKERS / "families" / "families_worker.py", checkpoints, tp, pp, results, *WAYS)
    for rank in range(2):
        found = torch.load(results / f"{rank}.pt")
        assert found.keys() == expected.keys()
        for family, (tokens, size) in found.items():
            assert tokens == expected[family], f"rank {rank}: {family}"
            read, whole = size.tolist()
            assert read < whole, f"rank {rank} read all of {family}"
