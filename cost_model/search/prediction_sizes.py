"""Sizes at which seconds and bytes are predicted, by size symbol: B (batch), S (tokens), P (cached), E (encoder)."""

from __future__ import annotations

from collections.abc import Mapping

from cost_model.graph.op_graph import OpGraph

# Defaults where the caller gives no sizes: one sequence of 128 tokens; for a model with a KV cache one step of
# decoding, which is where generation spends its time.
FORWARD_SIZES = {"B": 1, "S": 128, "P": 0}
DECODE_SIZES = {"B": 1, "S": 1, "P": 512}
SOURCE_SIZE = 128  # "E": what an encoder before the decoder reads


def lengths_of(graph: OpGraph) -> set[str]:
    """Returns the size symbols that a graph has: B, and those of S, P and E that its shapes or its cache depend on.

    An image has no S, nor has a step of a model with a cache of its own, which is one token.
    """
    found = {symbol for op in graph for spec in op.outputs for text in spec.symbols for symbol in text.split("*")}
    if any(op.kind == "cache_update" for op in graph):
        found |= {"S", "P"}
    return {"B"} | found & {"S", "P", "E"} | ({"P"} if "T" in found else set())


def all_lengths(sizes: Mapping[str, int]) -> dict[str, int]:
    """Returns `sizes` completed: S and P (1 and 0 if not given), T = P + S, and all products of two ("B*S"), as merged
    dims have."""
    full = {"S": 1, "P": 0, **sizes}
    full["T"] = full.get("T", full["P"] + full["S"])
    for x in list(full):
        for y in list(full):
            if "*" not in x and "*" not in y:
                full[f"{x}*{y}"] = full[x] * full[y]
    return full
