"""Draws a plan for Graphviz: stages and layers as clusters, linears as nodes with their roles, transfers as edges.

    autodist-fx show plan.json --dot - | dot -Tsvg > plan.svg

A plan lists its ops in the order in which they run, not which op reads which: edges inside a stage follow that order.
Linears that repeat from layer to layer are one node; edges give the number of collectives on the way.
"""

from __future__ import annotations

from collections import Counter

from autodist_fx.report.html_parts import ranks_text, show_name
from autodist_fx.report.stage_transfers import sent_tensors
from autodist_fx.report.stages import layer_of
from cost_model.explain.html import shorten
from cost_model.explain.op import collectives_of
from cost_model.format import bytes_text, compress_names, name_pattern
from cost_model.partition_plan import PartitionPlan
from cost_model.plan.data import OpPlan
from cost_model.plan.weights import linear_groups

FILLS = {"column": "#b9cdfd", "row": "#ffd79c", "vocab": "#b5e6d2", "hidden": "#c4e3ea", "groups": "#dccdff",
         "expert": "#ffcbe7", "replicate": "#ffc4bd"}  # fmt: skip
NODES_SHOWN = 2000
_Key = tuple[str, str, str]  # pattern of the layer, of the module, and the role


def plan_dot(plan: PartitionPlan) -> str:
    """Return the plan as a DOT digraph. Every name is quoted, and shortened where it is absurdly long."""
    shapes = {module: f"{g.shape} → {g.local}" for g in linear_groups(plan) for module in g.modules}
    lines = [
        "digraph plan {",
        f'  graph [fontname="Helvetica", labeljust=l, labelloc=t, label={_quoted(f"{plan.model} on {plan.mesh}")}]',
        '  node [shape=box, style="rounded,filled", fillcolor="#e6e9f0", color="#8a93a6", fontname="Helvetica"]',
        '  edge [color="#6b7488", fontname="Helvetica", fontsize=10]',
    ]
    nodes_left = NODES_SHOWN
    by_stage: list[list[OpPlan]] = [[] for _ in plan.stages]
    for op in plan.ops:
        by_stage[op.home].append(op)
    for k, ops in enumerate(by_stage):
        stage = _Stage(k, ops)
        lines += stage.lines(f"stage {k}, {ranks_text(plan.mesh.tp, k)}", shapes, nodes_left)
        nodes_left -= min(len(stage.nodes), nodes_left)
    for sent in sent_tensors(plan):
        for target in sent.targets:
            label = _quoted(f"{show_name(sent.label)}\n{bytes_text(sent.nbytes)} a tp rank")
            lines.append(f'  out{sent.source} -> in{target} [label={label}, color="#d9822b", penwidth=2]')
    return "\n".join([*lines, "}", ""])


class _Stage:
    """The nodes of one stage, and the edges between them, in the order in which ops run."""

    def __init__(self, index: int, ops: list[OpPlan]) -> None:
        self.index = index
        self.nodes: dict[_Key, list[str]] = {}  # the modules that share each node
        self.edges: dict[tuple[_Key | None, _Key | None], Counter[str]] = {}  # None: where the stage starts, or ends
        at: _Key | None = None
        collectives: Counter[str] = Counter()
        for op in ops:
            if op.role:
                module = op.module or op.name
                key = (name_pattern(layer_of(module)), name_pattern(module), op.role)
                self.nodes.setdefault(key, []).append(module)
                self._edge(at, key, collectives)
                at, collectives = key, Counter()
            collectives.update(collectives_of(op))
        self._edge(at, None, collectives)

    def _edge(self, source: _Key | None, target: _Key | None, collectives: Counter[str]) -> None:
        self.edges.setdefault((source, target), Counter()).update(collectives)

    def lines(self, title: str, shapes: dict[str, str], most: int) -> list[str]:
        """Return the lines of the stage's cluster, with at most `most` nodes."""
        shown = list(self.nodes)[:most]
        names = {key: f"n{self.index}_{i}" for i, key in enumerate(shown)}
        k = self.index
        lines = [f"  subgraph cluster_{k} {{", f'    label={_quoted(title)}; style=rounded; color="#8a93a6"']
        lines += [f'    {end}{k} [shape=point, width=0.08, label=""]' for end in ("in", "out")]
        layers: dict[str, list[_Key]] = {}
        for key in shown:
            layers.setdefault(key[0], []).append(key)
        for i, keys in enumerate(layers.values()):
            modules = dict.fromkeys(layer_of(module) for key in keys for module in self.nodes[key])
            times = f" ×{len(modules)}" if len(modules) > 1 else ""
            label = _quoted(show_name(", ".join(compress_names(modules))) + times)
            lines.append(f'    subgraph cluster_{k}_{i} {{ label={label}; style="rounded,dashed"')
            lines += [f"      {self._node(names[key], key, shapes)}" for key in keys]
            lines.append("    }")
        if len(self.nodes) > most:
            lines.append(f"    more{k} [label={_quoted(f'and {len(self.nodes) - most} more')}, shape=plaintext]")
        for (source, target), collectives in self.edges.items():
            a = names.get(source) if source else f"in{k}"
            b = names.get(target) if target else f"out{k}"
            label = "\n".join(f"{name} ×{n}" if n > 1 else name for name, n in collectives.items() if n)
            if a and b:
                lines.append(f"    {a} -> {b}" + (f" [label={_quoted(label)}]" if label else ""))
        return [*lines, "  }"]

    def _node(self, name: str, key: _Key, shapes: dict[str, str]) -> str:
        """Return the line of one node: the module's pattern, its role, and its weight's shapes."""
        layer, pattern, role = key
        modules = self.nodes[key]
        short = pattern.removeprefix(layer + ".")
        times = f" ×{len(modules)}" if len(modules) > 1 else ""
        label = f"{show_name(short)}{times}\n{show_name(role, 24)}\n{shorten(shapes[modules[0]], 80)}"
        return f'{name} [label={_quoted(label)}, fillcolor="{FILLS.get(role, "#e6e9f0")}"]'


def _quoted(text: str) -> str:
    """Quote `text` for the DOT language so that it shows as it is, without escapes (\\N) and entities (&lt;)."""
    text = shorten(text).replace("\\", "\\\\").replace('"', '\\"').replace("&", "&amp;")
    return '"' + text.replace("\n", "\\n") + '"'
