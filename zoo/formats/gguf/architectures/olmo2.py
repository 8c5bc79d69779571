"""OLMo 2."""

from ..architecture import Architecture
from .parts import DENSE, GATED, OUTPUT_NORMS, QK_NORMS, SILU, attention, head, norms, top, with_head

OLMO2 = Architecture(
    name="olmo2",
    model_type="olmo2",
    model_class="Olmo2ForCausalLM",
    fields=DENSE,
    implied={**SILU, "attention_bias": False},
    rules=top(),
    layer_rules=(*norms(OUTPUT_NORMS | QK_NORMS), *attention(), *GATED),
    read=with_head,
    write=head,
)
