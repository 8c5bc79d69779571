"""Small chat models as Hugging Face folders."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flaxzoo import zoo
from flaxzoo.configs import models
from flaxzoo.zoo.parameters import describe, merge
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as kinds

TEMPLATE = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"


def tokenizer_of_bytes(*special: str) -> Tokenizer:
    """A token for each byte, one for "th", and special ones from 257 on."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(kinds.BPE({token: i for i, token in enumerate([*letters, "th"])}, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def checkpoint(where: Path, tokenizer: Tokenizer, dtype: Any = jnp.float32, **fields: Any) -> Path:
    """A chat model of random numbers as a Hugging Face folder, with more rows than tokens, as many have."""
    spec = models.small(vocab=272, dim=32, layers=2, heads=4, kv_heads=4, hidden=64, tied=True)
    random = np.random.default_rng(0)
    parameters = {
        name: jnp.asarray(random.normal(0, 0.15, known.shape) + name.endswith("scale"), jnp.float32)
        for name, known in describe(spec.abstract()).items()
    }
    config = {"model_type": "llama", "max_position_embeddings": 96, "eos_token_id": 258} | fields
    zoo.save(merge(spec.abstract(), parameters), where, tokenizer=tokenizer, dtype=dtype, config=config)
    (where / "chat_template.jinja").write_text(TEMPLATE)
    (where / "generation_config.json").write_text('{"eos_token_id": [258]}')
    (where / "LICENSE").write_text("do as you like")
    return where
