"""Writes the parts of the site that are made by programs, into build/site_parts: plots, plan pages, the command line.

It runs in the package's own environment, since it imports the package; the site is then built in another (`make docs`).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from shapes import bench_llama, llama_3_70b

import autodist_fx as adx
from autodist_fx.cli.arguments import be_quiet
from autodist_fx.cli.reference.facts import read_commands
from autodist_fx.cli.reference.markdown import markdown
from autodist_fx.report.page import plan_page
from tools.site.plots import write_plots

PARTS = Path(__file__).resolve().parents[2] / "build" / "site_parts"


def main() -> None:
    """Write all parts anew."""
    be_quiet()
    shutil.rmtree(PARTS, ignore_errors=True)
    write_plots(PARTS / "plots")
    write(PARTS / "reference" / "command_line.md", markdown(read_commands()))
    inference = adx.compile(llama_3_70b(), tp=8, pp=4, hardware="h100", use_cache=True, verify=False)
    write(PARTS / "plans" / "llama_3_70b.html", plan_page(inference.plan))
    training = adx.choose_training(
        bench_llama(), 8, global_batch=32, tp=2, pp=2, dp=2, schedule="1f1b", sizes={"S": 512}, hardware="a100"
    )
    write(PARTS / "plans" / "training.html", plan_page(training.best.plan, training.best.timeline))


def write(path: Path, text: str) -> None:
    """Write a text, and the folders that lead to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
