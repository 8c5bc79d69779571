"""One checkpoint format into another, without a model between where none is needed."""

from collections.abc import Collection
from pathlib import Path

import jax.numpy as jnp

from ...layers.spec import unknown
from .load import LoadPlan, open_source
from .save import write_folder
from .source import Progress, Source, WithProgress

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("F16", "Q8_0")


def convert(
    source: str | Path | Source,
    destination: str | Path,
    *,
    dtype: str = "",
    ignore: Collection[str] = (),
    text_only: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes a checkpoint as a Hugging Face folder or, where the destination ends so, a `.gguf` file.

    Tensors are copied one by one: the host never holds the model, except for the folder of a run, which is loaded.

    Args:
        source: what `load` takes.
        destination: a folder that does not exist yet, or a file.
        dtype: float32, bfloat16 or float16 for a folder, F16 or Q8_0 for a `.gguf` file; by default as they are stored,
            and F16.
        ignore: as of `load`; these fields are left out of the new config.
        text_only: as of `load`.
        progress: is told how many bytes of how many are read.

    Raises:
        ValueError: as `load`, on a dtype that the destination does not have, and where it exists already.
        OSError: where the disk is full or does not let us.
    """
    destination = Path(destination)
    to_gguf = destination.suffix == ".gguf"
    known = QUANTIZATIONS if to_gguf else DTYPES
    if dtype and dtype not in known:
        kind = "a .gguf file" if to_gguf else "a folder"
        raise unknown(f"dtype for {destination.name}, {kind},", dtype, known)
    if destination.is_file() or (to_gguf and destination.exists()):
        raise ValueError(f"{destination} exists already; choose another place")
    opened = open_source(source, ignore=ignore, text_only=text_only)
    LoadPlan(opened)  # every tensor is accounted for, as in loading
    opened = opened if progress is None else WithProgress(opened, progress)
    if to_gguf:
        from .gguf import save_gguf  # which needs the `gguf` extra

        save_gguf(opened, destination, "Q8_0" if dtype == "Q8_0" else "F16")
    else:
        write_folder(opened, destination, dtype=jnp.dtype(dtype) if dtype else None)
