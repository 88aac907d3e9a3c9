"""Example inputs of a traced model: meta tensors of given sizes, and a cache that already holds some tokens."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from autodist_fx.calls.cache_kinds import CROSS, one_cache
from autodist_fx.calls.input_shapes import input_dims, is_multiple_choice, patches_demanded
from autodist_fx.calls.input_spec import size_of
from autodist_fx.calls.input_specs import InputSpec, ModelFacts
from autodist_fx.errors import TracingError
from autodist_fx.tracing.cache_layers import CacheLayer, new_cache
from autodist_fx.tracing.encoder_decoder_cache import both_kinds, model_cache
from autodist_fx.tracing.recurrent_states import StateTensor

INPUTS_WITH_CACHE = ("input_ids", "attention_mask", "position_ids", "past_key_values", "cache_position")
ENCODER_DECODER_INPUTS = ("attention_mask", "decoder_input_ids", "decoder_attention_mask")
ENCODER_DECODER_CACHE = ("past_key_values", "cache_position")
IMAGE_INPUTS = ("pixel_values",)
_USUAL_IMAGE_SIZE = 224  # of ImageNet's classifiers; what transformers' image processors resize to


@dataclass(frozen=True, slots=True)
class Sizes:
    """The concrete sizes of one call: sequences, tokens per sequence, tokens per sequence already in the cache, and
    what an encoder reads per sequence where there is one before the decoder."""

    batch: int
    seq: int
    past: int
    source: int = 1
    kept: int = 1  # positions that logits are wanted of, where an input lists them

    def times(self, multiples: Mapping[str, int]) -> Sizes:
        """Return sizes that are multiples of these numbers, by size symbol."""
        b, s, e = (multiples.get(symbol, 1) for symbol in "BSE")
        return replace(self, batch=self.batch * b, seq=self.seq * s, source=self.source * e)


def input_facts(model: PreTrainedModel) -> ModelFacts:
    """Return what the specs of a model's inputs depend on."""
    choices = is_multiple_choice(type(model).__name__)
    return ModelFacts(model.config, has_encoder(model), embedding_dim(model), model.dtype, choices)


@dataclass(frozen=True, slots=True)
class ExampleInputs:
    """Makes up inputs for a model, also once the model itself is gone."""

    input_names: tuple[str, ...]
    config: PretrainedConfig
    cache_layers: tuple[CacheLayer | None, ...]  # by layer index; None: the model never writes that layer
    embedding_dim: int
    dtype: torch.dtype  # of the model's parameters
    added_kinds: tuple[str, ...] = ()  # of the last of `cache_layers`, which the model adds to its config's
    image_shape: tuple[int, ...] = ()  # of one image, [channels, height, width]; () for a model without
    has_encoder: bool = False  # that reads the main input, before a decoder
    fewest_frames: int = 0  # of sound, that convolutions over time leave something of
    states: tuple[StateTensor, ...] = ()  # of a cache of the model's own, which are inputs one by one
    counts_past: bool = False  # masks cover `past` tokens, too, whatever the cache is
    multiples: Mapping[str, int] = field(default_factory=dict)  # of which lengths are, by size symbol
    specs: Mapping[str, InputSpec] = field(default_factory=dict)  # of inputs that are not as input_shapes has them

    def spec(self, name: str) -> InputSpec | None:
        """Return an input's spec; None for a cache and states. Raises TracingError for a name that nothing is known
        of."""
        if name == "past_key_values" or any(state.name == name for state in self.states):
            return None
        if name in self.specs:
            return self.specs[name]
        if name in IMAGE_INPUTS and self.image_shape:
            return InputSpec(("B", *self.image_shape), self.dtype)
        frames = getattr(getattr(self.config, "vision_config", None), "num_frames", None)
        if name == "pixel_values_videos" and self.image_shape and frames:
            return InputSpec(("B", frames, *self.image_shape), self.dtype)
        known = input_dims(name, self.config, self.has_encoder)
        if known is None:
            raise TracingError(
                f"no example input is known for {name!r}: trace with other input_names, or give it a fixed value in "
                f"concrete_args"
            )
        dims, is_floating = known
        if "D" in dims and not self.embedding_dim:
            raise TracingError(f"{name!r} is of no known width: trace with other input_names")
        dims = tuple(self.embedding_dim if d == "D" else d for d in dims)
        return InputSpec(dims, self.dtype if is_floating else torch.long)

    def make(self, sizes: Sizes) -> dict[str, object]:
        """Return meta tensors (and one DynamicCache of meta tensors) by input name, new ones on each call."""
        return {name: self._make_one(name, sizes) for name in self.input_names}

    def _make_one(self, name: str, sizes: Sizes) -> torch.Tensor | DynamicCache:
        for state in self.states:
            if state.name == name:
                return state.make(sizes.batch, sizes.past)
        spec = self.spec(name)
        if spec is None:
            return self._make_cache(sizes.batch, sizes.past)
        past = sizes.past if "past_key_values" in self.input_names or self.counts_past else 0
        lengths = {"B": sizes.batch, "S": sizes.seq, "T": past + sizes.seq, "E": sizes.source, "K": sizes.kept}
        shape = [size_of(dim, lengths) for dim in spec.dims]
        return torch.empty(shape, dtype=spec.dtype, device="meta")

    def for_model(self, sizes: Sizes) -> dict[str, object]:
        """Return the same as the model itself takes it: a decoder's own cache and that of the encoder's output are
        two."""
        inputs = self.make(sizes)
        if self.has_encoder and "past_key_values" in inputs:
            inputs["past_key_values"] = model_cache(self.config, self.cache_layers, sizes.batch, sizes.past)
        return inputs

    def _make_cache(self, batch: int, past: int) -> DynamicCache:
        if self.has_encoder:
            kinds = both_kinds(self.config, len(self.cache_layers))
            cache = one_cache(kinds)
            for index, layer in enumerate(self.cache_layers):
                if layer is not None and kinds[index] != CROSS and past:
                    cache.update(*layer.make(batch, past), index, {})
            return cache
        cache = new_cache(self.config, self.added_kinds)
        if past:
            for index, layer in enumerate(self.cache_layers):
                if layer is not None:
                    cache.update(*layer.make(batch, past), index, {})
        return cache


def default_inputs(model: PreTrainedModel, use_cache: bool) -> tuple[str, ...]:
    """Return the arguments of the model's forward that people give, in its order: these become inputs of the graph.

    Token ids, their mask and the segments that a tokenizer adds to them; pixels; both for a model with two towers. With
    `use_cache` positions and the cache instead of segments. What an encoder reads (spectrograms, say) and a decoder's
    token ids, each with its mask, where there are both.
    """
    parameters = inspect.signature(model.forward).parameters
    if has_encoder(model):
        chosen = {model.main_input_name, *ENCODER_DECODER_INPUTS, *(ENCODER_DECODER_CACHE if use_cache else ())}
        return tuple(name for name in parameters if name in chosen)
    chosen = {"input_ids", "attention_mask"} | {n for n in (model.main_input_name,) if n in IMAGE_INPUTS}
    if model.main_input_name in IMAGE_INPUTS and "input_ids" not in parameters:
        chosen.discard("attention_mask")  # of tokens (transformers 5 takes one everywhere), and there are none
    chosen |= {name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    if use_cache:
        chosen |= set(INPUTS_WITH_CACHE)
    elif (getattr(model.config, "type_vocab_size", None) or 0) > 1:  # a table of its own for what tokenizers number
        chosen.add("token_type_ids")
    if model.main_input_name == "inputs" and "input_ids" not in parameters:  # of any kind, images among them
        chosen |= set(IMAGE_INPUTS)
    if hasattr(model, "get_text_features") and hasattr(model, "get_image_features"):
        chosen |= set(IMAGE_INPUTS)
    return tuple(name for name in parameters if name in chosen)


def has_encoder(model: PreTrainedModel) -> bool:
    """Return whether its forward runs an encoder on the main input, and a decoder after it."""
    return "decoder_input_ids" in inspect.signature(model.forward).parameters


def embedding_dim(model: PreTrainedModel) -> int:
    """Return the width of a token's embedding, for `inputs_embeds`; 0 for a model that embeds no tokens."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except (NotImplementedError, AttributeError):  # some models of images have the method, and nothing to return
        weight = None
    return 0 if weight is None else int(weight.shape[-1])


def image_shape(config: PretrainedConfig) -> tuple[int, ...]:
    """Return [channels, height, width] of the images that a config is for; 224 x 224 where it doesn't say. [patches,
    numbers] where they come in patches of any aspect ratio."""
    vision = getattr(config, "vision_config", config)
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    if (patches := patches_demanded(config)) is not None:
        return patches, channels * vision.patch_size**2
    size = getattr(vision, "image_size", None) or getattr(getattr(vision, "backbone_config", None), "image_size", None)
    size = size or _USUAL_IMAGE_SIZE
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))
    return channels, height, width


def unmistakable_sizes(model: PreTrainedModel, other_than: Sizes | None = None) -> Sizes:
    """Return sizes to trace with that cannot be taken for a dimension of the model, nor for a part of one.

    Primes that divide no dim of a parameter or buffer and no number in the config: then neither do they equal a head
    size, a number of heads or any other factor of a dimension. Kept small, since some shapes are found on CPU tensors.
    """
    dims = {dim for tensor in itertools.chain(model.parameters(), model.buffers()) for dim in tensor.shape}
    dims |= set(_integers(model.config.to_dict()))
    dims -= {0, 1}

    def free(size: int) -> bool:
        return all(dim % size for dim in dims)

    candidates = [prime for prime in _primes(5, 300) if free(prime)]
    sound = fewest_frames(model)
    if other_than is not None:
        taken = (other_than.batch, other_than.seq, other_than.past, other_than.source)
        candidates = [n for n in candidates if n not in taken]
        sound *= 2  # or as many frames might come out of the convolutions
    for batch, seq, past in itertools.permutations(candidates[:8], 3):
        if batch < seq and free(seq + past):
            source, kept = [size for size in candidates if size not in (batch, seq, past, seq + past)][:2]
            if sound > source:
                source = next(n for n in _primes(sound, 2 * sound) if free(n))
            return Sizes(batch, seq, past, source, kept)
    raise TracingError(
        f"{type(model).__name__}: no example sizes are left that differ from every dimension of the model. Please "
        f"report its config"
    )


def multiple_wanted(node: Node | None, known: Mapping[Node, Any], sizes: Sizes) -> dict[str, int]:
    """Return which length has to be a multiple of a number for this node, which cannot be computed at `sizes`, by its
    size symbol: {"E": 16} of `samples.view(batch, -1, 16)`; {} where it folds no length into parts of one size.

    `known` are the values of nodes at these sizes.
    """
    if node is None or node.op != "call_method" or node.target not in ("view", "reshape"):
        return {}
    folded, *shape = node.args
    shape = list(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    example = known.get(folded) if isinstance(folded, Node) else None
    left = list(example.shape) if isinstance(example, torch.Tensor) else []
    for part in (known.get(part) for part in shape if isinstance(part, Node)):
        if part in left:
            left.remove(part)
    lengths = {"B": sizes.batch, "S": sizes.seq, "E": sizes.source}
    symbols = [symbol for symbol, length in lengths.items() if length in left]
    number = math.prod(part for part in shape if type(part) is int and part > 0)
    return {symbols[0]: number} if len(symbols) == 1 and number > 1 else {}


_FRAMES = 47  # that an example of sound should have left; more than any other example size


def fewest_frames(model: PreTrainedModel) -> int:
    """Return how many samples or frames the model's convolutions over time make _FRAMES of, at least; 0 without any
    that leaves fewer than it gets."""
    needed = _FRAMES
    for module in reversed(list(model.modules())):
        if isinstance(module, nn.Conv1d) and isinstance(module.padding, tuple):
            (stride,), (padding,), (dilation,), (kernel,) = (
                module.stride, module.padding, module.dilation, module.kernel_size
            )  # fmt: skip
            needed = max(needed, (needed - 1) * stride + 1 + dilation * (kernel - 1) - 2 * padding)
    return needed if needed > _FRAMES else 0


def _integers(value: object) -> Iterator[int]:
    """Return the integers anywhere in a config's dict, but booleans."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield abs(value)
    elif isinstance(value, dict):
        yield from _each_integer(value.values())
    elif isinstance(value, (list, tuple)):
        yield from _each_integer(value)


def _each_integer(values: Iterable[object]) -> Iterator[int]:
    for value in values:
        yield from _integers(value)


def _primes(start: int, stop: int) -> Sequence[int]:
    return [n for n in range(start, stop) if all(n % divisor for divisor in range(2, int(n**0.5) + 1))]
