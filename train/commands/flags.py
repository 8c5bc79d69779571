"""Specs of commands as command lines: one flag a field, with its placeholder in the help."""

import dataclasses
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Union, cast, get_args, get_origin

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

PLACEHOLDERS = {
    "a": "MODEL",
    "b": "MODEL",
    "cache_dtype": "DTYPE",
    "destination": "PATH",
    "ignore": "FIELD ...",
    "mesh": "AXIS=N,...",
    "model": "MODEL",
    "name": "NAME",
    "profile": "FIRST:LAST",
    "source": "SOURCE ...",
    "task_folder": "PATH",
    "tasks": "NAME ...",
    "template": "PATH",
    "text": "SOURCE ...",
    "text_field": "FIELD",
    "tokenizer": "PATH",
    "topology": "CHIP:AxB",
    "weights": "MODEL",
}
"""The placeholder of a flag in the help by the name of its field. Other fields have that of their type."""

OF_TYPES = {int: "N", float: "NUMBER", str: "TEXT", Path: "PATH"}
"""The placeholders of types."""

OF_TEXT = (str, tuple[str, ...], Path, Path | None)
"""The types of fields whose placeholder depends on the name."""

Groups = Mapping[type, Mapping[str, tuple[str, ...]]]
"""For a dataclass, titles of groups in the help and the fields in each. Fields in no group come first."""

NO_GROUPS: Groups = types.MappingProxyType({})


def parse_flags[T](
    spec: type[T], arguments: Sequence[str], prog: str, *, default: T | None = None, groups: Groups = NO_GROUPS
) -> T:
    """The spec that a command line describes. Prints help or what is wrong, and exits, as argparse does.

    Args:
        spec: dataclass whose fields are the flags.
        arguments: the command line.
        prog: name of the command in its help.
        default: spec whose values the flags change.
        groups: titles in the help.
    """
    registry = _registry(groups)
    if default is None:  # every switch is off, so that no switch needs a flag `--no-...`
        config = (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff)
        return tyro.cli(spec, args=arguments, prog=prog, config=config, registry=registry)
    config = (tyro.conf.AvoidSubcommands,)
    return tyro.cli(spec, args=arguments, prog=prog, config=config, registry=registry, default=default)


def parse_some[T](spec: type[T], arguments: Sequence[str]) -> T:
    """The spec that a command line describes, which may also have flags of other specs."""
    return tyro.cli(spec, args=arguments, registry=_registry(NO_GROUPS), return_unknown_args=True, add_help=False)[0]


def _registry(groups: Groups) -> ConstructorRegistry:
    registry = ConstructorRegistry()
    registry.primitive_rule(_by_type)
    registry.primitive_rule(_optional)
    registry.struct_rule(_FieldRule(groups))
    registry.struct_rule(_group)
    return registry


def _by_type(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[object] | None:
    kind = info.type
    if kind not in OF_TYPES:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=OF_TYPES[kind],
        instance_from_str=lambda texts: kind(texts[0]),
        is_instance=lambda value: isinstance(value, int | float if kind is float else kind),
        str_from_instance=lambda value: [str(value)],
    )


def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[object] | None:
    """`T | None` has the placeholder of T; the word None is accepted, too."""
    options = get_args(info.type) if info.type_origin in (Union, types.UnionType) else ()
    others = [option for option in options if option is not type(None)]
    if len(others) != 1 or len(options) != 2:
        return None
    inner = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(others[0], info.markers))
    if not isinstance(inner, PrimitiveConstructorSpec) or inner.nargs != 1:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=inner.metavar,
        instance_from_str=lambda texts: None if texts == ["None"] else inner.instance_from_str(texts),
        is_instance=lambda value: value is None or inner.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else inner.str_from_instance(value),
        choices=None if inner.choices is None else ("None", *inner.choices),
    )


@dataclass(frozen=True)
class _Group:
    """Fields of a dataclass that the help shows under one title."""

    fields: tuple[StructFieldSpec, ...]


def _group(info: StructTypeInfo) -> StructConstructorSpec | None:
    if info.type is not _Group:
        return None
    fields = info.default.fields if isinstance(info.default, _Group) else ()
    return StructConstructorSpec(instantiate=dict, fields=fields)


class _FieldRule:
    """Dataclasses as tyro reads them, with placeholders and groups."""

    def __init__(self, groups: Groups):
        self._groups = groups
        self._active: list[type] = []

    def __call__(self, info: StructTypeInfo) -> StructConstructorSpec | None:
        if not dataclasses.is_dataclass(info.type) or info.type in self._active:
            return None
        self._active.append(info.type)
        try:
            spec = ConstructorRegistry.get_struct_spec(info)  # by tyro's own rule, since this one declines
        finally:
            self._active.pop()
        if not isinstance(spec, StructConstructorSpec):
            return None
        fields = {field.name: _with_placeholder(field) for field in spec.fields}
        if info.type not in self._groups:
            return dataclasses.replace(spec, fields=tuple(fields.values()))
        grouped = [
            StructFieldSpec(
                name=title,
                type=cast(type, Annotated[_Group, tyro.conf.OmitArgPrefixes]),
                default=_Group(tuple(fields.pop(name) for name in names)),
                helptext="",
            )
            for title, names in self._groups[info.type].items()
        ]
        nested = [field for field in fields.values() if dataclasses.is_dataclass(field.default)]
        single = [field for field in fields.values() if field not in nested]

        def instantiate(**values: object) -> object:
            flat: dict[str, object] = {}
            for value in (values.pop(title) for title in self._groups[info.type]):
                flat |= cast(dict[str, object], value)
            return spec.instantiate(**values, **flat)

        return StructConstructorSpec(instantiate, (*single, *grouped, *nested))


def _with_placeholder(field: StructFieldSpec) -> StructFieldSpec:
    kind = field.type.__origin__ if get_origin(field.type) is Annotated else field.type
    placeholder = PLACEHOLDERS.get(field.name) if kind in OF_TEXT else None
    # An empty default says nothing: the help of the field says what happens then.
    hint = "" if field.default in (None, "", (), False) and not dataclasses.is_dataclass(field.default) else None
    if placeholder is None and hint is None:
        return field
    shown = tyro.conf.arg(metavar=placeholder, help_behavior_hint=hint)
    return dataclasses.replace(field, type=cast(type, Annotated[field.type, shown]))
