"""What is known of the machine: peak speeds by device, and memory in use."""

import os
import resource
import sys
from pathlib import Path

import jax
from jaxlib._jax import Device

PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "Tesla T4": 65e12,
}
"""Dense bfloat16 (T4: float16) FLOP/s of one chip by the start of its device kind, from the makers' data sheets."""


def has_tpu() -> bool:
    """Whether there may be a TPU in this machine, by its device files."""
    return any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def without_tpu() -> None:
    """Where no TPU is in the machine, keeps an installed libtpu from searching one on the network and saying so."""
    if not has_tpu():
        for name, value in (
            ("TPU_SKIP_MDS_QUERY", "1"),
            ("TPU_ACCELERATOR_TYPE", "v5litepod-1"),
            ("TPU_WORKER_HOSTNAMES", "localhost"),
        ):
            os.environ.setdefault(name, value)


def refuse_64_bits() -> None:
    """Raises ValueError where JAX's 64-bit mode is on: it would change the dtypes of the training step."""
    if jax.config.jax_enable_x64:
        raise ValueError(
            "flaxzoo computes in 32 bits and fewer, and JAX's 64-bit mode is on; unset JAX_ENABLE_X64, or call "
            'jax.config.update("jax_enable_x64", False)'
        )


def peak_flops(device: Device) -> float | None:
    """The peak of a device, where it is known; the longest name that fits counts."""
    names = [name for name in PEAKS if device.device_kind.startswith(name)]
    return PEAKS[max(names, key=len)] if names else None


def memory_bytes(device: Device) -> int:
    """The most memory used so far: the device's own where it tells, else this process's."""
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
