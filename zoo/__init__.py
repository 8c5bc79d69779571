"""Language models as values, weights in and out, and generation."""

from ..layers.attention import Attention as Attention
from ..layers.block import Block as Block
from ..layers.mlp import MLP as MLP
from ..layers.mlp import GatedMLP as GatedMLP
from ..layers.norm import LayerNorm as LayerNorm
from ..layers.norm import RMSNorm as RMSNorm
from ..layers.rope import Rope as Rope
from .chat import ChatTemplate as ChatTemplate
from .chat import Conversation as Conversation
from .convert import convert as convert
from .decoder import Decoder as Decoder
from .decoder import DecoderModel as DecoderModel
from .decoding import for_decoding as for_decoding
from .generate import Completion as Completion
from .generate import complete as complete
from .generate import generate as generate
from .generate import stream as stream
from .load import load as load
from .load import open_source as open_source
from .sampling import GREEDY as GREEDY
from .sampling import Sampling as Sampling
from .save import save as save
from .score import Scorer as Scorer
from .speculative import Speculation as Speculation
