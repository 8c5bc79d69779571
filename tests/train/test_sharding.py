"""Every axis of a mesh: loss and gradients are those of one device, and devices exchange what they must and no more."""

import re
from collections import Counter
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo.configs import Run
from flaxzoo.layers.sharding.axes import batch_partition
from flaxzoo.train.distributed import mesh as meshes
from jaxlib._jax import Device
from sharded import B, D, Moved, T, alone, assert_same, collectives, matrices, outcome, run_of, small

pytestmark = pytest.mark.usefixtures("quick_compiler")

KINDS = ("dense", "gqa", "moe", "mla")


def over_data(moved: Moved, run: Run) -> None:
    """The gradients of weights are added, and nothing else moves."""
    assert set(moved) == {"all-reduce"}
    assert matrices(run) <= set(moved["all-reduce"])
    assert small(Counter(set(moved["all-reduce"]) - matrices(run)), D)


def over_fsdp(moved: Moved, run: Run) -> None:
    """Weights are gathered, no more than for each pass, and their gradients added in parts; activations stay."""
    assert set(moved) == {"all-gather", "reduce-scatter", "all-reduce"}
    assert set(moved["all-gather"]) == matrices(run)
    assert sum(moved["all-gather"].values()) == 2 * 7 + 2  # of a layer, embedding and head
    assert sum(moved["reduce-scatter"].values()) == 7 + 2
    assert {int(np.prod(shape)) * 8 for shape in moved["reduce-scatter"]} == {
        int(np.prod(shape)) for shape in matrices(run)
    }
    assert small(moved["all-reduce"], D)  # norms and sums


def over_tensor(moved: Moved, run: Run) -> None:
    """The residual stream is gathered and added in parts, where it is used; no weight moves."""
    assert set(moved) == {"all-gather", "reduce-scatter", "all-reduce"}
    assert set(moved["all-gather"]) == {(B, T, D)}
    assert set(moved["reduce-scatter"]) == {(B, T // 4, D)}
    assert moved["reduce-scatter"].total() == 2 + 2 + 2  # forward, backward; embedding and head
    # Forward; backward again and for the gradient; embedding and head.
    assert moved["all-gather"].total() == 2 + 2 * 2 + 2
    assert small(moved["all-reduce"], B * T)  # norms, and three numbers a token of the loss


def over_context(moved: Moved, run: Run) -> None:
    """Keys and values go around; weights are as in data parallelism."""
    assert set(moved) == {"all-reduce", "collective-permute"}
    assert matrices(run) <= set(moved["all-reduce"])
    assert small(Counter(set(moved["all-reduce"]) - matrices(run)), D)
    assert small(moved["collective-permute"], B * T // 4 * 8 * 4)  # queries, keys and values of a device


def over_expert(moved: Moved, run: Run) -> None:
    """Experts stay; the tokens go to them, and what becomes of them returns. The rest is as in data parallelism."""
    assert set(moved) == {"all-gather", "reduce-scatter", "all-reduce"}
    router = (D, 8)
    assert set(moved["all-gather"]) == {(B, T, D), (B, T, 2), router}
    assert moved["all-gather"][B, T, D] == 2
    assert set(moved["reduce-scatter"]) == {(B // 8, T, D), (B // 8, T, 2), (D, 1)}
    assert matrices(run, but="expert") - {router} <= set(moved["all-reduce"])
    assert small(Counter(set(moved["all-reduce"]) - matrices(run, but="expert")), D)


ALONE = {
    "data=8": over_data,
    "dcn=8": over_data,
    "fsdp=8": over_fsdp,
    "tensor=4": over_tensor,
    "context=4": over_context,
    "expert=8": over_expert,
}
PAIRS = [
    "fsdp=4,tensor=2",
    "data=2,tensor=4",
    "context=2,tensor=4",
    "fsdp=2,context=4",
    "dcn=2,fsdp=4",
    "expert=4,tensor=2",
    "fsdp=2,expert=4",
    "context=2,tensor=2,expert=2",
    "dcn=2,fsdp=2,context=2",
]
QUICK = {
    ("gqa", "data=8"),
    ("gqa", "fsdp=8"),
    ("gqa", "tensor=4"),
    ("gqa", "context=4"),
    ("moe", "expert=8"),
    ("moe", "context=2,tensor=2,expert=2"),
    ("dense", "dcn=2,fsdp=2,context=2"),
    ("mla", "context=2,tensor=4"),
}
ALL = [(kind, mesh) for kind in KINDS for mesh in (*ALONE, *PAIRS) if kind == "moe" or "expert" not in mesh]


@pytest.mark.parametrize(
    ("kind", "mesh"), [pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow) for each in ALL]
)
def test_an_axis_changes_nothing_and_moves_what_it_must(kind: str, mesh: str) -> None:
    run = run_of(kind).replace(mesh=mesh)
    found, text = outcome(run)
    assert_same(found, alone(kind))
    if mesh in ALONE and (kind == "gqa" or mesh == "expert=8"):
        ALONE[mesh](collectives(text), run)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gqa", "mla"])
def test_keys_of_a_whole_sequence_may_be_gathered(kind: str) -> None:
    run = run_of(kind).replace(mesh="context=4", context="all_gather")
    found, text = outcome(run)
    assert_same(found, alone(kind))
    heads = 4 if kind == "gqa" else 8
    moved = collectives(text)
    assert (B, T, heads, D // 8) in moved["all-gather"]
    assert (B, T, D) not in moved["all-gather"]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp=4,tensor=2", "context=2,tensor=2,expert=2"])
@pytest.mark.parametrize("remat", ["full", "dots", "dots_no_batch", "full_offload", "dots_offload"])
def test_recomputed_on_a_mesh(mesh: str, remat: Any) -> None:
    assert_same(outcome(run_of("moe").replace(mesh=mesh, remat=remat))[0], alone("moe"))


def test_what_is_computed_again_is_gathered_no_more_often() -> None:
    run = run_of("gqa").replace(mesh="fsdp=8", remat="full")
    over_fsdp(collectives(outcome(run)[1]), run)


# What does not fit.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mesh": "context=2,tensor=2", "length": 30},
            "the mesh splits each sequence 4 ways (context x tensor), which does not divide its length of 30 tokens; "
            "the nearest lengths that fit are 28, 32",
        ),
        ({"mesh": "expert=4"}, "mesh axis expert=4 would split nothing of this model; leave it out"),
        (
            {"mesh": "fsdp=4", "context": "all_gather"},
            "context='all_gather' is for a mesh with an axis context, got 'fsdp=4'; leave it out",
        ),
    ],
    ids=["length", "expert", "context"],
)
def test_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        meshes.make(run_of("gqa").replace(**changes))


def test_experts_must_be_divided() -> None:
    with pytest.raises(ValueError) as caught:
        meshes.make(run_of("moe").replace(mesh="expert=4", batch=8, **{"model.block.0.ffn.experts": 6}))
    assert str(caught.value) == (
        "mesh axis expert=4 does not divide E=6 of parameter stack.0.ffn.experts.down.weight (L E F D); "
        "expert may be 1, 2, 3, 6"
    )


# Slices.


def fake(index: int, slice_index: int) -> Any:
    """A device by its annotations, too."""
    device = mock.Mock(spec=Device, platform="fake", device_kind="fake", process_index=0, core_on_chip=0)
    device.id, device.slice_index, device.coords = index, slice_index, None
    return device


def test_dcn_alone_goes_from_slice_to_slice() -> None:
    devices = [fake(index, index % 2) for index in range(8)]
    for text in ("dcn=2,fsdp=4", "fsdp=4,dcn=2"):
        sizes = meshes.parse(text)
        arranged = np.moveaxis(meshes._over_slices(sizes, devices), list(sizes).index("dcn"), 0)
        assert [{device.slice_index for device in row} for row in arranged] == [{0}, {1}]
    with pytest.raises(ValueError, match=re.escape("there are 2, with 4, 4 devices")):
        meshes._over_slices({"dcn": 4, "fsdp": 2}, devices)
    with pytest.raises(ValueError, match=re.escape("mesh axis dcn=2 is over slices or hosts, each with 4 devices")):
        meshes._over_slices({"dcn": 2, "fsdp": 4}, devices[:7])


def test_dcn_of_one_host_says_so() -> None:
    mesh, line = meshes.make(run_of("gqa").replace(mesh="dcn=2,fsdp=2"))
    assert line == "dcn=2,fsdp=2 on 4 x cpu (4 more left idle, dcn within one slice and host, as there are no others)"
    assert batch_partition(mesh)[0] == ("dcn", "fsdp")
    assert jnp.shape(mesh.devices) == (2, 2)
