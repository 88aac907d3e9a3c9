"""examples."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from transformers import PretrainedConfig, PreTrainedModel

from autodist_fx.calls.lengths import Lengths, with_total
from autodist_fx.compiler.guard_examples import examples_like, tells_apart
from autodist_fx.errors import AutodistError, TracingError
from autodist_fx.tracing import InputForm, Sizes, TracedModel, trace, trace_phases
from cost_model.graph.op_graph import OpGraph
from passes.fx import node_meta
from passes.fx.guards import Guards, with_fixed
from passes.fx.randomness import random_nodes
from passes.fx.shape_propagation import Example, bending_points
from passes.normalize.functionalize import functionalize
from passes.normalize.pipeline import normalize
from passes.op_graph.build import build_op_graph
from passes.partition.fuse_ops import removed_by_fusing

# Two sets of lengths: a number found in both is constant, one that differs follows the inputs, and two that agree in
# both are the same. So they differ by different steps (2, 8, 14, 22 of past and seq, 18 and 10), so that no length plus
# a constant is another. They are small, since a model may have no more positions.
_EXAMPLES = (
    Sizes(batch=11, seq=23, past=29, source=19, kept=7),
    Sizes(batch=13, seq=31, past=43, source=37, kept=17),
)
MOST_TRIES = 12  # of `traced_at`
# Lengths for the first example of a model that cuts sequences into chunks of several sizes: one is taken for which the
# next multiple of each is another number.
_LENGTHS_BEFORE_CHUNKS = (23, 19, 25, 17, 21, 33, 35, 37, 41, 45)
Trace = Callable[[tuple[Sizes, Sizes]], TracedModel]


def traced_at(
    alike: TracedModel, again: Trace, lengths: Lengths, known: Sequence[Guards]
) -> TracedModel | None:
    """`alike` traced and normalised anew, so that all its conditions, and those known, come out as at `lengths`."""
    known, points = list(known), frozenset[int]()
    windows = any(":" in kind for kind in alike.layer_kinds)
    usual = [_letters(alike, sizes) for sizes in _sizes(alike)]
    frames = min(alike.fewest_frames, lengths.get("E", 0))
    for _ in range(MOST_TRIES):
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
        guards = with_fixed(node_meta.guards(traced.graph_module), fixed)
        node_meta.set_guards(traced.graph_module, guards)
        if guards is None or not guards.otherwise(lengths):
            return traced
        known.append(guards)
    return None


def _letters(traced: TracedModel, sizes: Sizes) -> Lengths:
    """Those lengths that inputs of this graph have."""
    used = {d for form in traced.forms().values() for d in form.dims if isinstance(d, str)}
    used |= {"P"} if traced.use_cache and traced.phase != "prompt" else set()
    used -= {"S"} if traced.phase == "step" else set()
    every = {"B": sizes.batch, "S": sizes.seq, "P": sizes.past, "E": sizes.source, "K": sizes.kept}
    return {letter: n for letter, n in every.items() if letter in used}


def traced_once(
    model: PreTrainedModel | PretrainedConfig,
    use_cache: bool,
    input_names: Sequence[str] | None,
    concrete_args: Mapping[str, object] | None,
    forms: Mapping[str, InputForm] | None = None,
) -> tuple[TracedModel, Trace]:
    """A form of a model, traced and normalised, and how to trace it at other lengths; see autodist_fx.tracing.trace."""

    def again(sizes: tuple[Sizes, Sizes] | None) -> TracedModel:
        return trace(
            model, use_cache=use_cache, input_names=input_names, concrete_args=concrete_args, forms=forms, sizes=sizes
        )

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
    conditions: Guards | None = node_meta.guards(traced.graph_module)
    lengths = [with_total({"P": 0, **example.symbols}) for example in examples]
    if conditions is None or not any(conditions.otherwise(each, remainders=False) for each in lengths):
        return traced
    try:
        return traced_at(traced, again, lengths[0], [conditions]) or traced
    except TracingError:
        return traced


def planned_graph(traced: TracedModel) -> OpGraph:
    """What plans are made for. Normalises what is not normalised yet."""
    if not node_meta.is_normalized(traced.graph_module):
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
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        line = str(error).strip().partition("\n")[0]
        inputs = ", ".join(f"{name} [{', '.join(map(str, form.dims))}]" for name, form in traced.forms().items())
        raise TracingError(f"{traced.model_class} refuses these inputs: {line} ({inputs})") from error


def _refuse_random(traced: TracedModel) -> None:
    found = random_nodes(traced.graph_module)
    if found:
        raise AutodistError(
            f"{traced.model_class} draws random numbers ({found[0]}, {node_meta.where(found[0])}; {len(found)} "
            "places in all), and each rank would draw others: call model.eval(), or set its dropout to 0"
        )


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
