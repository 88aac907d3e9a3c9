"""`repeated_ops`: finds ops that do one module's work again: a layer that runs several times, on the same weights."""

from __future__ import annotations

from cost_model.graph.op_graph import Op, OpGraph


def repeated_ops(graph: OpGraph) -> dict[str, str]:
    """Returns each op that reads the same parameters as an op before it, as the same inputs of the same kind of op with
    outputs of the same shapes -> that op, by name."""
    first: dict[tuple[object, ...], str] = {}
    found: dict[str, str] = {}
    for op in graph:
        key = _work(graph, op)
        if key is not None and first.setdefault(key, op.name) != op.name:
            found[op.name] = first[key]
    return found


def _work(graph: OpGraph, op: Op) -> tuple[object, ...] | None:
    """Returns what ops that do the same on the same parameters have in common; None for an op that reads none."""
    read = tuple((slot, ref) for slot, ref in enumerate(op.inputs) if graph[ref.op].kind == "param")
    return (op.kind, op.module, read, graph.input_specs(op), op.outputs) if read else None
