"""A scaling of every kind, for tests."""

from flaxzoo.layers.positions.scaling import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NTKScaling,
    ProportionalScaling,
    RopeScaling,
    YarnScaling,
)

LONGROPE = LongRopeScaling(
    short_factors=(1.0, 1.5, 2.0, 3.0), long_factors=(1.0, 4.0, 8.0, 16.0), original_length=64, length=512
)
SCALINGS: dict[str, RopeScaling] = {
    "linear": LinearScaling(factor=4.0),
    "ntk": NTKScaling(factor=4.0),
    "dynamic": DynamicNTKScaling(factor=4.0, original_length=64),
    "proportional": ProportionalScaling(fraction=0.5),
    "yarn": YarnScaling(factor=4.0, original_length=64),
    "llama3": Llama3Scaling(factor=4.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=64),
    "longrope": LONGROPE,
}
