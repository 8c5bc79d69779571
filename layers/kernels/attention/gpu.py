"""The GPUs that a program is compiled for."""

from typing import Any

import jax

KINDS = {"H100": "9.0", "H200": "9.0", "A100": "8.0"}
"""Compute capabilities of GPUs, by a part of their names."""


def capabilities() -> set[str]:
    """Compute capabilities of the GPUs that a program is compiled for; empty if they are unknown.

    These are the GPUs of the ambient mesh, which may exist only to compile for, or those of the process.
    """
    device, here = jax.sharding.get_abstract_mesh().abstract_device, _here()
    if device is None or device.platform not in ("gpu", "cuda"):
        return set(here.values())
    by_name = {capability for name, capability in KINDS.items() if name in device.device_kind}
    return by_name or {capability for kind, capability in here.items() if kind == device.device_kind}


def _here() -> dict[str, str]:
    """The compute capabilities of the GPUs in the process, by their kinds."""
    try:
        devices: list[Any] = jax.local_devices(backend="cuda")
    except RuntimeError:
        return {}
    return {device.device_kind: device.compute_capability for device in devices}
