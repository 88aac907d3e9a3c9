"""grains."""

from __future__ import annotations

import numpy as np

from cost_model.graph.placement import Layout, intervals_of
from cost_model.rules.rule import IntArray

Edge = tuple[int, int, tuple[IntArray, IntArray], bool]


def deal_grains(sizes: tuple[int, ...], edges: list[Edge], tp: int) -> list[Layout | None]:
    """Layouts of dims of `sizes` elements tied by `edges` (dim a, dim b, element pairs, cover) on `tp` ranks.

    Covering ties hold like all others unless that leaves fewer grains to deal out than ranks; see the module's
    docstring. Elements tied in another way too (k beside its q heads in one fused product) stay together even then.
    """
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    labels = _components(int(starts[-1]), starts, edges)
    followed: list[Edge] = []
    readers = [labels[starts[b] + b_elements] for _, b, (_, b_elements), cover in edges if cover]
    if readers and len(np.unique(np.concatenate(readers))) < tp:
        followed = [e for e in edges if e[3]]
        labels = _components(int(starts[-1]), starts, [e for e in edges if not e[3]])
    grains, labels = np.unique(labels, return_inverse=True)
    owners = np.zeros((len(grains), tp), dtype=bool)
    follows = np.zeros(len(grains), dtype=bool)
    for a, b, (a_elements, b_elements), _ in followed:
        read, reader = labels[starts[a] + a_elements], labels[starts[b] + b_elements]
        follows[read[read != reader]] = True
    for members in _by_dims(labels, starts, len(grains)):
        leading = members[~follows[members]]
        if len(leading) == 1:
            owners[leading] = True  # one piece that cannot be cut: everybody holds it
        else:
            share, extra = divmod(len(leading), tp)
            bounds = np.cumsum([0] + [share + (r < extra) for r in range(tp)])
            for r in range(tp):
                owners[leading[bounds[r] : bounds[r + 1]], r] = True
    counted = -1
    while counted != (counted := int(owners.sum())):  # one that is followed may itself follow another
        for a, b, (a_elements, b_elements), _ in followed:
            reader = owners[labels[starts[b] + b_elements]]
            np.logical_or.at(owners, labels[starts[a] + a_elements], reader)
    owners[~owners.any(axis=1)] = True  # two that follow each other, and nobody else
    layouts: list[Layout | None] = []
    for i, size in enumerate(sizes):
        held = owners[labels[starts[i] : starts[i + 1]]]
        parts = tuple(intervals_of(np.flatnonzero(held[:, r]).tolist()) for r in range(tp))
        layout = Layout(size, parts)
        layouts.append(None if layout.is_whole else layout)
    return layouts


def _components(count: int, starts: IntArray, edges: list[Edge]) -> IntArray:
    """Connected components over elements: for each element the least element it is tied to (hook and compress)."""
    labels = np.arange(count, dtype=np.int64)
    if not edges:
        return labels
    u = np.concatenate([starts[a] + pairs[0] for a, _, pairs, _ in edges])
    v = np.concatenate([starts[b] + pairs[1] for _, b, pairs, _ in edges])
    while True:
        lu, lv = labels[u], labels[v]
        least = np.minimum(lu, lv)
        if np.array_equal(lu, lv):
            return labels
        np.minimum.at(labels, lu, least)
        np.minimum.at(labels, lv, least)
        while not np.array_equal(jumped := labels[labels], labels):
            labels = jumped


def _by_dims(labels: IntArray, starts: IntArray, count: int) -> list[IntArray]:
    """Grains grouped by the set of dims they appear in, each group in element order.

    Dealt out group by group, each dim is split evenly: the parts of a concatenation that nothing else ties together
    would otherwise fall to different ranks as wholes.
    """
    signature = np.zeros(count, dtype=np.uint64)
    marks = np.random.default_rng(0).integers(1, 2**63, size=len(starts), dtype=np.uint64)
    for i in range(len(starts) - 1):
        signature[np.unique(labels[starts[i] : starts[i + 1]])] ^= marks[i]
    return [np.flatnonzero(signature == s) for s in dict.fromkeys(signature.tolist())]
