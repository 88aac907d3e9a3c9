"""Keywords that people write by habit of transformers mean what they mean there, or are refused with the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.dynamic_module_utils
from transformers import AutoConfig, AutoModelForCausalLM

import autodist_fx as adx
from autodist_fx.api.habits import placed
from autodist_fx.cli.main import main
from autodist_fx.errors import AutodistError
from tests.support.models import relative_error, tiny_model

IDS = torch.tensor([[5, 6, 7, 8]])
CONFIG_FILE = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own_model"
"""
MODEL_FILE = """
from torch import nn
from transformers import LlamaForCausalLM as Llama
from .configuration_own import OwnConfig

class NegatedHead(nn.Linear):
    def forward(self, x):
        return -super().forward(x)

class LlamaForCausalLM(Llama):  # as transformers' own class is called
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.lm_head = NegatedHead(config.hidden_size, config.vocab_size, bias=False)
"""


def alone(path: Path, **options: Any) -> Any:
    return adx.from_pretrained(path, rank=0, world_size=1, **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("habits") / "model"
    tiny_model("llama", num_hidden_layers=1, dtype=torch.float32).save_pretrained(path)
    return path


@pytest.fixture
def with_code(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose model is Python beside it: Llama, of which all logits are negative."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = tmp_path / "own"
    path.mkdir()
    (path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    (path / "configuration_own.py").write_text(CONFIG_FILE)
    (path / "modeling_own.py").write_text(MODEL_FILE)
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.LlamaForCausalLM"}
    fields = json.loads((saved / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**fields, "model_type": "own_model", "auto_map": auto_map}))
    return path


@torch.no_grad()
def test_transformers_keywords_mean_what_they_mean_there(saved: Path) -> None:
    options = {"torch_dtype": "float64", "device_map": "auto", "attn_implementation": "eager"}
    split = alone(saved, **options, low_cpu_mem_usage=True, trust_remote_code=True)
    whole = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float64, attn_implementation="eager")
    assert split.dtype == torch.float64 and not split.training
    assert torch.equal(split.generate(IDS, max_new_tokens=4), whole.generate(IDS, max_new_tokens=4))
    assert relative_error(split(IDS).logits, whole(IDS).logits) < 1e-6  # softmax is in float32
    assert "softmax" in split.graph_module.code  # eager attention writes it out
    with pytest.raises(AutodistError, match="eval mode"):
        split.train()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"attn_implementation": "flash_attention_2"}, "flash_attention_2.*sdpa or eager"),
        ({"load_in_8bit": True}, "takes no load_in_8bit: quantized weights are not split"),
        ({"tp_plan": "auto"}, "say tp=N"),
        ({"dtype": "float32", "torch_dtype": "float16"}, "give dtype alone"),
        ({"device": "cuda", "device_map": "cpu"}, "give device alone"),
        ({"device_map": "balanced"}, "hardware of each stage.*leave it out"),
        ({"device": "meta"}, "cpu or cuda"),
    ],
)
def test_what_has_no_meaning_here_names_the_way_out(saved: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(AutodistError, match=words):
        alone(saved, **options)


def test_a_misspelt_keyword_is_pythons_error(saved: Path) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'dtpye'"):
        alone(saved, dtpye="float32")


def test_a_device_for_all_modules_is_this_ranks_device() -> None:
    assert placed({"": 1}, None) == (None, "cuda:1") and placed("cpu", "cpu") == (None, "cpu")
    assert placed(["a100", "h100"], "cpu") == (["a100", "h100"], "cpu")


@torch.no_grad()
def test_a_models_own_code_runs_only_where_it_is_trusted(
    with_code: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AutodistError, match=r"configuration_own.py, modeling_own.py .*trust_remote_code=True"):
        alone(with_code)
    assert main(["plan", "--model", str(with_code), "--tp", "2"]) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    assert main(["plan", "--model", str(with_code), "--tp", "2", "--trust-remote-code"]) == 0
    split = alone(with_code, trust_remote_code=True)
    whole = AutoModelForCausalLM.from_pretrained(with_code, trust_remote_code=True)
    assert torch.equal(split.generate(IDS, max_new_tokens=4), whole.generate(IDS, max_new_tokens=4))
    assert relative_error(split(IDS).logits, whole(IDS).logits) < 1e-5


def test_what_is_no_model_names_what_to_compile(saved: Path) -> None:
    for given, words in ((str(saved), "AutoModelForCausalLM.from_pretrained"), (AutoConfig, "class AutoConfig")):
        with pytest.raises(AutodistError, match=words):
            adx.compile(given, tp=2)


@torch.no_grad()
def test_a_compiled_model_takes_arguments_by_position_and_says_what_runs_it() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    compiled = adx.compile(model, tp=2, verify=False)
    mask = torch.tensor([[0, 1, 1, 1]])
    assert relative_error(compiled.simulate(IDS, mask).logits, model(IDS, mask).logits) < 1e-6  # norms are in float32
    with pytest.raises(TypeError, match="input_ids by position and by name"):
        compiled.simulate(IDS, input_ids=IDS)
    with pytest.raises(AutodistError, match=r"compiled\.simulate"):
        compiled(IDS)
    with pytest.raises(AutodistError, match="to_distributed"):
        compiled.generate(IDS)
