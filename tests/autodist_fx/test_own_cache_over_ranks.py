"""Models whose states are in a cache of their own are split in one process, and refused over several."""

import pytest
from transformers import MambaConfig, MambaForCausalLM

import autodist_fx as adx
from autodist_fx.errors import AutodistError


def test_a_cache_of_its_own_is_refused_by_name(tmp_path) -> None:
    config = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=40, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(AutodistError, match="MambaForCausalLM keeps its states in a cache of its own"):
        adx.from_pretrained(tmp_path, tp=1)
