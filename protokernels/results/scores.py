# SPDX-License-Identifier: MIT
"""The scores of a summary over runs that a reader looks at first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

NAMES = ("accuracy", "macro_auroc", "auc")
LEFT_OUT = ("majority", "untrained", "sets", "classes")  # what is beside a score, or below it


def main_scores(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Every accuracy and area under the ROC curve of one scored set, by where it stands.

    >>> main_scores({"probe": {"10%": {"macro_auroc": {"mean": 0.8, "std": None, "runs": 1}}}})
    {'probe, 10%': {'mean': 0.8, 'std': None, 'runs': 1}}
    """
    return {", ".join(path): value for path, value in _found(scores, ())}


def _found(scores: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    for name, value in scores.items():
        if not isinstance(value, Mapping) or name in LEFT_OUT:
            continue
        if name in NAMES and "mean" in value:
            yield path or (name,), value
        else:
            yield from _found(value, (*path, name))
