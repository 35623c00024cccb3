# SPDX-License-Identifier: MIT
"""Ruppli et al. 2022 on one data set: runs all strategies, collects finished runs into one JSON, prints the README's tables, draws
the strategies side by side.

python benchmarks/optimized_views_results.py run --data brain_tumor --seeds 3 --out runs/brain [--strategies simclr random]
python benchmarks/optimized_views_results.py collect runs/brain/* --out benchmarks/results/optimized_views.json
python benchmarks/optimized_views_results.py table benchmarks/results/optimized_views.json
python benchmarks/optimized_views_results.py figures runs/brain/* --out runs/brain-figures

A seed is a draw of labels, of initial weights and of everything else. ``run`` makes all strategies of one seed before the next, and
continues where it was stopped: what is finished is passed over, a started run goes on from its checkpoint. Further options go to
``protokernels train``. Rows of the JSON that no folder replaces (same data, preset and name) stay.

The tables are sorted by the paper's linear evaluation, best first, whichever that is. A difference between two strategies is taken seed
by seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from protokernels.figures import save_figure
from protokernels.papers import optimized_views as paper
from protokernels.training import summarize_runs

FIRST = ("self-supervised+supervision", "random+supervision", "simclr")
STRATEGIES = (*FIRST, *(name for name in paper.STRATEGIES if name not in FIRST))
OURS = FIRST[0]
RIVALS = (*FIRST[1:], "supervised", "supervised-all")


def run(arguments: argparse.Namespace) -> int:
    """Every run in a process of its own; what fails is named at the end and does not stop the others."""
    failed = []
    for seed in range(arguments.seeds):
        for strategy in arguments.strategies:
            folder = arguments.out / strategy / f"seed-{seed}"
            words = ["train", "optimized-views", "--data", arguments.data, "--preset", arguments.preset]
            words += ["--strategy", strategy, "--seed", str(seed), "--out", str(folder), "--resume", *arguments.options]
            if (finished := finished_seeds(folder)) and finished[0][1]["config"]["strategy"] == strategy:
                continue
            print(f"protokernels {' '.join(words)}", flush=True)
            if subprocess.run([sys.executable, "-m", "protokernels", *words], check=False).returncode:
                failed.append(f"{strategy}, seed {seed}")
    if failed:
        print(f"not finished: {'; '.join(failed)}; run the same command again to continue", file=sys.stderr)
    return 1 if failed else 0


def finished_seeds(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Folder and results of every seed in a folder that is complete."""
    files = sorted(folder.glob("seed-*/results.json")) or [folder / "results.json"]
    results = [(file.parent, json.loads(file.read_text())) for file in files if file.is_file()]
    return [(path, result) for path, result in results if result.get("complete") and "splits" in result]


def collect_run(folder: Path) -> dict[str, Any] | None:
    """One row; named by its folder."""
    seeds = finished_seeds(folder)
    if not seeds:
        return None
    first = seeds[0][1]
    for _, result in seeds[1:]:
        if result["config"] != first["config"]:
            raise ValueError(f"{folder} holds runs of different configurations; keep each in a folder of its own")
    environments = [json.loads((path / "environment.json").read_text()) for path, _ in seeds]
    metrics = [[json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path, _ in seeds]
    split = next(iter(first["splits"]))
    return {
        "name": folder.name,
        "strategy": first["config"]["strategy"],
        "data": first["config"]["data"],
        "preset": first["config"]["preset_name"],
        "config": first["config"],
        "protocol": first["protocol"],
        "precision": first["precision"],
        "seeds": [result["seed"] for _, result in seeds],
        "images": first["images"],
        "data_warnings": first["data_warnings"],
        "pretraining_seconds": [round(sum(line["seconds"] for line in lines), 1) for lines in metrics],
        "environment": environments[0],
        "commits": sorted({str(environment.get("commit")) for environment in environments}),
        "backends": sorted({str(environment.get("backend")) for environment in environments}),
        "splits": summarize_runs([result["splits"] for _, result in seeds]),
        "by_seed": {str(result["seed"]): result["splits"][split]["hold_out"].get("auc") for _, result in seeds},
        "curves": [[[line["epoch"], line["auc"]] for line in lines if "auc" in line] for lines in metrics],
    }


def merged(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of ``before`` with those of ``now`` in their place or at the end."""
    return list({(row["data"], row["preset"], row["name"]): row for row in [*before, *now]}.values())


def cell(value: dict[str, Any] | None) -> str:
    if not value:
        return ""
    return f"{value['mean']:.3f}" + (f" ± {value['std']:.3f}" if value["std"] is not None else "")


def differences(rows: list[dict[str, Any]]) -> list[str]:
    """The paper's method against the others, seed by seed."""
    by_name = {row["name"]: row["by_seed"] for row in rows}
    lines = []
    for rival in RIVALS:
        ours, theirs = by_name.get(OURS, {}), by_name.get(rival, {})
        seeds = sorted(seed for seed in ours.keys() & theirs.keys() if None not in (ours[seed], theirs[seed]))
        if seeds:
            values = [ours[seed] - theirs[seed] for seed in seeds]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            each = ", ".join(f"{value:+.3f}" for value in values)
            lines.append(f"- {OURS} minus {rival}: {statistics.fmean(values):+.3f}{spread} (by seed: {each})")
    return lines


def tables(rows: list[dict[str, Any]]) -> str:
    lines = []
    for data, preset in dict.fromkeys((row["data"], row["preset"]) for row in rows):
        group = [row for row in rows if (row["data"], row["preset"]) == (data, preset)]
        for split in dict.fromkeys(split for row in group for split in row["splits"]):
            scored = [row for row in group if row["splits"].get(split, {}).get("hold_out", {}).get("auc")]
            fractions = list(dict.fromkeys(fraction for row in scored for fraction in row["splits"][split]["probe"]))
            lines += [
                f"\n### {data}, preset `{preset}`, {split}: AUC\n",
                f"| strategy | labels | hold-out, 3-fold | {' | '.join(f'probe, {fraction}' for fraction in fractions)} | seeds | s |",
                "|---" * (len(fractions) + 5) + "|",
            ]
            for row in sorted(scored, key=lambda row: -row["splits"][split]["hold_out"]["auc"]["mean"]):
                scores = row["splits"][split]
                name = f"**{row['name']}**" if row["name"] == OURS else row["name"]
                probes = (cell(scores["probe"].get(fraction, {}).get("macro_auroc")) for fraction in fractions)
                seconds = statistics.fmean(row["pretraining_seconds"])
                lines.append(
                    f"| {name} | {row['images']['labelled']} | {cell(scores['hold_out']['auc'])} | {' | '.join(probes)} | "
                    f"{len(row['seeds'])} | {seconds:.0f} |"
                )
            if scored:
                untrained = scored[0]["splits"][split]["untrained"].get("auc")
                lines.append(
                    f"\nUntrained encoder, hold-out: {cell(untrained)}. Seconds of training on the clock, mean over seeds."
                )
            lines += ["", *differences(scored)]
    return "\n".join(lines)


def draw(folders: list[Path], out: Path, data_root: Path | None) -> list[Path]:
    """AUC over epochs and transformed images of all strategies, side by side."""
    runs = {folder.name: path for folder in folders for path, _ in finished_seeds(folder)[:1]}
    results = {}
    for folder in folders:
        if seeds := finished_seeds(folder):
            results[folder.name] = {**seeds[0][1], "folders": [str(path) for path, _ in seeds]}
    if not results:
        raise SystemExit("no folder holds a finished run")
    paths = paper.draw_ablations(results, out)
    return [*paths, save_figure(paper.compare_views(runs, data_root=data_root), out / "figures" / "views.png")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    all_runs = commands.add_parser("run", help="further options go to `protokernels train`")
    all_runs.add_argument("--data", default="brain_tumor")
    all_runs.add_argument("--preset", default="fair")
    all_runs.add_argument("--seeds", type=int, default=3)
    all_runs.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    all_runs.add_argument("--out", type=Path, required=True)
    for name in ("collect", "figures"):
        command = commands.add_parser(name)
        command.add_argument("folders", nargs="+", type=Path)
        command.add_argument("--out", type=Path, required=True)
    command.add_argument("--data-root", type=Path)
    commands.add_parser("table").add_argument("file", type=Path)
    arguments, rest = parser.parse_known_args()
    if arguments.command == "run":
        arguments.options = rest
        return run(arguments)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.command == "table":
        print(tables(json.loads(arguments.file.read_text())))
    elif arguments.command == "figures":
        print(*draw(arguments.folders, arguments.out, arguments.data_root), sep="\n")
    else:
        rows = [row for folder in arguments.folders if (row := collect_run(folder)) is not None]
        rows = merged(json.loads(arguments.out.read_text()) if arguments.out.exists() else [], rows)
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
        print(tables(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
