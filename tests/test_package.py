"""What an installation brings along, and the house as it is installed."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(name: str, extras: frozenset[str] = frozenset()) -> set[str]:
    """The names of all distributions that installing `name` installs, itself included, from installed metadata."""
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = [(normal(name), extras)]
    while todo:
        name, extras = item = todo.pop()
        if item in seen:
            continue
        seen.add(item)
        for requirement in map(Requirement, importlib.metadata.requires(name) or ()):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""}):
                todo.append((normal(requirement.name), frozenset(requirement.extras)))
    return {name for name, _ in seen}


def test_core_install_is_small() -> None:
    names = closure("flaxzoo")
    assert {"jax", "flax", "flaxzoo", "tensorflow-datasets"} <= names
    assert not names & {"tensorflow", "tf-nightly", "torch", "keras"}
    assert len(names) <= 75, sorted(names)


def test_constraints_pin_every_requirement() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9a-z.]+", line) for line in lines)
    pinned = {line.partition("==")[0] for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    direct = (
        project["project"]["dependencies"]
        + project["project"]["optional-dependencies"]["viz"]
        + project["dependency-groups"]["dev"]
        + project["dependency-groups"]["bench"]
    )
    assert {normal(Requirement(text).name) for text in direct} <= pinned
    assert closure("flaxzoo") - {"flaxzoo"} <= pinned


def test_folders_are_linked_for_editable_installs() -> None:
    for folder in ("zoo", "layers", "train", "configs"):
        link = ROOT / ".dev" / "flaxzoo" / folder
        assert link.is_symlink()
        assert link.resolve() == ROOT / folder
