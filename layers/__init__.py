"""Flax NNX layers and the specs that build them. A spec is a frozen dataclass; `spec.build(...)` returns the layer."""

from .block import Block as Block
from .kernels.attention import attend as attend
from .linear.embedding import Embedding as Embedding
from .linear.linear import Linear as Linear
from .loss import cross_entropy as cross_entropy
from .mixers.attention import Attention as Attention
from .mixers.latent import MLA as MLA
from .mixers.mixer import Mixer as Mixer
from .mixers.mixer import Positions as Positions
from .mlp import MLP as MLP
from .mlp import FeedForward as FeedForward
from .mlp import GatedMLP as GatedMLP
from .moe.layer import MoE as MoE
from .moe.routing import Groups as Groups
from .moe.routing import Router as Router
from .norm import LayerNorm as LayerNorm
from .norm import Norm as Norm
from .norm import RMSNorm as RMSNorm
from .positions.rope import Rope as Rope
from .spec import Spec as Spec
from .stack import Execution as Execution
