"""Qwen 2 and 3, dense and with experts."""

from ..architecture import Architecture
from ..config import Field
from .parts import DENSE, EXPERTS, GATED, QK_NORMS, SILU, TWO_NORMS, attention, experts, head, norms, top, with_head

QWEN2 = Architecture(
    name="qwen2",
    context_length=32768,
    model_type="qwen2",
    model_class="Qwen2ForCausalLM",
    fields=DENSE,
    implied=SILU,
    allowed={"use_sliding_window": (False, None)},
    rules=top(),
    layer_rules=(*norms(TWO_NORMS), *attention(), *GATED),
    read=with_head,
    write=head,
)
QWEN3 = Architecture(
    name="qwen3",
    context_length=32768,
    model_type="qwen3",
    model_class="Qwen3ForCausalLM",
    fields=DENSE,
    implied={**SILU, "attention_bias": False},
    allowed={"use_sliding_window": (False, None)},
    rules=top(),
    layer_rules=(*norms(TWO_NORMS | QK_NORMS), *attention(), *GATED),
    read=with_head,
    write=head,
)
QWEN3_MOE = Architecture(
    name="qwen3moe",
    context_length=32768,
    model_type="qwen3_moe",
    model_class="Qwen3MoeForCausalLM",
    fields=(
        *DENSE,
        EXPERTS,
        Field("expert_count", "num_experts", also="num_local_experts"),
        Field("expert_feed_forward_length", "moe_intermediate_size"),
    ),
    implied={**SILU, "attention_bias": False, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    allowed={"use_sliding_window": (False, None)},
    rules=top(),
    layer_rules=(
        *norms(TWO_NORMS | QK_NORMS),
        *attention(),
        *experts("mlp", "gate_proj", "up_proj", "down_proj"),
    ),
    read=with_head,
    write=head,
)
