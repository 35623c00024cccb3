# SPDX-License-Identifier: MIT
"""What the configurations of all papers and baselines have in common."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

Config = TypeVar("Config", bound="RunConfig")
_TYPES: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}


@dataclass(frozen=True)
class RunConfig:
    """Everything a result depends on, apart from seed, precision and hardware. A paper's dataclass inherits it and adds its own
    fields. Numbers of numpy become Python's, paths text, lists tuples: what a run's ``config.json`` gives back.

    Raises:
        ValueError: a word that a field of type ``Literal`` does not know, a value of another type than the field's, NaN, infinity,
            and whole numbers beyond int64.
    """

    data: str = "digits"
    preset_name: str = "custom"  # where the values started from; kept with the results

    def __post_init__(self) -> None:
        kind: type = type(self)
        for name, value in vars(self).items():
            object.__setattr__(self, name, _plain(value))
        for name, value in vars(self).items():
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    raise ValueError(f"{kind.__name__}: {name} must be finite; got {number}")
                if isinstance(number, int) and abs(number) >= 2**63:
                    raise ValueError(f"{kind.__name__}: {name} must lie between -2^63 and 2^63; got {number}")
        for name, expected in _hints(kind).items():
            if not _is_of(expected, value := getattr(self, name)):
                words = expected.__name__ if expected in _TYPES else expected
                raise ValueError(f"{kind.__name__}: {name} takes a value of type {words}; got {value!r}")
        for name, words in _choices(kind).items():
            if getattr(self, name) not in words:
                known = ", ".join(map(str, words))
                raise ValueError(f"{type(self).__name__}: {name} must be one of {known}; got {getattr(self, name)!r}")

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
        """The configuration in a run folder; ``ValueError`` for fields this version does not know."""
        if unknown := sorted(values.keys() - {field.name for field in fields(cls)}):
            raise ValueError(
                f"{cls.__name__}: unknown fields {', '.join(unknown)}; "
                "the run was written by another version of protokernels"
            )
        return cls(**values)

    def record(self) -> dict[str, Any]:
        """What goes into a run's ``config.json``."""
        return asdict(self)

    def check_positive(self, *names: str) -> None:
        """``ValueError`` for a field that is not above 0."""
        for name in names:
            if not getattr(self, name) > 0:
                raise ValueError(f"{type(self).__name__}: {name} must be positive; got {getattr(self, name)}")

    def check_not_negative(self, *names: str) -> None:
        """``ValueError`` for a field that is below 0, or NaN."""
        for name in names:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{type(self).__name__}: {name} must not be negative; got {getattr(self, name)}")

    def check_pairs(self, name: str = "batch_size") -> None:
        """``ValueError`` for batches of one image: without another there is no contrast, and the loss is 0 whatever the network does."""
        if getattr(self, name) < 2:
            raise ValueError(
                f"{type(self).__name__}: {name} must be at least 2, images are told from others of their batch; got "
                f"{getattr(self, name)}"
            )


def _plain(value: Any) -> Any:
    """``value`` as a file of JSON gives it back, but for tuples."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else str(value) if isinstance(value, Path) else value


def _is_of(expected: Any, value: Any) -> bool:
    """Whether ``value`` is of a field's type: a plain one, None, a tuple of plain ones, or one of several of these."""
    parts = get_args(expected)
    if get_origin(expected) in (Union, UnionType):
        return any(_is_of(part, value) for part in parts)
    if get_origin(expected) is tuple:
        if not isinstance(value, tuple):
            return False
        parts = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return len(parts) == len(value) and all(map(_is_of, parts, value))
    if isinstance(value, bool):  # Python's are whole numbers, too
        return expected is bool
    return isinstance(value, _TYPES.get(expected, expected))


@cache
def _hints(kind: type) -> dict[str, Any]:
    """The types of all other fields than those of :func:`_choices`."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind) if field.name not in _choices(kind)}


@cache
def _choices(kind: type) -> dict[str, tuple[Any, ...]]:
    """The words of every field of type ``Literal``."""
    return {name: get_args(hint) for name, hint in get_type_hints(kind).items() if get_origin(hint) is Literal}
