# SPDX-License-Identifier: MIT
"""What others have published for VAESim's table: the paper's numbers for every method, and what its authors' own logs give.

M. Ferrante et al. 2023, Table 1. The logs are the table of runs that the authors have published beside their code; mean and standard
deviation are recomputed from it. The two differ: the paper's linear column on MNIST is not that of the logs, and on PneumoniaMNIST
VAESim is scored on validation and test together while the other methods are scored on the test set alone.
"""

from __future__ import annotations

from typing import NamedTuple

Accuracy = tuple[
    float, float | None
]  # mean and standard deviation; None where there is none, or runs that repeat each other
PAPER, LOGS = "paper, Table 1", "authors' logs"


class Published(NamedTuple):
    """One published row."""

    method: str  # the module that reproduces it
    source: str  # PAPER or LOGS
    split: str  # what it was scored on
    accuracies: dict[str, Accuracy]  # protocol -> accuracy
    runs: int | None = None


def _row(method: str, source: str, split: str, *values: Accuracy, runs: int | None = None) -> Published:
    return Published(method, source, split, dict(zip(("statistical", "knn", "linear"), values, strict=True)), runs)


PUBLISHED: dict[str, tuple[Published, ...]] = {
    "mnist": (
        _row("vae_kmeans", PAPER, "test", (0.68, 0.01), (0.80, 0.004), (0.68, 0.04), runs=10),
        _row("vae_kmeans", LOGS, "test", (0.683, 0.014), (0.802, 0.005), (0.761, 0.005), runs=10),
        _row("gmvae", PAPER, "test", (0.76, 0.01), (0.91, 0.001), (0.76, 0.01), runs=10),
        _row("gmvae", LOGS, "test", (0.762, None), (0.906, None), (0.909, None), runs=3),
        _row("vade", PAPER, "test", (0.81, 0.05), (0.964, 0.001), (0.83, 0.008), runs=10),
        _row("vade", LOGS, "test", (0.813, 0.054), (0.967, 0.002), (0.923, 0.008), runs=11),
        _row("vaesim", PAPER, "test", (0.83, 0.01), (0.970, 0.001), (0.81, 0.003), runs=10),
        _row("vaesim", LOGS, "test", (0.834, 0.008), (0.967, 0.001), (0.857, 0.003), runs=10),
        _row("vaesim", f"{PAPER}, augmented", "test", (0.40, None), (0.90, None), (0.72, None)),
        Published("resnet_transfer", PAPER, "test", {"supervised": (0.99, None)}),
    ),
    "pneumoniamnist": (
        _row("vae_kmeans", PAPER, "test", (0.631, 0.01), (0.613, 0.014), (0.451, 0.033), runs=10),
        _row("vae_kmeans", LOGS, "test", (0.631, None), (0.614, None), (0.449, None)),
        _row("gmvae", PAPER, "test", (0.625, 0.001), (0.627, 0.041), (0.429, 0.061), runs=10),
        _row("gmvae", LOGS, "test", (0.625, None), (0.627, None), (0.429, None)),
        _row("vade", PAPER, "test", (0.625, 0.001), (0.747, 0.012), (0.590, 0.116), runs=10),
        _row("vade", LOGS, "test", (0.625, None), (0.747, None), (0.590, None)),
        _row("vaesim", PAPER, "val+test", (0.677, 0.001), (0.778, 0.024), (0.671, 0.010), runs=10),
        _row("vaesim", LOGS, "val+test", (0.678, None), (0.776, None), (0.671, None)),
        Published("resnet_transfer", PAPER, "test", {"supervised": (0.85, None)}),
    ),
}


def paper_results(method: str) -> dict[str, tuple[str, dict[str, tuple[float, float]]]]:
    """The paper's rows of a method with deviations: data -> (split, protocol -> (mean, deviation)).

    >>> paper_results("vade")["mnist"][1]["knn"]
    (0.964, 0.001)
    """
    found = {}
    for data, rows in PUBLISHED.items():
        for row in rows:
            values = {key: (mean, std) for key, (mean, std) in row.accuracies.items() if std is not None}
            if row.method == method and row.source == PAPER and values:
                found[data] = (row.split, values)
    return found
