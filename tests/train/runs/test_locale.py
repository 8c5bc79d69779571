"""A run does not depend on the locale: files are UTF-8, and consoles show escapes for what they lack."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys, warnings
warnings.filterwarnings("error", category=EncodingWarning, module="flaxzoo")
from flaxzoo.train.commands import cli
cli.main()
"""
TINY = (
    *("--model.dim", "32", "--model.layers", "1", "--model.block.0.ffn.hidden", "32", "--model.vocab", "300"),
    *("--steps", "2", "--batch", "2", "--length", "16", "--mesh", "fsdp=1"),
)


def test_a_run_under_an_ascii_locale(tmp_path: Path) -> None:
    """In training, with a sample of other characters, and when it resumes, no file is opened without its encoding."""
    (tmp_path / "café 日本.txt").write_text("café 日本語 ☃\n" * 300, encoding="utf-8")
    folder = tmp_path / "runs" / "run"
    environment = {name: value for name, value in os.environ.items() if name not in ("LANG", "PYTHONUTF8")}
    environment |= {
        "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii",
        "JAX_PLATFORMS": "cpu", "FLAXZOO_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    command = [sys.executable, "-X", "warn_default_encoding", "-c", PROGRAM, "train"]
    source = ["shakespeare", "--data.source", "café 日本.txt", "--name", "run", "--prompt", "☃", *TINY]
    for arguments in (source, [str(folder)]):
        done = subprocess.run([*command, *arguments], env=environment, cwd=tmp_path, capture_output=True)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        assert b"\\u2603" in done.stdout or b"all 2 steps" in done.stdout
    assert (folder / "checkpoints" / "2").is_dir()
    assert "☃" in (folder / "metrics.jsonl").read_text(encoding="utf-8") or (folder / "report.md").is_file()
