"""Attention kernels behind one function."""

from .attend import attend as attend
