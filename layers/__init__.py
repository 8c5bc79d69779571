"""Flax NNX layers and the specs that build them. A spec is a frozen dataclass; `spec.build(...)` makes the layer."""
