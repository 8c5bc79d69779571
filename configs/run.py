"""A run as a value: what is trained, on what, how long. `flaxzoo.train` carries it out."""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Literal

from ..layers.linear.matmul import Kind
from ..layers.moe.layer import MoE
from ..layers.spec import DECAY, FRACTION, NON_NEGATIVE, POSITIVE, SEED, Range, Spec, check_ranges, ranged
from ..layers.stack import Remat
from ..zoo.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class Data(Spec):
    """The text to train on and its tokenization."""

    source: tuple[str, ...] = ("shakespeare",)
    """Sources of text: 'shakespeare', 'tfds:NAME', or a file, folder or glob of .txt, .md, .jsonl(.gz), .parquet."""
    weights: tuple[float, ...] = ()
    """Share of each source in the mixture, in the order of the sources; if empty, by size."""
    text_field: str = "text"
    """The field of a JSONL, parquet or TFDS record that holds the text."""
    heldout: float = ranged(0.05, Range(0, 1, below=True))
    """Fraction of the bytes of each source held out for evaluation, unless the source has a validation split."""
    heldout_bytes: int = ranged(1_000_000, NON_NEGATIVE)
    """Largest number of bytes of held-out text to evaluate on."""
    tokenizer: str = ""
    """Path of a tokenizer.json. If empty, the tokenizer of the run's weights, or a byte-level BPE with the size of the
    model's vocabulary, trained on the text and cached."""
    special_tokens: bool = False
    """Read text that spells a special token, such as <|endoftext|>, as that token: for text that is meant to hold them.
    Otherwise it is plain text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.source, str):
            raise ValueError(f"source is a tuple of names and paths, got {self.source!r}; write ({self.source!r},)")
        check_ranges(self, "data.")
        if not self.source:
            raise ValueError("a run needs at least one source of text, got none; set --data.source shakespeare")
        if self.weights and len(self.weights) != len(self.source):
            raise ValueError(
                f"there must be a weight for each source, got {len(self.weights)} weights, {len(self.source)} sources"
            )
        if not all(weight > 0 for weight in self.weights) or not math.isfinite(sum(self.weights)):
            raise ValueError(
                f"weights must be above 0 with a finite sum, got {self.weights}; leave out a source that is not wanted"
            )


UNUSED = {
    "lion": ("eps",),
    "adafactor": ("b1", "b2", "eps", "momentum_dtype"),
    "sgd": ("b2", "eps"),
    "cosine": ("decay_fraction",),
    "linear": ("decay_fraction",),
    "constant": ("decay_fraction", "final_fraction"),
}
"""Fields that an optimizer or a schedule has no use for, and refuses."""


@dataclass(frozen=True, kw_only=True)
class Optimizer(Spec):
    """An optax optimizer by name, with its schedule."""

    name: Literal["adamw", "lion", "muon", "adafactor", "sgd"] = "adamw"
    learning_rate: float = ranged(1e-3, NON_NEGATIVE)
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """After the warmup: cosine, linear, constant, or warmup-stable-decay, whose end falls linearly."""
    warmup_steps: int = ranged(100, NON_NEGATIVE)
    """Steps in which the learning rate rises linearly; a run that is shorter ends before the top."""
    decay_fraction: float = ranged(0.2, FRACTION)
    """Share of the steps in which 'wsd' decays."""
    final_fraction: float = ranged(0.1, FRACTION)
    """What is left of the highest learning rate when all steps are done."""
    weight_decay: float = ranged(0.1, NON_NEGATIVE)
    """Decoupled weight decay of matrices; norms, biases and other vectors have none."""
    b1: float | None = ranged(None, DECAY)
    """Decay of the moving average of gradients. By default 0.9, and 0.95 for the matrices that Muon updates."""
    b2: float = ranged(0.95, DECAY)
    """Decay of the moving average of squared gradients; of Lion, the decay of its momentum."""
    eps: float = ranged(1e-8, Range(1e-30))
    """Added to the denominator of an update, so that a parameter without gradients gets no update of 0/0."""
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the moving average of gradients is kept in; that of their squares stays float32."""
    clip: float = ranged(1.0, NON_NEGATIVE)
    """Largest global norm of the gradient; 0: no clipping."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self)
        for field_ in dataclasses.fields(self):
            unused = field_.name in UNUSED.get(self.name, ()) or field_.name in UNUSED.get(self.schedule, ())
            if unused and getattr(self, field_.name) != field_.default:
                kind = self.name if field_.name in UNUSED.get(self.name, ()) else f"the {self.schedule} schedule"
                raise ValueError(
                    f"{kind} has no use for {field_.name}, "
                    f"got {getattr(self, field_.name)}; leave it at its default {field_.default}"
                )


@dataclass(frozen=True, kw_only=True)
class Balance(Spec):
    """How the experts of a model are kept equally busy (docs/moe.md)."""

    loss: float = ranged(0.0, NON_NEGATIVE)
    """Weight of the load-balance loss: the mean over routers of E sum_e share_e probability_e, where an expert's share
    of the choices and its mean probability are over the batch (2101.03961, 2.2); 1 where all are equal."""
    router_z_loss: float = ranged(0.0, NON_NEGATIVE)
    """Weight of the mean squared log-partition of the routers (2202.08906, 3.1)."""
    bias_rate: float = ranged(0.0, NON_NEGATIVE)
    """What a step adds to the correction of each expert with less than the mean load, and takes from the others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "balance.")

    def check(self, model: Decoder) -> None:
        """Raises ValueError where the model has nothing that this could balance."""
        routers = [block.ffn.router for block in model.all_blocks if isinstance(block.ffn, MoE)]
        if self != Balance() and not routers:
            raise ValueError(f"a model without routers has nothing to balance, got {self}; leave it out")
        if self.bias_rate and not any(router.correction for router in routers):
            raise ValueError(
                f"bias_rate moves the corrections of routers, and no router of this model has one, got "
                f"bias_rate={self.bias_rate}; give its Router correction=True"
            )


@dataclass(frozen=True, kw_only=True)
class Run(Spec):
    """A training run. Sizes are global: over all devices and processes."""

    model: Decoder
    weights: str = ""
    """Checkpoint of this model that training starts from: a Hugging Face folder, a .gguf file, a name on the hub or the
    folder of another run; its tokenizer is the run's. Empty: random parameters."""
    ignore: tuple[str, ...] = ()
    """Fields of the config of the weights (keys, for a .gguf file) that are unknown here and that change nothing."""
    text_only: bool = False
    """Start from the text model of multimodal weights."""
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    steps: int = ranged(1000, POSITIVE)
    batch: int = ranged(32, POSITIVE)
    """Sequences in one optimizer step."""
    length: int = ranged(512, POSITIVE)
    """Tokens in a sequence (T)."""
    accumulate: int = ranged(1, POSITIVE)
    """Micro-batches a step is split into, one after another, to save memory; with a mesh axis pipeline, they are what
    flows through its stages. Changes no result."""
    mesh: str = ""
    """Mesh axes and sizes, e.g. 'fsdp=4,tensor=2'; empty: fsdp over every device the batch divides by."""
    context: Literal["ring", "all_gather"] = "ring"
    """What devices that share a sequence (mesh axis context) do for each other's keys; see docs/sharding.md."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What layers compute in. Parameters and optimizer state stay float32."""
    quantize: Kind = "none"
    """Of training alone: products with weights of blocks, and for their gradients, in 8 bits (docs/training.md)."""
    remat: Remat = "none"
    """What the backward pass recomputes instead of storing: nothing, blocks, all but matmuls or weight matmuls; what
    is stored is kept by the host with full_offload and dots_offload (docs/training.md)."""
    z_loss: float = ranged(0.0, NON_NEGATIVE)
    """Weight of the squared log-partition (PaLM, 2204.02311, section 5)."""
    balance: Balance = field(default_factory=Balance)
    ema: float = ranged(0.0, DECAY)
    """Decay of an exponential moving average of the parameters, at most (1 + t) / (10 + t) in step t; 0: none."""
    max_bad_steps: int = ranged(5, POSITIVE)
    """Steps in a row with a non-finite loss, gradient or update, each skipped, before the run stops."""
    seed: int = ranged(0, SEED)
    """Seed of the initial parameters, the order of the rows and the samples."""
    eval_every: int = ranged(100, NON_NEGATIVE)
    """Steps between evaluations on held-out text; 0: only at the end."""
    sample_every: int = ranged(100, NON_NEGATIVE)
    """Steps between printed samples; 0: none."""
    prompt: str = "\n"
    """What the samples continue."""
    save_every: int = ranged(100, NON_NEGATIVE)
    """Steps between checkpoints; 0: only at the end."""
    keep_last: int = ranged(2, POSITIVE)
    """Latest checkpoints kept; the one of the lowest held-out loss is kept besides."""
    profile: str = ""
    """Steps to trace with the JAX profiler, e.g. '10:13'; empty: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self)
        if self.batch % self.accumulate:
            raise ValueError(
                f"the batch must be a multiple of accumulate, got batch={self.batch}, accumulate={self.accumulate}"
            )
        if 0 < self.model.max_positions < self.length:
            raise ValueError(
                f"a sequence must fit the model's table of positions, got length={self.length}, "
                f"model.max_positions={self.model.max_positions}"
            )
        if self.weights and self.data.tokenizer:
            raise ValueError(
                f"the tokenizer is that of the weights, got weights={self.weights!r}, "
                f"data.tokenizer={self.data.tokenizer!r}; leave out one of them"
            )
        self.balance.check(self.model)
        if self.quantize != "none" and any(isinstance(block.ffn, MoE) for block in self.model.all_blocks):
            raise ValueError(f"experts have no matmuls in 8 bits, got quantize={self.quantize!r}; leave it at 'none'")
        if self.profile and (not re.fullmatch(r"[1-9]\d*:[1-9]\d*", self.profile) or not self.profiled):
            raise ValueError(
                f"profile names the first and the last step to trace, like '10:13', from 1 on, got {self.profile!r}"
            )
        if self.profiled and self.profiled[-1] > self.steps:
            raise ValueError(f"profile {self.profile!r} ends after the last step, {self.steps}")

    @property
    def profiled(self) -> range:
        """The steps that are traced."""
        first, _, last = (self.profile or "1:0").partition(":")
        return range(int(first), int(last) + 1)


LAYOUT = frozenset(
    [
        "mesh",
        "context",
        "accumulate",
        "remat",
        "max_bad_steps",
        "eval_every",
        "sample_every",
        "prompt",
        "save_every",
        "keep_last",
        "profile",
    ]
)
"""Fields a run may change when it goes on: they say where and when things happen, not what is learned."""
