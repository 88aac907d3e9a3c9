"""Traces and normalises one variant at example sizes, and traces it again where those sizes took a branch of their own.

Normalisation runs a graph at two sets of sizes to see which numbers in it follow a size symbol. Tracing records guards
on sizes, so the two form a loop: sizes are good only if all guards come out at them as they should (guard_examples.py).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from transformers import PretrainedConfig, PreTrainedModel

from autodist_fx.calls.lengths import Lengths, with_total
from autodist_fx.compiler.guard_examples import examples_like, leaves_remainders, tells_apart
from autodist_fx.errors import AutodistError, TracingError
from autodist_fx.tracing import InputSpec, Sizes, TracedModel, trace, trace_phases
from cost_model.errors import AmbiguousLengthsError
from cost_model.graph.op_graph import OpGraph
from passes.fx import node_meta
from passes.fx.guards import Guards, with_fixed
from passes.fx.randomness import seeded_nodes, unseeded_nodes
from passes.fx.shape_propagation import Example, bending_points
from passes.normalize.pipeline import normalize
from passes.normalize.random.seed_random_ops import why_unseeded
from passes.normalize.writes.functionalize import functionalize
from passes.op_graph.build import build_op_graph
from passes.partition.fuse_ops import removed_by_fusing

# Two sets of sizes: a number in the graph that is the same at both is constant, one that differs follows the inputs,
# and two numbers that agree at both are the same size symbol. The steps from the first set to the second all differ (2,
# 8, 14, 22 for past plus seq, 18 and 10), so that no length plus a constant is another one. The sizes are small, since
# a model may have few positions.
_EXAMPLES = (
    Sizes(batch=11, seq=23, past=29, source=19, kept=7),
    Sizes(batch=13, seq=31, past=43, source=37, kept=17),
)
MOST_TRIES = 12  # traces per call of `traced_at`
# Candidate lengths of the first example, for a model that cuts sequences into chunks of several sizes: the first is
# taken that is a multiple of none, and at which rounding up to a multiple of each gives different numbers.
_LENGTHS_BEFORE_CHUNKS = (23, 19, 25, 17, 21, 33, 35, 37, 41, 45)
Trace = Callable[[tuple[Sizes, Sizes]], TracedModel]


def traced_at(
    alike: TracedModel, again: Trace, lengths: Lengths, known_guards: Sequence[Guards]
) -> TracedModel | None:
    """Trace and normalise the variant of `alike` again, at sizes where all guards come out as they do at `lengths`.

    `known_guards` are those of the variants made so far, which come out otherwise. Each try adds the guards that its
    own trace met. Returns None after MOST_TRIES tries.
    """
    known_guards, points, alone = list(known_guards), frozenset[int](), frozenset[str]()
    windows = any(":" in kind for kind in alike.layer_kinds)
    usual = [_used_sizes(alike, sizes) for sizes in _sizes(alike)]
    frames = min(alike.fewest_frames, lengths.get("E", 0))
    for _ in range(MOST_TRIES):
        first, second, fixed = examples_like(
            known_guards,
            lengths,
            (usual[0], usual[1]),
            points,
            alone | frozenset("P" if windows else ""),  # the keys inside a window are no function of a size symbol
            {"E": frames} if frames else None,
        )
        sizes = _sizes_of(first), _sizes_of(second)
        traced = again(sizes)
        functionalize(traced.graph_module)
        with _naming_refusals(traced):
            chunk_sizes, examples = bending_points(traced.graph_module, _both(traced, sizes))
        new = frozenset(chunk_sizes) - points
        if new and not (tells_apart(first, second, points | new) and leaves_remainders(first, new)):
            points |= new
            continue
        try:
            _normalize(traced, examples, _further(traced, sizes, lengths, fixed))
        except AmbiguousLengthsError:
            if alone:
                raise
            alone = frozenset(lengths) - {"B", "T"}  # a graph for just these lengths
            continue
        guards = with_fixed(node_meta.guards(traced.graph_module), fixed)
        node_meta.set_guards(traced.graph_module, guards)
        if guards is None or not guards.violated(lengths):
            return traced
        known_guards.append(guards)
    return None


def _further(
    traced: TracedModel, sizes: tuple[Sizes, Sizes], lengths: Lengths, fixed: Lengths
) -> list[Example]:
    """Return examples a few tokens shorter and longer than both, and as long as a call, where a length is not fixed."""
    fields = {symbol: name for symbol, name in (("S", "seq"), ("P", "past"), ("E", "source")) if symbol not in fixed}
    asked = replace(sizes[0], **{name: lengths[symbol] for symbol, name in fields.items() if lengths.get(symbol)})
    near = [
        replace(each, **{name: max(getattr(each, name) + more, 2) for name in fields.values()})
        for each in sizes
        for more in (-3, -2, -1, 1, 2, 3)
    ]
    return [_example(traced, each) for each in (asked, *near)]


def _used_sizes(traced: TracedModel, sizes: Sizes) -> Lengths:
    """Return the lengths, by size symbol, that the inputs of this graph have."""
    used = {d for spec in traced.specs().values() for d in spec.dims if isinstance(d, str)}
    used |= {"P"} if traced.use_cache and traced.phase != "prompt" else set()
    used -= {"S"} if traced.phase == "step" else set()
    every = {"B": sizes.batch, "S": sizes.seq, "P": sizes.past, "E": sizes.source, "K": sizes.kept}
    return {symbol: n for symbol, n in every.items() if symbol in used}


def traced_once(
    model: PreTrainedModel | PretrainedConfig,
    use_cache: bool,
    input_names: Sequence[str] | None,
    concrete_args: Mapping[str, object] | None,
    specs: Mapping[str, InputSpec] | None = None,
    values: Mapping[str, torch.Tensor] | None = None,
) -> tuple[TracedModel, Trace]:
    """Trace and normalise one variant. Also return the function that
    traces it again at other sizes; see autodist_fx.tracing.trace."""

    def again(sizes: tuple[Sizes, Sizes] | None) -> TracedModel:
        return trace(
            model, use_cache=use_cache, input_names=input_names, concrete_args=concrete_args, specs=specs, sizes=sizes,
            values=values,
        )  # fmt: skip

    return _normalized_as_traced(again(None), again), again


def phases_once(
    model: PreTrainedModel | PretrainedConfig, concrete_args: Mapping[str, object] | None
) -> tuple[TracedModel, TracedModel]:
    """Trace (prompt, step) of a model with its own recurrent cache; the prompt is normalised."""
    prompt, step = trace_phases(model, concrete_args)

    def again(sizes: tuple[Sizes, Sizes]) -> TracedModel:
        nonlocal step  # a step is traced from the state that its prompt leaves, so each prompt brings a new one
        prompt_again, step = trace_phases(model, concrete_args, sizes)
        return prompt_again

    return _normalized_as_traced(prompt, again), step


def _normalized_as_traced(traced: TracedModel, again: Trace) -> TracedModel:
    """Normalise `traced`; trace it again where the sizes at which it is normalised make a guard come out otherwise, or
    where its code counts chunks that are as many at all sizes that it was traced with."""
    examples = _examples_for(traced)
    try:
        _normalize(traced, examples)
    except TracingError:
        if _usual(examples):
            raise
        traced = again((_sizes_of(dict(examples[0].symbols)), _sizes_of(dict(examples[1].symbols))))
        examples = _examples_for(traced)
        try:
            _normalize(traced, examples)
        except TracingError as error:
            traced, examples = _with_remainders(again, examples, error)
    guards: Guards | None = node_meta.guards(traced.graph_module)
    lengths = [with_total({"P": 0, **example.symbols}) for example in examples]
    if guards is None or not any(guards.violated(each, remainders=False) for each in lengths):
        return traced
    try:
        return traced_at(traced, again, lengths[0], [guards]) or traced
    except TracingError:
        return traced


def _with_remainders(
    again: Trace, refused: tuple[Example, Example], error: TracingError
) -> tuple[TracedModel, tuple[Example, Example]]:
    """Trace and normalise once more where an op takes no multiple of the chunk sizes, at lengths that are none.

    There floor and ceil differ by one at all lengths, which is right only if the graph's guards leave multiples to
    another graph ("if any tokens are left behind the chunks"). Raises `error` where they do not, and where there are no
    such lengths.
    """
    first, multiple = (example.symbols["S"] for example in refused)
    for seq in range(multiple + 1, 2 * multiple):
        sizes = replace(_EXAMPLES[0], seq=first), replace(_EXAMPLES[1], seq=seq)
        traced = again(sizes)
        functionalize(traced.graph_module)
        with _naming_refusals(traced):
            points, examples = bending_points(traced.graph_module, _examples(traced, *sizes))
        if all(0 != first % p != seq % p != 0 for p in points):
            break
    else:
        raise error
    _normalize(traced, examples)
    guards: Guards | None = node_meta.guards(traced.graph_module)
    if guards is None or not guards.violated(with_total({"P": 0, **refused[1].symbols})):
        raise error
    return traced, examples


def _usual(examples: tuple[Example, Example]) -> bool:
    """True if no chunk size of the model had a part in choosing these examples."""
    return "S" not in examples[1].symbols or examples[1].symbols["S"] in (1, _EXAMPLES[1].seq)


def planned_graph(traced: TracedModel, trains: bool = False) -> OpGraph:
    """Build the op graph that plans are made for, and normalise the traced graph first where that was not done.

    `trains`: whoever runs its programs gives them the input `random_state`. Raises AutodistError for a graph that draws
    random numbers otherwise, TracingError where an op refuses the example inputs.
    """
    normalized(traced)
    _refuse_random(traced, trains and not traced.use_cache)
    return build_op_graph(traced.graph_module, chains=removed_by_fusing(traced.graph_module))


def normalized(traced: TracedModel) -> TracedModel:
    """Return `traced`, its graph normalised. Raises TracingError where an op refuses the example inputs."""
    if not node_meta.is_normalized(traced.graph_module):
        _normalize(traced)
    return traced


def _normalize(
    traced: TracedModel, examples: tuple[Example, Example] | None = None, others: Sequence[Example] = ()
) -> None:
    examples = examples or _examples_for(traced)
    with _naming_refusals(traced):
        normalize(traced.graph_module, examples, others)


@contextlib.contextmanager
def _naming_refusals(traced: TracedModel) -> Iterator[None]:
    """Turn an op's error about shapes or dtypes, raised while it
    runs on examples, into a TracingError that names the inputs."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        line = str(error).strip().partition("\n")[0]
        inputs = ", ".join(f"{name} [{', '.join(map(str, spec.dims))}]" for name, spec in traced.specs().items())
        raise TracingError(f"{traced.model_class} refuses these inputs: {line} ({inputs})") from error


def _refuse_random(traced: TracedModel, trains: bool) -> None:
    """Raise AutodistError where the graph draws random numbers of which each rank would draw others, and, of a graph
    that is not to be trained, where it draws any."""
    unseeded = unseeded_nodes(traced.graph_module)
    found = unseeded if trains else [*unseeded, *seeded_nodes(traced.graph_module)]
    if not found:
        return
    says = f"{traced.model_class} draws random numbers ({found[0]}, {node_meta.where(found[0])}; {len(found)} places"
    if trains:
        raise AutodistError(
            f"{says} in all), and each rank would draw others: {why_unseeded(found[0])}. Call model.eval(), or set it "
            "to 0"
        )
    raise AutodistError(
        f"{says} in all), as in training: compile with train=True and without a cache, call model.eval(), or set its "
        "dropout to 0"
    )


def _examples_for(traced: TracedModel) -> tuple[Example, Example]:
    """Choose two examples that show which numbers depend on the model's chunk sizes: the second length is a multiple of
    all, the first of none. Raises TracingError where there are no such lengths."""
    functionalize(traced.graph_module)
    with _naming_refusals(traced):
        points, examples = bending_points(traced.graph_module, _examples(traced))
    if not points:
        return examples
    first, second = _EXAMPLES
    chunks = math.lcm(*points)
    seq = chunks * math.ceil((2 * max(points) + second.seq) / chunks)
    if seq < 2**20:
        rounded = ((n, {-(-n // p) * p for p in points}) for n in _LENGTHS_BEFORE_CHUNKS)
        told_apart = (n for n, multiples in rounded if len(multiples) == len(points) and n not in multiples)
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
    """Return both example sizes, with `past` of the second beyond every attention
    window: the number of keys that a layer with a window sees grows no longer
    there. Encoder lengths are at least the fewest frames that the model accepts, and
    all are the multiples that it folds into parts."""
    longest = max((int(kind.partition(":")[2]) for kind in traced.layer_kinds if ":" in kind), default=0)
    first = replace(first, source=first.source + traced.fewest_frames)
    # It grows by whole multiples, which keeps its divisors, until convolutions give more frames than in the first.
    further = second.source * math.ceil(2 * traced.fewest_frames / second.source)
    second = replace(second, past=second.past + longest, source=second.source + further)
    return first.times(traced.multiples), second.times(traced.multiples)


def _sizes_of(lengths: Lengths) -> Sizes:
    """Convert lengths by size symbol to Sizes. A missing symbol is a dim of no input, so its value has no effect."""
    return Sizes(*(lengths.get(symbol, 0 if symbol == "P" else 1) for symbol in "BSPEK"))


def _example(traced: TracedModel, sizes: Sizes) -> Example:
    """Build the inputs of one example, and the values of its size symbols."""
    if traced.phase == "step":
        sizes = replace(sizes, seq=1)
    if not traced.use_cache or traced.phase == "prompt":
        sizes = replace(sizes, past=0)
    symbols = {"B": sizes.batch, "S": sizes.seq}
    if any("K" in spec.dims for spec in traced.specs().values()):
        symbols["K"] = sizes.kept
    if traced.has_encoder:
        symbols["E"] = sizes.source
    if traced.use_cache and traced.phase != "prompt" and sizes.past:
        symbols |= {"P": sizes.past, "T": sizes.past + sizes.seq}
    return Example(traced.example_inputs(sizes), symbols)
