"""Checkpoints that transformers would not load either are refused by name; fingerprints tell contents apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import autodist_fx as adx
from autodist_fx.errors import CheckpointError
from autodist_fx.weights.sources.module_source import ModuleSource
from autodist_fx.weights.sources.safetensors_source import SafetensorsSource
from autodist_fx.weights.sources.sample import BLOCK_BYTES, sampled
from tests.support.models import tiny_model

Tensors = dict[str, torch.Tensor]
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_model("llama", dtype=torch.float32)


def changed(folder: Path, model: torch.nn.Module, change: Callable[[Tensors], Tensors]) -> Path:
    model.save_pretrained(folder)  # type: ignore[operator]
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def cast(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, Q_PROJ: tensors[Q_PROJ].to(dtype)}


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64, torch.complex64], ids=str)
def test_dtypes_that_no_weight_can_be(dtype: torch.dtype, model: torch.nn.Module, tmp_path: Path) -> None:
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(CheckpointError, match=f"{Q_PROJ} is {name} in the checkpoint, which no weight"):
        adx.from_pretrained(changed(tmp_path, model, cast(dtype)), device="cpu", verify=False)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_prefix_that_a_wrapper_left_is_named(prefix: str, model: torch.nn.Module, tmp_path: Path) -> None:
    folder = changed(tmp_path, model, lambda tensors: {prefix + name: x for name, x in tensors.items()})
    with pytest.raises(CheckpointError, match=f"names begin with '{prefix}'.*name.removeprefix\\('{prefix}'\\)"):
        adx.from_pretrained(folder, device="cpu", verify=False)


def test_a_fingerprint_is_of_contents_not_of_files(model: torch.nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "one")  # type: ignore[operator]
    model.save_pretrained(tmp_path / "several", max_shard_size="20KB")  # type: ignore[operator]
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 2
    one, several = (SafetensorsSource(tmp_path / name) for name in ("one", "several"))
    held = ModuleSource({name: model.state_dict()[name] for name in one.names()})
    assert one.fingerprint() == several.fingerprint() == held.fingerprint()


@pytest.mark.parametrize("change", ["one element", "a name", "a dtype", "a shape"])
def test_any_change_of_a_small_tensor_changes_it(change: str) -> None:
    tensors = {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(5)}
    other = {name: x.clone() for name, x in tensors.items()}
    if change == "one element":
        other["a"][2, 1] += 1e-6
    elif change == "a name":
        other["c"] = other.pop("b")
    elif change == "a dtype":
        other["b"] = other["b"].double()
    else:
        other["a"] = other["a"].view(4, 3)
    assert ModuleSource(tensors).fingerprint() != ModuleSource(other).fingerprint()


@pytest.mark.parametrize("nbytes", [0, 1, 4 * BLOCK_BYTES, 4 * BLOCK_BYTES + 1, 10**6, 10**9 + 7])
def test_sampled_blocks_are_aligned_one_in_each_half(nbytes: int) -> None:
    blocks = sampled("model.layers.3.mlp.up_proj.weight", nbytes)
    assert all(0 <= start <= stop <= nbytes for start, stop in blocks)
    if nbytes <= 4 * BLOCK_BYTES:
        assert blocks == [(0, nbytes)]
    else:
        (first, end), (second, last) = blocks
        assert end - first == last - second == BLOCK_BYTES
        assert end <= nbytes // 2 + BLOCK_BYTES <= second + 2 * BLOCK_BYTES
        assert end <= second and first % BLOCK_BYTES == second % BLOCK_BYTES == 0
        assert blocks != sampled("model.layers.4.mlp.up_proj.weight", nbytes) or nbytes < 10**6
