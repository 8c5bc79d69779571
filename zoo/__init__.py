"""Language models as values, weights in and out, and generation."""

from ..layers.attention import Attention as Attention
from ..layers.block import Block as Block
from ..layers.mlp import MLP as MLP
from ..layers.mlp import GatedMLP as GatedMLP
from ..layers.norm import LayerNorm as LayerNorm
from ..layers.norm import RMSNorm as RMSNorm
from ..layers.rope import Rope as Rope
from .convert import convert as convert
from .decoder import Decoder as Decoder
from .decoder import DecoderModel as DecoderModel
from .generate import generate as generate
from .load import load as load
from .load import open_source as open_source
from .save import save as save
