"""Rotary embeddings as Hugging Face's `rope_parameters` write them, both ways."""

from collections.abc import Iterable, Mapping

from ...layers.positions.rope import Rope
from ...layers.positions.scaling import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    RopeScaling,
    YarnScaling,
)
from ...layers.spec import unknown

# Our field to the name it has in rope_parameters, of each rope_type.
SCALINGS: dict[str, tuple[type[RopeScaling], dict[str, str]]] = {
    "linear": (LinearScaling, {"factor": "factor"}),
    "dynamic": (DynamicNTKScaling, {"factor": "factor", "original_length": "max_position_embeddings"}),
    "proportional": (ProportionalScaling, {"factor": "factor", "fraction": "partial_rotary_factor"}),
    "llama3": (
        Llama3Scaling,
        {
            "factor": "factor",
            "low_frequency_factor": "low_freq_factor",
            "high_frequency_factor": "high_freq_factor",
            "original_length": "original_max_position_embeddings",
        },
    ),
    "yarn": (
        YarnScaling,
        {
            "factor": "factor",
            "original_length": "original_max_position_embeddings",
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
            "attention_factor": "attention_factor",
            "mscale": "mscale",
            "mscale_all_dim": "mscale_all_dim",
            "truncate": "truncate",
        },
    ),
    "longrope": (
        LongRopeScaling,
        {
            "short_factors": "short_factor",
            "long_factors": "long_factor",
            "original_length": "original_max_position_embeddings",
            "length": "max_position_embeddings",
            "attention_factor": "attention_factor",
        },
    ),
}
WHOLE = ("original_length", "length")
ALWAYS = ("beta_fast", "beta_slow")  # written also where they have their usual values, as files do
OUTSIDE = "max_position_embeddings"


def read(parameters: object, theta: float, max_positions: object = None) -> Rope:
    """The rotary embedding of a `rope_parameters` object.

    Args:
        parameters: the object; empty for plain RoPE.
        theta: the base where it names none.
        max_positions: the config's `max_position_embeddings`, which some scalings look at.

    Raises:
        ValueError: on an unknown `rope_type` or field, or a value of the wrong type.
    """
    if not isinstance(parameters, Mapping):
        raise ValueError(f"rope_parameters must be an object, got {parameters!r:.100}")
    left = {name: value for name, value in parameters.items() if value is not None}
    kind = left.pop("rope_type", None) or left.get("type") or "default"
    left.pop("type", None)
    kind = "longrope" if kind == "su" else kind  # its first name, in early Phi-3 files
    base = _number("rope_theta", left.pop("rope_theta", theta))
    fraction = 1.0 if kind == "proportional" else _number("partial_rotary_factor", left.pop("partial_rotary_factor", 1))
    if kind == "default":
        if left:
            raise ValueError(
                f"rope_parameters with rope_type='default' cannot have {', '.join(sorted(left))}{_way_out(left)}"
            )
        return Rope(theta=base, fraction=fraction)
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise unknown("rope_type", str(kind), ["default", *SCALINGS])
    if max_positions is not None:
        left.setdefault(OUTSIDE, max_positions)
        left.setdefault("original_max_position_embeddings", max_positions)
    if kind == "longrope" and "factor" in left:  # it stands for length / original_length
        factor = _number("factor", left.pop("factor"))
        left[OUTSIDE] = round(
            factor * _number("original_max_position_embeddings", left["original_max_position_embeddings"])
        )
    made, names = SCALINGS[kind]
    found = {ours: _value(ours, left.pop(name)) for ours, name in names.items() if name in left}
    for name in (OUTSIDE, "original_max_position_embeddings"):
        left.pop(name, None)  # not every scaling looks at them
    if left:
        error = unknown(f"field of rope_parameters with rope_type={kind!r}", sorted(left)[0], names.values())
        raise ValueError(f"{error}{_way_out(left)}")
    try:
        return Rope(theta=base, fraction=fraction, scaling=made(**found))
    except TypeError:
        missing = sorted(name for ours, name in names.items() if ours not in found)
        raise ValueError(f"rope_parameters with rope_type={kind!r} lack some of {', '.join(missing)}") from None


def _way_out(names: Iterable[str]) -> str:
    names = sorted(names)
    return f". If they change nothing, pass ignore={names} (on the command line: --ignore {' '.join(names)})"


def unknown_fields(parameters: Mapping[str, object]) -> list[str]:
    """The fields of a `rope_parameters` object that its `rope_type` does not have."""
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    kind = "longrope" if kind == "su" else kind
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if isinstance(kind, str) and kind in SCALINGS:
        known |= {*SCALINGS[kind][1].values(), OUTSIDE, "original_max_position_embeddings"}
        known |= {"factor"} if kind == "longrope" else set()
    return sorted(name for name, value in parameters.items() if value is not None and name not in known)


def write(rope: Rope | None) -> dict[str, object]:
    """Fields of a config for this embedding: `rope_parameters`, and the lengths that stand outside of it."""
    if rope is None:
        return {}
    parameters: dict[str, object] = {"rope_theta": rope.theta, "rope_type": "default"}
    if rope.fraction != 1:
        parameters["partial_rotary_factor"] = rope.fraction
    fields: dict[str, object] = {"rope_parameters": parameters}
    for kind, (made, names) in SCALINGS.items():
        if type(rope.scaling) is made:
            parameters["rope_type"] = kind
            for ours, name in names.items():
                value = getattr(rope.scaling, ours)
                default = made.__dataclass_fields__[ours].default
                if value is not None and (value != default or name in ALWAYS):
                    place = fields if name == OUTSIDE else parameters
                    place[name] = list(value) if isinstance(value, tuple) else value
    return fields


def parameters_of(config: Mapping[str, object]) -> dict[str, object]:
    """A copy of the object `rope_parameters` of a config; empty if the config has none."""
    parameters = config.get("rope_parameters")
    return dict(parameters) if isinstance(parameters, Mapping) else {}


def to_v4_fields(config: Mapping[str, object]) -> dict[str, object]:
    """The fields that stand for `rope_parameters` in transformers 4 and in programs written for it."""
    parameters = parameters_of(config)
    if not parameters:
        return {}
    full, local = parameters.get("full_attention"), parameters.get("sliding_attention")
    if isinstance(full, Mapping) and isinstance(local, Mapping):  # per kind of layer, which only Gemma 3 had then
        return to_v4_fields({"rope_parameters": full}) | {"rope_local_base_freq": local["rope_theta"]}
    fields = {name: parameters[name] for name in ("rope_theta", "partial_rotary_factor") if name in parameters}
    scaling = {name: value for name, value in parameters.items() if name not in fields}
    if scaling.get("original_max_position_embeddings") == config.get("original_max_position_embeddings"):
        scaling.pop("original_max_position_embeddings", None)  # Phi-3 has it outside, and refuses other fields inside
        scaling = {"type" if name == "rope_type" else name: value for name, value in scaling.items()}
    return fields | {"rope_scaling": None if parameters["rope_type"] == "default" else scaling}


def _value(ours: str, value: object) -> object:
    if ours == "truncate":
        if not isinstance(value, bool):
            raise ValueError(f"truncate must be true or false, got {value!r:.100}")
        return value
    if ours.endswith("_factors"):
        if not isinstance(value, list):
            raise ValueError(f"{ours} must be a list of numbers, got {value!r:.100}")
        return tuple(_number(ours, item) for item in value)
    number = _number(ours, value)
    return int(number) if ours in WHOLE else number


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e15:
        raise ValueError(f"{name} must be a finite number, got {value!r:.100}")
    return float(value)
