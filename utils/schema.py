"""Dataclasses from what a file holds: checked once, where it enters."""

from __future__ import annotations

import types
import typing
from dataclasses import MISSING, fields, is_dataclass
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
        raise UserError(f"{what}: {_shown(content)} stands where {cls.__name__} should")
    hints = typing.get_type_hints(cls)
    values = {}
    for field in fields(cls):
        if field.name in content:
            values[field.name] = _value(hints[field.name], content[field.name], what, field.name)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"{what} lacks {field.name!r}")
    try:
        return cls(**values)
    except ValueError as error:  # the dataclass's own check
        raise UserError(f"{what}: {error}") from None


def _value(hint: Any, value: Any, what: str, name: str) -> Any:
    """`value` as the type `hint`; a whole number will do for a float."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if is_dataclass(hint):
        if isinstance(value, hint):
            return value
        return parse(hint, value, f"{what}: {name}")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        # the unions here are "something or None"
        return _value(next(arg for arg in args if arg is not type(None)), value, what, name)
    if origin is list and isinstance(value, list | tuple):
        return [_value(args[0], item, what, name) for item in value]
    if origin is dict and isinstance(value, dict):
        return {key: _value(args[1], item, what, name) for key, item in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if isinstance(value, origin or hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    expected = getattr(hint, "__name__", hint)
    raise UserError(f"{what}: {name} is {_shown(value)}, not of type {expected}")


def _shown(value: Any) -> str:
    """A few characters of any value."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
