"""Starts a rank of a checkpoint's model: out of the cache of splits, or compiled and loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig

from autodist_fx.compiler.compile_options import CompileOptions
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.comm.agreement import Facts
from autodist_fx.runtime.comm.join_options import JoinOptions
from autodist_fx.runtime.comm.process_group import fail_to_join, join
from autodist_fx.runtime.default_hardware import default_hardware
from autodist_fx.startup.build_model import RankModel
from autodist_fx.startup.facts import model_facts, request_facts
from autodist_fx.startup.from_artifact import share
from autodist_fx.startup.split_cache import CacheEntry, cache_entry, from_cache, is_kept
from autodist_fx.weights.checkpoint_source import CheckpointSource
from cost_model.request.plan_options import PlanOptions

if TYPE_CHECKING:
    from autodist_fx.startup.rank import RankStartup

# from_checkpoint is imported where something is compiled: it takes seconds, and a split that was kept needs none of it.


def start_rank(
    source: CheckpointSource,
    dtype: torch.dtype | str | None,
    wanted: PlanOptions,
    joining: JoinOptions,
    options: CompileOptions,
    *,
    progress: Callable[[int, int], None] | None = None,
    cache: bool | str | Path | CacheEntry | None = None,
    generates: bool = False,
) -> RankModel:
    """Return this process's share of a checkpoint's model; see autodist_fx.from_pretrained. `generates`: one that only
    can be called is refused."""
    try:
        request, plan = wanted.resolve(default_hardware()), wanted.plan
        keeps = options.dump_dir is None and not source.trust_remote_code and is_kept(cache)
    except AutodistError as error:
        fail_to_join(error, joining)
    more = {
        "dtype": dtype or "auto",
        "revision": source.revision,
        "attn_implementation": source.attn_implementation,
        "trust_remote_code": source.trust_remote_code,
        "cache": "in use" if keeps else "not in use",
    }
    asked = request_facts("from_pretrained", request, plan, verify=options.verify, **more)
    joined = join(request.mesh, joining, asked)

    def opened() -> tuple[RankStartup, GenerationConfig]:
        from autodist_fx.startup.from_checkpoint import open_checkpoint

        return open_checkpoint(source, dtype, joined, request, options, progress)

    entry: CacheEntry | None = None
    if keeps:
        entry = joined.together(lambda: (cache_entry(cache, source, dtype, request, plan), {}))
        assert entry is not None
        found = from_cache(entry, joined, lambda kept: share(kept, joined, lambda: opened()[0]))
        if found is not None:
            return found
    from autodist_fx.startup.from_checkpoint import start

    def opened_alike() -> tuple[tuple[RankStartup, GenerationConfig], Facts]:
        startup, generation_config = opened()
        return (startup, generation_config), model_facts(startup.model, generation_config, startup.open_weights)

    return start(*joined.together(opened_alike), plan, entry, generates=generates)
