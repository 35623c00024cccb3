# SPDX-License-Identifier: MIT
"""ResNet18 features + KMeans: clusters of the frozen network's output, mapped to the labels that are most frequent in them.

The unsupervised baseline of Ferrante et al. 2022 (contrastive autoencoder, section 2 and Table 1): ImageNet weights, the 512 numbers
behind the pooling, KMeans with the elbow method. Clusters are mapped by the labels of training images; the authors' released helper
takes those of the test set. Not given there, and our choice: images of 224 pixels, grey repeated to three channels, 2 to 19 clusters and
the middle if there is no elbow, KMeans on 3000 training images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import protokernels

from ..cluster import KMeans, choose_n_clusters
from ..data import ImageDataset
from ..evaluation import Representation, statistical_mapping
from ..papers._contrastive_autoencoder_scoring import subset
from .resnet18_common import FrozenResNet18, FrozenResNet18Config


@dataclass(frozen=True)
class ResNet18KMeansConfig(FrozenResNet18Config):
    """The network, and how its features are clustered."""

    num_prototypes: int = 0  # number of clusters; 0: the elbow decides
    least_clusters: int = 2  # candidates for the elbow ...
    most_clusters: int = 19  # ... from and to
    subset: int = 3000  # training images for KMeans and the map of the clusters; 0: all

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_prototypes < 0 or self.subset < 0 or not 1 <= self.least_clusters <= self.most_clusters - 2:
            raise ValueError(
                "ResNet18KMeansConfig: num_prototypes and subset must not be negative, and most_clusters must exceed least_clusters "
                f"by 2; got {self.num_prototypes}, {self.subset}, {self.most_clusters} and {self.least_clusters}"
            )


def fit(x: Tensor, labels: Tensor, classes: int, config: ResNet18KMeansConfig, seed: int) -> dict[str, Tensor]:
    """Centres of the features [N, 512] and the class of each."""
    chosen = subset(len(x), config.subset, seed)
    x, labels = x[chosen], labels[chosen]
    tried = [] if config.num_prototypes else list(range(config.least_clusters, config.most_clusters + 1))
    inertias: tuple[float, ...] = ()
    elbow_found = False
    if tried:
        elbow = choose_n_clusters(x, tried, fallback=tried[len(tried) // 2], random_state=seed)
        model, inertias, elbow_found = elbow.model, elbow.inertias, elbow.found
    else:
        model = KMeans(config.num_prototypes, random_state=seed).fit(x)
    centres = model.cluster_centers_
    clustered = Representation(x, labels, protokernels.nearest(x, centres, 1).indices[:, 0])
    return {
        "centres": centres,
        "classes": statistical_mapping(clustered, classes, len(centres)),
        "candidates": torch.tensor(tried),
        "inertias": torch.tensor(inertias, dtype=torch.float64),
        "elbow_found": torch.tensor(elbow_found),
    }


def predict(fitted: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Classes and clusters of features [M, 512]."""
    clusters = protokernels.nearest(x, fitted["centres"], 1).indices[:, 0]
    return fitted["classes"][clusters], clusters


class _KMeans(FrozenResNet18):
    def check(self, config: Any, dataset: ImageDataset) -> None:
        super().check(config, dataset)
        count = len(self.training_split(dataset, config))
        images = min(count, config.subset or count)
        if (clusters := config.num_prototypes or config.most_clusters) > images:
            name = "num_prototypes" if config.num_prototypes else "most_clusters"
            raise ValueError(f"{name} must not exceed what is clustered; got {clusters} and {images} training images")


BASELINE = _KMeans("resnet18_kmeans", ResNet18KMeansConfig, fit, predict, __doc__)
