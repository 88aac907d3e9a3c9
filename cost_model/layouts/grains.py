"""Deals grains, the smallest pieces of dims that no rank boundary may cut, to the tp ranks.

All dims that are tied together are numbered as one array of elements: dim i has the elements `starts[i]` to
`starts[i + 1]`. Elements that are tied, directly or through others, have one label, and are a grain.
"""

from __future__ import annotations

import numpy as np

from cost_model.graph.placement import Layout, intervals_of
from cost_model.rules.rule import IntArray

Edge = tuple[int, int, tuple[IntArray, IntArray], bool]  # dim a, dim b, (elements of a, elements of b), cover


def deal_grains(sizes: tuple[int, ...], edges: list[Edge], tp: int) -> list[Layout | None]:
    """Returns the layout on `tp` ranks of each dim, of `sizes[i]` elements; None for a dim that every rank holds whole.

    `edges` tie element `pairs[0][n]` of dim a to element `pairs[1][n]` of dim b. Covering ties (of KV heads to their
    query heads) hold like all others unless that leaves fewer grains than ranks; then they are loosened: the query
    heads are dealt out, and a rank holds the KV heads that its query heads read (see layout_table.py). Elements tied in
    another way too (k beside its q heads in one fused product) stay together even then.
    """
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    labels = _components(int(starts[-1]), starts, edges)
    loosened: list[Edge] = []
    readers = [labels[starts[b] + b_elements] for _, b, (_, b_elements), cover in edges if cover]
    if readers and len(np.unique(np.concatenate(readers))) < tp:
        loosened = [e for e in edges if e[3]]
        labels = _components(int(starts[-1]), starts, [e for e in edges if not e[3]])
    # From here on labels count the grains, 0, 1, 2, ...; owners[grain, rank]: does the rank hold it?
    grains, labels = np.unique(labels, return_inverse=True)
    owners = np.zeros((len(grains), tp), dtype=bool)
    follows = np.zeros(len(grains), dtype=bool)
    for a, b, (a_elements, b_elements), _ in loosened:
        read, reader = labels[starts[a] + a_elements], labels[starts[b] + b_elements]
        follows[read[read != reader]] = True  # not dealt itself: it goes where its readers are
    for members in _by_dims(labels, starts, len(grains)):
        leading = members[~follows[members]]
        if len(leading) == 1:
            owners[leading] = True  # one piece that cannot be cut: everybody holds it
        else:
            share, extra = divmod(len(leading), tp)
            bounds = np.cumsum([0] + [share + (r < extra) for r in range(tp)])
            for r in range(tp):
                owners[leading[bounds[r] : bounds[r + 1]], r] = True
    owner_count = -1
    # To a fixed point, since a grain that is read may itself follow another one.
    while owner_count != (owner_count := int(owners.sum())):
        for a, b, (a_elements, b_elements), _ in loosened:
            reader = owners[labels[starts[b] + b_elements]]
            np.logical_or.at(owners, labels[starts[a] + a_elements], reader)
    owners[~owners.any(axis=1)] = True  # grains that follow only each other: everybody holds them
    layouts: list[Layout | None] = []
    for i, size in enumerate(sizes):
        is_held = owners[labels[starts[i] : starts[i + 1]]]
        parts = tuple(intervals_of(np.flatnonzero(is_held[:, r]).tolist()) for r in range(tp))
        layout = Layout(size, parts)
        layouts.append(None if layout.is_whole else layout)
    return layouts


def _components(count: int, starts: IntArray, edges: list[Edge]) -> IntArray:
    """Labels each of `count` elements with the least element that it is tied to, directly or through others.

    Hook and compress (Y. Shiloach, U. Vishkin, "An O(log n) parallel connectivity algorithm", 1982), whose steps are
    array operations: a union-find in Python is too slow for millions of elements.
    """
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
    """Groups grains by the set of dims in which they appear, each group in element order.

    Dealt out group by group, each dim is split evenly: the parts of a concatenation that nothing else ties together
    would otherwise fall to different ranks as wholes.
    """
    # A set of dims is identified by a hash, in place of a set object for each grain (Zobrist hashing, 1970): each dim
    # has a random 63-bit mark, and a grain's signature is the XOR of the marks of its dims. np.unique applies a mark
    # once to a grain, however many elements of the dim it has, so that equal sets have equal signatures; different sets
    # have different ones but for a chance of 2**-63 a pair. With the fixed seed every process deals alike.
    signature = np.zeros(count, dtype=np.uint64)
    marks = np.random.default_rng(0).integers(1, 2**63, size=len(starts), dtype=np.uint64)
    for i in range(len(starts) - 1):
        signature[np.unique(labels[starts[i] : starts[i + 1]])] ^= marks[i]
    return [np.flatnonzero(signature == s) for s in dict.fromkeys(signature.tolist())]
