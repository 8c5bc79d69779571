"""The machine of this process: its TPU, peak speed and memory in use."""

import os
import resource
import sys
from pathlib import Path

from jaxlib._jax import Device

from ..plan import chips


def has_tpu() -> bool:
    """Whether this machine has device files of a TPU."""
    return any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def without_tpu() -> None:
    """Keeps an installed libtpu from searching the network for a TPU in a machine that has none."""
    if not has_tpu():
        for name, value in (
            ("TPU_SKIP_MDS_QUERY", "1"),
            ("TPU_ACCELERATOR_TYPE", "v5litepod-1"),
            ("TPU_WORKER_HOSTNAMES", "localhost"),
        ):
            os.environ.setdefault(name, value)


def peak_flops(device: Device) -> float | None:
    """Peak bfloat16 FLOP/s of a JAX device; None if it is not in train/plan/chips.toml."""
    return chips.peak_flops(device.device_kind)


def memory_bytes(device: Device) -> int:
    """Peak memory use so far: of the device if it reports one, otherwise of this process."""
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
