"""`from_pretrained`: from a checkpoint's name to this rank's share of the model, ready to generate."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from autodist_fx.compiled import CompiledModel, compile
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.agreement import agree
from autodist_fx.runtime.generation import DistributedCausalLM
from autodist_fx.runtime.own_cache import DistributedOwnCacheLM
from autodist_fx.runtime.process_group import DEFAULT_TIMEOUT_SECONDS, JoinedRank, join
from autodist_fx.runtime.seq2seq import DistributedSeq2SeqLM, seq2seq_class
from autodist_fx.runtime.two_graphs import TwoGraphCausalLM
from autodist_fx.tracing import empty_model, meta_copy
from autodist_fx.weights.checkpoint import open_source
from autodist_fx.weights.load import LoadReport, load_rank
from autodist_fx.weights.module_source import ModuleSource
from autodist_fx.weights.names import resolve_names
from autodist_fx.weights.resolve import resolve
from autodist_fx.weights.share import share_weights
from autodist_fx.weights.source import WeightSource
from cost_model.devices import DeviceMap, Memory
from cost_model.hardware import Hardware
from cost_model.mesh import Mesh
from cost_model.plan import PartitionPlan
from cost_model.plan_json import plan_to_text
from cost_model.plan_request import options_of
from passes.program import RankProgram


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
    # CheckpointError, here and below, comes out on every rank that sees the cause; the watchdog ends the others.
    checkpoint = resolve(
        name, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    planning = {
        "hardware": hardware,
        "objective": objective,
        "pin": pin,
        "cuts": cuts,
        "max_memory": max_memory,
        "device_map": device_map,
    }
    options = _Options(mesh=mesh, planning=planning, verify=verify, dump_dir=dump_dir, progress=progress)
    files = [f"{path.name} {path.stat().st_size}" for path in checkpoint.paths]
    return _distribute(
        empty_model(checkpoint.config, wanted_dtype(dtype, checkpoint.config)),
        lambda: open_source(checkpoint),
        joined,
        options,
        facts=files,
        plan=given,
        generation_config=checkpoint.generation_config,
    )


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
    return _distribute(
        model,
        lambda: ModuleSource(model),
        joined,
        options,
        facts=(),
        plan=None,
        generation_config=model.generation_config,
    )


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
    """`compile` with a KV cache, and logits of the last position only where the model offers that."""
    shape = empty_model(model) if isinstance(model, PretrainedConfig) else model
    return compile(shape, use_cache=True, concrete_args=generation_arguments(shape), **options)


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


def _distribute(
    model: PreTrainedModel,
    open_weights: Callable[[], WeightSource],
    joined: JoinedRank,
    options: _Options,
    *,
    facts: Sequence[str],
    plan: PartitionPlan | None,
    generation_config: GenerationConfig | None,
) -> DistributedCausalLM:
    """`model` says how names are tied and called, and holds the buffers that no checkpoint has; it may be on meta."""
    def agreed(compiled: CompiledModel) -> RankProgram:
        check = compiled.verify if options.verify else None
        program = compiled.program(joined.rank)
        plans = [p for p in (compiled.prompt_plan, compiled.plan) if p is not None]
        facts_of_all = [*map(plan_to_text, plans), *facts]
        agree(joined.communicator, joined.rank, options.mesh.size, facts_of_all, check=check)
        return program

    def load(compiled: CompiledModel, program: RankProgram) -> LoadReport:
        source = open_weights()
        try:
            return load_rank(
                program,
                source,
                device=joined.device,
                buffers=_buffers(compiled, model, source),
                base_model_prefix=model.base_model_prefix,
                tied=_tied(model),
                key_mapping=getattr(model, "_checkpoint_conversion_mapping", None),
                requires_grad=False,  # these graphs are for inference: nothing to record
                progress=options.progress,
            )
        finally:
            source.close()

    main = compile_for_generation(model, **options.for_compile(plan))
    if plan is not None:
        options = replace(options, planning=options_of(plan))
    program = agreed(main)
    report = load(main, program)

    def whole_sequences(input_names: tuple[str, ...]) -> RankProgram:
        compiled = compile(model, use_cache=False, input_names=input_names, **options.for_compile())
        other = agreed(compiled)
        left = share_weights(program, other)
        if left.param_shards:  # slices that this layout has and the other has not
            load(compiled, left)
        other.graph_module.eval()
        return other

    encoder, prompt = main.encoder_program(joined.rank), main.prompt_program(joined.rank)
    other = encoder or prompt
    if other is not None:
        report = _load_beside(program, other, lambda left: load(main, left), report)
    given = program, joined.communicator, main.config, generation_config
    split: DistributedCausalLM
    if encoder is not None:
        split_class = seq2seq_class(type(model))
        split = split_class(
            *given,
            device=joined.device,
            encoder=encoder,
            main_input_name=model.main_input_name,
            skeleton=None if split_class is DistributedSeq2SeqLM else meta_copy(model),
        )
    elif prompt is not None:
        column = [options.mesh.rank(stage, program.tp_rank) for stage in range(options.mesh.pp)]
        split = DistributedOwnCacheLM(
            *given,
            device=joined.device,
            make_program=whole_sequences,
            prompt=prompt,
            prompts=[cast(RankProgram, main.prompt_program(rank)) for rank in column],
            steps=[main.program(rank) for rank in column],
        )
    else:
        split = TwoGraphCausalLM(*given, device=joined.device, make_program=whole_sequences)
    split.plan = main.plan
    split.load_report = report
    return split


def _load_beside(
    program: RankProgram, other: RankProgram, load: Callable[[RankProgram], LoadReport], report: LoadReport
) -> LoadReport:
    """Give `other` the weights of `program`, which is loaded, and load what it holds besides; both reports in one."""
    left = share_weights(program, other)
    if not left.param_shards:
        return report
    more = load(left)
    return replace(
        more,
        shard_bytes=report.shard_bytes + more.shard_bytes,
        bytes_read=report.bytes_read + more.bytes_read,
        seconds=report.seconds + more.seconds,
        rss_before_bytes=report.rss_before_bytes,
    )


def _buffers(compiled: CompiledModel, model: PreTrainedModel, source: WeightSource) -> Mapping[str, torch.Tensor]:
    """Real values by name of what the checkpoint lacks: non-persistent buffers, and constants of the graph."""
    values = compiled.buffers
    saved = set(values) & model.state_dict().keys()
    found = resolve_names(saved, source.names(), base_model_prefix=model.base_model_prefix) if saved else {}
    return {name: value for name, value in values.items() if name not in found and not value.is_meta}


def _tied(model: PreTrainedModel) -> list[list[str]]:
    """Names of each parameter that has several, in the order of the modules: the input embedding comes first."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


__all__ = ["compile_for_generation", "distribute", "from_pretrained", "mesh_of", "wanted_dtype"]

