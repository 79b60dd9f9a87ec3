"""Checked sections of a YAML file: dataclasses whose fields say what they allow.

Every field is made by one of the functions below, which store the test that its value must pass and
the words for what passes.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping
from os.path import expanduser
from typing import Any, TypeVar

from .errors import AdapterError, nearest

Section = TypeVar("Section")


def rule(check: Callable[[Any], bool], allowed: str, **default: Any) -> Any:
    """A field; without `default` or `default_factory` its key is required."""
    return dataclasses.field(**default, metadata={"check": check, "allowed": allowed})


def text(**default: Any) -> Any:
    """A string that is not empty."""
    return rule(lambda value: isinstance(value, str) and value.strip() != "", "a text", **default)


def texts(least: int, **default: Any) -> Any:
    """A list of strings, at least so many."""
    return rule(
        lambda value: (
            isinstance(value, list)
            and len(value) >= least
            and all(isinstance(item, str) for item in value)
        ),
        "a list of texts" if least == 0 else f"a list of at least {least} text",
        **default,
    )


def flag(default: bool) -> Any:
    """True or false."""
    return rule(lambda value: isinstance(value, bool), "true or false", default=default)


def choice(*options: str | int | None, default: str | int | None) -> Any:
    """One of the options; None is written null."""
    allowed = ", ".join("null" if option is None else str(option) for option in options)
    return rule(
        lambda value: any(value == o and type(value) is type(o) for o in options),
        f"one of {allowed}",
        default=default,
    )


def integer(least: int, default: int, most: int | None = None) -> Any:
    """A whole number from `least`, up to `most`."""
    return rule(
        lambda value: is_integer(value) and least <= value and (most is None or value <= most),
        f"an integer from {least}" + ("" if most is None else f" to {most}"),
        default=default,
    )


def optional_integer(least: int, default: int | None = None) -> Any:
    """A whole number from `least`, or null."""
    return rule(
        lambda value: value is None or (is_integer(value) and value >= least),
        f"an integer from {least}, or null",
        default=default,
    )


def number(check: Callable[[float], bool], allowed: str, default: float) -> Any:
    """A finite number that passes `check`."""
    return rule(lambda value: is_number(value) and check(value), allowed, default=default)


def is_integer(value: Any) -> bool:
    """True is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """One that a float holds and that is finite; True is none."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return known and abs(value) <= sys.float_info.max


def check_integer(name: str, value: Any, least: int = 1) -> None:
    """Raise AdapterError where the argument `name` is no whole number from `least`."""
    if not is_integer(value) or value < least:
        raise AdapterError(f"{name}: got {value!r}, allowed: an integer from {least}")


def check_fields(section: Any) -> None:
    """Check every field of a section; for its `__post_init__`.

    Raises:
        AdapterError: names the section and the field, what was given and what is allowed.
    """
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if not item.metadata["check"](value):
            raise AdapterError(
                f"{section.SECTION}.{item.name}: got {value!r}, allowed: {item.metadata['allowed']}"
            )


def expand_home(section: Any, *names: str) -> None:
    """Have a `~` at the start of paths, fields of a frozen section, stand for the home folder."""
    for name in names:
        given = getattr(section, name)
        path = expanduser(given) if isinstance(given, str) else list(map(expanduser, given))
        object.__setattr__(section, name, path)


def from_mapping(cls: type[Section], values: Any) -> Section:
    """Build a section from what YAML gives; None is an empty section, `"1e-4"` a number.

    Raises:
        AdapterError: not a mapping, an unknown or a missing key, or a bad value.
    """
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise AdapterError(f"{cls.SECTION}: got {values!r}, allowed: a mapping of settings")
    fields = {item.name: item for item in dataclasses.fields(cls)}
    refuse_unknown_keys(values, fields, f"{cls.SECTION}: ")
    for key, item in fields.items():
        required = item.default is item.default_factory is dataclasses.MISSING
        if required and key not in values:
            raise AdapterError(
                f"{cls.SECTION}.{key}: not given, allowed: {item.metadata['allowed']}"
            )
    return cls(**{key: _as_declared(fields[key].type, value) for key, value in values.items()})


def refuse_unknown_keys(given: Iterable[Any], allowed: Iterable[str], prefix: str = "") -> None:
    """Raise AdapterError for the first key that is not allowed, with the nearest that is."""
    allowed = list(allowed)
    for key in given:
        if key not in allowed:
            hint = nearest(str(key), allowed) or f"; allowed: {', '.join(allowed)}"
            raise AdapterError(f"{prefix}unknown key {key!r}{hint}")


def _as_declared(declared: Any, value: Any) -> Any:
    """A lone text for a list is a list of one; YAML 1.1 reads `1e-4` as a text."""
    if not isinstance(value, str):
        return value
    if declared == list[str]:
        return [value]
    if declared is float:
        try:
            return float(value)
        except ValueError:
            pass
    return value
