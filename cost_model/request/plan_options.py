"""`PlanOptions`: what users ask of a split, read from keywords, a plan or a plan file, and resolved into a request."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cost_model.costs.hardware import MEASURED, PRESETS, Hardware
from cost_model.errors import AutodistError, PlanError, reason_text
from cost_model.mesh import Mesh
from cost_model.partition_plan import PartitionPlan
from cost_model.plan.data import PLAN_VERSION
from cost_model.request.cuts import Cut
from cost_model.request.devices import DeviceMap, Memory, devices_of_stages, memory_of_stages
from cost_model.request.hardware_file import named_hardware
from cost_model.request.pins import Pin
from cost_model.request.plan_request import PlanRequest

LEAST = {"B": 1, "S": 1, "P": 0, "E": 1}  # size symbols that may be asked for -> the least length
_REQUESTED = ("pins", "cuts", "max_memory", "device_map")  # fields of a plan file's `request`, which its user fixed


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """The options of a split as users write them for `autodist_fx.compile`; None or () for each that is left out.

    Read by `from_keywords`, `from_plan`, `from_file`, and `autodist_fx.cli.arguments.plan_options` from a command line.
    """

    tp: int | None = None
    pp: int | None = None
    hardware: str | Hardware | None = None
    objective: str | None = None
    sizes: tuple[tuple[str, int], ...] = ()
    pin: tuple[Pin, ...] = ()
    cuts: tuple[Cut, ...] = ()
    max_memory: Memory | None = None
    device_map: DeviceMap | None = None
    plan: PartitionPlan | None = None  # made earlier: nothing is searched; only hardware, sizes, strict may be added
    strict: bool = False  # refuse a plan with ops that have no sharding rule

    @classmethod
    def from_keywords(
        cls,
        *,
        tp: int | None = None,
        pp: int | None = None,
        hardware: str | Hardware | None = None,
        objective: str | None = None,
        sizes: Mapping[str, int] | None = None,
        pin: Mapping[str, str] | None = None,
        cuts: Sequence[Cut] | None = None,
        max_memory: Memory | None = None,
        device_map: DeviceMap | None = None,
        plan: PartitionPlan | str | Path | None = None,
        strict: bool = False,
    ) -> PlanOptions:
        """Builds options from keywords of the public functions. Raises PlanError when a file `plan` is no plan."""
        return cls(
            tp=tp,
            pp=pp,
            hardware=hardware,
            objective=objective,
            sizes=tuple((sizes or {}).items()),
            pin=tuple((pin or {}).items()),
            cuts=tuple(cuts or ()),
            max_memory=max_memory,
            device_map=device_map,
            plan=PartitionPlan.load(plan) if isinstance(plan, str | Path) else plan,
            strict=strict,
        )

    @classmethod
    def from_plan(cls, plan: PartitionPlan) -> PlanOptions:
        """Builds options that ask for `plan` again, or for its like for another variant of the model.

        They lack the plan's sizes, which belong to its graph, and hardware that is no preset.
        """
        asked = plan.request
        devices = [{"hardware": d.hardware, "memory": d.memory} for d in asked.device_map if d.hardware in PRESETS]
        return cls(
            tp=plan.mesh.tp,
            pp=plan.mesh.pp,
            hardware=plan.hardware if plan.hardware in PRESETS else None,
            objective=plan.objective,
            pin=asked.pin,
            cuts=asked.cuts,
            max_memory=asked.max_memory or None,
            device_map=devices if devices and len(devices) == len(asked.device_map) else None,
        )

    @classmethod
    def from_file(cls, path: str | Path) -> PlanOptions:
        """Reads the options that a plan file, perhaps edited by hand, asks for.

        The file's decisions and predictions are not read, and all but `version` may be left out. Raises PlanError when
        the file cannot be read, is no plan of this version, or has a malformed field.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise PlanError(f"cannot read the plan file {path}: {reason_text(error)}") from error
        if not isinstance(data, Mapping) or data.get("version") != PLAN_VERSION:
            raise PlanError(f"{path} is no plan of version {PLAN_VERSION}: make one with `autodist-fx plan --save`")
        mesh, sizes, requested = (_object(data, name, path) for name in ("mesh", "sizes", "request"))
        if unknown := [key for key in requested if key not in _REQUESTED]:
            raise PlanError(f"{path}: request.{unknown[0]}: unknown field; known are {', '.join(_REQUESTED)}")
        pin, cuts = requested.get("pins", {}), requested.get("cuts", [])
        if not (isinstance(pin, Mapping) and all(isinstance(role, str) for role in pin.values())):
            raise PlanError(f"{path}: request.pins is {pin!r}: expected roles by pattern")
        if not (isinstance(cuts, list) and all(isinstance(cut, str | int) for cut in cuts)):
            raise PlanError(f"{path}: request.cuts is {cuts!r}: expected a list of modules or layer numbers")
        for name in ("objective", "hardware"):
            if not isinstance(data.get(name, ""), str):
                raise PlanError(f"{path}: {name} is {data[name]!r}: expected a name")
        named = data.get("hardware")
        if named is not None and named.startswith(MEASURED):
            named = None  # what was measured is not in the file: as it is here
        return cls(
            tp=mesh.get("tp", 1),  # Mesh refuses what is no number; resolve, what is wrong with the others
            pp=mesh.get("pp", 1),
            hardware=None if requested.get("device_map") else named,
            objective=data.get("objective", "shard"),
            sizes=tuple(sizes.items()),
            pin=tuple(pin.items()),
            cuts=tuple(cuts),
            max_memory=requested.get("max_memory") or None,
            device_map=requested.get("device_map") or None,
        )

    def or_else(self, other: PlanOptions) -> PlanOptions:
        """Returns these options, completed by `other` where these leave something out.

        Sizes are merged symbol by symbol. Hardware and a device map say the same thing in two ways: they are taken
        together, from these options if they have either.
        """
        has_devices = self.hardware is not None or self.device_map is not None
        return PlanOptions(
            tp=other.tp if self.tp is None else self.tp,
            pp=other.pp if self.pp is None else self.pp,
            hardware=self.hardware if has_devices else other.hardware,
            objective=other.objective if self.objective is None else self.objective,
            sizes=tuple((dict(other.sizes) | dict(self.sizes)).items()),
            pin=self.pin or other.pin,
            cuts=self.cuts or other.cuts,
            max_memory=self.max_memory or other.max_memory,
            device_map=self.device_map if has_devices else other.device_map,
            plan=self.plan or other.plan,
            strict=self.strict or other.strict,
        )

    @property
    def mesh(self) -> Mesh:
        """The mesh asked for: the plan's, or else tp x pp with one rank on an axis that is left out.

        Raises MeshError for what is no number of ranks; AutodistError where the plan is for another mesh.
        """
        if self.plan is None:
            return Mesh(1 if self.tp is None else self.tp, 1 if self.pp is None else self.pp)
        planned = self.plan.mesh
        asked = Mesh(planned.tp if self.tp is None else self.tp, planned.pp if self.pp is None else self.pp)
        if asked != planned:
            raise AutodistError(
                f"the plan is for {planned}, and {asked} was asked for: leave tp and pp out, or make another plan"
            )
        return planned

    def resolve(self, default_hardware: str | Hardware) -> PlanRequest:
        """Resolves the options into a request: checks them, and fills in what is left out.

        With a `plan`, returns the request that the plan was made for, by which further variants of the model are
        planned, too. `default_hardware` counts where neither hardware nor a device map is given. With a device map each
        stage keeps within the memory of its devices, or within `max_memory` where that is less.
        Raises PlanError or MeshError naming the argument.
        """
        mesh = self.mesh
        if self.plan is not None:
            if changing := [name for name in ("pin", "cuts", "max_memory", "device_map") if getattr(self, name)]:
                raise PlanError(f"a plan is used as it is, and {changing[0]} would change it: leave out one of them")
            planned = PlanOptions.from_plan(self.plan)
            usual = self.hardware or planned.hardware
            own = replace(planned, hardware=usual, sizes=self.sizes, strict=self.strict)
            return own.resolve(default_hardware)
        _check_sizes(self.sizes)
        devices = devices_of_stages(self.device_map, mesh)
        usual = devices[0] if devices else default_hardware
        of_all = named_hardware(usual if self.hardware is None else self.hardware)
        max_memory = memory_of_stages(self.max_memory, mesh, devices or (of_all,) * mesh.pp)
        if devices:
            device_bytes = tuple(device.memory_bytes for device in devices)
            max_memory = tuple(map(min, max_memory or device_bytes, device_bytes))
        return PlanRequest(
            mesh=mesh,
            hardware=of_all,
            objective="shard" if self.objective is None else self.objective,
            sizes=self.sizes,
            max_memory=max_memory,
            pin=self.pin,
            cuts=self.cuts,
            devices=devices,
            strict=self.strict,
        )


def _object(data: Mapping[str, Any], name: str, path: str | Path) -> Mapping[str, Any]:
    part = data.get(name, {})
    if not isinstance(part, Mapping):
        raise PlanError(f"{path}: {name} is {part!r}: expected an object")
    return part


def _check_sizes(sizes: Sequence[tuple[str, int]]) -> None:
    for symbol, n in sizes:
        if symbol not in LEAST:
            raise PlanError(f"sizes has no length {symbol!r}: choose among {', '.join(LEAST)}")
        if isinstance(n, bool) or not isinstance(n, int) or n < LEAST[symbol]:
            raise PlanError(f"sizes: {symbol} is {n!r}: give a whole number, {LEAST[symbol]} or more")
