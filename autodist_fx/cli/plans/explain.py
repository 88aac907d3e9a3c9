"""Explain a saved plan: where its time and bytes go; of one op or one cut, what else could have been, at what cost.

FILE is what `autodist-fx plan --save` wrote. Neither torch nor the model is needed.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from cost_model.explain.breakdown import whole_facts, whole_sections
from cost_model.explain.cut import cut_facts, cut_section
from cost_model.explain.find_ops import find_ops
from cost_model.explain.op import alike, op_facts, sections_of
from cost_model.explain.plan_text import plan_header
from cost_model.partition_plan import PartitionPlan
from cost_model.text_tables import Section, sections_text

EXAMPLES = (
    ("autodist-fx explain plan.json", "where seconds and bytes go, and why the stages end where they do"),
    ("autodist-fx explain plan.json --op q_proj", "each role that these linears could have had, and its cost"),
    ("autodist-fx explain plan.json --cut 0", "the places next to the first cut, and what each would cost"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `autodist-fx explain`."""
    parser.add_argument("plan", metavar="FILE", help="a plan, as JSON")
    parser.add_argument("--op", metavar="NAME", help="an op, a module's path, the end of one (q_proj), or a pattern")
    parser.add_argument("--cut", type=int, metavar="K", help="the cut between stages K and K+1")
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the explanation of a plan, of ops, or of a cut; return the exit code."""
    plan = PartitionPlan.load(args.plan)
    facts: dict[str, Any] = {}
    sections: list[Section] = []
    if args.op is not None:
        groups = alike(plan, find_ops(plan, args.op))
        facts["ops"] = [op_facts(plan, ops) for ops in groups]
        sections += sections_of(plan, groups)
    if args.cut is not None:
        facts["cut"] = cut_facts(plan, args.cut)
        sections.append(cut_section(plan, args.cut))
    if args.op is None and args.cut is None:
        facts, sections = whole_facts(plan), whole_sections(plan)
    print(json.dumps(facts, indent=1) if args.json else sections_text(plan_header(plan), sections))
    return 0
