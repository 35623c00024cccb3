# SPDX-License-Identifier: MIT
"""The tables of the optimised views that `protokernels table` does not make: ablations beside the paper's numbers, which are of other
images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from protokernels.papers._optimized_views_config import ABLATIONS, PAPER_ORDERS, PAPER_RESULTS, STRATEGIES
from protokernels.results import Score, read_rows

RESULTS = Path(__file__).resolve().parent / "results" / "optimized_views.json"
Held = Callable[[str], dict[str, Any]]
Cells = list[list[str]]


def cells(held: Held) -> list[Cells]:
    """Both tables; ``held`` reads a file of results by its name."""
    return [table("alpha_0 ... alpha_4", alphas(held)), table("order", orders(held))]


def table(what: str, lines: Iterable[tuple[str, str, dict[str, Any], tuple[float, float]]]) -> Cells:
    """A line for every strategy, what it was run with, its results and the paper's."""
    made = [["strategy", what, "hold-out, 3-fold", "paper (BraTS)", "probe, 10%", "probe, 100%", "seeds"]]
    for strategy, name, entry, published in lines:
        scores = entry["splits"]["test"]
        probes = [Score.of(scores["probe"][fraction]["macro_auroc"]) for fraction in ("10%", "100%")]
        found = [Score.of(scores["hold_out"]["auc"]), Score(*published), *probes, len(entry["seeds"])]
        made.append([strategy, name, *map(str, found)])
    return made


def own_rows(data: str) -> dict[str, dict[str, Any]]:
    """The rows of the paper's main table on these data, by strategy."""
    return {row["strategy"]: row for row in read_rows(RESULTS) if row["data"] == data}


def alphas(held: Held) -> Iterable[tuple[str, str, dict[str, Any], tuple[float, float]]]:
    """Eq. 1 under the weights of Table 2."""
    kept = held("optimized_views_alphas")
    rows = own_rows(kept["data"])
    name_of = {(change.get("strategy"), change.get("alphas")): name for name, change in ABLATIONS.items()}
    for strategy, by_alphas in PAPER_RESULTS["brats"].items():
        for weights, published in by_alphas.items():
            usual = weights == STRATEGIES[strategy].alphas
            entry = rows[strategy] if usual else kept["ablations"][name_of[strategy, weights]]
            yield strategy, ", ".join(f"{alpha:g}" for alpha in weights), entry, published


def orders(held: Held) -> Iterable[tuple[str, str, dict[str, Any], tuple[float, float]]]:
    """The transformations in the usual order, and reversed."""
    kept = held("optimized_views_orders")
    rows = own_rows(kept["data"])
    for strategy, (usual, other) in PAPER_ORDERS.items():
        yield strategy, "usual", rows[strategy], usual
        name = "simclr-order-reversed" if strategy == "simclr" else "M-order-reversed"
        yield strategy, "reversed", kept["ablations"][name], other
