# SPDX-License-Identifier: MIT
"""Tables made of the benchmarks' JSON for Markdown: a row for every case, a column for every contender."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.table import milliseconds

RESULTS = Path(__file__).resolve().parent / "results"
OURS = "protokernels"
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
        Column("torch.compile", both("{kind}"), "torch.compile"),
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


def held(file: str) -> dict[str, Any]:
    """What a file of results holds."""
    found: dict[str, Any] = json.loads((RESULTS / f"{file}.json").read_text())
    return found


HEADLINES = (  # what it is called, kind of measurement, case: the same on both devices
    ("prototypes, update step: 65536 x 32, K = 10", "step", "65536x32x10"),
    ("prototypes, update step: 65536 x 128, K = 256", "step", "65536x128x256"),
    ("sinkhorn, 100 iterations: 64 of 49 x 49", "forward", "64x49x49, 100 it"),
    ("sinkhorn, 100 iterations: 16 of 196 x 196", "forward", "16x196x196, 100 it"),
    ("sinkhorn, 10 iterations: 4096 x 4096", "forward", "1x4096x4096, 10 it"),
    ("pixel contrast \\*: 4 x 16 x 160 x 160, blocks of 16", both("pixels"), "4x16x160x160, blocks of 16"),
    ("pixel contrast \\*: 4 x 16 x 160 x 160, stride 4", both("pixels"), "4x16x160x160, stride 4"),
    ("supervised contrast \\*: 8192 x 128", both("embeddings"), "8192x128"),
    ("blur, noise, crop, flips, rotation \\*: 32 x 1 x 128 x 128", both("chain"), "32x1x128x128"),
    ("rotation \\*: 32 x 1 x 128 x 128", both("rotation"), "32x1x128x128"),
    ("5 nearest of 10,000 rows: 60,000 x 32", "search", "60000x10000x32, k = 5"),
    (
        "k-means++ and 5 iterations of k-means: 60,000 x 32, K = 256",
        "k-means++ and k-means",
        "60000x32, K = 256, 5 iterations",
    ),
    ("k-means, 5 iterations from a given start: 60,000 x 32, K = 256", "k-means", "60000x32, K = 256, 5 iterations"),
)


def headline_cells(cpu: Sequence[Row], gpu: Sequence[Row]) -> Cells:
    """The case that speaks for each kernel, with the strongest way of torch and the strongest peer that is not torch."""

    def strongest(rows: Sequence[Row], what: str, case: str, torch: bool) -> str:
        peers = [
            row
            for row in rows
            if (row["what"], row["case"]) == (what, case)
            and not row["contender"].startswith(OURS)
            and row.get("against", OURS) == OURS
            and re.split("[ ,]", row["contender"])[0].startswith("torch") == torch
        ]
        if not peers:
            return ""
        best = min(peers, key=lambda row: row["ratio"])
        name = "" if re.match("torch(,|$)", best["contender"]) else f"{best['contender']}: "
        return f"{name}{milliseconds(best['median_ms'])} ({times(best['ratio'])})"

    made = [["ms", "two CPU cores: ours", "torch", "strongest other", "H200: ours", "torch"]]
    for label, what, case in HEADLINES:
        on_device = f"{what}, in a CUDA graph"
        line = [label]
        for rows, kind in ((cpu, what), (gpu, on_device)):
            own = [row for row in rows if (row["what"], row["case"], row["contender"]) == (kind, case, OURS)]
            line.append(milliseconds(own[0]["median_ms"]) if own else "")
            line.append(strongest(rows, kind, case, torch=True))
            if rows is cpu:
                line.append(strongest(rows, kind, case, torch=False))
        made.append(line)
    return made


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
