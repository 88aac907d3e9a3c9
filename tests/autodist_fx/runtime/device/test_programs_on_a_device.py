"""Rank programs run wholly on the device that they are on: no tensor of theirs is ever in main memory, and they wait
for the device only where the number of elements depends on values.

The device is pretended (tests/support/device/pretended.py): it has numbers, which are the CPU's.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

import autodist_fx as adx
from autodist_fx.api.compiled_model import CompiledModel
from autodist_fx.weights.load_program import load_program
from autodist_fx.weights.sources.module_source import ModuleSource
from tests.support.device.pretended import Event, OnDevice, pretended_cuda
from tests.support.device.subjects import SUBJECTS, Subject, family_of
from tests.support.encoders import output_error

MESHES = ((2, 1), (1, 2))
# Functions of ours that deal rows out by values (passes/ops): their results' sizes are known when the values are.
BY_VALUES = ("selected(", "split_rows(", "join_own_rows(", "bincount(", "experts(")


def _calls(compiled: CompiledModel, subject: Subject, device: str | None = None) -> list[dict[str, torch.Tensor]]:
    """The tensors that each call returns; inputs are moved to the device."""
    cache, found = None, []
    for inputs in subject.calls:
        given: dict[str, Any] = {n: x if device is None else x.to(device) for n, x in inputs.items()}
        if subject.options.get("use_cache"):
            given |= {"past_key_values": cache, "use_cache": True}
        output = compiled.simulate(**given)
        cache = output.get("past_key_values")
        found.append({name: value for name, value in output.items() if isinstance(value, torch.Tensor)})
    return found


@contextlib.contextmanager
def _weights_on_the_device(
    compiled: CompiledModel, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Fill programs as a rank's process does: `load_program`, each tensor onto the rank's device."""

    def fill(variant: Any, programs: Sequence[Any]) -> None:
        buffers = dict(variant.traced.graph_module.named_buffers(remove_duplicate=False))
        for program in programs:
            load_program(subject.model, ModuleSource(subject.model), buffers, program, device="cuda:0")
            program.graph_module.eval()

    with monkeypatch.context() as patched:
        patched.setattr(compiled.source, "fill", fill)
        yield


def _unexpected(events: Sequence[Event], ranks: int) -> list[Event]:
    """Leaves out waits of functions of ours that deal rows out, and the number that a sliding layer of transformers'
    takes along when it is first written, once on each rank."""
    lines = Counter(event.line for event in events)

    def is_expected(event: Event) -> bool:
        if event.kind == "wait":
            return any(function in event.line for function in BY_VALUES)
        return event.kind == "to device" and ".update(" in event.line and lines[event.line] <= ranks

    return [event for event in events if not is_expected(event)]


def test_so_many_families() -> None:
    assert len({family_of(name) for name in SUBJECTS}) >= 60


@pytest.mark.drawn(1)
@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"{m[0]}x{m[1]}")
@pytest.mark.parametrize("name", SUBJECTS)
@torch.no_grad()
def test_no_tensor_of_a_rank_is_elsewhere(name: str, mesh: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    subject = SUBJECTS[name]()
    compiled = adx.compile(subject.model, tp=mesh[0], pp=mesh[1], verify=False, **subject.options)
    wanted = _calls(compiled, subject)
    with pretended_cuda() as events, _weights_on_the_device(compiled, subject, monkeypatch):
        found = _calls(compiled, subject, "cuda:0")
    assert _unexpected(events.of_graphs(), mesh[0] * mesh[1]) == []
    precise = next(subject.model.parameters()).dtype == torch.float64
    for got, want in zip(found, wanted, strict=True):
        assert all(isinstance(value, OnDevice) for value in got.values())
        assert output_error({n: x.held for n, x in got.items()}, want) <= (1e-6 if precise else 1e-4)
