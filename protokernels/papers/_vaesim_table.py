# SPDX-License-Identifier: MIT
"""The table of ``protokernels.papers.vaesim``: Table 1, on every set apart, with what raw pixels reach."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..data import load_dataset, to_tensor
from ..evaluation import classification_scores, knn_predict, linear_probe
from ..results import Cell, FinishedRun, PaperTable, Recipe, ResultRow, ResultTable, Row, Score, Values
from ..results.fields import completed
from .vaesim import PAPER_RESULTS, VAESim, VAESimConfig

PROTOCOLS = ("statistical", "knn", "linear")
COLUMNS = ("", "set", "majority", "statistical", "kNN", "linear", "seeds", "epochs")
PAPER_RUNS = 10
METHODS = ("vaesim",)  # whose rows stand here: the paper's, and baselines by the names of their modules


def identity(run: FinishedRun) -> Values:
    """A row of the paper itself names no method."""
    fields = {"data": run.config["data"], "preset": run.config["preset_name"]}
    method = run.results["paper"]
    return fields if method == "vaesim" else {**fields, "method": method}


def details(runs: Sequence[FinishedRun]) -> Values:
    """Accuracies with the value of every seed, in place of all the scores."""
    first = runs[0].results
    return {
        "images": first["images"],
        "processors": sorted({str(run.environment.get("cpu_capability")) for run in runs}),
        "splits": {split: accuracies([run.results for run in runs], split) for split in first["splits"]},
    }


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation and the values themselves."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "values": list(values)}


def accuracies(results: Sequence[Mapping[str, Any]], split: str) -> dict[str, Any]:
    """Protocol -> accuracies of all seeds; and the rate of the larger class."""
    first = results[0]["splits"][split]
    row: dict[str, Any] = {
        protocol: summary([result["splits"][split][protocol]["accuracy"] for result in results])
        for protocol in PROTOCOLS
        if protocol in first  # what finds no clusters has no statistical mapping
    }
    row["majority_rate"] = (
        first["statistical"]["majority_rate"] if "statistical" in first else first["majority"]["accuracy"]
    )
    return row


def pixels(data: str, data_root: Path | None, download: bool) -> ResultRow:
    """kNN (k = 5) and the `fair` linear probe on the pixels themselves, at the size of the file: the floor under any
    embedding."""
    dataset = load_dataset(data, data_root, download=download)
    x = {split: to_tensor(part.images, size=None).flatten(1) for split, part in dataset.splits.items()}
    y = {split: torch.as_tensor(part.labels) for split, part in dataset.splits.items()}
    probe = linear_probe(x["train"], y["train"], num_classes=dataset.num_classes, protocol="fair", seed=0)
    splits = {}
    for split in x.keys() - {"train"}:
        knn = knn_predict(x["train"], y["train"], x[split], k=5, num_classes=dataset.num_classes)
        scores = {"knn": knn, "linear": probe.predict(x[split])}
        splits[split] = {
            key: {"mean": classification_scores(value, y[split], dataset.num_classes)["accuracy"], "std": None}
            for key, value in scores.items()
        }
    return {"data": data, "preset": "pixels", "seeds": [0], "splits": splits}


def values_of(entry: Mapping[str, Any], count: int) -> list[float]:
    """The accuracies of every seed; older files hold mean and standard deviation, which settle up to two of them."""
    if "values" in entry:
        return list(entry["values"])
    if count == 1:
        return [entry["mean"]]
    if count == 2:
        half = entry["std"] / math.sqrt(2)
        return [entry["mean"] - half, entry["mean"] + half]
    raise ValueError(f"the values of {count} seeds cannot be told from their mean and standard deviation")


def joined(before: ResultRow, now: ResultRow) -> ResultRow:
    """One row of the seeds of two; ``ValueError`` if they are not of one configuration, or share a seed."""
    name = f"{now['data']} {now['preset']}"
    if completed(VAESimConfig, before["config"]) != completed(VAESimConfig, now["config"]):
        raise ValueError(f"{name}: config differs from that in the file: {before['config']} and {now['config']}")
    for key in ("protocol", "images"):
        if before[key] != now[key]:
            raise ValueError(f"{name}: {key} differs from that in the file: {before[key]} and {now[key]}")
    if shared := set(before["seeds"]) & set(now["seeds"]):
        raise ValueError(f"{name}: the file has seeds {sorted(shared)} already")
    splits = {}
    for split, values in now["splits"].items():
        old = before["splits"][split]
        splits[split] = {
            **{
                protocol: summary(values_of(old[protocol], len(before["seeds"])) + values[protocol]["values"])
                for protocol in PROTOCOLS
                if protocol in values
            },
            "majority_rate": values["majority_rate"],
        }
    first = {"precisions": [before["precision"]], "processors": [str(before["environment"].get("cpu_capability"))]}
    ways = ("commits", "backends", "precisions", "processors")
    differences = {key: sorted({*before.get(key, first.get(key, [])), *now[key]}) for key in ways}
    return {**before, **differences, "seeds": before["seeds"] + now["seeds"], "splits": splits}


def tables(rows: Sequence[ResultRow]) -> list[ResultTable]:
    """A table per data set: the paper's row, then ours by set."""
    made = []
    for data in dict.fromkeys(row["data"] for row in rows):
        lines = []
        if data in PAPER_RESULTS:
            split, paper = PAPER_RESULTS[data]
            scores = (Score(*paper[protocol], runs=PAPER_RUNS) for protocol in PROTOCOLS)
            lines.append(Row("paper, Table 1", (split, None, *scores, PAPER_RUNS, None)))
        own = [row for row in rows if row["data"] == data]
        lines += [line for row in own for line in lines_of(row)]
        made.append(ResultTable(COLUMNS, tuple(lines), title=data, notes=tuple(protocols(own))))
    return made


def title_of(row: ResultRow) -> str:
    """The preset, behind the method's name where it is another's than the paper's."""
    if row["preset"] == "pixels":
        return "raw pixels"
    method = row.get("method", "vaesim")
    return f"`{row['preset']}`" if method == "vaesim" else f"{method} `{row['preset']}`"


def lines_of(row: ResultRow) -> list[Row]:
    """A line per scored set."""
    lines = []
    for split, values in sorted(row["splits"].items()):
        majority: Cell = Score(values["majority_rate"]) if "majority_rate" in values else None
        scores = (Score.of(values.get(protocol)) for protocol in PROTOCOLS)
        epochs = row.get("config", {}).get("epochs")
        cells = (split, majority, *scores, len(row["seeds"]), epochs)
        lines.append(Row(title_of(row), cells, row.get("protocol", {})))
    return lines


def protocols(rows: Sequence[ResultRow]) -> list[str]:
    """How the rows were scored, a sentence each."""
    return [
        f"Protocol of {title_of(row)}: "
        + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in row["protocol"].items())
        + "."
        for row in rows
        if row.get("protocol")
    ]


def recipe(values: Values, _paper: str) -> Recipe | None:
    """A method's preset, where it has it."""
    return Recipe(values["method"], values["preset"])


def folder(values: Values, seed: int) -> Path:
    """``vaesim-mnist-fair/seed-0``."""
    return Path(f"{values['method']}-{Path(values['data']).stem}-{values['preset']}") / f"seed-{seed}"


def main_scores(scores: Mapping[str, Any]) -> dict[str, Any]:
    """The three accuracies of Fig. 7."""
    names = {"statistical": "statistical", "knn": "kNN", "linear": "linear"}
    return {name: scores[key]["accuracy"] for key, name in names.items()}


TABLE = PaperTable(
    paper="vaesim",
    modules=METHODS,
    axes={
        "data": ("pneumoniamnist", "mnist"),
        "method": METHODS,
        "preset": ("fair", "paper", "official", "pixels"),
    },
    row_key=("data", "preset", "method"),
    defaults={"method": "vaesim"},
    identity=identity,
    runs=5,
    details=details,
    tables=tables,
    recipe=recipe,
    folder=folder,
    computed={"pixels": pixels},
    join=joined,
    main_scores=main_scores,
    sweep={  # Fig. 7, whose grids are not printed
        "latent_dim": (2, 4, 8, 16, 32, 64, 128),
        "num_prototypes": (5, 10, 20, 40, 80, 160),
        "batch_size": (64, 256, 512, 1024, 2048, 4096),
    },
    check=lambda config: VAESim(config, channels=1),
)
