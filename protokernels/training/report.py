# SPDX-License-Identifier: MIT
"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

_METHODS = (("statistical", "statistical"), ("knn", "kNN"), ("linear", "linear"), ("majority", "largest class"))

PaperResults = Mapping[str, tuple[str, Mapping[str, tuple[float, float]]]]


def results_table(results: Mapping[str, Any], paper: PaperResults) -> Table:
    """Accuracies of every scored set, mean and standard deviation over runs, with the paper's numbers where it has the
    data set.

    Args:
        results: what ``train`` and ``evaluate`` of a paper return.
        paper: data set -> (split it was scored on, method -> (mean, standard deviation)).
    """
    config, runs = results["config"], results["number_of_runs"]
    protocol = ", ".join(f"{name} {value}" for name, value in results["protocol"].items())
    table = Table(
        title=f"{results['paper']}, preset {config['preset_name']}, {config['data']}: accuracy, runs: {runs}",
        caption=f"protocol: {protocol}" + ("" if runs > 1 else "; one run says nothing about spread"),
    )
    for heading in ("scored on", "images", *(title for _, title in _METHODS), "NMI"):
        table.add_column(heading, justify="left" if heading == "scored on" else "right", no_wrap=True)
    paper_split, paper_values = paper.get(str(config["data"]), ("", {}))
    for split, scores in results["splits"].items():
        cells = [_cell(scores.get(key, {}).get("accuracy")) for key, _ in _METHODS]
        table.add_row(split, str(results["images"][split]), *cells, _cell(scores.get("clustering", {}).get("nmi")))
        if split == paper_split:
            cells = [
                f"{paper_values[key][0]:.3f} ± {paper_values[key][1]:.3f}" if key in paper_values else ""
                for key, _ in _METHODS
            ]
            table.add_row("  the paper", "", *cells, "", style="dim")
    return table


def _cell(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return ""
    return f"{value['mean']:.3f}" if value["std"] is None else f"{value['mean']:.3f} ± {value['std']:.3f}"
