"""`compile`: splits a model over ranks, in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel

from autodist_fx.api.compiled_model import CompiledModel
from autodist_fx.compiler.compile import compile_model
from autodist_fx.compiler.compile_options import CompileOptions
from autodist_fx.runtime.default_hardware import default_hardware
from cost_model.costs.hardware import Hardware
from cost_model.partition_plan import PartitionPlan
from cost_model.request.devices import DeviceMap, Memory
from cost_model.request.plan_options import PlanOptions


def compile(
    model: PreTrainedModel | PretrainedConfig,
    *,
    tp: int = 1,
    pp: int = 1,
    hardware: str | Hardware | None = None,
    objective: str = "shard",
    use_cache: bool = False,
    input_names: Sequence[str] | None = None,
    concrete_args: Mapping[str, object] | None = None,
    sizes: Mapping[str, int] | None = None,
    pin: Mapping[str, str] | None = None,
    cuts: Sequence[int | str] | None = None,
    max_memory: Memory | None = None,
    device_map: DeviceMap | None = None,
    plan: PartitionPlan | None = None,
    strict: bool = False,
    train: bool = False,
    verify: bool = True,
    dump_dir: str | Path | None = None,
    verbose: bool = False,
) -> CompiledModel:
    """Split a model over `tp * pp` ranks.

    model: a PreTrainedModel, with weights or on meta (never changed), or a config. A PeftModel stands for the model
        inside it, adapters included.
    tp, pp: ranks that share each tensor; pipeline stages. Global rank = stage * tp + tp_rank.
    hardware: the device that seconds and memory are predicted for ("cpu-gloo", "a100", "h100", "generic", a file of
        `autodist-fx measure --save`, or a Hardware); by default this machine where it was measured, else "generic"
        where CUDA is there, "cpu-gloo" where not.
    objective: "shard" (shard every matmul weight that can be, as fast as can be); "latency" or "throughput" (time alone
        decides, it may replicate; the two differ in choose_mesh, not on one mesh); "memory" (as "shard", with stages
        cut so that the fullest device is as empty as can be, instead of the slowest as fast).
    use_cache, input_names, concrete_args: choose the variant to trace; see autodist_fx.tracing.trace.
    sizes: values of the size symbols "B" (batch), "S" (tokens a step), "P" (tokens cached before) and "E" (tokens or
        frames that an encoder reads) to predict for; by default one sequence of 128 tokens, with use_cache one step of
        one token after 512.
    pin: roles fixed for linears ("column", "row", "replicate") and embeddings ("vocab", "hidden", "replicate") by
        patterns over module paths or op names: {"*.q_proj": "replicate"}. The search does the rest around them.
    cuts: where stages 1, 2, ... begin: a module path ("model.layers.12"), or 12, the number of a repeated layer.
    max_memory: the most a device may hold of weights and caches, in bytes or as "40GiB"; or one amount for each stage,
        in a list or by the stage's number. The search then meets it or raises NoPlanFits.
    device_map: stages on devices that differ, one entry a stage: ["a100", "h100"], or {"0": {"hardware": "h100",
        "memory": "40GiB"}, ...}. Stages end where each device, at its own speed and with its own memory, keeps up with
        the others. The ranks of one stage must be alike. Sharding is chosen for the slowest device.
    plan: a plan made earlier for this model; no search then, and objective, pin, ... are the plan's. PlanError if it is
        another model's, or contradicts itself (edited by hand).
    strict: refuse, by PlanError, a plan with ops that have no sharding rule and that every tp rank would compute whole;
        without it such ops are named in `plan.warnings`, with what they cost.
    train: let the programs carry what a backward pass needs, too (CompiledModel.gradients); a model in training mode
        may then have dropout, with the same masks on every mesh.
    verify: prove every rank's program before returning it (CompiledModel.verify).
    dump_dir: directory into which every rank's graph is written after each pass, as text, and a record of what each
        pass did, as "passes.rank0.txt".
    verbose: print that record when a rank's program is made: places that each pass worked on, nodes inserted and
        removed.

    Raises TracingError, MeshError, NoPlanFits, PlanError, VerificationError; all are AutodistError.
    """
    wanted = PlanOptions.from_keywords(
        tp=None if tp == 1 else tp, pp=None if pp == 1 else pp,  # 1 counts as not given: a plan has its own mesh
        hardware=hardware, objective=objective, sizes=sizes, pin=pin, cuts=cuts, max_memory=max_memory,
        device_map=device_map, plan=plan, strict=strict,
    )  # fmt: skip
    options = CompileOptions.from_keywords(
        use_cache=use_cache, input_names=input_names, concrete_args=concrete_args, train=train, verify=verify,
        dump_dir=dump_dir, verbose=verbose,
    )  # fmt: skip
    return compile_model(model, CompiledModel, wanted.resolve(default_hardware()), options, wanted.plan)
