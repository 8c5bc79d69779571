"""The flags of `zoo generate` and `zoo chat`: sampling, and where the weights of a name are."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from flaxzoo import configs, zoo
from flaxzoo.configs.models.hub import REPOSITORIES
from flaxzoo.train.commands.inference import ModelFlags, SamplingFlags
from flaxzoo.zoo import Sampling
from flaxzoo.zoo.formats.hub import is_name


@pytest.mark.parametrize(
    ("recommended", "flags", "sampling", "line"),
    [
        ({}, {}, Sampling(), "temperature 0.8"),
        (
            {"temperature": 0.6, "top_p": 0.9},
            {},
            Sampling(temperature=0.6, top_p=0.9),
            "temperature 0.6, top_p 0.9 (from generation_config.json)",
        ),
        (
            {"temperature": 0.6, "top_k": 20},
            {"temperature": 0.0},
            Sampling(temperature=0.0, top_k=20),
            "greedy, top_k 20 (from generation_config.json)",
        ),
        (
            {"temperature": 0.6},
            {"temperature": 0.7, "min_p": 0.1},
            Sampling(temperature=0.7, min_p=0.1),
            "temperature 0.7, min_p 0.1",
        ),
    ],
    ids=["neither", "recommended", "one flag", "all by flags"],
)
def test_flags_override_what_the_model_recommends(
    recommended: dict[str, Any], flags: dict[str, Any], sampling: Sampling, line: str
) -> None:
    chosen, defaults = SamplingFlags(**flags, seed=3), Sampling(**recommended)
    assert chosen.over(defaults) == sampling
    assert chosen.describe(defaults, tuple(recommended)) == line


def test_every_setting_of_sampling_has_a_flag() -> None:
    flags = {field.name for field in dataclasses.fields(SamplingFlags)}
    assert flags == {field.name for field in dataclasses.fields(Sampling)} | {"seed"}


def test_every_published_model_has_a_repository() -> None:
    assert REPOSITORIES.keys() == configs.MODELS.keys() - {"small"}
    assert all(map(is_name, REPOSITORIES.values()))
    assert len({*REPOSITORIES.values()}) == len(REPOSITORIES)


class Opened(Exception):
    """Raised in place of opening a source."""


def test_a_named_model_is_read_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def opened(source: str, **_: Any) -> None:
        raise Opened(source)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zoo, "open", opened)
    with pytest.raises(Opened, match="^HuggingFaceTB/SmolLM2-135M$"):
        ModelFlags().open("smollm2_135m")
    assert "smollm2_135m is HuggingFaceTB/SmolLM2-135M on the Hugging Face hub" in capsys.readouterr().err
    (tmp_path / "smollm2_135m").mkdir()
    with pytest.raises(Opened, match="^smollm2_135m$"):  # a folder of this name comes first
        ModelFlags().open("smollm2_135m")


def test_names_that_do_not_exist_list_models_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"unknown model or run 'smollm2_135n'; did you mean 'smollm2_135m'.*runs/mine"
    ):
        ModelFlags().open("smollm2_135n")
