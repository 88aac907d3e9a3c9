"""The lengths that seconds and bytes are predicted at, by their symbols: "B" (batch), "S", "P", "E"."""

from __future__ import annotations

from collections.abc import Mapping

from cost_model.graph.op_graph import OpGraph

# Lengths at which seconds and bytes are predicted where the caller names none: one sequence of 128 tokens; for a model
# with a KV cache one step of decoding, which is where generation spends its time.
FORWARD_SIZES = {"B": 1, "S": 128, "P": 0}
DECODE_SIZES = {"B": 1, "S": 1, "P": 512}
SOURCE_SIZE = 128  # "E": what an encoder before the decoder reads


def lengths_of(graph: OpGraph) -> set[str]:
    """B, and those of S, P and E that the graph's sizes or its cache's depend on: an image has no S, and a step of a
    model with a cache of its own is one token."""
    found = {symbol for op in graph for spec in op.outputs for text in spec.symbols for symbol in text.split("*")}
    if any(op.kind == "cache_update" for op in graph):
        found |= {"S", "P"}
    return {"B"} | found & {"S", "P", "E"} | ({"P"} if "T" in found else set())


def all_lengths(sizes: Mapping[str, int]) -> dict[str, int]:
    """B, S, P and E, the total T that S and P make, and the products that merged dims have ("B*S"). A step without S is
    of one token."""
    full = {"S": 1, "P": 0, **sizes}
    full["T"] = full.get("T", full["P"] + full["S"])
    for x in list(full):
        for y in list(full):
            if "*" not in x and "*" not in y:
                full[f"{x}*{y}"] = full[x] * full[y]
    return full
