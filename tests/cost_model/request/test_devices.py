"""Devices and memory as users write them, and mistakes in them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from cost_model.costs.hardware import A100, H100
from cost_model.errors import PlanError
from cost_model.mesh import Mesh
from cost_model.request.devices import bytes_of, devices_of_stages, memory_of_stages


@pytest.mark.parametrize(
    ("given", "nbytes"),
    [(7, 7), ("40GiB", 40 * 2**30), ("1.5 GB", 1_500_000_000), ("512 mib", 2**29), ("64", 64), ("2TiB", 2**41)],
)
def test_amounts(given: object, nbytes: int) -> None:
    assert bytes_of(given) == nbytes


@pytest.mark.parametrize("given", ["", "GiB", "4 XB", "-1", 0, -5, True, 1.5, None, "1e3"])
def test_what_is_no_amount(given: object) -> None:
    with pytest.raises(PlanError, match=r"^max_memory is .*: give bytes, or a text such as"):
        bytes_of(given)


def test_memory_of_stages() -> None:
    mesh = Mesh(2, 2)
    assert memory_of_stages(None, mesh, (H100, H100)) is None
    assert memory_of_stages("1KiB", mesh, (H100, H100)) == (1024, 1024)
    assert memory_of_stages(["1KiB", 7], mesh, (H100, H100)) == (1024, 7)
    assert memory_of_stages({"1": 7}, mesh, (H100, A100)) == (H100.memory_bytes, 7)


def test_devices_of_stages() -> None:
    mesh = Mesh(2, 2)
    assert devices_of_stages(None, mesh) == ()
    assert devices_of_stages(["a100", H100], mesh) == (A100, H100)
    assert devices_of_stages({"1": "a100", 0: "h100"}, mesh) == (H100, A100)
    assert devices_of_stages(["a100", "a100", "h100", "h100"], mesh) == (A100, H100), "one for each rank"
    (small, _) = devices_of_stages([{"hardware": "h100", "memory": "1GiB"}, "h100"], mesh)
    assert (small.name, small.memory_bytes, small.flops) == ("h100", 2**30, H100.flops)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("a100", "device_map is 'a100': it says the hardware of each stage"),
        (["a100"], "device_map has 1 entries for tp=2 x pp=2: give one for each of 2 stages"),
        ({"0": "a100"}, "device_map says nothing of stage 1"),
        ({"0": "a100", "2": "a100"}, "device_map names stage '2', and there are stages 0 to 1"),
        (["a100", "h1"], "no hardware preset named 'h1'"),
        (["a100", {"memory": 3}], "name a preset, or give"),
        (["a100", {"hardware": "h100", "mem": 3}], "device_map of stage 1 has mem: there are hardware and memory"),
        (["a100", {"hardware": "h100", "memory": "x"}], "memory in device_map of stage 1 is 'x'"),
        (["a100", "h100", "h100", "h100"], "ranks 0 (a100) and 1 (h100) share the tensors of stage 0"),
    ],
)
def test_what_is_no_device_map(given: Any, said: str) -> None:
    with pytest.raises(PlanError, match=re.escape(said)):
        devices_of_stages(given, Mesh(2, 2))
