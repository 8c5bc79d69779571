"""Pallas kernels and their plain definitions. They import only `layers.spec` and `layers.sharding.axes`."""
