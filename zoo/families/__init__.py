"""Families of models, one file each; `registry` finds them, reads configs and writes them."""
