# SPDX-License-Identifier: MIT
"""The table at the end of a run that is judged by transfer to few labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from .summary import unfinished_notes
from .transfer_scoring import left_out_notes

_WAYS = (("probe", "linear probe"), ("fine_tune", "fine-tuning"))


def results_table(results: Mapping[str, Any], _paper: Any = None) -> Table:
    """Macro AUROC over label fractions: mean and standard deviation over runs.

    Args:
        results: what ``train`` and ``evaluate`` of a method return.
    """
    config, runs = results["config"], results["number_of_runs"]
    notes = [f"protocol: {results['protocol']['transfer']}; in parentheses: labelled images"]
    notes += left_out_notes(results)
    notes += unfinished_notes(results)
    rows = [
        (f"{split}, {task}\n{title}", scores[task][way])
        for split, scores in results["splits"].items()
        for task in scores
        for way, title in _WAYS
        if scores[task].get(way)
    ]
    table = Table(
        title=f"{results['paper']}, preset {config['preset_name']}, {config['data']}: macro AUROC, runs: {runs}",
        caption="\n".join(notes),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("scored on", no_wrap=True)
    fractions = list(dict.fromkeys(fraction for _, by_fraction in rows for fraction in by_fraction))
    for fraction in fractions:
        images = next(int(row[fraction]["images"]["mean"]) for _, row in rows if fraction in row)
        table.add_column(f"{fraction}\n({images})", justify="right", vertical="bottom", no_wrap=True)
    for name, by_fraction in rows:
        table.add_row(name, *(_cell(by_fraction.get(fraction, {}).get("macro_auroc")) for fraction in fractions))
    return table


def _cell(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return ""
    return f"{value['mean']:.3f}" + ("" if value["std"] is None else f" ±{value['std']:.3f}".replace("±0.", "±."))
