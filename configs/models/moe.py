"""Named models with experts or latent attention, of published sizes. Each says where its numbers come from."""

from ...layers.positions.scaling import YarnScaling
from ...zoo import MLA, Attention, Block, Decoder, GatedMLP, Groups, MoE, RMSNorm, Rope, Router


def mixtral_8x7b() -> Decoder:
    """Mixtral 8x7B (2401.04088, table 1)."""
    norm = RMSNorm(eps=1e-5)
    block = Block(
        mixer=Attention(heads=32, kv_heads=8, head_dim=128, rope=Rope(theta=1_000_000.0)),
        ffn=MoE(experts=8, expert=GatedMLP(hidden=14_336), router=Router(top_k=2)),
        norm=norm,
    )
    return Decoder(vocab=32_000, dim=4096, layers=32, block=(block,), norm=norm, tied=False)


def _qwen3_moe(dim: int, layers: int, heads: int, expert: int) -> Decoder:
    """Qwen3 with 128 experts, of which 8 are chosen (2505.09388, table 2)."""
    rope = Rope(theta=1_000_000.0)
    block = Block(
        mixer=Attention(heads=heads, kv_heads=4, head_dim=128, rope=rope, qk_norm=RMSNorm()),
        ffn=MoE(experts=128, expert=GatedMLP(hidden=expert), router=Router(top_k=8)),
    )
    return Decoder(vocab=151_936, dim=dim, layers=layers, block=(block,), tied=False)


def qwen3_30b_a3b() -> Decoder:
    """Qwen3 30B-A3B (2505.09388, table 2)."""
    return _qwen3_moe(dim=2048, layers=48, heads=32, expert=768)


def qwen3_235b_a22b() -> Decoder:
    """Qwen3 235B-A22B (2505.09388, table 2)."""
    return _qwen3_moe(dim=4096, layers=94, heads=64, expert=1536)


def _deepseek(dim: int, layers: int, dense: int, first: int, mixer: MLA, ffn: MoE, vocab: int = 102_400) -> Decoder:
    """DeepSeek's shape: the `first` layers have a dense feed-forward of size `dense`, the others experts."""
    block = Block(mixer=mixer, ffn=ffn)
    plain = (block.replace(ffn=GatedMLP(hidden=dense)),) * first
    return Decoder(vocab=vocab, dim=dim, layers=layers, first=plain, block=(block,), tied=False)


def _latent(heads: int, query_rank: int | None, mscale: float) -> MLA:
    """The latent attention of DeepSeek-V2 and V3, stretched from 4096 to 163,840 positions by YaRN."""
    scaling = YarnScaling(factor=40.0, original_length=4096, mscale=mscale, mscale_all_dim=mscale)
    rope = Rope(interleaved=True, scaling=scaling)
    return MLA(heads=heads, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128, query_rank=query_rank, rope=rope)


def _deepseek_v2(mscale: float) -> Decoder:
    """The shape of DeepSeek-V2 236B."""
    groups = Groups(groups=8, chosen=3, group_score="best")
    ffn = MoE(
        experts=160,
        expert=GatedMLP(hidden=1536),
        router=Router(top_k=6, normalise=False, scale=16.0, groups=groups),
        shared=GatedMLP(hidden=2 * 1536),
    )
    return _deepseek(5120, 60, 12_288, 1, _latent(heads=128, query_rank=1536, mscale=mscale), ffn)


def deepseek_v2() -> Decoder:
    """DeepSeek-V2 236B (2405.04434, 3.1.2)."""
    return _deepseek_v2(mscale=0.707)


def deepseek_coder_v2() -> Decoder:
    """DeepSeek-Coder-V2 236B (2406.11931, 3.1): V2's shape."""
    return _deepseek_v2(mscale=1.0)


def deepseek_v2_lite() -> Decoder:
    """DeepSeek-V2-Lite 16B (2405.04434, appendix B)."""
    ffn = MoE(
        experts=64,
        expert=GatedMLP(hidden=1408),
        router=Router(top_k=6, normalise=False),
        shared=GatedMLP(hidden=2 * 1408),
    )
    return _deepseek(2048, 27, 10_944, 1, _latent(heads=16, query_rank=None, mscale=0.707), ffn)


def deepseek_coder_v2_lite() -> Decoder:
    """DeepSeek-Coder-V2-Lite 16B (2406.11931, 3.1): V2-Lite's shape."""
    return deepseek_v2_lite()


def deepseek_v3() -> Decoder:
    """DeepSeek-V3 and R1 671B (2412.19437, 4.2), without multi-token prediction."""
    groups = Groups(groups=8, chosen=4, group_score="best_two")
    ffn = MoE(
        experts=256,
        expert=GatedMLP(hidden=2048),
        router=Router(top_k=8, score="sigmoid", correction=True, scale=2.5, groups=groups),
        shared=GatedMLP(hidden=2048),
    )
    mixer = _latent(heads=128, query_rank=1536, mscale=1.0)
    return _deepseek(7168, 61, 18_432, 3, mixer, ffn, vocab=129_280)


def _gpt_oss(layers: int, experts: int) -> Decoder:
    """The shape of gpt-oss (2508.10925, 2): every other layer sees 128 tokens, every head has a sink."""
    scaling = YarnScaling(factor=32.0, original_length=4096, truncate=False)
    norm = RMSNorm(eps=1e-5)
    mixer = Attention(
        heads=64,
        kv_heads=8,
        head_dim=64,
        rope=Rope(theta=150_000.0, scaling=scaling),
        bias=True,
        output_bias=True,
        sinks=True,
    )
    expert = GatedMLP(hidden=2880, activation="quick_gelu", bias=True, limit=7.0, offset=1.0)
    full = Block(mixer=mixer, ffn=MoE(experts=experts, expert=expert, router=Router(top_k=4, bias=True)), norm=norm)
    local = full.replace(**{"mixer.window": 128})
    return Decoder(vocab=201_088, dim=2880, layers=layers, block=(local, full), norm=norm, tied=False)


def gpt_oss_20b() -> Decoder:
    """gpt-oss 20b (2508.10925, table 1)."""
    return _gpt_oss(layers=24, experts=32)


def gpt_oss_120b() -> Decoder:
    """gpt-oss 120b (2508.10925, table 1)."""
    return _gpt_oss(layers=36, experts=128)
