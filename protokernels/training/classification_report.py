# SPDX-License-Identifier: MIT
"""The table at the end of a run that is judged by accuracy, precision and recall, beside a paper's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from .summary import unfinished_notes

# Key of the results -> its row.
METHODS = {
    "majority": "most frequent class",
    "statistical": "statistical",
    "knn": "kNN on h",
    "linear": "linear on z",
    "knn_z": "kNN on z",
    "linear_h": "linear on h",
    "resnet18_transfer": "ResNet18",
    "resnet18_kmeans": "features+KM",
}
_COLUMNS = {  # heading -> score; the weighted recall is the accuracy
    "accuracy": "accuracy",
    "precision": "macro_precision",
    "recall": "macro_recall",
    "weighted prec.": "weighted_precision",
}


def results_table(results: Mapping[str, Any], paper: Mapping[str, Any]) -> Table:
    """Accuracy, precision and recall on every scored set: mean and standard deviation over runs, beside the paper's.

    Args:
        results: what ``train`` and ``evaluate`` return. A baseline's ``"weights"`` stand behind its name.
        paper: data set -> scored set -> method -> (accuracy, precision, recall).
    """
    config = results["config"]
    weights = f", {results['weights']} weights" if "weights" in results else ""
    notes = ["precision and recall: means over classes; the recall weighted by class is the accuracy"]
    notes.append(f"protocol: {', '.join(f'{name} {value}' for name, value in results['protocol'].items())}")
    if number := results.get("prototypes", {}).get("number"):
        notes.append(f"prototypes of the first run: {number}")
    notes += unfinished_notes(results)
    table = Table(
        title=f"{results['paper']}, preset {config['preset_name']}, {config['data']}{weights}, runs: {results['number_of_runs']}",
        caption="\n".join(notes),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("scored on", no_wrap=True)
    for heading in (*_COLUMNS, "paper"):
        table.add_column(heading, justify="right", no_wrap=True)
    for split, scores in results["splits"].items():
        known = paper.get(str(config["data"]), {}).get(split, {})
        table.add_section()
        table.add_row(f"{split} ({results['images'][split]})", style="bold")
        for method, title in METHODS.items():
            if method in scores:
                name = f"  {title}" + (
                    f" ({results['weights']})" if "weights" in results and method != "majority" else ""
                )
                theirs = " ".join(digits(value) for value in known.get(method, ()))
                table.add_row(name, *(_cell(scores[method][key]) for key in _COLUMNS.values()), theirs)
    return table


def digits(value: float) -> str:
    """A published number as it was printed: two decimals, or three."""
    return f"{value:.2f}" if round(value, 2) == value else f"{value:.3f}"


def _cell(value: Mapping[str, Any]) -> str:
    return f"{value['mean']:.3f}" + ("" if value["std"] is None else f" ±{value['std']:.3f}".replace("±0.", "±."))
