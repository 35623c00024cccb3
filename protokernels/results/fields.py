# SPDX-License-Identifier: MIT
"""Fields of a configuration by their names and values on the command line."""

from __future__ import annotations

import difflib
import json
import math
import types
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")

FIXED = ("data", "preset_name", "stages", "selection")
"""Fields that are chosen otherwise, and the one that says which data choose."""


def field_name(config: Any, text: str) -> str:
    """The field that ``text`` names; hyphens may stand for underscores, and a leading ``num_`` may be left out.

    Raises:
        ValueError: there is none.
    """
    known = [field.name for field in fields(config) if field.name not in FIXED]
    name = text.strip().replace("-", "_")
    for candidate in (name, f"num_{name}"):
        if candidate in known:
            return candidate
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(known)}"
    raise ValueError(f"{type(config).__name__} has no field {text.strip()!r}; {hint}")


def field_value(config: Any, name: str, text: str) -> Any:
    """``text`` as a value of the field ``name``.

    Raises:
        ValueError: it is none of that type.
    """
    kind = get_type_hints(type(config))[name]
    value = _as_kind(kind, text.strip())
    if value is _NONE_OF_IT:
        raise ValueError(f"{type(config).__name__}: {name} takes {_described(kind)}; got {text.strip()!r}")
    return value


def changed(config: Config, **values: Any) -> Config:
    """``config`` with other values; the error of a wrong one says which it was."""
    try:
        return replace(config, **values)  # type: ignore[type-var]
    except (ValueError, TypeError) as error:
        given = ", ".join(f"{name}={value}" for name, value in values.items())
        raise ValueError(f"{given}: {error}") from error


def as_record(config: Any) -> dict[str, Any]:
    """A configuration as a run's ``config.json`` has it."""
    values = config.record() if hasattr(config, "record") else asdict(config)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def completed(kind: Any, record: dict[str, Any]) -> dict[str, Any]:
    """The record of a configuration of class ``kind`` with the defaults of fields that are newer than it; as it stands where it
    is of another class or version."""
    try:
        return as_record(kind.from_dict(record))
    except (TypeError, ValueError):
        return record


def named_values(words: Sequence[str], option: str) -> dict[str, list[str]]:
    """``name=value,value`` words as name -> texts.

    >>> named_values(["latent_dim=2,4"], "--over")
    {'latent_dim': ['2', '4']}
    """
    found: dict[str, list[str]] = {}
    for word in words:
        name, separator, values = word.partition("=")
        texts = [text for text in values.split(",") if text]
        if not name or not separator or not texts:
            raise ValueError(f"{option} takes name=value,value,...; got {word!r}")
        if name in found:
            raise ValueError(f"{option} names {name} twice; give its values at once, {name}=value,value")
        found[name] = texts
    return found


_NONE_OF_IT = object()


def _as_kind(kind: Any, text: str) -> Any:
    if get_origin(kind) is Literal:
        return next((choice for choice in get_args(kind) if str(choice) == text), _NONE_OF_IT)
    if get_origin(kind) in (Union, types.UnionType):
        values = (_as_kind(each, text) for each in get_args(kind))
        return next((value for value in values if value is not _NONE_OF_IT), _NONE_OF_IT)
    if get_origin(kind) is tuple:
        return _as_tuple(text)
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), _NONE_OF_IT)
    if kind is type(None):
        return None if text.lower() == "none" else _NONE_OF_IT
    if kind is str:
        return text
    try:
        value = kind(text)
    except ValueError:
        return _NONE_OF_IT
    return value if math.isfinite(value) else _NONE_OF_IT


def _as_tuple(text: str) -> Any:
    try:
        values = json.loads(text)
    except json.JSONDecodeError:
        return _NONE_OF_IT
    return tuple(values) if isinstance(values, list) else _NONE_OF_IT


def _described(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(map(_described, get_args(kind)))
    if get_origin(kind) is tuple:
        return "a JSON list"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "none"}[kind]
