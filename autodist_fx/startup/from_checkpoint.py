"""Starts a rank from a model: compiled, agreed upon with the other ranks, loaded, ready to generate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import GenerationConfig, PreTrainedModel

from autodist_fx.compiler.compilation import Compilation
from autodist_fx.compiler.compile import compile_for_generation, compile_to_run
from autodist_fx.compiler.compile_options import CompileOptions
from autodist_fx.compiler.generation_traits import follow_mask, is_asked
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.comm.process_group import JoinedRank
from autodist_fx.startup.build_model import RankModel, RankParts, build_model
from autodist_fx.startup.facts import model_facts
from autodist_fx.startup.keep_compiled import keep_compiled
from autodist_fx.startup.model_snapshot import ModelSnapshot
from autodist_fx.startup.rank import CompiledPrograms, RankStartup
from autodist_fx.startup.split_cache import CacheEntry
from autodist_fx.tracing import empty_model, meta_copy
from autodist_fx.weights.checkpoint import open_source
from autodist_fx.weights.checkpoint_source import CheckpointSource
from autodist_fx.weights.dtype import wanted_dtype
from autodist_fx.weights.resolve import resolve
from autodist_fx.weights.sources.module_source import ModuleSource
from autodist_fx.weights.sources.source import WeightSource
from autodist_fx.weights.versions import named_as_in
from cost_model.partition_plan import PartitionPlan
from cost_model.request.plan_request import PlanRequest
from passes.program.rank_program import RankProgram


def distribute(
    model: PreTrainedModel, joined: JoinedRank, request: PlanRequest, options: CompileOptions
) -> RankModel:
    """Return this rank's share of a model that every rank has in memory; see CompiledModel.to_distributed."""
    snapshot = ModelSnapshot.of(model)
    startup = RankStartup(model, lambda: ModuleSource(model), joined, request, options, snapshot=snapshot)
    generation_config = getattr(model, "generation_config", None)
    joined.together(lambda: (None, model_facts(model, generation_config, startup.open_weights)))
    return start(startup, generation_config)


def open_checkpoint(
    source: CheckpointSource,
    dtype: torch.dtype | str | None,
    joined: JoinedRank,
    request: PlanRequest,
    options: CompileOptions,
    progress: Callable[[int, int], None] | None,
) -> tuple[RankStartup, GenerationConfig]:
    """Open a checkpoint: return what makes this rank's programs of it, and how it generates. Raises CheckpointError."""
    checkpoint = resolve(source)
    model = empty_model(checkpoint.config, wanted_dtype(dtype, checkpoint.config))

    def open_weights() -> WeightSource:
        return named_as_in(model, open_source(checkpoint))

    startup = RankStartup(model, open_weights, joined, request, options, progress)
    return startup, checkpoint.generation_config


def start(
    startup: RankStartup,
    generation_config: GenerationConfig | None,
    plan: PartitionPlan | None = None,
    entry: CacheEntry | None = None,
    *,
    generates: bool = False,
) -> RankModel:
    """Return this rank's model: compiled (by `plan`, if there is one), agreed upon and loaded; kept in the cache
    where there is an entry for it. Raises AutodistError, before weights are read, where it `generates` and cannot."""
    model, joined = startup.model, startup.joined
    if generates and not model.can_generate():
        raise AutodistError(f"{type(model).__name__} does not generate: name a checkpoint of a language model")

    def compiled() -> tuple[Compilation, str | None]:
        given = model, Compilation, startup.request, startup.unverified, plan
        return (compile_for_generation(*given), None) if generates else compile_to_run(*given)

    main, program, no_generate = startup.agreed(compiled)
    encoder, prompt = main.encoder_program(joined.rank), main.prompt_program(joined.rank)
    report = startup.loaded(main, program, encoder or prompt)
    if entry is not None:
        keep_compiled(entry, joined, main, model, generation_config)
    return build_model(
        RankParts(
            programs=CompiledPrograms(startup, main, [p for p in (program, encoder, prompt) if p is not None]),
            communicator=joined.communicator,
            device=joined.device,
            cuda_graphs=joined.cuda_graphs,
            config=main.config,
            generation_config=generation_config,
            plan=main.plan,
            load_report=report,
            positions_follow_mask=no_generate is not None or follow_mask(type(model)),
            main_input_name=model.main_input_name,
            skeleton=meta_copy(model) if _is_asked(model, no_generate, encoder) else None,
            no_generate=no_generate or "",
        )
    )


def _is_asked(model: PreTrainedModel, no_generate: str | None, encoder: RankProgram | None) -> bool:
    return no_generate is None and is_asked(model, with_encoder=encoder is not None)
