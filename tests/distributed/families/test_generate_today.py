"""Real processes over Gloo: the families that people generate with today, from checkpoints in the hub's layout.

The truth is transformers' own loading and its own generate, in one process: a batch with a row that is padded on the
left, greedily and with beams.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from autodist_fx.calls.cache_names import CACHE_FIELD
from tests.distributed.families.families_worker import generated
from tests.support.generation.families import FAMILIES, tiny
from tests.support.processes import WORKERS, run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
# 4.57 does not reorder their states with the beams, nor do all of 5 do so with Mamba-2's: the truth is then the model
# without a cache.
STATES_STAY = ("lfm2", "mamba2", "qwen3_next") if CACHE_FIELD != "cache" else ()


def loaded(checkpoint: Path) -> PreTrainedModel:
    """Load a checkpoint as transformers does."""
    cls = getattr(transformers, AutoConfig.from_pretrained(checkpoint).architectures[0])
    return cls.from_pretrained(checkpoint).eval()


@pytest.mark.drawn(1)
@pytest.mark.parametrize("tp, pp", [(2, 1), (1, 2)], ids=["tp", "pp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens(family: str, tp: int, pp: int, tmp_path: Path) -> None:
    checkpoint, results = tmp_path / "checkpoints" / family, tmp_path / "results"
    results.mkdir()
    tiny(family).save_pretrained(checkpoint)
    run_ranks(2, WORKERS / "families" / "families_worker.py", checkpoint.parent, tp, pp, results, "greedy", "beams")
    model = loaded(checkpoint)
    expected = generated(model, ("greedy",))
    expected |= generated(model, ("beams",), **({"use_cache": False} if family in STATES_STAY else {}))
    assert len(set(map(tuple, expected["greedy"]))) == 2
    for rank in range(2):
        tokens, size = torch.load(results / f"{rank}.pt")[family]
        assert tokens == expected, f"rank {rank}"
        read, whole = size.tolist()
        assert read < whole, f"rank {rank} read all of {family}"
