# SPDX-License-Identifier: MIT
"""Collects finished VAESim runs into one JSON, and prints it as the README's tables.

python benchmarks/vaesim_results.py collect runs/vaesim-* --pixels pneumoniamnist mnist --out benchmarks/results/vaesim.json
python benchmarks/vaesim_results.py table benchmarks/results/vaesim.json

A folder counts its finished seeds only. Rows of the JSON that no folder replaces (same data and preset) stay; with ``--add`` a folder's
seeds join those that the JSON has of the same configuration, so that they can be trained at different times.
``--pixels`` adds what kNN and a linear probe reach on the raw pixels, the floor under any embedding.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from protokernels.data import load_dataset, to_tensor
from protokernels.evaluation import classification_scores, knn_predict, linear_probe
from protokernels.papers.vaesim import PAPER_RESULTS

PROTOCOLS = ("statistical", "knn", "linear")


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
    row: dict[str, Any] = {
        protocol: summary([result["splits"][split][protocol]["accuracy"] for result in results])
        for protocol in PROTOCOLS
    }
    row["majority_rate"] = results[0]["splits"][split]["statistical"]["majority_rate"]
    return row


def collect_run(folder: Path) -> dict[str, Any] | None:
    results = finished_seeds(folder)
    if not results:
        return None
    first = results[0]
    environments = [json.loads(file.read_text()) for file in sorted(folder.rglob("environment.json"))]
    return {
        "data": first["config"]["data"],
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
        "splits": {split: accuracies(results, split) for split in first["splits"]},
    }


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
    rows = {(row["data"], row["preset"]): row for row in [*before, *now]}
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
    name = f"{now['data']} {now['preset']}"
    for key in ("config", "protocol", "images"):
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
            },
            "majority_rate": values["majority_rate"],
        }
    first = {"precisions": [before["precision"]], "processors": [str(before["environment"].get("cpu_capability"))]}
    ways = ("commits", "backends", "precisions", "processors")
    differences = {key: sorted({*before.get(key, first.get(key, [])), *now[key]}) for key in ways}
    return {**before, **differences, "seeds": before["seeds"] + now["seeds"], "splits": splits}


def cell(row: dict[str, Any], protocol: str) -> str:
    if protocol not in row:
        return ""
    std = row[protocol]["std"]
    return f"{row[protocol]['mean']:.3f}" + (f" ± {std:.3f}" if std is not None else "")


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for data in dict.fromkeys(row["data"] for row in rows):
        lines += [
            f"\n**{data}**\n",
            "| | set | majority | statistical | kNN | linear | seeds | epochs |",
            "|---|---|---|---|---|---|---|---|",
        ]
        if data in PAPER_RESULTS:
            split, paper = PAPER_RESULTS[data]
            values = " | ".join(f"{paper[protocol][0]:.3f} ± {paper[protocol][1]:.3f}" for protocol in PROTOCOLS)
            lines.append(f"| paper, Table 1 | {split} | | {values} | 10 | |")
        for row in (row for row in rows if row["data"] == data):
            name = "raw pixels" if row["preset"] == "pixels" else f"`{row['preset']}`"
            for split, values in sorted(row["splits"].items()):
                majority = f"{values['majority_rate']:.3f}" if "majority_rate" in values else ""
                cells = " | ".join(cell(values, protocol) for protocol in PROTOCOLS)
                epochs = row.get("config", {}).get("epochs", "")
                lines.append(f"| {name} | {split} | {majority} | {cells} | {len(row['seeds'])} | {epochs} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    collect = commands.add_parser("collect")
    collect.add_argument("folders", nargs="+", type=Path)
    collect.add_argument("--pixels", nargs="*", default=[])
    collect.add_argument("--add", action="store_true", help="to the seeds in the file, instead of replacing them")
    collect.add_argument("--out", type=Path, required=True)
    commands.add_parser("table").add_argument("file", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "table":
        print(table(json.loads(arguments.file.read_text())))
        return
    rows = [row for folder in arguments.folders if (row := collect_run(folder)) is not None]
    rows += [collect_pixels(name) for name in arguments.pixels]
    before = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    if arguments.add:
        known = {(row["data"], row["preset"]): row for row in before}
        rows = [joined(known[key], row) if (key := (row["data"], row["preset"])) in known else row for row in rows]
    rows = merged(before, rows)
    arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
