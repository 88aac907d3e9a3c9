"""Fills one rank's module from a checkpoint by its ParamShards, and reads nothing that the rank does not hold."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from autodist_fx.errors import CheckpointError
from autodist_fx.weights.names import resolve_names
from autodist_fx.weights.process_memory import peak_rss_bytes, rss_bytes
from autodist_fx.weights.sources.module_source import ModuleSource
from autodist_fx.weights.sources.source import WeightSource
from cost_model.graph.placement import Interval
from passes.program.param_shard import ParamShard
from passes.program.rank_program import RankProgram

_Key = tuple[str, int | None, tuple[Interval, ...], torch.dtype, bool]


@dataclass(frozen=True, slots=True)
class LoadReport:
    """The bytes, seconds and peak memory that loading one rank took."""

    shard_bytes: int  # the rank's parameters and buffers; a tied one counts once
    bytes_read: int  # read from the checkpoint for this rank
    checkpoint_bytes: int  # all of the checkpoint's tensors
    seconds: float
    rss_before_bytes: int  # resident memory when loading began: imports, the graph
    peak_rss_bytes: int  # the most resident memory that the process ever had until loading ended
    start_seconds: Mapping[str, float] = field(default_factory=dict)  # seconds of each earlier step, with waits


def load_rank(
    program: RankProgram,
    source: WeightSource,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    buffers: Mapping[str, torch.Tensor] | None = None,
    base_model_prefix: str = "",
    tied: Sequence[Sequence[str]] = (),
    key_mapping: Mapping[str, str] | None = None,
    requires_grad: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LoadReport:
    """Replace every meta parameter and buffer of `program.graph_module` by its slice of the checkpoint, on `device`.

    A loaded tensor has its ParamShard's `local_shape`. `dtype` overrides the dtype of floating-point parameters; by
    default each has the dtype that it was traced in.
    `buffers`: real values, by the name in the original model, of buffers that no checkpoint holds (non-persistent ones
    such as rotary frequencies: on meta they have no values, and uninitialised ones give text that is almost right).
    They win over a tensor of that name in the checkpoint, and keep their dtype.
    `base_model_prefix`, `tied`, `key_mapping`: see resolve_names. `requires_grad`: set on every parameter; by default
    each keeps the flag of its meta parameter. `progress(done_bytes, all_bytes)` is called after each tensor.

    Names with equal source, slice and dtype get one Parameter, so that tied weights stay tied within the rank.
    Raises CheckpointError, which names a tensor that is missing or has another shape; the module is then half filled.
    """
    began, rss_before, read_before = time.perf_counter(), rss_bytes(), source.bytes_read
    module = program.graph_module
    shards = list(program.param_shards.values())
    _refuse_meta_outside(module, program.param_shards)
    buffers = {} if buffers is None else buffers
    real_buffers = ModuleSource(buffers)
    from_buffers = {s.source for s in shards if s.is_buffer} & buffers.keys()
    checkpoint_names = resolve_names(
        {s.source for s in shards} - from_buffers,
        source.names(),
        base_model_prefix=base_model_prefix,
        tied=tied,
        key_mapping=key_mapping,
    )
    missing = [s for s in shards if s.source not in checkpoint_names and s.source not in from_buffers]
    _refuse_missing(missing, len(shards), source.names())

    alike: dict[_Key, list[ParamShard]] = {}  # shards that become one tensor
    for shard in shards:
        name = shard.source if shard.source in from_buffers else checkpoint_names[shard.source]
        wanted_dtype = buffers[name].dtype if shard.source in from_buffers else _dtype_of(shard, dtype)
        key = (name, shard.dim, shard.intervals, wanted_dtype, shard.is_buffer)
        alike.setdefault(key, []).append(shard)
    # The largest comes first: temporary memory for a slice is then needed while little else is loaded.
    order = sorted(alike, key=lambda k: math.prod(alike[k][0].local_shape) * k[3].itemsize, reverse=True)
    all_bytes = sum(math.prod(alike[k][0].local_shape) * k[3].itemsize for k in order)
    done_bytes = 0
    for key in order:
        name, dim, intervals, wanted_dtype, is_buffer = key
        shard = alike[key][0]
        origin: WeightSource = real_buffers if shard.source in from_buffers else source
        if origin.shape(name) != shard.shape:
            raise CheckpointError(
                f"{name} has shape {list(origin.shape(name))} in the checkpoint and {list(shard.shape)} in the model: "
                "the checkpoint is of another model or config"
            )
        if wanted_dtype.is_floating_point and not origin.dtype(name).is_floating_point:
            stored = str(origin.dtype(name)).removeprefix("torch.")
            raise CheckpointError(
                f"{name} is {stored} in the checkpoint, which no weight of this model can be: it is damaged, or "
                "quantized in a way that its config does not say; use the unquantized checkpoint"
            )
        # A slice for a GPU is allocated there, and the file is read into it. A module may lend its own memory.
        lent = torch.device(device).type == "cpu" or isinstance(origin, ModuleSource)
        out = None if lent else torch.empty(shard.local_shape, dtype=wanted_dtype, device=device)
        tensor = origin.read(name, dim, intervals, wanted_dtype, out).to(device)
        _install(module, [s.name for s in alike[key]], tensor, is_buffer=is_buffer, requires_grad=requires_grad)
        done_bytes += tensor.numel() * tensor.element_size()
        if progress is not None:
            progress(done_bytes, all_bytes)
    _move_the_rest(module, program.param_shards, device)
    return LoadReport(
        shard_bytes=done_bytes,
        bytes_read=source.bytes_read - read_before,
        checkpoint_bytes=source.checkpoint_bytes,
        seconds=time.perf_counter() - began,
        rss_before_bytes=rss_before,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _dtype_of(shard: ParamShard, override: torch.dtype | None) -> torch.dtype:
    """Return the dtype in which a shard is loaded."""
    traced: torch.dtype = getattr(torch, shard.dtype)
    return override if override is not None and traced.is_floating_point else traced


def _install(
    module: nn.Module, names: Sequence[str], tensor: torch.Tensor, *, is_buffer: bool, requires_grad: bool | None
) -> None:
    """Put the tensor, as one object, at every one of the names."""
    value = tensor
    if not is_buffer:
        meta = _owner_of(module, names[0])[1]
        wants_grad = meta.requires_grad if requires_grad is None else requires_grad
        value = nn.Parameter(tensor, requires_grad=wants_grad and tensor.is_floating_point())
    for name in names:
        owner, old = _owner_of(module, name)
        if tuple(old.shape) != tuple(tensor.shape):
            raise CheckpointError(
                f"{name} has shape {list(old.shape)} in the rank's module and {list(tensor.shape)} in its ParamShard: "
                "this is a bug in the passes, please report it"
            )
        leaf = name.rpartition(".")[2]
        (owner._buffers if is_buffer else owner._parameters)[leaf] = value


def _owner_of(module: nn.Module, name: str) -> tuple[nn.Module, torch.Tensor]:
    """Return the submodule that holds the parameter or buffer, and the tensor that it holds now."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    held = owner._parameters.get(leaf, owner._buffers.get(leaf))
    if held is None:
        raise CheckpointError(f"the rank's module has no {name}: this is a bug in the passes, please report it")
    return owner, held


def _tensors(module: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _refuse_meta_outside(module: nn.Module, shards: Mapping[str, ParamShard]) -> None:
    """Raise CheckpointError for a meta tensor that no ParamShard would fill."""
    lost = [name for name, tensor in _tensors(module) if tensor.is_meta and name not in shards]
    if lost:
        raise CheckpointError(
            f"{_some(lost)} on the meta device in the rank's module, but in no ParamShard: "
            "this is a bug in the passes, please report it"
        )


def _refuse_missing(missing: Sequence[ParamShard], count: int, available: Iterable[str]) -> None:
    """Raise CheckpointError where shards have no tensor to be filled from."""
    lost_buffers = [s.source for s in missing if s.is_buffer]
    lost = [s.source for s in missing if not s.is_buffer]
    prefix = next((n.removesuffix(lost[0]) for n in available if n.endswith(f".{lost[0]}")), "") if lost else ""
    if prefix:
        raise CheckpointError(
            f"the checkpoint's names begin with {prefix!r}, as a wrapper of the model (torch.compile, DDP) leaves "
            "them, and transformers would take none of them: save the model inside it, or rename by "
            f"name.removeprefix({prefix!r})"
        )
    if lost:
        raise CheckpointError(
            f"{len(lost)} of {count} tensors are not in the checkpoint: {_some(lost)}; "
            "is it the checkpoint of this model?"
        )
    if lost_buffers:
        raise CheckpointError(
            f"buffers that are neither in the checkpoint nor given: {_some(lost_buffers)}; "
            "pass their values as `buffers` (a compiled model has them: compiled.buffers)"
        )


def _move_the_rest(module: nn.Module, shards: Mapping[str, ParamShard], device: torch.device | str) -> None:
    """Move the tensors that came with the graph (constants that tracing
    lifted) to the device. One tensor with several names stays one."""
    moved: dict[int, torch.Tensor] = {}
    for name, tensor in list(_tensors(module)):
        if name in shards or tensor.device == torch.device(device):
            continue
        owner, leaf = _owner_of(module, name)[0], name.rpartition(".")[2]
        if id(tensor) not in moved:
            there = tensor.detach().to(device)
            is_parameter = isinstance(tensor, nn.Parameter)
            moved[id(tensor)] = nn.Parameter(there, requires_grad=tensor.requires_grad) if is_parameter else there
        (owner._buffers if leaf in owner._buffers else owner._parameters)[leaf] = moved[id(tensor)]


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
