"""The tree stays readable: small folders, small files, no circles, every import within a package runs one way.

The layers themselves are import-linter's (`make lint`). `python tests/test_layout.py` prints what is asserted here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("autodist_fx", "passes", "cost_model")
MOST_FILES, MOST_LINES = 15, 400
NO_SUBJECTS = ("Of", "What", "Whose", "But")  # a docstring begins with its subject or its verb
OTHERS_PRIVATE_MEMBERS = {  # which tests may use: ours have a public way, or are tested by what comes of them
    *("_exit", "_replace", "_asdict", "_fields", "_repr_html_"),  # Python, IPython
    *("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", "_ConvNd"),  # torch
    *("_Action", "_add_send_recv"),  # torch.distributed.pipelining
    *("_allgather_base", "_timeout"),  # process groups, of which tests/support/device/driver.py pretends one
    # what torch's own fake tensors take, and its ops, for the pretended GPU (tests/support/device/pretended.py)
    *("_C", "_ensureCUDADeviceGuardSet", "_only_lift_cpu_tensors", "_set_only_lift_cpu_tensors", "_getframe"),
    *("_make_wrapper_subclass", "_meta_in_tls_dispatch_include", "_set_meta_in_tls_dispatch_include", "_pytree"),
    *("_local_scalar_dense", "_unique2", "_index_put_impl_", "_fused_sdp_choice", "_pin_memory", "_to_copy"),
    *("_attn_implementation", "_model_mapping", "_TORCH_METHODS_TO_PATCH"),  # transformers
    *("_prepare_attention_mask_for_generation", "_update_model_kwargs_for_generation", "_apply_gate"),
}


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path, modules: set[str]) -> Iterator[str]:
    """The modules of ours that a file imports, lazily or for types alone counted alike."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in modules else node.module


def import_graph() -> nx.DiGraph:
    files = {module_name(path): path for path in python_files(*PACKAGES)}
    graph = nx.DiGraph()
    for name, path in files.items():
        graph.add_edges_from((name, other) for other in imported_modules(path, set(files)) if other != name)
    return graph


def circles(graph: nx.DiGraph) -> list[list[str]]:
    return sorted(sorted(part) for part in nx.strongly_connected_components(graph) if len(part) > 1)


def between_folders(graph: nx.DiGraph) -> nx.DiGraph:
    """The same between the rooms: the folders right under a package, and the files that lie beside them."""
    rooms = nx.DiGraph()
    for source, target in graph.edges:
        a, b = (".".join(name.split(".")[:2]) for name in (source, target))
        if a != b and a not in PACKAGES and b not in PACKAGES:
            rooms.add_edge(a, b)
    return rooms


def full_folders() -> list[str]:
    folders = {path.parent for path in python_files(*PACKAGES, "tests", "benchmarks")}
    sizes = {folder: len(list(folder.glob("*.py"))) for folder in folders}
    return [f"{folder.relative_to(ROOT)}: {n} files" for folder, n in sorted(sizes.items()) if n > MOST_FILES]


def long_files() -> list[str]:
    lengths = {path: len(path.read_text().splitlines()) for path in python_files(*PACKAGES, "tests", "benchmarks")}
    return [f"{path.relative_to(ROOT)}: {n} lines" for path, n in lengths.items() if n > MOST_LINES]


def private_members(path: Path) -> Iterator[str]:
    """The private members of other objects and modules that a file reads, sets or imports; `self._x` is its own."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[object] = []
        if isinstance(node, ast.Attribute):
            names = [] if getattr(node.value, "id", "") in ("self", "cls") else [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call):  # setattr(module, "_name", ...), monkeypatch's too
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("setattr", "getattr", "delattr"):
                names = [arg.value for arg in node.args[:2] if isinstance(arg, ast.Constant)]
        for name in names:
            if isinstance(name, str) and name.startswith("_") and not name.startswith("__"):
                yield f"{path.relative_to(ROOT)}:{node.lineno}: {name}"


def docstrings_without_subject(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = (ast.get_docstring(node) or "").partition(" ")[0]
            if first in NO_SUBJECTS:
                yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}: {first} ..."


def test_no_folder_has_too_many_files() -> None:
    assert full_folders() == []


def test_no_file_is_too_long() -> None:
    assert long_files() == []


def test_no_file_imports_itself_in_a_circle() -> None:
    assert circles(import_graph()) == []


def test_imports_between_folders_run_one_way() -> None:
    rooms = between_folders(import_graph())
    assert circles(rooms) == []


def test_tests_read_no_private_members() -> None:
    found = [line for path in python_files("tests", "benchmarks") for line in private_members(path)]
    assert [line for line in found if line.rpartition(" ")[2] not in OTHERS_PRIVATE_MEMBERS] == []


def test_docstrings_begin_with_subject_or_verb() -> None:
    files = python_files(*PACKAGES, "tests", "benchmarks")
    assert [line for path in files for line in docstrings_without_subject(path)] == []


def test_tests_change_no_path() -> None:
    others = [path for path in python_files("tests") if path != Path(__file__)]
    assert [str(path.relative_to(ROOT)) for path in others if "sys.path" in path.read_text()] == []


if __name__ == "__main__":
    graph = import_graph()
    rooms = between_folders(graph)
    print(f"{len(graph)} files, {graph.number_of_edges()} imports, circles of files: {circles(graph)}")
    print(f"{len(rooms)} rooms, {rooms.number_of_edges()} arrows, circles of rooms: {circles(rooms)}")
    print(f"folders over {MOST_FILES} files: {full_folders()}; files over {MOST_LINES} lines: {long_files()}")
