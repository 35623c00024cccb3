# SPDX-License-Identifier: MIT
"""The figures of VAESim (Ferrante et al. 2023): Fig. 3-6 and what a reader of a VAE expects beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..data.datasets import data_title
from ..evaluation import Representation, tsne_embedding
from ..training import RunFolder, derived_generator
from .canvas import save_figure
from .curves import loss_curves
from .diagram import Box, Shapes, diagram
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
    name = f"VAESim, {config.preset_name}, {data_title(config.data)}"
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
        "architecture": architecture(model, config, images[:2], title=f"{name}: networks, losses and update of Q"),
        "losses": loss_curves(run.metrics(), _CURVES, title=f"{name}: training"),
        "prototype_similarity": similarity_heatmap(prototypes, title=f"{name}: similarity of the prototypes"),
    }
    return [save_figure(figure, folder / f"{key}.png") for key, figure in figures.items()]


@torch.no_grad()
def architecture(model: VAESim, config: VAESimConfig, images: Tensor, *, title: str) -> Figure:  # [B, C, S, S]
    """Encoder, prototypes and decoder, the losses, and how a step moves the prototypes Q."""
    shapes = Shapes(model, len(images))
    with shapes.measured():
        output = model(images, torch.zeros(len(images), config.latent_dim))
    Q, eta = model.prototypes.prototypes, config.new_weight
    labels = "drawn from c" if config.sample_labels else "argmax c"
    boxes = {
        "x": Box(0, 0, shapes.value("x", images), "data"),
        "e": Box(1, 0, shapes.module("encoder", "e"), "module"),
        "z": Box(2, 0, shapes.value("z = mean + e^(log-variance / 2) noise", output.z)),
        "d": Box(3, 0, shapes.module("decoder", "d"), "module"),
        "reconstruction": Box(4, 0, "squared error", "loss"),
        "kl": Box(1, 1, f"{config.beta:g} KL(N(mean, variance) | N(0, {config.prior_std:g}²))", "loss"),
        "c": Box(
            2, 1, f"{shapes.module('prototypes', 'c')}\nsoftmax({config.similarity}(z, Q) / temperature)", "module"
        ),
        "Q": Box(2, 2, f"k = {labels}\nQ_k ← {eta:g} mean of z with label k + {1 - eta:g} Q_k\nQ {list(Q.shape)}"),
        "orthogonality": Box(3, 2, f"{config.ortho_weight:g} |Q Q^T - I|²\nwithout a gradient", "loss"),
    }
    arrows = [
        ("x", "e"),
        ("e", "z"),
        ("z", "d"),
        ("d", "reconstruction"),
        ("e", "kl"),
        ("z", "c"),
        ("c", "d"),
        ("c", "Q"),
        ("Q", "c"),
    ]
    return diagram(boxes, [*arrows, ("Q", "orthogonality")], title=title)


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
