"""`from_pretrained`: from a checkpoint's name to this rank's share of the model, ready to generate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from autodist_fx.artifact.reader import ArtifactReader
from autodist_fx.calls.lengths import Lengths
from autodist_fx.compiler.compilation import Compilation
from autodist_fx.compiler.compile import compile_for_generation
from autodist_fx.runtime.comm.agreement import digest
from autodist_fx.runtime.comm.process_group import DEFAULT_TIMEOUT_SECONDS, join
from autodist_fx.runtime.generation.causal_lm import DistributedCausalLM
from autodist_fx.runtime.generation.guarded_programs import GuardedPrograms
from autodist_fx.startup.from_artifact import share
from autodist_fx.startup.from_checkpoint import _distribute, _ways
from autodist_fx.startup.rank import _Options, _Rank
from autodist_fx.startup.split_cache import CacheEntry, _entry, from_cache
from autodist_fx.tracing import empty_model
from autodist_fx.weights.checkpoint import open_source
from autodist_fx.weights.dtype import wanted_dtype
from autodist_fx.weights.resolve import resolve
from cost_model.costs.hardware import Hardware
from cost_model.partition_plan import PartitionPlan
from cost_model.request.devices import DeviceMap, Memory
from cost_model.request.plan_request import mesh_of
from passes.program.rank_program import RankProgram


def from_pretrained(
    name: str | Path,
    *,
    tp: int | None = None,
    pp: int | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    hardware: str | Hardware | None = None,
    objective: str = "shard",
    pin: Mapping[str, str] | None = None,
    cuts: Sequence[int | str] | None = None,
    max_memory: Memory | None = None,
    device_map: DeviceMap | None = None,
    plan: PartitionPlan | str | Path | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool | None = None,
    verify: bool = True,
    dump_dir: str | Path | None = None,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    rank: int | None = None,
    world_size: int | None = None,
    master_addr: str | None = None,
    master_port: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    cache: bool | str | Path | CacheEntry | None = None,
) -> DistributedCausalLM:
    """This process's share of a checkpoint's model, split over `tp * pp` processes. Called in each of them, alike.

    name: a directory with safetensors, a .gguf file, an id on the Hugging Face hub, or "smollm2".
    tp, pp: as in `compile` (1 where not given). Global rank = stage * tp + tp_rank.
    dtype: of the weights ("bfloat16", torch.bfloat16, ...); None or "auto": the checkpoint's own, float32 for GGUF.
    device: "cpu", "cuda" (a device a rank, of those that CUDA_VISIBLE_DEVICES shows); None: CUDA where there is some.
    hardware, objective, pin, cuts, max_memory, device_map, plan: as in `compile`; `plan` may be a file.
    dump_dir: each rank's graph after each pass.
    revision, token, cache_dir, local_files_only: as in transformers' from_pretrained.
    verify: rank 0 proves the programs of all ranks before any runs.
    timeout: seconds to wait for another rank, at the start and ever after.
    rank, world_size, master_addr, master_port: who this process is; torchrun says it by environment variables.
    progress: called with (bytes loaded, bytes in all) after each tensor.
    cache: where splits are kept, for a start without tracing, planning and slicing: a directory, True (the place that
        ADX_CACHE names, or one beside the hub's cache), or False; None is what ADX_CACHE says, by default False.
        An entry takes as much room as the model. Not with `dump_dir`, which is of the passes. See docs/artifact.md.

    `.load_report` of the result says what loading took. Raises AutodistError, in one line, on every rank.
    """
    given = PartitionPlan.load(plan) if isinstance(plan, str | Path) else plan
    mesh = mesh_of(given, tp, pp)
    joined = join(
        mesh,
        device=device,
        rank=rank,
        world_size=world_size,
        master_addr=master_addr,
        master_port=master_port,
        timeout_seconds=timeout,
    )
    where: dict[str, Any] = {
        "revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only,
    }  # fmt: skip
    planning = {
        "hardware": hardware,
        "objective": objective,
        "pin": pin,
        "cuts": cuts,
        "max_memory": max_memory,
        "device_map": device_map,
    }
    options = _Options(mesh=mesh, planning=planning, verify=verify, dump_dir=dump_dir, progress=progress)

    def opened() -> tuple[_Rank, GenerationConfig]:
        # CheckpointError comes out on every rank that sees the cause; the watchdog ends the others.
        checkpoint = resolve(name, **where)
        files = {"the checkpoint": digest("".join(f"{path.name} {path.stat().st_size}" for path in checkpoint.paths))}
        model = empty_model(checkpoint.config, wanted_dtype(dtype, checkpoint.config))
        return _Rank(model, lambda: open_source(checkpoint), joined, options, files), checkpoint.generation_config

    entry = None if dump_dir is not None else _entry(cache, name, where, dtype, given, options)
    if entry is not None and not entry.looked_up:

        def share_of(artifact: ArtifactReader) -> DistributedCausalLM:
            def at_lengths(lengths: Lengths, program: RankProgram) -> Any:
                me = opened()[0]
                main = compile_for_generation(me.model, Compilation, **me.options.for_compile(artifact.plan))
                make = _ways(me, main, program).make
                assert make is not None
                return make(lengths)

            def whole_sequences(names: tuple[str, ...], program: RankProgram) -> GuardedPrograms[RankProgram]:
                return opened()[0].whole_sequences(names, program)

            return share(artifact, joined, whole_sequences, at_lengths)

        found = from_cache(entry, joined, share_of)
        if found is not None:
            return found
    me, generation_config = opened()
    return _distribute(me, plan=given, generation_config=generation_config, entry=entry)
