# SPDX-License-Identifier: MIT
"""What is evaluated: the embeddings of one split, with labels and, where a model has them, clusters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops._checks import describe


@dataclass(frozen=True, eq=False)
class Representation:
    """The embeddings of one split.

    Raises:
        ValueError: for another dtype or shape, or negative labels or clusters.
    """

    embeddings: Tensor  # [N, D] floating point
    labels: Tensor  # [N] int64, 0..num_classes - 1
    clusters: Tensor | None = None  # [N] int64, 0..num_clusters - 1

    def __post_init__(self) -> None:
        if (
            not isinstance(self.embeddings, Tensor)
            or self.embeddings.ndim != 2
            or not self.embeddings.is_floating_point()
        ):
            raise ValueError(
                f"Representation: embeddings must be floating point of shape [N, D]; got {described(self.embeddings)}"
            )
        for name, values in (("labels", self.labels), ("clusters", self.clusters)):
            if values is None:
                continue
            if (
                not isinstance(values, Tensor)
                or values.dtype != torch.int64
                or values.shape != self.embeddings.shape[:1]
            ):
                raise ValueError(
                    f"Representation: {name} must be int64 of shape [{len(self.embeddings)}]; got {described(values)}"
                )
            if values.numel() and int(values.min()) < 0:
                raise ValueError(f"Representation: {name} must not be negative; the smallest is {int(values.min())}")

    def __len__(self) -> int:
        return len(self.labels)


def described(value: object) -> str:
    """dtype and shape of a tensor for a message; of anything else its type, and what to do about NumPy's."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return describe(value)


def check_embeddings(caller: str, name: str, embeddings: Tensor) -> None:
    """Refuses what is not a finite [N, D] with at least one row and one column."""
    if (
        not isinstance(embeddings, Tensor)
        or embeddings.ndim != 2
        or not embeddings.is_floating_point()
        or 0 in embeddings.shape
    ):
        raise ValueError(
            f"{caller}: {name} must be floating point of shape [N, D] with N and D at least 1; got "
            f"{described(embeddings)}"
        )
    bad = (~torch.isfinite(embeddings)).any(dim=1)
    if bool(bad.any()):
        raise ValueError(
            f"{caller}: {name} must be finite; {int(bad.sum())} of {len(embeddings)} rows hold NaN or infinity (the "
            f"first is row {int(bad.to(torch.int8).argmax())}); the model that made them has probably diverged"
        )


def check_labels(caller: str, name: str, labels: Tensor, *, length: int, upper: int) -> None:
    """Refuses what is not int64 [length] in 0..upper - 1."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != (length,):
        raise ValueError(f"{caller}: {name} must be int64 of shape [{length}]; got {described(labels)}")
    if length and not (int(labels.min()) >= 0 and int(labels.max()) < upper):
        raise ValueError(f"{caller}: {name} must lie in 0..{upper - 1}; got {int(labels.min())}..{int(labels.max())}")
