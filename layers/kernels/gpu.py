"""Which GPU a program is for."""

from typing import Any

import jax

KINDS = {"H100": "9.0", "H200": "9.0", "A100": "8.0"}
"""Compute capabilities of GPUs by what their names hold."""


def capability() -> str | None:
    """The least compute capability of all GPUs that a program is for; None where there is no knowing.

    They are those of the ambient mesh, which may be there to compile for alone, or those in the process.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    known = [] if device is None else [found for name, found in KINDS.items() if name in device.device_kind]
    return min(known or _here(), key=float, default=None)


def _here() -> list[str]:
    """The compute capabilities of the GPUs in the process."""
    try:
        devices: list[Any] = jax.local_devices(backend="cuda")
    except RuntimeError:
        return []
    return [device.compute_capability for device in devices]
