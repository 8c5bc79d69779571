"""Attention as one function, `attend`, with one implementation a platform.

`masks` and `scores` say which keys a query sees and how its logits change; `reference` is the plain definition.
"""

from .attend import attend as attend
