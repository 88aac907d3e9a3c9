"""`trace_phases`: traces the two graphs of a model with a cache of its own, one for a prompt and one for a step
after it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node, Proxy
from transformers import PretrainedConfig, PreTrainedModel

from autodist_fx.errors import AutodistError, TracingError
from autodist_fx.tracing import recurrent_states as states
from autodist_fx.tracing.example_inputs import ExampleInputs, Sizes, embedding_dim, unmistakable_sizes
from autodist_fx.tracing.hooks import refuse_global_hooks
from autodist_fx.tracing.in_place import read_what_was_written
from autodist_fx.tracing.meta_model import class_of, model_to_trace
from autodist_fx.tracing.patches import traceable
from autodist_fx.tracing.recurrent_states import StateTensor
from autodist_fx.tracing.traced_model import TracedModel, graph_module_of, tracing_error
from autodist_fx.tracing.tracer import Tracer
from autodist_fx.tracing.versions.forwards import is_given_cache
from autodist_fx.tracing.versions.tracer_base import get_concrete_args
from passes.fx import node_meta
from passes.normalize.writes.functionalize import functionalize


@dataclass
class _Left:
    """The state that a traced prompt leaves for the step: the cache with proxies in it, and the states that modules
    keep."""

    cache_name: str
    cache: Any
    on_modules: dict[tuple[str, str], Proxy]
    tensors: dict[str, StateTensor]


def trace_phases(
    model: PreTrainedModel | PretrainedConfig,
    concrete_args: Mapping[str, object] | None = None,
    sizes: tuple[Sizes, Sizes] | None = None,
    step_sizes: tuple[Sizes, Sizes] | None = None,
) -> tuple[TracedModel, TracedModel]:
    """Return (prompt, step) of a model that `states.has_own_cache`; see autodist_fx.tracing.trace. `sizes` are those
    of the prompt, `step_sizes` of the step.

    Errors: TracingError, also where the model keeps no state between calls.
    """
    refuse_global_hooks()
    given_cache = is_given_cache(class_of(model))
    prompt, left = _trace_prompt(model, concrete_args or {}, sizes, given_cache=given_cache)
    if not left.tensors:  # this model does not make one itself
        prompt, left = _trace_prompt(model, concrete_args or {}, sizes, given_cache=True)
    if not left.tensors:
        raise TracingError(f"{prompt.model_class} was traced with use_cache=True, and leaves no state: use_cache=False")
    return prompt, _trace_step(model, concrete_args or {}, left, step_sizes)


def _trace_prompt(
    model: PreTrainedModel | PretrainedConfig,
    concrete_args: Mapping[str, object],
    sizes_of_both: tuple[Sizes, Sizes] | None,
    *,
    given_cache: bool,
) -> tuple[TracedModel, _Left]:
    meta_model, accepted = _meta(model)
    sizes, other = sizes_of_both or _two_sizes(meta_model)
    prepared = states.prepared_prompt(meta_model, sizes.batch, accepted)
    if given_cache and prepared.cache is None:
        raise TracingError(f"{type(meta_model).__name__} neither makes a cache nor says how to: use_cache=False")
    names = tuple(n for n in accepted if n in prepared.tensors)
    cache_name = prepared.cache_name if given_cache else ""

    def fresh(tracer: Tracer) -> Any:
        return states.with_tensors(prepared.cache, lambda path, tensor: _zeros(tracer, path, tensor, sizes.batch))

    made = {cache_name: fresh} if cache_name else {}
    tracer, graph = _trace(meta_model, names, concrete_args, made, (sizes, other), ())
    output, kept = _outputs(graph, tracer, meta_model)
    tensors = {
        name: states.state_tensor(
            name,
            (proxy._metadata, tracer.other_example.value(proxy.node)),
            {"B": (sizes.batch, other.batch), "P": (sizes.seq, other.seq)},
        )
        for name, proxy in kept.items()
    }
    output.args = ({**output.args[0], **{name: proxy.node for name, proxy in kept.items()}},)
    traced = _traced(meta_model, graph, "prompt", names, (), tracer.left_by_calls)
    cache_name = tracer.final_cache_name or cache_name
    on_modules = states.module_states(meta_model, tracer.left_by_calls)
    return traced, _Left(cache_name, tracer.final_cache, on_modules, tensors)


def _trace_step(
    model: PreTrainedModel | PretrainedConfig,
    concrete_args: Mapping[str, object],
    left: _Left,
    sizes_of_both: tuple[Sizes, Sizes] | None,
) -> TracedModel:
    meta_model, accepted = _meta(model)
    sizes, other = (replace(each, seq=1) for each in sizes_of_both or _two_sizes(meta_model))

    def example(path: str, value: Any) -> Any:
        tensor = left.tensors.get(states.state_name(path))
        return value if tensor is None else tensor.make(sizes.batch, sizes.past)

    shapes = states.with_tensors(left.cache, example) if left.cache is not None else None
    prepared = states.prepared_step(meta_model, sizes.batch, accepted, left.cache_name, shapes)
    names = tuple(n for n in accepted if n in prepared.tensors)

    def state(tracer: Tracer, path: str, value: Any) -> Any:
        tensor = left.tensors.get(states.state_name(path))
        return value if tensor is None else _state_input(tracer, tensor.name, tensor.make(sizes.batch, sizes.past))

    def cached(tracer: Tracer) -> Any:
        return states.with_tensors(left.cache, lambda path, value: state(tracer, path, value))

    made = {left.cache_name: cached} if left.cache_name else {}
    tracer, graph = _trace(meta_model, names, concrete_args, made, (sizes, other), tuple(left.on_modules), left)
    output, kept = _outputs(graph, tracer, meta_model)
    output.args = ({**output.args[0], **{name: proxy.node for name, proxy in kept.items()}},)
    _make_placeholders(graph)
    used = tuple(left.tensors[n.target] for n in graph.nodes if n.op == "placeholder" and n.target in left.tensors)
    return _traced(meta_model, graph, "step", names, used, tracer.left_by_calls)


# -- one trace --------------------------------------------------------------------------------------------------------


def _meta(model: PreTrainedModel | PretrainedConfig) -> tuple[PreTrainedModel, list[str]]:
    meta_model = model_to_trace(model)
    parameters = inspect.signature(meta_model.forward).parameters
    return meta_model, [name for name, p in parameters.items() if p.kind != p.VAR_KEYWORD]


def _two_sizes(model: PreTrainedModel) -> tuple[Sizes, Sizes]:
    first = unmistakable_sizes(model)
    return first, unmistakable_sizes(model, other_than=first)


def _examples(model: PreTrainedModel, names: tuple[str, ...], tensors: tuple[StateTensor, ...]) -> ExampleInputs:
    return ExampleInputs(
        input_names=(*names, *(t.name for t in tensors)),
        config=model.config,
        cache_layers=(),
        embedding_dim=embedding_dim(model),
        dtype=model.dtype,
        states=tensors,
        counts_past=True,
    )


def _trace(
    model: PreTrainedModel,
    names: tuple[str, ...],
    concrete_args: Mapping[str, object],
    made: dict[str, Any],
    sizes_of_both: tuple[Sizes, Sizes],
    on_modules: tuple[tuple[str, str], ...],
    left: _Left | None = None,
) -> tuple[Tracer, Graph]:
    tracer = None
    sizes, other = (replace(each, past=0) if left is None else each for each in sizes_of_both)
    try:
        with traceable(model, use_cache=True, keeps_states=True), torch.no_grad():
            fixed = {**get_concrete_args(model, list(names)), **concrete_args}
            if "use_cache" in fixed:
                fixed["use_cache"] = True
            inputs = _examples(model, names, ()).make(sizes)
            states_too = () if left is None else tuple(left.tensors.values())
            tracer = Tracer(model, inputs, _examples(model, names, states_too).make(other))
            tracer.objects = dict(made)
            tracer.phase = "prompt" if left is None else "step"
            if left is not None:
                tracer.at_start = lambda: _set_module_states(tracer, model, on_modules, left, sizes)
            graph = tracer.trace(
                model,
                concrete_args=fixed,
                dummy_inputs=inputs,
                complete_concrete_args_with_inputs_not_in_dummy_inputs=False,
            )
    except AutodistError:
        raise
    except Exception as error:
        raise tracing_error(model, error, tracer) from error
    read_what_was_written(graph, tracer.written_in_place)
    _placeholders_first(graph)
    return tracer, graph


def _set_module_states(
    tracer: Tracer, model: nn.Module, on_modules: tuple[tuple[str, str], ...], left: _Left, sizes: Sizes
) -> None:
    for path, name in on_modules:
        tensor = left.tensors[states.state_name(f"{path}.{name}")]
        proxy = _state_input(tracer, tensor.name, tensor.make(sizes.batch, sizes.past))
        setattr(model.get_submodule(path), name, proxy)


def state_input(name: str) -> None:
    """Stand for an input of the graph until the trace is over: HFTracer removes inputs that forward does not name."""


def _state_input(tracer: Tracer, name: str, example: torch.Tensor) -> Proxy:
    proxy = tracer.create_proxy("call_function", state_input, (name,), {})
    proxy.install_metadata(example)
    tracer.examples_of[proxy.node] = example
    node_meta.set_traced_as_tensor(proxy.node, True)
    return proxy


def _zeros(tracer: Tracer, path: str, tensor: torch.Tensor, batch: int) -> Any:
    """Return what a new cache holds, for any batch."""
    if not tensor.numel() or (not tensor.dim() and not tensor.is_meta and tensor):
        return tensor  # nothing, or a number (a window)
    if not tensor.is_meta and tensor.any():  # on meta where the model asks its parameters for a device
        raise TracingError(f"a new cache starts with values other than zero in {path}: use_cache=False")
    first = next(n for n in tracer.graph.nodes if n.op == "placeholder")
    ids = tracer.proxy(first)
    ids.install_metadata(tracer.examples_of[first])
    shape = tuple(ids.shape[0] if n == batch else n for n in tensor.shape)
    return torch.zeros(shape, dtype=tensor.dtype, device=ids.device)


def _outputs(
    graph: Graph, tracer: Tracer, model: nn.Module
) -> tuple[Node, dict[str, Any]]:
    """Return the output node, and what is in the cache and on the modules at the end, by state name."""
    kept = {states.state_name(path): value for path, value in states.tensors_of(tracer.final_cache)}
    on_modules = states.module_states(model, tracer.left_by_calls)
    kept |= {states.state_name(f"{p}.{n}"): proxy for (p, n), proxy in on_modules.items()}
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    return output, {name: value for name, value in kept.items() if isinstance(value, Proxy)}


def _placeholders_first(graph: Graph) -> None:
    first = next(iter(graph.nodes))
    for node in list(graph.nodes):
        if node.op == "placeholder" and node is not first:
            last = next(n for n in reversed(graph.nodes) if n.op == "placeholder")
            if last is not node or any(n.op != "placeholder" for n in _before(graph, node)):
                first.prepend(node)


def _before(graph: Graph, node: Node) -> list[Node]:
    nodes = list(graph.nodes)
    return nodes[: nodes.index(node)]


def _make_placeholders(graph: Graph) -> None:
    """Make inputs, behind the others, of the nodes that stand for states."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is state_input:
            last = next(n for n in reversed(graph.nodes) if n.op == "placeholder")
            with graph.inserting_after(last):
                placeholder = graph.placeholder(node.args[0])
            node_meta.copy(node, placeholder)
            node.replace_all_uses_with(placeholder)
            graph.erase_node(node)


def _traced(
    model: PreTrainedModel,
    graph: Graph,
    phase: str,
    names: tuple[str, ...],
    tensors: tuple[StateTensor, ...],
    left_by_calls: Iterable[str],
) -> TracedModel:
    graph_module = graph_module_of(model, graph)
    functionalize(graph_module)
    # a state that this call left as it was is no output
    output = next(n for n in reversed(graph_module.graph.nodes) if n.op == "output")
    kept = {k: v for k, v in output.args[0].items() if not (isinstance(v, Node) and v.op == "placeholder")}
    output.args = (kept,)
    graph_module.recompile()
    return TracedModel(
        graph_module=graph_module,
        input_names=tuple(n.target for n in graph_module.graph.nodes if n.op == "placeholder"),
        use_cache=True,
        config=model.config,
        model_class=type(model).__name__,
        layer_kinds=(),
        _examples=_examples(model, names, tensors),
        left_by_calls=frozenset(left_by_calls),
        phase=phase,
    )
