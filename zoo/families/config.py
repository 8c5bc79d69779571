"""Reading a `config.json`: every field is taken or known to say nothing of what the model computes."""

import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ...layers.mlp import Activation
from ...layers.positions.rope import Rope
from ...layers.spec import unknown
from . import rope_config

INFORMATIONAL = frozenset(
    {
        # what the file is, and who wrote it
        *("model_type", "architectures", "_name_or_path", "name_or_path", "transformers_version", "auto_map"),
        *("unsloth_version", "unsloth_fixed", "transformers.js_config", "is_llama_config", "_commit_hash"),
        # how the weights are stored and the program runs; dtypes and caches are the caller's choice here
        *("dtype", "torch_dtype", "use_cache", "cache_implementation", "attn_implementation", "_attn_implementation"),
        *("reorder_and_upcast_attn", "pretraining_tp", "return_dict", "return_dict_in_generate"),
        # text: the tokenizer's and generation's business
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "tokenizer_class", "prefix"),
        *(
            "max_position_embeddings",
            "n_ctx",
            "initial_context_length",
            "task_specific_params",
            "max_length",
            "min_length",
            "do_sample",
        ),
        # training alone
        *(
            "initializer_range",
            "attention_dropout",
            "hidden_dropout",
            "embedding_dropout",
            "residual_dropout",
            "resid_pdrop",
            "embd_pdrop",
            "attn_pdrop",
        ),
        *("gradient_checkpointing", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
        *("aux_loss_alpha", "seq_aux", "ep_size", "num_nextn_predict_layers", "num_mtp_layers"),
        *("output_attentions", "output_hidden_states", "problem_type"),
        *("use_bfloat16", "tf_legacy_loss", "tie_encoder_decoder", "chunk_size_feed_forward", "is_decoder"),
        *("cross_attention_hidden_size", "finetuning_task", "_attn_implementation_autoset", "_experts_implementation"),
        *("_flash_attn_2_enabled", "use_flash_attn", "use_flash_attention", "trl_version", "model_max_length"),
        # generation, which configs of transformers 4 hold too
        *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "early_stopping"),
        *("num_beams", "num_beam_groups", "num_return_sequences", "diversity_penalty", "no_repeat_ngram_size"),
        *("encoder_no_repeat_ngram_size", "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id"),
        *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
        *("decoder_start_token_id", "output_scores"),
        # heads of other tasks
        *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
        *("id2label", "label2id", "num_labels"),
    }
)
"""Fields that change nothing of what the model computes from its weights."""

NEUTRAL: Mapping[str, Any] = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "torchscript": False,
}
"""Fields that change nothing where they have this value."""

ROPE_OBJECTS = ("rope_parameters", "rope_scaling")
"""The names of the object that describes RoPE, in transformers 5 and 4."""

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
"""Activations as Hugging Face names them, and as we do."""

MOST = 2**31 - 1
LAYERS = 4096  # a decoder lists its blocks: a file may not make that list as long as it likes
REQUIRED: Any = object()
"""The default of a field that has none: its absence is an error."""


class Config:
    """A `config.json` being read, in the style of transformers 5.

    The older style is turned into it first: `rope_theta`, `rope_scaling` and `partial_rotary_factor` stand in
    `rope_parameters`. A field that is null counts as absent. Methods take a field: they return its value, or the
    default where it is absent. `done` raises ValueError where a field was not taken.
    """

    def __init__(self, fields: Mapping[str, Any], ignore: Collection[str] = ()):
        converted = to_v5_fields(fields)
        self.fields = {name: value for name, value in converted.items() if value is not None}
        self.ignored: set[str] = set()
        self._ignore = frozenset(ignore)
        self._nulls = converted.keys() - self.fields.keys()
        self._left = {name for name, value in self.fields.items() if not without_effect(name, value)}

    def get(self, name: str, default: Any = REQUIRED) -> Any:
        """A field as it is; ValueError where it is absent and has no default."""
        self._left.discard(name)
        if name not in self.fields and default is REQUIRED:
            raise ValueError(f"the config has no {name}")
        return self.fields.get(name, default)

    def assume(self, **values: Any) -> None:
        """Gives fields that are absent the values that their absence means."""
        self.fields = values | self.fields

    def mapping(self, name: str) -> dict[str, Any]:
        """An object; empty where it is absent."""
        return self._checked(name, {}, "an object", lambda v: isinstance(v, dict))

    def integers(self, name: str, default: list[int]) -> list[int]:
        """A list of whole numbers."""
        return self._checked(
            name, default, "a list of whole numbers", lambda v: isinstance(v, list) and all(map(_whole, v))
        )

    def unless_null(self, name: str, value: Any) -> Any:
        """The default of a field that a null switches off: `value` where it is absent, None where it is null."""
        return None if name in self._nulls else value

    def count(self, name: str, default: Any = REQUIRED, most: int = MOST) -> Any:
        """A whole number from 1 to `most`."""
        return self._checked(name, default, f"a whole number from 1 to {most}", lambda v: _whole(v) and 1 <= v <= most)

    def natural(self, name: str, default: Any = REQUIRED) -> Any:
        """A whole number from 0 on."""
        return self._checked(name, default, "a whole number from 0 on", lambda v: _whole(v) and v >= 0)

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        """A finite number above 0, as a float."""
        value = self._checked(name, default, "a number above 0", lambda v: _real(v) and v > 0)
        return None if value is None else float(value)

    def flag(self, name: str, default: Any = REQUIRED) -> bool:
        """True or false."""
        return self._checked(name, default, "true or false", lambda v: isinstance(v, bool))

    def only(self, name: str, *supported: Any) -> None:
        """Takes a field of which only these values can be modelled; absent is fine."""
        value = self.get(name, None)
        if value is not None and not any(value == s and type(value) is type(s) for s in supported):
            text = " or ".join(map(repr, supported)) or "its absence"
            raise ValueError(f"{name}={value!r} is not supported; supported: {text}")

    def activation(self, name: str = "hidden_act", default: Any = REQUIRED) -> Activation:
        """An activation by its name."""
        value = self.get(name, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise unknown(f"{name} (activation)", str(value), ACTIVATIONS)
        return ACTIVATIONS[value]

    def rope(self, theta: float = 10_000.0, parameters: Any = None) -> Rope:
        """The rotary embedding of `rope_parameters` (or of a part of it), whose base is `theta` if it has none."""
        parameters = self.get("rope_parameters", {}) if parameters is None else parameters
        if isinstance(parameters, dict):
            names = {f"{part}.{name}": name for name in rope_config.unknown_fields(parameters) for part in ROPE_OBJECTS}
            names |= {name: name for name in names.values()}
            ignored = {name for name in names if name in self._ignore}
            self.ignored |= ignored
            dropped = {names[name] for name in ignored}
            parameters = {name: value for name, value in parameters.items() if name not in dropped}
        return rope_config.read(parameters, theta, self.fields.get("max_position_embeddings"))

    def layer_types(self, layers: int, default: Callable[[int], str]) -> list[str]:
        """The kind of attention of each layer, "full_attention" or "sliding_attention"."""
        kinds = self.get("layer_types", None) or [default(layer) for layer in range(layers)]
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in known for kind in kinds):
            raise ValueError(
                f"layer_types must be {' or '.join(known)} for each of {layers} layers, got {kinds!r:.200}"
            )
        return kinds

    def done(self) -> None:
        """Raises ValueError where a field was not taken: it may change what the model computes."""
        self.ignored |= self._left & self._ignore
        self._left -= self._ignore
        if self._left:
            fields = ", ".join(f"{name}={self.fields[name]!r:.60}" for name in sorted(self._left))
            raise ValueError(
                f"the config has fields that this family does not know: {fields}. If they change nothing of what the "
                f"model computes, pass ignore={sorted(self._left)} (on the command line: --ignore "
                f"{' '.join(sorted(self._left))})"
            )

    def _checked(self, name: str, default: Any, wanted: str, fits: Callable[[Any], bool]) -> Any:
        value = self.get(name, default)
        if value is not None and not fits(value):
            raise ValueError(f"{name} must be {wanted}, got {value!r:.100}")
        return value


def without_effect(name: str, value: Any) -> bool:
    """Whether a field is known to change nothing of what a model computes."""
    return name in INFORMATIONAL or (name in NEUTRAL and value == NEUTRAL[name])


def to_v5_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A config in the style of transformers 5, whichever it was written in."""
    result = {str(name): _plain(value) for name, value in fields.items()}
    older, newer = result.pop("rope_scaling", None), result.get("rope_parameters")
    rope = older if older else newer if newer is not None else older
    rope = {} if rope is None else rope
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters (or rope_scaling) must be an object, got {rope!r:.100}")
    rope = dict(rope)
    for name in ("rope_theta", "partial_rotary_factor"):
        value = result.pop(name, None)
        if value is not None:
            rope.setdefault(name, value)
    if rope:
        result["rope_parameters"] = rope
    return result


def _plain(value: Any) -> Any:
    """JSON as transformers 5 writes it: `{"__float__": "Infinity"}` is a number that JSON does not have."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and isinstance(value["__float__"], str):
            return float(value["__float__"])
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _real(value: Any) -> bool:
    # JSON's whole numbers have no end: those past any float are no numbers here.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
