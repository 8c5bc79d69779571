"""What the documentation promises: Python blocks run, links and make targets exist."""

import re
import tomllib
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in a language; the empty string stands for blocks without one."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]


def run(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the Python blocks of a page in order, in one namespace and an empty folder."""
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    with jax.numpy_dtype_promotion("standard"):  # as a user has it; the tests' own setting is strict
        for block in blocks(page, "python"):
            exec(compile(block, page.name, "exec"), names)


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(ROOT / "README.md", tmp_path, monkeypatch)
    assert len(capsys.readouterr().out.splitlines()) > 5
    assert (tmp_path / "runs/quick/report.md").is_file()


def test_the_page_on_the_library_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(ROOT / "docs/library.md", tmp_path, monkeypatch)
    assert len(re.findall(r"loss \d+\.\d{3}", capsys.readouterr().out)) >= 6
    assert (tmp_path / "runs/from_python/metrics.jsonl").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_make_targets_exist() -> None:
    """In inline code and at the beginning of a line of a code block."""
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    code = [line for page in PAGES for block in blocks(page, "") for line in block.splitlines()]
    targets = {match for text in texts for match in re.findall(r"`make ([a-z-]+)", text)}
    targets |= {match[1] for line in code if (match := re.match(r"make ([a-z-]+)", line))}
    assert len(targets) > 5
    for target in targets:
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target


def test_the_version_is_in_the_list_of_changes() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## ({re.escape(version)}\b|Unreleased)", text, re.MULTILINE)
