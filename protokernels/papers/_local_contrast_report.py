# SPDX-License-Identifier: MIT
"""Tables and sweeps of ``protokernels.papers.local_contrast``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ..training.summary import unfinished_notes
from ._local_contrast_config import METHODS

SCORES = (("pooled_dice", "Dice, pooled"), ("volume_dice", "Dice per volume"), ("hausdorff95", "HD95"))


def percent(share: float) -> str:
    """``"5%"`` for 0.05, as the rows of ``PAPER_RESULTS`` are called."""
    return f"{100 * share:.4g}%"


def results_table(results: Mapping[str, Any], paper: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """Dice and distance, mean and standard deviation over runs, beside the paper's Dice where it has this setting.

    Args:
        results: what ``train`` and ``evaluate`` return.
        paper: data -> share of labelled volumes -> method -> Dice.
    """
    config, volumes = results["config"], results["volumes"]
    share, method = percent(config["labelled"]), config["method"]
    stages = [f"{name} {stage['epochs']} ({stage['steps']} steps)" for name, stage in results.get("stages", {}).items()]
    notes = [f"labelled volumes: {volumes['labelled']} of {volumes['train']}; epochs: {', '.join(stages)}"]
    notes += unfinished_notes(results, "the last stage")
    table = Table(
        title=f"{METHODS[method].title}, preset {config['preset_name']}, {config['data']}, {share} labelled, fold "
        f"{config['fold']}, runs: {results['number_of_runs']}",
        caption="\n".join(notes),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("scored on", no_wrap=True)
    table.add_column("mean", justify="right", no_wrap=True)
    classes = list(next(iter(results["splits"].values()))["pooled_dice"]["classes"])
    for name in classes:
        table.add_column(name, justify="right", no_wrap=True)
    published = paper.get(str(config["data"]), {}).get(share, {}).get(method)
    for split, scores in results["splits"].items():
        for key, title in SCORES:
            row = scores[key]
            cells = [_cell(row.get("mean")), *(_cell(row["classes"].get(name)) for name in classes)]
            table.add_row(f"{split} ({volumes[split]}): {_with_unit(key, title, scores)}", *cells)
            if published is not None and (split, key) == ("test", "pooled_dice"):
                table.add_row("  the paper, four folds", f"{published:.3f}", *("" for _ in classes), style="dim")
    return table


def ablation_tables(results: Mapping[str, Any]) -> list[Table]:
    """A row per ablation."""
    first = next(iter(results.values()))
    tables = []
    for split in first["splits"]:
        table = Table(
            title=f"{first['config']['data']}, {split}, {percent(first['config']['labelled'])} labelled, fold "
            f"{first['config']['fold']}, runs: {first['number_of_runs']}",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        table.add_column("ablation", no_wrap=True)
        for key, title in SCORES:
            table.add_column(_with_unit(key, title, first["splits"][split]), justify="right", no_wrap=True)
        for name, result in results.items():
            scores = result["splits"].get(split, {})
            table.add_row(name, *(_cell(scores.get(key, {}).get("mean")) for key, _ in SCORES))
        tables.append(table)
    return tables


def draw_ablations(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """A curve over every setting of which at least two values were run; ``full`` is one of them where its method has it."""
    from ..figures import save_figure
    from ..figures.sweeps import Panel, sweep_figure

    paths = []
    for field, label in (
        ("block_size", "block size, pixels"),
        ("stride", "stride, pixels"),
        ("temperature", "temperature"),
    ):
        prefix = {"block_size": "block-", "stride": "stride-", "temperature": "temperature-"}[field]
        rows = {name: result for name, result in results.items() if name.startswith(prefix)}
        ending = {"block_size": "block", "stride": "stride", "temperature": ""}[field]  # of methods with the setting
        if "full" in results and results["full"]["config"]["method"].endswith(ending):
            rows = {"full": results["full"], **rows}
        if len(rows) < 2:
            continue
        values = [row["config"][field] for row in rows.values()]
        split = next(iter(results[next(iter(rows))]["splits"]))
        means, deviations = {}, {}
        for key, title in SCORES[:2]:
            scores = [row["splits"][split][key].get("mean") or {} for row in rows.values()]
            means[title] = [score.get("mean", math.nan) for score in scores]
            deviations[title] = [score.get("std") or 0.0 for score in scores]
        config = next(iter(rows.values()))["config"]
        title = f"{config['data']}, {percent(config['labelled'])} labelled, {split}"
        figure = sweep_figure([Panel(label, "Dice", values, means, deviations)], title=title)
        paths.append(save_figure(figure, folder / "figures" / f"sweep_{field}.png"))
    return paths


def _with_unit(key: str, title: str, scores: Mapping[str, Any]) -> str:
    return f"{title} ({scores['unit']})" if key == "hausdorff95" and "unit" in scores else title


def _cell(value: Mapping[str, Any] | None) -> str:
    if not value:
        return ""
    return f"{value['mean']:.3f}" + ("" if value["std"] is None else f" ±{value['std']:.3f}".replace("±0.", "±."))
