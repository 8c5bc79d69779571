"""Attention as one function, `attend`, with one implementation a platform.

`masks` define which keys a query sees, `scores` how its logits change; `reference` is the plain definition.
"""

from .attend import attend as attend
