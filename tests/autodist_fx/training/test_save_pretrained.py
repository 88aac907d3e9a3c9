"""A model in training is written as transformers writes its models, and loaded by transformers: equal, tensor by
tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import autodist_fx as adx
from tests.support.models import tiny_model
from tests.support.moe import tiny_moe_model
from tests.support.training.one_process import adamw, text


@pytest.mark.parametrize(
    ("family", "mesh"), [("gpt2", {"tp": 2, "pp": 2}), ("llama", {"dp": 2}), ("qwen3", {}), ("mixtral", {"tp": 2})]
)
def test_transformers_loads_it(family: str, mesh: dict[str, Any], tmp_path: Path) -> None:
    make = tiny_moe_model if family == "mixtral" else tiny_model
    model = make(family, dtype=torch.float32, num_hidden_layers=1, n_layer=1)
    (tmp_path / "model.safetensors").write_bytes(b"of a model before")
    engine = adx.train(model, simulate=bool(mesh), optimizer=adamw, **mesh)
    engine.step(text(2, 9, 0))
    engine.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(loaded) is type(model) and loaded.dtype == torch.float32
    state = engine.gather().parameters
    assert all(torch.equal(state[name], p) for name, p in loaded.named_parameters())
    assert state.keys() == {name for name, _ in loaded.named_parameters()}
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    count = 2 * mesh.get("pp", 1) if mesh else 1
    assert len(files) == count and not any(path.name.startswith(".") for path in tmp_path.iterdir()), files


def test_what_the_loss_needs_not_is_as_it_was(tmp_path: Path) -> None:
    model = tiny_model("llama", torch.float32, num_hidden_layers=1)
    model.model.unused = torch.nn.Linear(2, 3)
    model.save_pretrained(tmp_path / "before")
    engine = adx.train(model, tp=2, simulate=True, optimizer=adamw)
    engine.step(text(2, 9, 0))
    engine.save_pretrained(tmp_path)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"model.unused.weight", "model.unused.bias"}


def test_an_adapter_is_written_as_peft_does(tmp_path: Path) -> None:
    base = tiny_model("llama", torch.float32, num_hidden_layers=1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    engine = adx.train(peft.get_peft_model(base, config), tp=2, simulate=True, optimizer=adamw)
    engine.step(text(2, 9, 0))
    engine.save_pretrained(tmp_path)
    base = tiny_model("llama", torch.float32, num_hidden_layers=1)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path))
    state = engine.gather().parameters
    mine = dict(loaded.get_base_model().named_parameters())
    assert sum("lora_" in name for name in mine) == 4
    assert all(torch.equal(state[name], p) for name, p in mine.items())
