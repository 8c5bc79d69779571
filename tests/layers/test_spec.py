"""Specs: values that compose, compare, change by name and travel as JSON."""

import json
import re
from dataclasses import FrozenInstanceError, dataclass
from typing import Literal

import pytest
from flaxzoo.layers.block import Block
from flaxzoo.layers.mixers.attention import Attention
from flaxzoo.layers.mlp import MLP, GatedMLP
from flaxzoo.layers.norm import LayerNorm, Norm, RMSNorm
from flaxzoo.layers.positions.rope import Rope
from flaxzoo.layers.positions.scaling import LongRopeScaling
from flaxzoo.layers.spec import Spec, unknown


@dataclass(frozen=True, kw_only=True)
class Inner(Spec):
    number: int = 1
    share: float | None = None


@dataclass(frozen=True, kw_only=True)
class Outer(Spec):
    many: tuple[Inner, ...] = (Inner(), Inner(number=2))
    pair: tuple[int, str] = (1, "a")
    shares: tuple[float, ...] = ()
    choice: Literal["left", "right"] = "left"
    on: bool = False
    inner: Inner | None = None


SPECS = [
    Inner(),
    Inner(share=0.5),
    Outer(),
    Outer(many=(), pair=(7, ""), shares=(0.1, 2.0), choice="right", on=True, inner=Inner(number=-1)),
    Block(
        mixer=Attention(heads=2, kv_heads=1, head_dim=4, window=3, qk_norm=RMSNorm(), rope=None),
        ffn=MLP(hidden=8),
        norm=LayerNorm(),
        placement="sandwich",
    ),
    Rope(scaling=LongRopeScaling(short_factors=(1.0, 2.0), long_factors=(3.0, 4.0), original_length=8, length=16)),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_json_and_back(spec):
    again = Spec.from_dict(json.loads(json.dumps(spec.to_dict(), allow_nan=False)))
    assert again == spec
    assert hash(again) == hash(spec)
    assert repr(again) == repr(spec)


def test_whole_numbers_of_json_become_floats_where_floats_are_due():
    spec = Inner.from_dict({"kind": "Inner", "share": 2})
    assert isinstance(spec.share, float)
    assert isinstance(Outer.from_dict({"kind": "Outer", "shares": [1, 2]}).shares[0], float)


def test_what_is_left_out_has_its_default():
    assert Outer.from_dict({"kind": "Outer"}) == Outer()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "Iner"}, "unknown kind of spec 'Iner'; did you mean 'Inner'"),
        ({}, "unknown kind of spec ''"),
        (
            {"kind": "Inner", "numberz": 1},
            "unknown field of Inner 'numberz'; did you mean 'number'? Known: number, share",
        ),
        ({"kind": "Inner", "number": "1"}, "Inner.number must be int, got '1'"),
        ({"kind": "Inner", "number": 1.0}, "Inner.number must be int, got 1.0"),
        ({"kind": "Inner", "number": True}, "Inner.number must be int, got True"),
        ({"kind": "Inner", "number": None}, "Inner.number must be int, got None"),
        ({"kind": "Inner", "share": True}, "Inner.share must be"),
        ({"kind": "Outer", "on": 1}, "Outer.on must be bool, got 1"),
        ({"kind": "Outer", "choice": "lefft"}, "unknown Outer.choice 'lefft'; did you mean 'left'"),
        ({"kind": "Outer", "pair": [1]}, "Outer.pair must be"),
        ({"kind": "Outer", "pair": [1, 2]}, "Outer.pair.1 must be str, got 2"),
        ({"kind": "Outer", "shares": 1.0}, "Outer.shares must be"),
        ({"kind": "Outer", "shares": [1.0, "x"]}, "Outer.shares.1 must be float, got 'x'"),
        ({"kind": "Outer", "many": [{"kind": "Inner", "number": "x"}]}, "Inner.number must be int, got 'x'"),
        ({"kind": "Outer", "many": [{"kind": "Outer"}]}, "expected a Inner, got a Outer"),
    ],
    ids=str,
)
def test_wrong_data_is_refused(data, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Spec.from_dict(data)


def test_the_kind_must_be_the_one_asked_for():
    with pytest.raises(ValueError, match="expected a Norm, got a GatedMLP"):
        Norm.from_dict(GatedMLP(hidden=4).to_dict())
    assert Norm.from_dict(LayerNorm().to_dict()) == LayerNorm()


def test_an_abstract_kind_is_refused():
    with pytest.raises((ValueError, TypeError), match="Norm"):
        Spec.from_dict({"kind": "Norm"})


def test_an_error_inside_an_optional_spec_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"Inner.number must be int, got 'x'"):
        Spec.from_dict({"kind": "Outer", "inner": {"kind": "Inner", "number": "x"}})


def test_replace():
    outer = Outer(inner=Inner())
    assert outer.replace(on=True) == Outer(inner=Inner(), on=True)
    changed = outer.replace(**{"inner.number": 5, "inner.share": 0.5, "many.1.number": 9, "choice": "right"})
    assert changed.inner == Inner(number=5, share=0.5)
    assert changed.many == (Inner(), Inner(number=9))
    assert changed.choice == "right"
    assert outer == Outer(inner=Inner())
    assert outer.replace(**{"many.0": Inner(number=3)}).many[0].number == 3
    assert outer.replace(**{"shares": (1.0,), "pair.1": "b"}).pair == (1, "b")


def test_replacing_a_spec_and_a_field_inside_it():
    assert Outer().replace(**{"inner": Inner(share=1.0), "inner.number": 4}).inner == Inner(number=4, share=1.0)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("chioce", "unknown field of Outer 'chioce'; did you mean 'choice'"),
        ("many.0.numbers", "unknown field of Inner 'numbers'; did you mean 'number'"),
        ("many.2.number", "expected an index below 2, got '2'"),
        ("many.first", "expected an index below 2, got 'first'"),
        ("inner.number", "None has no fields to change, got number"),
        ("choice.x", "'left' has no fields to change, got x"),
    ],
)
def test_replacing_what_is_not_there_is_refused(path, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Outer().replace(**{path: 1})


def test_flat():
    assert Outer(inner=Inner(share=0.5), shares=(1.0, 2.0)).flat() == {
        "kind": "Outer",
        "many.0.kind": "Inner",
        "many.0.number": 1,
        "many.0.share": None,
        "many.1.kind": "Inner",
        "many.1.number": 2,
        "many.1.share": None,
        "pair": (1, "a"),
        "shares": (1.0, 2.0),
        "choice": "left",
        "on": False,
        "inner.kind": "Inner",
        "inner.number": 1,
        "inner.share": 0.5,
    }


def test_specs_are_values():
    assert {Inner(number=1), Inner(), Inner(number=2)} == {Inner(), Inner(number=2)}
    with pytest.raises(FrozenInstanceError):
        Inner().number = 2  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        Inner(1)  # pyright: ignore[reportCallIssue]


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(TypeError, match="a spec holds numbers, strings, tuples and specs, got"):
        Outer.to_dict(Outer().replace(inner=object()))


def test_two_specs_of_one_name_are_refused():
    with pytest.raises(TypeError, match=r"two specs are named MLP: flaxzoo.layers.mlp and "):
        dataclass(type("MLP", (Spec,), {"__module__": "elsewhere"}))


def test_unknown_without_anything_close():
    assert str(unknown("mesh axis", "zzz", ["b", "a"])) == "unknown mesh axis 'zzz'. Known: a, b"
