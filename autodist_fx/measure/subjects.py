"""The ops that are measured, by the kinds of cost_model/costs/compute.py, and the sizes at which they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import DynamicCache

from autodist_fx.measure.chain import Call
from autodist_fx.measure.pool import Pool
from cost_model.costs.compute import ATTENTION, GQA_GROUP, GROUPED_ATTENTION, HEAD_DIM, PRODUCT
from cost_model.costs.tables import Sizes

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)  # decode steps, short prompts, long ones
_WIDTHS = (64, 256, 768, 2048, 5120)  # inner and outer sides of a weight: small models, and large ones' shards
_FEW_ROWS, _FEW_WIDTHS = (1, 16, 256), (256, 768, 2048)  # of the dtypes that are not the main one
_QUERIES, _KEYS, _HEADS = (1, 16, 128, 512), (32, 128, 512, 2048), (4, 16, 48)
_ELEMENTS = (256, 4096, 65536, 2**20, 2**23)
_PARAMETERS, _ADAMW_MOVES = (2**16, 2**20, 2**23), 10
_ROW = 1024  # elements of a row of what is normalized, gathered or glued, at most
_VOCABULARY = 32768

Make = Callable[[Pool, Sizes], Call]


@dataclass(frozen=True, slots=True)
class Subject:
    """A table to fill: `make(pool, sizes)` is one op at sizes of the grid, `tiny` are sizes at which it does nothing
    but be called."""

    kind: str
    axes: tuple[Sizes, ...]
    tiny: Sizes
    make: Make


def subjects(dtype: torch.dtype, main: torch.dtype) -> Iterator[Subject]:
    """Yield what is measured in a dtype: all kinds, at all sizes, in the `main` one; in others what differs most."""
    if dtype != main:
        yield Subject(PRODUCT, _axes(_FEW_ROWS, _FEW_WIDTHS, _FEW_WIDTHS), (1.0, 8.0, 8.0), _linear)
        if dtype.itemsize < main.itemsize:
            yield from (_stream(kind, *_STREAMS[kind], dtype) for kind in ("add", "silu", "rms_norm", "cat"))
        return
    yield Subject(PRODUCT, _axes(_ROWS, _WIDTHS, _WIDTHS), (1.0, 8.0, 8.0), _linear)
    for kind, make in ((ATTENTION, _attention), (GROUPED_ATTENTION, _grouped_attention)):
        yield Subject(kind, _axes(_QUERIES, _KEYS, _HEADS), (1.0, 2.0, 4.0), make)
    yield Subject("view", ((1.0,),), (1.0,), _view)
    yield from (_stream(kind, moved, make, dtype) for kind, (moved, make) in _STREAMS.items())
    yield Subject(
        "adamw", (tuple(n * _ADAMW_MOVES * dtype.itemsize for n in _PARAMETERS),), (160.0 * dtype.itemsize,), _adamw
    )


def _axes(*sizes: tuple[int, ...]) -> tuple[Sizes, ...]:
    return tuple(tuple(map(float, axis)) for axis in sizes)


def _linear(pool: Pool, sizes: Sizes) -> Call:
    rows, inner, columns = map(int, sizes)
    return Call(F.linear, (pool.warm((rows, inner)), pool.cold((columns, inner))))


def _attention(pool: Pool, sizes: Sizes, group: int = 1) -> Call:
    queries, keys, heads = map(int, sizes)
    key_heads = max(1, heads // group)
    q, k = pool.warm((1, heads, queries, HEAD_DIM)), pool.warm((1, key_heads, keys, HEAD_DIM))
    mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=pool.device)
    options = {"attn_mask": mask, "enable_gqa": True} if group > 1 else {"attn_mask": mask}
    return Call(F.scaled_dot_product_attention, (q, k, k), options)


def _grouped_attention(pool: Pool, sizes: Sizes) -> Call:
    return _attention(pool, sizes, GQA_GROUP)


def _view(pool: Pool, sizes: Sizes) -> Call:
    return Call(torch.Tensor.transpose, (pool.warm((2, 4)), 0, 1))


# -- ops that move bytes -----------------------------------------------------------------------------------------------


def _stream(kind: str, moved: float, make: Make, dtype: torch.dtype) -> Subject:
    """`moved`: elements that the op reads and writes, for each of those that `make` is given as sizes."""
    per_element = moved * dtype.itemsize
    axis = tuple(n * per_element for n in _ELEMENTS)

    def made(pool: Pool, sizes: Sizes) -> Call:
        return make(pool, (round(sizes[0] / per_element),))

    return Subject(kind, (axis,), (8 * per_element,), made)


def _shape(sizes: Sizes) -> tuple[int, int]:
    """Return sizes as rows."""
    width = min(int(sizes[0]), _ROW)
    return int(sizes[0]) // width, width


def _unary(function: Callable[..., torch.Tensor], *args: object) -> Make:
    return lambda pool, sizes: Call(function, (pool.warm(_shape(sizes)), *args))


def _binary(pool: Pool, sizes: Sizes) -> Call:
    x = pool.warm(_shape(sizes))
    return Call(torch.add, (x, x))


def _layer_norm(pool: Pool, sizes: Sizes) -> Call:
    x = pool.warm(_shape(sizes))
    weight = pool.warm((x.shape[-1],))
    return Call(F.layer_norm, (x, (x.shape[-1],), weight, weight))


def _rms_norm(pool: Pool, sizes: Sizes) -> Call:
    x = pool.warm(_shape(sizes))
    return Call(F.rms_norm, (x, (x.shape[-1],), pool.warm((x.shape[-1],)), 1e-6))


def _cat(pool: Pool, sizes: Sizes) -> Call:
    rows, width = _shape(sizes)
    x = pool.warm((rows, width))
    half = x.narrow(1, 0, width // 2)
    return Call(torch.cat, ([half, half], -1))


def _copy_of_transposed(pool: Pool, sizes: Sizes) -> Call:
    inside = min(HEAD_DIM, int(sizes[0]) // 4)
    x = pool.warm((int(sizes[0]) // inside // 2, 2, inside))
    return Call(torch.Tensor.contiguous, (x.transpose(0, 1),))


def _embedding(pool: Pool, sizes: Sizes) -> Call:
    rows, width = _shape(sizes)
    table = pool.cold((min(_VOCABULARY, 2**24 // width), width))
    ids = torch.randint(0, table.shape[0], (rows,), device=pool.device)
    return Call(F.embedding, (ids, table))


def _cache_update(pool: Pool, sizes: Sizes) -> Call:
    """A token more behind those that a layer of the cache has: two copies of all, as transformers makes them."""
    tokens = max(1, int(sizes[0]) // HEAD_DIM // 8)
    heads = max(1, int(sizes[0]) // HEAD_DIM // 2 // tokens)
    cache, new = DynamicCache(), pool.warm((1, heads, 1, HEAD_DIM))
    cache.update(new, new, 0)
    layer = cache.layers[0]
    layer.keys, layer.values = (pool.cold((1, heads, max(1, tokens - 1), HEAD_DIM)) for _ in range(2))
    return Call(_update, (cache, new))


def _update(cache: DynamicCache, new: torch.Tensor) -> torch.Tensor:
    return cache.update(new, new, 0)[0]


def _loss(pool: Pool, sizes: Sizes) -> Call:
    width = min(int(sizes[0]), _VOCABULARY)
    x = pool.warm((int(sizes[0]) // width, width))
    return Call(F.cross_entropy, (x, torch.zeros(x.shape[0], dtype=torch.long, device=pool.device)))


def _reduce(pool: Pool, sizes: Sizes) -> Call:
    return Call(torch.mean, (pool.warm(_shape(sizes)), -1))


def _adamw(pool: Pool, sizes: Sizes) -> Call:
    """A step of the optimizer and the norm before it, on parameters in sixteen tensors. Its bytes are those that
    cost_model/training/estimate.py counts: ten for each of a parameter."""
    each = max(1, round(sizes[0] / _ADAMW_MOVES / pool.dtype.itemsize) // 16)
    parameters = [torch.nn.Parameter(pool.cold((each,)).clone()) for _ in range(16)]
    for parameter in parameters:
        parameter.grad = pool.cold((each,))
    optimizer = torch.optim.AdamW(parameters, fused=True)
    optimizer.step()  # its states are made at the first
    return Call(_norm_and_step, (optimizer, parameters[0]))


def _norm_and_step(optimizer: torch.optim.Optimizer, like: torch.Tensor) -> torch.Tensor:
    torch.nn.utils.get_total_norm([p.grad for p in optimizer.param_groups[0]["params"]])
    optimizer.step()
    return like


# Kind -> (elements read and written for each, the op). They stand for others that have no table (`measured_as`).
_STREAMS: dict[str, tuple[float, Make]] = {
    "add": (3, _binary),
    "silu": (2, _unary(F.silu)),
    "gelu": (2, _unary(F.gelu)),
    "tanh": (2, _unary(torch.tanh)),
    "softmax": (2, _unary(torch.softmax, -1)),
    "layer_norm": (2, _layer_norm),
    "rms_norm": (2, _rms_norm),
    "reduce": (1, _reduce),
    "cat": (2, _cat),
    "contiguous": (2, _copy_of_transposed),
    "embedding": (2, _embedding),
    "cache_update": (2, _cache_update),
    "cross_entropy": (1, _loss),
}
