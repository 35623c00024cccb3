# SPDX-License-Identifier: MIT
"""The figures of the clustering baselines: latent space, decoded cluster centres, reconstructions, curves, and the elbow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..data import ImageDataset, to_tensor
from ..data.datasets import data_title
from ..evaluation import Representation, tsne_embedding
from ..training import RunFolder
from ..training.scoring import evaluation_splits
from .canvas import save_figure
from .curves import loss_curves
from .elbow import elbow_curve
from .embedding import embedding_pair
from .grids import image_grid, reconstruction_rows

if TYPE_CHECKING:
    from ..baselines.clustering import ClusteringBaseline

NO_CURVE = ("epoch", "seconds")


@torch.no_grad()
def draw(
    folder: Path, baseline: ClusteringBaseline, model: Any, config: Any, run: RunFolder, dataset: ImageDataset
) -> list[Path]:
    """Draws everything for the first scored set into ``folder`` and returns the paths."""
    name = f"{baseline.title(config)}, {config.preset_name}, {data_title(config.data)}"
    figures = {"losses": training_curves(run, name)}
    split_name, split = next(iter(evaluation_splits(dataset, config.selection)[1].items()))
    if model.generative:
        images = to_tensor(split.images[:10], size=config.image_size)
        title = f"{name}: reconstructions ({split_name})"
        figures["reconstructions"] = reconstruction_rows(images, model.reconstruct(images), title=title)
    clustering = baseline.clustering(model, dataset, config, run.config()["seed"], known=run.results())
    shown = clustering.represent(split, split_name)
    if shown.clusters is not None:
        decoded, names = model.decode(clustering.centers), dataset.class_names
        title = f"{name}: decoded cluster centres, with the most frequent class and number of members in {split_name}"
        figures["prototypes"] = _centers(decoded, shown, names, title)
        figures["tsne"] = _tsne(clustering.centers, decoded, shown, names, f"{name}: t-SNE of z ({split_name})")
    if "elbow" in clustering.results:
        figures["elbow"] = elbow_curve(**clustering.results["elbow"], title=f"{name}: KMeans on z (train)")
    return [save_figure(figure, folder / f"{key}.png") for key, figure in figures.items()]


def training_curves(run: RunFolder, name: str) -> Figure:
    """Everything that the metrics hold, over epochs."""
    metrics = run.metrics()
    curves = dict.fromkeys(key for line in metrics for key in line if key not in NO_CURVE)
    return loss_curves(metrics, list(curves), title=f"{name}: training")


def _centers(decoded: Tensor, shown: Representation, class_names: Sequence[str], title: str) -> Figure:
    assert shown.clusters is not None
    captions, empty = [], []
    for k in range(len(decoded)):
        members = shown.labels[shown.clusters == k]
        empty.append(len(members) == 0)
        captions.append(f"{class_names[int(members.mode().values)]} ({len(members)})" if len(members) else "empty")
    return image_grid(decoded, title=title, captions=captions, faded=empty)


def _tsne(centers: Tensor, decoded: Tensor, shown: Representation, class_names: Sequence[str], title: str) -> Figure:
    assert shown.clusters is not None
    joint = tsne_embedding(shown.embeddings, extra=centers)
    assert joint.extra_points is not None
    return embedding_pair(
        joint.points.numpy(),
        shown.labels[joint.indices].numpy(),
        shown.clusters[joint.indices].numpy(),
        title=title,
        class_names=class_names,
        prototype_points=joint.extra_points.numpy(),
        prototype_images=decoded,
    )
