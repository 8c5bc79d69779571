"""Matmuls of rows with the matrix of their group, as experts compute them."""

from .matmul import grouped_product as grouped_product
