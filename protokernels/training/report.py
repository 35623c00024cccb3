# SPDX-License-Identifier: MIT
"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from .summary import unfinished_notes

_METHODS = (("statistical", "statistical"), ("knn", "kNN"), ("linear", "linear"))

PaperResults = Mapping[str, tuple[str, Mapping[str, tuple[float, float]]]]


def results_table(results: Mapping[str, Any], paper: PaperResults) -> Table:
    """Accuracies on every scored set: mean and standard deviation over runs, beside the paper's where it has the data.

    "majority" is the share of the largest class of the scored set, the best that a constant prediction can reach, as in the
    paper's table.

    Args:
        results: what ``train`` and ``evaluate`` of a paper return.
        paper: data set -> (split it was scored on, method -> (mean, standard deviation)).
    """
    config, runs = results["config"], results["number_of_runs"]
    protocol = ", ".join(f"{name} {value}" for name, value in results["protocol"].items())
    notes = [f"protocol: {protocol}"]
    notes += unfinished_notes(results)
    table = Table(
        title=f"{results['paper']}, preset {config['preset_name']}, {config['data']}: accuracy, runs: {runs}",
        caption="\n".join(notes),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for heading in ("scored on", *(title for _, title in _METHODS), "NMI", "majority"):
        table.add_column(heading, justify="left" if heading == "scored on" else "right", no_wrap=True)
    paper_split, paper_values = paper.get(str(config["data"]), ("", {}))
    for split, scores in results["splits"].items():
        cells = [_cell(scores.get(key, {}).get("accuracy")) for key, _ in _METHODS]
        nmi, majority = _cell(scores.get("clustering", {}).get("nmi")), scores["majority"]["majority_rate"]["mean"]
        table.add_row(f"{split} ({results['images'][split]})", *cells, nmi, f"{majority:.3f}")
        if split == paper_split:
            cells = [_cell({"mean": mean, "std": std}) for mean, std in (paper_values[key] for key, _ in _METHODS)]
            table.add_row("  the paper", *cells, "", "", style="dim")
    return table


def _cell(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return ""
    return f"{value['mean']:.3f}" + ("" if value["std"] is None else f" ±{value['std']:.3f}".replace("±0.", "±."))
