"""Named training runs. Each docstring holds the command and the score it reached."""

from . import models
from .run import Data, Optimizer, Run


def shakespeare() -> Run:
    """The complete works of Shakespeare on any machine, in minutes.

    zoo train shakespeare

    2.19 held-out bits per byte in two and a half minutes on 2 CPU cores (7,000 tokens/s): docs/shakespeare.md.
    """
    return Run(
        model=models.small(vocab=4096, dim=192, layers=4, heads=6, kv_heads=2, hidden=512, tied=True),
        data=Data(source=("shakespeare",)),
        optimizer=Optimizer(name="muon", learning_rate=2e-2, warmup_steps=20, final_fraction=0.02),
        steps=450,
        batch=16,
        length=128,
        eval_every=90,
        sample_every=90,
        save_every=90,
        prompt="ROMEO.\n",
    )


def bench_cpu() -> Run:
    """The shape that `make bench-train` measures: 32.5M parameters, T 512, batch 8, float32, AdamW.

    zoo train bench_cpu --steps 20
    """
    return Run(
        model=models.small(),
        optimizer=Optimizer(learning_rate=3e-4),
        steps=20,
        batch=8,
        length=512,
    )
