"""Lines of tables of names: what is cut and what is joined is the same, by hand for each kind of line."""

import numpy as np
import pytest
from flaxzoo.zoo import Attention, Block, Decoder, GatedMLP
from flaxzoo.zoo.families.names import TableEntry, units
from flaxzoo.zoo.parameters import describe

SIZES = {"N": 4, "K": 2, "H": 3, "D": 5, "F": 7, "E": 2, "R": 6}


def check(line: TableEntry, shape: tuple[int, ...], wanted: list[tuple[str, object]], sizes=None) -> None:
    """Cuts a tensor of counted numbers and compares each part's axes and values; joins them again."""
    sizes = sizes or [SIZES] * len(line.ours)
    assert line.shape(sizes) == shape
    tensor = np.arange(np.prod(shape)).reshape(shape)
    parts = line.cut(tensor, sizes)
    assert [line.letters(place) for place in range(len(parts))] == [letters for letters, _ in wanted]
    for part, (_, take) in zip(parts, wanted, strict=True):
        np.testing.assert_array_equal(part, take(tensor))  # pyright: ignore[reportCallIssue]
        assert np.shares_memory(part, tensor)
    np.testing.assert_array_equal(line.join(parts, sizes), tensor)


def test_flattened_axes():
    check(TableEntry("q", "NH D", ("q",)), (12, 5), [("NHD", lambda t: t.reshape(4, 3, 5))])
    check(TableEntry("o", "D NH", ("o",)), (5, 12), [("DNH", lambda t: t.reshape(5, 4, 3))])
    check(TableEntry("norm", "D", ("s",)), (5,), [("D", lambda t: t)])


def test_parts_side_by_side():
    check(
        TableEntry("qkv", "NH+KH+KH D", ("q", "k", "v")),
        (24, 5),
        [
            ("NHD", lambda t: t[:12].reshape(4, 3, 5)),
            ("KHD", lambda t: t[12:18].reshape(2, 3, 5)),
            ("KHD", lambda t: t[18:].reshape(2, 3, 5)),
        ],
    )
    check(
        TableEntry("c_attn", "D NH+KH", ("q", "k")),
        (5, 18),
        [("DNH", lambda t: t[:, :12].reshape(5, 4, 3)), ("DKH", lambda t: t[:, 12:].reshape(5, 2, 3))],
    )
    check(TableEntry("b", "F+F", ("gate", "up")), (14,), [("F", lambda t: t[:7]), ("F", lambda t: t[7:])])


def test_interleaved_parts():
    line = TableEntry("gate_up", "E D F(1+1)", ("gate", "up"))
    check(line, (2, 5, 14), [("EDF", lambda t: t[..., ::2]), ("EDF", lambda t: t[..., 1::2])])


def test_parts_within_each_head():
    line = TableEntry("kv_b", "N(H+H) R", ("k", "v"))
    check(
        line,
        (20, 6),
        [("NHR", lambda t: t.reshape(4, 5, 6)[:, :3]), ("NHR", lambda t: t.reshape(4, 5, 6)[:, 3:])],
        [SIZES, SIZES | {"H": 2}],
    )


@pytest.mark.parametrize("axes", ["NH+KH D", "NH D", "F+F F+F+F", "F(1+1", "f d", "N-H", ""])
def test_lines_that_make_no_sense(axes):
    with pytest.raises(ValueError, match="a tensor is cut on one axis|axes are written"):
        TableEntry("x", axes, ("a", "b", "c"))


DECODER = Decoder(
    vocab=8,
    dim=4,
    layers=4,
    first=(Block(mixer=Attention(heads=2, kv_heads=1, head_dim=2), ffn=GatedMLP(hidden=6)),),
    block=(Block(mixer=Attention(heads=2, kv_heads=1, head_dim=2), ffn=GatedMLP(hidden=5)),) * 2,
)
TABLE = {
    "embed": ("V D", "embedding.table"),
    "norm": ("D", "norm.scale"),
    "{layer}.norms": ("D+D", "mixer_norm.scale", "ffn_norm.scale"),
    "{layer}.qkv": ("NH+KH+KH D", "mixer.query.weight", "mixer.key.weight", "mixer.value.weight"),
    "{layer}.o": ("D NH", "mixer.output.weight"),
    "{layer}.gate_up": ("F+F D", "ffn.gate.weight", "ffn.up.weight"),
    "{layer}.down": ("D F", "ffn.down.weight"),
}


def test_layers_are_counted_by_depth():
    """One first block, the pattern of two once, one of the incomplete repeat."""
    found = {unit.names[0]: unit for unit in units(TABLE, DECODER, describe(DECODER.abstract()))}
    assert len(found) == 2 + 4 * 5
    places = [(found[f"{layer}.down"].parts[0].parameter, found[f"{layer}.down"].parts[0].layer) for layer in range(4)]
    assert places == [
        ("first.0.ffn.down.weight", None),
        ("stack.0.ffn.down.weight", 0),
        ("stack.1.ffn.down.weight", 0),
        ("rest.0.ffn.down.weight", None),
    ]
    assert [found[f"{layer}.down"].shape for layer in range(4)] == [(4, 6), (4, 5), (4, 5), (4, 5)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"{layer}.down": ("D", "ffn.down.weight")}, r"no tensor for first.0.ffn.down.weight \(F D\)"),
        ({"norm": ("D", "embedding.table")}, r"no tensor for norm.scale \(D\)"),
        ({"again": ("V D", "embedding.table")}, r"several for \['embedding.table'\]"),
        ({"{layer}.o": ("D NH+D", "mixer.output.weight", "mixer.output.bias")}, "the model has only some of them"),
    ],
)
def test_tables_that_do_not_cover_the_model_are_told(change, message):
    with pytest.raises(ValueError, match=message):
        units(TABLE | change, DECODER, describe(DECODER.abstract()))


def test_one_tensor_an_expert():
    """A line whose letters lack the parameter's E."""
    described = describe(DECODER.abstract())
    name = "stack.0.ffn.down.weight"
    known = described[name]
    experts = {name: type(known)("L E F D", (1, 3, *known.shape[1:]), known.dtype, known.inputs)}
    table = TABLE | {"{layer}.{expert}.down": ("D F", "ffn.down.weight")}
    found = {unit.line.name + str(unit.names): unit for unit in units(table, DECODER, described | experts)}
    unit = found["{layer}.{expert}.down('1.0.down', '1.1.down', '1.2.down')"]
    tensors = [np.arange(20).reshape(4, 5) + 100 * expert for expert in range(3)]
    (part,) = unit.cut(tensors)
    assert part.shape == (3, 4, 5)
    ours = part.transpose(unit.parts[0].order)
    assert ours.shape == (3, 5, 4)
    for expert, tensor in enumerate(tensors):
        np.testing.assert_array_equal(unit.join(expert, [ours]), tensor)
