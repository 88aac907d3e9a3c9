"""Finds the programs that `autodist-fx run` runs: in a split on disk, or made of the model that --model names."""

from __future__ import annotations

import argparse
import contextlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from autodist_fx.api.artifact import Artifact
from autodist_fx.cli.arguments import checkpoint_source, plan_options
from autodist_fx.compiler.compile_options import CompileOptions
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.comm.join_options import DEFAULT_TIMEOUT_SECONDS, JoinOptions
from autodist_fx.runtime.default_hardware import default_hardware
from autodist_fx.startup.from_artifact import start_from_artifact
from autodist_fx.startup.split_cache import ENVIRONMENT, CacheEntry, cache_entry
from autodist_fx.startup.start_rank import start_rank
from autodist_fx.weights.checkpoint_source import CheckpointSource
from cost_model.format import bytes_text
from cost_model.mesh import Mesh
from cost_model.partition_plan import PartitionPlan
from cost_model.request.plan_options import PlanOptions

_DAY = 86400.0  # seconds: the timeout with --rank, where somebody may sit at a breakpoint

# Options that an artifact has settled.
_DECIDED = (
    "model", "plan", "hardware", "objective", "pin", "cut", "max_memory", "device_map", "strict", "revision",
    "cache_dir", "dump_dir", "trust_remote_code", "attn_implementation",
)  # fmt: skip


class Source(Protocol):
    """A source of the ranks' programs: an artifact or a checkpoint."""

    mesh: Mesh

    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    def share(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Start this process as its rank of the model."""

    def for_ranks(self, scratch: Path) -> list[str]:
        """Check all inputs in this process, so that an error is printed
        once; return further arguments for the ranks' processes."""

    def plan(self) -> PartitionPlan:
        """Return the plan that the ranks would follow; no weights are read."""

    def reads(self) -> str:
        """Say which files the ranks would read."""


class Saved:
    """Programs from an artifact, or from an entry of the split cache."""

    def __init__(self, args: argparse.Namespace, artifact: Artifact) -> None:
        self.args, self.artifact, self.mesh = args, artifact, artifact.mesh
        if args.artifact and (given := [f"--{name.replace('_', '-')}" for name in _DECIDED if getattr(args, name)]):
            raise AutodistError(f"--artifact holds the model, split and loaded: leave {' and '.join(given)} out")
        if args.artifact and args.dtype != "auto":
            raise AutodistError("--artifact holds the weights in their dtype: leave --dtype out, or compile it anew")
        if (args.tp or self.mesh.tp, args.pp or self.mesh.pp) != (self.mesh.tp, self.mesh.pp):
            raise AutodistError(f"{artifact.directory} is split for {self.mesh}: leave --tp and --pp out")

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return _right_if(self.artifact.tokenizer(), self.artifact.config.is_encoder_decoder)

    def share(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        return start_from_artifact(self.artifact, join_options(self.args))

    def for_ranks(self, scratch: Path) -> list[str]:
        return []

    def plan(self) -> PartitionPlan:
        return self.artifact.plan

    def reads(self) -> str:
        return f"{self.artifact.directory / 'weights'}: each rank a file of its own, and no checkpoint"


class FromCheckpoint:
    """Programs of the model that --model names; they come from the split cache where it has an entry."""

    def __init__(self, args: argparse.Namespace) -> None:
        if args.model is None:
            raise AutodistError("name a model with --model, or a split on disk with --artifact")
        self.args, self.source = args, checkpoint_source(args)
        planned = PlanOptions.from_keywords(plan=args.planned, strict=args.strict) if args.planned else None
        self.wanted = planned or plan_options(args)
        self.mesh = self.wanted.mesh
        self.entry: CacheEntry | None = None
        if args.cache_entry:
            self.entry = CacheEntry(Path(args.cache_entry))
        elif args.dry_run and _is_on_hub(self.source):
            pass  # a key is a digest of files, which would be downloaded for it
        elif not (args.no_cache or args.dump_dir or args.trust_remote_code or os.environ.get(ENVIRONMENT) == "0"):
            request = self.wanted.resolve(default_hardware())
            self.entry = cache_entry(True, self.source, args.dtype, request, self.wanted.plan)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self.entry is not None and self.entry.is_there:
            with contextlib.suppress(AutodistError):  # a damaged entry is dealt with when the ranks read it
                cached = Artifact(self.entry.path)
                return _right_if(cached.tokenizer(), cached.config.is_encoder_decoder)
        from autodist_fx.weights.checkpoint import load_tokenizer
        from autodist_fx.weights.resolve import resolve

        checkpoint = resolve(self.source)
        return _right_if(load_tokenizer(checkpoint), checkpoint.config.is_encoder_decoder)

    def share(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        args = self.args
        return start_rank(
            self.source,
            args.dtype,
            self.wanted,
            join_options(args),
            CompileOptions(verify=not args.no_verify, dump_dir=args.dump_dir),
            cache=False if self.entry is None else replace(self.entry, tokenizer=tokenizer),
            generates=True,
        )

    def for_ranks(self, scratch: Path) -> list[str]:
        further = [] if self.entry is None else ["--cache-entry", str(self.entry.path)]
        if self.entry is not None and self.entry.is_there:
            return further
        self.plan().save(scratch)
        return [*further, "--planned", str(scratch)]  # so that no rank searches

    def plan(self) -> PartitionPlan:
        from autodist_fx.cli.arguments import compile_for
        from autodist_fx.weights.resolve import resolve, resolve_config

        config = resolve_config(self.source) if self.args.dry_run else resolve(self.source).config
        return compile_for(self.args, config, self.wanted).plan

    def reads(self) -> str:
        from autodist_fx.weights.resolve import resolve

        if _is_on_hub(self.source):
            return f"{self.source.name} of the Hugging Face hub, downloaded before the ranks start"
        if self.entry is not None and self.entry.is_there:
            return f"{self.entry.path / 'weights'}: the split that an earlier run kept"
        paths = resolve(self.source).paths
        size = bytes_text(sum(path.stat().st_size for path in paths))
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        kept = "" if self.entry is None else f"; the split is kept in {self.entry.path}"
        return f"{paths[0]}{more} ({size}), each rank its slices{kept}"


def _is_on_hub(source: CheckpointSource) -> bool:
    from autodist_fx.weights.resolve import is_on_hub

    return is_on_hub(source)


def _right_if(tokenizer: PreTrainedTokenizerBase, has_encoder: bool) -> PreTrainedTokenizerBase:
    """Pad on the right for a model with an encoder."""
    if has_encoder:
        tokenizer.padding_side = "right"  # an encoder counts its positions from the left
    return tokenizer


def join_options(args: argparse.Namespace) -> JoinOptions:
    """Read the options of a rank that joins the others."""
    return JoinOptions(
        device=args.device,
        rank=args.rank,
        world_size=args.world_size,
        master_addr=args.master_addr,
        master_port=args.master_port,
        cuda_graphs=args.cuda_graphs,
        timeout=args.timeout or (DEFAULT_TIMEOUT_SECONDS if args.rank is None else _DAY),
    )
