"""`from_pretrained`: turns a checkpoint's name into this rank's share of the model, ready to generate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from autodist_fx.api.habits import one_dtype, placed, refuse_habits
from autodist_fx.compiler.compile_options import CompileOptions
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.comm.join_options import DEFAULT_TIMEOUT_SECONDS, JoinOptions
from autodist_fx.runtime.comm.process_group import fail_to_join
from autodist_fx.runtime.microbatches.count import Microbatches, checked
from autodist_fx.startup.build_model import RankModel
from autodist_fx.startup.split_cache import CacheEntry
from autodist_fx.startup.start_rank import start_rank
from autodist_fx.weights.checkpoint_source import CheckpointSource
from cost_model.costs.hardware import Hardware
from cost_model.partition_plan import PartitionPlan
from cost_model.request.devices import DeviceMap, Memory
from cost_model.request.plan_options import PlanOptions


def from_pretrained(
    name: str | Path,
    *,
    tp: int | None = None,
    pp: int | None = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    hardware: str | Hardware | None = None,
    objective: str = "shard",
    pin: Mapping[str, str] | None = None,
    cuts: Sequence[int | str] | None = None,
    max_memory: Memory | None = None,
    device_map: DeviceMap | str | torch.device | None = None,
    plan: PartitionPlan | str | Path | None = None,
    strict: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    verify: bool = True,
    dump_dir: str | Path | None = None,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    cuda_graphs: bool = False,
    rank: int | None = None,
    world_size: int | None = None,
    master_addr: str | None = None,
    master_port: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    cache: bool | str | Path | CacheEntry | None = None,
    microbatches: Microbatches = "auto",
    **others: Any,
) -> RankModel:
    """Load this process's rank of a checkpoint's model, split over `tp * pp` processes. Every process calls it alike.

    name: a directory with safetensors, a .gguf file, an id on the Hugging Face hub, or "smollm2".
    tp, pp: as in `compile` (1 where not given). Global rank = stage * tp + tp_rank.
    dtype: dtype of the weights ("bfloat16", torch.bfloat16, ...); None or "auto": the checkpoint's, float32 for GGUF.
        transformers' older name for it, torch_dtype, is taken, too.
    device: "cpu", or "cuda" (of the devices that CUDA_VISIBLE_DEVICES shows one per rank; where there are fewer, ranks
        share, and talk over Gloo); None: CUDA if available.
    hardware, objective, pin, cuts, max_memory, device_map, plan, strict: as in `compile`; `plan` may be a file. A
        device_map of "auto" says nothing: each rank has a device. One that names a device ("cpu") is `device`.
    dump_dir: directory into which each rank's graph is written after each pass, as text.
    revision, token, cache_dir, local_files_only: as in transformers' from_pretrained.
    trust_remote_code: run the Python files of a checkpoint whose model transformers does not have (auto_map). Read them
        first. Splits of such a model are not kept in the cache.
    attn_implementation: "sdpa" or "eager", the attention that is traced; None: the config's, or sdpa where it has it.
    others: whatever else transformers' from_pretrained takes is refused with the way out.
    verify: rank 0 proves the programs of all ranks before any runs.
    timeout: seconds to wait for another rank, at the start and in every later wait.
    cuda_graphs: generate by captured steps over a KV cache of constant size, on CUDA devices (docs/gpu.md); a model
        without such a form is refused by name.
    rank, world_size, master_addr, master_port: this process's place; torchrun sets it in environment variables.
    progress: called with (bytes loaded, bytes in all) after each tensor.
    cache: where splits are kept, so that a later start neither traces, plans nor slices: a directory, True (the place
        that ADX_CACHE names, or one beside the hub's cache), or False; None follows ADX_CACHE, by default False.
        An entry takes as much room as the model. It excludes `dump_dir`: a cached start runs no passes. See
        docs/artifact.md.
    microbatches: with pp > 1, in how many parts a batch (its rows) goes through the stages, so that they work at the
        same time: a number, or "auto", by which the plan's costs decide. The result's attribute of that name, too; a
        call's own `microbatches=` comes before it.

    A model that does not generate (an encoder, a classifier) is a DistributedModel, which is called alone. The
    result's `.load_report` has the bytes and seconds that loading took. Raises AutodistError, in one line, on every
    rank.

    """
    source = CheckpointSource(
        name, revision, token, cache_dir, local_files_only, bool(trust_remote_code), attn_implementation
    )
    joining = JoinOptions(device, rank, world_size, master_addr, master_port, timeout, cuda_graphs)
    try:
        refuse_habits(others)
        in_flight = checked(microbatches)
        dtype = one_dtype(dtype, torch_dtype)
        device_map, device = placed(device_map, device)
        joining = replace(joining, device=device)
        wanted = PlanOptions.from_keywords(
            tp=tp, pp=pp, hardware=hardware, objective=objective, pin=pin, cuts=cuts, max_memory=max_memory,
            device_map=device_map, plan=plan, strict=strict,
        )  # fmt: skip
    except (AutodistError, TypeError) as error:
        fail_to_join(error, joining)
    options = CompileOptions(verify=verify, dump_dir=dump_dir)
    model = start_rank(source, dtype, wanted, joining, options, progress=progress, cache=cache)
    model.microbatches = in_flight
    return model
