"""The objective of language models: the likelihood of the next token."""

from collections.abc import Mapping

from jaxtyping import Array, Float

from ...configs.run import Run
from ...layers.loss import cross_entropy
from ...zoo.decoder import DecoderModel


def likelihood(
    run: Run, model: DecoderModel, hidden: Float[Array, "B T D"], batch: Mapping[str, Array]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Training loss and plain negative log-likelihood of final hidden states, in nats, summed over tokens."""
    return cross_entropy(
        hidden,
        model.output_embedding,
        batch["targets"],
        batch["weights"],
        soft_cap=run.model.soft_cap,
        z_loss=run.z_loss,
    )
