"""Mixture of experts: routing, the exchange of tokens between devices, and the layer."""
