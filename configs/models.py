"""Named models: published shapes, and small ones of ours. Each says where its numbers come from."""

from ..layers.rope import Llama3Scaling
from ..zoo import MLP, Attention, Block, Decoder, GatedMLP, LayerNorm, RMSNorm, Rope


def gpt2() -> Decoder:
    """GPT-2 124M (Language Models are Unsupervised Multitask Learners, table 2; the 12-layer model)."""
    attention = Attention(heads=12, kv_heads=12, head_dim=64, rope=None, bias=True, output_bias=True)
    block = Block(mixer=attention, ffn=MLP(hidden=3072), norm=LayerNorm())
    return Decoder(vocab=50_257, dim=768, layers=12, block=(block,), norm=LayerNorm(), max_positions=1024)


def llama3(dim: int, layers: int, heads: int, hidden: int, scaling: Llama3Scaling | None = None) -> Decoder:
    """Llama 3 (2407.21783, table 3): 8 key/value heads, SwiGLU, RoPE base 500,000, a separate head."""
    rope = Rope(theta=500_000.0, scaling=scaling)
    attention = Attention(heads=heads, kv_heads=8, head_dim=dim // heads, rope=rope)
    norm = RMSNorm(eps=1e-5)
    block = Block(mixer=attention, ffn=GatedMLP(hidden=hidden), norm=norm)
    return Decoder(vocab=128_256, dim=dim, layers=layers, block=(block,), norm=norm, tied=False)


def llama3_8b() -> Decoder:
    """Llama 3 8B (2407.21783, table 3)."""
    return llama3(dim=4096, layers=32, heads=32, hidden=14_336)


def llama3_70b() -> Decoder:
    """Llama 3 70B (2407.21783, table 3)."""
    return llama3(dim=8192, layers=80, heads=64, hidden=28_672)


def qwen2_5_0_5b() -> Decoder:
    """Qwen2.5 0.5B (2412.15115; the model card's config)."""
    attention = Attention(heads=14, kv_heads=2, head_dim=64, rope=Rope(theta=1_000_000.0), bias=True)
    block = Block(mixer=attention, ffn=GatedMLP(hidden=4864))
    return Decoder(vocab=151_936, dim=896, layers=24, block=(block,))


def small(
    vocab: int = 8192,
    dim: int = 512,
    layers: int = 8,
    heads: int = 8,
    kv_heads: int = 2,
    hidden: int = 1536,
    tied: bool = False,
) -> Decoder:
    """A small Llama-like decoder: grouped-query attention with heads of D / N, SwiGLU."""
    attention = Attention(heads=heads, kv_heads=kv_heads, head_dim=dim // heads)
    block = Block(mixer=attention, ffn=GatedMLP(hidden=hidden))
    return Decoder(vocab=vocab, dim=dim, layers=layers, block=(block,), tied=tied)
