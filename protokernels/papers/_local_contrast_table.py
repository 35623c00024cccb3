# SPDX-License-Identifier: MIT
"""The table of ``protokernels.papers.local_contrast``: Table 1 over folds, seeds, shares of labelled volumes and methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..data.datasets import data_title
from ..results import Cell, FinishedRun, PaperTable, ResultRow, ResultTable, Row, Score, Values
from ..results.description import folder_of_data
from ..results.tables import literal
from ..training import RunFolder
from ._local_contrast_config import METHODS, PAPER_RESULTS, LocalContrastConfig
from ._local_contrast_report import percent
from ._local_contrast_segmenter import load_segmenter, load_volumes, new_segmenter

DATA = "hippocampus"
SCORES = ("pooled_dice", "volume_dice", "hausdorff95")
STAGES = ("global", "local", "fine_tune")
ROW_KEY = ("data", "preset", "labelled", "method", "fold", "seed")


def identity(run: FinishedRun) -> Values:
    """A row is one run: means are taken over folds and seeds."""
    config = run.config
    fields = {name: config[name] for name in ("data", "labelled", "method", "fold")}
    return {**fields, "preset": config["preset_name"], "seed": run.seed}


def details(runs: Sequence[FinishedRun]) -> Values:
    """Scores of the one run, its volumes, stages and environment."""
    (run,) = runs
    results, environment = run.results, run.environment
    return {
        "volumes": results["volumes"],
        "splits": {
            split: {key: scores[key] for key in SCORES} | {"unit": scores["unit"]}
            for split, scores in results["splits"].items()
        },
        "stages": {
            name: {key: value for key, value in stage.items() if key != "folder"}
            for name, stage in results["stages"].items()
        },
        "commit": environment.get("commit"),
        "backend": environment.get("backend"),
        "threads": environment.get("threads"),
    }


def order(row: ResultRow) -> tuple[Any, ...]:
    """As in Table 1; data that the paper does not have come last."""
    method = list(METHODS).index(row["method"])
    return (
        row["data"] not in PAPER_RESULTS,
        row["data"],
        row["preset"],
        row["labelled"],
        method,
        row["fold"],
        row["seed"],
    )


def scores_of(rows: Sequence[ResultRow], method: str, split: str, key: str) -> dict[tuple[int, int], float]:
    """(fold, seed) -> score."""
    chosen = [row for row in rows if row["method"] == method and split in row["splits"]]
    values = {(row["fold"], row["seed"]): row["splits"][split][key]["mean"] for row in chosen}
    return {place: value for place, value in values.items() if value is not None}


def one_table(rows: Sequence[ResultRow], data: str, preset: str, share: float, split: str) -> ResultTable:
    """The methods that were run, at one share of labelled volumes, beside the paper's Dice on the test set."""
    published = PAPER_RESULTS.get(data, {}).get(percent(share), {}) if split == "test" else {}
    units = ", ".join(sorted({row["splits"][split]["unit"] for row in rows if split in row["splits"]}))
    columns = [f"{literal(data)}, {100 * share:.4g} % labelled", "Dice", *(["paper (4 folds)"] if published else [])]
    columns += ["Dice per volume", f"HD95 ({units})"]
    unit = varied(rows)
    columns += ["folds"] if unit == "fold" else ["folds", "seeds"]
    lines = []
    for method, recipe in METHODS.items():
        dice, per_volume, distance = (scores_of(rows, method, split, key) for key in SCORES)
        if not dice:
            continue
        paper: list[Cell] = [Score(published[method], runs=4)] if published else []
        cells = (
            Score.over(list(dice.values())),
            *paper,
            Score.over(list(per_volume.values())),
            Score.over(list(distance.values()), digits=2),
            len({fold for fold, _ in dice}),
            *([] if unit == "fold" else [len({seed for _, seed in dice})]),
        )
        lines.append(Row(recipe.title, cells, protocol(next(row for row in rows if row["method"] == method))))
    notes = [*gains(rows, split), budget(rows)]
    absent = {name: score for name, score in published.items() if not scores_of(rows, name, split, "pooled_dice")}
    if absent:
        listed = ", ".join(f"{METHODS[name].title} {score:.3f}" for name, score in absent.items())
        notes.append(f"Not run here; the paper has: {listed}.")
    notes += sorted({literal(warning) for row in rows for warning in row["data_warnings"]})
    over = {"fold": "folds", "seed": "seeds", "run": "folds and seeds"}[unit]
    group = f"{literal(data)}, preset `{preset}`: mean ± standard deviation over {over}"
    return ResultTable(tuple(columns), tuple(lines), title=split, group=group, notes=tuple(notes))


def varied(rows: Sequence[ResultRow]) -> Literal["fold", "seed", "run"]:
    """What the runs of a method differ in; ``"run"``: in both."""
    if len({row["seed"] for row in rows}) == 1:
        return "fold"
    return "seed" if len({row["fold"] for row in rows}) == 1 else "run"


def protocol(row: ResultRow) -> Values:
    """What Dice is taken of, and when."""
    return {name: row["config"][name] for name in ("labelled", "split", "keep")}


def gains(rows: Sequence[ResultRow], split: str) -> list[str]:
    """Every method against Random, on the same folds and from the same seeds."""
    random = scores_of(rows, "random", split, "pooled_dice")
    sentences, unit = [], varied(rows)
    for method, recipe in METHODS.items():
        ours = scores_of(rows, method, split, "pooled_dice")
        score = Score.over([ours[place] - random[place] for place in ours if place in random], signed=True)
        if score is not None and method != "random":
            sentences.append(f"{recipe.title} minus Random, Dice {unit} by {unit}: {score} ({unit}s: {score.runs}).")
    return sentences


def budget(rows: Sequence[ResultRow]) -> str:
    """How they were scored and what they had, in a sentence."""
    parts = []
    for stage in STAGES:
        found = sorted({(s["epochs"], s["steps"], s["batch_size"]) for row in rows if (s := row["stages"].get(stage))})
        if found:
            text = ", ".join(f"{epochs} epochs = {steps} steps of {batch}" for epochs, steps, batch in found)
            parts.append(f"{stage.replace('_', '-')}: {text}")
    config = rows[0]["config"]
    volumes = ", ".join(map(str, sorted({row["volumes"]["labelled"] for row in rows})))
    kept = f"weights of the {config['keep']} epoch" + (" by validation Dice" if config["keep"] == "best" else "")
    network = (
        f"U-Net of width {config['width']} and depth {config['depth']}, {config['image_size']} x {config['image_size']}"
    )
    return (
        f"Protocol: split {config['split']}, Dice over all pixels of the scored set, by fold; {network}; {kept}; "
        f"{volumes} labelled volumes; {'; '.join(parts)}."
    )


def tables(rows: Sequence[ResultRow]) -> list[ResultTable]:
    """By data, preset, set and share."""
    made = []
    for data, preset in dict.fromkeys((row["data"], row["preset"]) for row in rows):
        group = [row for row in rows if (row["data"], row["preset"]) == (data, preset)]
        for split in dict.fromkeys(split for row in group for split in row["splits"]):
            for share in sorted({row["labelled"] for row in group}):
                chosen = [row for row in group if row["labelled"] == share]
                made.append(one_table(chosen, data, preset, share, split))
    return made


def folder(values: Values, seed: int) -> Path:
    """One run each; seeds other than the first beside it."""
    name: str = values["method"] + (f"-seed-{seed}" if seed else "")
    return folder_of_data(values, DATA) / f"fold-{values['fold']}" / percent(values["labelled"]) / name


def compare(runs: Sequence[FinishedRun], out: Path, data_root: Path | None) -> list[Path]:
    """By share: validation curves over all folds; and for the first fold, predictions and pixel features of the methods."""
    from ..figures.local_contrast import draw_features, draw_predictions, draw_validation  # not needed for the table

    paths = []
    for share in sorted({run.config["labelled"] for run in runs}):
        chosen = [run for run in runs if run.config["labelled"] == share]
        place = out / percent(share).rstrip("%")
        scored = {
            recipe.title: folders
            for method, recipe in METHODS.items()
            if (folders := [RunFolder(run.path) for run in chosen if run.config["method"] == method])
        }
        fold = min(run.config["fold"] for run in chosen)
        shown = {run.config["method"]: run.path for run in chosen if run.config["fold"] == fold}
        models = {METHODS[method].title: load_segmenter(shown[method])[0] for method in METHODS if method in shown}
        config = LocalContrastConfig.from_dict(chosen[0].config | {"fold": fold})
        dataset = load_volumes(config, data_root)
        volumes, names = dataset.val if config.selection else dataset.test, dataset.class_names
        data = data_title(config.data)
        title = f"{data}, {percent(share)} labelled"
        paths.append(draw_validation(place / "validation.png", scored, title=title))
        title += f", fold {fold}"
        paths.append(draw_predictions(place / "overlays.png", models, volumes, class_names=names, title=title))
        for method in shown:
            name = METHODS[method].title
            path = place / f"features_{method}.png"
            text = f"{name}, {title}"
            paths.append(draw_features(path, models[name], volumes, class_names=names, title=text, seed=0))
    return paths


def main_scores(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Dice of both kinds."""
    return {title: scores[key]["mean"] for key, title in (("pooled_dice", "Dice"), ("volume_dice", "Dice per volume"))}


TABLE = PaperTable(
    paper="local_contrast",
    axes={
        "data": (DATA,),
        "preset": ("fair",),
        "fold": (0, 1, 2, 3),
        "labelled": (0.05, 0.1, 0.2),
        "method": tuple(METHODS),
    },
    axes_of_data={"mmwhs": {"labelled": (0.1, 0.2, 0.4)}},  # 1, 2 and 4 of 10 volumes, as in Table 1
    row_key=ROW_KEY,
    identity=identity,
    details=details,
    tables=tables,
    folder=folder,
    order=order,
    compare=compare,
    main_scores=main_scores,
    check=lambda config: new_segmenter(config, num_classes=2),
)
