"""Small models for tests, examples and runs on a CPU."""

from ...zoo import Attention, Block, Decoder, GatedMLP


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
