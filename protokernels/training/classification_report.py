# SPDX-License-Identifier: MIT
"""The table at the end of a run that is judged by accuracy, precision and recall, beside a paper's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

# Key of the results -> its row.
METHODS = {
    "statistical": "statistical",
    "knn": "kNN on h",
    "linear": "linear on z",
    "knn_z": "kNN on z",
    "linear_h": "linear on h",
    "resnet18_transfer": "ResNet18 transfer",
    "resnet18_kmeans": "ResNet18 features + KMeans",
}


def results_table(results: Mapping[str, Any], paper: Mapping[str, Any]) -> Table:
    """Table 1: accuracy, precision and recall on every scored set, beside the paper's where it has the set.

    Args:
        results: what ``train`` and ``evaluate`` return.
        paper: data set -> scored set -> method -> (accuracy, precision, recall).
    """
    config = results["config"]
    weights = f", {results['weights']} weights" if "weights" in results else ""
    notes = [f"protocol: {', '.join(f'{name} {value}' for name, value in results['protocol'].items())}"]
    if number := results.get("prototypes", {}).get("number"):
        notes.insert(0, f"prototypes of the first run: {number}")
    if not results["complete"]:
        notes.append(f"NOT FINISHED: after epoch {results['last_epoch'].get('epoch', 0)} of {config['epochs']}")
    table = Table(
        title=f"{results['paper']}, preset {config['preset_name']}{weights}, {config['data']}, runs: {results['number_of_runs']}",
        caption="\n".join(notes),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    headings = ("scored on", "method", "accuracy", "precision", "recall", "precision", "recall", "paper")
    for column, heading in enumerate(headings):
        kind = {3: " (macro)", 4: " (macro)", 5: " (weighted)", 6: " (weighted)", 7: ": acc, prec, rec"}.get(column, "")
        table.add_column(heading + kind, justify="left" if column < 2 else "right")
    keys = ("accuracy", "macro_precision", "macro_recall", "weighted_precision", "weighted_recall")
    for split, scores in results["splits"].items():
        known = paper.get(str(config["data"]), {}).get(split, {})
        table.add_section()
        for method, title in {"majority": "most frequent class", **METHODS}.items():
            if method in scores:
                cells = [cell(scores[method][key]) for key in keys]
                theirs = ", ".join(f"{value:.3g}" for value in known.get(method, ()))
                name = f"{split} ({results['images'][split]})" if method == "majority" else ""
                table.add_row(name, title + (weights if method in known or "resnet" in method else ""), *cells, theirs)
    return table


def cell(value: Mapping[str, Any]) -> str:
    """Mean and standard deviation over runs."""
    return f"{value['mean']:.3f}" + ("" if value["std"] is None else f" ±{value['std']:.3f}".replace("±0.", "±."))
