# SPDX-License-Identifier: MIT
"""Puts into README.md what is made of benchmarks/results: the papers' tables (as `protokernels table`), the benchmarks' and the gallery.

python benchmarks/readme.py            # rewrites the tables, leaves the text
python benchmarks/readme.py --check    # ends with 1 and names the sections whose tables are not those of the results

A section's tables are replaced in their order; a table is a block of lines that begin with a bar, with or without a bold line above it.
What a table of benchmarks holds is described below: a row for every case, a column for every contender.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a file, it finds the other benchmarks

from benchmarks import communication, gallery, optimized_views_tables, streaming, trainer_steps
from benchmarks.table import milliseconds

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OURS = "protokernels"
GALLERY = ("Papers", "Gallery")
BLOCK = re.compile(r"(?:^\*\*([^*\n]+)\*\*\n\n)?((?:^\|.*\|\n?)+)", flags=re.M)
Cells = list[list[str]]
Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """What one contender did in one kind of measurement."""

    title: str
    what: str  # kind of measurement, as in the results; {kind} stands for the table's kinds
    contender: str = OURS
    shows: Literal["time", "limit", "peer", "memory"] = "peer"

    def cell(self, row: Row | None) -> str:
        if row is None:
            return ""
        if self.shows == "memory":
            return f"{row['peak_mb']:.0f}" if row.get("peak_mb") is not None else ""
        time = milliseconds(row["median_ms"])
        if self.shows == "time":
            return time
        return f"{time} ({row['share_of_limit']:.0%})" if self.shows == "limit" else f"{time} ({times(row['ratio'])})"


@dataclass(frozen=True)
class Pivot:
    """Cases down, contenders across; cases in the order of the benchmark, as far as ours or a peer has a number."""

    title: str  # above the cases
    columns: tuple[Column, ...]
    kinds: tuple[str, ...] = ("",)
    without: str = ""  # cases that match this are left to the full tables
    words: Mapping[tuple[str, str], str] = field(default_factory=dict)  # (case, contender) -> why there is no time

    def cells(self, rows: Sequence[Row]) -> Cells:
        found = {(row["what"], row["case"], row["contender"]): row for row in rows}
        made = [[self.title, *(column.title for column in self.columns)]]
        for kind in self.kinds:
            whats = [column.what.format(kind=kind) for column in self.columns]
            order = {row["case"]: row["order"] for row in rows if row["what"] in whats}
            for case in sorted(order, key=lambda case: (order[case], case)):
                if self.without and re.search(self.without, case):
                    continue
                cells = [
                    column.cell(found.get((what, case, column.contender)))
                    or (self.words.get((case, column.contender), "") if column.shows == "peer" else "")
                    for what, column in zip(whats, self.columns, strict=True)
                ]
                if any(cells):
                    made.append([f"{kind}, {case}" if kind else case, *cells])
        return made


def times(ratio: float) -> str:
    """How many times ours: two digits, and enough of them beside 1."""
    digits = 0 if ratio >= 9.95 else 1 if ratio >= 1.15 else 2
    return f"{ratio:.{digits}f}x"


def both(what: str) -> str:
    return f"{what}, forward and backward"


PROTOTYPES = Pivot(
    "rows x D x K",
    (
        Column("ours (of the limit)", "step", shows="limit"),
        Column("torch", "step", "torch argmax + index_add"),
        Column("torch.compile", "step", "torch.compile of argmax + index_add"),
        Column("torch, sampled labels", "step", "torch multinomial + index_add"),
        Column("faiss KMeans iteration (no softmax)", "step", "faiss KMeans, one iteration"),
        Column("vector-quantize-pytorch (no softmax)", "step", "vector-quantize-pytorch"),
        Column("scikit-learn MiniBatchKMeans (no softmax)", "step", "scikit-learn MiniBatchKMeans"),
        Column("forward + backward: ours", "forward and backward", shows="limit"),
        Column("torch", "forward and backward", "torch"),
        Column("torch.compile", "forward and backward", "torch.compile"),
    ),
    without="tau",
)
SINKHORN_FORWARD = Pivot(
    "forward: problems x N x M, iterations",
    (
        Column("ours", "forward", shows="time"),
        Column("torch", "forward", "torch"),
        Column("OTT-JAX", "forward", "OTT-JAX"),
        Column("POT, log domain", "forward", "POT solve_batch, log domain"),
        Column("POT, scaling (no log domain)", "forward", "POT solve_batch, scaling"),
    ),
    without="^64x49x49, 50 it$",
)
SINKHORN_BACKWARD = Pivot(
    "forward + backward",
    (
        Column("value: ours", both("value"), shows="time"),
        Column("torch, envelope", both("value"), "torch, envelope"),
        Column("torch, unrolled", both("value"), "torch, unrolled"),
        Column("OTT-JAX", both("value"), "OTT-JAX"),
        Column("POT, envelope", both("value"), "POT solve_batch, envelope"),
        Column("plan: ours, unrolled", "gradient through the plan", shows="time"),
        Column("ours, implicit", "gradient through the plan", f"{OURS}, implicit", shows="time"),
        Column("torch, unrolled", "gradient through the plan", "torch, unrolled"),
        Column("OTT-JAX, implicit", "gradient through the plan", "OTT-JAX, implicit"),
        Column("POT, unrolled", "gradient through the plan", "POT solve_batch, unrolled"),
    ),
    without="^64x49x49, 50 it$",
)
SLOW_PEERS = ("torch", "torch.compile", "torch, block by block")
PIXELS = Pivot(
    "pixels: maps, way",
    (
        Column("ours (of the limit)", both("pixels"), shows="limit"),
        Column("torch", both("pixels"), "torch"),
        Column("torch.compile", both("pixels"), "torch.compile"),
        Column("loop of the released code", both("pixels"), "torch, block by block"),
        Column("peak MB: ours", both("pixels"), shows="memory"),
        Column("torch", both("pixels"), "torch", shows="memory"),
    ),
    words={
        **{("4x16x160x160, all pixels", peer): "42 GB a matrix" for peer in SLOW_PEERS},
        ("4x16x160x160, blocks of 16", "torch, block by block"): "NaN",
    },
)
EMBEDDINGS = Pivot(
    "embeddings",
    (
        Column("ours (of the limit)", both("embeddings"), shows="limit"),
        Column("torch", both("embeddings"), "torch"),
        Column("torch.compile", both("embeddings"), "torch.compile"),
        Column("pytorch-metric-learning", both("embeddings"), "pytorch-metric-learning"),
    ),
)
TWO_VIEWS = Pivot(
    "two views, both directions (`cross_view_loss`)",
    (
        Column("ours (of the limit)", both("two views"), shows="limit"),
        Column("torch", both("two views"), "torch"),
        Column("torch.compile", both("two views"), "torch.compile"),
    ),
)
WARP = Pivot(
    "forward + backward",
    (
        Column("ours (of the limit)", both("{kind}"), shows="limit"),
        Column("torch", both("{kind}"), "torch"),
        Column("kornia", both("{kind}"), "kornia"),
        Column("forward: ours", "{kind}, forward", shows="limit"),
        Column("torch", "{kind}, forward", "torch"),
        Column("kornia", "{kind}, forward", "kornia"),
        Column("peak MB: ours", both("{kind}"), shows="memory"),
        Column("torch", both("{kind}"), "torch", shows="memory"),
    ),
    kinds=("chain", "blur", "rotation"),
)
NEAREST = Pivot(
    "queries x rows x D, k",
    (
        Column("ours (of the limit)", "search", shows="limit"),
        Column("faiss, flat", "search", "faiss, flat"),
        Column("torch.mm + topk", "search", "torch.mm + topk"),
        Column("torch.cdist + topk", "search", "torch.cdist + topk"),
        Column("scikit-learn, brute force", "search", "scikit-learn, brute force"),
        Column("peak MB: ours", "search", shows="memory"),
        Column("faiss", "search", "faiss, flat", shows="memory"),
        Column("torch.mm", "search", "torch.mm + topk", shows="memory"),
    ),
)
KMEANS = Pivot(
    "k-means, Lloyd's iterations from one start",
    (
        Column("ours (of the limit)", "k-means", shows="limit"),
        Column("scikit-learn", "k-means", "scikit-learn"),
        Column("faiss", "k-means", "faiss"),
    ),
)
SWEEPS = {  # the file `sweep.json` of a sweep, kept; behind the paper's own tables
    "VAESim:": "vaesim_sweep",
    "Local contrast:": "local_contrast_sweep",
}
BENCHMARKS: dict[str, tuple[str, tuple[Pivot, ...]]] = {  # heading -> results, tables
    "Prototypes": ("prototypes_cpu", (PROTOTYPES,)),
    "Sinkhorn": ("sinkhorn_cpu", (SINKHORN_FORWARD, SINKHORN_BACKWARD)),
    "Contrastive": ("contrastive_cpu", (PIXELS, EMBEDDINGS, TWO_VIEWS)),
    "Image transformations": ("warp_cpu", (WARP,)),
    "Nearest neighbours and k-means": ("nearest_cpu", (NEAREST, KMEANS)),
}
PAPERS = {  # beginning of the heading -> paper, the titles of the tables that stand in the README (empty: all)
    "VAESim:": ("vaesim", ()),
    "Contrastive autoencoder:": ("contrastive_autoencoder", ("test",)),
    "Local contrast:": ("local_contrast", ("test",)),
    "Optimised views:": ("optimized_views", ()),
    "Baselines:": ("optiml", ()),  # beside which it stands
}


def held(file: str) -> dict[str, Any]:
    """What a file of results holds."""
    found: dict[str, Any] = json.loads((RESULTS / f"{file}.json").read_text())
    return found


def gpu_cells() -> Cells:
    """The cases that have a goal on a GPU: as the kernels arrived from the emulator, and now."""

    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"

    made = [["case, time in a CUDA graph (us)", "at first", "first day", "now", "goal", "now, launched from Python"]]
    for row in held("h200_targets")["rows"]:
        first, before, now, goal = row["first"] or {}, row["first_day"] or {}, row["now"], row["goal_us"]
        at_first = shown(first.get("graph_us")) or (f"{shown(first['eager_us'])} \\*" if first else "")
        goal = "" if goal is None else shown(goal)
        times_now = [shown(before.get("graph_us")), shown(now["graph_us"]), goal, shown(now["eager_us"])]
        made.append([row["case"], at_first, *times_now])
    return made


def peer_cells(rows: Sequence[Row], title: str) -> Cells:
    """What was timed beside peers: a line for each case and precision of ours, torch first among the peers."""
    ours = {(row["what"], row["case"], row["contender"]): row for row in rows if row["contender"].startswith(OURS)}
    lines: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        key = (row["what"], row["case"], row.get("against", OURS))
        if not row["contender"].startswith(OURS):
            lines.setdefault(key, []).append(row)
    made = [[title, "ours (of the limit)", "torch", "other peers"]]
    for what, case, name in sorted(lines, key=lambda key: (key[0], ours[key]["order"] if key in ours else 0, key)):
        own, peers = ours.get((what, case, name)), lines[what, case, name]
        column = Column("", what, shows="limit")
        mine = column.cell(own) if own else milliseconds(peers[0]["ours"]["median_ms"])
        texts: dict[bool, list[str]] = {True: [], False: []}
        for row in sorted(peers, key=lambda row: row["contender"]):
            text = f"{milliseconds(row['median_ms'])} ({times(row['ratio'])})"
            first, _, way = row["contender"].partition(", ")
            is_torch = first.split(" ")[0] == "torch"
            label = row["contender"]
            if is_torch:
                label = "" if way in ("bf16", "tf32") else way  # the precision stands in the title
            texts[is_torch].append(f"{label}: {text}" if label else text)
        title = f"{what.removesuffix(', in a CUDA graph')}: {case}{name.removeprefix(OURS)}"
        made.append([title, mine, "; ".join(texts[True]), "; ".join(texts[False])])
    return made


def tables_in(markdown: str) -> list[tuple[str, Cells]]:
    """The tables of a Markdown text, without the lines between head and body, each with the bold line above it."""
    found = []
    for match in BLOCK.finditer(markdown):
        lines = [line for line in match[2].splitlines() if not re.fullmatch(r"[|\- ]+", line)]
        found.append((match[1] or "", [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]))
    return found


def as_markdown(cells: Cells) -> str:
    head, *body = ["| " + " | ".join(line).replace("  ", " ") + " |" for line in cells]
    return "\n".join([head, "|" + "---|" * len(cells[0]), *body]) + "\n"


def made_tables() -> dict[tuple[str, str], list[tuple[str, Cells]]]:
    """(part of the README, beginning of the heading) -> title and cells of the tables in it."""
    from protokernels.results import read_rows, rendered
    from protokernels.sweeps import sweep_tables
    from protokernels.tables import table_of

    made: dict[tuple[str, str], list[tuple[str, Cells]]] = {}
    for heading, (paper, titles) in PAPERS.items():
        markdown = rendered(table_of(paper).tables(read_rows(RESULTS / f"{paper}.json")), "markdown")
        made["Papers", heading] = [
            (title, cells) for title, cells in tables_in(markdown) if not titles or title.split(" ")[0] in titles
        ]
    for heading, file in SWEEPS.items():
        markdown = rendered(sweep_tables(held(file), table_of(PAPERS[heading][0]).main_scores), "markdown")
        made["Papers", heading] += tables_in(markdown)
    made["Papers", "Optimised views:"] += [("", cells) for cells in optimized_views_tables.cells(held)]
    for heading, (file, pivots) in BENCHMARKS.items():
        rows = held(file)["rows"]
        made["Benchmarks", heading] = [("", pivot.cells(rows)) for pivot in pivots]
    made["Benchmarks", "Training steps"] = [("", trainer_steps.cells(held("trainer_steps")["fair"]["rows"]))]
    made["Benchmarks", "Several processes"] = [("", communication.cells(held("communication")))]
    made["Benchmarks", "Data larger than memory"] = [("", streaming.cells(held("streaming")["rows"]))]
    made["Benchmarks", "Where the goals come from"] = [
        ("", peer_cells(held("cascade_lake")["rows"], "ms on two cores"))
    ]
    peers = peer_cells(held("h200_peers")["rows"], "ms on the device unless launched from Python")
    made["Benchmarks", "On a GPU"] = [("", peers), ("", gpu_cells())]
    return made


def section(readme: str, part: str, heading: str) -> slice:
    """Where the section that begins with ``### heading`` lies in ``## part``.

    Raises:
        ValueError: there is none, or more than one.
    """
    start = readme.index(f"\n## {part}\n")
    end = (readme + "\n## ").index("\n## ", start + 4)
    found = [match.start() for match in re.finditer(rf"^### {re.escape(heading)}", readme[start:end], flags=re.M)]
    if len(found) != 1:
        raise ValueError(f"README.md: wanted one section {heading!r} below {part!r}; found {len(found)}")
    start += found[0]
    return slice(start, min(end, (readme + "\n### ").index("\n### ", start + 4)))


def replaced(readme: str) -> str:
    """The README with its tables made anew.

    Raises:
        ValueError: a section has another number of tables than it should; put the head of a table where a new one is to stand.
    """
    for (part, heading), tables in made_tables().items():
        place = section(readme, part, heading)
        text = readme[place]
        old = list(BLOCK.finditer(text))
        if len(old) != len(tables):
            raise ValueError(f"README.md: {heading!r} has {len(old)} tables, the results make {len(tables)}")
        for match, (_, cells) in zip(reversed(old), reversed(tables), strict=True):
            text = text[: match.start(2)] + as_markdown(cells) + text[match.end(2) :]
        readme = readme[: place.start] + text + readme[place.stop :]
    place = section(readme, *GALLERY)
    pictures = place.start + readme[place].index("\n`protokernels train ")
    return readme[: pictures + 1] + gallery.as_markdown() + readme[place.stop :]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="change nothing; end with 1 where something differs")
    options = parser.parse_args(arguments)
    path = ROOT / "README.md"
    before = path.read_text()
    if not options.check:
        path.write_text(replaced(before))
        return 0
    stale = [
        heading
        for (part, heading), tables in made_tables().items()
        if [cells for _, cells in tables_in(before[section(before, part, heading)])] != [cells for _, cells in tables]
    ]
    if gallery.as_markdown() not in before:
        stale.append(GALLERY[1])
    for heading in stale:
        print(f"README.md: what is below {heading!r} is not made of benchmarks/results")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
