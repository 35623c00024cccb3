# SPDX-License-Identifier: MIT
"""t-SNE maps for figures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .threads import one_thread
from .types import check_embeddings


@dataclass(frozen=True, eq=False)
class TsneMap:
    """Positions in the plane.

    Attributes:
        points: positions of the chosen samples [M, 2] float32.
        indices: which rows of the embeddings they are [M] int64, ascending; use it to pick their labels.
        extra_points: positions of the extra rows [E, 2] float32, or None.
        perplexity: the perplexity used.
    """

    points: Tensor
    indices: Tensor
    extra_points: Tensor | None
    perplexity: float


def tsne_embedding(
    embeddings: Tensor,  # [N, D]
    *,
    perplexity: float = 50.0,
    seed: int = 42,
    max_samples: int = 2000,
    extra: Tensor | None = None,  # [E, D]
) -> TsneMap:
    """Embeds samples, and prototypes together with them, in the plane (t-SNE, van der Maaten and Hinton 2008).

    Of more than ``max_samples`` rows a random subset drawn from ``seed`` is embedded. The perplexity must be smaller
    than the number of points; it is lowered to a third of their number minus one where there are few.

    Args:
        embeddings: samples.
        perplexity: effective number of neighbours.
        seed: subset and initial positions.
        max_samples: largest number of samples to embed.
        extra: further rows, such as prototypes, that are embedded jointly and never left out.

    Raises:
        ValueError: NaN or infinity, wrong shapes, a perplexity or max_samples that is not positive.
        ImportError: scikit-learn is not installed.
    """
    caller = "tsne_embedding"
    check_embeddings(caller, "embeddings", embeddings)
    if not perplexity > 0 or max_samples < 1:
        raise ValueError(f"{caller}: perplexity and max_samples must be positive; got {perplexity} and {max_samples}")
    if extra is not None:
        check_embeddings(caller, "extra", extra)
        if extra.shape[1] != embeddings.shape[1]:
            raise ValueError(f"{caller}: extra must have the shape [E, {embeddings.shape[1]}]; got {list(extra.shape)}")
    generator = torch.Generator().manual_seed(seed)
    count = min(len(embeddings), max_samples)
    indices = torch.randperm(len(embeddings), generator=generator)[:count].sort().values
    rows = embeddings.detach().cpu()[indices]
    if extra is not None:
        rows = torch.cat([rows, extra.detach().cpu()])
    if rows.dtype == torch.float64:
        rows = rows - rows.mean(dim=0)  # distances stay, and float32 holds them however far from 0 the rows are
    rows = rows.float()
    positions, used = _positions(rows, perplexity, seed)
    return TsneMap(positions[:count], indices, positions[count:] if extra is not None else None, used)


def _positions(rows: Tensor, perplexity: float, seed: int) -> tuple[Tensor, float]:  # [M, D] -> [M, 2]
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError('tsne_embedding needs scikit-learn: pip install "protokernels[train]"') from error
    count = len(rows)
    if count == 1:
        return torch.zeros(1, 2), 0.0
    used = min(float(perplexity), max((count - 1) / 3.0, 0.5))
    varied = bool((rows != rows[0]).any())
    initial = "pca" if varied and min(rows.shape) >= 2 else "random"  # PCA divides by the spread
    with one_thread():
        positions = TSNE(perplexity=used, init=initial, random_state=seed).fit_transform(rows.numpy())
    return torch.from_numpy(positions).float(), used
