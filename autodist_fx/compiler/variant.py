"""One traced form of a model: these inputs, with or without a cache; normalised, planned, and its programs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx
from transformers import PretrainedConfig, PreTrainedModel

from autodist_fx.calls.cache_kinds import CROSS, STATE_PREFIX
from autodist_fx.calls.call import Call, unusual
from autodist_fx.calls.lengths import Lengths, another_way, examples_like, tells_apart, with_total
from autodist_fx.compiler.pause_gc import garbage_stays
from autodist_fx.errors import AutodistError, TracingError
from autodist_fx.tracing import InputForm, Sizes, TracedModel, trace, trace_phases
from cost_model.errors import PlanError
from cost_model.graph.op_graph import OpGraph
from cost_model.plan.data import PartitionPlan
from cost_model.plan.subplan import subplan
from cost_model.request.plan_request import PlanRequest
from cost_model.search.check_plan import check_plan
from cost_model.search.planner import plan as make_plan
from passes.fx.randomness import random_nodes
from passes.fx.shape_propagation import Example, bending_points
from passes.normalize.extract_guards import Conditions, with_fixed
from passes.normalize.functionalize import functionalize
from passes.normalize.pipeline import normalize
from passes.normalize.split_encoder import split_encoder
from passes.op_graph.build import build_op_graph, fingerprint, parameter_names
from passes.partition.fuse_ops import removed_by_fusing
from passes.program.gradient_sums import ParamUse
from passes.program.rank_program import RankProgram

# Two sets of lengths: a number found in both is constant, one that differs follows the inputs, and two that agree in
# both are the same. So they differ by different steps (2, 8, 14, 22 of past and seq, 18 and 10), so that no length plus
# a constant is another. They are small, since a model may have no more positions.
_EXAMPLES = (
    Sizes(batch=11, seq=23, past=29, source=19, kept=7),
    Sizes(batch=13, seq=31, past=43, source=37, kept=17),
)
_MOST_WAYS = 12  # that are looked at for one call's
# Lengths for the first example of a model that cuts sequences into chunks of several sizes: one is taken for which the
# next multiple of each is another number.
_LENGTHS_BEFORE_CHUNKS = (23, 19, 25, 17, 21, 33, 35, 37, 41, 45)


Trace = Callable[[tuple[Sizes, Sizes]], TracedModel]


@dataclass
class Variant:
    """One traced form of the model (these inputs, with or without a cache), its plan, and the programs made so far."""

    traced: TracedModel
    graph: OpGraph
    plan: PartitionPlan
    sources: dict[int, str]  # id of each parameter and buffer -> its name
    fixed: dict[str, object]  # arguments that are not inputs of the graph
    forms: dict[str, InputForm]  # of those that are
    output_order: tuple[str, ...]
    programs: dict[int, RankProgram] = field(default_factory=dict)
    stage_uses: dict[int, tuple[ParamUse, ...]] = field(default_factory=dict)  # what emit_rank keeps there
    loaded: bool = False
    # Of a model whose decoder reads an encoder's output through a cache: this is the decoder's step, `encoder` what
    # fills that cache, and `whole_plan` the plan that both are parts of.
    encoder: Variant | None = None
    whole_plan: PartitionPlan | None = None
    trace_again: Trace | None = field(default=None, repr=False)  # at other lengths; None where no model is at hand

    @classmethod
    @garbage_stays()
    def make(
        cls,
        model: PreTrainedModel | PretrainedConfig,
        request: PlanRequest,
        use_cache: bool,
        input_names: Sequence[str] | None,
        concrete_args: Mapping[str, object] | None,
        given: PartitionPlan | None,
        forms: Mapping[str, InputForm] | None = None,
    ) -> Variant:
        asked: dict[str, Any] = {"input_names": input_names, "concrete_args": concrete_args, "forms": forms}
        traced, again = traced_once(model, use_cache=use_cache, **asked)
        variant = cls.of(traced, request, given, unusual(model, concrete_args or {}))
        variant.trace_again = again
        return variant

    @classmethod
    @garbage_stays()
    def make_phases(
        cls,
        model: PreTrainedModel | PretrainedConfig,
        request: PlanRequest,
        concrete_args: Mapping[str, object] | None,
        given: PartitionPlan | None,
    ) -> tuple[Variant, Variant]:
        """(prompt, step) of a model with a cache of its own; `given` is a plan for the step."""
        traced, step = phases_once(model, concrete_args)
        fixed = unusual(model, concrete_args or {})
        prompt = cls.of(traced, request, None, fixed)
        prompt.trace_again = lambda sizes: trace_phases(model, concrete_args, sizes)[0]
        return prompt, cls.of(step, request, given, fixed)

    def at_lengths(self, lengths: Lengths, request: PlanRequest, others: Sequence[Variant]) -> Variant:
        """The graph for the same call with these lengths, at which the model's code goes another way than in this one
        and in `others`. Its weights and caches lie on the ranks as this one's do.

        Raises AutodistError, where they cannot; TracingError.
        """
        known = [v.conditions for v in (self, *others) if v.conditions is not None]
        if self.trace_again is None:
            raise AutodistError(self.other_way(lengths))
        traced = _traced_at(self.traced, self.trace_again, lengths, known)
        if traced is None:
            raise TracingError(f"{self.other_way(lengths)}; no graph for them was found in {_MOST_WAYS} tries")
        variant = Variant.of(traced, replace(request, like=self.whole_plan or self.plan), None, self.fixed)
        self._check_caches(variant)
        return variant

    def _check_caches(self, other: Variant) -> None:
        """Raises AutodistError where the two graphs cannot share a cache."""
        mine, its = self._cache_layers(), other._cache_layers()
        for layer in mine.keys() | its.keys():
            if mine.get(layer) != its.get(layer):
                raise AutodistError(
                    f"the graph of {self.traced.model_class} for these lengths has cache layer {layer} on its ranks "
                    "otherwise than the one before, and cannot go on with its cache: pin the roles of attention's "
                    "linears, or use fewer ranks"
                )

        states, left = self._states(), other._states()
        for name in states.keys() | left.keys():
            a, b = states.get(name, ()), left.get(name, ())
            if len(a) != len(b) or any(type(x) is int and x != y for x, y in zip(a, b, strict=True)):
                raise AutodistError(
                    f"for these lengths {self.traced.model_class} leaves {name.removeprefix(STATE_PREFIX)} as "
                    f"{list(b)}, and its steps go on from {list(a)}: use longer prompts"
                )

    def _states(self) -> dict[str, tuple[object, ...]]:
        """The dims of what a prompt leaves in a cache of the model's own: numbers, and names of lengths."""
        output = next(node for node in reversed(self.traced.graph_module.graph.nodes) if node.op == "output")
        return {
            name: tuple(s or d for s, d in zip(node.meta["symbols"], node.meta["val"].shape, strict=True))
            for name, node in output.args[0].items()
            if name.startswith(STATE_PREFIX) and isinstance(node, torch.fx.Node)
        }

    def _cache_layers(self) -> dict[int, object]:
        found: dict[int, object] = {}
        for part in (self.encoder, self):
            for op in part.graph if part is not None else ():
                if op.kind in ("cache_update", "cache_read") and part is not None:
                    planned = part.plan.op(op.name)
                    layouts = [part.plan.layout(i) for i in planned.output_layouts]
                    found[op.attrs["layer"]] = planned.home, planned.outputs, layouts
        return found

    @classmethod
    def of(
        cls, traced: TracedModel, request: PlanRequest, given: PartitionPlan | None, fixed: dict[str, object]
    ) -> Variant:
        """`fixed`: the arguments it was traced with that are not inputs. Normalises what is not normalised yet."""
        graph = planned_graph(traced)
        print_of_it = fingerprint(graph)
        if given is None:
            given = make_plan(graph, request, model=traced.model_class, fingerprint=print_of_it)
        else:
            _refuse_foreign(given, print_of_it, traced.model_class)
            check_plan(given, graph)
        names = parameter_names(traced.graph_module)
        known, order = traced.forms(), _output_order(traced.graph_module)
        if CROSS in traced.layer_kinds:
            return cls._split(traced, given, names, fixed, known, order)
        return cls(traced, graph, given, names, fixed, known, order)

    @classmethod
    def _split(
        cls,
        traced: TracedModel,
        plan: PartitionPlan,
        names: dict[int, str],
        fixed: dict[str, object],
        forms: dict[str, InputForm],
        order: tuple[str, ...],
    ) -> Variant:
        cross = [index for index, kind in enumerate(traced.layer_kinds) if kind == CROSS]
        parts = []
        for module in split_encoder(traced.graph_module, cross):
            module.meta["conditions"] = traced.graph_module.meta["conditions"]
            graph = build_op_graph(module, names)
            inputs = tuple(str(n.target) for n in module.graph.nodes if n.op == "placeholder")
            part = replace(traced, graph_module=module, input_names=inputs)
            parts.append(cls(part, graph, subplan(plan, graph, fingerprint(graph)), names, fixed, forms, order))
        encoder, step = parts
        step.encoder, step.whole_plan = encoder, plan
        return step

    @property
    def conditions(self) -> Conditions | None:
        """On lengths; at others than this graph is for, the model's code goes another way."""
        return self.traced.graph_module.meta.get("conditions")

    def fits(self, lengths: Lengths) -> bool:
        """Whether the model's code goes this graph's way at these lengths."""
        return self.conditions is None or not self.conditions.otherwise(lengths)

    def other_way(self, lengths: Lengths) -> str:
        """Where it does not, in words."""
        lines = self.conditions.otherwise(lengths) if self.conditions is not None else []
        return another_way(self.traced.model_class, lengths, lines)

    def with_encoder_mask(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """`inputs`, with a mask of ones of what the encoder reads, where the graph takes one and none is given."""
        known = self.traced.forms()
        if "attention_mask" not in known or inputs.get("attention_mask") is not None:
            return dict(inputs)
        lengths = {
            letter: size
            for name, form in known.items()
            if isinstance(inputs.get(name), torch.Tensor)
            for letter, size in zip(form.dims, inputs[name].shape)
        }
        device = next(x.device for x in inputs.values() if isinstance(x, torch.Tensor))
        mask = known["attention_mask"]
        shape = [lengths[d] if isinstance(d, str) else d for d in mask.dims]
        return {**inputs, "attention_mask": torch.ones(shape, dtype=mask.dtype, device=device)}

    def takes(self, forms: Mapping[str, InputForm], call: Call) -> bool:
        """Whether this is the graph for a call: with a cache, what the call leaves out is filled in."""
        if self.traced.use_cache != call.use_cache or self.fixed != call.fixed:
            return False
        return forms.items() <= self.forms.items() if call.use_cache else forms == self.forms


def _traced_at(
    alike: TracedModel, again: Trace, lengths: Lengths, known: Sequence[Conditions]
) -> TracedModel | None:
    """`alike` traced and normalised anew, so that all its conditions, and those known, come out as at `lengths`."""
    known, points = list(known), frozenset[int]()
    windows = any(":" in kind for kind in alike.layer_kinds)
    usual = [_letters(alike, sizes) for sizes in _sizes(alike)]
    frames = min(alike.fewest_frames, lengths.get("E", 0))
    for _ in range(_MOST_WAYS):
        first, second, fixed = examples_like(
            known,
            lengths,
            (usual[0], usual[1]),
            points,
            frozenset("P") if windows else frozenset(),  # how much a window sees follows no letter
            {"E": frames} if frames else None,
        )
        sizes = _sizes_of(first), _sizes_of(second)
        traced = again(sizes)
        functionalize(traced.graph_module)
        with _naming_refusals(traced):
            found, examples = bending_points(traced.graph_module, _both(traced, sizes))
        if not found <= points and not tells_apart(first, second, frozenset(found)):
            points |= frozenset(found)
            continue
        _normalize(traced, examples)
        meta = traced.graph_module.meta
        meta["conditions"] = with_fixed(meta["conditions"], fixed)
        if meta["conditions"] is None or not meta["conditions"].otherwise(lengths):
            return traced
        known.append(meta["conditions"])
    return None


def _letters(traced: TracedModel, sizes: Sizes) -> Lengths:
    """Those lengths that inputs of this graph have."""
    used = {d for form in traced.forms().values() for d in form.dims if isinstance(d, str)}
    used |= {"P"} if traced.use_cache and traced.phase != "prompt" else set()
    used -= {"S"} if traced.phase == "step" else set()
    every = {"B": sizes.batch, "S": sizes.seq, "P": sizes.past, "E": sizes.source, "K": sizes.kept}
    return {letter: n for letter, n in every.items() if letter in used}


def traced_once(
    model: PreTrainedModel | PretrainedConfig, *, use_cache: bool, **asked: Any
) -> tuple[TracedModel, Trace]:
    """A form of a model, traced and normalised, and how to trace it at other lengths. `asked`: as trace takes it."""

    def again(sizes: tuple[Sizes, Sizes] | None) -> TracedModel:
        return trace(model, use_cache=use_cache, sizes=sizes, **asked)

    return _going_one_way(again(None), again), again


def phases_once(
    model: PreTrainedModel | PretrainedConfig, concrete_args: Mapping[str, object] | None
) -> tuple[TracedModel, TracedModel]:
    """(prompt, step) of a model with a cache of its own, the prompt normalised."""
    prompt, step = trace_phases(model, concrete_args)

    def again(sizes: tuple[Sizes, Sizes]) -> TracedModel:
        nonlocal step  # which follows the prompt
        found, step = trace_phases(model, concrete_args, sizes)
        return found

    return _going_one_way(prompt, again), step


def _going_one_way(traced: TracedModel, again: Trace) -> TracedModel:
    """`traced`, normalised; traced anew where the lengths that it is normalised at take the model another way."""
    examples = _examples_for(traced)
    _normalize(traced, examples)
    conditions: Conditions | None = traced.graph_module.meta["conditions"]
    lengths = [with_total({"P": 0, **example.symbols}) for example in examples]
    if conditions is None or not any(conditions.otherwise(each, remainders=False) for each in lengths):
        return traced
    try:
        return _traced_at(traced, again, lengths[0], [conditions]) or traced
    except TracingError:
        return traced


def planned_graph(traced: TracedModel) -> OpGraph:
    """What plans are made for. Normalises what is not normalised yet."""
    if "conditions" not in traced.graph_module.meta:
        _normalize(traced)
    _refuse_random(traced)
    return build_op_graph(traced.graph_module, fused=removed_by_fusing(traced.graph_module))


def _normalize(traced: TracedModel, examples: tuple[Example, Example] | None = None) -> None:
    examples = examples or _examples_for(traced)
    with _naming_refusals(traced):
        normalize(traced.graph_module, examples)


@contextlib.contextmanager
def _naming_refusals(traced: TracedModel) -> Iterator[None]:
    """What an op says of shapes or dtypes that it refuses, when it runs on examples, is a TracingError."""
    try:
        yield
    except RuntimeError as error:
        raise TracingError(f"{traced.model_class} refuses these inputs: {error}") from error


def _refuse_random(traced: TracedModel) -> None:
    found = random_nodes(traced.graph_module)
    if found:
        raise AutodistError(
            f"{traced.model_class} draws random numbers ({found[0]}, {found[0].meta.get('source')}; {len(found)} "
            "places in all), and each rank would draw others: call model.eval(), or set its dropout to 0"
        )


def _output_order(module: torch.fx.GraphModule) -> tuple[str, ...]:
    output = next(node for node in reversed(module.graph.nodes) if node.op == "output")
    return tuple(output.args[0])


def _examples_for(traced: TracedModel) -> tuple[Example, Example]:
    """Examples that tell what depends on the model's own sizes, of chunks: the second is a multiple, the first none."""
    functionalize(traced.graph_module)
    with _naming_refusals(traced):
        points, examples = bending_points(traced.graph_module, _examples(traced))
    if not points:
        return examples
    first, second = _EXAMPLES
    chunks = math.lcm(*points)
    seq = chunks * math.ceil((2 * max(points) + second.seq) / chunks)
    if seq < 2**20:
        told_apart = (n for n in _LENGTHS_BEFORE_CHUNKS if len({-(-n // p) * p for p in points}) == len(points))
        first = replace(first, seq=next(told_apart, first.seq), source=next(told_apart, first.source))
        return _examples(traced, first, replace(second, seq=seq, source=seq + chunks))
    raise TracingError(f"no example lengths tell what depends on {sorted(points)}: please report the model's config")


def _examples(
    traced: TracedModel, first: Sizes = _EXAMPLES[0], second: Sizes = _EXAMPLES[1]
) -> tuple[Example, Example]:
    return _both(traced, _sizes(traced, first, second))


def _both(traced: TracedModel, sizes: tuple[Sizes, Sizes]) -> tuple[Example, Example]:
    return _example(traced, sizes[0]), _example(traced, sizes[1])


def _sizes(
    traced: TracedModel, first: Sizes = _EXAMPLES[0], second: Sizes = _EXAMPLES[1]
) -> tuple[Sizes, Sizes]:
    """In the second the cache is longer than any window: there the keys that a layer with one sees no longer grow."""
    longest = max((int(kind.partition(":")[2]) for kind in traced.layer_kinds if ":" in kind), default=0)
    first = replace(first, source=first.source + traced.fewest_frames)
    # a multiple of what is one already, and so much more that more frames come out of convolutions
    further = second.source * math.ceil(2 * traced.fewest_frames / second.source)
    second = replace(second, past=second.past + longest, source=second.source + further)
    return first, second


def _sizes_of(lengths: Lengths) -> Sizes:
    """Those that are not among the lengths are no input's."""
    return Sizes(*(lengths.get(letter, 0 if letter == "P" else 1) for letter in "BSPEK"))


def _example(traced: TracedModel, sizes: Sizes) -> Example:
    if traced.phase == "step":
        sizes = replace(sizes, seq=1)
    if not traced.use_cache or traced.phase == "prompt":
        sizes = replace(sizes, past=0)
    symbols = {"B": sizes.batch, "S": sizes.seq}
    if any("K" in form.dims for form in traced.forms().values()):
        symbols["K"] = sizes.kept
    if traced.has_encoder:
        symbols["E"] = sizes.source
    if traced.use_cache and traced.phase != "prompt" and sizes.past:
        symbols |= {"P": sizes.past, "T": sizes.past + sizes.seq}
    return Example(traced.example_inputs(sizes), symbols)


def _refuse_foreign(given: PartitionPlan, print_of_it: str, model_class: str) -> None:
    if given.fingerprint != print_of_it:
        raise PlanError(
            f"the plan is for another graph (of {given.model}, {given.fingerprint[:12]}) than this {model_class} "
            f"({print_of_it[:12]}): make a plan for this model, with the same inputs and library versions"
        )
