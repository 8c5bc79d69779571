"""Hooks of mkdocs: files outside docs/ that the site shows, and links to them.

README.md is the front page. Pages outside docs/ that `nav` names keep their paths. Any other file that a page links to
is copied into the site under source/, so that no link depends on where the repository is hosted.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"benchmarks/results/{p.name}" for p in ROOT.glob("benchmarks/results/*.md")),
)
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def site_path(path: str) -> str:
    """Where the site holds a file of the repository; both are relative paths with forward slashes."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return path if path in PAGES else f"source/{path}"


def repository_path(uri: str) -> str:
    """The file of the repository that the page at `uri` was read from."""
    if uri == "index.md":
        return "README.md"
    return uri if uri in PAGES else f"docs/{uri}"


def targets(text: str, source: str) -> list[str]:
    """The files of the repository that the text of `source` links to."""
    links = [link for _, link, _ in LINK.findall(text) if "://" not in link]
    return [posixpath.normpath(posixpath.join(posixpath.dirname(source), link)) for link in links]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the front page, the pages outside docs/, and every file that a page links to."""
    pages = [p.relative_to(ROOT).as_posix() for p in sorted((ROOT / "docs").rglob("*.md"))]
    pages += ["README.md", *PAGES]
    linked = {path for page in pages for path in targets((ROOT / page).read_text(encoding="utf-8"), page)}
    for path in sorted({*pages, *linked}):
        uri = site_path(path)
        if (ROOT / path).is_file() and files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Points the links of a page at the places that files have in the site."""
    here = page.file.src_uri
    source = repository_path(here)

    def moved(match: re.Match[str]) -> str:
        before, link, after = match.groups()
        if "://" in link:
            return match.group(0)
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        return f"{before}{posixpath.relpath(site_path(path), posixpath.dirname(here) or '.')}{after}"

    return LINK.sub(moved, markdown)
