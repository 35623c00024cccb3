# SPDX-License-Identifier: MIT
"""Mean and standard deviation over runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def summarize_runs(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Replaces every number in equally nested dictionaries by its mean, sample standard deviation and number of runs.

    The standard deviation (denominator n - 1) is ``None`` for a single run: one run says nothing about spread. A number
    that some runs lack is summarised over those that have it.

    >>> summarize_runs([{"knn": {"accuracy": 0.5}}, {"knn": {"accuracy": 0.7}}])["knn"]["accuracy"]["mean"]
    0.6
    """
    summary: dict[str, Any] = {}
    for key in dict.fromkeys(key for result in results for key in result):
        values = [result[key] for result in results if key in result]
        if all(isinstance(value, dict) for value in values):
            summary[key] = summarize_runs(values)
        elif all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
            deviation = statistics.stdev(values) if len(values) > 1 else None
            summary[key] = {"mean": statistics.fmean(values), "std": deviation, "runs": len(values)}
    return summary
