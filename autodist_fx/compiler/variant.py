"""`Variant`: one traced graph of a model (these inputs, with
or without a cache), normalised, with its plan and programs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx
from transformers import PretrainedConfig, PreTrainedModel

from autodist_fx.calls.cache_kinds import CROSS, STATE_PREFIX
from autodist_fx.calls.call import unusual
from autodist_fx.calls.constant_tensor import ConstantTensor
from autodist_fx.calls.lengths import Lengths, guards_text
from autodist_fx.calls.made_for import MadeFor
from autodist_fx.calls.model_signature import signature_of
from autodist_fx.compiler.examples import MOST_TRIES, Trace, phases_once, planned_graph, traced_at, traced_once
from autodist_fx.compiler.loss_division import LossDivision, divide
from autodist_fx.compiler.pause_gc import garbage_stays
from autodist_fx.errors import AutodistError, TracingError
from autodist_fx.tracing import InputSpec, TracedModel, trace_phases
from cost_model.errors import PlanError
from cost_model.graph.op_graph import OpGraph
from cost_model.partition_plan import PartitionPlan
from cost_model.plan.missing_rules import refuse_missing_rules
from cost_model.plan.subplan import subplan
from cost_model.request.plan_request import PlanRequest
from cost_model.search.check_plan import check_plan
from cost_model.search.planner import plan as make_plan
from passes.fx import node_meta
from passes.fx.guards import Guards
from passes.normalize.split_encoder import split_encoder
from passes.op_graph.build import build_op_graph, fingerprint, parameter_names
from passes.op_graph.divide_rows import divide_rows
from passes.op_graph.divide_tokens import why_tokens_stay
from passes.program.rank_program import RankProgram
from passes.program.row_division import RowDivision


@dataclass
class Variant:
    """One traced graph of the model (these inputs, with or without a cache), its plan, and the programs made so far."""

    traced: TracedModel
    graph: OpGraph
    plan: PartitionPlan
    sources: dict[int, str]  # id of each parameter and buffer -> its name
    fixed: dict[str, object]  # Python arguments, which are part of the graph
    specs: dict[str, InputSpec]  # the input spec of each input
    output_order: tuple[str, ...]
    programs: dict[int, RankProgram] = field(default_factory=dict)
    # In a model whose decoder reads an encoder's output through a cache, this variant is the decoder's step, `encoder`
    # the variant that fills that cache, and `whole_plan` the plan that both are parts of.
    encoder: Variant | None = None
    whole_plan: PartitionPlan | None = None
    trace_again: Trace | None = field(default=None, repr=False)  # traces at other sizes; None without a model
    losses: LossDivision | None = None  # of a graph whose loss is a part of a whole batch's
    trains: bool = False  # its programs may have random ops, for a call of which there is an input `random_state`

    @classmethod
    @garbage_stays()
    def make(
        cls,
        model: PreTrainedModel | PretrainedConfig,
        request: PlanRequest,
        use_cache: bool,
        input_names: Sequence[str] | None,
        concrete_args: Mapping[str, object] | None,
        plan: PartitionPlan | None,
        specs: Mapping[str, InputSpec] | None = None,
        values: Mapping[str, torch.Tensor] | None = None,
        *,
        in_parts: bool = False,
        trains: bool = False,
    ) -> Variant:
        """Trace, normalise and plan one variant; `plan`, where given, is used instead of a search. Of
        ConstantTensors among `concrete_args` the graph holds the values; conditions on integers come out as for
        `values`, the tensors of a call. `in_parts`: it is run on parts of a batch, whose losses add up to the whole
        batch's."""
        held = {n: v.tensor() if isinstance(v, ConstantTensor) else v for n, v in (concrete_args or {}).items()}
        traced, again = traced_once(model, use_cache, input_names, held, specs, values)
        fixed = unusual(_parameters(model), concrete_args or {})
        variant = cls.of(traced, request, plan, fixed, in_parts=in_parts, trains=trains)
        variant.trace_again = again
        return variant

    @classmethod
    @garbage_stays()
    def make_phases(
        cls,
        model: PreTrainedModel | PretrainedConfig,
        request: PlanRequest,
        concrete_args: Mapping[str, object] | None,
        plan: PartitionPlan | None,
    ) -> tuple[Variant, Variant]:
        """Make (prompt, step) of a model with its own recurrent cache; `plan`, where given, is a plan for the step."""
        traced, step = phases_once(model, concrete_args)
        fixed = unusual(_parameters(model), concrete_args or {})
        prompt = cls.of(traced, request, None, fixed)
        prompt.trace_again = lambda sizes: trace_phases(model, concrete_args, sizes)[0]
        after = cls.of(step, request, plan, fixed)
        after.trace_again = lambda sizes: trace_phases(model, concrete_args, step_sizes=sizes)[1]
        return prompt, after

    def at_lengths(self, lengths: Lengths, request: PlanRequest, others: Sequence[Variant]) -> Variant:
        """Make the variant for the same call at `lengths`, where guards of this one and of `others` come out otherwise.

        Its weights and caches lie on the ranks as this one's do. Raises AutodistError where they cannot, TracingError
        where no example sizes are found.
        """
        guards = [v.guards for v in (self, *others) if v.guards is not None]
        if self.trace_again is None:
            raise AutodistError(self.guards_text(lengths))
        traced = traced_at(self.traced, self.trace_again, lengths, guards)
        if traced is None:
            raise TracingError(f"{self.guards_text(lengths)}; no graph for them was found in {MOST_TRIES} tries")
        like = replace(request, like=self.whole_plan or self.plan)
        in_parts = self.losses is not None
        variant = Variant.of(traced, like, None, self.fixed, in_parts=in_parts, trains=self.trains)
        self.check_caches(variant)
        return variant

    def check_caches(self, other: Variant) -> None:
        """Raise AutodistError where the two graphs cannot share a cache."""
        own_layers, other_layers = self._cache_layers(), other._cache_layers()
        for layer in own_layers.keys() | other_layers.keys():
            if own_layers.get(layer) != other_layers.get(layer):
                raise AutodistError(
                    f"the graph of {self.traced.model_class} for this call has cache layer {layer} on its ranks "
                    "otherwise than the one before, and cannot go on with its cache: pin the roles of attention's "
                    "linears, or use fewer ranks"
                )

        own_states, other_states = self._states(), other._states()
        for name in own_states.keys() | other_states.keys():
            a, b = own_states.get(name, ()), other_states.get(name, ())
            if len(a) != len(b) or any(type(x) is int and x != y for x, y in zip(a, b, strict=True)):
                raise AutodistError(
                    f"for these lengths {self.traced.model_class} leaves {name.removeprefix(STATE_PREFIX)} as "
                    f"{list(b)}, and its steps go on from {list(a)}: use longer prompts"
                )

    def _states(self) -> dict[str, tuple[object, ...]]:
        """Return the dims of each state that a prompt leaves in the
        model's own recurrent cache: numbers and size symbols."""
        output = next(node for node in reversed(self.traced.graph_module.graph.nodes) if node.op == "output")
        return {
            name: tuple(s or d for s, d in zip(node_meta.symbols(node), node_meta.tensor(node).shape, strict=True))
            for name, node in output.args[0].items()
            if name.startswith(STATE_PREFIX) and isinstance(node, torch.fx.Node)
        }

    def _cache_layers(self) -> dict[int, object]:
        """Return, for each KV cache layer, its stage, placements
        and layouts: graphs that share a cache agree in these."""
        layers: dict[int, object] = {}
        for part in (self.encoder, self):
            for op in part.graph if part is not None else ():
                if op.kind in ("cache_update", "cache_read") and part is not None:
                    planned = part.plan.op(op.name)
                    layouts = [part.plan.layout(i) for i in planned.output_layouts]
                    layers[op.attrs["layer"]] = planned.home, planned.outputs, layouts
        return layers

    @classmethod
    def of(
        cls,
        traced: TracedModel,
        request: PlanRequest,
        plan: PartitionPlan | None,
        fixed: dict[str, object],
        *,
        in_parts: bool = False,
        trains: bool = False,
    ) -> Variant:
        """Plan a traced graph, after normalising it where that was not done.

        `fixed` holds the Python arguments that it was traced with. `plan`, where given, is checked and used. `trains`:
        it may draw random numbers. Raises PlanError, and AutodistError for a graph that draws some and may not.
        """
        losses = divide(traced) if in_parts else None
        graph = planned_graph(traced, trains)
        print_of_it = fingerprint(graph)
        if plan is None:
            plan = make_plan(graph, request, model=traced.model_class, fingerprint=print_of_it)
        else:
            _refuse_foreign(plan, print_of_it, traced.model_class)
            check_plan(plan, graph)
            if request.strict:
                refuse_missing_rules(graph, plan)
        names = parameter_names(traced.graph_module)
        specs, order = traced.specs(), _output_order(traced.graph_module)
        if CROSS in traced.layer_kinds:
            return cls._split(traced, plan, names, fixed, specs, order)
        return cls(traced, graph, plan, names, fixed, specs, order, losses=losses, trains=trains)

    @classmethod
    def _split(
        cls,
        traced: TracedModel,
        plan: PartitionPlan,
        names: dict[int, str],
        fixed: dict[str, object],
        specs: dict[str, InputSpec],
        order: tuple[str, ...],
    ) -> Variant:
        """Split an encoder-decoder graph into the encoder, which
        fills the cross-attention cache, and the decoder's step."""
        cross = [index for index, kind in enumerate(traced.layer_kinds) if kind == CROSS]
        parts = []
        for module in split_encoder(traced.graph_module, cross):
            node_meta.set_guards(module, node_meta.guards(traced.graph_module))
            node_meta.set_history(module, node_meta.history(traced.graph_module))
            graph = build_op_graph(module, names)
            inputs = tuple(str(n.target) for n in module.graph.nodes if n.op == "placeholder")
            part = replace(traced, graph_module=module, input_names=inputs)
            parts.append(cls(part, graph, subplan(plan, graph, fingerprint(graph)), names, fixed, specs, order))
        encoder, step = parts
        step.encoder, step.whole_plan = encoder, plan
        return step

    @property
    def guards(self) -> Guards | None:
        """The guards on the lengths of this graph; None where it has none."""
        return node_meta.guards(self.traced.graph_module)

    @functools.cached_property
    def rows(self) -> RowDivision:
        """Where a batch may be cut into parts that run one after the other, or why it may not."""
        return divide_rows(self.traced.graph_module, self.graph)

    @functools.cached_property
    def whole_steps(self) -> str:
        """Why a step's tokens are to be run at once, in words; "" where they may be run in parts."""
        return why_tokens_stay(self.traced.graph_module, self.graph)

    def fits(self, lengths: Lengths) -> bool:
        """True if all guards hold at these lengths."""
        return self.guards is None or not self.guards.violated(lengths)

    def guards_text(self, lengths: Lengths) -> str:
        """Return the sentence of an error that names the guards which do not hold at these lengths."""
        lines = self.guards.violated(lengths) if self.guards is not None else []
        return guards_text(self.traced.model_class, lengths, lines)

    def with_encoder_mask(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return `inputs` with an attention mask of ones added, where the graph takes one and none is given.

        The mask has the shape (B, E, as a rule) and dtype of its input spec, on the device of the other inputs.
        """
        specs = self.traced.specs()
        if "attention_mask" not in specs or inputs.get("attention_mask") is not None:
            return dict(inputs)
        lengths = {
            symbol: size
            for name, spec in specs.items()
            if isinstance(inputs.get(name), torch.Tensor)
            for symbol, size in zip(spec.dims, inputs[name].shape)
        }
        device = next(x.device for x in inputs.values() if isinstance(x, torch.Tensor))
        mask = specs["attention_mask"]
        shape = [lengths[d] if isinstance(d, str) else d for d in mask.dims]
        return {**inputs, "attention_mask": torch.ones(shape, dtype=mask.dtype, device=device)}

    @property
    def made_for(self) -> MadeFor:
        """The calls that it is for."""
        return MadeFor(self.traced.use_cache, self.fixed, self.specs)


def _parameters(model: PreTrainedModel | PretrainedConfig) -> tuple[inspect.Parameter, ...]:
    """Return forward's parameters; () for a config."""
    return () if isinstance(model, PretrainedConfig) else signature_of(model).parameters


def _output_order(module: torch.fx.GraphModule) -> tuple[str, ...]:
    """Return the flat names of a graph's outputs, in order."""
    output = next(node for node in reversed(module.graph.nodes) if node.op == "output")
    return tuple(output.args[0])


def _refuse_foreign(plan: PartitionPlan, print_of_it: str, model_class: str) -> None:
    """Raise PlanError where the plan was made for another graph."""
    if plan.fingerprint != print_of_it:
        raise PlanError(
            f"the plan is for another graph (of {plan.model}, {plan.fingerprint[:12]}) than this {model_class} "
            f"({print_of_it[:12]}): make a plan for this model, with the same inputs and library versions"
        )
