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
        raise ValueError(f"{type(config).__name__}: {name} takes {_described(kind)}; got {_short(text.strip())!r}")
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
    """``name=value,value`` words as name -> texts; a comma within a JSON list separates nothing.

    >>> named_values(["latent_dim=2,4", "order=[\\"blur\\",\\"noise\\"],[]"], "--over")
    {'latent_dim': ['2', '4'], 'order': ['["blur","noise"]', '[]']}
    """
    found: dict[str, list[str]] = {}
    for word in words:
        name, separator, values = word.partition("=")
        texts = [text for text in _separated(values) if text]
        if not name or not separator or not texts:
            raise ValueError(f"{option} takes name=value,value,...; got {word!r}")
        if name in found:
            raise ValueError(f"{option} names {name} twice; give its values at once, {name}=value,value")
        found[name] = texts
    return found


def _separated(text: str) -> list[str]:
    """``text`` between its commas; what begins with [ goes on to the end of the list."""
    parts: list[str] = []
    while text:
        end = _end_of_list(text) if text.lstrip().startswith("[") else 0
        head, _, tail = text[end:].partition(",")
        parts.append(text[:end] + head)
        text = tail
    return parts


def _end_of_list(text: str) -> int:
    """Where the list that ``text`` begins with ends: that of JSON, or else the brackets that belong together."""
    start = len(text) - len(text.lstrip())
    try:
        return json.JSONDecoder().raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        depth = 0
        for place, letter in enumerate(text):
            depth += {"[": 1, "]": -1}.get(letter, 0)
            if letter == "]" and depth == 0:
                return place + 1
        return len(text)


_NONE_OF_IT = object()


def _as_kind(kind: Any, text: str) -> Any:
    if get_origin(kind) is Literal:
        return next((choice for choice in get_args(kind) if str(choice) == text), _NONE_OF_IT)
    if get_origin(kind) in (Union, types.UnionType):
        values = (_as_kind(each, text) for each in get_args(kind))
        return next((value for value in values if value is not _NONE_OF_IT), _NONE_OF_IT)
    if get_origin(kind) is tuple:
        return _as_tuple(kind, text)
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
    return value if _fits(kind, value) else _NONE_OF_IT


def _as_tuple(kind: Any, text: str) -> Any:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return _NONE_OF_IT
    if not isinstance(values, list):
        return _NONE_OF_IT
    kinds = get_args(kind)
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(values)
    fit = len(kinds) == len(values) and all(map(_fits, kinds, values))
    return tuple(values) if fit else _NONE_OF_IT


def _fits(kind: Any, value: Any) -> bool:
    """Whether ``value`` is a text or a number of this kind; whole numbers are those that int64 holds."""
    if kind is str or isinstance(value, (bool, str)):
        return kind is str and isinstance(value, str)
    if isinstance(value, int):
        return abs(value) < 2**63
    return kind is float and isinstance(value, float) and math.isfinite(value)


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:40]}... ({len(text)} characters)"


def _described(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(map(_described, get_args(kind)))
    if get_origin(kind) is tuple:
        first, *others = get_args(kind)
        count = "" if others == [Ellipsis] else f"{1 + len(others)} "
        return f"a JSON list of {count}{ {int: 'whole numbers', float: 'numbers', str: 'texts'}[first] }"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "none"}[kind]
