"""What is known of TPU chips, and slices of them by name."""

import functools
import math
import tomllib
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import jax

from ..layers.spec import unknown

TOPOLOGIES = {"colab-v5e": "v5e:1x1", "colab-v6e": "v6e:1x1", "kaggle": "v5e:2x4"}
"""Slices that people have, by friendly names."""
REACHED = 0.9
"""The share of the published speed of HBM that copies reach: what XLA's own estimates take on v5e."""


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A JAX device of a TPU; `chips.toml` says where the numbers are from."""

    kind: str
    """What JAX calls it."""
    name: str
    hbm_gib: float
    tflops: float
    clock_ghz: float
    ici_gbps: float
    wrap: int
    hbm_gbps: float
    attention: tuple[float, float]
    """Shares of the peak, forward and backward."""
    decode: float
    """The share of the HBM's speed at which attention reads a cache."""
    grouped: tuple[float, float]
    """Cycles of products of grouped rows, and of groups with each other, beside those of the matrix units alone."""
    trust: str
    """How far predicted times are to be trusted."""
    derate: float = 1.0
    """The share of its predicted speed that attention reaches."""
    devices: int = 1
    """JAX devices of a chip."""
    options: dict[str, bool | int | str] = field(default_factory=dict)
    """Of the compiler, for programs on several devices."""
    usd_hour: float | None = None
    watts: float | None = None

    def costs(self, usd_hour: float | None, watts: float | None) -> tuple[float | None, float | None]:
        """Price and power as given or, where they are not, as the table has them."""
        return self.usd_hour if usd_hour is None else usd_hour, self.watts if watts is None else watts

    @property
    def hbm(self) -> float:
        """Bytes that a program may use."""
        return self.hbm_gib * 2**30

    @property
    def hbm_speed(self) -> float:
        """Bytes a second that copies reach."""
        return REACHED * self.hbm_gbps * 1e9


@functools.cache
def chips() -> dict[str, Chip]:
    """All of chips.toml, by device kind."""
    table = tomllib.loads((files(__package__ or "train") / "chips.toml").read_text())
    pairs = ("attention", "grouped")
    return {kind: Chip(kind=kind, **row | {name: tuple(row[name]) for name in pairs}) for kind, row in table.items()}


def compiler_options() -> dict[str, Any]:
    """How to compile a step for the devices of the ambient mesh; nothing to say but for several of a TPU."""
    mesh = jax.sharding.get_mesh()
    chip = chips().get(mesh.devices.flat[0].device_kind) if mesh.size > 1 else None
    return {} if chip is None else chip.options


def slice_of(text: str) -> str:
    """The topology that `text` names, e.g. 'v6e:2x4'. Raises ValueError on a name that is not known."""
    topology = TOPOLOGIES.get(text, text)
    name, colon, shape = topology.partition(":")
    names = [chip.name for chip in chips().values()]
    if name not in names or not colon:
        raise unknown("topology", text, [*TOPOLOGIES, *(f"{name}:2x4" for name in names)])
    if not all(side.isdecimal() and int(side) for side in shape.split("x")):
        raise ValueError(f"a topology is written 'v6e:2x4': a chip and the sides of a slice, got {text!r}")
    return topology


def chip_of(text: str) -> tuple[Chip, int]:
    """The chip of a topology, and how many JAX devices it has."""
    name, _, shape = slice_of(text).partition(":")
    chip = next(chip for chip in chips().values() if chip.name == name)
    return chip, chip.devices * math.prod(int(side) for side in shape.split("x"))
