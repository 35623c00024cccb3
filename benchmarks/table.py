# SPDX-License-Identifier: MIT
"""Turns a results file into Markdown tables, losses included.

python benchmarks/table.py benchmarks/results/prototypes_cpu.json
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a file, it finds the other benchmarks

from benchmarks import results_file

Row = dict[str, Any]
HEADER = "| {case} | contender | median ms | min | quartiles | ours in the same rounds | times ours (minima) | of the limit |"


def milliseconds(value: float) -> str:
    """Three digits, whatever the size."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3f}" if value < 1 else f"{value:.3g}"


def line(row: Row, with_memory: bool = False) -> str:
    note = row.get("leaves_out") or row.get("others")
    name = row["contender"] + (f" ({note})" if note else "")
    is_ours = "limit_ms" in row or row["contender"] == "protokernels"
    against = f" ({row['against']})" if row.get("against", "protokernels") != "protokernels" else ""
    ratio = f"{row['ratio']:.3g} ({row['min_ms'] / row['ours']['min_ms']:.3g})"
    loses = row["ratio"] < 1 and not is_ours
    cells = [
        row["case"],
        f"**{name}**" if is_ours else name,
        milliseconds(row["median_ms"]),
        milliseconds(row["min_ms"]),
        f"{milliseconds(row['p25_ms'])} to {milliseconds(row['p75_ms'])}",
        "" if is_ours else milliseconds(row["ours"]["median_ms"]) + against,
        "" if is_ours else ratio + (" (we lose)" if loses else ""),
        f"{row['share_of_limit']:.0%} of {milliseconds(row['limit_ms'])} ms" if "limit_ms" in row else "",
    ]
    if with_memory:
        cells.append("" if row.get("peak_mb") is None else f"{row['peak_mb']:.0f}")
    return "| " + " | ".join(cells) + " |"


def slope(rows: Sequence[Row], key: str) -> float:
    """The slope of log time over log size by least squares: 1 is proportional growth."""
    return statistics.linear_regression(
        [math.log(row["size"]) for row in rows], [math.log(row[key]) for row in rows]
    ).slope


def sweep_notes(rows: Sequence[Row]) -> list[str]:
    """Slope of every contender, and the size from which ours is the faster one."""
    notes = []
    for contender in sorted({row["contender"] for row in rows}):
        own = sorted((row for row in rows if row["contender"] == contender), key=lambda row: row["size"])
        if len(own) < 2:
            continue
        note = f"{contender}: time grows as the {slope(own, 'median_ms'):.2f}th power of the size"
        if not any("limit_ms" in row for row in own):
            lost = [row["size"] for row in own if row["ratio"] < 1]
            note += f"; faster than ours at {', '.join(map(str, lost))}" if lost else "; ours is faster at every size"
        notes.append(f"- {note}.")
    return notes


def about_device(run: dict[str, Any]) -> str:
    device, sheet = run["device"], run["device"]["data_sheet"]
    named = ", ".join(f"{kind} {value:.4g}" for kind, value in (sheet or device["measured"]).items())
    return (
        f"{device['name']}, driver {device['driver']}, CUDA {device['cuda']}; ceilings "
        f"{'by data sheet' if sheet else 'measured'} in TFLOP/s and TB/s: {named}; measured: "
        + ", ".join(f"{kind} {value:.4g}" for kind, value in device["measured"].items())
    )


def about(name: str, run: dict[str, Any]) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
    if "device" in run:
        return f"- Run {name}: commit {run['commit']}, {about_device(run)}; {versions}."
    processor, ceilings = run["processor"], run["ceilings"]
    allocator = ", ".join(f"{name}={value}" for name, value in run["allocator"].items())
    return (
        f"- Run {name}: commit {run['commit']}, {processor['model']} ({processor['family_model_stepping']}), "
        f"{run['threads']} threads, load before {run['load_average'][0]}, kernels {run['library'].get('cpu_level')}, "
        + (f"peak {ceilings['peak_gflops']:.0f} GFLOP/s, " if "peak_gflops" in ceilings else "")
        + f"torch.mm {ceilings['mm_gflops']:.0f} GFLOP/s, copy {ceilings['copy_gb_per_s']:.1f} GB/s, "
        + f"allocator {allocator or 'as it is'}; {versions}."
    )


def table(results: dict[str, Any]) -> str:
    parts = []
    for what in dict.fromkeys(row["what"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["what"] == what]
        with_memory = "device" not in results["runs"].get(rows[0].get("run"), {}) and any(
            "peak_mb" in row for row in rows
        )
        parts += [
            f"### {what[:1].upper()}{what[1:]}",
            "",
            HEADER.format(case=rows[0].get("sizes", "rows x D x K")) + (" peak MB |" if with_memory else ""),
            "|---" * (9 if with_memory else 8) + "|",
        ]
        parts += [line(row, with_memory) for row in rows]
        if all("size" in row for row in rows):
            parts += ["", *sweep_notes(rows)]
        parts.append("")
    return "\n".join(parts + [about(name, run) for name, run in results["runs"].items()])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("results", type=Path, help="JSON file written by a benchmark with --results")
    path = parser.parse_args(arguments).results
    try:
        if not path.exists():
            raise results_file.ResultsError(f"there is no {path}")
        print(table(results_file.read(path)))
    except results_file.ResultsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
