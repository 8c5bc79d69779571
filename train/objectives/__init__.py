"""What a run minimises: sums over the tokens of a batch."""

from .next_token import likelihood as likelihood
