"""Writes an artifact into a scratch directory beside the target, which then takes the target's place."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import GenerationMixin

from autodist_fx.artifact.directory import new_directory
from autodist_fx.artifact.files import Staging, sync_directory
from autodist_fx.artifact.manifest import (
    MANIFEST,
    ArtifactError,
    FileRecord,
    Manifest,
    check_listing,
    library_versions,
)
from autodist_fx.artifact.parts import Part, parts_of
from autodist_fx.artifact.variant_format import (
    LAYERS,
    SavedVariant,
    guards_to_dict,
    program_to_dict,
)
from autodist_fx.compiler.generation_traits import follow_mask, is_asked
from autodist_fx.compiler.variant import Variant
from autodist_fx.weights.share import share_weights
from cost_model.partition_plan import PartitionPlan
from cost_model.plan.write_json import plan_to_text
from passes.fx import node_meta
from passes.partition.pipeline import emit_rank
from passes.program.rank_program import RankProgram
from passes.serialize.write_graph import graph_to_json, used_tensors

if TYPE_CHECKING:
    from autodist_fx.compiler.compilation import Compilation
    from autodist_fx.compiler.source import VariantSource

TOKENIZER = "tokenizer"
# load(variant, program) puts weights into a program of this variant.
Load = Callable[[Variant, RankProgram], None]


def save_compiled(
    compiled: Compilation,
    model: PreTrainedModel,
    directory: str | Path,
    load: Load,
    *,
    generation_config: GenerationConfig | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write the variants that `compiled` has so far, and those that generating takes, with the weights of all ranks.

    `model` is the model that `compiled` was made from. `load` puts weights into programs, one rank at a time. Raises
    ArtifactError where the directory holds something else or the disk is full; GraphFormatError where a graph has an op
    that no file can hold.
    """
    parts = parts_of(compiled, model)
    with new_directory(Path(directory)) as staging:
        write_common(staging, parts, compiled.plan, model, generation_config, tokenizer, compiled.source)
        for rank in range(compiled.mesh.size):
            write_rank(staging, rank, list(_programs(parts, rank, load)))
        finish(staging, parts, compiled.plan, staging.records)


def _programs(parts: Sequence[Part], rank: int, load: Load) -> Iterator[tuple[Part, RankProgram]]:
    """Yield each part's program for one rank, for inference, with
    its weights; slices that two programs share are one tensor."""
    done: list[RankProgram] = []
    for part in parts:
        variant = part.variant
        program = emit_rank(
            variant.traced.graph_module,
            variant.plan,
            rank,
            layer_kinds=variant.traced.layer_kinds,
            sources=variant.sources,
        )
        left = program
        for other in done:
            left = share_weights(other, left)
        if left.param_shards:
            load(variant, left)
        done.append(program)
        yield part, program


# -- the files --------------------------------------------------------------------------------------------------------


def write_common(
    staging: Staging,
    parts: Sequence[Part],
    plan: PartitionPlan,
    model: PreTrainedModel,
    generation_config: GenerationConfig | None,
    tokenizer: PreTrainedTokenizerBase | None,
    source: VariantSource,
) -> None:
    """Write all files that belong to no single rank. `source` has made the variants."""
    config = parts[0].variant.traced.config
    name = type(model).__name__
    fields = {**config.to_diff_dict(), "architectures": [name]}
    config = type(config).from_dict(fields)
    staging.write("config.json", config.to_json_string())
    if generation_config is None and isinstance(model, GenerationMixin):
        generation_config = GenerationConfig.from_model_config(config)
    if generation_config is not None:
        staging.write("generation_config.json", generation_config.to_json_string())
    staging.write("plan.json", plan_to_text(plan))
    staging.write_json("model.json", _model_fields(model, parts, source))
    for part in parts:
        saved, graph = _saved_variant(part, parts), part.variant.traced.graph_module
        staging.write_json(f"{saved.folder}/variant.json", saved.to_dict())
        staging.write(f"{saved.folder}/plan.json", plan_to_text(part.variant.plan))
        staging.write_json(f"{saved.folder}/graph.json", graph_to_json(graph, LAYERS))
        values = {n: t for n, t in used_tensors(graph).items() if not t.is_meta}
        if values:
            staging.write_tensors(f"{saved.folder}/graph.safetensors", values, {"variant": part.name})
    if tokenizer is not None:
        _write_tokenizer(staging, tokenizer)


def _model_fields(model: PreTrainedModel, parts: Sequence[Part], source: VariantSource) -> dict[str, Any]:
    """Return the facts about a model's class that calls and generation need, for model.json."""
    parameters = inspect.signature(model.forward).parameters.values()
    plain = (bool, int, float, str, type(None))
    return {
        "class": type(model).__name__,
        "main_input_name": model.main_input_name,
        "is_asked": is_asked(model, with_encoder=any(part.variant.encoder is not None for part in parts)),
        "positions_follow_mask": not model.can_generate() or follow_mask(type(model)),
        "positions_of_values": source.positions_of_values,
        "own_cache": any(part.variant.traced.phase for part in parts),
        "main": parts[0].name,
        "always": {name: value for name, value in source.always.items() if isinstance(value, plain)},
        # Each is [name, kind, True if it may be left out, its default where that is a plain value].
        "forward": [
            [p.name, p.kind.name, p.default is not p.empty, p.default if isinstance(p.default, plain) else None]
            for p in parameters
        ],
    }


def _saved_variant(part: Part, parts: Sequence[Part]) -> SavedVariant:
    """Collect the facts of one saved variant for its variant.json."""
    variant, traced = part.variant, part.variant.traced
    if traced.value_guards:
        raise ArtifactError(
            f"{traced.model_class}'s graph is for calls in which {traced.value_guards[0].line} comes out as it did, "
            "which no file says: use compile or from_pretrained"
        )
    names = {id(p.variant): p.name for p in parts}
    facts = traced.facts
    graph = traced.graph_module
    return SavedVariant(
        name=part.name,
        use_cache=traced.use_cache,
        phase=traced.phase,
        inputs=traced.input_names,
        input_specs={name: (spec.dims, _dtype(spec.dtype)) for name, spec in variant.specs.items()},
        fixed={name: value for name, value in variant.fixed.items()},  # type: ignore[misc]  # plain, as read_call has it
        output_order=variant.output_order,
        layer_kinds=traced.layer_kinds,
        encoder=names[id(variant.encoder)] if variant.encoder is not None else "",
        has_encoder=facts.has_encoder,
        embedding_dim=facts.embedding_dim,
        dtype=_dtype(facts.dtype),
        image_shape=traced.image_shape,
        sources={path: variant.sources[id(t)] for path, t in used_tensors(graph).items() if id(t) in variant.sources},
        guards=guards_to_dict(node_meta.guards(graph)),
    )


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_tokenizer(staging: Staging, tokenizer: PreTrainedTokenizerBase) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        # A fast tokenizer is complete in tokenizer.json. Its source, which may be a whole GGUF file, is not copied.
        tokenizer.save_pretrained(scratch, **({"legacy_format": False} if tokenizer.is_fast else {}))
        for path in sorted(Path(scratch).iterdir()):
            staging.write(f"{TOKENIZER}/{path.name}", path.read_bytes())


def write_rank(staging: Staging, rank: int, programs: Sequence[tuple[Part, RankProgram]]) -> None:
    """Write the loaded programs of one rank, and one file with the tensors of all of them."""
    weights: dict[str, torch.Tensor] = {}
    key_of: dict[tuple[object, ...], str] = {}
    for part, program in programs:
        shards, initial = program.param_shards, _initial_state(part.variant)
        keys = {}
        for name, tensor in used_tensors(program.graph_module).items():
            shard = shards.get(name)
            if shard is not None and shard.is_buffer:
                tensor = initial.get(shard.source, tensor)
            slice_ = (part.name, name) if shard is None else shard.slice_key
            if slice_ not in key_of:
                plain_key = f"{part.name}.{name}" if shard is None else shard.source
                key = plain_key
                while key in weights:
                    key = f"{plain_key}#{len(weights)}"
                key_of[slice_], weights[key] = key, tensor
            keys[name] = key_of[slice_]
        staging.write_json(f"variants/{part.name}/rank{rank}.json", program_to_dict(program, keys))
    staging.write_tensors(f"weights/rank{rank}.safetensors", weights, {"rank": str(rank)})


def _initial_state(variant: Variant) -> dict[str, torch.Tensor]:
    """Return the buffers that calls write, by name in the model, with the values from before the first call."""
    tensors = variant.traced.graph_module.named_buffers(remove_duplicate=False)
    by_name = {variant.sources[id(t)]: t for _, t in tensors if id(t) in variant.sources}
    return {name: by_name[name] for name in variant.graph.state}


def finish(
    staging: Staging, parts: Sequence[Part], plan: PartitionPlan, files: Mapping[str, FileRecord], key: str = ""
) -> None:
    """Write the manifest, as the last file, and sync all directories.
    Raises ArtifactError where a listed file is missing."""
    manifest = Manifest(
        model=plan.model,
        tp=plan.mesh.tp,
        pp=plan.mesh.pp,
        variants=tuple(part.name for part in parts),
        versions=library_versions(),
        files=dict(sorted(files.items())),
        key=key,
    )
    staging.write(MANIFEST, manifest.to_text())
    check_listing(staging.directory, manifest)  # other ranks, which are other processes, may have written some files
    for folder, _, _ in os.walk(staging.directory):
        sync_directory(Path(folder))
