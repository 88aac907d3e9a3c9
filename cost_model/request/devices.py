"""Reads devices and memory as users write them: "40GiB", ["a100"], {"0": {"hardware": "h100", "memory": "80GiB"}}."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cost_model.costs.hardware import Hardware
from cost_model.errors import PlanError
from cost_model.mesh import Mesh
from cost_model.request.hardware_file import named_hardware

Device = str | Hardware | Mapping[str, object]
DeviceMap = Sequence[Device] | Mapping[int | str, Device]
Memory = int | str | Sequence[int | str] | Mapping[int | str, int | str]
_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{unit}": base**power
    for unit, base in (("b", 1000), ("ib", 1024))
    for power, prefix in enumerate("kmgt", start=1)
}
_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")


def bytes_of(given: object, what: str = "max_memory") -> int:
    """Returns the bytes of a positive int, or of a text such as "40GiB" (2**30) or "40GB" (10**9).

    Raises PlanError naming the argument, `what`.
    """
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return given
    if isinstance(given, str):
        match = _AMOUNT.fullmatch(given.strip())
        if match and match[2].lower() in _UNITS and (found := int(float(match[1]) * _UNITS[match[2].lower()])) > 0:
            return found
    raise PlanError(f'{what} is {given!r}: give bytes, or a text such as "40GiB" or "40GB"')


def memory_of_stages(given: Memory | None, mesh: Mesh, devices: Sequence[Hardware]) -> tuple[int, ...] | None:
    """Returns the bytes that a device of each stage may hold; None where no limit is given at all.

    `given` is one amount for all stages, or one for each, in order or by number. A mapping may leave stages out: their
    limit is the memory of their device. `devices[k]` is stage k's. Raises PlanError for a malformed amount or stage.
    """
    if given is None:
        return None
    if isinstance(given, int | str):
        return (bytes_of(given),) * mesh.pp
    by_stage = _by_stage(given, mesh, "max_memory")
    return tuple(
        bytes_of(by_stage[k], f"max_memory of stage {k}") if k in by_stage else devices[k].memory_bytes
        for k in range(mesh.pp)
    )


def devices_of_stages(given: DeviceMap | None, mesh: Mesh) -> tuple[Hardware, ...]:
    """Returns the hardware of each stage, pp entries; () for None.

    `given` has presets by name, files of `autodist-fx measure`, Hardware, or {"hardware": ANY OF THESE, "memory":
    AMOUNT}: one entry a stage, in order or by the stage's number, or one for each of tp * pp ranks. Raises PlanError,
    also where the ranks of one stage differ: their collectives would wait for the slowest, so that a faster one gains
    nothing.
    """
    if given is None:
        return ()
    if isinstance(given, str) or not isinstance(given, Sequence | Mapping):
        raise PlanError(
            f'device_map is {given!r}: it says the hardware of each stage, as in ["a100", "h100"]; leave it out where '
            "all devices are alike"
        )
    if isinstance(given, Sequence) and mesh.tp > 1 and len(given) == mesh.size:
        ranks = [_device(x, f"device_map[{r}]") for r, x in enumerate(given)]
        for stage in range(mesh.pp):
            group = mesh.tp_group(stage)
            odd = next((r for r in group if ranks[r] != ranks[group[0]]), None)
            if odd is not None:
                raise PlanError(
                    f"ranks {group[0]} ({ranks[group[0]].name}) and {odd} ({ranks[odd].name}) share the tensors of "
                    f"stage {stage}, and must be alike: order the devices so that each {mesh.tp} in a row are, or use "
                    "tp=1"
                )
        return tuple(ranks[mesh.rank(stage, 0)] for stage in range(mesh.pp))
    by_stage = _by_stage(given, mesh, "device_map")
    missing = [k for k in range(mesh.pp) if k not in by_stage]
    if missing:
        raise PlanError(f"device_map says nothing of stage {missing[0]}: give a device for each of {mesh.pp} stages")
    return tuple(_device(by_stage[k], f"device_map of stage {k}") for k in range(mesh.pp))


def _by_stage(given: Sequence[object] | Mapping[int | str, object], mesh: Mesh, what: str) -> dict[int, object]:
    """Maps stage numbers to their entries. Raises PlanError naming the argument, `what`, for a wrong count or stage."""
    if not isinstance(given, Mapping):
        if len(given) != mesh.pp:
            raise PlanError(f"{what} has {len(given)} entries for {mesh}: give one for each of {mesh.pp} stages")
        return dict(enumerate(given))
    found: dict[int, object] = {}
    for key, value in given.items():
        number = int(key) if str(key).isdecimal() else -1
        if not 0 <= number < mesh.pp:
            raise PlanError(f"{what} names stage {key!r}, and there are stages 0 to {mesh.pp - 1}")
        found[number] = value
    return found


def _device(given: object, what: str) -> Hardware:
    """Reads one entry of a device map. Raises PlanError naming it, `what`, when it is malformed."""
    if isinstance(given, str | Hardware):
        return named_hardware(given)
    if not isinstance(given, Mapping) or not isinstance(given.get("hardware"), str | Hardware):
        raise PlanError(f'{what} is {given!r}: name a preset, or give {{"hardware": NAME, "memory": "80GiB"}}')
    unknown = set(given) - {"hardware", "memory"}
    if unknown:
        raise PlanError(f"{what} has {', '.join(sorted(map(str, unknown)))}: there are hardware and memory")
    found = named_hardware(given["hardware"])
    return replace(found, memory_bytes=bytes_of(given["memory"], f"memory in {what}")) if "memory" in given else found
