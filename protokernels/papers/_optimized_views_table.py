# SPDX-License-Identifier: MIT
"""The table of ``protokernels.papers.optimized_views``: all strategies, by the paper's linear evaluation and the usual one."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..results import FinishedRun, PaperTable, ResultRow, ResultTable, Row, Score, Values, seconds_of
from ..results.description import folder_of_data
from ..results.tables import literal
from ._optimized_views_config import PAPER_RESULTS, STRATEGIES
from ._optimized_views_networks import new_model

DATA = "brain_tumor"
FIRST = ("self-supervised+supervision", "random+supervision", "simclr")
ORDER = (*FIRST, *(name for name in STRATEGIES if name not in FIRST))
OURS = FIRST[0]
RIVALS = (*FIRST[1:], "supervised", "supervised-all")


def details(runs: Sequence[FinishedRun]) -> Values:
    """The strategy, seconds, the paper's score by seed and by epoch."""
    first = runs[0].results
    split = next(iter(first["splits"]))
    return {
        "strategy": first["config"]["strategy"],
        "images": first["images"],
        "pretraining_seconds": seconds_of(runs),
        "by_seed": {str(run.seed): run.results["splits"][split]["hold_out"].get("auc") for run in runs},
        "curves": [[[line["epoch"], line["auc"]] for line in run.metrics if "auc" in line] for run in runs],
    }


def differences(rows: Sequence[ResultRow]) -> list[str]:
    """The paper's method against the others, seed by seed."""
    by_name = {row["name"]: row["by_seed"] for row in rows}
    sentences = []
    for rival in RIVALS:
        ours, theirs = by_name.get(OURS, {}), by_name.get(rival, {})
        seeds = sorted(seed for seed in ours.keys() & theirs.keys() if None not in (ours[seed], theirs[seed]))
        values = [ours[seed] - theirs[seed] for seed in seeds]
        if values:
            each = ", ".join(f"{value:+.3f}" for value in values)
            sentences.append(f"{OURS} minus {rival}: {Score.over(values, signed=True)} (by seed: {each})")
    return sentences


def published(data: str) -> list[str]:
    """The paper's numbers on these data, a sentence each."""
    return [
        f"The paper has {Score(*score)} for {strategy} with alphas {', '.join(f'{alpha:g}' for alpha in alphas)}."
        for strategy, by_alphas in PAPER_RESULTS.get(data, {}).items()
        for alphas, score in by_alphas.items()
    ]


def protocol(row: ResultRow) -> str:
    """How the rows were scored."""
    inside, probe = row["protocol"].get("hold_out", {}), row["protocol"].get("probe", {})
    return (
        f"Protocol: hold-out: {inside.get('folds', 3)}-fold cross-validation of a probe inside {inside.get('sets', 3)} parts "
        f"of the scored set, as in the paper; probe: fitted on training labels by {probe.get('probe', 'lbfgs')}; "
        "p itself: the classifier that a supervised strategy trains."
    )


def tables(rows: Sequence[ResultRow]) -> list[ResultTable]:
    """By data, preset and set; best first, whichever strategy that is."""
    made = []
    for data, preset in dict.fromkeys((row["data"], row["preset"]) for row in rows):
        group = [row for row in rows if (row["data"], row["preset"]) == (data, preset)]
        for split in dict.fromkeys(split for row in group for split in row["splits"]):
            scored = [row for row in group if row["splits"].get(split, {}).get("hold_out", {}).get("auc")]
            fractions = list(dict.fromkeys(fraction for row in scored for fraction in row["splits"][split]["probe"]))
            own = any("classifier" in row["splits"][split] for row in scored)
            lines = []
            for row in sorted(scored, key=lambda row: -row["splits"][split]["hold_out"]["auc"]["mean"]):
                scores = row["splits"][split]
                probes = (Score.of(scores["probe"].get(fraction, {}).get("macro_auroc")) for fraction in fractions)
                seconds = round(statistics.fmean(row["pretraining_seconds"]))
                hold_out = Score.of(scores["hold_out"]["auc"])
                classifier = (Score.of(scores.get("classifier", {}).get("auc")),) if own else ()
                cells = (row["images"]["labelled"], hold_out, *probes, *classifier, len(row["seeds"]), seconds)
                name = f"**{OURS}**" if row["name"] == OURS else literal(row["name"])
                lines.append(Row(name, cells, row["protocol"]))
            notes = [*dict.fromkeys(protocol(row) for row in scored)]
            if scored:
                untrained = Score.of(scored[0]["splits"][split]["untrained"].get("auc"))
                notes.append(
                    f"Untrained encoder, hold-out: {untrained}. Seconds of training on the clock, mean over seeds."
                )
            columns = (
                "strategy",
                "labels",
                "hold-out, 3-fold",
                *(f"probe, {name}" for name in fractions),
                *(("p itself",) if own else ()),
                "seeds",
                "s",
            )
            made.append(
                ResultTable(
                    columns,
                    tuple(lines),
                    group=f"{literal(data)}, preset `{preset}`, {split}: AUC",
                    notes=(*notes, *differences(scored), *published(data)),
                )
            )
    return made


def compare(runs: Sequence[FinishedRun], out: Path, data_root: Path | None) -> list[Path]:
    """AUC over epochs and transformed images of all strategies, side by side."""
    from ..figures import save_figure  # matplotlib is not needed for the table
    from ._optimized_views_report import compare_curves, compare_views

    first: dict[str, str | Path] = {}
    results: dict[str, Any] = {}
    for run in runs:
        first.setdefault(run.name, run.path)
        results.setdefault(run.name, {**run.results, "folders": []})["folders"].append(str(run.path))
    views = compare_views(first, data_root=data_root)
    return [save_figure(compare_curves(results), out / "auc.png"), save_figure(views, out / "views.png")]


def main_scores(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Both linear evaluations, and p itself where it is scored."""
    found = {"hold-out": scores.get("hold_out", {}).get("auc")}
    found |= {f"probe, {name}": row.get("macro_auroc") for name, row in scores.get("probe", {}).items()}
    found["p itself"] = scores.get("classifier", {}).get("auc")
    return {name: value for name, value in found.items() if value is not None}


TABLE = PaperTable(
    paper="optimized_views",
    axes={"data": (DATA,), "preset": ("fair",), "strategy": ORDER},
    row_key=("data", "preset", "name"),
    identity=lambda run: {"data": run.config["data"], "preset": run.config["preset_name"], "name": run.name},
    runs=3,
    details=details,
    tables=tables,
    folder=lambda values, seed: folder_of_data(values, DATA) / values["strategy"] / f"seed-{seed}",
    compare=compare,
    main_scores=main_scores,
    check=lambda config: new_model(config, channels=1),
)
