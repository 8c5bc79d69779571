"""Layers that mix information between tokens, and their KV caches. `mixer.py` is the contract."""
