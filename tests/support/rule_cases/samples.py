"""Sample shapes of every kind of op: what the golden file shows its rule at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cost_model.graph.op_graph import Op, TensorSpec
from cost_model.rules import elementwise
from cost_model.rules.rule import OpRule, Shape
from cost_model.rules.table import RuleTable
from tests.support.rule_cases.arithmetic import NARY

_X = (2, 3, 4)
_IMAGE = (2, 6, 9, 9)


@dataclass(frozen=True)
class Sample:
    """An op of a kind, by the shapes of its tensors and its attributes."""

    kind: str
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """ "cat(dim=1)" """
        shown = ", ".join(f"{name}={value}" for name, value in self.attrs.items())
        return f"{self.kind}({shown})" if shown else self.kind

    @property
    def rule(self) -> OpRule:
        """As the searches get it."""
        specs = (tuple(TensorSpec(shape, "float32") for shape in side) for side in (self.inputs, self.outputs))
        inputs, outputs = specs
        return RuleTable()(Op("op", self.kind, (), outputs, self.attrs), inputs)


def _elementwise() -> Iterator[Sample]:
    """With the last dim broadcast, where there are several inputs, and the first left out."""
    for kind in elementwise.RULES:
        count = NARY[kind][0] if kind in NARY else 1
        yield Sample(kind, (_X, (3, 1), _X)[:count], (_X,))


SAMPLES: tuple[Sample, ...] = (
    *_elementwise(),
    Sample("dropout", (_X, (3,)), (_X,), {"p": 0.1, "drawn": 3}),
    Sample("batch_norm", (_IMAGE, (6,), (6,), (6,), (6,)), (_IMAGE,), {"statistics": True}),
    Sample("cache_read", (), ((2, 4, 5, 8), (2, 4, 5, 8)), {"layer": 0}),
    Sample("cache_update", ((2, 4, 1, 8), (2, 4, 1, 8)), ((2, 4, 5, 8), (2, 4, 5, 8)), {"layer": 0}),
    Sample("cat", ((2, 3, 4), (2, 5, 4)), ((2, 8, 4),), {"dim": 1}),
    Sample("conv", (_IMAGE, (8, 6, 3, 3), (8,)), ((2, 8, 7, 7),), {"groups": 1, "transposed": False}),
    Sample("conv", (_IMAGE, (12, 2, 3, 3), (12,)), ((2, 12, 7, 7),), {"groups": 3, "transposed": False}),
    *(
        Sample("cross_entropy", ((6, 10), (6,)), ((6,) if how == "none" else (),), {"reduction": how})
        for how in ("mean", "none", "sum")
    ),
    Sample("cumsum", (_X,), (_X,), {"dims": (1,), "linear": True}),
    Sample("embedding", ((2, 3), (9, 4)), ((2, 3, 4),)),
    Sample("expand", ((2, 1, 4),), ((2, 3, 4),)),
    Sample(
        "experts", ((6, 8), (6, 2), (6, 2), (4, 10, 8), (4, 8, 5)), ((6, 8),),
        {"parts": "halves", "transposed": False, "experts": 4},
    ),
    Sample(
        "experts", ((6, 8), (6, 2), (6, 2), (4, 8, 10), (4, 5, 8), (4, 10), (4, 8)), ((6, 8),),
        {"parts": "pairs", "transposed": True, "experts": 4},
    ),
    Sample("flip", (_X,), (_X,), {"dims": (1,), "linear": True}),
    Sample("gather", (_X, (2, 5, 4)), ((2, 5, 4),), {"dim": 1}),
    Sample("group_norm", (_IMAGE, (6,), (6,)), (_IMAGE,), {"groups": 3}),
    Sample("index", (_X, (7,)), ((2, 7, 4),), {"dims": ((0, 0), (2, 2))}),
    Sample("index_add", (_X, (7,), (7, 3, 4)), (_X,), {"dim": 0}),
    Sample("index_put", (_X, (7,), (7, 3, 4)), (_X,), {"dim": 0}),
    Sample("join_rows", ((2, 4), (3, 4), (2,)), ((5, 4),)),
    Sample("layer_norm", (_X, (4,), (4,)), (_X,), {"normalized": 1}),
    Sample("linear", ((2, 3, 8), (6, 8), (6,)), ((2, 3, 6),), {"transposed": False}),
    Sample("linear", ((2, 3, 8), (8, 6)), ((2, 3, 6),), {"transposed": True}),
    Sample("log_softmax", (_X,), (_X,), {"dims": (-1,), "linear": False}),
    Sample("matmul", ((2, 5, 3, 4), (5, 4, 7)), ((2, 5, 3, 7),)),
    Sample("permute", (_X,), ((2, 4, 1, 3),), {"order": (0, 2, -1, 1)}),
    Sample("pool", (_IMAGE,), ((2, 6, 4, 4),), {"spatial": 2, "linear": True}),
    Sample("reduce", (_X,), ((2, 4),), {"op": "sum", "dims": (1,), "keepdim": False}),
    Sample("reduce", (_X,), ((2, 1, 4), (2, 1, 4)), {"op": "max", "dims": (1,), "keepdim": True}),
    Sample("repeat_interleave", ((2, 2, 4),), ((2, 6, 4),), {"repeats": 3, "dim": 1}),
    Sample("rms_norm", (_X, (4,)), (_X,), {"normalized": 1}),
    Sample("roll", (_X,), (_X,), {"dims": (1,), "linear": True}),
    Sample("scatter", (_X, (2, 5, 4), (2, 5, 4)), (_X,), {"dim": 1, "adds": True}),
    Sample("sdpa", ((2, 6, 3, 8), (2, 6, 5, 8), (2, 6, 5, 8), (2, 1, 3, 5)), ((2, 6, 3, 8),)),
    Sample("sdpa", ((2, 6, 3, 8), (2, 2, 5, 8), (2, 2, 5, 8)), ((2, 6, 3, 8),)),
    Sample("slice", ((8, 6, 4),), ((8, 1, 2),), {"dims": ((0, 0, 0, 1), (2, 2, 0, 2))}),
    Sample("slice", ((8, 6),), ((3, 6),), {"dims": ((0, 0, 2, 1), (1, 1, 0, 1))}),
    Sample("softmax", (_X,), (_X,), {"dims": (-1,), "linear": False}),
    Sample("split", ((2, 8, 4),), ((2, 3, 4), (2, 5, 4)), {"dim": 1}),
    Sample("split_rows", ((5, 4), (2,)), ((2, 4), (3, 4))),
    Sample("stack", (_X, _X), ((2, 2, 3, 4),), {"dim": 1}),
    Sample("unbind", ((2, 2, 4),), ((2, 4), (2, 4)), {"dim": 1}),
    Sample("view", ((2, 3, 32),), ((2, 3, 4, 8),)),
    Sample("view", ((2, 3, 4, 8),), ((6, 32),)),
)
