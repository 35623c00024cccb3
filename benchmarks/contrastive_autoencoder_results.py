# SPDX-License-Identifier: MIT
"""The contrastive autoencoder and its baselines on one data set: runs them all, collects finished runs into one JSON, prints Table 1.

python benchmarks/contrastive_autoencoder_results.py run --data pneumoniamnist --seeds 5 --out runs/cae-pneumoniamnist
python benchmarks/contrastive_autoencoder_results.py collect runs/cae-pneumoniamnist/* --out benchmarks/results/contrastive_autoencoder.json
python benchmarks/contrastive_autoencoder_results.py table benchmarks/results/contrastive_autoencoder.json

``run`` continues where it was stopped: finished seeds are passed over, a started one goes on from its checkpoint. A folder counts its
finished seeds only. Rows of the JSON that no folder replaces (same data and run) stay. ``--weights`` is a local file of ImageNet
weights for ResNet18; without one its rows say "random weights".
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from protokernels.papers.contrastive_autoencoder import PAPER_RESULTS
from protokernels.training import summarize_runs
from protokernels.training.classification_report import METHODS, digits

RUNS = {  # name -> the words behind `protokernels train`
    "fair": ["contrastive_autoencoder", "--preset", "fair"],
    "paper": ["contrastive_autoencoder", "--preset", "paper"],
    "official": ["contrastive_autoencoder", "--preset", "official"],
    "random_encoder": [  # the floor: phase 2 on an encoder that was never trained
        "contrastive_autoencoder", "--preset", "fair", "--epochs", "1", "--warmup-epochs", "0", "--ramp-epochs", "0",
    ],
    "resnet18_transfer": ["resnet18_transfer", "--preset", "paper"],
    "resnet18_kmeans": ["resnet18_kmeans", "--preset", "paper"],
}  # fmt: skip
SCORES = ("accuracy", "macro_precision", "macro_recall", "weighted_precision")  # the weighted recall is the accuracy


def run(arguments: argparse.Namespace) -> int:
    """Every run in a process of its own; what fails is named at the end and does not stop the others."""
    failed = []
    for name in arguments.only or RUNS:
        words = ["train", *RUNS[name], "--data", arguments.data, "--out", str(arguments.out / name)]
        words += ["--runs", str(arguments.seeds), "--precision", arguments.precision, "--resume"]
        if arguments.weights and name.startswith("resnet18"):
            words += ["--initial-weights", str(arguments.weights)]
        print(f"protokernels {' '.join(words)}", flush=True)
        if subprocess.run([sys.executable, "-m", "protokernels", *words], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"not finished: {', '.join(failed)}; run the same command again to continue", file=sys.stderr)
    return 1 if failed else 0


def finished_seeds(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Folder and results of every seed in a run folder that is complete."""
    files = sorted(folder.glob("seed-*/results.json")) or [folder / "results.json"]
    results = [(file.parent, json.loads(file.read_text())) for file in files if file.is_file()]
    return [(path, result) for path, result in results if result.get("complete") and "splits" in result]


def collect_run(folder: Path) -> dict[str, Any] | None:
    """One row of the JSON, named as the folder is."""
    seeds = finished_seeds(folder)
    if not seeds:
        return None
    first = seeds[0][1]
    environments = [json.loads((path / "environment.json").read_text()) for path, _ in seeds]
    return {
        "run": folder.name,
        "paper": first["paper"],
        "weights": first.get("weights"),
        "data": first["config"]["data"],
        "preset": first["config"]["preset_name"],
        "config": first["config"],
        "protocol": first["protocol"],
        "precision": first["precision"],
        "seeds": [result["seed"] for _, result in seeds],
        "seconds": [result["seconds_since_resume"] for _, result in seeds],
        "images": first["images"],
        "prototypes": [result.get("prototypes", {}).get("number") for _, result in seeds],
        "data_warnings": first["data_warnings"],
        "environment": environments[0],
        "commits": sorted({str(environment.get("commit")) for environment in environments}),
        "backends": sorted({str(environment.get("backend")) for environment in environments}),
        "splits": summarize_runs([result["splits"] for _, result in seeds]),
    }


def merged(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of ``before`` with those of ``now`` in their place or at the end."""
    return list({(row["data"], row["run"]): row for row in [*before, *now]}.values())


def cell(value: dict[str, Any]) -> str:
    return f"{value['mean']:.3f}" + (f" ± {value['std']:.3f}" if value["std"] is not None else "")


def title(row: dict[str, Any], method: str) -> str:
    if method == "majority":
        return METHODS[method]
    if row.get("weights"):
        return f"{METHODS[method]}, {row['weights']} weights"
    return f"`{row['run']}`, {METHODS[method]}"


def table(rows: list[dict[str, Any]]) -> str:
    """Table 1, one part per data set and scored set. The paper's numbers stand once, above ours."""
    lines = []
    for data in dict.fromkeys(row["data"] for row in rows):
        here = [row for row in rows if row["data"] == data]
        for split in dict.fromkeys(split for row in here for split in row["splits"]):
            images = here[0]["images"][split]
            lines += [
                f"\n**{data}, {split}** ({images} images)\n",
                "| | accuracy | precision | recall | precision, weighted | seeds | prototypes |",
                "|---|---|---|---|---|---|---|",
            ]
            for method, values in PAPER_RESULTS.get(data, {}).get(split, {}).items():
                numbers = " | ".join(digits(value) for value in values)
                lines.append(f"| paper, {METHODS[method]} | {numbers} | | 1 | |")
            constant = here[0]["splits"][split]["majority"]
            lines.append(f"| {METHODS['majority']} | {' | '.join(cell(constant[score]) for score in SCORES)} | | |")
            for row in here:
                scores = row["splits"].get(split, {})
                for method in (name for name in METHODS if name in scores and name != "majority"):
                    cells = " | ".join(cell(scores[method][score]) for score in SCORES)
                    found = sorted({number for number in row["prototypes"] if number})
                    number = "" if not found else str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"
                    shown = number if method in ("statistical", "resnet18_kmeans") else ""
                    lines.append(f"| {title(row, method)} | {cells} | {len(row['seeds'])} | {shown} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--data", default="pneumoniamnist")
    runs.add_argument("--seeds", type=int, default=5)
    runs.add_argument("--precision", default="fp32")
    runs.add_argument("--only", nargs="*", choices=RUNS, default=[])
    runs.add_argument("--weights", type=Path)
    runs.add_argument("--out", type=Path, required=True)
    collect = commands.add_parser("collect")
    collect.add_argument("folders", nargs="+", type=Path)
    collect.add_argument("--out", type=Path, required=True)
    commands.add_parser("table").add_argument("file", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "run":
        return run(arguments)
    if arguments.command == "table":
        print(table(json.loads(arguments.file.read_text())))
        return 0
    rows = [row for folder in arguments.folders if (row := collect_run(folder)) is not None]
    before = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    rows = merged(before, rows)
    arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
