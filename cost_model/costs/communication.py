"""Seconds of collectives and sends, alpha-beta: `launch + steps * latency + bytes sent per rank / bandwidth`.

Source of the formulas: R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of Collective Communication Operations in
MPICH", IJHPCA 19(1), 2005. The bandwidth terms are those of nccl-tests' doc/PERFORMANCE.md (bus bandwidth). On one
rank a collective takes 0 seconds. Of a link that was measured the formula is a bound, which its tables correct: they
were measured between ranks that compute in between, so that they hold what ranks wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, log2

from cost_model.costs.hardware import Link


def all_reduce_seconds(nbytes: float, ranks: int, link: Link) -> float:
    """Returns the seconds to sum tensors of `nbytes`, one on each of `ranks` ranks.

    Ring: reduce_scatter, then all_gather: 2(n-1) steps, 2(n-1)/n of the bytes. Tree, where the link has it: recursive
    doubling in log2(n) steps, each with all the bytes, for messages so small that steps are all that counts.
    """
    return _measured("all_reduce", _all_reduce, nbytes, ranks, link)


def all_gather_seconds(nbytes_whole: float, ranks: int, link: Link) -> float:
    """Returns the seconds to make a tensor of `nbytes_whole` whole on every rank, from 1/n of it on each.

    Ring: n-1 steps, (n-1)/n of the bytes. (NCCL and Gloo have no tree for it.)
    """
    return _measured("all_gather", _all_gather, nbytes_whole, ranks, link)


def send_seconds(nbytes: float, link: Link) -> float:
    """Returns the seconds in which one rank sends `nbytes` to one other."""
    return _measured("send", _send, nbytes, 2, link)


def _measured(kind: str, formula: Callable[[float, int, Link], float], nbytes: float, ranks: int, link: Link) -> float:
    """Returns the formula's seconds, corrected by what was measured of the link."""
    if ranks <= 1:
        return 0.0
    share = link.utilisation(kind, (ranks, max(1.0, nbytes)), lambda sizes: formula(sizes[1], int(sizes[0]), link))
    return formula(nbytes, ranks, link) / share


def _all_reduce(nbytes: float, ranks: int, link: Link) -> float:
    seconds = 2 * (ranks - 1) * (link.latency_seconds + nbytes / ranks / link.bandwidth)
    if link.tree:
        seconds = min(seconds, ceil(log2(ranks)) * (link.latency_seconds + nbytes / link.bandwidth))
    return link.launch_seconds + seconds


def _all_gather(nbytes_whole: float, ranks: int, link: Link) -> float:
    return link.launch_seconds + (ranks - 1) * (link.latency_seconds + nbytes_whole / ranks / link.bandwidth)


def _send(nbytes: float, ranks: int, link: Link) -> float:
    return link.launch_seconds + link.latency_seconds + nbytes / link.bandwidth
