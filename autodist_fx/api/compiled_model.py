"""What `compile` returns: the plan, one program per rank, and ways to run and check them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from autodist_fx.calls.call import FILLED_IN, Call, read_call
from autodist_fx.calls.lengths import Lengths, lengths_of
from autodist_fx.compiler.pause_gc import garbage_stays
from autodist_fx.compiler.variant import Variant
from autodist_fx.errors import AutodistError
from autodist_fx.numeric.verify_numeric import verify_numeric
from autodist_fx.runtime.cache.kv_cache import local_cache
from autodist_fx.runtime.comm.process_group import DEFAULT_TIMEOUT_SECONDS, join
from autodist_fx.simulation.backward import glued, run_backward
from autodist_fx.simulation.call import (
    SimulatedCache,
    encode,
    returned,
    run,
    run_with_states,
    step_length,
    with_positions,
)
from autodist_fx.tracing import (
    InputForm,
    empty_model,
    forms_of,
    has_own_cache,
)
from autodist_fx.tracing.meta_model import class_of
from autodist_fx.weights.load import load_rank
from autodist_fx.weights.sources.module_source import ModuleSource
from cost_model.graph.op_graph import OpGraph
from cost_model.mesh import Mesh
from cost_model.plan.data import PartitionPlan
from cost_model.request.plan_request import PlanRequest
from passes.fx.changes import GraphChanges, graph_changes
from passes.fx.text import graph_diff
from passes.partition.pipeline import emit_rank
from passes.program.rank_program import RankProgram
from passes.verify.cache_handover import verify_handover
from passes.verify.verify import verify as verify_programs

if TYPE_CHECKING:
    from autodist_fx.runtime.generation.causal_lm import DistributedCausalLM


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
        self._more_prompts: list[Variant] = []  # for lengths at which the model's code goes another way
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

    def program_of(self, variant: Variant, rank: int) -> RankProgram:
        """Of one of `variants`, or of the encoder of one."""
        return self._program(variant, rank)

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
        """Prove every rank's program (passes/verify/verify.py). Raises VerificationError, which names the node.

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
        kept = {} if cache is None else cache.encoder_inputs
        variant = self._variant_for(call, 0 if cache is None else cache.length, kept)
        self._load(variant)
        if not call.use_cache:
            return returned(variant, call, run(variant, [given] * self.mesh.size))
        encoded: dict[str, Any] = {}
        if cache is None:
            cache = SimulatedCache([local_cache(variant.traced.config, p) for p in variant.programs.values()])
            if variant.encoder is not None:
                given = variant.encoder.with_encoder_mask(given)
                encoded = encode(variant, given, cache)
        if variant.encoder is not None:
            given = {**cache.encoder_inputs, **given}
        filled = with_positions(variant, given, cache.length)
        outputs = run(variant, [{**filled, "past_key_values": own} for own in cache.ranks])
        cache.length += step_length(given)
        return returned(variant, call, {**encoded, **outputs, "past_key_values": cache})

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
        programs = list(variant.programs.values())
        found = glued(programs, run_backward(programs, call.tensors)[1])
        model: PreTrainedModel = self._model  # type: ignore[assignment]
        by_any_name = dict(model.named_parameters(remove_duplicate=False))
        by_tensor = {id(by_any_name[name]): gradient for name, gradient in found.items()}
        return {n: by_tensor[id(p)] for n, p in model.named_parameters() if p.requires_grad and id(p) in by_tensor}

    def _simulate_own_cache(self, inputs: dict[str, Any], call: Call) -> Any:
        """One call of a model whose cache is its own: the prompt's graph first, then the step's."""
        cache = inputs.pop("past_key_values", None)
        if cache is not None and not isinstance(cache, SimulatedCache):
            raise AutodistError("simulate goes on with the cache of its own last output: start with None")
        given = {name: value for name, value in inputs.items() if value is not None}
        past = 0 if cache is None else cache.length
        tokens = step_length(given)
        if past and tokens != 1:
            raise AutodistError(f"{self.plan.model} takes one token at a time after its prompt, and got {tokens}")
        if self._prompt is None:
            self._prompt, step = self.new_phases()
            self._step = step
            self._variants.append(step)
            if self.verifies:
                self.verify()
        prompts = [self._prompt, *self._more_prompts]
        variant = self._step if past else prompts[0]
        filled = with_positions(variant, given, past)
        lengths = lengths_of(variant.forms, filled, past)
        if not past:
            variant = self._at_lengths(prompts, lengths, self._more_prompts)
        elif not variant.fits(lengths):
            raise AutodistError(variant.other_way(lengths))
        self._load(variant)
        states = [dict(own) for own in cache.ranks] if cache is not None else [{} for _ in range(self.mesh.size)]
        found = run_with_states(variant, filled, states)
        return returned(variant, call, {**found, "past_key_values": SimulatedCache(states, past + tokens)})

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
        from autodist_fx.startup.from_checkpoint import distribute  # which compiles

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
        from autodist_fx.artifact.writer import save_compiled

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
        every = (self._prompt, *self._more_prompts, *self._variants)
        others = [v for v in every if v is not None and v is not self._main]
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
        return tuple(sorted(n for n in names if n in accepted or n not in FILLED_IN))

    def _variant_for(self, call: Call, past: int, kept: Mapping[str, Any] | None = None) -> Variant:
        """The traced form for this call; traced, planned and verified at first use. `kept`: what an encoder read
        before."""
        forms = forms_of(call.tensors, self._main.traced.facts, past)
        alike = [variant for variant in self._variants if variant.takes(forms, call)]
        if not alike:
            alike = [self._new_variant_for(call, forms)]
            self._variants += alike
        lengths = lengths_of(alike[0].forms, {**(kept or {}), **call.tensors}, past)
        return self._at_lengths(alike, lengths, self._variants)

    def _at_lengths(self, alike: Sequence[Variant], lengths: Lengths, made: list[Variant]) -> Variant:
        """Of graphs for the same call, that which is for these lengths; made at first use, and put into `made`."""
        for variant in alike:
            if variant.fits(lengths):
                return variant
        variant = alike[0].at_lengths(lengths, replace(self._request, sizes=()), alike[1:])
        if self.verifies:
            self._verify(variant)
        made.append(variant)
        return variant

    def _new_variant_for(self, call: Call, forms: Mapping[str, InputForm]) -> Variant:
        given = frozenset(forms)
        names: tuple[str, ...] | None = self._accepted(given)
        if call.use_cache:
            filled_in = FILLED_IN - {"input_ids"} if "inputs_embeds" in given else FILLED_IN
            names = None if given <= FILLED_IN else self._accepted(given | filled_in | {"past_key_values"})
        variant = Variant.make(self._model, self._request, call.use_cache, names, call.fixed, None, forms)
        if self.verifies:
            self._verify(variant)
        return variant

    def at_lengths(self, lengths: Lengths) -> Variant:
        """The main form (of a prompt, in a model with a cache of its own) at these lengths, by letter."""
        if self._prompt is not None:
            return self._at_lengths([self._prompt, *self._more_prompts], lengths, self._more_prompts)
        main = self._main
        alike = [v for v in self._variants if v.traced.use_cache == main.traced.use_cache and v.forms == main.forms]
        return self._at_lengths(alike, lengths, self._variants)

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

    def verify_form(self, variant: Variant) -> None:
        """As `verify`, one of `variants`."""
        self._verify(variant)

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
