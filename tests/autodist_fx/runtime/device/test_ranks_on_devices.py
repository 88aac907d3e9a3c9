"""Whole ranks on pretended GPUs: processes join, load, and generate over NCCL, or over Gloo where they share one."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any
from unittest import mock

import pytest
import torch

import autodist_fx as adx
from autodist_fx.errors import RuntimeSetupError
from autodist_fx.runtime.device.choice import choose_device, shared_devices
from autodist_fx.runtime.device.cuda import queued_seconds, to_device, to_host
from tests.support.device.driver import driver
from tests.support.device.pretended import OnDevice
from tests.support.forked import on_processes
from tests.support.models import padded_batch, tiny_model


def test_copies_go_through_page_locked_memory_and_wait_for_nothing() -> None:
    with driver() as made:
        there = to_device(torch.arange(6), torch.device("cuda:0"))
        assert isinstance(there, OnDevice) and made.calls == []
        here = to_host([there, torch.ones(2), there + 1])
        assert made.calls == ["stream.synchronize"]
        assert [x.tolist() for x in here] == [[0, 1, 2, 3, 4, 5], [1.0, 1.0], [1, 2, 3, 4, 5, 6]]
        copies = [event for event in made.events.seen if event.kind in ("to device", "to host")]
        assert len(copies) == 3 and all(event.pinned and event.non_blocking for event in copies)


def test_a_gpu_is_kept_busy_until_all_work_is_in_its_stream() -> None:
    """Events stand around the work, behind a wait that ends when the host has launched all of it."""
    order: list[Any] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("record")

        def synchronize(self) -> None:
            order.append("synchronize")

        def elapsed_time(self, end: Any) -> float:
            return 2.5  # ms

    fakes = {"Event": Event, "_sleep": order.append, "device": lambda device: contextlib.nullcontext()}
    with mock.patch.multiple(torch.cuda, **fakes):
        found = queued_seconds(lambda: order.append("work"), torch.device("cuda:0"), 0.003)
    assert found == 0.0025 and order == [6_000_000, "record", "work", "record", "synchronize"]


def test_ranks_take_devices_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert choose_device(None, 0) == torch.device("cpu")
    with pytest.raises(RuntimeSetupError, match=r"no CUDA device is visible \(CUDA_VISIBLE_DEVICES=3,5\): use device"):
        choose_device("cuda", 0)
    with driver(devices=2):
        assert [choose_device(None, local).index for local in range(4)] == [0, 1, 0, 1]
        assert choose_device("cpu", 1).type == "cpu" and choose_device("cuda:1", 0).index == 1
        with pytest.raises(RuntimeSetupError, match="device cuda:2 was asked for, and 2 are visible"):
            choose_device("cuda:2", 0)
        with pytest.raises(RuntimeSetupError, match="ranks run on cpu or cuda"):
            choose_device("meta", 0)


def test_who_shares_a_device_is_said() -> None:
    assert shared_devices({0: "GPU-a", 1: "GPU-b"}) is None
    told = shared_devices({0: "GPU-a", 1: "GPU-b", 2: "GPU-a", 3: "GPU-b"})
    assert told is not None and told.startswith("ranks 0, 2, ranks 1, 3 share a GPU: all ranks talk over Gloo")


@pytest.mark.distributed
@pytest.mark.drawn(1)
@pytest.mark.parametrize("mesh", [(2, 1), (1, 2)], ids=lambda m: f"{m[0]}x{m[1]}")
@pytest.mark.parametrize("shared", [False, True], ids=["a GPU each", "one GPU"])
def test_tokens_are_those_of_one_process(shared: bool, mesh: tuple[int, int]) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    ids, mask = padded_batch(seq=5)
    asked = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted = model.generate(input_ids=ids, attention_mask=mask, **asked)

    def rank_of(rank: int) -> Any:
        with driver("GPU-a" if shared else f"GPU-{rank}") as made, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            compiled = adx.compile(model, tp=mesh[0], pp=mesh[1], verify=False)
            split = compiled.to_distributed(device="cuda", timeout=60)
            found = split.generate(input_ids=ids.to(split.device), attention_mask=mask.to(split.device), **asked)
            weights = [type(p).__name__ for p in split.graph_module.parameters() if not isinstance(p, OnDevice)]
            steps = [e for e in made.events.seen if e.kind == "to device" and e.pinned and e.non_blocking]
            lines = [str(w.message) for w in said if "share a GPU" in str(w.message)]
            return found.cpu().tolist(), made.calls, lines, weights, len(steps), split.is_driver

    for rank, (tokens, calls, lines, weights, copies, leads) in enumerate(on_processes(2, rank_of)):
        assert tokens == wanted.tolist() and weights == []
        assert leads or copies >= 4, "a follower's ids and masks come to its device so, at each step"
        assert calls[0] == "set_device cuda:0", "before any of NCCL's groups takes the current device"
        assert len(lines) == (1 if shared and rank == 0 else 0)
        nccl = [call for call in calls if "NCCL" in call]
        if shared:
            assert nccl == [] and "init_process_group gloo device_id=None timeout=60" in calls
            continue
        start = calls.index("init_process_group cpu:gloo,cuda:nccl device_id=cuda:0 timeout=60")
        assert start < calls.index(nccl[0]) and calls[calls.index(nccl[0]) + 1] == "connect cuda:0"
        assert nccl == ["ProcessGroupNCCL of 2 timeout=60"] * (2 if mesh[0] == 2 else 1)
        assert ("allreduce" if mesh[0] == 2 else ["send", "recv"][rank]) in calls
