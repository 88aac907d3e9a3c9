"""Sources of a compilation's variants: `VariantSource`, and `TracingSource`, which traces and plans a model."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
import torch.fx
from transformers import PretrainedConfig, PreTrainedModel

from autodist_fx.calls.cache_names import CACHE_FIELD
from autodist_fx.calls.call import FILLED_IN, Call
from autodist_fx.calls.constant_tensor import ConstantTensor, may_be_constant
from autodist_fx.calls.input_specs import constant_specs
from autodist_fx.calls.lengths import Lengths
from autodist_fx.calls.model_signature import ModelSignature, signature_of
from autodist_fx.calls.value_guards import hold
from autodist_fx.compiler.compile_options import CompileOptions
from autodist_fx.compiler.variant import Variant
from autodist_fx.compiler.variant_set import VariantSet
from autodist_fx.errors import AutodistError, TracingError
from autodist_fx.runtime.family_positions import counts_positions, family_positions, positions_of_values
from autodist_fx.tracing import InputSpec, empty_model, has_own_cache
from autodist_fx.tracing.hooks import backward_hooks_of
from autodist_fx.tracing.meta_model import class_of, config_of, meta_copy
from autodist_fx.tracing.model_structure import structure_of
from autodist_fx.weights.load import load_rank
from autodist_fx.weights.sources.module_source import ModuleSource
from cost_model.errors import PlanError
from cost_model.partition_plan import PartitionPlan
from cost_model.request.plan_request import PlanRequest
from passes.program.rank_program import RankProgram


class VariantSource(Protocol):
    """Makes a compilation's variants, and loads the weights that their programs run with.

    There are two kinds. `TracingSource` traces a model for each variant that is asked for; `SavedSource` (artifact/)
    has the variants that were saved, and refuses all others by name. Each method that returns variants raises
    AutodistError, TracingError or PlanError where there is no such variant.
    """

    @property
    def always(self) -> Mapping[str, object]:
        """Arguments of every call (compile's concrete_args)."""
        ...

    @property
    def signature(self) -> ModelSignature:
        """The model's signature, by which calls are read."""
        ...

    @property
    def has_own_cache(self) -> bool:
        """True if the model decodes with a recurrent cache of its own:
        it has one variant for a prompt, another for each step."""
        ...

    def structure(self) -> Hashable:
        """Return a value that covers all that variants depend on in
        the model as it is now: equal values, equal variants."""
        ...

    def first(self) -> VariantSet:
        """Make the variants to start with, for the model as it is now."""
        ...

    def phases(self) -> tuple[Variant, Variant]:
        """Make (prompt, step) of a model with its own recurrent cache, where `first` made none."""
        ...

    def for_inputs(
        self, *, use_cache: bool, input_names: Sequence[str] | None, fixed: Mapping[str, object] | None
    ) -> Variant:
        """Make a variant for inputs of these names, with their usual input specs, planned for its own lengths."""
        ...

    @property
    def positions_of_values(self) -> bool:
        """True if the model counts positions that a call leaves out by the values of its tokens or mask."""
        ...

    def completed(self, call: Call) -> Call:
        """Return the call with the positions that the model's own Python counts where it leaves them out; or marked as
        one whose positions the model's graph counts."""
        ...

    def for_call(self, call: Call, specs: Mapping[str, InputSpec], past: int, made: Sequence[Variant]) -> Variant:
        """Make a variant for a call that none of `made` takes; `specs` are the input specs of the call's tensors, and
        `past` is the number of tokens in its cache."""
        ...

    def at_lengths(self, alike: Sequence[Variant], lengths: Lengths) -> Variant:
        """Make a variant for the call of `alike`, at lengths where the guards of none of these hold."""
        ...

    def check_weights(self, purpose: str) -> None:
        """Raise AutodistError where there are no weights for `purpose` ("simulate", "gradients", ...)."""
        ...

    def fill(self, variant: Variant, programs: Sequence[RankProgram]) -> None:
        """Put the weights, as they are now, into the programs of a variant."""
        ...

    def trained_parameters(self) -> Mapping[str, str]:
        """Map every name of a parameter that requires a gradient to
        the first name of that parameter, in the model's order."""
        ...

    def hooked(self, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Apply the backward hooks of parameters to whole gradients,
        by the parameters' first names, and return the results."""
        ...


@dataclass
class TracingSource:
    """Traces variants of a model, or of a config, and plans them.

    `request`: what plans are made for. `options` choose the first variant, and `specs` those of its inputs that differ
    from the usual ones; `plan`, where given, is used for that one.
    """

    model: PreTrainedModel | PretrainedConfig
    request: PlanRequest
    options: CompileOptions
    plan: PartitionPlan | None = None
    specs: Mapping[str, InputSpec] | None = None
    _left_by_calls: frozenset[str] = field(default=frozenset(), init=False)  # the model's, see structure_of
    # The model without weights, and the structure that it has; made when it is asked for positions.
    _family: tuple[Hashable, PreTrainedModel] | None = field(default=None, init=False, repr=False)
    _of_values: tuple[Hashable, bool] | None = field(default=None, init=False, repr=False)  # of that structure
    # For each rank's graph, copies of the model's buffers at the time they were put into it.
    _buffers_read: WeakKeyDictionary[torch.fx.GraphModule, dict[str, torch.Tensor]] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False
    )

    @property
    def always(self) -> Mapping[str, object]:
        """See VariantSource."""
        return dict(self.options.concrete_args)

    @property
    def signature(self) -> ModelSignature:
        """See VariantSource."""
        return signature_of(self.shape)

    @property
    def shape(self) -> PreTrainedModel:
        """The model, or one like it on meta where there is a config only."""
        return empty_model(self.model) if isinstance(self.model, PretrainedConfig) else self.model

    @property
    def has_own_cache(self) -> bool:
        """See VariantSource."""
        return has_own_cache(class_of(self.model), config_of(self.model))

    def structure(self) -> Hashable:
        """See VariantSource."""
        return structure_of(self.model, self._left_by_calls)

    def first(self) -> VariantSet:
        """See VariantSource."""
        options = self.options
        if options.use_cache and self.has_own_cache:
            prompt, step = Variant.make_phases(self.model, self.request, self.always, self.plan)
            self._left_by_calls = prompt.traced.left_by_calls | step.traced.left_by_calls
            return VariantSet(self.structure(), step, [prompt], [step])
        main = Variant.make(
            self.model, self.request, options.use_cache, options.input_names, self.always, self.plan, self.specs,
            in_parts=options.in_parts, trains=options.train,
        )  # fmt: skip
        self._left_by_calls = main.traced.left_by_calls
        return VariantSet(self.structure(), main)

    def phases(self) -> tuple[Variant, Variant]:
        """See VariantSource."""
        return Variant.make_phases(self.model, self.request, None, None)

    def for_inputs(
        self, *, use_cache: bool, input_names: Sequence[str] | None, fixed: Mapping[str, object] | None
    ) -> Variant:
        """See VariantSource."""
        return Variant.make(
            self.model, self._own_lengths, use_cache, input_names, fixed, None, trains=self.options.train
        )

    @property
    def positions_of_values(self) -> bool:
        """See VariantSource. Found out once for a structure, by running the model without weights."""
        if self.has_own_cache or not {"position_ids", "input_ids"} <= set(self.signature.argument_names):
            return False
        structure = self.structure()
        if self._of_values is None or self._of_values[0] != structure:
            self._of_values = structure, positions_of_values(self._weightless(structure))
        return self._of_values[1]

    def _weightless(self, structure: Hashable) -> PreTrainedModel:
        """Return a copy of the model without weights, which is asked for positions and keeps what it counted."""
        if self._family is None or self._family[0] != structure:
            self._family = structure, meta_copy(self.shape)
        return self._family[1]

    def completed(self, call: Call) -> Call:
        """See VariantSource. Models of images count in Python, by the values of token ids (family_positions.py)."""
        if call.use_cache and "position_ids" not in call.tensors and self.positions_of_values:
            return call.counted_by_model()
        cached = call.cache is not None and call.cache.get_seq_length() > 0
        of_text = not cached and call.tensors.keys() <= FILLED_IN | {"labels"}  # whose positions a graph counts
        told = {"position_ids", "inputs_embeds"} & call.tensors.keys()
        if of_text or told or not counts_positions(self.shape):
            return call
        cache = {} if call.cache is None else {CACHE_FIELD: call.cache}
        positions = family_positions(self._weightless(self.structure()), {**call.tensors, **cache})
        return call if positions is None else replace(call, tensors={**call.tensors, "position_ids": positions})

    def for_call(self, call: Call, specs: Mapping[str, InputSpec], past: int, made: Sequence[Variant]) -> Variant:
        """See VariantSource."""
        values = call.with_mask(past)
        try:
            variant = self._for_specs(call, specs, call.fixed, made, {})
            if hold(variant.traced.value_guards, values):
                return variant
        except (TracingError, PlanError):  # Python that looks at values, or at how many images there are
            if call.tensors.keys() <= FILLED_IN:
                raise
        constants, sizes = self._constants(call, made)
        try:
            return self._for_specs(call, {**specs, **sizes}, call.fixed, made, values)
        except (TracingError, PlanError):
            if not constants:
                raise
        others = {name: spec for name, spec in {**specs, **sizes}.items() if name not in constants}
        return self._for_specs(call, others, {**call.fixed, **constants}, made, values)

    def _constants(
        self, call: Call, made: Sequence[Variant]
    ) -> tuple[dict[str, ConstantTensor], dict[str, InputSpec]]:
        """Return what of a call can be constants of a graph: values of small inputs that no sequence has, by name
        (sizes of images, which Python makes loops and splits of), and sizes of the others."""
        facts = made[0].traced.facts
        sizes = constant_specs(call.tensors, facts)
        small = {name for name in sizes if may_be_constant(call.tensors[name])}
        return {name: ConstantTensor.of(call.tensors[name]) for name in small}, sizes

    def _for_specs(
        self,
        call: Call,
        specs: Mapping[str, InputSpec],
        fixed: Mapping[str, object],
        made: Sequence[Variant],
        values: Mapping[str, torch.Tensor],
    ) -> Variant:
        """Make a variant for a call's tensors of these specs, and these constants; conditions on integers come out as
        for `values`. With a cache it lies as in the first of `made` that has one, since a call goes on with what
        another has cached."""
        given = frozenset(specs)
        names: tuple[str, ...] | None = self._accepted(given)
        if call.use_cache:
            filled_in = call.filled_in - {"input_ids"} if "inputs_embeds" in given else call.filled_in
            names = None if given <= filled_in == FILLED_IN else self._accepted(given | filled_in | {"past_key_values"})
        request, in_parts = self.request, self.options.in_parts
        like = next((v.whole_plan or v.plan for v in made if v.traced.use_cache), None) if call.use_cache else None
        if in_parts and made:  # all of them are trained with the same parameters
            request = replace(self._own_lengths, like=made[0].plan)
        elif like is not None:
            request = replace(self.request, like=like)
        return Variant.make(
            self.model, request, call.use_cache, names, fixed, None, specs, values,
            in_parts=in_parts, trains=self.options.train,
        )  # fmt: skip

    def at_lengths(self, alike: Sequence[Variant], lengths: Lengths) -> Variant:
        """See VariantSource."""
        return alike[0].at_lengths(lengths, self._own_lengths, alike[1:])

    def check_weights(self, purpose: str) -> None:
        """See VariantSource."""
        if purpose == "gradients" and (hooks := backward_hooks_of(self.shape)):
            raise AutodistError(
                f"{hooks[0]} is called while a model is trained, and gradients of a split model are computed without "
                "it: remove it, and do what it does with what gradients returns"
            )
        if isinstance(self.model, PretrainedConfig) or any(p.is_meta for p in self.model.parameters()):
            raise AutodistError(
                f"{purpose} needs weights: compile a model that has them, not a config or a meta model"
            )

    def fill(self, variant: Variant, programs: Sequence[RankProgram]) -> None:
        """See VariantSource. A weight lies in the model's own memory where a rank holds it in one piece.

        A buffer is filled again only where the model's own has changed since: a program may write into its buffers, and
        goes on from its own values.
        """
        source, device = ModuleSource(self.shape, share=True), next(self.shape.parameters()).device
        buffers = dict(variant.traced.graph_module.named_buffers(remove_duplicate=False))  # and constants
        followed = buffers.keys() - self._left_by_calls  # the others are the split's own
        buffers.update({name: b for name, b in self.shape.named_buffers(remove_duplicate=False) if name in followed})
        for program in programs:
            copies = self._buffers_read.setdefault(program.graph_module, {})
            new = {n: b for n, b in buffers.items() if n not in copies or not _same_bits(copies[n], b)}
            wanted = {n: s for n, s in program.param_shards.items() if not s.is_buffer or s.source in new}
            load_rank(replace(program, param_shards=wanted), source, device=device, buffers=new)
            copies.update({name: buffer.detach().clone() for name, buffer in new.items()})
            program.graph_module.eval()

    def trained_parameters(self) -> Mapping[str, str]:
        """See VariantSource."""
        names: dict[int, list[str]] = {}
        for name, parameter in self.shape.named_parameters(remove_duplicate=False):
            if parameter.requires_grad:
                names.setdefault(id(parameter), []).append(name)
        return {name: of_one[0] for of_one in names.values() for name in of_one}

    def hooked(self, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See VariantSource."""
        for name, parameter in self.shape.named_parameters():
            hooks = parameter._backward_hooks if name in gradients else None
            for hook in (hooks or {}).values():
                changed = hook(gradients[name])
                gradients[name] = gradients[name] if changed is None else changed
        return gradients

    @property
    def _own_lengths(self) -> PlanRequest:
        """The request without sizes: a plan then predicts for the lengths that are usual for its graph."""
        return replace(self.request, sizes=())

    def _accepted(self, names: frozenset[str]) -> tuple[str, ...]:
        """Drop the names that were filled in here and that the model's forward does not take."""
        accepted = {p.name for p in self.signature.parameters}
        return tuple(sorted(n for n in names if n in accepted or n not in FILLED_IN))


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True if two buffers are equal in shape, dtype, device and elements; NaN equals NaN."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return bool(torch.equal(a, b)) or (a.is_floating_point() and bool(torch.allclose(a, b, 0.0, 0.0, equal_nan=True)))
