"""Every architecture that is known: what its metadata and tensors are called in GGUF and in Hugging Face checkpoints.

The facts are those of llama.cpp, which defines the format by what it reads.
"""

from .deepseek import DEEPSEEK2, DEEPSEEK3
from .gemma import GEMMA, GEMMA2, GEMMA3
from .gpt2 import GPT2
from .gpt_oss import GPT_OSS
from .llama import LLAMA, MIXTRAL, SMOLLM3
from .olmo2 import OLMO2
from .phi3 import PHI3
from .qwen import QWEN2, QWEN3, QWEN3_MOE

ARCHITECTURES = (
    *(LLAMA, MIXTRAL, SMOLLM3, QWEN2, QWEN3, QWEN3_MOE, OLMO2, GEMMA, GEMMA2, GEMMA3, PHI3, GPT2),
    *(DEEPSEEK2, DEEPSEEK3, GPT_OSS),
)
