"""Named Qwen models: Qwen2.5, the R1 distills of it, and Qwen3."""

from ...zoo import Attention, Block, Decoder, GatedMLP, RMSNorm, Rope

THETA = 1_000_000.0


def _qwen2_5(
    dim: int,
    layers: int,
    heads: int,
    kv_heads: int,
    hidden: int,
    *,
    vocab: int = 152_064,
    theta: float = THETA,
    eps: float = 1e-6,
    tied: bool = False,
) -> Decoder:
    """Qwen2.5 (2412.15115, table 1): biases on queries, keys and values."""
    attention = Attention(heads=heads, kv_heads=kv_heads, head_dim=dim // heads, rope=Rope(theta=theta), bias=True)
    norm = RMSNorm(eps=eps)
    block = Block(mixer=attention, ffn=GatedMLP(hidden=hidden), norm=norm)
    return Decoder(vocab=vocab, dim=dim, layers=layers, block=(block,), norm=norm, tied=tied)


def qwen2_5_0_5b() -> Decoder:
    """Qwen2.5 0.5B (2412.15115, table 1)."""
    return _qwen2_5(896, 24, 14, 2, 4864, vocab=151_936, tied=True)


def qwen2_5_1_5b() -> Decoder:
    """Qwen2.5 1.5B (2412.15115, table 1)."""
    return _qwen2_5(1536, 28, 12, 2, 8960, vocab=151_936, tied=True)


def qwen2_5_3b() -> Decoder:
    """Qwen2.5 3B (2412.15115, table 1)."""
    return _qwen2_5(2048, 36, 16, 2, 11_008, vocab=151_936, tied=True)


def qwen2_5_7b() -> Decoder:
    """Qwen2.5 7B (2412.15115, table 1)."""
    return _qwen2_5(3584, 28, 28, 4, 18_944)


def qwen2_5_14b() -> Decoder:
    """Qwen2.5 14B (2412.15115, table 1)."""
    return _qwen2_5(5120, 48, 40, 8, 13_824, eps=1e-5)


def qwen2_5_32b() -> Decoder:
    """Qwen2.5 32B (2412.15115, table 1)."""
    return _qwen2_5(5120, 64, 40, 8, 27_648, eps=1e-5)


def qwen2_5_72b() -> Decoder:
    """Qwen2.5 72B (2412.15115, table 1)."""
    return _qwen2_5(8192, 80, 64, 8, 29_568, eps=1e-5)


def r1_distill_qwen_1_5b() -> Decoder:
    """R1 distilled into Qwen2.5-Math 1.5B (2501.12948)."""
    return _qwen2_5(1536, 28, 12, 2, 8960, vocab=151_936, theta=10_000.0)


def r1_distill_qwen_7b() -> Decoder:
    """R1 distilled into Qwen2.5-Math 7B (2501.12948)."""
    return _qwen2_5(3584, 28, 28, 4, 18_944, theta=10_000.0)


def _qwen3(dim: int, layers: int, heads: int, hidden: int, *, tied: bool = False) -> Decoder:
    """Qwen3 (2505.09388, table 1): heads of 128, normalised queries and keys."""
    attention = Attention(heads=heads, kv_heads=8, head_dim=128, rope=Rope(theta=THETA), qk_norm=RMSNorm())
    block = Block(mixer=attention, ffn=GatedMLP(hidden=hidden))
    return Decoder(vocab=151_936, dim=dim, layers=layers, block=(block,), tied=tied)


def qwen3_0_6b() -> Decoder:
    """Qwen3 0.6B (2505.09388, table 1)."""
    return _qwen3(1024, 28, 16, 3072, tied=True)


def qwen3_1_7b() -> Decoder:
    """Qwen3 1.7B (2505.09388, table 1)."""
    return _qwen3(2048, 28, 16, 6144, tied=True)


def qwen3_4b() -> Decoder:
    """Qwen3 4B (2505.09388, table 1)."""
    return _qwen3(2560, 36, 32, 9728, tied=True)


def qwen3_8b() -> Decoder:
    """Qwen3 8B (2505.09388, table 1)."""
    return _qwen3(4096, 36, 32, 12_288)


def qwen3_14b() -> Decoder:
    """Qwen3 14B (2505.09388, table 1)."""
    return _qwen3(5120, 40, 40, 17_408)


def qwen3_32b() -> Decoder:
    """Qwen3 32B (2505.09388, table 1)."""
    return _qwen3(5120, 64, 64, 25_600)
