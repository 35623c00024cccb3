# SPDX-License-Identifier: MIT
"""Mean and standard deviation over runs, and which of them are not finished."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def summarize_runs(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Replaces every number in equally nested dictionaries by its mean, sample standard deviation and number of runs.

    The standard deviation (denominator n - 1) is ``None`` for a single run: one run says nothing about spread. A number
    that some runs lack, or have as ``None``, is summarised over those that have it. A text is kept where all runs have the same.

    >>> from protokernels.training import summarize_runs
    >>> summarize_runs([{"knn": {"accuracy": 0.5}}, {"knn": {"accuracy": 0.7}}])["knn"]["accuracy"]["mean"]
    0.6
    """
    summary: dict[str, Any] = {}
    for key in dict.fromkeys(key for result in results for key in result):
        values = [result[key] for result in results if result.get(key) is not None]
        if not values:
            continue
        if all(isinstance(value, dict) for value in values):
            summary[key] = summarize_runs(values)
        elif all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
            deviation = statistics.stdev(values) if len(values) > 1 else None
            summary[key] = {"mean": statistics.fmean(values), "std": deviation, "runs": len(values)}
        elif isinstance(values[0], str) and all(value == values[0] for value in values):
            summary[key] = values[0]
    return summary


def unfinished_notes(results: Mapping[str, Any], whole: str = "") -> list[str]:
    """What a table says of results that are not complete: how far the one run is, or which seeds of several are missing.

    Args:
        results: what ``train`` and ``evaluate`` return.
        whole: words for what the number of the last epoch is a part of; default: the configuration's number of epochs.

    >>> unfinished_notes({"complete": False, "seeds": [0], "unfinished_seeds": [1]})
    ['NOT FINISHED: 1 of 2 runs: that of seed 1']
    """
    if results["complete"]:
        return []
    if left := results.get("unfinished_seeds"):
        which = f"that of seed {left[0]}" if len(left) == 1 else f"those of seeds {', '.join(map(str, left))}"
        return [f"NOT FINISHED: {len(left)} of {len({*results['seeds'], *left})} runs: {which}"]
    return [
        f"NOT FINISHED: after epoch {results['last_epoch'].get('epoch', 0)} of {whole or results['config']['epochs']}"
    ]
