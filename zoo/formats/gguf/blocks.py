"""How GGUF stores numbers: plain, or in blocks that share a scale."""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from ....layers.spec import missing_package

_PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
FORMATS = (
    *_PLAIN,
    *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "MXFP4"),
)
"""The formats that can be read."""
QUANTIZATIONS = ("F16", "Q8_0")
"""The formats that can be written."""

_SLAB = 2**20  # elements that are dequantized at once, so that the intermediate arrays stay in the cache


@dataclass(frozen=True)
class Format:
    """How the elements of a row are stored."""

    name: str
    block: int
    """Elements that are stored together."""
    bytes: int
    """What a block takes."""

    @property
    def dtype(self) -> np.dtype:
        """The type elements have in memory: float32 where they are stored in blocks."""
        return _PLAIN.get(self.name, np.dtype(np.float32))


def package() -> Any:
    """The `gguf` package. Raises ValueError with what to install where it is missing."""
    try:
        import gguf
    except ImportError as error:
        raise missing_package("GGUF files take", "gguf") from error
    return gguf


def format_of(number: int) -> Format:
    """The format that has a number in GGUF. Raises ValueError where it is not one of FORMATS."""
    types = package().GGMLQuantizationType
    try:
        kind = types(number)
    except ValueError:
        raise ValueError(f"the unknown format {number}; supported are {', '.join(FORMATS)}") from None
    if kind.name not in FORMATS:
        raise ValueError(f"the format {kind.name}; supported are {', '.join(FORMATS)}")
    block, size = package().GGML_QUANT_SIZES[kind]
    return Format(kind.name, block, size)


def decode(raw: np.ndarray, format: Format, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor from its bytes: a view of them where it is stored plain, else dequantized to float32."""
    if format.name in _PLAIN:
        return raw.view(format.dtype).reshape(shape)
    kind = package().GGMLQuantizationType[format.name]
    rows = raw.reshape(-1, shape[-1] // format.block * format.bytes)
    out = np.empty((len(rows), shape[-1]), np.float32)
    step = max(1, _SLAB // shape[-1])
    # A hostile file may hold infinite scales; their products are the file's affair.
    with np.errstate(all="ignore"):
        for start in range(0, len(rows), step):
            out[start : start + step] = package().dequantize(rows[start : start + step], kind)
    return out.reshape(shape)


def encode(x: np.ndarray, format: Format) -> np.ndarray:
    """The bytes of a tensor in F32 or one of QUANTIZATIONS: `[..., bytes of a row]` for Q8_0, else plain numbers.

    Raises:
        ValueError: a number is too large: for F16, or for a multiple of an F16 up to 127, as which Q8_0 stores it.
    """
    x = np.asarray(x).astype(np.float32)
    if format.name == "F32":
        return x
    largest, most = float(np.max(np.abs(x), initial=0)), 65504.0 * (127 if format.name == "Q8_0" else 1)
    if not largest <= most:
        raise ValueError(f"{format.name} holds magnitudes up to {most:.0f}, got {largest:g}")
    if format.name == "F16":
        return x.astype(np.float16)
    return package().quantize(x, package().GGMLQuantizationType[format.name])
