"""A run that is saved and gone on with on another mesh: the same bits of weights and states, the same steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import autodist_fx as adx
from autodist_fx.errors import AutodistError, CheckpointError
from autodist_fx.training.gathered import TrainingState
from tests.support.float64 import in_float64
from tests.support.models import tiny_model
from tests.support.training.one_process import adamw, text, windows


def warm_up(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 3)


def same(a: TrainingState, b: TrainingState) -> bool:
    assert a.parameters.keys() == b.parameters.keys() and a.optimizer.keys() == b.optimizer.keys()
    pairs = [(a.parameters[name], b.parameters[name]) for name in a.parameters]
    pairs += [(a.optimizer[name][key], b.optimizer[name][key]) for name in a.optimizer for key in a.optimizer[name]]
    return all(torch.equal(x, y) for x, y in pairs)


def test_other_meshes_go_on_with_the_same_bits(tmp_path: Path) -> None:
    """With dropout, whose masks follow from seed and step, a warm-up, and weights tied over stages."""
    with in_float64():
        model = tiny_model("gpt2", n_layer=1, attn_pdrop=0.2, resid_pdrop=0.1, embd_pdrop=0.1)
        first, second = windows(2)
        given: dict[str, Any] = {"optimizer": adamw, "lr_scheduler": warm_up, "simulate": True}
        engine = adx.train(model, pp=2, microbatches=2, seed=3, **given)
        engine.step(first)
        engine.save(tmp_path, data={"epoch": 1})
        saved, then = engine.gather(), engine.step(second)

        other = adx.train(model, tp=3, microbatches=1, **given)
        assert other.load(tmp_path) == adx.Resumed(1, {"epoch": 1})  # the seed, too, is the saved run's
        result = other.step(second)
        assert result.step == 2 and abs(result.loss - then.loss) <= 1e-12
        assert abs(result.grad_norm - then.grad_norm) <= 1e-12
        assert other.load(tmp_path).step == 1 and same(other.gather(), saved)

        other.save(tmp_path, background=True)
        kept = other.gather()
        other.step(second)
        assert engine.load(tmp_path).step == 1
        other.wait_for_save()
        assert engine.load(tmp_path).step == 1 and same(engine.gather(), kept)
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001-1"]

        found = {f"model.{name}": torch.zeros_like(x) for name, x in kept.parameters.items()}
        found |= {f"optim.state.{n}.{k}": torch.zeros_like(x) for n, s in kept.optimizer.items() for k, x in s.items()}
        dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path / "step-00000001-1")), no_dist=True)
        assert all(torch.equal(found[f"model.{name}"], x) for name, x in kept.parameters.items())
        assert all(
            torch.equal(found[f"optim.state.{name}.{key}"], x)
            for name, state in kept.optimizer.items()
            for key, x in state.items()
        )


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> adx.Engine:
    engine = adx.train(tiny_model("llama", torch.float32, num_hidden_layers=1), tp=2, simulate=True, optimizer=adamw)
    engine.step(text(2, 9, 0))
    return engine


@pytest.fixture
def saved(engine: adx.Engine, tmp_path: Path) -> Iterator[Path]:
    engine.save(tmp_path)
    (path,) = tmp_path.iterdir()
    yield path


def cut_short(path: Path) -> None:
    file = path / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def with_another_byte(path: Path) -> None:
    data = bytearray((path / "rank-00000.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "rank-00000.safetensors").write_bytes(data)


def without_a_file(path: Path) -> None:
    (path / "rank-00000.safetensors").unlink()


def edited(path: Path) -> None:
    fields = json.loads((path / "checkpoint.json").read_text())
    fields["head"]["step"] = 7
    (path / "checkpoint.json").write_text(json.dumps(fields))


def without_its_manifest(path: Path) -> None:
    (path / "checkpoint.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, r"rank-00001.safetensors has \d+ bytes, and had \d+ when it was written"),
        (with_another_byte, r"rank-00000.safetensors is not what was written"),
        (without_a_file, r"rank-00000.safetensors is missing"),
        (edited, r"checkpoint.json was changed after it was written"),
        (without_its_manifest, r"step-00000001 is no saved run|there is no saved run in"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_checkpoint(engine: adx.Engine, saved: Path, damage: Any, message: str) -> None:
    damage(saved)
    before = engine.gather()
    with pytest.raises(CheckpointError, match=message):
        engine.load(saved.parent)
    assert same(engine.gather(), before)


def test_checkpoints_of_other_runs(engine: adx.Engine, saved: Path, tmp_path: Path) -> None:
    def load_into(**changes: Any) -> adx.Engine:
        model = tiny_model("llama", changes.pop("dtype", torch.float32), **{"num_hidden_layers": 1, **changes})
        other = adx.train(model, simulate=True, optimizer=torch.optim.SGD)
        other.load(tmp_path)
        return other

    with pytest.raises(CheckpointError, match=r"embed_tokens.weight is \[128, 48\] there and \[64, 48\] here"):
        load_into(vocab_size=64)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight in float32, and this run in float64: give dtype="):
        load_into(dtype=torch.float64)
    with pytest.raises(CheckpointError, match=r"another model, LlamaForCausalLM, .*: it has no model.model.layers.1"):
        load_into(num_hidden_layers=2)
    with pytest.raises(AutodistError, match="the optimizer of the saved run: AdamW, and of this one: SGD"):
        load_into().step(text(2, 9, 0))
    with pytest.raises(CheckpointError, match="there is no saved run in"):
        engine.load(tmp_path / "elsewhere")
    with pytest.raises(AutodistError, match="data is saved as JSON"):
        engine.save(tmp_path, data={"loader": engine})
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot save in .*file"):
        engine.save(tmp_path / "file")
