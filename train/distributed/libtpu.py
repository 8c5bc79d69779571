"""Settings of libtpu, which must be made before JAX is imported."""

import os
from pathlib import Path


def has_tpu() -> bool:
    """Whether this machine has device files of a TPU."""
    return any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def skip_search() -> None:
    """Keeps an installed libtpu from searching the network for a TPU on a machine that has none."""
    if not has_tpu():
        for name, value in (
            ("TPU_SKIP_MDS_QUERY", "1"),
            ("TPU_ACCELERATOR_TYPE", "v5litepod-1"),
            ("TPU_WORKER_HOSTNAMES", "localhost"),
        ):
            os.environ.setdefault(name, value)
