# SPDX-License-Identifier: MIT
"""VAESim and its baselines on one data set: runs them, collects finished runs into one JSON, prints it as the README's tables.

python benchmarks/vaesim_results.py run --data pneumoniamnist --seeds 5 --out runs [--rows vaesim:fair vade:pytorch] [-- --precision bf16]
python benchmarks/vaesim_results.py collect runs/vaesim-* --pixels pneumoniamnist mnist --out benchmarks/results/vaesim.json
python benchmarks/vaesim_results.py table benchmarks/results/vaesim.json

``run`` continues where it was stopped: finished seeds are passed over, a started one goes on from its checkpoint.

A folder counts its finished seeds only. Rows of the JSON that no folder replaces (same data, method and preset) stay; with
``--add`` a folder's seeds join those that the JSON has of the same configuration, so that they can be trained at different times.
``--pixels`` adds what kNN and a linear probe reach on the raw pixels, the floor under any embedding.

In the tables every method stands below what its paper prints (Ferrante et al. 2023, Table 1) and what the authors' own logs give:
mean and deviation recomputed from the table of runs that they have published beside their code. Each set's larger class has a row of
its own, because some published accuracies are no more than that.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from protokernels.baselines import CLUSTERING_BASELINES
from protokernels.data import load_dataset, to_tensor
from protokernels.evaluation import classification_scores, knn_predict, linear_probe
from protokernels.papers._vaesim_published import PUBLISHED

PROTOCOLS = ("statistical", "knn", "linear")
SUPERVISED = "supervised"  # the accuracy of a network that has learned from labels
METHODS = ("vaesim", *CLUSTERING_BASELINES)
ROWS = tuple(
    (method, preset)
    for method, presets in (
        ("vaesim", ("official", "paper", "fair", "augmented")),
        ("vae_kmeans", ("official", "matched", "paper", "fair")),
        ("gmvae", ("paper", "fair")),
        ("vade", ("pytorch", "keras", "fair")),
        ("resnet_transfer", ("paper", "fair")),
    )
    for preset in presets
)
DEFAULT_ROWS = tuple(row for row in ROWS if row[1] == "fair")


def module(method: str) -> Any:
    """What has ``CONFIG`` and ``PAPER_RESULTS``."""
    if method == "vaesim":
        return importlib.import_module("protokernels.papers.vaesim")
    return importlib.import_module(f"protokernels.baselines.{method}").BASELINE


def run(data: str, rows: list[tuple[str, str]], seeds: int, out: Path, options: list[str]) -> int:
    """Every row in a process of its own; what fails is named at the end and does not stop the others."""
    failed = []
    for method, preset in rows:
        words = ["train", method, "--data", data, "--preset", preset, "--runs", str(seeds), "--resume"]
        words += ["--out", str(out / f"{method}-{Path(data).stem}-{preset}"), *options]
        print(f"protokernels {' '.join(words)}", flush=True)
        if subprocess.run([sys.executable, "-m", "protokernels", *words], check=False).returncode:
            failed.append(f"{method}:{preset}")
    if failed:
        print(f"not finished: {', '.join(failed)}; run the same command again to continue", file=sys.stderr)
    return 1 if failed else 0


def chosen_rows(words: list[str]) -> list[tuple[str, str]]:
    """``method:preset`` words as pairs; ``ValueError`` for one that there is not."""
    known = {f"{method}:{preset}": (method, preset) for method, preset in ROWS}
    if unknown := [word for word in words if word not in known]:
        raise ValueError(f"unknown rows {', '.join(unknown)}; expected some of {', '.join(known)}")
    return [known[word] for word in words]


def finished_seeds(folder: Path) -> list[dict[str, Any]]:
    """The results of every seed in a run folder that is complete."""
    files = sorted(folder.glob("seed-*/results.json")) or [folder / "results.json"]
    results = [json.loads(file.read_text()) for file in files if file.is_file()]
    return [result for result in results if result.get("complete", True) and "splits" in result]


def summary(values: list[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
    }


def accuracies(results: list[dict[str, Any]], split: str) -> dict[str, Any]:
    scores = [result["splits"][split] for result in results]
    row: dict[str, Any] = {
        protocol: summary([score[protocol]["accuracy"] for score in scores])
        for protocol in (*PROTOCOLS, SUPERVISED)
        if protocol in scores[0]
    }
    if "clustering" in scores[0]:
        row["clusters_used"] = summary([score["clustering"]["clusters_used"] for score in scores])
    row["majority_rate"] = scores[0]["knn"]["majority_rate"]
    return row


def method_of(result: dict[str, Any]) -> str:
    """The method's name; a network's says where its weights came from."""
    config = result["config"]
    if result["paper"] != "resnet_transfer":
        return str(result["paper"])
    return f"resnet{config['depth']}_{'imagenet' if config['initial_weights'] else 'random_init'}"


def collect_run(folder: Path) -> dict[str, Any] | None:
    results = finished_seeds(folder)
    if not results:
        return None
    first = results[0]
    environments = [json.loads(file.read_text()) for file in sorted(folder.rglob("environment.json"))]
    return {
        "data": first["config"]["data"],
        "method": method_of(first),
        "paper": first["paper"],
        "preset": first["config"]["preset_name"],
        "config": first["config"],
        "protocol": first["protocol"],
        "precision": first["precision"],
        "seeds": [result["seed"] for result in results],
        "images": first["images"],
        "data_warnings": first["data_warnings"],
        "environment": environments[0],
        "precisions": [first["precision"]],
        "processors": sorted({str(environment.get("cpu_capability")) for environment in environments}),
        "commits": sorted({str(environment.get("commit")) for environment in environments}),
        "backends": sorted({str(environment.get("backend")) for environment in environments}),
        "seconds": [result.get("seconds_since_resume") for result in results],
        "collapsed": [result["seed"] for result in results if result.get("collapsed")],
        **({"elbow": [result["elbow"] for result in results]} if "elbow" in first else {}),
        "splits": {split: accuracies(results, split) for split in first["splits"]},
    }


def key_of(row: dict[str, Any]) -> tuple[str, str, str]:
    """What tells rows apart; rows of older files are VAESim's."""
    return row["data"], row.get("method", "vaesim"), row["preset"]


def whole_config(row: dict[str, Any]) -> Any:
    """The configuration with the fields that did not exist when it was written."""
    return module(row.get("paper", "vaesim")).CONFIG.from_dict(row["config"])


def collect_pixels(name: str) -> dict[str, Any]:
    """kNN (k = 5) and the `fair` linear probe on the pixels themselves, at the size of the file."""
    dataset = load_dataset(name)
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
    return {"data": name, "preset": "pixels", "seeds": [0], "splits": splits}


def merged(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of ``before`` with those of ``now`` in their place or at the end."""
    rows = {key_of(row): row for row in [*before, *now]}
    return list(rows.values())


def values_of(entry: dict[str, Any], count: int) -> list[float]:
    """The accuracies of every seed; older files hold mean and standard deviation, which settle up to two of them."""
    if "values" in entry:
        return list(entry["values"])
    if count == 1:
        return [entry["mean"]]
    if count == 2:
        half = entry["std"] / math.sqrt(2)
        return [entry["mean"] - half, entry["mean"] + half]
    raise ValueError(f"the values of {count} seeds cannot be told from their mean and standard deviation")


def joined(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """One row of the seeds of two; ``ValueError`` if they are not of one configuration, or share a seed."""
    name = " ".join(key_of(now))
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
    lists = {key: before.get(key, []) + now[key] for key in ("seconds", "collapsed", "elbow") if key in now}
    return {**before, **differences, **lists, "seeds": before["seeds"] + now["seeds"], "splits": splits}


def cell(row: dict[str, Any], protocol: str) -> str:
    if protocol not in row:
        return ""
    std = row[protocol]["std"]
    return f"{row[protocol]['mean']:.3f}" + (f" ± {std:.3f}" if std is not None else "")


def published_lines(data: str, method: str) -> list[str]:
    """What the paper prints for a method, and what its authors' logs say."""
    lines = []
    for row in PUBLISHED.get(data, ()):
        if row.method == ("resnet_transfer" if method.startswith("resnet50") else method):
            scores = {key: {"mean": mean, "std": std} for key, (mean, std) in row.accuracies.items()}
            cells = " | ".join(cell(scores, protocol) for protocol in (*PROTOCOLS, SUPERVISED))
            lines.append(f"| {row.method} | *{row.source}* | {row.split} | | {cells} | | {row.runs or ''} | |")
    return lines


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for data in dict.fromkeys(row["data"] for row in rows):
        chosen = [row for row in rows if row["data"] == data]
        methods = [method for method in METHODS if method in {key_of(row)[1] for row in chosen}]
        methods += [method for method in dict.fromkeys(key_of(row)[1] for row in chosen) if method not in methods]
        lines += [
            f"\n**{data}**\n",
            "| method | preset | set | majority | statistical | kNN | linear | supervised | clusters | seeds | epochs |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        rates = {
            split: values["majority_rate"]
            for row in chosen
            for split, values in row["splits"].items()
            if "majority_rate" in values
        }
        lines += [
            f"| the larger class | | {split} | {rate:.3f} | {rate:.3f} | | | {rate:.3f} | | | |"
            for split, rate in sorted(rates.items())
        ]
        for method in methods:
            lines += published_lines(data, method)
            lines += [line for row in chosen if key_of(row)[1] == method for line in row_lines(row)]
    return "\n".join(lines)


def row_lines(row: dict[str, Any]) -> list[str]:
    """One line for every set."""
    pixels = row["preset"] == "pixels"
    name = "raw pixels" if pixels else key_of(row)[1]
    preset = "" if pixels else f"`{row['preset']}`"
    collapsed = f" (collapsed: {len(row['collapsed'])})" if row.get("collapsed") else ""
    lines = []
    for split, values in sorted(row["splits"].items()):
        majority = f"{values['majority_rate']:.3f}" if "majority_rate" in values else ""
        cells = " | ".join(cell(values, protocol) for protocol in (*PROTOCOLS, SUPERVISED))
        used = f"{values['clusters_used']['mean']:.1f}{collapsed}" if "clusters_used" in values else ""
        config = row.get("config", {})
        epochs = config.get("epochs", "")
        if config.get("pretraining_epochs"):
            epochs = f"{config['pretraining_epochs']} + {epochs}"
        lines.append(
            f"| {name} | {preset} | {split} | {majority} | {cells} | {used} | {len(row['seeds'])} | {epochs} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    collect = commands.add_parser("collect")
    collect.add_argument("folders", nargs="+", type=Path)
    collect.add_argument("--pixels", nargs="*", default=[])
    collect.add_argument("--add", action="store_true", help="to the seeds in the file, instead of replacing them")
    collect.add_argument("--out", type=Path, required=True)
    commands.add_parser("table").add_argument("file", type=Path)
    runner = commands.add_parser("run")
    runner.add_argument("--data", required=True)
    runner.add_argument("--rows", nargs="+", default=[":".join(row) for row in DEFAULT_ROWS], metavar="METHOD:PRESET")
    runner.add_argument("--seeds", type=int, default=5)
    runner.add_argument("--out", type=Path, required=True)
    runner.add_argument("options", nargs="*", help="of `protokernels train`, behind --")
    arguments = parser.parse_args()
    if arguments.command == "table":
        print(table(json.loads(arguments.file.read_text())))
        return
    if arguments.command == "run":
        rows = chosen_rows(arguments.rows)
        sys.exit(run(arguments.data, rows, arguments.seeds, arguments.out, arguments.options))
    rows = [row for folder in arguments.folders if (row := collect_run(folder)) is not None]
    rows += [collect_pixels(name) for name in arguments.pixels]
    before = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    if arguments.add:
        known = {key_of(row): row for row in before}
        rows = [joined(known[key], row) if (key := key_of(row)) in known else row for row in rows]
    rows = merged(before, rows)
    arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
