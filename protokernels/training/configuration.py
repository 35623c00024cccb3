# SPDX-License-Identifier: MIT
"""What the configurations of all papers and baselines have in common."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

Config = TypeVar("Config", bound="RunConfig")


@dataclass(frozen=True)
class RunConfig:
    """Everything a result depends on, apart from seed, precision and hardware. A paper's dataclass inherits it and adds its own
    fields."""

    data: str = "digits"
    preset_name: str = "custom"  # where the values started from; kept with the results

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
        """The configuration in a run folder; ``ValueError`` for fields this version does not know."""
        if unknown := sorted(values.keys() - {field.name for field in fields(cls)}):
            raise ValueError(
                f"{cls.__name__}: unknown fields {', '.join(unknown)}; "
                "the run was written by another version of protokernels"
            )
        restored: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**restored)

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
