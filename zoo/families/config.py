"""Reading a `config.json`: every field is read by the family, known to have no effect on the model, or an error."""

import sys
from collections.abc import Callable, Collection, Mapping

from ...layers.mlp import Activation
from ...layers.positions.rope import Rope
from ...layers.spec import unknown
from . import rope_config

INFORMATIONAL = frozenset(
    {
        # the file and the program that wrote it
        *("model_type", "architectures", "_name_or_path", "name_or_path", "transformers_version", "auto_map"),
        *("unsloth_version", "unsloth_fixed", "transformers.js_config", "is_llama_config", "_commit_hash"),
        # storage and execution: dtypes and caches are chosen by the caller here
        *("dtype", "torch_dtype", "use_cache", "cache_implementation", "attn_implementation", "_attn_implementation"),
        *("reorder_and_upcast_attn", "pretraining_tp", "return_dict", "return_dict_in_generate"),
        # tokenizer and generation
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
        # training only
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
        # generation settings, which configs of transformers 4 also hold
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
"""Fields without effect on what the model computes from its weights."""

NEUTRAL: Mapping[str, object] = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "torchscript": False,
}
"""Fields without effect if they have this value."""

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
"""Names of activations in this project by their names in Hugging Face."""

MOST = 2**31 - 1
LAYERS = 4096
"""Most layers of a config: a decoder lists its blocks, and a damaged file must not make that list arbitrarily long."""


class Required:
    """The type of `REQUIRED`."""


REQUIRED = Required()
"""The default of a field without a default: if the field is absent, reading it is an error."""


class Config:
    """A `config.json` that is being read, in the style of transformers 5.

    A config in the older style is converted first: `rope_theta`, `rope_scaling` and `partial_rotary_factor` become
    `rope_parameters`. A field that is null counts as absent. Each method reads one field: it returns the value, or the
    default if the field is absent, and raises ValueError if either is not of the kind that it reads. `check_all_read`
    raises ValueError if a field was not read.
    """

    def __init__(self, fields: Mapping[str, object], ignore: Collection[str] = ()):
        converted = to_v5_fields(fields)
        self.fields = {name: value for name, value in converted.items() if value is not None}
        self.ignored: set[str] = set()
        self._ignore = frozenset(ignore)
        self._nulls = converted.keys() - self.fields.keys()
        self._unread = {name for name, value in self.fields.items() if not without_effect(name, value)}

    def get(self, name: str, default: object = REQUIRED) -> object:
        """A field of any kind."""
        self._unread.discard(name)
        if name not in self.fields and isinstance(default, Required):
            raise ValueError(f"the config has no {name}")
        return self.fields.get(name, default)

    def assume(self, **values: object) -> None:
        """Sets fields that are absent to the values that their absence means."""
        self.fields = values | self.fields

    def mapping(self, name: str) -> dict[str, object]:
        """An object; empty if the field is absent."""
        return self._checked(name, {}, "an object", lambda value: value if isinstance(value, dict) else None)

    def integers(self, name: str, default: list[int]) -> list[int]:
        """A list of whole numbers."""

        def narrow(value: object) -> list[int] | None:
            return value if isinstance(value, list) and all(_whole(item) is not None for item in value) else None

        return self._checked(name, default, "a list of whole numbers", narrow)

    def unless_null[T](self, name: str, value: T) -> T | None:
        """The default of a field that null switches off: `value` if the field is absent, None if it is null."""
        return None if name in self._nulls else value

    def count[D: int | None](self, name: str, default: D | Required = REQUIRED, most: int = MOST) -> int | D:
        """A whole number from 1 to `most`."""

        def narrow(value: object) -> int | None:
            number = _whole(value)
            return number if number is not None and 1 <= number <= most else None

        return self._checked(name, default, f"a whole number from 1 to {most}", narrow)

    def natural[D: int | None](self, name: str, default: D | Required = REQUIRED) -> int | D:
        """A whole number of at least 0."""

        def narrow(value: object) -> int | None:
            number = _whole(value)
            return number if number is not None and number >= 0 else None

        return self._checked(name, default, "a whole number of at least 0", narrow)

    def number[D: float | None](self, name: str, default: D | Required = REQUIRED) -> float | D:
        """A finite number above 0, as a float."""

        def narrow(value: object) -> float | None:
            number = _real(value)
            return number if number is not None and number > 0 else None

        return self._checked(name, default, "a number above 0", narrow)

    def flag(self, name: str, default: bool | Required = REQUIRED) -> bool:
        """True or false."""
        return self._checked(name, default, "true or false", lambda value: value if isinstance(value, bool) else None)

    def only(self, name: str, *supported: object) -> None:
        """Reads a field of which only these values can be modelled. It may be absent."""
        value = self.get(name, None)
        if value is not None and not any(value == s and type(value) is type(s) for s in supported):
            text = " or ".join(map(repr, supported)) or "its absence"
            raise ValueError(f"{name}={value!r} is not supported; supported: {text}")

    def activation(self, name: str = "hidden_act", default: object = REQUIRED) -> Activation:
        """An activation by its name in Hugging Face."""
        value = self.get(name, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise unknown(f"{name} (activation)", str(value), ACTIVATIONS)
        return ACTIVATIONS[value]

    def rope(self, theta: float = 10_000.0, parameters: object = None) -> Rope:
        """The rotary embedding of `rope_parameters`, or of the object `parameters`.

        `theta` is the base if the object has none.
        """
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
        supported = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in supported for kind in kinds):
            raise ValueError(
                f"layer_types must be {' or '.join(supported)} for each of {layers} layers, got {kinds!r:.200}"
            )
        return kinds

    def check_all_read(self) -> None:
        """Raises ValueError if a field was not read: it may change what the model computes."""
        self.ignored |= self._unread & self._ignore
        self._unread -= self._ignore
        if self._unread:
            fields = ", ".join(f"{name}={self.fields[name]!r:.60}" for name in sorted(self._unread))
            raise ValueError(
                f"the config has fields that this family does not know: {fields}. If they have no effect on what the "
                f"model computes, pass ignore={sorted(self._unread)} (on the command line: --ignore "
                f"{' '.join(sorted(self._unread))})"
            )

    def _checked[T, D](
        self, name: str, default: D | Required, description: str, narrow: Callable[[object], T | None]
    ) -> T | D:
        """A field or its default; `narrow` returns a value of the right kind, and None for another."""
        value = self.get(name, default)
        if value is None:
            assert not isinstance(default, Required)
            return default
        narrowed = narrow(value)
        if narrowed is None:
            raise ValueError(f"{name} must be {description}, got {value!r:.100}")
        return narrowed


def without_effect(name: str, value: object) -> bool:
    """Whether a field is known to have no effect on what a model computes."""
    return name in INFORMATIONAL or (name in NEUTRAL and value == NEUTRAL[name])


def to_v5_fields(fields: Mapping[str, object]) -> dict[str, object]:
    """A config in the style of transformers 5, from either style."""
    result = {str(name): _plain(value) for name, value in fields.items()}
    v4_rope, v5_rope = result.pop("rope_scaling", None), result.get("rope_parameters")
    rope = v4_rope if v4_rope else v5_rope if v5_rope is not None else v4_rope
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


def _plain(value: object) -> object:
    """A JSON value in which numbers that JSON lacks are floats: transformers 5 writes {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and isinstance(value["__float__"], str):
            return float(value["__float__"])
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _real(value: object) -> float | None:
    # JSON's whole numbers are unbounded: those beyond every float are not accepted.
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return float(value)
    return None
