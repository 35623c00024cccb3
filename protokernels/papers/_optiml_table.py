# SPDX-License-Identifier: MIT
"""The table of ``protokernels.papers.optiml``: transfer to few labels, beside the baselines. The paper has no numbers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..baselines import BASELINES
from ..results import FinishedRun, PaperTable, Recipe, ResultRow, ResultTable, Row, Score, Values, seconds_of
from ..results.description import folder_of_data
from ..results.tables import literal
from ..training.transfer_scoring import left_out
from .optiml import OPTiML

DATA = "chest_nih"
METHODS = ("optiml", *BASELINES)
TITLES = {
    ("labels", "probe"): "linear probe, one label per image",
    ("labels", "fine_tune"): "fine-tuning, one label per image",
    ("targets", "probe"): "linear probe, all findings",
    ("targets", "fine_tune"): "fine-tuning, all findings",
}
SEES_LABELS = "supervised"


def identity(run: FinishedRun) -> Values:
    """The method's name is the folder's where the configuration is not the preset's own (an ablation, a weight file)."""
    method = run.results["paper"] if run.name in METHODS else run.name
    return {"data": run.config["data"], "preset": run.config["preset_name"], "method": method}


def details(runs: Sequence[FinishedRun]) -> Values:
    """The method, seconds, and the classes without an area."""
    first = runs[0].results
    return {
        "paper": first["paper"],
        "images": first["images"],
        "pretraining_seconds": seconds_of(runs),
        "left_out": left_out(first["splits"]),
    }


def ranking(rows: Sequence[ResultRow], split: str, task: str, way: str) -> ResultTable | None:
    """Method x label fraction, best mean over the fractions first, whichever that is; none where nothing was scored. Cells are
    empty where no class has an area."""
    scored = [(row, row["splits"].get(split, {}).get(task, {}).get(way, {})) for row in rows]
    table = {row["method"]: (row, values) for row, values in scored if values}
    if not table:
        return None
    fractions = list(dict.fromkeys(fraction for _, values in table.values() for fraction in values))

    def average(values: Mapping[str, Any]) -> Score | None:
        means = [value["macro_auroc"]["mean"] for value in values.values() if "macro_auroc" in value]
        return Score(statistics.fmean(means)) if means else None

    def rank(method: str) -> float:
        mean = average(table[method][1])
        return -mean.mean if mean is not None else 0.0

    images = [
        round(next(v[fraction]["images"]["mean"] for _, v in table.values() if fraction in v)) for fraction in fractions
    ]
    heads = [f"{fraction} ({count})" for fraction, count in zip(fractions, images, strict=True)]
    lines = []
    for method in sorted(table, key=rank):
        row, values = table[method]
        name = method + (" (has seen all labels)" if method == SEES_LABELS else "")
        scores = (Score.of(values.get(fraction, {}).get("macro_auroc")) for fraction in fractions)
        cells = (*scores, average(values), len(row["seeds"]), row["config"]["epochs"])
        lines.append(Row(f"**{method}**" if row["paper"] == "optiml" else name, cells, row["protocol"]))
    return ResultTable(("", *heads, "mean", "seeds", "epochs"), tuple(lines), title=f"{split}: {TITLES[task, way]}")


def protocol(row: ResultRow) -> str:
    """How a row was scored: L-BFGS chooses the weight decay, AdamW has one and chooses the epoch."""
    ways = row["protocol"]
    probe = ways.get("probe", "lbfgs")
    chosen = "weight decay" if probe == "lbfgs" else "epoch"
    decay = ways.get("probe_adamw", {}).get("weight_decay")
    fixed = f", with weight decay {decay:g}" if probe == "adamw" and decay is not None else ""
    return (
        f"transfer {ways['transfer']}, areas under the ROC curve as means over classes; the probe by "
        f"{probe}{fixed}, its {chosen} chosen on the validation set."
    )


def protocols(rows: Sequence[ResultRow]) -> list[str]:
    """A note per way of scoring; where there are several, with the methods that it holds for."""
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(protocol(row), []).append(row["method"])
    if len(found) == 1:
        return [f"Protocol: {text}" for text in found]
    return [f"Protocol of {', '.join(methods)}: {text}" for text, methods in found.items()]


def tables(rows: Sequence[ResultRow]) -> list[ResultTable]:
    """By data set and preset; the last table of a set says what its means leave out."""
    made = []
    for data, preset in dict.fromkeys((row["data"], row["preset"]) for row in rows):
        group = [row for row in rows if (row["data"], row["preset"]) == (data, preset)]
        for split in dict.fromkeys(split for row in group for split in row["splits"]):
            found = [table for task, way in TITLES if (table := ranking(group, split, task, way)) is not None]
            notes = protocols(group)
            if missing := sorted({name for row in group for name in row["left_out"].get(split, [])}):
                notes.append(
                    f"Left out of the mean in {split}, where no image has them or all: {', '.join(map(literal, missing))}."
                )
            for table in found:
                last = table is found[-1]
                made.append(
                    ResultTable(
                        table.columns,
                        table.rows,
                        title=table.title,
                        group=f"{literal(data)}, preset `{preset}`, macro AUROC",
                        notes=tuple(notes) if last else (),
                    )
                )
    return made


TABLE = PaperTable(
    paper="optiml",
    modules=METHODS,
    axes={"data": (DATA,), "preset": ("fair",), "method": METHODS},
    row_key=("data", "preset", "method"),
    identity=identity,
    runs=3,
    details=details,
    tables=tables,
    recipe=lambda values, _paper: Recipe(values["method"], values["preset"]),
    folder=lambda values, seed: folder_of_data(values, DATA) / values["method"] / f"seed-{seed}",
    check=lambda config: OPTiML(config, channels=1),
)
