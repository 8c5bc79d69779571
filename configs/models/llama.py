"""Named models of Llama's shape: Llama 2 and 3, Mistral, SmolLM, OLMo 2, Phi-3 and Phi-4.

`hub.py` has the repository of each on the Hugging Face hub, whose config.json has the same numbers.
"""

from ...layers.positions.scaling import Llama3Scaling
from ...zoo import Attention, Block, Decoder, GatedMLP, RMSNorm, Rope


def _llama(
    vocab: int,
    dim: int,
    layers: int,
    heads: int,
    kv_heads: int,
    hidden: int,
    *,
    rope: Rope,
    eps: float = 1e-5,
    tied: bool = False,
) -> Decoder:
    """Llama's shape: heads of D / N, SwiGLU, RMSNorm before each layer."""
    attention = Attention(heads=heads, kv_heads=kv_heads, head_dim=dim // heads, rope=rope)
    norm = RMSNorm(eps=eps)
    block = Block(mixer=attention, ffn=GatedMLP(hidden=hidden), norm=norm)
    return Decoder(vocab=vocab, dim=dim, layers=layers, block=(block,), norm=norm, tied=tied)


def _windowed(decoder: Decoder, window: int) -> Decoder:
    return decoder.replace(**{"block.0.mixer.window": window})


def llama2_7b() -> Decoder:
    """Llama 2 7B (2307.09288, table 1)."""
    return _llama(32_000, 4096, 32, 32, 32, 11_008, rope=Rope())


def llama2_13b() -> Decoder:
    """Llama 2 13B (2307.09288, table 1)."""
    return _llama(32_000, 5120, 40, 40, 40, 13_824, rope=Rope())


def llama2_70b() -> Decoder:
    """Llama 2 70B (2307.09288, table 1)."""
    return _llama(32_000, 8192, 80, 64, 8, 28_672, rope=Rope())


def _llama3(
    dim: int, layers: int, heads: int, hidden: int, *, factor: float | None = None, tied: bool = False
) -> Decoder:
    """Llama 3 (2407.21783, table 3); with a factor its frequencies reach past 8192 positions, as from 3.1 on."""
    far = Llama3Scaling(factor=factor or 1.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=8192)
    rope = Rope(theta=500_000.0, scaling=far if factor else None)
    return _llama(128_256, dim, layers, heads, 8, hidden, rope=rope, tied=tied)


def llama3_8b() -> Decoder:
    """Llama 3 8B (2407.21783, table 3)."""
    return _llama3(dim=4096, layers=32, heads=32, hidden=14_336)


def llama3_70b() -> Decoder:
    """Llama 3 70B (2407.21783, table 3)."""
    return _llama3(dim=8192, layers=80, heads=64, hidden=28_672)


def llama3_1_8b() -> Decoder:
    """Llama 3.1 8B, and the R1 distill of it (deepseek-ai/DeepSeek-R1-Distill-Llama-8B)."""
    return _llama3(dim=4096, layers=32, heads=32, hidden=14_336, factor=8.0)


def llama3_1_70b() -> Decoder:
    """Llama 3.1 and 3.3 70B, and the R1 distill."""
    return _llama3(dim=8192, layers=80, heads=64, hidden=28_672, factor=8.0)


def llama3_1_405b() -> Decoder:
    """Llama 3.1 405B (2407.21783, table 3)."""
    return _llama3(dim=16_384, layers=126, heads=128, hidden=53_248, factor=8.0)


def llama3_2_1b() -> Decoder:
    """Llama 3.2 1B."""
    return _llama3(dim=2048, layers=16, heads=32, hidden=8192, factor=32.0, tied=True)


def llama3_2_3b() -> Decoder:
    """Llama 3.2 3B."""
    return _llama3(dim=3072, layers=28, heads=24, hidden=8192, factor=32.0, tied=True)


def mistral_7b_v0_1() -> Decoder:
    """Mistral 7B v0.1, with its window (2310.06825, table 1)."""
    return _windowed(_llama(32_000, 4096, 32, 32, 8, 14_336, rope=Rope()), 4096)


def mistral_7b_v0_3() -> Decoder:
    """Mistral 7B v0.3, without a window."""
    return _llama(32_768, 4096, 32, 32, 8, 14_336, rope=Rope(theta=1_000_000.0))


def smollm2_135m() -> Decoder:
    """SmolLM2 135M (2502.02737)."""
    return _llama(49_152, 576, 30, 9, 3, 1536, rope=Rope(theta=100_000.0), tied=True)


def smollm2_360m() -> Decoder:
    """SmolLM2 360M (2502.02737)."""
    return _llama(49_152, 960, 32, 15, 5, 2560, rope=Rope(theta=100_000.0), tied=True)


def smollm2_1_7b() -> Decoder:
    """SmolLM2 1.7B (2502.02737)."""
    return _llama(49_152, 2048, 24, 32, 32, 8192, rope=Rope(theta=130_000.0), tied=True)


def smollm3_3b() -> Decoder:
    """SmolLM3 3B, every fourth layer without position embedding."""
    decoder = _llama(128_256, 2048, 36, 16, 4, 11_008, rope=Rope(theta=5_000_000.0), eps=1e-6, tied=True)
    (block,) = decoder.block
    return decoder.replace(block=(block, block, block, block.replace(**{"mixer.rope": None})))


def _olmo2(dim: int, layers: int, heads: int, kv_heads: int, hidden: int) -> Decoder:
    """OLMo 2 (2501.00656, table 1): norms after the layers, and over all heads together."""
    decoder = _llama(100_352, dim, layers, heads, kv_heads, hidden, rope=Rope(theta=500_000.0), eps=1e-6)
    changes = {"placement": "output", "mixer.qk_norm": decoder.norm, "mixer.qk_norm_joint": True}
    return decoder.replace(block=(decoder.block[0].replace(**changes),))


def olmo2_1b() -> Decoder:
    """OLMo 2 1B."""
    return _olmo2(2048, 16, 16, 16, 8192)


def olmo2_7b() -> Decoder:
    """OLMo 2 7B (2501.00656, table 1)."""
    return _olmo2(4096, 32, 32, 32, 11_008)


def olmo2_13b() -> Decoder:
    """OLMo 2 13B (2501.00656, table 1)."""
    return _olmo2(5120, 40, 40, 40, 13_824)


def olmo2_32b() -> Decoder:
    """OLMo 2 32B."""
    return _olmo2(5120, 64, 40, 8, 27_648)


def phi3_mini_4k() -> Decoder:
    """Phi-3 mini (2404.14219, section 2)."""
    return _windowed(_llama(32_064, 3072, 32, 32, 32, 8192, rope=Rope()), 2047)


def phi3_medium_4k() -> Decoder:
    """Phi-3 medium (2404.14219, section 2)."""
    return _windowed(_llama(32_064, 5120, 40, 40, 10, 17_920, rope=Rope()), 2047)


def phi4() -> Decoder:
    """Phi-4 14B (2412.08905)."""
    return _llama(100_352, 5120, 40, 40, 10, 17_920, rope=Rope(theta=250_000.0))
