"""Named GPT-2 models."""

from ...zoo import MLP, Attention, Block, Decoder, LayerNorm


def _gpt2(dim: int, layers: int, heads: int) -> Decoder:
    attention = Attention(heads=heads, kv_heads=heads, head_dim=64, rope=None, bias=True, output_bias=True)
    block = Block(mixer=attention, ffn=MLP(hidden=4 * dim), norm=LayerNorm())
    return Decoder(vocab=50_257, dim=dim, layers=layers, block=(block,), norm=LayerNorm(), max_positions=1024)


def gpt2() -> Decoder:
    """GPT-2 124M (Language Models are Unsupervised Multitask Learners, table 2)."""
    return _gpt2(dim=768, layers=12, heads=12)


def gpt2_medium() -> Decoder:
    """GPT-2 355M (the same, table 2)."""
    return _gpt2(dim=1024, layers=24, heads=16)


def gpt2_large() -> Decoder:
    """GPT-2 774M (the same, table 2)."""
    return _gpt2(dim=1280, layers=36, heads=20)


def gpt2_xl() -> Decoder:
    """GPT-2 1.5B (the same, table 2)."""
    return _gpt2(dim=1600, layers=48, heads=25)
