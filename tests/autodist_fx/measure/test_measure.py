"""`autodist-fx measure` measures what it says, keeps it, and plans are predicted for it: here few and small ops."""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from autodist_fx.cli.main import main
from autodist_fx.measure import machine, rank
from autodist_fx.measure.chain import Call, Clock, Effort, effort_for, node_seconds
from autodist_fx.measure.machine import measure_machine
from autodist_fx.measure.pool import Pool
from autodist_fx.measure.subjects import subjects
from autodist_fx.runtime.default_hardware import default_hardware
from cost_model.costs.compute import op_bytes, op_flops, table_bound
from cost_model.costs.measured import Measured
from cost_model.costs.tables import Table
from cost_model.graph.op_graph import Op, TensorSpec
from tests.support.plans.measured import machine as machine_by_law

CLOCK = Clock(torch.device("cpu"), lambda: None)


def sleeper(seconds: float) -> Any:
    import time

    def sleep(x: torch.Tensor) -> torch.Tensor:
        time.sleep(seconds)
        return x

    return lambda: Call(sleep, (torch.zeros(1),))


def test_a_node_takes_what_its_function_takes() -> None:
    assert node_seconds(sleeper(0.01), CLOCK, Effort(3, 3)) == pytest.approx(0.01, rel=0.5)
    effort = effort_for(sleeper(0.01), CLOCK)
    assert effort.nodes == 1 and effort.repeats > 1
    assert effort_for(sleeper(0.2), CLOCK) == Effort(1, 1)


def test_slow_first_calls_do_not_count() -> None:
    """A GPU's libraries choose kernels in them, at each new size."""

    class Scripted(Clock):
        runs = iter([0.02, 0.02, 0.02, 2e-5, 2e-5])

        def seconds(self, work: Any) -> float:
            return next(self.runs)

    assert effort_for(sleeper(0.0), Scripted(torch.device("cpu"), lambda: None)) == Effort(64, 7)


def test_each_node_reads_tensors_of_its_own_that_no_cache_has() -> None:
    seen: list[int] = []
    pool = Pool(torch.float32, torch.device("cpu"), 2**26)

    def see(x: torch.Tensor, warm: torch.Tensor) -> torch.Tensor:
        seen.append(x.data_ptr())
        return warm

    node_seconds(lambda: Call(see, (pool.cold((1000, 1000)), pool.warm((2, 2)))), CLOCK, Effort(4, 3))
    assert len(seen) == 12 and len(set(seen)) == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_subject_does_the_work_that_its_table_is_read_by(dtype: torch.dtype) -> None:
    """The bytes and FLOPs that an op's table says, against those that the cost model counts for the op itself."""
    pool, hardware = Pool(dtype, torch.device("cpu"), 2**26), machine_by_law()
    for subject in subjects(dtype, torch.float32):
        if subject.kind in ("view", "adamw", "cache_update", "rms_norm"):  # no single op of the cost model
            continue
        sizes = tuple(axis[min(2, len(axis) - 1)] for axis in subject.axes)
        call = subject.make(pool, sizes)
        output = call.function(*call.args, **call.kwargs)
        name = str(dtype).removeprefix("torch.")
        given = itertools.chain(*(a if isinstance(a, list) else [a] for a in call.args))
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        specs = [TensorSpec(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in tensors]
        op = Op("x", subject.kind.removesuffix("_gqa"))
        out = [TensorSpec(tuple(output.shape), name)]
        work = op_bytes(op, specs, out) / hardware.memory_bandwidth
        if len(sizes) > 1:
            work = max(work, op_flops(op, specs, out) / hardware.flops_of(name))
        table = Table(subject.kind, name, tuple((n,) for n in sizes), (1.0,))
        assert table_bound(table, hardware)(sizes) == pytest.approx(work, rel=0.1), subject.kind


@pytest.fixture
def few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures in this process, as one rank, the smallest size of everything."""

    def launch(command: list[str], ranks: int) -> int:
        for name, value in {"RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr("sys.argv", command[2:])
        rank.main()
        return 0

    def smallest(dtype: torch.dtype, main_dtype: torch.dtype) -> Any:
        for subject in subjects(dtype, main_dtype):
            if subject.kind != "adamw":
                few = 3 if subject.kind == "add" else 1
                yield replace(subject, axes=tuple(axis[:few] for axis in subject.axes))

    monkeypatch.setattr(rank, "subjects", smallest)
    monkeypatch.setattr(rank, "DTYPES", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(rank, "Pool", functools.partial(Pool, nbytes=2**26))
    monkeypatch.setattr(machine, "launch_local", launch)
    monkeypatch.setattr(machine, "measure_program", lambda found, device: Measured(1, found.measured.runs, 2.0, 1e-3))


def test_the_machine_is_measured_kept_and_used(
    few_sizes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.delenv("ADX_HARDWARE")
    assert main(["measure", "--device", "cpu", "--ranks", "1"]) == 0
    said = capsys.readouterr().out
    (file,) = (tmp_path / "autodist_fx" / "hardware").iterdir()
    assert f"kept as {file}" in said and "a step of generating, beside its program: 1.00 ms" in said
    found = default_hardware()
    assert not isinstance(found, str) and found.name in said and found.name == json.loads(file.read_text())["name"]
    assert 1e-8 < found.view_seconds < 1e-3 and 1e-8 < found.op_seconds < 1e-3
    assert 1e6 < found.flops_of("float32") < 1e13
    assert [run.ranks for run in found.measured.runs] == [1]  # type: ignore[union-attr]


@pytest.mark.parametrize(("args", "message"), [
    (["--device", "cuda"], "torch sees no GPU here"),
    (["--save", "machine.txt"], "give a name that ends in .json"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", *args]) == 2
    assert message in capsys.readouterr().err


def test_a_rank_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "launch_local", lambda command, ranks: 3)
    with pytest.raises(Exception, match="ended with exit code 3"):
        measure_machine("cpu", 1)
