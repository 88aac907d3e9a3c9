"""`compile` and what it returns: the plan, one program per rank, and ways to run and check them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from autodist_fx.adapters import without_wrapper
from autodist_fx.call import Call, read_call
from autodist_fx.errors import AutodistError
from autodist_fx.garbage import garbage_stays
from autodist_fx.numeric.conversation import verify_numeric
from autodist_fx.outputs import merged, nested
from autodist_fx.runtime.backward import glued, run_backward
from autodist_fx.runtime.local_cache import encoder_view, local_cache
from autodist_fx.runtime.process_group import DEFAULT_TIMEOUT_SECONDS, join
from autodist_fx.runtime.simulate import simulate
from autodist_fx.runtime.table_checks import outside_a_table
from autodist_fx.tracing import (
    STATE_PREFIX,
    InputForm,
    class_for,
    empty_model,
    forms_of,
    has_own_cache,
)
from autodist_fx.variant import Variant
from autodist_fx.weights.load import load_rank
from autodist_fx.weights.module_source import ModuleSource
from cost_model import hardware as presets
from cost_model.devices import DeviceMap, Memory
from cost_model.errors import PlanError
from cost_model.hardware import Hardware
from cost_model.mesh import Mesh
from cost_model.op_graph import OpGraph
from cost_model.plan import PartitionPlan
from cost_model.plan_request import PlanRequest, options_of, request_for
from passes.graph_changes import GraphChanges, graph_changes
from passes.graph_text import graph_diff
from passes.pass_manager import emit_rank
from passes.program import RankProgram
from passes.verify import verify as verify_programs
from passes.verify_handover import verify_handover

if TYPE_CHECKING:
    from autodist_fx.runtime.generation import DistributedCausalLM


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
    train: bool = False,
    verify: bool = True,
    dump_dir: str | Path | None = None,
) -> CompiledModel:
    """Split a model over `tp * pp` ranks.

    model: a PreTrainedModel, with weights or on meta (never changed), or a config. A PeftModel counts as the model that
        it has put adapters into.
    tp, pp: ranks that share each tensor; pipeline stages. Global rank = stage * tp + tp_rank.
    hardware: what seconds and memory are predicted for ("cpu-gloo", "a100", "h100", "generic", or a Hardware);
        by default "generic" where CUDA is there, "cpu-gloo" where not.
    objective: "shard" (shard every matmul weight that can be, as fast as can be); "latency" or "throughput" (time alone
        decides, it may replicate; the two differ in choose_mesh, not on one mesh); "memory" (as "shard", with stages
        cut so that the fullest device is as empty as can be, instead of the slowest as fast).
    use_cache, input_names, concrete_args: what to trace; see autodist_fx.tracing.trace.
    sizes: lengths "B" (batch), "S" (tokens a step), "P" (tokens cached before) and "E" (what an encoder before the
        decoder reads) to predict for; by default one sequence of 128 tokens, with use_cache one step after 512.
    pin: roles fixed for linears ("column", "row", "replicate") and embeddings ("vocab", "hidden", "replicate") by
        patterns over module paths or op names: {"*.q_proj": "replicate"}. The search does the rest around them.
    cuts: where stages 1, 2, ... begin: a module path ("model.layers.12"), or 12, the number of a repeated layer.
    max_memory: what a device holds of weights and caches, in bytes or as "40GiB"; or one amount for each stage, in a
        list or by the stage's number. The search then meets it or raises NoPlanFits.
    device_map: stages on devices that differ, one entry a stage: ["a100", "h100"], or {"0": {"hardware": "h100",
        "memory": "40GiB"}, ...}. Stages end where each device, at its own speed and with its own memory, keeps up with
        the others. The ranks of one stage must be alike. Sharding is chosen for the slowest device.
    plan: a plan made earlier for this model; no search then, and objective, pin, ... are the plan's. PlanError if it is
        another model's, or contradicts itself (edited by hand).
    train: let the programs carry what a backward pass needs, too (CompiledModel.gradients).
    verify: prove every rank's program before returning it (CompiledModel.verify).
    dump_dir: gets every rank's graph after each pass, as text.

    Errors: TracingError, MeshError, NoPlanFits, PlanError, VerificationError; all are AutodistError.
    """
    if train and use_cache:
        raise AutodistError("train=True is for whole sequences: leave use_cache out")
    model = without_wrapper(model)
    fixed = {"pin": pin, "cuts": cuts, "max_memory": max_memory, "device_map": device_map}
    options: dict[str, Any] = {"objective": objective, **fixed}
    if plan is not None:
        given = [name for name, value in fixed.items() if value]
        if given:
            raise PlanError(f"a plan is used as it is, and {given[0]} would change it: leave out one of them")
        # What it was made for holds for other forms of the model, too, which have plans of their own.
        options = options_of(plan)
        hardware = hardware or options["hardware"]
    options["hardware"] = hardware_for(hardware, options["device_map"])
    request = request_for(Mesh(tp, pp) if plan is None else plan.mesh, sizes=sizes, **options)
    request = replace(request, whole_experts=not train)
    checks: dict[str, Any] = {
        "verify_programs": verify, "train": train, "dump_dir": dump_dir, "always": concrete_args or {},
    }  # fmt: skip
    if use_cache and has_own_cache(class_of(model)):
        prompt, step = Variant.make_phases(model, request, concrete_args, plan)
        compiled = CompiledModel(model, request, step, prompt=prompt, **checks)
    else:
        variant = Variant.make(model, request, use_cache, input_names, concrete_args, plan)
        compiled = CompiledModel(model, request, variant, **checks)
    if verify:
        compiled.verify()
    return compiled


def class_of(model: PreTrainedModel | PretrainedConfig) -> type[PreTrainedModel]:
    return class_for(model) if isinstance(model, PretrainedConfig) else type(model)


def hardware_for(name: str | Hardware | None, device_map: DeviceMap | None = None) -> Hardware | None:
    """That of a name; for None what the device map says, else "generic" where CUDA is there, "cpu-gloo" where not."""
    if name is None and device_map:
        return None
    if name is None:
        name = "generic" if torch.cuda.is_available() else "cpu-gloo"
    return presets.hardware(name)


class CompiledModel:
    """A model split over a mesh: `plan`, `rank(r)`, `graph_diff(r)`, `simulate(**inputs)`, `verify()`."""

    def __init__(
        self,
        model: PreTrainedModel | PretrainedConfig,
        request: PlanRequest,
        variant: Variant,
        *,
        always: Mapping[str, object],
        verify_programs: bool,
        train: bool,
        dump_dir: str | Path | None,
        prompt: Variant | None = None,
    ) -> None:
        self._always = always
        self._model = model
        self._prompt = prompt  # what the main variant, a step, comes after, in a model with a cache of its own
        self._request = request
        self._main = self._step = variant
        self.verifies = verify_programs
        self._train = train
        self._dump_dir = dump_dir
        self._variants = [variant]

    @property
    def plan(self) -> PartitionPlan:
        """Every decision made; print it, save it, compare it."""
        return self._main.whole_plan or self._main.plan

    def _repr_html_(self) -> str:
        """For notebooks: the plan."""
        return self.plan._repr_html_()

    @property
    def mesh(self) -> Mesh:
        return self._main.plan.mesh

    @property
    def config(self) -> PretrainedConfig:
        return self._main.traced.config

    @property
    def graph(self) -> torch.fx.GraphModule:
        """The whole model's normalised graph, which the ranks' graphs were made from; parameters on meta."""
        return self._main.traced.graph_module

    @property
    def op_graph(self) -> OpGraph:
        """The same as the cost model sees it."""
        return self._main.graph

    def program(self, rank: int) -> RankProgram:
        """Everything that global rank `rank` needs; parameters on meta until loaded."""
        return self._program(self._main, rank)

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        """Real values by name of every buffer and constant that the programs use."""
        parts = (self._main.encoder, self._prompt, self._main)
        modules = [v.traced.graph_module for v in parts if v is not None]
        return {name: b for module in modules for name, b in module.named_buffers(remove_duplicate=False)}

    def encoder_program(self, rank: int) -> RankProgram | None:
        """What global rank `rank` runs once for an input, before `program` at each step of a decoder; None where the
        model, or this form of it, has no such part. It writes what the steps read into their cache."""
        return None if self._main.encoder is None else self._program(self._main.encoder, rank)

    def prompt_program(self, rank: int) -> RankProgram | None:
        """What global rank `rank` runs for a prompt, where the model has a cache of its own; `program` is then that of
        each step after it. None for all other models."""
        return None if self._prompt is None else self._program(self._prompt, rank)

    @property
    def prompt_plan(self) -> PartitionPlan | None:
        """The plan of the prompt's programs, where these are others than the steps'."""
        return None if self._prompt is None else self._prompt.plan

    def rank(self, rank: int) -> torch.fx.GraphModule:
        """The GraphModule of global rank `rank`."""
        return self.program(rank).graph_module

    def graph_diff(self, rank: int) -> str:
        """Unified diff from the traced, normalised graph to that rank's."""
        return graph_diff(self.graph, self.rank(rank))

    def graph_changes(self, rank: int) -> GraphChanges:
        """The same, counted: which kinds of nodes were inserted, replaced, removed or changed."""
        return graph_changes(self.graph, self.rank(rank))

    def verify(self, *, numeric: bool = False) -> None:
        """Prove every rank's program (passes/verify.py). Raises VerificationError, which names the node.

        `numeric`: `verify_numeric`, too.
        """
        for variants in self._together():
            for variant in variants:
                self._verify(variant)
        if numeric:
            self.verify_numeric()

    def verify_numeric(self) -> None:
        """Run all ranks in this process, in float64 on drawn weights, and compare with the model's own graph, which
        knows nothing of plans and rules (autodist_fx/numeric); with `train`, gradients too, of models of up to 2**24
        parameters. Needs no weights, and little memory for a model of any size.

        Raises VerificationError, which names the rank, the output, and for a small model the first node that differs;
        AutodistError where the model itself does not run on made-up inputs.
        """
        for variants in self._together():
            verify_numeric(variants, self._all_programs, self.buffers)

    def _together(self) -> list[list[Variant]]:
        """The forms there are; a prompt's and its step's are one."""
        if self._prompt is None:
            return [[self._main]]
        phases = [self._prompt, self._step]
        return [phases] if self._main is self._step else [phases, [self._main]]

    def _all_programs(self, variant: Variant) -> list[RankProgram]:
        return [self._program(variant, rank) for rank in range(self.mesh.size)]

    def simulate(self, **inputs: Any) -> Any:
        """All ranks in this process, a thread each; the outputs that `model(**inputs)` would have.

        With `use_cache` or a cache among the inputs, `past_key_values` in the output is a `SimulatedCache`, to be
        passed to the next call; None starts an empty one. What an encoder reads is given in the first call, in which
        it runs, and may be left out later. Raises AutodistError where the model has no weights.
        """
        self._refuse_without_weights("simulate")
        call = read_call(self._model, inputs, self._always)  # type: ignore[arg-type]
        if call.use_cache and self.has_own_cache:
            return self._simulate_own_cache({**call.tensors, "past_key_values": call.cache}, call)
        given, cache = call.tensors, call.cache
        self._main.traced.check_images(given)
        if call.use_cache and not isinstance(cache, SimulatedCache):
            if cache is not None and cache.get_seq_length() > 0:
                raise AutodistError(
                    "simulate cannot split a cache that holds tokens already: start with past_key_values=None and "
                    "pass on the one it returns"
                )
            cache = None
        variant = self._variant_for(call, 0 if cache is None else cache.length)
        self._load(variant)
        variant.check_lengths(given, 0 if cache is None else cache.length)
        if not call.use_cache:
            return self._returned(variant, call, self._run(variant, [given] * self.mesh.size))
        encoded: dict[str, Any] = {}
        if cache is None:
            cache = SimulatedCache([local_cache(variant.traced.config, p) for p in variant.programs.values()])
            if variant.encoder is not None:
                given = variant.encoder.with_encoder_mask(given)
                encoded = self._encode(variant, given, cache)
        if variant.encoder is not None:
            given = {**cache.encoder_inputs, **given}
        filled = self._filled(variant, given, cache.length)
        outputs = self._run(variant, [{**filled, "past_key_values": own} for own in cache.ranks])
        cache.length += _step_length(given)
        return self._returned(variant, call, {**encoded, **outputs, "past_key_values": cache})

    def gradients(self, **inputs: Any) -> dict[str, torch.Tensor]:
        """Run forward and backward on all ranks in this process: the gradients that `model(**inputs).loss.backward()`
        leaves in `model`, by the names of its `named_parameters()`, each whole; those it leaves at None are left out.

        Needs `compile(..., train=True)`, a model with weights, and inputs that it computes a loss from (`labels=...`).
        The model stays as it is, and so do its own `.grad`. Raises AutodistError where one of these is missing;
        CommunicationError where ranks that hold the same elements have different gradients of them.
        """
        if not self._train:
            raise AutodistError("these programs are for inference: compile with train=True for gradients")
        self._refuse_without_weights("gradients")
        call = read_call(self._model, inputs, self._always)  # type: ignore[arg-type]
        if call.use_cache:
            raise AutodistError("gradients are of a whole sequence: leave past_key_values and use_cache out")
        variant = self._variant_for(call, 0)
        self._load(variant)
        variant.check_lengths(call.tensors, 0)
        programs = list(variant.programs.values())
        found = glued(programs, run_backward(programs, call.tensors)[1])
        model: PreTrainedModel = self._model  # type: ignore[assignment]
        by_any_name = dict(model.named_parameters(remove_duplicate=False))
        by_tensor = {id(by_any_name[name]): gradient for name, gradient in found.items()}
        return {n: by_tensor[id(p)] for n, p in model.named_parameters() if p.requires_grad and id(p) in by_tensor}

    def _run(self, variant: Variant, per_rank: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The flat outputs of all ranks together. AutodistError that names an id outside the table it is for."""
        try:
            return merged(simulate(list(variant.programs.values()), per_rank))
        except IndexError as error:
            message = outside_a_table(variant.traced.graph_module, per_rank[0])
            if message is None:
                raise
            raise AutodistError(message) from error

    def _returned(self, variant: Variant, call: Call, outputs: Mapping[str, Any]) -> Any:
        order = dict.fromkeys((*variant.output_order, *outputs))
        found = nested({k: v for k, v in outputs.items() if call.use_cache or k != "past_key_values"}, order)
        return found if call.return_dict else found.to_tuple()

    def _encode(self, variant: Variant, given: Mapping[str, Any], cache: SimulatedCache) -> dict[str, Any]:
        """Fill those layers of `cache` that hold what the encoder gives, and note what it was given; its outputs."""
        assert variant.encoder is not None
        encoder = variant.encoder
        cache.encoder_inputs = {name: given[name] for name in encoder.traced.input_names if name in given}
        per_rank = [
            {**cache.encoder_inputs, "past_key_values": encoder_view(own, variant.programs[r], encoder.programs[r])}
            for r, own in enumerate(cache.ranks)
        ]
        found = self._run(encoder, per_rank)
        return {name: value for name, value in found.items() if name != "past_key_values"}

    def _simulate_own_cache(self, inputs: dict[str, Any], call: Call) -> Any:
        """One call of a model whose cache is its own: the prompt's graph first, then the step's."""
        cache = inputs.pop("past_key_values", None)
        if cache is not None and not isinstance(cache, SimulatedCache):
            raise AutodistError("simulate goes on with the cache of its own last output: start with None")
        given = {name: value for name, value in inputs.items() if value is not None}
        past = 0 if cache is None else cache.length
        tokens = _step_length(given)
        if past and tokens != 1:
            raise AutodistError(f"{self.plan.model} takes one token at a time after its prompt, and got {tokens}")
        if self._prompt is None:
            self._prompt, step = self.new_phases()
            self._step = step
            self._variants.append(step)
            if self.verifies:
                self.verify()
        variant = self._step if past else self._prompt
        self._load(variant)
        filled = self._filled(variant, given, past)
        variant.check_lengths(filled, past)
        states = [dict(own) for own in cache.ranks] if cache is not None else [{} for _ in range(self.mesh.size)]
        everywhere = {name: value for own in reversed(states) for name, value in own.items()}
        per_rank = []
        for program, own in zip(variant.programs.values(), states, strict=True):
            mine = {name: own.get(name, everywhere.get(name)) for name in program.input_names if name in everywhere}
            per_rank.append({name: filled.get(name, mine.get(name)) for name in program.input_names})
        outputs = simulate(list(variant.programs.values()), per_rank)
        new = {name for of_rank in outputs for name in of_rank if name.startswith(STATE_PREFIX)}
        for own, of_rank in zip(states, outputs, strict=True):
            for name in new:  # a rank that does not make it any more has an old one
                own.pop(name, None)
            own.update({name: value for name, value in of_rank.items() if name in new})
        found = {n: v for n, v in merged(outputs).items() if not n.startswith(STATE_PREFIX)}
        return self._returned(variant, call, {**found, "past_key_values": SimulatedCache(states, past + tokens)})

    def to_distributed(
        self,
        *,
        device: str | torch.device | None = None,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        rank: int | None = None,
        world_size: int | None = None,
        master_addr: str | None = None,
        master_port: int | None = None,
    ) -> DistributedCausalLM:
        """This process's share of the model, which every process of the mesh has in memory; see from_pretrained.

        Planned anew for generating (with a KV cache), with what was given to `compile` for that. Called in
        every process alike, under torchrun or with `rank`, ... given. The model itself may be freed afterwards.
        """
        from autodist_fx.pretrained import distribute  # which compiles

        self._refuse_without_weights("to_distributed")
        joined = join(
            self.mesh,
            device=device,
            rank=rank,
            world_size=world_size,
            master_addr=master_addr,
            master_port=master_port,
            timeout_seconds=timeout,
        )
        return distribute(
            self._model,  # type: ignore[arg-type]
            joined,
            planning=self._request.options,
            verify=self.verifies,
            dump_dir=self._dump_dir,
        )

    def save(self, directory: str | Path, *, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Write plan, graphs and weights of all ranks as an artifact (docs/artifact.md), for `adx.load(directory)`.

        With the forms of the model that were used so far, and those that generating takes. `tokenizer` goes along, for
        `autodist-fx run --artifact`. An artifact that is there already is replaced. Raises ArtifactError; AutodistError
        where the model has no weights; GraphFormatError where a graph has an op that no file can hold.
        """
        from autodist_fx.artifact.save import save_compiled

        self._refuse_without_weights("save")
        source = ModuleSource(self._model)
        save_compiled(
            self,
            directory,
            lambda variant, program: self._fill(variant, program, source),
            generation_config=getattr(self._model, "generation_config", None),
            tokenizer=tokenizer,
        )

    # -- variants ------------------------------------------------------------------------------------------------------

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The traced forms made so far, the main one first; in a model with a cache of its own, steps' prompts too."""
        others = [v for v in (self._prompt, *self._variants) if v is not None and v is not self._main]
        return (self._main, *others)

    @property
    def always(self) -> Mapping[str, object]:
        """Arguments of every call (concrete_args)."""
        return self._always

    @property
    def shape(self) -> PreTrainedModel:
        """The model, or one like it on meta."""
        return empty_model(self._model) if isinstance(self._model, PretrainedConfig) else self._model

    @property
    def has_own_cache(self) -> bool:
        return has_own_cache(class_of(self._model))

    def new_variant(
        self, *, use_cache: bool, input_names: Sequence[str] | None = None, fixed: Mapping[str, object] | None = None
    ) -> Variant:
        """Another form of the model, planned for its own lengths; verified like the first."""
        request = replace(self._request, sizes=())
        variant = Variant.make(self._model, request, use_cache, input_names, fixed, None)
        if self.verifies:
            self._verify(variant)
        return variant

    def _accepted(self, names: frozenset[str]) -> tuple[str, ...]:
        """Without those of our own filling-in that the model's forward does not take."""
        accepted = inspect.signature(self._model.forward).parameters  # type: ignore[union-attr]
        return tuple(sorted(n for n in names if n in accepted or n not in _FILLED_IN))

    def _variant_for(self, call: Call, past: int) -> Variant:
        """The traced form for this call; traced, planned and verified at first use."""
        forms = forms_of(call.tensors, self._main.traced.facts, past)
        for variant in self._variants:
            if variant.takes(forms, call):
                return variant
        variant = self._new_variant_for(call, forms)
        self._variants.append(variant)
        return variant

    def _new_variant_for(self, call: Call, forms: Mapping[str, InputForm]) -> Variant:
        given = frozenset(forms)
        names: tuple[str, ...] | None = self._accepted(given)
        if call.use_cache:
            filled_in = _FILLED_IN - {"input_ids"} if "inputs_embeds" in given else _FILLED_IN
            names = None if given <= _FILLED_IN else self._accepted(given | filled_in | {"past_key_values"})
        variant = Variant.make(self._model, self._request, call.use_cache, names, call.fixed, None, forms)
        if self.verifies:
            self._verify(variant)
        return variant

    def new_phases(self) -> tuple[Variant, Variant]:
        """(prompt, step) of a model with a cache of its own."""
        return Variant.make_phases(self._model, self._request, None, None)

    def _program(self, variant: Variant, rank: int) -> RankProgram:
        self.mesh.coordinates(rank)  # names a rank that is not there
        if rank not in variant.programs:
            variant.programs[rank] = emit_rank(
                variant.traced.graph_module,
                variant.plan,
                rank,
                layer_kinds=variant.traced.layer_kinds,
                dump_dir=self._dump_dir,
                sources=variant.sources,
                train=self._train and not variant.traced.use_cache,
                stage_uses=variant.stage_uses,
            )
        return variant.programs[rank]

    @garbage_stays()
    def _verify(self, variant: Variant) -> None:
        programs = self._all_programs(variant)
        verify_programs(programs, variant.plan, variant.graph, variant.traced.graph_module)
        if variant.encoder is not None:
            self._verify(variant.encoder)
            writers = self._all_programs(variant.encoder)
            written = variant.encoder.plan, variant.encoder.graph
            verify_handover(writers, written, programs, (variant.plan, variant.graph))

    def _load(self, variant: Variant) -> None:
        if variant.loaded:
            return
        if variant.encoder is not None:
            self._load(variant.encoder)
        self._refuse_without_weights("simulate")
        source = ModuleSource(self._model)
        variant.programs = {rank: self._program(variant, rank) for rank in range(self.mesh.size)}
        for program in variant.programs.values():
            self._fill(variant, program, source)
        variant.loaded = True

    def _fill(self, variant: Variant, program: RankProgram, source: ModuleSource) -> None:
        buffers = dict(variant.traced.graph_module.named_buffers(remove_duplicate=False))
        load_rank(program, source, buffers=buffers, base_model_prefix=self._model.base_model_prefix)
        program.graph_module.eval()

    def _refuse_without_weights(self, what: str) -> None:
        if isinstance(self._model, PretrainedConfig) or any(p.is_meta for p in self._model.parameters()):
            raise AutodistError(f"{what} needs weights: compile a model that has them, not a config or a meta model")

    def _filled(self, variant: Variant, given: Mapping[str, Any], past: int) -> dict[str, Any]:
        """Positions that the graph takes and the caller left to the model, as transformers' generate sets them."""
        ids = _tokens(given)
        batch, seq = ids.shape[:2]
        filled = dict(given)
        names = variant.traced.input_names
        mask = "decoder_attention_mask" if variant.traced.has_encoder else "attention_mask"
        if mask in names and mask not in filled:
            filled[mask] = torch.ones(batch, past + seq, dtype=torch.long, device=ids.device)
        if "cache_position" in names and "cache_position" not in filled:
            filled["cache_position"] = torch.arange(past, past + seq, device=ids.device)
        if "position_ids" in names and "position_ids" not in filled:
            filled["position_ids"] = torch.arange(past, past + seq, device=ids.device).expand(batch, seq)
        return filled


_FILLED_IN = frozenset({"input_ids", "attention_mask", "position_ids", "cache_position"})


@dataclass
class SimulatedCache:
    """The KV caches of all ranks of a simulation (for a cache of the model's own: its tensors by name), and how many
    tokens they hold."""

    ranks: list[Any]
    length: int = 0
    encoder_inputs: dict[str, Any] = field(default_factory=dict)  # what the encoder was given, where there is one

    def get_seq_length(self) -> int:
        return self.length


def _tokens(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Of the step: a decoder's, where an encoder has its own. [batch, tokens, ...]"""
    names = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")
    return next(inputs[name] for name in names if name in inputs)


def _step_length(inputs: Mapping[str, Any]) -> int:
    return int(_tokens(inputs).shape[1])
