"""Adds to the site what does not lie in docs/: generated pages and plots, the course if there is one, CONTRIBUTING."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PARTS = ROOT / "build" / "site_parts"  # what tools/site/generate.py writes
ELSEWHERE = {
    "contributing.md": ROOT / ".github" / "CONTRIBUTING.md",
    "changelog.md": ROOT / "CHANGELOG.md",
    "examples/index.md": ROOT / "examples" / "README.md",
}
COURSE = "course/"
SHIM = "https://unpkg.com/iframe-worker/shim"  # material's search asks for it where pages are read as files; we have it


def on_config(config: Any) -> Any:
    """Put the course's pages into the navigation, or take its place out; and under "More" what nobody has placed."""
    pages = sorted((ROOT / "docs" / COURSE).rglob("*.md"), key=lambda path: (path.name != "index.md", path))
    config.nav = [item for entry in config.nav if (item := _entry(entry, pages)) is not None]
    named = set(_pages(config.nav))
    if others := [path.name for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in named]:
        config.nav.append({"More": others})
    return config


def _pages(entry: Any) -> Iterator[str]:
    """Yield the pages that a part of the navigation names."""
    if isinstance(entry, str):
        yield entry
    else:
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from _pages(part)


def _entry(entry: dict[str, Any], pages: list[Path]) -> dict[str, Any] | None:
    (title, target), *_ = entry.items()
    if target != COURSE:
        return entry
    return {title: [str(page.relative_to(ROOT / "docs")) for page in pages]} if pages else None


def on_files(files: Files, config: Any) -> Files:
    """Add the generated files, and those of other folders."""
    if not PARTS.is_dir():
        raise PluginError(f"{PARTS} is not there: `make docs` runs tools/site/generate.py first")
    for path in sorted(path for path in PARTS.rglob("*") if path.is_file()):
        files.append(File.generated(config, path.relative_to(PARTS).as_posix(), abs_src_path=str(path)))
    for path in sorted((ROOT / "examples").rglob("*.py")):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for name, path in ELSEWHERE.items():
        files.append(File.generated(config, name, content=path.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links into other folders of the repository lead to the site's own pages."""
    up = "../" * page.file.src_uri.count("/")
    if page.file.src_uri == "examples/index.md":  # names of scripts become links to them
        markdown = re.sub(r"(?m)^\| `(\w+\.py)` \|", r"| [\1](\1) |", markdown)
    if page.file.src_uri in ELSEWHERE:
        markdown = re.sub(r"\]\((\.\./)?docs/", "](", markdown)
    return re.sub(r"\]\((\.\./)*\.github/CONTRIBUTING\.md", f"]({up}contributing.md", markdown)


def on_post_build(config: Any) -> None:
    """Let every page take the search's shim from the site itself. Raises PluginError for a page that fetches more."""
    site = Path(config.site_dir)
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        up = "../" * (len(path.relative_to(site).parts) - 1)
        text = text.replace(SHIM, f"{up}javascripts/iframe-worker.js")
        if fetched := re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="?(https?://[^">]+)', text):
            raise PluginError(f"{path} fetches {fetched[0]}: a page of ours needs no network")
        path.write_text(text, encoding="utf-8")
