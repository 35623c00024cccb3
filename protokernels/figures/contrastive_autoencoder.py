# SPDX-License-Identifier: MIT
"""The figures of the contrastive autoencoder (Ferrante et al. 2022): Fig. 2-4, and what a reader wants to see beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..data import ImageDataset, to_tensor
from ..data.datasets import data_title
from ..evaluation import statistical_mapping, tsne_embedding
from ..papers._contrastive_autoencoder_scoring import Embeddings, represent, subset
from ..training import RunFolder, derived_generator
from ..training.scoring import evaluation_splits
from .canvas import save_figure
from .curves import loss_curves
from .diagram import Box, Shapes, diagram
from .elbow import elbow_curve
from .embedding import embedding_triptych
from .grids import image_grid, labelled_rows, of_each_class

if TYPE_CHECKING:
    from ..papers.contrastive_autoencoder import ContrastiveAutoencoder, ContrastiveAutoencoderConfig

_CURVES = ("contrastive", "reconstruction", "view_similarity", "prototypes_per_image", "next_learning_rate")
_IMAGES = 10


@torch.no_grad()
def draw(
    folder: Path,
    model: ContrastiveAutoencoder,
    config: ContrastiveAutoencoderConfig,
    run: RunFolder,
    dataset: ImageDataset,
) -> list[Path]:
    """Draws everything into ``folder`` and returns the paths. What belongs to the clusters is left out before the second phase."""
    name = f"Contrastive autoencoder, {config.preset_name}, {data_title(config.data)}"
    seed, class_names = run.config()["seed"], dataset.class_names
    train, tests = evaluation_splits(dataset, config.selection)
    split_name, split = next(iter(tests.items()))
    shown = of_each_class(split, _IMAGES)
    images = to_tensor(split.images[shown.numpy()], size=config.image_size)
    captions = [class_names[int(label)] for label in split.labels[shown.numpy()]]
    first, second = config.views()(images, generator=derived_generator(seed, "figures"))
    decoded = model.decode(model.encode(images))
    figures = {
        "views": labelled_rows(
            [("image", images), ("view 1", first), ("view 2", second)], title=f"{name}: two views", captions=captions
        ),
        "reconstructions": labelled_rows(
            [("original", images), ("reconstructed", decoded)],
            title=f"{name}: reconstructions ({split_name})",
            captions=captions,
        ),
        "architecture": architecture(model, images[:2], title=f"{name}: networks and phases"),
        "losses": loss_curves(run.metrics(), _CURVES, title=f"{name}: training", boundary=config.warmup_epochs + 0.5),
    }
    if model.prototypes is not None:
        pictures = model.decode(model.prototypes)
        everything = represent(model, train)
        bank = everything.take(subset(len(train), config.subset, seed))
        mapping = statistical_mapping(bank.on_h, dataset.num_classes, len(model.prototypes))
        figures["prototypes"] = _prototype_grid(
            pictures,
            everything,
            class_names,
            f"{name}:\ndecoded prototypes, with the most frequent class",
        )
        for other, part in tests.items():
            if "+" not in other:  # its parts are drawn
                figures[f"tsne_{other}"] = _triptych(
                    model.prototypes.cpu(), pictures, represent(model, part), mapping, class_names,
                    f"{name}: t-SNE of h ({other})",
                )  # fmt: skip
        if len(model.inertias):
            tried = list(range(config.least_clusters, config.most_clusters + 1))
            figures["elbow"] = elbow_curve(
                tried,
                model.inertias.tolist(),
                len(model.prototypes),
                found=bool(model.elbow_found),
                title=f"{name}: KMeans on h",
            )
    return [save_figure(figure, folder / f"{key}.png") for key, figure in figures.items()]


@torch.no_grad()
def architecture(model: ContrastiveAutoencoder, images: Tensor, *, title: str) -> Figure:  # [B, C, S, S]
    """The networks, what they give each other, and which phase each loss belongs to; prototypes and assignment once there are any."""
    shapes = Shapes(model, len(images))
    with shapes.measured():
        h = model.encode(images)
        model.projector(h)
        model.decode(h)
    boxes = {
        "views": Box(0, 1, shapes.value("two views of x", images), "data"),
        "e": Box(1, 1, shapes.module("encoder", "e"), "module"),
        "p": Box(2, 0, shapes.module("projector", "p"), "module"),
        "d": Box(3, 1, shapes.module("decoder", "d"), "module"),
        "contrastive": Box(4, 0, "NT-Xent of the views' z\nphase 1", "loss"),
        "reconstruction": Box(4, 1, f"squared error\nphase 1: weight {model.config.alpha:g}, phase 2: 1", "loss"),
    }
    arrows = [("views", "e"), ("e", "p"), ("e", "d"), ("p", "contrastive"), ("d", "reconstruction")]
    if model.prototypes is not None and model.decoder.mix is not None:
        boxes["prototypes"] = Box(
            1, 2, f"between the phases\nprototypes = k-means on h\n{list(model.prototypes.shape)}"
        )
        boxes["c"] = Box(2, 2, shapes.value("phase 2, e and p frozen\nc = soft assignment", model.assign(h)))
        arrows += [("e", "prototypes"), ("e", "c"), ("prototypes", "c")]
        if model.decoder.mix.in_channels > model.decoder.seed_channels:  # otherwise c is ignored
            arrows.append(("c", "d"))
    return diagram(boxes, arrows, title=title)


def _prototype_grid(pictures: Tensor, train: Embeddings, class_names: Sequence[str], title: str) -> Figure:
    assert train.clusters is not None
    captions, empty = [], []
    for k in range(len(pictures)):
        members = train.labels[train.clusters == k]
        empty.append(len(members) == 0)
        if len(members):
            mode = int(members.mode().values)
            share = float((members == mode).double().mean())
            captions.append(f"{class_names[mode]} {share:.0%}\nof {len(members)}")
        else:
            captions.append("empty")
    return image_grid(pictures, title=title, captions=captions, faded=empty)


def _triptych(
    prototypes: Tensor, pictures: Tensor, shown: Embeddings, mapping: Tensor, class_names: Sequence[str], title: str
) -> Figure:
    assert shown.clusters is not None
    joint = tsne_embedding(shown.h, extra=prototypes)
    assert joint.extra_points is not None
    some = shown.take(joint.indices)
    assert some.clusters is not None
    return embedding_triptych(
        joint.points.numpy(),
        some.labels.numpy(),
        some.clusters.numpy(),
        mapping[some.clusters].numpy(),
        title=title,
        class_names=class_names,
        prototype_points=joint.extra_points.numpy(),
        prototype_images=pictures,
    )
