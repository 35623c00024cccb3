# SPDX-License-Identifier: MIT
"""The table of ``protokernels.papers.vaesim``: Table 1 with its baselines, on every set apart, with what raw pixels reach.

Every method stands below what its paper prints and what the authors' own logs give. Each set's larger class has a row of its own,
because some published accuracies are no more than that.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import load_dataset, to_tensor
from ..data.content import content_md5
from ..data.datasets import data_title
from ..evaluation import classification_scores, knn_predict, linear_probe
from ..results import Cell, FinishedRun, PaperTable, Recipe, ResultRow, ResultTable, Row, Score, Values
from ..results.fields import completed
from ..results.tables import literal
from ._vaesim_published import PUBLISHED
from .vaesim import VAESim, VAESimConfig

PROTOCOLS = ("statistical", "knn", "linear")
SUPERVISED = "supervised"  # the accuracy of a network that has learned from labels
COLUMNS = (
    "method",
    "preset",
    "set",
    "majority",
    *("statistical", "kNN", "linear"),
    SUPERVISED,
    "clusters",
    "seeds",
    "epochs",
)
PRESETS = {  # module -> its presets
    "vaesim": ("fair", "official", "paper", "augmented"),
    "vae_kmeans": ("fair", "official", "matched", "paper"),
    "gmvae": ("fair", "paper"),
    "vade": ("fair", "pytorch", "keras"),
    "resnet_transfer": ("fair", "paper"),
}
METHODS = tuple(PRESETS)


def identity(run: FinishedRun) -> Values:
    """Data, preset and method."""
    return {"data": run.config["data"], "preset": run.config["preset_name"], "method": method_of(run.results)}


def method_of(result: Mapping[str, Any]) -> str:
    """The method's name; a network's says where its weights came from."""
    config = result["config"]
    if result["paper"] != "resnet_transfer":
        return str(result["paper"])
    return f"resnet{config['depth']}_{'imagenet' if config['initial_weights'] else 'random_init'}"


def details(runs: Sequence[FinishedRun]) -> Values:
    """Accuracies with the value of every seed, in place of all the scores; what collapsed."""
    first = runs[0].results
    return {
        "paper": first["paper"],
        "images": first["images"],
        "processors": sorted({str(run.environment.get("cpu_capability")) for run in runs}),
        "seconds": [run.results.get("seconds_since_resume") for run in runs],
        "collapsed": [run.seed for run in runs if run.results.get("collapsed")],
        **({"elbow": [run.results["elbow"] for run in runs]} if "elbow" in first else {}),
        "splits": {split: accuracies([run.results for run in runs], split) for split in first["splits"]},
    }


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation and the values themselves."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "values": list(values)}


def accuracies(results: Sequence[Mapping[str, Any]], split: str) -> dict[str, Any]:
    """Protocol -> accuracies of all seeds; how many clusters are used; the rate of the larger class."""
    scores = [result["splits"][split] for result in results]
    row: dict[str, Any] = {
        protocol: summary([score[protocol]["accuracy"] for score in scores])
        for protocol in (*PROTOCOLS, SUPERVISED)
        if protocol in scores[0]
    }
    if "clusters_used" in scores[0].get("clustering", {}):
        row["clusters_used"] = summary([score["clustering"]["clusters_used"] for score in scores])
    row["majority_rate"] = scores[0]["knn"]["majority_rate"]
    return row


def pixels(data: str, data_root: Path | None, download: bool) -> ResultRow:
    """kNN (k = 5) and the `fair` linear probe on the pixels themselves, at the size of the file: the floor under any
    embedding."""
    dataset = load_dataset(data, data_root, download=download)
    x = {split: to_tensor(np.asarray(part.images), size=None).flatten(1) for split, part in dataset.splits.items()}
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
    return {"data": data, "preset": "pixels", "seeds": [0], "splits": splits, "content_md5": content_md5(dataset)}


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


def whole_config(row: ResultRow) -> dict[str, Any]:
    """The configuration with the fields that did not exist when it was written."""
    method = row.get("paper", "vaesim")
    kind = VAESimConfig if method == "vaesim" else import_module(f"protokernels.baselines.{method}").BASELINE.CONFIG
    return completed(kind, row["config"])


def joined(before: ResultRow, now: ResultRow) -> ResultRow:
    """One row of the seeds of two; ``ValueError`` if they are not of one configuration, or share a seed."""
    name = f"{now['data']} {now.get('method', 'vaesim')} {now['preset']}"
    for key in ("config", "protocol", "images"):
        same = whole_config(before) == whole_config(now) if key == "config" else before[key] == now[key]
        if not same:
            raise ValueError(f"{name}: {key} differs from that in the file: {before[key]} and {now[key]}")
    if shared := set(before["seeds"]) & set(now["seeds"]):
        raise ValueError(f"{name}: the file has seeds {sorted(shared)} already")
    splits = {}
    for split, values in now["splits"].items():
        old = before["splits"][split]
        splits[split] = {
            **{
                protocol: summary(values_of(old[protocol], len(before["seeds"])) + values[protocol]["values"])
                for protocol in (*PROTOCOLS, SUPERVISED, "clusters_used")
                if protocol in old and protocol in values
            },
            "majority_rate": values["majority_rate"],
        }
    first = {"precisions": [before["precision"]], "processors": [str(before["environment"].get("cpu_capability"))]}
    ways = ("commits", "backends", "precisions", "processors")
    differences = {key: sorted({*before.get(key, first.get(key, [])), *now[key]}) for key in ways}
    more = ("seconds", "collapsed", "elbow")
    lists: dict[str, Any] = {key: before.get(key, []) + now[key] for key in more if key in now}
    return {**before, **differences, **lists, "seeds": before["seeds"] + now["seeds"], "splits": splits}


def tables(rows: Sequence[ResultRow]) -> list[ResultTable]:
    """A table per data set: the larger class, then by method what was published, whether it has been run or not, and ours."""
    made = []
    for data in dict.fromkeys(row["data"] for row in rows):
        chosen = [row for row in rows if row["data"] == data]
        present = dict.fromkeys(row.get("method", "vaesim") for row in chosen)
        have = {published_name(method) for method in present}
        without = dict.fromkeys(row.method for row in PUBLISHED.get(data, ()) if row.method not in have)
        methods = sorted(
            [*present, *without], key=lambda name: METHODS.index(name) if name in METHODS else len(METHODS)
        )
        rates = {
            split: Score(values["majority_rate"])
            for row in chosen
            for split, values in row["splits"].items()
            if "majority_rate" in values
        }
        lines = [
            Row("the larger class", (None, split, rate, rate, None, None, rate, None, None, None))
            for split, rate in sorted(rates.items())
        ]
        for method in methods:
            own = [row for row in chosen if row.get("method", "vaesim") == method]
            lines += published_lines(data, method) + [line for row in own for line in lines_of(row)]
        made.append(ResultTable(COLUMNS, tuple(lines), title=literal(data), notes=tuple(protocols(chosen))))
    return made


def published_name(method: str) -> str:
    """The method under which a row of ours was published: of the ResNets the one of depth 50."""
    return "resnet_transfer" if method.startswith("resnet50") else method


def published_lines(data: str, method: str) -> list[Row]:
    """What the paper prints for a method, and what its authors' logs say."""
    lines = []
    for row in PUBLISHED.get(data, ()):
        if row.method == published_name(method):
            found = (row.accuracies.get(protocol) for protocol in (*PROTOCOLS, SUPERVISED))
            scores = (None if score is None else Score(*score, runs=row.runs) for score in found)
            lines.append(Row(row.method, (f"*{row.source}*", row.split, None, *scores, None, row.runs, None)))
    return lines


def lines_of(row: ResultRow) -> list[Row]:
    """A line per scored set."""
    pixels = row["preset"] == "pixels"
    name, preset = ("raw pixels", None) if pixels else (row.get("method", "vaesim"), f"`{row['preset']}`")
    collapsed = f" (collapsed: {len(row['collapsed'])})" if row.get("collapsed") else ""
    config = row.get("config", {})
    epochs: Cell = config.get("epochs")
    if config.get("pretraining_epochs"):
        epochs = f"{config['pretraining_epochs']} + {epochs}"
    lines = []
    for split, values in sorted(row["splits"].items()):
        majority = Score(values["majority_rate"]) if "majority_rate" in values else None
        scores = (Score.of(values.get(protocol)) for protocol in (*PROTOCOLS, SUPERVISED))
        used = f"{values['clusters_used']['mean']:.1f}{collapsed}" if "clusters_used" in values else None
        cells = (preset, split, majority, *scores, used, len(row["seeds"]), epochs)
        lines.append(Row(name, cells, row.get("protocol", {})))
    return lines


def protocols(rows: Sequence[ResultRow]) -> list[str]:
    """How the rows were scored, a sentence each."""
    return [
        f"Protocol of {row.get('method', 'vaesim')} `{row['preset']}`: "
        + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in row["protocol"].items())
        + "."
        for row in rows
        if row.get("protocol")
    ]


def recipe(values: Values, _paper: str) -> Recipe | None:
    """A method's preset, where it has it."""
    known = values["preset"] in PRESETS[values["paper"]]
    return Recipe(values["paper"], values["preset"]) if known else None


def folder(values: Values, seed: int) -> Path:
    """``vaesim-mnist-fair/seed-0``."""
    return Path(f"{values['paper']}-{data_title(values['data'])}-{values['preset']}") / f"seed-{seed}"


def main_scores(scores: Mapping[str, Any]) -> dict[str, Any]:
    """The three accuracies of Fig. 7."""
    names = {"statistical": "statistical", "knn": "kNN", "linear": "linear"}
    return {name: scores[key]["accuracy"] for key, name in names.items()}


TABLE = PaperTable(
    paper="vaesim",
    modules=METHODS,
    axes={
        "data": ("pneumoniamnist", "mnist"),
        "paper": METHODS,  # the module; a row's method also says where a network's weights came from
        "preset": (*dict.fromkeys(preset for presets in PRESETS.values() for preset in presets), "pixels"),
    },
    row_key=("data", "preset", "method"),
    defaults={"method": "vaesim", "paper": "vaesim"},
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
