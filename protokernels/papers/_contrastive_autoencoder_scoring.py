# SPDX-License-Identifier: MIT
"""How the contrastive autoencoder is judged (section 3): cluster map, neighbours, linear layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..data import ImageDataset, Split
from ..data.mapped import tensor_batches
from ..evaluation import (
    Representation,
    classification_scores,
    clustering_scores,
    knn_predict,
    label_subsets,
    linear_probe,
    statistical_mapping,
)
from ..training import derived_generator
from ..training.randomness import derived_seed
from ..training.scoring import evaluation_splits
from ._contrastive_autoencoder_config import ContrastiveAutoencoderConfig

if TYPE_CHECKING:
    from .contrastive_autoencoder import ContrastiveAutoencoder


class Embeddings(NamedTuple):
    """What the model makes of a split, in evaluation mode; on the CPU."""

    h: Tensor  # [N, D]
    z: Tensor  # [N, P]
    labels: Tensor  # [N] int64
    clusters: Tensor | None  # [N] int64; None before the second phase

    def take(self, indices: Tensor) -> Embeddings:  # [n] int64
        return Embeddings(*(None if value is None else value[indices] for value in self))  # type: ignore[arg-type]

    @property
    def on_h(self) -> Representation:
        """For the shared figures and protocols."""
        return Representation(self.h, self.labels, self.clusters)


def subset(count: int, size: int, seed: int) -> Tensor:  # [n] int64, ascending
    """The training images that KMeans, the cluster map and the neighbours see: ``size`` at random, or all if 0."""
    if size == 0 or size >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=derived_generator(seed, "subset"))[:size].sort().values


@torch.no_grad()
def represent(model: ContrastiveAutoencoder, split: Split) -> Embeddings:
    """h, z, labels and clusters of a split. An image's cluster is the prototype it is most similar to."""
    model.eval()
    device = model.inertias.device
    parts_h, parts_z = [], []
    for images in tensor_batches(split.images, 1000, size=model.config.image_size):
        h = model.encode(images.to(device))
        parts_h.append(h)
        parts_z.append(model.projector(h).float())
    h = torch.cat(parts_h)
    clusters = None if model.prototypes is None else model.assign(h).argmax(dim=1).cpu()
    return Embeddings(h.cpu(), torch.cat(parts_z).cpu(), torch.as_tensor(split.labels), clusters)


def score_model(
    model: ContrastiveAutoencoder, dataset: ImageDataset, config: ContrastiveAutoencoderConfig, seed: int
) -> dict[str, Any]:
    """All scores on every set of the data.

    Returns:
        ``"splits"``: set -> method -> score -> number. Methods are ``"statistical"``, ``"knn"`` and ``"linear_h"`` on h, ``"knn_z"`` and
        ``"linear"`` on z, ``"majority"`` (always the most frequent training class) and ``"clustering"``. ``"images"``: set -> number of
        images; ``"protocol"``; ``"prototypes"``: their number and, where an elbow was looked for, the candidates and KMeans' inertias.
    """
    train, tests = evaluation_splits(dataset, config.selection)
    everything, classes = represent(model, train), dataset.num_classes
    bank = everything.take(subset(len(train), config.subset, seed))
    labelled = everything.take(
        label_subsets(
            everything.labels,
            [config.label_share],
            num_classes=classes,
            seed=derived_seed(seed, "labels") % 2**32,
        )[config.label_share]
    )
    probes = {
        key: linear_probe(x, labelled.labels, num_classes=classes, protocol=config.linear_protocol, seed=seed)
        for key, x in (("linear", labelled.z), ("linear_h", labelled.h))
    }
    majority = torch.bincount(everything.labels, minlength=classes).argmax()
    splits: dict[str, dict[str, dict[str, float]]] = {}
    for name, split in tests.items():
        test = represent(model, split)
        predictions = {}
        if bank.clusters is not None and test.clusters is not None and model.prototypes is not None:
            predictions["statistical"] = statistical_mapping(bank.on_h, classes, len(model.prototypes))[test.clusters]
        for key, x, queries in (("knn", bank.h, test.h), ("knn_z", bank.z, test.z)):
            predictions[key] = knn_predict(x, bank.labels, queries, k=config.knn_k, num_classes=classes)
        predictions["linear"] = probes["linear"].predict(test.z)
        predictions["linear_h"] = probes["linear_h"].predict(test.h)
        predictions["majority"] = majority.expand(len(test.labels))
        splits[name] = {key: classification_scores(value, test.labels, classes) for key, value in predictions.items()}
        if test.clusters is not None:
            splits[name]["clustering"] = clustering_scores(test.clusters, test.labels)
    protocol = {
        "bank": len(bank.labels),
        "labels": len(labelled.labels),
        "knn_k": config.knn_k,
        "linear_protocol": config.linear_protocol,
    }
    images = {name: len(split) for name, split in {"train": train, **tests}.items()}
    return {"splits": splits, "images": images, "protocol": protocol, "prototypes": _about_prototypes(model)}


def _about_prototypes(model: ContrastiveAutoencoder) -> dict[str, Any]:
    config = model.config
    number = 0 if model.prototypes is None else len(model.prototypes)
    about: dict[str, Any] = {"number": number}
    if len(model.inertias) and number:
        tried = list(range(config.least_clusters, config.most_clusters + 1))
        about |= {"candidates": tried, "inertias": model.inertias.tolist(), "elbow_found": bool(model.elbow_found)}
    return about
