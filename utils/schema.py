"""Dataclasses from what a file holds: checked once, where it enters."""

from __future__ import annotations

import math
import reprlib
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from utils.errors import UserError

T = TypeVar("T")


def parse(cls: type[T], content: Any, what: str) -> T:
    """An instance of the dataclass `cls` from a mapping of its fields, as files hold it.

    Fields of dataclasses are mappings in turn. What `cls` does not name is left out.

    Args:
        what: the file, for the message.

    Raises:
        UserError: a field is missing, of another type, or has a value that cannot be; the line
            names it.
    """
    if not isinstance(content, dict):
        raise UserError(f"{what}: {reprlib.repr(content)} stands where {cls.__name__} should")
    values = parse_fields(cls, content, what)
    for field in fields(cls):
        needed = field.default is MISSING and field.default_factory is MISSING
        if needed and field.name not in values:
            raise UserError(f"{what} lacks {field.name!r}")
    try:
        return cls(**values)
    except ValueError as error:  # the dataclass's own check
        raise UserError(f"{what}: {error}") from None


def parse_fields(cls: type, content: dict[str, Any], what: str) -> dict[str, Any]:
    """Those fields of the dataclass `cls` that `content` has, as `parse` makes them."""
    hints = typing.get_type_hints(cls)
    values = {}
    for name, hint in hints.items():
        if name in content:
            values[name] = _value(hint, content[name], what, name)
    return values


def _value(hint: Any, value: Any, what: str, name: str) -> Any:
    """`value` as the type `hint`; a whole number will do for a float."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if is_dataclass(hint):
        return parse(hint, value, f"{what}: {name}")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        # `int | list[int]`: a list is of the last kind, anything else of the first
        kinds = [arg for arg in args if arg is not type(None)]
        kind = kinds[-1] if isinstance(value, list | tuple) else kinds[0]
        return _value(kind, value, what, name)
    if origin in (list, Sequence) and isinstance(value, list | tuple):
        return [_value(args[0], item, what, name) for item in value]
    if origin is dict and isinstance(value, dict):
        found = {}
        for key, item in value.items():
            key = _value(args[0], key, what, f"a name in {name}")
            found[key] = _value(args[1], item, what, name)
        return found
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and type(value) is int and value.bit_length() < 1000:
        return float(value)
    # a bool is an int to Python, and NaN a float; what is generic has been returned by now
    is_other_bool = isinstance(value, bool) and hint is not bool
    is_nan = isinstance(value, float) and math.isnan(value)
    if origin is None and isinstance(value, hint) and not is_other_bool and not is_nan:
        return value
    expected = getattr(hint, "__name__", hint)
    raise UserError(f"{what}: {name} is {reprlib.repr(value)}, not of type {expected}")
