"""A process becomes a rank of a model: compiled, agreed upon with the other ranks, loaded, ready to generate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from transformers import GenerationConfig, PreTrainedModel

from autodist_fx.compiler.compilation import Compilation
from autodist_fx.compiler.compile import compile_for_generation
from autodist_fx.compiler.generation_traits import follow_mask
from autodist_fx.compiler.variant import Variant
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.comm.process_group import JoinedRank
from autodist_fx.runtime.generation.causal_lm import DistributedCausalLM
from autodist_fx.runtime.generation.guarded_programs import GuardedPrograms, one_way
from autodist_fx.runtime.generation.recurrent_lm import DistributedOwnCacheLM, Prompt, handovers
from autodist_fx.runtime.generation.seq2seq_lm import DistributedSeq2SeqLM, seq2seq_class
from autodist_fx.runtime.generation.two_graphs import TwoGraphCausalLM
from autodist_fx.startup.rank import _Options, _Rank
from autodist_fx.startup.split_cache import CacheEntry, _keep
from autodist_fx.tracing import meta_copy
from autodist_fx.weights.load_program import load_beside
from autodist_fx.weights.sources.module_source import ModuleSource
from cost_model.partition_plan import PartitionPlan
from cost_model.request.plan_request import options_of
from passes.program.rank_program import RankProgram


def distribute(
    model: PreTrainedModel,
    joined: JoinedRank,
    *,
    planning: Mapping[str, Any],
    verify: bool,
    dump_dir: str | Path | None,
) -> DistributedCausalLM:
    """The share of `joined` in a model that every rank has in memory; see CompiledModel.to_distributed. `planning`:
    arguments of compile that say what to plan for."""
    options = _Options(mesh=joined.mesh, planning=planning, verify=verify, dump_dir=dump_dir, progress=None)
    me = _Rank(model, lambda: ModuleSource(model), joined, options, facts={})
    return _distribute(me, plan=None, generation_config=model.generation_config)


def _distribute(
    me: _Rank,
    *,
    plan: PartitionPlan | None,
    generation_config: GenerationConfig | None,
    entry: CacheEntry | None = None,
) -> DistributedCausalLM:
    """Compiled, agreed upon and loaded; kept in the cache where there is an entry for it."""
    model, joined, mesh = me.model, me.joined, me.options.mesh
    if not model.can_generate():
        raise AutodistError(
            f"{type(model).__name__} does not generate, and over processes a model is run for that: name a checkpoint "
            "of a language model, or use compile(model).simulate(...) in one process"
        )
    main = compile_for_generation(model, Compilation, **me.options.for_compile(plan))
    if plan is not None:  # what it was made for holds for whole sequences, too, which get a plan of their own
        me = replace(me, options=replace(me.options, planning=options_of(plan)))
    program = me.agreed(main)
    report = me.load(main, program)
    encoder, prompt = main.encoder_program(joined.rank), main.prompt_program(joined.rank)
    other = encoder or prompt
    if other is not None:
        report = load_beside(program, other, lambda left: me.load(main, left), report)
    if entry is not None:
        _keep(entry, joined, main, generation_config)
    given = program, joined.communicator, main.config, generation_config

    def make_program(input_names: tuple[str, ...]) -> GuardedPrograms[RankProgram]:
        return me.whole_sequences(input_names, program)

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
            ways=_ways(me, main, program),
        )
    elif prompt is not None:
        steps = [main.program(rank) for rank in mesh.column(joined.rank)]
        split = DistributedOwnCacheLM(
            *given,
            device=joined.device,
            make_program=make_program,
            prompts=_ways(me, main, program),
            steps=one_way(step.conditions, program, step.other_way),
            after_step=handovers(steps, steps),
        )
    else:
        ways = _ways(me, main, program)
        split = TwoGraphCausalLM(*given, device=joined.device, make_program=make_program, ways=ways)
    split.plan = main.plan
    split.positions_follow_mask = follow_mask(type(model))
    split.load_report = report
    return split


def _ways(me: _Rank, main: Compilation, program: RankProgram) -> GuardedPrograms[Any]:
    """What this rank runs to generate, by lengths: the program of a step (with an encoder's before it); of a prompt and
    what changes hands after it, in a model with a cache of its own. `program` is loaded."""
    rank, mesh = me.joined.rank, me.options.mesh
    step = main.variants[0]

    def with_encoder(form: Variant) -> tuple[RankProgram, RankProgram]:
        return main.program_of(cast(Variant, form.encoder), rank), main.program_of(form, rank)

    def with_handovers(form: Variant) -> Prompt:
        column = mesh.column(rank)
        makers, readers = ([main.program_of(f, r) for r in column] for f in (form, step))
        return main.program_of(form, rank), handovers(makers, readers)

    if step.encoder is not None:
        return me.ways(main, program, with_encoder, step)
    if main.prompt_plan is not None:
        return me.ways(main, program, with_handovers, main.variants[1])
    return me.ways(main, program, lambda form: main.program_of(form, rank), step)


__all__ = ["distribute"]  # fmt: skip

