"""Positions of tokens in documents, and rotary position embedding with its scalings."""
