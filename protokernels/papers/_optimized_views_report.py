# SPDX-License-Identifier: MIT
"""Tables and comparisons of ``protokernels.papers.optimized_views``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from torch import Tensor

from ..data.datasets import data_title
from ..training import derived_generator
from ..training.runs import load_runs
from ..training.summary import unfinished_notes
from ..training.transfer_scoring import left_out_notes
from ._optimized_views_config import STRATEGIES, OptimizedViewsConfig
from ._optimized_views_networks import load_model
from ._optimized_views_scoring import example_views, examples, load_presence, scored_split


def cells(scores: Mapping[str, Any]) -> dict[str, Mapping[str, Any] | None]:
    """Column -> mean and standard deviation over runs, from one scored set of a summary."""
    values: dict[str, Any] = {"hold-out\n3-fold": scores.get("hold_out", {}).get("auc")}
    values["untrained\nf"] = scores.get("untrained", {}).get("auc")
    values |= {f"probe\n{fraction}": row.get("macro_auroc") for fraction, row in scores.get("probe", {}).items()}
    if "classifier" in scores:
        values["p\nitself"] = scores["classifier"].get("auc")
    return values


def results_table(results: Mapping[str, Any], paper: Mapping[str, Any]) -> Table:
    """AUC by both linear evaluations, mean and standard deviation over runs, beside the paper's where it has this setting.

    Args:
        results: what ``train`` and ``evaluate`` return.
        paper: data -> strategy -> alphas -> (mean, standard deviation).
    """
    config, images = results["config"], results["images"]
    notes = [
        "hold-out, 3-fold: probe fitted inside the scored set, as in the paper (mean over three hold-out sets); "
        "probe: fitted on training labels"
    ]
    if labelled := images.get("labelled"):
        notes.append(f"labelled images in training: {labelled} of {images['train']}")
    notes += left_out_notes(results)
    notes += unfinished_notes(results)
    table = Table(
        title=f"{STRATEGIES[config['strategy']].title}, preset {config['preset_name']}, {config['data']}: AUC, runs: "
        f"{results['number_of_runs']}",
        caption="\n".join(notes),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("scored on", no_wrap=True)
    columns = list(cells(next(iter(results["splits"].values()))))
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    alphas = OptimizedViewsConfig.from_dict(dict(config)).weights
    published = paper.get(str(config["data"]), {}).get(config["strategy"], {}).get(tuple(alphas))
    for split, scores in results["splits"].items():
        table.add_row(f"{split} ({images[split]})", *(_cell(value) for value in cells(scores).values()))
        if published is not None and split == "test":
            value = _cell({"mean": published[0], "std": published[1]})
            table.add_row("  the paper", value, *("" for _ in columns[1:]), style="dim")
    return table


def ablation_tables(results: Mapping[str, Any]) -> list[Table]:
    """A row per ablation."""
    first = next(iter(results.values()))
    tables = []
    for split in first["splits"]:
        table = Table(
            title=f"{first['config']['data']}, {split}: AUC, runs: {first['number_of_runs']}",
            caption="\n".join(left_out_notes(first)),
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        table.add_column("ablation", no_wrap=True)
        columns = list(cells(first["splits"][split]))
        for name in columns:
            table.add_column(name, justify="right", no_wrap=True)
        for name, result in results.items():
            values = cells(result["splits"].get(split, {}))
            table.add_row(name, *(_cell(values.get(column)) for column in columns))
        tables.append(table)
    return tables


def draw_ablations(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """AUC over epochs of all of them, with lines for what is supervised (the paper's Fig. 2).

    Args:
        results: name -> what ``train`` returns; ``folders`` instead of ``folder`` where seeds lie in folders of their own.
        folder: the picture goes into its ``figures``.
    """
    from ..figures import save_figure

    return [save_figure(compare_curves(results), folder / "figures" / "auc.png")]


def compare_curves(results: Mapping[str, Any]) -> Any:
    """A matplotlib figure: AUC over epochs, see :func:`draw_ablations`."""
    from ..figures.optimized_views import auc_curves

    curves = {
        name: [curve for path in result.get("folders") or [result["folder"]] for curve in run_curves(Path(path))]
        for name, result in results.items()
    }
    flat = {name for name, result in results.items() if STRATEGIES[result["config"]["strategy"]].loss == "classes"}
    first = next(iter(results.values()))
    title = f"{data_title(first['config']['data'])}, {next(iter(first['splits']))}: linear evaluation in hold-out sets"
    return auc_curves(curves, flat=flat, title=title)


def compare_views(folders: Mapping[str, str | Path], *, data_root: str | Path | None = None) -> Any:
    """A matplotlib figure: the same images, transformed by several strategies (the paper's Fig. 3), with the contours of what they
    show where the data set has masks.

    Args:
        folders: name -> run folder, all of one data set and image size.
        data_root: where the data lies.
    """
    from ..figures import labelled_rows

    rows: dict[str, tuple[Tensor, Tensor | None]] = {}
    captions: list[str] = []
    for name, folder in folders.items():
        run = load_runs(folder)[0]
        dataset = load_presence(run.config_as(OptimizedViewsConfig).data, data_root)
        model, config = load_model(run, dataset.channels)
        indices, x, masks = examples(split := scored_split(dataset, config)[1], config)
        captions = captions or [dataset.class_names[label] for label in split.labels[indices]]
        rows = rows or {"X": (x, masks)}
        rows[name] = example_views(model, x, masks, derived_generator(0, "figures"))
    lines = [(name.replace("+", "\n+ ").replace("-", "-\n"), images) for name, (images, _) in rows.items()]
    title = f"{data_title(config.data)}: X_M of several strategies"
    return labelled_rows(lines, captions=captions, title=title, masks=[moved for _, moved in rows.values()])


def run_curves(folder: Path) -> list[list[tuple[int, float]]]:
    """Epoch and AUC of every evaluation, by run."""
    return [[(line["epoch"], line["auc"]) for line in run.metrics() if "auc" in line] for run in load_runs(folder)]


def _cell(value: Mapping[str, Any] | None) -> str:
    if not value:
        return ""
    return f"{value['mean']:.3f}" + ("" if value["std"] is None else f" ±{value['std']:.3f}".replace("±0.", "±."))
