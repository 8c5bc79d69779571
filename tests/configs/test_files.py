"""Runs in files of one's own: what is read, and the one message where it can't be."""

import json
from pathlib import Path

import pytest
from flaxzoo import configs
from flaxzoo.configs import RUNS, files, get_run

HEAD = "from flaxzoo import configs\nfrom flaxzoo.configs import Run\nimport flaxzoo.configs as c\n"
VALUE = "run = configs.get_run('shakespeare').replace(steps=7)\n"
FUNCTION = "def mine() -> Run:\n    return configs.get_run('shakespeare').replace(steps=8)\n"


@pytest.mark.parametrize(("text", "steps"), [(VALUE, 7), (FUNCTION, 8), (FUNCTION.replace("Run:", "c.Run:"), 8)])
def test_a_python_file_defines_a_run(tmp_path: Path, text: str, steps: int) -> None:
    (tmp_path / "my_run.py").write_text(HEAD + text)
    assert get_run(f"{tmp_path}/my_run.py").steps == steps
    assert files.run_name(f"{tmp_path}/my_run.py") == "my_run"


def test_one_of_several_runs_is_chosen(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("STEPS = 9\n")
    (tmp_path / "two.py").write_text(
        HEAD + "import helper\n" + VALUE + FUNCTION + "other = run.replace(steps=helper.STEPS)"
    )
    assert [get_run(f"{tmp_path}/two.py:{name}").steps for name in ("run", "mine", "other")] == [7, 8, 9]
    assert files.run_name("two.py:other") == "other"
    with pytest.raises(ValueError, match=r"several runs; choose one: .*two\.py:run, .*two\.py:mine, .*two\.py:other"):
        get_run(f"{tmp_path}/two.py")
    with pytest.raises(ValueError, match="it defines no run 'none', but run, mine, other"):
        get_run(f"{tmp_path}/two.py:none")


def test_a_json_file_holds_a_run(tmp_path: Path) -> None:
    run = RUNS["shakespeare"]().replace(steps=7)
    (tmp_path / "my.json").write_text(json.dumps(run.to_dict()))
    assert configs.get_run(f"{tmp_path}/my.json") == run


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.py", None, "there is no file .*a.py"),
        ("a.json", None, "there is no file .*a.json"),
        ("a.py", "x = 1\n", "cannot read a run from .*a.py: it defines no run; write e.g."),
        ("a.py", "\nx = 1 +\n", "a.py, line 2: SyntaxError: "),
        ("a.py", "\n\nraise KeyError('x')\n", "a.py, line 3: KeyError: "),
        ("a.py", HEAD + VALUE.replace("steps=7", "steps=0"), "a.py, line 4: steps must be at least 1, got 0"),
        ("a.py", HEAD + "def f() -> Run:\n    return 3\n", "must return one, got int"),
        ("a.json", "{", "a.json does not hold a run: "),
        ("a.json", "[]", "a run is a JSON object, got list"),
        ("a.json", '{"kind": "Run", "stepz": 3}', "did you mean 'steps'"),
        ("a.json", '{"kind": "Rum"}', "did you mean 'Run'"),
        ("a.json", '{"kind": "Run"}', "model"),
    ],
)
def test_a_file_without_a_run_is_refused(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        get_run(f"{tmp_path}/{name}")
