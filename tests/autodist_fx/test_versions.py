"""Versions of torch and transformers that nothing here was written for are refused at import, in one line."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tomllib
from pathlib import Path

import pytest

import autodist_fx


def import_again() -> None:
    """Run the package's __init__ once more, under another name."""
    spec = importlib.util.spec_from_file_location("autodist_fx_again", autodist_fx.__file__)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize(
    ("installed", "wanted"),
    [
        ({"transformers": "4.56.2"}, "transformers>=4.57,<6"), ({"transformers": "6.0.0"}, "transformers>=4.57,<6"),
        ({"torch": "2.6.0+cu124"}, "torch>=2.7"), ({"transformers": "4.57.0"}, ""), ({"transformers": "5.0.0rc1"}, ""),
        ({"torch": "2.10.0"}, ""),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_refused(
    installed: dict[str, str], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"torch": "2.13.0", "transformers": "5.24.0", **installed}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    if not wanted:
        import_again()
        return
    with pytest.raises(ImportError) as refusal:
        import_again()
    (found,) = installed.values()
    assert str(refusal.value) == f"autodist_fx needs {wanted}, and {found} is installed: pip install '{wanted}'"


def test_the_package_asks_for_the_same() -> None:
    project = tomllib.loads((Path(autodist_fx.__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
    assert {"torch>=2.7", "transformers>=4.57,<6"} <= set(project["project"]["dependencies"])
