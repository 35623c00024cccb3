# SPDX-License-Identifier: MIT
"""The figures of VAESim (Ferrante et al. 2023): Fig. 3-6 and what a reader of a VAE expects beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..evaluation import Representation, tsne_embedding
from ..training import RunFolder, derived_generator
from .canvas import save_figure
from .curves import loss_curves
from .embedding import embedding_pair
from .grids import image_grid, reconstruction_rows
from .heatmap import similarity_heatmap

if TYPE_CHECKING:
    from ..papers.vaesim import VAESim, VAESimConfig

_CURVES = ("loss", "reconstruction", "kl", "orthogonality", "temperature", "prototypes_used")


@torch.no_grad()
def draw(
    folder: Path,
    model: VAESim,
    config: VAESimConfig,
    run: RunFolder,
    images: Tensor,  # [N, C, H, W], for the reconstructions
    representation: Representation,  # of the split called split_name
    *,
    split_name: str,
    class_names: Sequence[str],
) -> list[Path]:
    """Draws everything into ``folder`` and returns the paths."""
    name = f"VAESim, {config.preset_name}, {Path(config.data).stem}"
    assert representation.clusters is not None
    prototypes = model.prototypes.prototypes
    decoded = model.decode(prototypes)
    noise = torch.randn(40, config.latent_dim, generator=derived_generator(run.config()["seed"], "prior"))
    mean, _ = model.encode(images)
    figures = {
        "prototypes": _prototype_grid(
            decoded,
            representation,
            class_names,
            f"{name}: decoded prototypes, with the most frequent class and number of members in {split_name}",
        ),
        "tsne": _tsne(prototypes, decoded, representation, class_names, f"{name}: t-SNE of z ({split_name})"),
        "reconstructions": reconstruction_rows(
            images, model.decode(mean), title=f"{name}: reconstructions ({split_name})"
        ),
        "prior_samples": image_grid(
            model.decode(config.prior_std * noise), title=f"{name}: samples from the prior N(0, {config.prior_std:g}²)"
        ),
        "losses": loss_curves(run.metrics(), _CURVES, title=f"{name}: training"),
        "prototype_similarity": similarity_heatmap(prototypes, title=f"{name}: similarity of the prototypes"),
    }
    return [save_figure(figure, folder / f"{key}.png") for key, figure in figures.items()]


def _prototype_grid(decoded: Tensor, representation: Representation, class_names: Sequence[str], title: str) -> Figure:
    assert representation.clusters is not None
    captions, empty = [], []
    for k in range(len(decoded)):
        members = representation.labels[representation.clusters == k]
        empty.append(len(members) == 0)
        captions.append(f"{class_names[int(members.mode().values)]} ({len(members)})" if len(members) else "empty")
    return image_grid(decoded, title=title, captions=captions, faded=empty)


def _tsne(
    prototypes: Tensor, decoded: Tensor, representation: Representation, class_names: Sequence[str], title: str
) -> Figure:
    assert representation.clusters is not None
    joint = tsne_embedding(representation.embeddings, extra=prototypes)
    assert joint.extra_points is not None
    return embedding_pair(
        joint.points.numpy(),
        representation.labels[joint.indices].numpy(),
        representation.clusters[joint.indices].numpy(),
        title=title,
        class_names=class_names,
        prototype_points=joint.extra_points.numpy(),
        prototype_images=decoded,
    )
