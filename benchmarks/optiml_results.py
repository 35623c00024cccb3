# SPDX-License-Identifier: MIT
"""OPTiML and its baselines on one data set: runs them all, collects finished runs into one JSON, prints the README's tables.

python benchmarks/optiml_results.py run --data chest_nih --seeds 3 --out runs/chest_nih [--precision bf16] [--methods simclr byol]
python benchmarks/optiml_results.py collect runs/chest_nih/* --out benchmarks/results/optiml.json
python benchmarks/optiml_results.py table benchmarks/results/optiml.json

``run`` continues where it was stopped: finished seeds are passed over, a started one goes on from its checkpoint. A folder counts its
finished seeds only. Rows of the JSON that no folder replaces (same data, preset and method) stay.

The tables are sorted by the mean over label fractions, best first, whoever that is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from protokernels.baselines import BASELINES
from protokernels.papers import PAPERS
from protokernels.training import summarize_runs

METHODS = (*(name for name in PAPERS if name == "optiml"), *BASELINES)
TITLES = {
    ("labels", "probe"): "linear probe, one label per image",
    ("labels", "fine_tune"): "fine-tuning, one label per image",
    ("targets", "probe"): "linear probe, all findings",
    ("targets", "fine_tune"): "fine-tuning, all findings",
}
SEES_LABELS = "supervised"


def run(arguments: argparse.Namespace) -> int:
    """Every method in a process of its own; what fails is named at the end and does not stop the others."""
    failed = []
    for method in arguments.methods:
        words = [
            "train",
            method,
            "--data",
            arguments.data,
            "--preset",
            arguments.preset,
            "--out",
            str(arguments.out / method),
        ]
        words += ["--runs", str(arguments.seeds), "--precision", arguments.precision, "--resume", *arguments.options]
        print(f"protokernels {' '.join(words)}", flush=True)
        if subprocess.run([sys.executable, "-m", "protokernels", *words], check=False).returncode:
            failed.append(method)
    if failed:
        print(f"not finished: {', '.join(failed)}; run the same command again to continue", file=sys.stderr)
    return 1 if failed else 0


def finished_seeds(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Folder and results of every seed in a run folder that is complete."""
    files = sorted(folder.glob("seed-*/results.json")) or [folder / "results.json"]
    results = [(file.parent, json.loads(file.read_text())) for file in files if file.is_file()]
    return [(path, result) for path, result in results if result.get("complete") and "splits" in result]


def collect_run(folder: Path) -> dict[str, Any] | None:
    """One row; the method's name is the folder's where the configuration is not the preset's own (an ablation, a weight
    file)."""
    seeds = finished_seeds(folder)
    if not seeds:
        return None
    first = seeds[0][1]
    environments = [json.loads((path / "environment.json").read_text()) for path, _ in seeds]
    metrics = [
        (path / "metrics.jsonl").read_text().splitlines() if (path / "metrics.jsonl").exists() else []
        for path, _ in seeds
    ]
    return {
        "method": first["paper"] if folder.name in METHODS else folder.name,
        "paper": first["paper"],
        "data": first["config"]["data"],
        "preset": first["config"]["preset_name"],
        "config": first["config"],
        "protocol": first["protocol"],
        "precision": first["precision"],
        "seeds": [result["seed"] for _, result in seeds],
        "images": first["images"],
        "data_warnings": first["data_warnings"],
        "pretraining_seconds": [round(sum(json.loads(line)["seconds"] for line in lines), 1) for lines in metrics],
        "environment": environments[0],
        "commits": sorted({str(environment.get("commit")) for environment in environments}),
        "backends": sorted({str(environment.get("backend")) for environment in environments}),
        "splits": summarize_runs([result["splits"] for _, result in seeds]),
        "left_out": left_out(first["splits"]),
    }


def left_out(splits: dict[str, Any]) -> dict[str, list[str]]:
    """Set -> classes that have no area there, because all of its images have them, or none."""
    return {
        split: sorted(
            {
                name
                for ways in tasks.values()
                for rows in ways.values()
                for row in rows.values()
                for name in row["left_out"]
            }
        )
        for split, tasks in splits.items()
    }


def merged(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of ``before`` with those of ``now`` in their place or at the end."""
    return list({(row["data"], row["preset"], row["method"]): row for row in [*before, *now]}.values())


def cell(value: dict[str, Any] | None) -> str:
    if value is None:
        return ""
    return f"{value['mean']:.3f}" + (f" ± {value['std']:.3f}" if value["std"] is not None else "")


def ranking(rows: list[dict[str, Any]], split: str, task: str, way: str) -> list[str]:
    """One table: method x label fraction, best mean over the fractions first."""
    scored = [(row, row["splits"].get(split, {}).get(task, {}).get(way, {})) for row in rows]
    table = {row["method"]: (row, values) for row, values in scored if any("macro_auroc" in v for v in values.values())}
    if not table:
        return []
    fractions = list(dict.fromkeys(fraction for _, values in table.values() for fraction in values))

    def average(values: dict[str, Any]) -> float:
        return statistics.fmean(value["macro_auroc"]["mean"] for value in values.values() if "macro_auroc" in value)

    order = sorted(table, key=lambda method: -average(table[method][1]))
    images = [
        round(next(v[fraction]["images"]["mean"] for _, v in table.values() if fraction in v)) for fraction in fractions
    ]
    head = " | ".join(f"{fraction} ({count})" for fraction, count in zip(fractions, images, strict=True))
    lines = [
        f"\n**{split}: {TITLES[task, way]}**\n",
        f"| | {head} | mean | seeds | epochs |",
        "|---" * (len(fractions) + 4) + "|",
    ]
    for method in order:
        row, values = table[method]
        name = (
            f"**{method}**"
            if row["paper"] == "optiml"
            else method + (" (has seen all labels)" if method == SEES_LABELS else "")
        )
        cells = " | ".join(cell(values.get(fraction, {}).get("macro_auroc")) for fraction in fractions)
        lines.append(f"| {name} | {cells} | {average(values):.3f} | {len(row['seeds'])} | {row['config']['epochs']} |")
    return lines


def tables(rows: list[dict[str, Any]]) -> str:
    lines = []
    for data, preset in dict.fromkeys((row["data"], row["preset"]) for row in rows):
        group = [row for row in rows if (row["data"], row["preset"]) == (data, preset)]
        lines.append(f"\n### {data}, preset `{preset}`, macro AUROC")
        for split in dict.fromkeys(split for row in group for split in row["splits"]):
            for task, way in TITLES:
                lines += ranking(group, split, task, way)
            if missing := sorted({name for row in group for name in row["left_out"].get(split, [])}):
                lines.append(
                    f"\nLeft out of the mean in {split}, where no image has them or all: {', '.join(missing)}."
                )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    all_runs = commands.add_parser("run", help="further options go to `protokernels train`")
    all_runs.add_argument("--data", default="chest_nih")
    all_runs.add_argument("--preset", default="fair")
    all_runs.add_argument("--seeds", type=int, default=3)
    all_runs.add_argument("--precision", default="bf16")
    all_runs.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    all_runs.add_argument("--out", type=Path, required=True)
    collect = commands.add_parser("collect")
    collect.add_argument("folders", nargs="+", type=Path)
    collect.add_argument("--out", type=Path, required=True)
    commands.add_parser("table").add_argument("file", type=Path)
    arguments, rest = parser.parse_known_args()
    if arguments.command == "run":
        arguments.options = rest
        return run(arguments)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.command == "table":
        print(tables(json.loads(arguments.file.read_text())))
        return 0
    rows = [row for folder in arguments.folders if (row := collect_run(folder)) is not None]
    rows = merged(json.loads(arguments.out.read_text()) if arguments.out.exists() else [], rows)
    arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(tables(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
