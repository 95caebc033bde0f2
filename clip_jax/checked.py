"""Dataclasses that look at the types of their fields and at their own rules, and are made of plain nested values.

`config.py` writes a run down in them. Flags set attributes, which goes past every check, so `build` makes the whole
tree anew once parsing is over; it reads `config.json`, too, for which a field that is missing takes its default.
"""

import dataclasses
import reprlib
import sys
import types
import typing
from collections.abc import Iterator
from typing import Any

from clip_jax.errors import UserError, nearest


def require(holds: bool, message: str) -> None:
    """Raises UserError, with the message, for a rule that does not hold."""
    if not holds:
        raise UserError(message)


def require_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raises UserError for a word that is none of those known."""
    require(value in known, f"{name}={value!r} is not one of {', '.join(known)}")


class Checked:
    """A dataclass that looks at the types of its fields, then at its own rules, whenever it is made."""

    def __post_init__(self):
        section = type(self).__name__.removesuffix("Config").lower()
        for name, hint in typing.get_type_hints(type(self)).items():
            setattr(self, name, _convert(getattr(self, name), hint, f"{section}.{name}" if section else name))
        self.check()

    def check(self) -> None:
        """Raises UserError for a rule that does not hold."""
        raise NotImplementedError


def build(cls: type, values: dict[str, Any], at: str = ""):
    """Returns the dataclass `cls` made of nested plain values, types and rules checked.

    Raises:
        UserError: an unknown field, one missing that has no default, a wrong type, or a rule that does not hold.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise UserError(f"unknown field {at + name!r}{nearest(at + name, [at + field for field in fields])}")
    needed = [name for name, field in fields.items() if field.default is field.default_factory is dataclasses.MISSING]
    if missing := [at + name for name in needed if name not in values]:
        raise UserError(f"missing fields: {', '.join(missing)}")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _convert(value, hints[name], at + name) for name, value in values.items()})


def _convert(value: Any, hint: Any, at: str) -> Any:
    """Returns `value` as the type `hint`; what JSON and flags blur (1 for 1.0, a list for a tuple) is put right."""
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return build(hint, value, at + ".")
    if dataclasses.is_dataclass(hint) and isinstance(value, hint):
        return value
    if isinstance(hint, types.UnionType):
        return _convert_union(value, typing.get_args(hint), at)
    if typing.get_origin(hint) is tuple and isinstance(value, tuple | list):
        kinds = typing.get_args(hint)
        if len(kinds) == len(value):
            return tuple(_convert(v, kind, f"{at}[{i}]") for i, (v, kind) in enumerate(zip(value, kinds, strict=True)))
    elif hint is float and (type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max)):
        return float(value)
    elif type(value) is hint:
        return value
    raise UserError(f"{at}={reprlib.repr(value)} should be {type_name(hint)}")


def _convert_union(value: Any, members: tuple[Any, ...], at: str) -> Any:
    """Returns `value` as one of the types: None where that is one, else by the word `kind` where there are several."""
    if value is None and types.NoneType in members:
        return None
    kinds = [member for member in members if member is not types.NoneType]
    if len(kinds) == 1:
        return _convert(value, kinds[0], at)
    by_word = {kind.kind: kind for kind in kinds}
    if not isinstance(value, (dict, *kinds)):
        raise UserError(f"{at}={reprlib.repr(value)} should be an object whose kind is {' or '.join(by_word)}")
    word = value.get("kind", kinds[0].kind) if isinstance(value, dict) else value.kind
    if not isinstance(word, str) or word not in by_word:
        raise UserError(f"{at}.kind={reprlib.repr(word)}{nearest(str(word), by_word)}")
    return _convert(value, by_word[word], at)


def type_name(hint: Any) -> str:
    """Returns a type as it is written in the source: "int | None", "tuple[float, float]"."""
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def leaves(config: Any, at: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (dotted path, type, value) for every field that is not itself a dataclass."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{at}{name}.")
        else:
            yield at + name, hint, value
