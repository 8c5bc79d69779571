"""`zoo plan`: memory, time and cost of a job on TPUs or GPUs, which need not be present."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ...configs.run import Run
from ...layers.linear.matmul import Kind
from ...layers.stack import Remat
from ..plan import decode as decoding
from ..plan import report
from ..plan.chips import chip_of
from .flags import parse_flags
from .source import SourceFlags

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class TrainingFlags:
    """Settings of a training job. A setting that is left out has the value that `zoo train` uses."""

    accumulate: int | None = None
    """Micro-batches of a step."""
    remat: Remat | None = None
    """Activations of each block that are saved for the backward pass, not recomputed (docs/training.md)."""
    quantize: Kind | None = None
    """Run the weight matmuls of each block in 8-bit precision."""
    optimizer: Literal["adamw", "lion", "muon", "adafactor", "sgd"] | None = None
    """The optimizer."""
    momentum_dtype: Dtype | None = None
    """Dtype of the optimizer's moving average of gradients."""
    search: bool = False
    """Look for the fastest mesh, remat and accumulate: rank all by arithmetic, and compile the best ones."""
    any_momentum: bool = False
    """Search also with momentum in bfloat16, if memory is short. This changes what the run learns."""
    plot: Path | None = None
    """Draw the search into this file, e.g. plan.png."""

    def set_flags(self) -> list[str]:
        """The flags that have a value."""
        return [f"--{name.replace('_', '-')}" for name, value in vars(self).items() if value]


@dataclass(frozen=True, kw_only=True)
class CostFlags:
    """Prices, for the cost of a million tokens."""

    usd_hour: Annotated[float | None, tyro.conf.arg(metavar="USD")] = None
    """Price of a device in $/chip-hour. Default: that of the table of chips, if it has one."""
    watts: Annotated[float | None, tyro.conf.arg(metavar="WATTS")] = None
    """Power of a chip. Without it, no energy is reported."""


@dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """Whether a training job fits a TPU slice or GPUs, how long a step takes, and what it costs.

    The TPU or GPU compiler compiles the training step, in about a minute; no TPU or GPU is needed. `--decode` plans
    generation instead.

    Example: `zoo plan qwen2_5_0_5b --topology colab-v5e --batch 4`
    """

    model: tyro.conf.Positional[str]
    """What `zoo train` takes: a named model or run, the folder of a run, a file with a run, or a checkpoint."""
    topology: str
    """Chip and sides of the slice, e.g. 'v6e:2x4'; GPUs, e.g. 'h100:8'; or colab-v5e, colab-v6e, kaggle."""
    batch: int | None = None
    """Sequences in a step. Default: as in training; 1 with --decode."""
    length: int | None = None
    """Tokens in a sequence. Default: as in training; 2048 with --decode."""
    mesh: str = ""
    """Axes and sizes, e.g. 'fsdp=4,tensor=2'. Default: fsdp over all chips; tensor over all chips with --decode."""
    dtype: Dtype | None = None
    """What layers compute in. Default: as in training; bfloat16 with --decode."""
    decode: bool = False
    """Plan generation: `batch` sequences that grow to `length` tokens."""
    cache_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    """With --decode, the dtype of the KV cache; int8 stores it quantized. Default: bfloat16."""
    json: bool = False
    """Print JSON."""
    training: tyro.conf.OmitArgPrefixes[TrainingFlags] = TrainingFlags()
    costs: tyro.conf.OmitArgPrefixes[CostFlags] = CostFlags()
    source: tyro.conf.OmitArgPrefixes[SourceFlags] = SourceFlags()


def parse(arguments: Sequence[str]) -> PlanFlags:
    """The spec that the arguments describe."""
    return parse_flags(PlanFlags, arguments, "zoo plan")


def run(spec: PlanFlags) -> None:
    """Prints the plan."""
    _plan_decoding(spec) if spec.decode else _plan_training(spec)


def _plan_decoding(spec: PlanFlags) -> None:
    if flags := spec.training.set_flags():
        raise ValueError(f"--decode plans generation, which has no use for {', '.join(flags)}; leave it out")
    (model_or_run,) = spec.source.read(spec.model)
    model = model_or_run.model if isinstance(model_or_run, Run) else model_or_run
    values = {"batch": spec.batch, "length": spec.length, "mesh": spec.mesh, "dtype": spec.dtype}
    values |= {"cache_dtype": spec.cache_dtype}
    job = decoding.Decoding(model=model, **{name: value for name, value in values.items() if value})
    decoding.command(job, spec.topology, as_json=spec.json, **vars(spec.costs))


def _plan_training(spec: PlanFlags) -> None:
    flags = spec.training
    if (flags.any_momentum or flags.plot) and not flags.search:
        raise ValueError("--any-momentum and --plot are of a search; add --search or leave them out")
    if spec.cache_dtype:
        raise ValueError(f"training has no cache, got --cache-dtype {spec.cache_dtype}; add --decode or leave it out")
    usual = spec.source.run(spec.model, devices=chip_of(spec.topology)[1], accelerator=True)
    values = {"batch": spec.batch, "length": spec.length, "mesh": spec.mesh, "dtype": spec.dtype}
    values |= {"accumulate": flags.accumulate, "remat": flags.remat, "quantize": flags.quantize}
    values |= {"optimizer.name": flags.optimizer, "optimizer.momentum_dtype": flags.momentum_dtype}
    job = usual.replace(**{name: value for name, value in values.items() if value})
    if flags.search:
        search = {"usual": usual, "momentum": flags.any_momentum, "plot": flags.plot}
        report.search_command(spec.model, job, spec.topology, as_json=spec.json, **search, **vars(spec.costs))
    else:
        report.command(job, spec.topology, as_json=spec.json, **vars(spec.costs))
