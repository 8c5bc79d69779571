"""The machine of this process: peak speed and memory in use."""

import resource
import sys

from jaxlib._jax import Device

from ..plan import chips
from .libtpu import has_tpu as has_tpu


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
