"""`trace`: traces one graph of a whole model, for any batch size, sequence length and number of cached tokens."""

from __future__ import annotations

import hashlib
import inspect
import linecache
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from autodist_fx.calls.call import KEYWORD_INPUTS, OUTPUT_FLAGS
from autodist_fx.calls.input_shapes import choice_specs, input_dims, is_multiple_choice
from autodist_fx.calls.input_specs import InputSpec, ModelFacts
from autodist_fx.calls.outputs import flat
from autodist_fx.calls.value_guards import ValueGuard
from autodist_fx.errors import AutodistError, TracingError
from autodist_fx.tracing.cache_layers import CacheLayer, cache_layers, layer_kinds
from autodist_fx.tracing.control_flow.random_calls import refuse_python_draws
from autodist_fx.tracing.encoder_decoder_cache import both_kinds, merge_caches, written_layers
from autodist_fx.tracing.example_inputs import (
    IMAGE_INPUTS,
    ExampleInputs,
    Sizes,
    default_inputs,
    embedding_dim,
    fewest_frames,
    has_encoder,
    image_shape,
    multiple_wanted,
    unmistakable_sizes,
)
from autodist_fx.tracing.hooks import refuse_global_hooks
from autodist_fx.tracing.in_place import read_what_was_written
from autodist_fx.tracing.meta_model import model_to_trace
from autodist_fx.tracing.passing_cache import PassingCache, shares_keys_by_cache
from autodist_fx.tracing.patches import FLAGS_SET_FOR_TRACING, traceable
from autodist_fx.tracing.recurrent_states import has_own_cache
from autodist_fx.tracing.tracer import Tracer, model_source_files
from autodist_fx.tracing.versions.tracer_base import get_concrete_args
from passes.fx import node_meta
from passes.fx.lazy_graph_module import LazyGraphModule


@dataclass
class TracedModel:
    """A model as one graph. Takes what the model's forward takes, by name, and returns what it returns, as a dict."""

    graph_module: torch.fx.GraphModule  # parameters on meta, shared ones shared; buffers real
    input_names: tuple[str, ...]  # the placeholders, in their order
    use_cache: bool
    config: PretrainedConfig  # a copy of the model's
    model_class: str  # "LlamaForCausalLM"
    layer_kinds: tuple[str, ...]  # per cache layer: "full", "sliding:4096", "chunked:8192"; () without a cache
    _examples: ExampleInputs = field(repr=False)
    left_by_calls: frozenset[str] = frozenset()  # paths of the model's attributes and buffers that its calls change
    value_guards: tuple[ValueGuard, ...] = ()  # on the values of inputs: a call has this graph where they hold
    phase: str = ""  # "prompt" or "step" for a model with a cache of its own, which has a graph for each; else ""

    @property
    def has_encoder(self) -> bool:
        """Return whether an encoder reads the main input (size "E"), and a decoder the decoder_... inputs (size
        "S")."""
        return self._examples.has_encoder

    @property
    def multiples(self) -> Mapping[str, int]:
        """Return the numbers that lengths are multiples of, by size symbol."""
        return self._examples.multiples

    @property
    def fewest_frames(self) -> int:
        """Return how many frames of sound its convolutions over time leave something of; 0 for a model without."""
        return self._examples.fewest_frames

    def check_images(self, inputs: Mapping[str, Any]) -> None:
        """Raise AutodistError where images are of another size than those that the graph was made for."""
        for name in (name for name in IMAGE_INPUTS if name in self.input_names):
            shape, wanted = tuple(getattr(inputs.get(name), "shape", ()))[1:], self._examples.image_shape
            if shape and wanted and shape != wanted:
                raise AutodistError(
                    f"{name} are of {list(shape)} each, and {self.model_class} was compiled for {list(wanted)}: resize "
                    f"them, or set image_size in the model's config before compiling"
                )

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Return [channels, height, width] of one image; () for a model without."""
        return self._examples.image_shape

    def specs(self) -> dict[str, InputSpec]:
        """Return the spec of each input of the graph, but the cache."""
        found = {name: self._examples.spec(name) for name in self.input_names}
        return {name: spec for name, spec in found.items() if spec is not None}

    @property
    def facts(self) -> ModelFacts:
        """Return what the specs of inputs depend on."""
        examples = self._examples
        choices = is_multiple_choice(self.model_class)
        return ModelFacts(self.config, examples.has_encoder, examples.embedding_dim, examples.dtype, choices)

    def example_inputs(self, sizes: Sizes) -> dict[str, object]:
        """Return inputs of these sizes by name: meta tensors, and a DynamicCache of meta tensors that holds `past`
        tokens."""
        return self._examples.make(sizes)


def trace(
    model: PreTrainedModel | PretrainedConfig,
    *,
    input_names: Sequence[str] | None = None,
    use_cache: bool = False,
    concrete_args: Mapping[str, object] | None = None,
    specs: Mapping[str, InputSpec] | None = None,
    sizes: tuple[Sizes, Sizes] | None = None,
    values: Mapping[str, torch.Tensor] | None = None,
) -> TracedModel:
    """Trace a model, or the model that a config describes, on the meta device; neither is changed.

    `input_names` are the arguments of forward that become inputs of the graph: by default token ids, their mask and
    segments, or pixels, whatever the model is for, and with `use_cache` also positions and the cache. Any other
    argument has its default, or its value in `concrete_args`. `specs` are those of inputs that differ from the usual
    ones (input_shapes): a mask of four dims, int32 token ids. `sizes`: of the inputs that Python sees while it is
    traced, and others that are alike to it; by default some that are like no dim of the model. `values`: the tensors of
    a call, by which conditions on integers among them are decided (`value_guards`).
    The model is traced as it stands, in training or in eval mode; one made from a config is in eval mode.

    Errors: TracingError, which names the model class, the line of its source, and the way out.
    """
    refuse_global_hooks()
    try:
        traced, is_whole = _trace(
            model, input_names, use_cache, concrete_args or {}, specs or {}, sizes, values, passing_cache=False
        )
        if is_whole or "labels" not in traced.input_names or "labels" in (specs or {}):
            return traced
        for labels in _other_labels(traced):  # a label for each sequence, and not for each token
            again, is_whole = _trace(
                model, input_names, use_cache, concrete_args or {}, {**(specs or {}), "labels": labels}, sizes, values,
                passing_cache=False,
            )  # fmt: skip
            if is_whole:
                return again
        return traced
    except TracingError as error:
        if use_cache or "past_key_values" in (*(input_names or ()), *(concrete_args or ())):
            raise
        try:  # some run without a cache only where they make one for themselves
            return _trace(
                model, input_names, use_cache, concrete_args or {}, specs or {}, sizes, values, passing_cache=True
            )[0]
        except TracingError:
            raise error from error.__cause__


def _trace(
    model: PreTrainedModel | PretrainedConfig,
    input_names: Sequence[str] | None,
    use_cache: bool,
    concrete_args: Mapping[str, object],
    specs: Mapping[str, InputSpec],
    sizes: tuple[Sizes, Sizes] | None,
    values: Mapping[str, torch.Tensor] | None,
    passing_cache: bool,
    multiples: Mapping[str, int] | None = None,
) -> tuple[TracedModel, bool]:
    """Return the traced model, and whether each value in its graph could be computed on the example inputs.

    `multiples`: numbers that lengths have to be multiples of, by size symbol; found out where None.
    """
    meta_model = model_to_trace(model)
    if use_cache and has_own_cache(type(meta_model), meta_model.config):
        raise TracingError(
            f"{type(meta_model).__name__} decodes with more than keys and values, with a graph for a prompt and one "
            "for a step (trace_phases): trace with use_cache=False"
        )
    parameters = inspect.signature(meta_model.forward).parameters
    accepted = [name for name, p in parameters.items() if p.kind != p.VAR_KEYWORD]
    takes_more = len(accepted) < len(parameters)
    more = [n for n in KEYWORD_INPUTS if takes_more and n in (input_names or ()) and n not in accepted]
    accepted += more
    names = _input_names(meta_model, accepted, input_names, use_cache)
    fixed, keywords = _fixed_arguments(meta_model, accepted, names, use_cache, concrete_args)
    if passing_cache and "past_key_values" in fixed and not has_encoder(meta_model):
        fixed["past_key_values"] = PassingCache(config=meta_model.config)
    specs = {**(choice_specs(names) if is_multiple_choice(type(meta_model).__name__) else {}), **specs}
    by_config = {n: getattr(meta_model.config, n, False) for n in OUTPUT_FLAGS if n not in FLAGS_SET_FOR_TRACING}
    records = any(name.startswith("output_") and value for name, value in {**by_config, **concrete_args}.items())
    records |= "input_ids" in names and _reads_media(meta_model, names, specs)  # whose encoder's layers it may ask for
    tracer, used, error = None, None, None
    try:
        with traceable(meta_model, use_cache=use_cache, records=records, keywords=more), torch.no_grad():
            examples = ExampleInputs(
                input_names=names,
                config=meta_model.config,
                cache_layers=(),
                embedding_dim=embedding_dim(meta_model),
                dtype=meta_model.dtype,
                image_shape=image_shape(meta_model.config),
                has_encoder=has_encoder(meta_model),
                fewest_frames=fewest_frames(meta_model),
                multiples=multiples or {},
                specs=dict(specs),
            )
            if use_cache:
                layers, added_kinds = _cache_layers(meta_model, examples)
                examples = replace(examples, cache_layers=layers, added_kinds=added_kinds)
            used = sizes
            if used is None:
                first = unmistakable_sizes(meta_model)
                second = unmistakable_sizes(meta_model, other_than=first)
                used = first.times(examples.multiples), second.times(examples.multiples)
            inputs, others = (examples.for_model(each) for each in used)
            tracer = Tracer(meta_model, inputs, others, keywords, values)
            with refuse_python_draws(meta_model, tracer.source_files):
                graph = tracer.trace(
                    meta_model,
                    concrete_args=fixed,
                    dummy_inputs=inputs,
                    complete_concrete_args_with_inputs_not_in_dummy_inputs=False,
                )
            read_what_was_written(graph, tracer.written_in_place)
            if examples.has_encoder:
                merge_caches(graph)
            _spell_out_outputs(graph, tracer)
    except AutodistError:
        raise
    except Exception as raised:
        error = raised
    if tracer is not None and used is not None and sizes is None and multiples is None:
        if wanted := multiple_wanted(tracer.first_unknown, tracer.examples_of, used[0]):
            return _trace(model, input_names, use_cache, concrete_args, specs, sizes, values, passing_cache, wanted)
    if error is not None:
        raise tracing_error(meta_model, error, tracer) from error
    assert tracer is not None
    traced = TracedModel(
        graph_module=graph_module_of(meta_model, graph),
        input_names=tuple(node.target for node in graph.nodes if node.op == "placeholder"),
        use_cache=use_cache,
        config=meta_model.config,
        model_class=type(meta_model).__name__,
        layer_kinds=_layer_kinds(examples) if use_cache else (),
        _examples=examples,
        left_by_calls=frozenset(tracer.left_by_calls),
        value_guards=tuple(tracer.value_guards),
    )
    return traced, tracer.first_unknown is None


def _spell_out_outputs(graph: torch.fx.Graph, tracer: Tracer) -> None:
    """Write an output that is one node of several tensors (what `split` gives) as these tensors."""
    output = next(node for node in reversed(graph.nodes) if node.op == "output")

    def spelled(node: torch.fx.Node) -> Any:
        known = tracer.examples_of.get(node)
        if not isinstance(known, (tuple, list)) or not all(isinstance(part, torch.Tensor) for part in known):
            return node
        with graph.inserting_before(output):
            parts = tuple(graph.call_function(operator.getitem, (node, index)) for index in range(len(known)))
        for part in parts:
            node_meta.copy(node, part)
            node_meta.set_traced_as_tensor(part, True)
        return parts

    output.args = (torch.fx.node.map_arg(output.args[0], spelled),)


def _reads_media(model: PreTrainedModel, names: Sequence[str], specs: Mapping[str, InputSpec]) -> bool:
    """Return whether images, sounds or the like are among the inputs: numbers that belong to no token."""
    return any(
        name in IMAGE_INPUTS
        or (name in specs and specs[name].dtype.is_floating_point and not input_dims(name, model.config, False))
        for name in names
    )


def _other_labels(traced: TracedModel) -> list[InputSpec]:
    """Return the specs of labels of a model that tells classes of sequences: a number, or one for each class."""
    dtype, classes = traced.facts.dtype, getattr(traced.config, "num_labels", 1)
    return [InputSpec(("B",), torch.long), InputSpec(("B",), dtype), InputSpec(("B", classes), dtype)]


def _cache_layers(
    model: PreTrainedModel, examples: ExampleInputs
) -> tuple[tuple[CacheLayer | None, ...], tuple[str, ...]]:
    if not examples.has_encoder:
        return cache_layers(model)
    without_cache = replace(examples, input_names=tuple(n for n in examples.input_names if n != "past_key_values"))
    source = max(5, examples.fewest_frames) * examples.multiples.get("E", 1)
    return written_layers(model, without_cache.make(Sizes(batch=2, seq=3, past=0, source=source))), ()


def _layer_kinds(examples: ExampleInputs) -> tuple[str, ...]:
    if examples.has_encoder:
        return both_kinds(examples.config, len(examples.cache_layers))
    return layer_kinds(examples.config) + examples.added_kinds


def _input_names(
    model: PreTrainedModel, accepted: Sequence[str], input_names: Sequence[str] | None, use_cache: bool
) -> tuple[str, ...]:
    """Return the names to trace with, in the order of the model's signature."""
    if input_names is None:
        chosen = set(default_inputs(model, use_cache))
    else:
        chosen = set(input_names)
    if unknown := sorted(chosen - set(accepted)):
        raise TracingError(
            f"{type(model).__name__}.forward takes no {', '.join(unknown)}: choose input_names among "
            f"{', '.join(accepted)}"
        )
    if use_cache and "past_key_values" not in chosen:
        raise TracingError(
            f"{type(model).__name__} was to be traced with a KV cache, but past_key_values is not among its inputs "
            f"({', '.join(sorted(chosen))}): trace with use_cache=False"
        )
    return tuple(name for name in accepted if name in chosen)


def _fixed_arguments(
    model: PreTrainedModel,
    accepted: Sequence[str],
    names: Sequence[str],
    use_cache: bool,
    concrete_args: Mapping[str, object],
) -> tuple[dict[str, object], dict[str, object]]:
    """Return the value of every argument of forward that is not an input of the graph, and what goes into its
    **keywords."""
    keywords = {name: value for name, value in concrete_args.items() if name not in accepted}
    takes_keywords = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())
    if unknown := sorted(set(keywords) - (set(OUTPUT_FLAGS) if takes_keywords else set())):
        raise TracingError(
            f"{type(model).__name__}.forward takes no {', '.join(unknown)}: leave it out of concrete_args"
        )
    fixed = get_concrete_args(model, [n for n in names if n in inspect.signature(model.forward).parameters])
    if "use_cache" in fixed:
        fixed["use_cache"] = use_cache
    if not use_cache and "past_key_values" in fixed and shares_keys_by_cache(model):
        fixed["past_key_values"] = PassingCache(config=model.config)
    return {**fixed, **{k: v for k, v in concrete_args.items() if k not in names and k not in keywords}}, keywords


def graph_module_of(model: PreTrainedModel, graph: torch.fx.Graph) -> torch.fx.GraphModule:
    """Return the graph with those modules, parameters and buffers of the model that it uses, under the model's
    names."""
    for node in graph.nodes:
        if node.op == "placeholder":
            node.type = None  # HFTracer writes torch.Tensor, also on a cache
        if node.op == "output":
            node.args = (flat(node.args[0]),)
        if node.op == "get_attr" and str(node.target).startswith("_tensor_constant"):
            _name_by_content(model, node)
    graph_module = LazyGraphModule(model, graph, class_name=type(model).__name__)
    graph_module.train(model.training)
    # GraphModule makes every buffer a persistent one, and buffers of the constants; neither inv_freq nor a constant is
    # in any checkpoint.
    saved = model.state_dict().keys()
    for path, module in graph_module.named_modules():
        prefix = f"{path}." if path else ""
        module._non_persistent_buffers_set.update(name for name in module._buffers if prefix + name not in saved)
    return graph_module


def _name_by_content(model: PreTrainedModel, node: torch.fx.Node) -> None:
    """Name a constant by its content: fx numbers constants from 0 in each trace, and graphs of one model share what
    goes by one name."""
    constant = getattr(model, str(node.target))
    if isinstance(constant, torch.Tensor) and not constant.is_meta:
        plain = constant.detach().contiguous().reshape(-1).view(torch.uint8)
        facts = f"{constant.dtype} {list(constant.shape)} ".encode() + plain.numpy().tobytes()
        node.target = f"_constant_{hashlib.sha256(facts).hexdigest()[:16]}"
        setattr(model, node.target, constant)


def tracing_error(model: PreTrainedModel, error: Exception, tracer: Tracer | None) -> TracingError:
    """Return the TracingError for what a trace raised: the model class, the line of its source, and the way out."""
    files = model_source_files(model)
    where, traceback = "", error.__traceback__
    while traceback is not None:
        path, line = traceback.tb_frame.f_code.co_filename, traceback.tb_lineno
        if path in files:  # the innermost one wins
            where = f" at {files[path]}:{line} (`{linecache.getline(path, line).strip()}`)"
        traceback = traceback.tb_next
    message = f"cannot trace {type(model).__name__}{where}: {type(error).__name__}: {error}."
    if tracer is not None and tracer.module_stack:
        module, cls = next(reversed(tracer.module_stack.values()))
        message += f" It was in {module} ({cls.__name__})."
    if tracer is not None and tracer.first_unknown is not None:
        node, why = tracer.first_unknown, tracer.first_failure
        message += f" The first value without a known shape is {node} ({node_meta.where(node)}): {why}."
    return TracingError(
        f"{message} A graph cannot hold Python that looks at tensor values or at the number of them: write that line "
        f"with tensor operations (torch.where instead of if), or fix an argument of forward with concrete_args"
    )
