"""The positions of tokens in documents, and the lengths of these documents."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.sharding import reshard
from jaxtyping import Array, Int

from ..kernels.attention.context import Method
from ..sharding.axes import spec_of, split_as
from ..sharding.collectives import per_device, reshard_like


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Positions:
    """The position of each token in its document (`index`) and the number of that document (`segments`; 0: padding).

    The tokens of a document stand next to each other in a row, in order.
    """

    index: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    lengths: Int[Array, "B T"] | None = None
    """The length of each token's document, where it has tokens after those of this call; see `document_lengths`."""
    context_method: Method = field(default="ring", metadata={"static": True})
    """How devices that share a sequence exchange keys and values (`context` of `attend`)."""

    def document_lengths(self) -> Int[Array, "B T"]:
        """The length of each token's document, by which some scalings of RoPE choose their frequencies.

        It is `lengths` if that is given, else the position of the last token of the document in this call, plus one.
        So it never depends on other documents or rows, on padding, or on how a sequence is divided among devices:

        - In training and scoring it counts the tokens of the document that are in the row. A document that packing
          cuts is two documents, as its positions are.
        - While decoding it counts the tokens up to the one that is being read.
        - A prompt that is read in chunks needs `lengths`: every chunk is read with the length of the whole prompt.
        """
        if self.lengths is not None:
            return self.lengths
        unsplit = split_as(spec_of(self.index)[0], None)
        index, segments = (x if unsplit is None else reshard(x, unsplit) for x in (self.index, self.segments))
        return reshard_like(per_device(_last_index, index, segments) + 1, self.index)


def _last_index(index: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """For each token the index of the last token with the same segment."""
    last = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    column = jnp.arange(index.shape[1], dtype=jnp.int32)
    end = jax.lax.cummin(jnp.where(last, column, index.shape[1]), axis=1, reverse=True)
    return jnp.take_along_axis(index, end, axis=1)
