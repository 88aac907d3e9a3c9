"""Writes what a start from a checkpoint has compiled and loaded into the cache of splits."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import GenerationConfig, PreTrainedModel

from autodist_fx.artifact.files import Staging
from autodist_fx.artifact.manifest import FileRecord
from autodist_fx.artifact.parts import named_parts
from autodist_fx.artifact.writer import finish, write_common, write_rank
from autodist_fx.compiler.compilation import Compilation
from autodist_fx.runtime.comm.process_group import JoinedRank
from autodist_fx.startup.split_cache import CacheEntry, keep


def keep_compiled(
    entry: CacheEntry,
    joined: JoinedRank,
    main: Compilation,
    model: PreTrainedModel,
    generation_config: GenerationConfig | None,
) -> None:
    """Write what this rank has, loaded, into the cache; a model with an op that no file can hold is left out."""
    parts = named_parts(main.variants)
    programs = [(part, part.variant.programs[joined.rank]) for part in parts]

    def write(staging: Staging) -> None:
        if joined.rank == 0:
            write_common(staging, parts, main.plan, model, generation_config, entry.tokenizer, main.source)
        write_rank(staging, joined.rank, programs)

    def end(staging: Staging, files: Mapping[str, FileRecord], key: str) -> None:
        finish(staging, parts, main.plan, files, key)

    keep(entry, joined, sum(program.weight_bytes for _, program in programs), write, end)
