"""Finds packages of others that stand in front of `passes` or `cost_model`: top-level names that we share site-packages
with, and that another distribution may use, too."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import warnings
from pathlib import Path

OWN = ("passes", "cost_model")
_HOME = Path(__file__).resolve().parents[1]


def shadowed() -> dict[str, str]:
    """Return, by name, where Python finds those of our packages that do not lie beside this one."""
    found = {name: _where(name) for name in OWN}
    return {name: where for name, where in found.items() if where != str(_HOME / name)}


def warn_if_shadowed() -> None:
    """Warn of each package of ours that another one shadows."""
    for name, where in shadowed().items():
        others = [d for d in importlib.metadata.packages_distributions().get(name, ()) if d != "autodist-fx"]
        whose = f" of the distribution {others[0]}" if others else ""
        warnings.warn(
            f"autodist_fx's package {name} is shadowed by {where}{whose}: autodist_fx will not work beside it; give it "
            "an environment of its own, or take the other off PYTHONPATH",
            RuntimeWarning,
            stacklevel=3,
        )


def _where(name: str) -> str:
    """Return the directory or file that `import name` would read."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # imported already, by somebody who left no spec
        spec = None
    if spec is None:
        return "nothing"
    folders = list(spec.submodule_search_locations or ())
    return str(Path(folders[0] if folders else spec.origin or "").resolve())
