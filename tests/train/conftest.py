"""A tiny run on a text of its own, programs compiled once for all tests, and the `zoo` command in a process."""

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flaxzoo.configs import Data, Optimizer, Run, models

TEXT = "the cat sat on a mat and then dog ran to house with blue sky over green hill but nobody saw it go"


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 kB of plain words, in lines."""
    source = random.Random(0)
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text("\n".join(" ".join(source.choices(TEXT.split(), k=8)) for _ in range(600)))
    return file


@pytest.fixture(scope="session")
def tiny(text: Path) -> Run:
    """A run of seconds: two layers of 32, 300 ids, one device, 8 rows of 32 tokens, 10 steps."""
    return Run(
        model=models.small(vocab=300, dim=32, layers=2, heads=4, kv_heads=2, hidden=64, tied=True),
        data=Data(source=(str(text),)),
        optimizer=Optimizer(learning_rate=1e-2, warmup_steps=2),
        steps=10,
        batch=8,
        length=32,
        mesh="fsdp=1",
        eval_every=0,
        sample_every=0,
        save_every=0,
        prompt="the cat",
    )


@pytest.fixture(scope="session")
def environment(programs: Path) -> dict[str, str]:
    """Of a `zoo` process: one device, and the caches of these tests."""
    changes = {
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "PYTHONWARNINGS": "error",
        "COLUMNS": "200",
    }
    return {**os.environ, **changes}


Zoo = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def zoo(environment: dict[str, str], tmp_path: Path) -> Iterator[Zoo]:
    """Starts `zoo ARGUMENTS` in the test's folder."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object, **changes: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", "from flaxzoo.train.commands.cli import main; main()", *map(str, arguments)]
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment | changes,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
