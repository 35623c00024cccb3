# SPDX-License-Identifier: MIT
"""The README's gallery: figures of the five papers, drawn by one command each on the data sets that come with the package.

python benchmarks/gallery.py [--only vaesim ...] [--folder FOLDER]   # trains (minutes on two cores), draws, shrinks

Pictures go to benchmarks/results/gallery, at most 720 pixels wide and in 256 colours. Digits and phantoms only: nobody's images.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure


PICTURES = Path(__file__).resolve().parent / "results" / "gallery"
WIDTH, COLOURS = 720, 256


@dataclass(frozen=True)
class Shown:
    """A paper's run and those of its figures that are shown, each with what is to be seen."""

    paper: str  # as `protokernels train` takes it
    data: str
    figures: dict[str, str]
    make: Callable[[], Figure] | None = None  # of its only figure, where no run draws it

    @property
    def command(self) -> str:
        return f"protokernels train {self.paper}"

    def picture(self, figure: str) -> str:
        return f"{self.paper}-{figure.replace('_', '-')}.png"


def contours() -> Figure:
    """Slices of phantoms and what random parameters make of them, with the lesion's contour: what ``views.png`` of a run on BraTS shows."""
    from protokernels.data import Split, phantoms
    from protokernels.figures import labelled_rows
    from protokernels.papers._optimized_views_networks import OptimizedViews
    from protokernels.papers._optimized_views_scoring import example_views, examples
    from protokernels.papers.optimized_views import OptimizedViewsConfig

    volumes = phantoms.make(64)[:4]
    masks = np.concatenate([volume.label == phantoms.CLASSES.index("phantom lesion") for volume in volumes])
    images = np.concatenate([np.rint(255 * volume.image).astype(np.uint8) for volume in volumes])
    split = Split(images, masks.any(axis=(1, 2)).astype(np.int64), masks=masks)
    config = OptimizedViewsConfig.preset("fair", data="phantoms", strategy="simclr", image_size=64)
    _, x, shown = examples(split, config)
    generator = torch.Generator().manual_seed(0)
    rows = {"X": (x, shown), "X_M": example_views(OptimizedViews(config, 1), x, shown, generator)}
    return labelled_rows(
        [(name, images) for name, (images, _) in rows.items()],
        captions=["no lesion"] * 4 + ["lesion"] * 4,
        title="Phantoms, each transformation with probability 1/2: the lesion's contour",
        masks=[moved for _, moved in rows.values()],
    )


GALLERY = (
    Shown(
        "vaesim",
        "digits",
        {
            "tsne": "embeddings of the test images by label, and by cluster with the decoded prototypes",
            "prototypes": "decoded prototypes, with their most frequent class and the number of their members",
        },
    ),
    Shown(
        "contrastive-autoencoder",
        "digits",
        {
            "tsne_test": "true labels, clusters, and what the clusters say of the labels",
            "reconstructions": "test images, and what the decoder makes of their soft assignment",
        },
    ),
    Shown(
        "optiml",
        "digits",
        {
            "masses": "two views, the mass of each position, and the transport plan between them",
            "label_fractions_labels": "linear probe with 1 to 100 % of the labels",
            "grad_cam": "what in a test image speaks for its class, by Grad-CAM",
            "architecture": "networks and losses of the run, with the shapes that a forward pass has",
        },
    ),
    Shown(
        "local-contrast",
        "phantoms",
        {
            "overlays": "image, ground truth and segmentation, 20 % of the volumes labelled",
            "features": "features of pixels in the network after all three stages, by class",
            "architecture": "the network with the heads and losses of its three stages",
            "partners": "the pixels that an anchor meets in the local loss, in blocks and on a stride, and what they do to it",
        },
    ),
    Shown(
        "optimized-views",
        "digits",
        {
            "parameters": "the parameters that M chooses for the test images, epoch by epoch",
            "views": "images, and twice what M makes of them",
        },
    ),
    Shown(
        "optimized-views",
        "phantoms",
        {
            "contours": "where a data set has masks, as `brats` does, their contours go along with the images (random parameters)"
        },
        make=contours,
    ),
)


def shrink(source: Path, target: Path) -> None:
    """A figure as a small PNG: at most WIDTH pixels wide, COLOURS colours."""
    with Image.open(source) as opened:
        picture = opened.convert("RGB")
    if picture.width > WIDTH:
        picture = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS)
    target.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE).save(target, optimize=True)


def draw(shown: Shown, run: Path) -> None:
    """Trains if ``run`` lacks a figure that is shown, and puts those among the pictures."""
    figures = {name: run / "figures" / f"{name}.png" for name in shown.figures}
    if shown.make is not None:
        from protokernels.figures import save_figure

        for figure in figures.values():
            save_figure(shown.make(), figure)
    elif not all(figure.exists() for figure in figures.values()):
        subprocess.run(
            [sys.executable, "-m", *shown.command.split(), "--out", str(run), "--resume", "--quiet"], check=True
        )
    for name, figure in figures.items():
        picture = PICTURES / shown.picture(name)
        shrink(figure, picture)
        print(f"{picture}  {picture.stat().st_size // 1000} kB", flush=True)


def as_markdown() -> str:
    """The README's section below its heading: for every paper its command, its pictures in pairs, and what they show."""
    parts = []
    for shown in GALLERY:
        if shown.make is None:
            parts.append(f"`{shown.command}`")
        for pair in zip_longest(*[iter(shown.figures.items())] * 2):
            named = [item for item in pair if item is not None]
            pictures = [
                f"![{name} of {shown.paper} on {shown.data}](benchmarks/results/gallery/{shown.picture(name)})"
                for name, _ in named
            ]
            bar = "|" + "---|" * len(named)
            parts.append("\n".join([_line(pictures), bar, _line([caption for _, caption in named])]))
    return "\n\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    papers = list(dict.fromkeys(shown.paper for shown in GALLERY))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=papers, default=papers)
    parser.add_argument(
        "--folder",
        type=Path,
        help="for the runs, PAPER below it; finished ones are not trained again; default: a temporary one",
    )
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        for shown in GALLERY:
            if shown.paper in given.only:
                draw(shown, (given.folder or Path(temporary)) / shown.paper)
    return 0


if __name__ == "__main__":
    sys.exit(main())
