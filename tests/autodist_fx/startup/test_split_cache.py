"""The cache of splits in one process; over several: tests/distributed/test_artifact.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import autodist_fx as adx
from autodist_fx.artifact.manifest import read_manifest
from autodist_fx.startup import from_checkpoint, keep_compiled
from autodist_fx.startup import split_cache as cache
from tests.support.checkpoint import save_tiny

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "llama", "llama")


def _start(checkpoint: Path, directory: Path | bool | None, **options: Any) -> tuple[list[int], bool]:
    """The tokens that a start gives, and whether it had to compile."""
    compiled = []
    original = from_checkpoint.compile_to_run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(from_checkpoint, "compile_to_run", lambda *a: compiled.append(1) or original(*a))
        split = adx.from_pretrained(checkpoint, device="cpu", cache=directory, **options)
    return split.generate(IDS, max_new_tokens=6, do_sample=False)[0].tolist(), bool(compiled)


def test_a_second_start_does_not_compile_and_gives_the_same(llama: Path, tmp_path: Path) -> None:
    first, compiled = _start(llama, tmp_path / "cache")
    assert compiled
    assert _start(llama, tmp_path / "cache") == (first, False)
    (entry,) = (tmp_path / "cache").iterdir()
    assert read_manifest(entry).key == entry.name
    split = adx.from_pretrained(llama, device="cpu", cache=tmp_path / "cache")
    # a graph that is not kept: made from the checkpoint
    expected = adx.from_pretrained(llama, device="cpu")(IDS).logits
    assert torch.equal(split(IDS).logits, expected)


def test_cache_key_follows_everything_that_changes_the_split(llama: Path, tmp_path: Path) -> None:
    _start(llama, tmp_path / "cache")
    for changed in ({"dtype": "bfloat16"}, {"objective": "latency"}, {"hardware": "h100"}):
        assert _start(llama, tmp_path / "cache", **changed)[1], changed
    plan = adx.from_pretrained(llama, device="cpu").plan
    assert _start(llama, tmp_path / "cache", plan=plan)[1]
    os.utime(llama / "model.safetensors", ns=(1, 1))
    assert _start(llama, tmp_path / "cache")[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "library_versions", lambda: {"torch": "0.1"})
        assert _start(llama, tmp_path / "cache")[1]
    assert len(list((tmp_path / "cache").iterdir())) == 7


@pytest.mark.parametrize("name", ["weights/rank0.safetensors", "manifest.json", "variants/decode/rank0.json"])
def test_a_damaged_entry_is_named_and_made_again(name: str, llama: Path, tmp_path: Path) -> None:
    tokens, _ = _start(llama, tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    content = bytearray((entry / name).read_bytes())
    content[len(content) // 2] ^= 1
    (entry / name).write_bytes(content)
    with pytest.warns(UserWarning, match=f"{name}.*this entry of the cache is made again"):
        assert _start(llama, tmp_path / "cache") == (tokens, True)
    assert _start(llama, tmp_path / "cache") == (tokens, False)


def test_a_disk_that_is_full_is_a_warning(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type(usage)(1, 1, 1000))
    with pytest.warns(UserWarning, match=r"has 0 MiB left, and the split takes 0 MiB: make room, or let ADX_CACHE be"):
        _start(llama, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_start_that_fails_while_writing_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keep_compiled, "write_rank", lambda *args: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.warns(UserWarning, match="the split was not kept in the cache: no space left"):
            _start(llama, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_directory_from_argument_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, cache_is in (("", None), ("0", None), ("/some/where", Path("/some/where"))):
        monkeypatch.setenv("ADX_CACHE", said)
        assert cache.cache_directory(None) == cache_is
        assert cache.cache_directory(False) is None
        assert cache.cache_directory("/else/where") == Path("/else/where")
    monkeypatch.setenv("ADX_CACHE", "1")
    home = cache.cache_directory(None)
    assert home is not None and home.name == "autodist_fx" and cache.cache_directory(True) == home


def test_without_a_cache_nothing_is_written(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADX_CACHE", str(tmp_path / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _start(llama, False)
        adx.from_pretrained(llama, device="cpu", dump_dir=tmp_path / "dumps")
    assert not (tmp_path / "cache").exists()
    _start(llama, None)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_rank_that_starts_from_the_cache_imports_no_tracer() -> None:
    command = [sys.executable, "-c", "import sys, autodist_fx.cli.run; print(*sys.modules, sep='\\n')"]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.split()
    assert "autodist_fx.startup.start_rank" in loaded
    heavy = ("autodist_fx.tracing", "autodist_fx.compiler.compil", "passes.partition", "cost_model.search")
    code = [name for name in loaded if name.startswith("transformers.models.") and ".modeling_" in name]
    needless = [*code, *(name for name in loaded if name.startswith(heavy))]
    assert needless == ["autodist_fx.compiler.compile_options"], "which is a value, without torch"
