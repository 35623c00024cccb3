# SPDX-License-Identifier: MIT
"""The table of ``protokernels.papers.contrastive_autoencoder``: Table 1 with its baselines, on every set apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..data.datasets import data_title
from ..results import FinishedRun, PaperTable, Recipe, ResultRow, ResultTable, Row, Score, Values
from ..results.tables import literal
from ..training.classification_report import METHODS, digits
from ._contrastive_autoencoder_config import PAPER_RESULTS
from .contrastive_autoencoder import ContrastiveAutoencoder, ContrastiveAutoencoderConfig

UNTRAINED = "untrained"
"""Beside the presets: the decoder of ``fair`` on an encoder that was never trained, the floor of all the others."""
PRESETS = {  # module -> its presets
    "contrastive_autoencoder": ("fair", "paper", "official", UNTRAINED),
    "resnet18_transfer": ("fair", "paper"),
    "resnet18_kmeans": ("fair", "paper"),
}
SCORES = ("accuracy", "macro_precision", "macro_recall", "weighted_precision")
COLUMNS = ("", "accuracy", "precision", "recall", "precision, weighted", "seeds", "prototypes")


def identity(run: FinishedRun) -> Values:
    """Data, preset, module, and of a network where its weights came from."""
    return {
        "data": run.config["data"],
        "preset": UNTRAINED if run.config.get("warmup_epochs") == 0 else run.config["preset_name"],
        "paper": run.results["paper"],
        "weights": run.results.get("weights"),
    }


def details(runs: Sequence[FinishedRun]) -> Values:
    """Images, and how many prototypes each seed has."""
    found = [run.results.get("prototypes", {}).get("number") for run in runs]
    return {"images": runs[0].results["images"], "prototypes": [number for number in found if number]}


def tables(rows: Sequence[ResultRow]) -> list[ResultTable]:
    """By data and scored set: a constant answer, the paper's numbers, ours."""
    made = []
    for data in dict.fromkeys(row["data"] for row in rows):
        here = [row for row in rows if row["data"] == data]
        for split in dict.fromkeys(split for row in here for split in row["splits"]):
            lines = [_line(METHODS["majority"], here[0], split, "majority", show=False)]
            for method, values in PAPER_RESULTS.get(data, {}).get(split, {}).items():
                lines.append(Row(f"paper, {METHODS[method]}", (*map(digits, values), None, 1, None)))
            for row in here:
                name = f"{row['weights']} weights" if row.get("weights") else f"`{row['preset']}`"
                for method in (key for key in METHODS if key in row["splits"].get(split, {}) and key != "majority"):
                    show = method in ("statistical", "resnet18_kmeans")
                    lines.append(_line(f"{METHODS[method]}, {name}", row, split, method, show=show))
            title = f"{split} ({here[0]['images'][split]} images)"
            notes = ("Precision and recall are means over classes; the recall weighted by class is the accuracy.",)
            made.append(ResultTable(COLUMNS, tuple(lines), title=title, group=literal(data), notes=notes))
    return made


def _line(name: str, row: ResultRow, split: str, method: str, *, show: bool) -> Row:
    found = sorted(set(row.get("prototypes", ())))
    number = f"{found[0]} to {found[-1]}" if len(found) > 1 else str(found[0]) if found else None
    cells = (Score.of(row["splits"][split][method][score]) for score in SCORES)
    seeds = None if method == "majority" else len(row["seeds"])
    return Row(name, (*cells, seeds, number if show else None), row.get("protocol", {}))


def recipe(values: Values, _paper: str) -> Recipe | None:
    """What is trained for a row; none for a preset that a baseline does not have."""
    module, preset = values["paper"], values["preset"]
    if preset not in PRESETS[module]:
        return None
    if preset == UNTRAINED:
        return Recipe(module, "fair", {"epochs": 1, "warmup_epochs": 0, "ramp_epochs": 0})
    return Recipe(module, preset)


def _check(config: object) -> None:
    if isinstance(config, ContrastiveAutoencoderConfig):
        ContrastiveAutoencoder(config, channels=1)


TABLE = PaperTable(
    paper="contrastive_autoencoder",
    modules=tuple(PRESETS),
    axes={
        "data": ("pneumoniamnist", "mnist"),
        "paper": tuple(PRESETS),
        "preset": ("fair", "paper", "official", UNTRAINED),
    },
    row_key=("data", "preset", "paper", "weights"),
    identity=identity,
    runs=5,
    details=details,
    tables=tables,
    recipe=recipe,
    folder=lambda values, seed: (
        Path(f"{values['paper']}-{data_title(values['data'])}-{values['preset']}") / f"seed-{seed}"
    ),
    sweep={"latent_dim": (16, 32, 64, 128, 256), "num_prototypes": (2, 4, 8, 16, 32), "batch_size": (125, 250, 500)},
    check=_check,
)
