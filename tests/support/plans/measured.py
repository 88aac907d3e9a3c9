"""A machine whose tables follow a law that is known, so that what is read from them is, too."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from math import prod

from cost_model.costs.hardware import CPU_GLOO, Hardware, Link
from cost_model.costs.measured import Measured, Run
from cost_model.costs.tables import Sizes, Table

PEAK, BANDWIDTH, HALF_PEAK = 1e11, 1e10, 5e10
FIXED = 4e-6
TRANSFER = 1e9  # bytes/s of messages
BYTES = (1e3, 1e5, 1e7)
GRID = ((1.0, 16.0, 256.0), (64.0, 1024.0), (64.0, 1024.0))


def utilisation(sizes: Sizes, ranks: int) -> float:
    """The law: a power of the sizes' product, less with more ranks."""
    return 0.02 * prod(sizes) ** 0.1 / ranks**0.5


def table(kind: str, dtype: str, axes: tuple[Sizes, ...], bound: Callable[[Sizes], float], ranks: int) -> Table:
    """Measured as the law says."""
    seconds = tuple(FIXED + bound(at) / utilisation(at, ranks) for at in itertools.product(*axes))
    return Table(kind, dtype, axes, seconds, FIXED)


def product_bound(peak: float, element: int) -> Callable[[Sizes], float]:
    return lambda at: max(
        2 * prod(at) / peak, element * (at[0] * at[1] + at[1] * at[2] + at[0] * at[2]) / BANDWIDTH
    )


def attention_bound(at: Sizes) -> float:
    queries, keys, heads = at
    return max(heads * queries * keys * 261 / PEAK, 4 * 64 * 2 * heads * (queries + keys) / BANDWIDTH)


def run(ranks: int) -> Run:
    streams = ("add", "silu", "cat", "embedding")
    return Run(ranks, (
        table("linear", "float32", GRID, product_bound(PEAK, 4), ranks),
        table("linear", "bfloat16", GRID, product_bound(HALF_PEAK, 2), ranks),
        table("sdpa", "float32", GRID, attention_bound, ranks),
        *(table(kind, "float32", (BYTES,), lambda at: at[0] / BANDWIDTH, ranks) for kind in streams),
        Table("view", "float32", ((1.0,),), (1e-6,), 1e-6),
    ))  # fmt: skip


def message_table(kind: str, ranks: tuple[float, ...] = (2.0,)) -> Table:
    """Messages that take 50 us and what their bytes take at 1 GB/s, whatever the formula says."""
    points = itertools.product(ranks, BYTES)
    return Table(kind, "", (ranks, BYTES), tuple(5e-5 + n / TRANSFER for _, n in points))


def machine(cores: int = 2, node_factor: float = 1.0, step_seconds: float = 0.0, name: str = "") -> Hardware:
    """Two cores, measured with one rank and with two at once."""
    link = Link(1e-5, 2e9, 1e-5, tables=(message_table("all_reduce"), message_table("all_gather")))
    return Hardware(
        name=name or "measured-cpu-by-law",
        flops=(("float32", PEAK), ("bfloat16", HALF_PEAK)),
        memory_bandwidth=BANDWIDTH,
        memory_bytes=2**33,
        op_seconds=FIXED * node_factor,
        view_seconds=1e-6 * node_factor,
        tp_link=link,
        pp_link=Link(1e-5, 2e9, tree=False, tables=(message_table("send"),)),
        ranks_per_node=64,
        inter_node=CPU_GLOO.inter_node,
        fuses_norms=False,
        ranks_share_device=True,
        measured=Measured(cores, (run(1), run(2)), node_factor, step_seconds),
    )
