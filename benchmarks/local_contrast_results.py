# SPDX-License-Identifier: MIT
"""Table 1 of Hu et al. 2021: runs it over folds, shares of labelled volumes and methods, collects finished runs into one JSON,
prints it beside the paper's, draws the methods side by side.

python benchmarks/local_contrast_results.py run --data hippocampus --folds 0 1 2 3 --labelled 0.05 0.1 0.2 --out runs/hippocampus
    [--methods random global+local-block] [--set width=8 fine_tune_steps=500]
python benchmarks/local_contrast_results.py collect runs/hippocampus --out benchmarks/results/local_contrast.json
python benchmarks/local_contrast_results.py table benchmarks/results/local_contrast.json
python benchmarks/local_contrast_results.py figures runs/hippocampus --labelled 0.05 --fold 0

``run`` continues where it was stopped: finished runs are passed over, a started one goes on from its checkpoint, a fold's global
stage is trained once. The same command may run several times at once: every run is done by one of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from protokernels.papers import local_contrast as paper
from protokernels.papers.local_contrast import METHODS, PAPER_RESULTS, LocalContrastConfig
from protokernels.training import RunFolder
from protokernels.training.files import exclusive
from protokernels.training.runs import RunSettings

SCORES = (
    ("pooled_dice", "Dice, pooled over the test set"),
    ("volume_dice", "Dice per volume"),
    ("hausdorff95", "HD95"),
)


def run(arguments: argparse.Namespace) -> int:
    """Every run of the table; what fails is named at the end and does not stop the others."""
    failed, busy, out = [], [], arguments.out
    out.mkdir(parents=True, exist_ok=True)
    for fold in arguments.folds:
        dataset = None
        for share in arguments.labelled:
            for method in arguments.methods:
                folder = run_folder(out, fold, share, method)
                config = LocalContrastConfig.preset(
                    arguments.preset,
                    data=arguments.data,
                    **{"method": method, "labelled": share, "fold": fold, **dict(arguments.set)},
                    stages=str(out / "stages"),
                )
                folder.parent.mkdir(parents=True, exist_ok=True)
                with exclusive(folder.with_name(f"{folder.name}.lock"), wait=False) as free:
                    if not free:
                        busy.append(str(folder))
                        continue
                    if is_finished(folder):
                        continue
                    print(folder, flush=True)
                    dataset = dataset or paper.load_volumes(config, arguments.data_root)
                    settings = RunSettings(seed=arguments.seed, resume=True, device=arguments.device)
                    try:
                        paper.train(config, folder, dataset=dataset, figures=False, settings=settings)
                    except FloatingPointError as error:  # diverged; a wrong configuration would stop all of them
                        print(f"{folder}: {error}", file=sys.stderr)
                        failed.append(str(folder))
    for words, folders in (("diverged", failed), ("left to another process", busy)):
        if folders:
            print(f"{words}: {', '.join(folders)}", file=sys.stderr)
    return 1 if failed else 0


def run_folder(out: Path, fold: int, share: float, method: str) -> Path:
    return out / f"fold-{fold}" / paper.percent(share) / method


def is_finished(folder: Path) -> bool:
    results = folder / "results.json"
    return results.is_file() and bool(json.loads(results.read_text()).get("complete"))


def collect(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """One row per finished run below the folders."""
    files = sorted({file for folder in folders for file in folder.glob("**/results.json")})
    return [row for file in files if (row := collect_run(file.parent)) is not None]


def collect_run(folder: Path) -> dict[str, Any] | None:
    results = json.loads((folder / "results.json").read_text())
    if not results.get("complete") or "seed" not in results:  # unfinished, or the summary over seeds
        return None
    environment = json.loads((folder / "environment.json").read_text())
    config = results["config"]
    return {
        "data": config["data"],
        "preset": config["preset_name"],
        "labelled": config["labelled"],
        "method": config["method"],
        "fold": config["fold"],
        "seed": results["seed"],
        "volumes": results["volumes"],
        "splits": {
            split: {key: scores[key] for key, _ in SCORES} | {"unit": scores["unit"]}
            for split, scores in results["splits"].items()
        },
        "stages": {
            name: {key: value for key, value in stage.items() if key != "folder"}
            for name, stage in results["stages"].items()
        },
        "config": config,
        "precision": results["precision"],
        "data_warnings": results["data_warnings"],
        "commit": environment.get("commit"),
        "backend": environment.get("backend"),
        "threads": environment.get("threads"),
    }


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("data", "preset", "labelled", "method", "fold", "seed"))


def merged(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of ``before`` with those of ``now`` in their place or at the end, in the order of the table."""
    rows = {key_of(row): row for row in [*before, *now]}.values()
    methods = list(METHODS)
    return sorted(rows, key=lambda row: (*key_of(row)[:3], methods.index(row["method"]), row["fold"], row["seed"]))


def spread(values: list[float], digits: int = 3) -> str:
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def scores_of(
    rows: list[dict[str, Any]], method: str, share: float, split: str, key: str
) -> dict[tuple[int, int], float]:
    """(fold, seed) -> score."""
    chosen = [row for row in rows if row["method"] == method and row["labelled"] == share and split in row["splits"]]
    values = {(row["fold"], row["seed"]): row["splits"][split][key]["mean"] for row in chosen}
    return {place: value for place, value in values.items() if value is not None}


def one_table(rows: list[dict[str, Any]], split: str, key: str, title: str) -> list[str]:
    """Methods x shares; pooled Dice beside the paper's, and beside Random's on the same folds."""
    shares = sorted({row["labelled"] for row in rows})
    published = PAPER_RESULTS.get(rows[0]["data"], {}) if (split, key) == ("test", "pooled_dice") else {}
    pooled = key == "pooled_dice"
    heads = []
    for share in shares:
        name = paper.percent(share)
        volumes = {row["volumes"]["labelled"] for row in rows if row["labelled"] == share}
        heads.append(f"{name} ({', '.join(map(str, sorted(volumes)))} volumes)")
        heads += [f"{name}, paper"] if name in published else []
        heads += [f"{name}, ours - Random"] if pooled else []
        heads.append("folds")
    lines = [f"\n**{split}: {title}**\n", f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for method, recipe in METHODS.items():
        cells = []
        for share in shares:
            name, ours = paper.percent(share), scores_of(rows, method, share, split, key)
            digits = 2 if key == "hausdorff95" else 3
            cells.append(spread(list(ours.values()), digits))
            if name in published:
                cells.append(f"{published[name][method]:.3f}")
            if pooled:
                random = scores_of(rows, "random", share, split, key)
                both = [ours[place] - random[place] for place in ours if place in random]
                cells.append("" if method == "random" else spread(both))
            cells.append(str(len(ours) or ""))
        if any(cells):
            lines.append(f"| {recipe.title} | {' | '.join(cells)} |")
    return lines


def budget(rows: list[dict[str, Any]]) -> str:
    """What the runs had, in one sentence per share of labelled volumes."""
    lines = []
    for share in sorted({row["labelled"] for row in rows}):
        chosen = [row for row in rows if row["labelled"] == share]
        parts = []
        for stage in ("global", "local", "fine_tune"):
            found = sorted(
                {(s["epochs"], s["steps"], s["batch_size"]) for row in chosen if (s := row["stages"].get(stage))}
            )
            if found:
                text = ", ".join(f"{epochs} epochs = {steps} steps of {batch}" for epochs, steps, batch in found)
                parts.append(f"{stage.replace('_', '-')}: {text}")
        lines.append(f"{paper.percent(share)} labelled: {'; '.join(parts)}.")
    config = rows[0]["config"]
    network = (
        f"U-Net of width {config['width']} and depth {config['depth']}, {config['image_size']} x {config['image_size']}"
    )
    return (
        f"\n{network}; weights of the {config['keep']} epoch"
        + (" by validation Dice. " if config["keep"] == "best" else ". ")
        + " ".join(lines)
    )


def tables(rows: list[dict[str, Any]]) -> str:
    lines = []
    for data, preset in dict.fromkeys((row["data"], row["preset"]) for row in rows):
        group = [row for row in rows if (row["data"], row["preset"]) == (data, preset)]
        lines.append(f"\n### {data}, preset `{preset}`: mean ± standard deviation over folds")
        lines.append(budget(group))
        for split in dict.fromkeys(split for row in group for split in row["splits"]):
            units = {row["splits"][split]["unit"] for row in group if split in row["splits"]}
            for key, title in SCORES:
                unit = f" ({', '.join(sorted(units))})" if key == "hausdorff95" else ""
                lines += one_table(group, split, key, title + unit)
        if warnings := sorted({warning for row in group for warning in row["data_warnings"]}):
            lines += ["", *(f"- {warning}" for warning in warnings)]
    return "\n".join(lines)


def figures(arguments: argparse.Namespace) -> int:
    """For one share: validation curves over all folds; for one fold, the methods side by side and the pixel features of each."""
    from protokernels.figures.local_contrast import draw_features, draw_predictions, draw_validation

    runs = {method: run_folder(arguments.folder, arguments.fold, arguments.labelled, method) for method in METHODS}
    loaded = {method: paper.load_segmenter(path) for method, path in runs.items() if is_finished(path)}
    if not loaded:
        print(f"no finished run below {arguments.folder} for this fold and share", file=sys.stderr)
        return 1
    config = next(iter(loaded.values()))[1]
    dataset = paper.load_volumes(config, arguments.data_root)
    volumes = dataset.val if config.selection else dataset.test
    title = f"{config.data}, {paper.percent(config.labelled)} labelled, fold {config.fold}"
    out, names = arguments.out or arguments.folder / "figures", dataset.class_names
    share = paper.percent(arguments.labelled)
    everyone = {
        recipe.title: [
            RunFolder(path) for path in sorted(arguments.folder.glob(f"fold-*/{share}/{method}")) if is_finished(path)
        ]
        for method, recipe in METHODS.items()
    }
    scored = {name: folders for name, folders in everyone.items() if folders}
    print(draw_validation(out / "validation.png", scored, title=f"{config.data}, {share} labelled"))
    models = {METHODS[method].title: model for method, (model, _) in loaded.items()}
    print(draw_predictions(out / "overlays.png", models, volumes, class_names=names, title=title))
    for method, (model, _) in loaded.items():
        path = out / f"features_{method}.png"
        text = f"{METHODS[method].title}, {title}"
        print(draw_features(path, model, volumes, class_names=names, title=text, seed=0))
    return 0


def setting(text: str) -> tuple[str, Any]:
    """``width=8`` as a name and a value."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    all_runs = commands.add_parser("run")
    all_runs.add_argument("--data", default="hippocampus")
    all_runs.add_argument("--data-root", type=Path)
    all_runs.add_argument("--preset", default="fair", choices=("paper", "official", "fair"))
    all_runs.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2, 3])
    all_runs.add_argument("--labelled", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    all_runs.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    all_runs.add_argument("--seed", type=int, default=0)
    all_runs.add_argument("--device", default="auto", choices=("auto", "cpu"))
    all_runs.add_argument(
        "--set", type=setting, nargs="+", default=[], help="other values of the configuration: name=value"
    )
    all_runs.add_argument("--out", type=Path, required=True)
    collector = commands.add_parser("collect")
    collector.add_argument("folders", nargs="+", type=Path)
    collector.add_argument("--out", type=Path, required=True)
    commands.add_parser("table").add_argument("file", type=Path)
    pictures = commands.add_parser("figures")
    pictures.add_argument("folder", type=Path)
    pictures.add_argument("--labelled", type=float, default=0.05)
    pictures.add_argument("--fold", type=int, default=0)
    pictures.add_argument("--data-root", type=Path)
    pictures.add_argument("--out", type=Path)
    arguments = parser.parse_args(words)
    if arguments.command == "run":
        return run(arguments)
    if arguments.command == "figures":
        return figures(arguments)
    if arguments.command == "table":
        print(tables(json.loads(arguments.file.read_text())))
        return 0
    rows = merged(json.loads(arguments.out.read_text()) if arguments.out.exists() else [], collect(arguments.folders))
    arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(tables(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
