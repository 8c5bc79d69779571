"""Named Gemma models: 1, 2 and the text part of 3."""

from ...layers.positions.scaling import LinearScaling
from ...zoo import Attention, Block, Decoder, GatedMLP, RMSNorm, Rope

NORM = RMSNorm(zero_centered=True)


def _gemma(
    dim: int, layers: int, heads: int, kv_heads: int, hidden: int, *, head_dim: int = 256, vocab: int = 256_000
) -> Decoder:
    """Gemma (2403.08295, table 1): GeGLU, scaled and tied embeddings."""
    attention = Attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    block = Block(mixer=attention, ffn=GatedMLP(hidden=hidden, activation="gelu_tanh"), norm=NORM)
    return Decoder(vocab=vocab, dim=dim, layers=layers, block=(block,), norm=NORM, scale_embedding=True)


def gemma_2b() -> Decoder:
    """Gemma 2B (2403.08295, table 1)."""
    return _gemma(2048, 18, 8, 1, 16_384)


def gemma_7b() -> Decoder:
    """Gemma 7B (2403.08295, table 1)."""
    return _gemma(3072, 28, 16, 16, 24_576)


def _gemma2(decoder: Decoder, scale: float | None = None) -> Decoder:
    """Gemma 2 (2408.00118, table 1): sandwich norms, soft caps, a window on every other layer."""
    changes = {"placement": "sandwich", "mixer.soft_cap": 50.0, "mixer.scale": scale}
    block = decoder.block[0].replace(**changes)
    return decoder.replace(soft_cap=30.0, block=(block.replace(**{"mixer.window": 4096}), block))


def gemma2_2b() -> Decoder:
    """Gemma 2 2B (2408.00118, table 1)."""
    return _gemma2(_gemma(2304, 26, 8, 4, 9216))


def gemma2_9b() -> Decoder:
    """Gemma 2 9B (2408.00118, table 1)."""
    return _gemma2(_gemma(3584, 42, 16, 8, 14_336))


def gemma2_27b() -> Decoder:
    """Gemma 2 27B (2408.00118, table 1)."""
    return _gemma2(_gemma(4608, 46, 32, 16, 36_864, head_dim=128), scale=144**-0.5)


def _gemma3(decoder: Decoder, window: int, *, factor: float | None = None, scale: float | None = None) -> Decoder:
    """Gemma 3 (2503.19786, section 2): five layers with a window to one without, each kind with its base of RoPE."""
    changes = {"placement": "sandwich", "mixer.qk_norm": NORM, "mixer.scale": scale}
    block = decoder.block[0].replace(**changes)
    far = Rope(theta=1_000_000.0, scaling=LinearScaling(factor=factor) if factor else None)
    local, full = block.replace(**{"mixer.window": window}), block.replace(**{"mixer.rope": far})
    return decoder.replace(block=(local,) * 5 + (full,))


def gemma3_270m() -> Decoder:
    """Gemma 3 270M."""
    return _gemma3(_gemma(640, 18, 4, 1, 2048, vocab=262_144), 512)


def gemma3_1b() -> Decoder:
    """Gemma 3 1B (2503.19786, table 1)."""
    return _gemma3(_gemma(1152, 26, 4, 1, 6912, vocab=262_144), 512)


def gemma3_4b() -> Decoder:
    """The text part of Gemma 3 4B (2503.19786, table 1)."""
    return _gemma3(_gemma(2560, 34, 8, 4, 10_240, vocab=262_208), 1024, factor=8.0)


def gemma3_12b() -> Decoder:
    """The text part of Gemma 3 12B (2503.19786, table 1)."""
    return _gemma3(_gemma(3840, 48, 16, 8, 15_360, vocab=262_208), 1024, factor=8.0)


def gemma3_27b() -> Decoder:
    """The text part of Gemma 3 27B (2503.19786, table 1)."""
    plain = _gemma(5376, 62, 32, 16, 21_504, head_dim=128, vocab=262_208)
    return _gemma3(plain, 1024, factor=8.0, scale=168**-0.5)
