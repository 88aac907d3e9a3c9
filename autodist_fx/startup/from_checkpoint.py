"""`from_pretrained`: from a checkpoint's name to this rank's share of the model, ready to generate."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from autodist_fx.api.compiled_model import CompiledModel
from autodist_fx.artifact.files import Staging
from autodist_fx.artifact.manifest import FileRecord
from autodist_fx.artifact.reader import Artifact
from autodist_fx.artifact.writer import finish, named_parts, write_common, write_rank
from autodist_fx.calls.lengths import Lengths
from autodist_fx.compiler.compile import compile
from autodist_fx.compiler.generation_traits import follow_mask
from autodist_fx.compiler.variant import Variant
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.comm.agreement import agree
from autodist_fx.runtime.comm.process_group import DEFAULT_TIMEOUT_SECONDS, JoinedRank, join
from autodist_fx.runtime.generation.causal_lm import DistributedCausalLM
from autodist_fx.runtime.generation.guarded_programs import Ways, one_way
from autodist_fx.runtime.generation.recurrent_lm import DistributedOwnCacheLM, Prompt, handovers
from autodist_fx.runtime.generation.seq2seq_lm import DistributedSeq2SeqLM, seq2seq_class
from autodist_fx.runtime.generation.two_graphs import TwoGraphCausalLM
from autodist_fx.startup.split_cache import CacheEntry, cache_directory, entry_for, from_cache, keep
from autodist_fx.tracing import empty_model, has_own_cache, meta_copy
from autodist_fx.weights.checkpoint import open_source
from autodist_fx.weights.load import LoadReport
from autodist_fx.weights.load_program import load_beside, load_program
from autodist_fx.weights.resolve import locate, resolve
from autodist_fx.weights.share import share_weights
from autodist_fx.weights.sources.module_source import ModuleSource
from autodist_fx.weights.sources.source import WeightSource
from cost_model.costs.hardware import Hardware
from cost_model.mesh import Mesh
from cost_model.plan.data import PartitionPlan
from cost_model.plan.write_json import plan_to_text
from cost_model.request.devices import DeviceMap, Memory
from cost_model.request.plan_request import options_of
from passes.normalize.extract_guards import Conditions
from passes.program.rank_program import RankProgram

T = TypeVar("T")


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
        files = [f"{path.name} {path.stat().st_size}" for path in checkpoint.paths]
        model = empty_model(checkpoint.config, wanted_dtype(dtype, checkpoint.config))
        return _Rank(model, lambda: open_source(checkpoint), joined, options, files), checkpoint.generation_config

    entry = None if dump_dir is not None else _entry(cache, name, where, dtype, given, options)
    if entry is not None and not entry.looked_up:

        def share(artifact: Artifact) -> DistributedCausalLM:
            def at_lengths(lengths: Lengths, program: RankProgram) -> Any:
                me = opened()[0]
                main = compile_for_generation(me.model, **me.options.for_compile(artifact.plan))
                make = _ways(me, main, program).make
                assert make is not None
                return make(lengths)

            return artifact.share(
                joined, lambda names, program: opened()[0].whole_sequences(names, program), at_lengths
            )

        found = from_cache(entry, joined, share)
        if found is not None:
            return found
    me, generation_config = opened()
    return _distribute(me, plan=given, generation_config=generation_config, entry=entry)


def _entry(
    cache: bool | str | Path | CacheEntry | None,
    name: str | Path,
    where: Mapping[str, Any],
    dtype: torch.dtype | str | None,
    plan: PartitionPlan | None,
    options: _Options,
) -> CacheEntry | None:
    """The cache's entry for this split, None without a cache."""
    if isinstance(cache, CacheEntry):
        return cache
    directory = cache_directory(cache)
    if directory is None:
        return None
    asked = {"dtype": str(dtype), "plan": "" if plan is None else plan_to_text(plan), **options.for_compile()}
    return entry_for(directory, locate(name, **where), asked)


def cache_entry(
    cache: bool | str | Path | None,
    name: str | Path,
    *,
    dtype: str | None,
    plan: PartitionPlan | None,
    mesh: Mesh,
    planning: Mapping[str, Any],
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> CacheEntry | None:
    """The entry for a split that is asked for like this; None where splits are not kept. `planning`: arguments of
    compile that say what to plan for."""
    options = _Options(mesh=mesh, planning=planning, verify=True, dump_dir=None, progress=None)
    where: dict[str, Any] = {"revision": revision, "token": None, "cache_dir": cache_dir, "local_files_only": None}
    return _entry(cache, name, where, dtype, plan, options)


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
    me = _Rank(model, lambda: ModuleSource(model), joined, options, facts=())
    return _distribute(me, plan=None, generation_config=model.generation_config)


def mesh_of(plan: PartitionPlan | None, tp: int | None, pp: int | None) -> Mesh:
    """The mesh asked for. Raises AutodistError where the plan is for another one."""
    if plan is None:
        return Mesh(1 if tp is None else tp, 1 if pp is None else pp)
    if (tp or plan.mesh.tp, pp or plan.mesh.pp) != (plan.mesh.tp, plan.mesh.pp):
        raise AutodistError(
            f"the plan is for {plan.mesh}, and {Mesh(tp or plan.mesh.tp, pp or plan.mesh.pp)} was asked for: leave tp "
            "and pp out, or make another plan"
        )
    return plan.mesh


def wanted_dtype(dtype: torch.dtype | str | None, config: PretrainedConfig) -> torch.dtype:
    """The dtype of the weights: as named, else the config's (a GGUF file's has none: float32, what it is turned into).

    Raises AutodistError for a text that names none.
    """
    said = config.dtype if dtype in (None, "auto") else dtype
    if said is None:
        return torch.float32
    found = getattr(torch, said.removeprefix("torch."), None) if isinstance(said, str) else said
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise AutodistError(f"no dtype {said!r} for weights: choose auto, float32, bfloat16, float16 or float64")
    return found


def compile_for_generation(model: PreTrainedModel | PretrainedConfig, **options: Any) -> CompiledModel:
    """`compile` with a KV cache, and logits of the last position only where the model offers that. Raises AutodistError
    for a model without a cache."""
    shape = empty_model(model) if isinstance(model, PretrainedConfig) else model
    if not keeps_cache(shape):
        raise AutodistError(
            f"{type(shape).__name__} keeps no cache of the tokens before, so it cannot generate over processes: split "
            f"it with adx.compile (or `autodist-fx compile`), and run the split with its simulate"
        )
    return compile_as_used(shape, **options)


def compile_as_used(model: PreTrainedModel, **options: Any) -> CompiledModel:
    """`compile` for a step of generating; for a model that keeps no cache, for one forward of its main inputs."""
    if not keeps_cache(model):
        return compile(model, **options)
    return compile(model, use_cache=True, concrete_args=generation_arguments(model), **options)


def keeps_cache(model: PreTrainedModel) -> bool:
    """Whether its forward takes what it made of the tokens before."""
    return "past_key_values" in inspect.signature(model.forward).parameters or has_own_cache(type(model))


def generation_arguments(model: PreTrainedModel) -> dict[str, object]:
    """What forward is told while generating, beside its inputs."""
    accepted = inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}


@dataclass(frozen=True, slots=True)
class _Options:
    mesh: Mesh
    planning: Mapping[str, Any]  # hardware, objective, pin, ...: as compile takes them
    verify: bool
    dump_dir: str | Path | None
    progress: Callable[[int, int], None] | None

    def for_compile(self, plan: PartitionPlan | None = None) -> dict[str, Any]:
        """verify=False: emitting other ranks' programs is rank 0's work alone."""
        planning = self.planning if plan is None else {"plan": plan, "hardware": self.planning["hardware"]}
        return {"tp": self.mesh.tp, "pp": self.mesh.pp, **planning, "verify": False, "dump_dir": self.dump_dir}


@dataclass(frozen=True, slots=True)
class _Rank:
    """What makes this process's programs. `model` says how names are tied and called, and holds the buffers that no
    checkpoint has; it may be on meta."""

    model: PreTrainedModel
    open_weights: Callable[[], WeightSource]
    joined: JoinedRank
    options: _Options
    facts: Sequence[str]

    def agreed(self, compiled: CompiledModel) -> RankProgram:
        check = compiled.verify if self.options.verify else None
        program = compiled.program(self.joined.rank)
        plans = [p for p in (compiled.prompt_plan, compiled.plan) if p is not None]
        facts_of_all = [*map(plan_to_text, plans), *self.facts]
        agree(self.joined.communicator, self.joined.rank, self.options.mesh.size, facts_of_all, check=check)
        return program

    def ways(
        self, compiled: CompiledModel, beside: RankProgram, run: Callable[[Variant], T], first: Variant
    ) -> Ways[T]:
        """What `run` makes of `first`, a form of `compiled` whose programs are loaded, and of graphs for other lengths;
        `beside` is a program of this rank whose weights they use."""

        def make(lengths: Lengths) -> tuple[Conditions | None, T]:
            variant, failure = None, None
            try:
                variant = compiled.at_lengths(lengths)
                fact = plan_to_text(variant.whole_plan or variant.plan)
            except AutodistError as error:
                failure, fact = error, str(error)
            check = None if variant is None or not self.options.verify else lambda: compiled.verify_form(variant)
            agree(self.joined.communicator, self.joined.rank, self.options.mesh.size, [fact], check=check)
            if failure is not None:
                raise failure
            assert variant is not None
            for part in (variant.encoder, variant):
                if part is not None:
                    program = compiled.program_of(part, self.joined.rank)
                    left = share_weights(beside, program)
                    if left.param_shards:
                        self.load(compiled, left)
                    program.graph_module.eval()
            return variant.conditions, run(variant)

        return Ways([(first.conditions, run(first))], make, first.forms)

    def load(self, compiled: CompiledModel, program: RankProgram) -> LoadReport:
        source = self.open_weights()
        try:
            return load_program(
                self.model,
                source,
                compiled.buffers,
                program,
                device=self.joined.device,
                progress=self.options.progress,
            )
        finally:
            source.close()

    def whole_sequences(self, input_names: tuple[str, ...], beside: RankProgram) -> Ways[RankProgram]:
        """The program for whole sequences of these inputs, with the weights of `beside` where both hold them alike."""
        compiled = compile(self.model, use_cache=False, input_names=input_names, **self.options.for_compile())
        program = self.agreed(compiled)
        left = share_weights(beside, program)
        if left.param_shards:  # slices that this layout has and the other has not
            self.load(compiled, left)
        program.graph_module.eval()
        rank = self.joined.rank
        return self.ways(compiled, beside, lambda form: compiled.program_of(form, rank), compiled.variants[0])


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
    main = compile_for_generation(model, **me.options.for_compile(plan))
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

    def make_program(input_names: tuple[str, ...]) -> Ways[RankProgram]:
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


def _ways(me: _Rank, main: CompiledModel, program: RankProgram) -> Ways[Any]:
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


def _keep(
    entry: CacheEntry, joined: JoinedRank, main: CompiledModel, generation_config: GenerationConfig | None
) -> None:
    """What this rank has, loaded, goes into the cache; a model with an op that no file can hold does not."""
    parts = named_parts(main.variants)
    programs = [(part, part.variant.programs[joined.rank]) for part in parts]

    def write(staging: Staging) -> None:
        if joined.rank == 0:
            write_common(
                staging, parts, main.plan, main.shape, generation_config, entry.tokenizer, main.always
            )
        write_rank(staging, joined.rank, programs)

    def end(staging: Staging, files: Mapping[str, FileRecord], key: str) -> None:
        finish(staging, parts, main.plan, files, key)

    keep(entry, joined, sum(program.weight_bytes for _, program in programs), write, end)


__all__ = [
    "cache_entry", "compile_for_generation", "distribute", "from_pretrained", "mesh_of", "wanted_dtype",
]  # fmt: skip

