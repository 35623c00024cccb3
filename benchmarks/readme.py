# SPDX-License-Identifier: MIT
"""Puts what is made of benchmarks/results into README.md and, where the rest stands, benchmarks/results/README.md: the papers' tables
(as `protokernels table`), the benchmarks' and the gallery.

python benchmarks/readme.py            # rewrites the tables, leaves the text
python benchmarks/readme.py --check    # ends with 1 and names the sections whose tables are not those of the results

A section's tables are replaced in their order; a table is a block of lines that begin with a bar, with or without a bold line above it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a file, it finds the other benchmarks

from benchmarks import communication, gallery, optimized_views_tables, paper_tables, pivots, streaming, trainer_steps
from benchmarks.pivots import RESULTS, Cells, held

ROOT = Path(__file__).resolve().parents[1]
SHORT, WHOLE = "README.md", "benchmarks/results/README.md"
BLOCK = re.compile(r"(?:^\*\*([^*\n]+)\*\*\n\n)?((?:^\|.*\|\n?)+)", flags=re.M)


class Place(NamedTuple):
    """A section ``### heading...`` below ``## part`` of a file."""

    file: str
    part: str
    heading: str  # how it begins


GALLERY = Place(SHORT, "Papers", "Gallery")
PAPERS = {  # beginning of the heading -> paper
    "VAESim": "vaesim",
    "Contrastive autoencoder": "contrastive_autoencoder",
    "Local contrast": "local_contrast",
    "Optimised views": "optimized_views",
    "Baselines": "optiml",  # beside which it stands
}
SWEEPS = {  # the file `sweep.json` of a sweep, kept; behind the paper's own tables
    "VAESim": "vaesim_sweep",
    "Local contrast": "local_contrast_sweep",
}
BENCHMARKS: dict[str, tuple[str, tuple[pivots.Pivot, ...]]] = {  # heading -> results, tables
    "Prototypes": ("prototypes_cpu", (pivots.PROTOTYPES,)),
    "Sinkhorn": ("sinkhorn_cpu", (pivots.SINKHORN_FORWARD, pivots.SINKHORN_BACKWARD)),
    "Contrastive": ("contrastive_cpu", (pivots.PIXELS, pivots.EMBEDDINGS, pivots.TWO_VIEWS)),
    "Image transformations": ("warp_cpu", (pivots.WARP,)),
    "Nearest neighbours and k-means": ("nearest_cpu", (pivots.NEAREST, pivots.KMEANS)),
}


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


def made_tables() -> dict[Place, list[tuple[str, Cells]]]:
    """Title and cells of the tables in every section that has some."""
    from protokernels.results import read_rows, rendered
    from protokernels.sweeps import sweep_tables
    from protokernels.tables import table_of

    def made_by(file: str, heading: str) -> list[tuple[str, Cells]]:
        text = rendered(table_of(PAPERS[heading]).tables(read_rows(RESULTS / f"{file}.json")), "markdown")
        return tables_in(text)

    own = {heading: made_by(paper, heading) for heading, paper in PAPERS.items()}
    dice = [table for table in own["Local contrast"] if table[0] == "test"]
    on_test = [table for table in own["Contrastive autoencoder"] if table[0].startswith("test ")]
    made = {
        Place(SHORT, "Papers", "VAESim"): [(title, paper_tables.vaesim_cells(cells)) for title, cells in own["VAESim"]],
        Place(SHORT, "Papers", "Contrastive autoencoder"): [
            (f"{data}, {title}", paper_tables.autoencoder_cells(cells))
            for data, (title, cells) in zip(("PneumoniaMNIST", "MNIST"), on_test, strict=True)
        ],
        Place(SHORT, "Papers", "Local contrast"): [("", paper_tables.dice_cells(dice))],
        Place(SHORT, "Papers", "Optimised views"): own["Optimised views"],
        Place(SHORT, "Papers", "Baselines"): own["Baselines"][:1],
        Place(WHOLE, "Papers", "VAESim"): own["VAESim"],
        Place(WHOLE, "Papers", "Contrastive autoencoder"): own["Contrastive autoencoder"],
        Place(WHOLE, "Papers", "Local contrast"): dice,
        Place(WHOLE, "Papers", "Optimised views"): [("", cells) for cells in optimized_views_tables.cells(held)],
        Place(WHOLE, "Papers", "Baselines"): own["Baselines"],
    }
    for heading, file in SWEEPS.items():
        tables = sweep_tables(held(file), table_of(PAPERS[heading]).main_scores)
        made[Place(WHOLE, "Papers", heading)] += tables_in(rendered(tables, "markdown"))
    for heading, (file, described) in BENCHMARKS.items():
        rows = held(file)["rows"]
        made[Place(WHOLE, "Benchmarks", heading)] = [("", pivot.cells(rows)) for pivot in described]
    cpu, gpu = held("cascade_lake")["rows"], held("h200_peers")["rows"]
    on_gpu = pivots.peer_cells(gpu, "ms on the device unless launched from Python")
    benchmarks = {
        (SHORT, "Kernels beside their peers"): [pivots.headline_cells(cpu, gpu)],
        (SHORT, "Training steps"): [trainer_steps.cells(held("trainer_steps")["fair"]["rows"])],
        (WHOLE, "Several processes"): [communication.cells(held("communication"))],
        (WHOLE, "Data larger than memory"): [streaming.cells(held("streaming")["rows"])],
        (WHOLE, "Where the goals come from"): [pivots.peer_cells(cpu, "ms on two cores")],
        (WHOLE, "On a GPU"): [on_gpu, pivots.gpu_cells()],
    }
    for (document, heading), tables in benchmarks.items():
        made[Place(document, "Benchmarks", heading)] = [("", cells) for cells in tables]
    return made


def section(text: str, place: Place) -> slice:
    """Where a section lies in its file's text.

    Raises:
        ValueError: there is none, or more than one.
    """
    start = text.index(f"\n## {place.part}\n")
    end = (text + "\n## ").index("\n## ", start + 4)
    found = [match.start() for match in re.finditer(rf"^### {re.escape(place.heading)}", text[start:end], flags=re.M)]
    if len(found) != 1:
        raise ValueError(f"{place.file}: wanted one section {place.heading!r} below {place.part!r}; found {len(found)}")
    start += found[0]
    return slice(start, min(end, (text + "\n### ").index("\n### ", start + 4)))


def replaced(file: str, text: str) -> str:
    """The text of a file with its tables made anew.

    Raises:
        ValueError: a section has another number of tables than it should; put the head of a table where a new one is to stand.
    """
    for place, tables in made_tables().items():
        if place.file != file:
            continue
        where = section(text, place)
        below = text[where]
        old = list(BLOCK.finditer(below))
        if len(old) != len(tables):
            raise ValueError(f"{file}: {place.heading!r} has {len(old)} tables, the results make {len(tables)}")
        for match, (_, cells) in zip(reversed(old), reversed(tables), strict=True):
            below = below[: match.start(2)] + as_markdown(cells) + below[match.end(2) :]
        text = text[: where.start] + below + text[where.stop :]
    if file != GALLERY.file:
        return text
    where = section(text, GALLERY)
    pictures = where.start + text[where].index("\n`protokernels train ")
    return text[: pictures + 1] + gallery.as_markdown() + text[where.stop :]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="change nothing; end with 1 where something differs")
    options = parser.parse_args(arguments)
    texts = {file: (ROOT / file).read_text() for file in (SHORT, WHOLE)}
    if not options.check:
        for file, text in texts.items():
            (ROOT / file).write_text(replaced(file, text))
        return 0
    stale = []
    for place, tables in made_tables().items():
        text = texts[place.file]
        if [cells for _, cells in tables_in(text[section(text, place)])] != [cells for _, cells in tables]:
            stale.append(place)
    if gallery.as_markdown() not in texts[GALLERY.file]:
        stale.append(GALLERY)
    for place in stale:
        print(f"{place.file}: what is below {place.heading!r} is not made of benchmarks/results")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
