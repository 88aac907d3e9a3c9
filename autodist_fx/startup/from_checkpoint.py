"""A process becomes a rank of a model: compiled, agreed upon with the other ranks, loaded, ready to generate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel

from autodist_fx.calls.lengths import Lengths
from autodist_fx.compiler.compilation import Compilation
from autodist_fx.compiler.compile import compile_for_generation
from autodist_fx.compiler.compile_options import CompileOptions
from autodist_fx.compiler.generation_traits import follow_mask
from autodist_fx.compiler.variant import Variant
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.comm.process_group import JoinedRank
from autodist_fx.runtime.generation.causal_lm import DistributedCausalLM
from autodist_fx.runtime.generation.guarded_programs import GuardedPrograms, one_way
from autodist_fx.runtime.generation.recurrent_lm import DistributedOwnCacheLM, Prompt, handovers
from autodist_fx.runtime.generation.seq2seq_lm import DistributedSeq2SeqLM, seq2seq_class
from autodist_fx.runtime.generation.two_graphs import TwoGraphCausalLM
from autodist_fx.startup.facts import model_facts
from autodist_fx.startup.keep_compiled import keep_compiled
from autodist_fx.startup.rank import RankStartup
from autodist_fx.startup.split_cache import CacheEntry
from autodist_fx.tracing import empty_model, meta_copy
from autodist_fx.weights.checkpoint import open_source
from autodist_fx.weights.checkpoint_source import CheckpointSource
from autodist_fx.weights.dtype import wanted_dtype
from autodist_fx.weights.resolve import resolve
from autodist_fx.weights.sources.module_source import ModuleSource
from cost_model.partition_plan import PartitionPlan
from cost_model.request.plan_request import PlanRequest
from passes.program.rank_program import RankProgram


def distribute(
    model: PreTrainedModel, joined: JoinedRank, request: PlanRequest, options: CompileOptions
) -> DistributedCausalLM:
    """The share of `joined` in a model that every rank has in memory; see CompiledModel.to_distributed."""
    startup = RankStartup(model, lambda: ModuleSource(model), joined, request, options)
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
    """What makes this rank's programs of a checkpoint, and how the checkpoint generates. Raises CheckpointError."""
    checkpoint = resolve(source)
    model = empty_model(checkpoint.config, wanted_dtype(dtype, checkpoint.config))
    startup = RankStartup(model, lambda: open_source(checkpoint), joined, request, options, progress)
    return startup, checkpoint.generation_config


def start(
    startup: RankStartup,
    generation_config: GenerationConfig | None,
    plan: PartitionPlan | None = None,
    entry: CacheEntry | None = None,
) -> DistributedCausalLM:
    """A rank's share: compiled (by `plan`, if there is one), agreed upon and loaded; kept in the cache where there is
    an entry for it."""
    model, joined = startup.model, startup.joined
    if not model.can_generate():
        raise AutodistError(
            f"{type(model).__name__} does not generate, and over processes a model is run for that: name a checkpoint "
            "of a language model, or use compile(model).simulate(...) in one process"
        )
    main, program = startup.agreed(
        lambda: compile_for_generation(model, Compilation, startup.request, startup.unverified, plan)
    )
    encoder, prompt = main.encoder_program(joined.rank), main.prompt_program(joined.rank)
    report = startup.loaded(main, program, encoder or prompt)
    if entry is not None:
        keep_compiled(entry, joined, main, model, generation_config)
    given = program, joined.communicator, main.config, generation_config

    def make_program(input_names: tuple[str, ...]) -> GuardedPrograms[RankProgram]:
        return startup.whole_sequences(input_names, program)

    step = main.variants[0]
    split: DistributedCausalLM
    if encoder is not None:
        split_class = seq2seq_class(type(model))
        split = split_class(
            *given,
            device=joined.device,
            encoder=encoder,
            main_input_name=model.main_input_name,
            skeleton=None if split_class is DistributedSeq2SeqLM else meta_copy(model),
            ways=generating_programs(startup, main, program),
        )
    elif prompt is not None:
        steps = [main.program(rank) for rank in joined.mesh.column(joined.rank)]
        split = DistributedOwnCacheLM(
            *given,
            device=joined.device,
            make_program=make_program,
            prompts=generating_programs(startup, main, program),
            steps=one_way(step.conditions, program, step.other_way),
            after_step=handovers(steps, steps),
        )
    else:
        ways = generating_programs(startup, main, program)
        split = TwoGraphCausalLM(*given, device=joined.device, make_program=make_program, ways=ways)
    split.plan = main.plan
    split.positions_follow_mask = follow_mask(type(model))
    split.load_report = report
    return split


def program_at_lengths(startup: RankStartup, lengths: Lengths, beside: RankProgram, plan: PartitionPlan) -> Any:
    """What a rank that generates by `plan` runs at lengths that it has no program for yet, as `GuardedPrograms.make`
    gives it: with the weights of `beside`, which is loaded."""
    main = compile_for_generation(startup.model, Compilation, startup.request, startup.unverified, plan)
    make = generating_programs(startup, main, beside).make
    assert make is not None
    return make(lengths)


def generating_programs(startup: RankStartup, main: Compilation, program: RankProgram) -> GuardedPrograms[Any]:
    """What this rank runs to generate, by lengths: the program of a step (with an encoder's before it); of a prompt and
    what changes hands after it, in a model with a cache of its own. `program` is loaded."""
    rank, mesh = startup.joined.rank, startup.joined.mesh
    step = main.variants[0]

    def with_encoder(form: Variant) -> tuple[RankProgram, RankProgram]:
        return main.program_of(cast(Variant, form.encoder), rank), main.program_of(form, rank)

    def with_handovers(form: Variant) -> Prompt:
        column = mesh.column(rank)
        makers, readers = ([main.program_of(f, r) for r in column] for f in (form, step))
        return main.program_of(form, rank), handovers(makers, readers)

    if step.encoder is not None:
        return startup.guarded(main, program, with_encoder, step)
    if main.prompt_plan is not None:
        return startup.guarded(main, program, with_handovers, main.variants[1])
    return startup.guarded(main, program, lambda form: main.program_of(form, rank), step)

