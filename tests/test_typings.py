"""typings/torch declares nothing that torch.fx has not: what mypy believes of nodes and graphs is so in this torch."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

TYPINGS = Path(__file__).resolve().parents[1] / "typings"
STUBS = sorted((TYPINGS / "torch" / "fx").glob("*.pyi"))


def _real(stub: Path) -> object:
    name = ".".join(stub.relative_to(TYPINGS).with_suffix("").parts)
    return importlib.import_module(name.removesuffix(".__init__"))


def _declared_wrongly(declared: ast.FunctionDef, real: object, where: str) -> list[str]:
    """Parameters that the real function lacks, has at another place, or asks for though the stub has none such."""
    if not callable(real):
        return [] if declared.decorator_list else [f"{where} is no function"]  # a property, or its setter
    try:
        has = inspect.signature(real).parameters
    except ValueError:  # written in C
        return []
    names = [a.arg for a in (*declared.args.posonlyargs, *declared.args.args, *declared.args.kwonlyargs)]
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in has.values()) or declared.decorator_list:
        return []
    owed = [n for n, p in has.items() if p.default is p.empty and n not in names]
    return [f"{where}({name})" for name in names if name not in has] + [f"{where} lacks {name}" for name in owed]


def _wrong(stub: Path) -> list[str]:
    module, found = _real(stub), []
    for item in ast.parse(stub.read_text()).body:
        if isinstance(item, ast.ClassDef):
            cls = getattr(module, item.name)
            for member in item.body:
                where = f"{stub.name}: {item.name}."
                if isinstance(member, ast.FunctionDef):
                    real = inspect.getattr_static(cls, member.name, None)
                    found += _declared_wrongly(member, real, where + member.name) if real else [where + member.name]
                elif isinstance(member, ast.AnnAssign):
                    assert isinstance(member.target, ast.Name)
                    name, classes = member.target.id, [c for c in cls.__mro__ if c.__module__.startswith("torch.fx")]
                    known = any(name in vars(c).get("__annotations__", {}) for c in classes)
                    known = known or any(re.search(rf"self\.{name}\b", inspect.getsource(c)) for c in classes)
                    found += [] if known else [where + name]
        elif isinstance(item, ast.FunctionDef):
            found += _declared_wrongly(item, getattr(module, item.name), f"{stub.name}: {item.name}")
        elif isinstance(item, ast.ImportFrom) and stub.stem == "__init__":
            found += [f"{stub.name}: {alias.name}" for alias in item.names if not hasattr(module, alias.name)]
    return found


@pytest.mark.parametrize("stub", STUBS, ids=[stub.stem for stub in STUBS])
def test_declared_members_and_parameters_are_torch_fx_s_own(stub: Path) -> None:
    assert _wrong(stub) == []


def test_a_member_that_torch_lacks_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = tmp_path / "torch" / "fx" / "node.pyi"
    stub.parent.mkdir(parents=True)
    stub.write_text("class Node:\n    nam: str\n    def prepend(self, node: Node) -> None: ...\n")
    monkeypatch.setitem(globals(), "TYPINGS", tmp_path)
    assert _wrong(stub) == ["node.pyi: Node.nam", "node.pyi: Node.prepend(node)", "node.pyi: Node.prepend lacks x"]
