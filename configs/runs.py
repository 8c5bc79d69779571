"""Named training runs. Each docstring holds the command and the score it reached."""

import jax.numpy as jnp

from ..zoo import open_source
from ..zoo.decoder import Decoder
from ..zoo.families import registry
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


def colab() -> Run:
    """The complete works of Shakespeare on one chip of Colab, v5e or v6e, by 14M parameters: notebooks/train.ipynb.

    zoo train colab

    Half a minute on v5e and 15 seconds on v6e without compilation and evaluation, by `zoo plan`; never run on a chip by
    us.
    """
    return shakespeare().replace(
        model=models.small(vocab=4096, dim=384, layers=8, heads=6, kv_heads=2, hidden=1024, tied=True),
        steps=800,
        batch=64,
        length=256,
        dtype="bfloat16",
        eval_every=100,
        sample_every=200,
        save_every=200,
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


def from_scratch(model: Decoder, *, devices: int = 1, accelerator: bool = False) -> Run:
    """The usual run of a named model, from random initial parameters; `zoo train` and `zoo plan` use it.

    zoo train gpt2 --data.source my_book.txt

    Layers compute in bfloat16 on accelerators and in float32 on CPUs. The batch is the smallest multiple of the devices
    that has at least 8 sequences, each of at most 1024 tokens.

    Args:
        model: the model.
        devices: number of JAX devices that share a batch.
        accelerator: whether they are TPUs or GPUs.
    """
    return Run(
        model=model,
        batch=devices * -(-8 // devices),
        length=min(1024, model.max_positions or 1024),
        dtype="bfloat16" if accelerator else "float32",
    )


def finetune(weights: str, *, ignore: tuple[str, ...] = (), text_only: bool = False) -> Run:
    """All parameters of a pretrained model, on text of one's own.

    zoo train HuggingFaceTB/SmolLM2-135M --data.source my_book.txt --name my_book

    Layers compute in what the weights are stored in, and blocks are recomputed to save memory.

    Args:
        weights: a Hugging Face folder, a .gguf file, a name on the hub, or the folder of a run.
        ignore: as of `zoo.load`.
        text_only: as of `zoo.load`.
    """
    source = open_source(weights, ignore=ignore, text_only=text_only)
    model = registry.read(source.config)
    stored = {tensor.dtype for tensor in source.tensors.values()}
    positions = model.max_positions or source.config.get("max_position_embeddings")
    return Run(
        model=model,
        weights=weights,
        ignore=ignore,
        text_only=text_only,
        optimizer=Optimizer(learning_rate=2e-5, warmup_steps=10),
        steps=200,
        batch=8,
        length=min(1024, positions or 1024),
        dtype="bfloat16" if jnp.dtype(jnp.bfloat16) in stored else "float32",
        remat="full",
        eval_every=50,
        sample_every=50,
    )
