# SPDX-License-Identifier: MIT
"""README's short tables of the papers: the published number and ours side by side. All rows and scores are in benchmarks/results/README.md.

They are made of the cells of the long tables, so that both say the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

Cells = list[list[str]]

CLUSTERED, LABELLED = ("statistical", "kNN", "linear"), ("supervised",)
VAESIM_LINES = (  # title, methods that are it, sets, scores
    ("VAESim", ("vaesim",), ("val+test", "test"), CLUSTERED),
    ("VAE + k-means", ("vae_kmeans",), ("test",), CLUSTERED),
    ("GMVAE", ("gmvae",), ("test",), CLUSTERED),
    ("VaDE", ("vade",), ("test",), CLUSTERED),
    ("ResNet50, all labels", ("resnet_transfer", "resnet50_random_init"), ("test",), LABELLED),
)
VAESIM_SOURCES = {  # what stands above a column -> the presets in it
    "paper": ("*paper, Table 1*",),
    "released code": ("`official`", "`pytorch`"),
    "`paper`": ("`paper`",),
    "`fair`": ("`fair`",),
}

AUTOENCODER_METHODS = ("statistical", "kNN on h", "linear on z", "kNN on z", "linear on h", "features+KM", "ResNet18")
AUTOENCODER_PRESETS = ("`paper`", "`official`", "`fair`", "`untrained`", "random weights")  # the last: a ResNet18's


def columns_of(cells: Cells, *wanted: str) -> Cells:
    """Some columns of a table, by what stands above them."""
    return [[line[cells[0].index(name)] for name in wanted] for line in cells]


def vaesim_cells(cells: Cells) -> Cells:
    """A line for every method, set and score, the paper's beside ours.

    VAESim is scored on the paper's set and on the test set, its baselines on the test set, as the paper scores them.
    """
    wanted = (*CLUSTERED, *LABELLED)
    held = {
        (method, preset, which, score): value
        for method, preset, which, *values in columns_of(cells, "method", "preset", "set", *wanted)
        for score, value in zip(wanted, values, strict=True)
        if value
    }
    made = [["", "set", "score", *VAESIM_SOURCES]]
    for title, methods, sets, scores in VAESIM_LINES:
        for which, score in product(sets, scores):
            line = [
                next((held[key] for key in product(methods, presets, [which], [score]) if key in held), "")
                for presets in VAESIM_SOURCES.values()
            ]
            if any(line[1:]):
                made.append([title, which, score, *line])
    for name, which, share in columns_of(cells, "method", "set", "statistical")[1:]:
        if name == "the larger class" and which != "val":
            made.append([name, which, "any", *(share for _ in VAESIM_SOURCES)])
    return made


def autoencoder_cells(cells: Cells) -> Cells:
    """The accuracy of every way to judge an encoder, the paper's beside that of every preset that has been run."""
    held = {tuple(name.rsplit(", ", 1)): accuracy for name, accuracy in columns_of(cells, "", "accuracy")[1:]}
    run = [preset for preset in AUTOENCODER_PRESETS if any(preset in key for key in held)]
    lines = [
        [method, held.get(("paper", method), ""), *(held.get((method, preset), "") for preset in run)]
        for method in AUTOENCODER_METHODS
    ]
    return [["accuracy", "paper", *run], *(line for line in lines if any(line[2:]))]


def dice_cells(tables: Sequence[tuple[str, Cells]]) -> Cells:
    """The Dice of every method on every data set and share of labels, the paper's beside them."""
    made = [["Dice", *(line[0] for line in tables[0][1][1:])]]
    for _, cells in tables:
        share, *body = columns_of(cells, cells[0][0], "Dice")
        if [line[0] for line in body] != made[0][1:]:
            raise ValueError(f"{share[0]}: other methods than in {tables[0][1][0][0]}, or in another order")
        made.append([share[0], *(line[1] for line in body)])
        published = [name for name in cells[0] if name.startswith("paper")]
        if published:
            made.append([f"*{published[0]}*", *(line[0] for line in columns_of(cells, *published)[1:])])
    return [list(line) for line in zip(*made, strict=True)]
