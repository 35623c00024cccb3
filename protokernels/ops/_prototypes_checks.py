# SPDX-License-Identifier: MIT
"""What the arguments of the prototype functions must be, with errors that say what was given."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _calls, _checks


def check_pair(op: str, z: object, prototypes: object, similarity: str) -> None:
    _checks.check_matrix(op, "z", z, "[B, D]")
    _checks.check_matrix(op, "prototypes", prototypes, "[K, D]")
    assert isinstance(z, Tensor) and isinstance(prototypes, Tensor)
    _checks.check_same_device(op, "z", z, "prototypes", prototypes)
    if z.shape[1] != prototypes.shape[1]:
        raise ValueError(
            f"{op}: z [B, D] and prototypes [K, D] must share D; got {list(z.shape)} and {list(prototypes.shape)}"
        )
    if prototypes.shape[0] == 0 or prototypes.shape[1] == 0:
        raise ValueError(
            f"{op}: prototypes must hold at least one vector of at least one dimension; got {list(prototypes.shape)}"
        )
    if not isinstance(similarity, str) or similarity not in ("cosine", "dot"):
        raise ValueError(f"{op}: similarity must be 'cosine' or 'dot'; got {similarity!r}")


def check_written(op: str, prototypes: object) -> None:
    """No elements that share their memory, as an expanded tensor has them, or one of overlapping windows."""
    if not isinstance(prototypes, Tensor) or not _checks.is_dense(prototypes):
        return
    if _overlaps(prototypes.shape, prototypes.stride()):
        raise ValueError(
            f"{op}: prototypes are written to, and some of theirs share their memory (expanded or overlapping); got "
            f"{_checks.describe(prototypes)} with strides {list(prototypes.stride())}; pass prototypes.clone()"
        )


def _overlaps(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether two elements of a matrix lie in one place; of other tensors, which are refused anyway, only whether one is expanded."""
    if any(size > 1 and stride == 0 for size, stride in zip(shape, strides, strict=True)):
        return True
    if len(shape) != 2 or 0 in shape or 1 in shape:
        return False
    shared = math.gcd(*strides)  # i rows and j columns apart lie in one place first where i strides[0] = j strides[1]
    return strides[1] // shared < shape[0] and strides[0] // shared < shape[1]


def check_drawing(op: str, sample: object, generator: object, skip_nonfinite: object) -> None:
    _checks.check_flag(op, "sample", sample)
    _checks.check_generator(op, generator)
    _checks.check_flag(op, "skip_nonfinite", skip_nonfinite)


def check_labels(op: str, z: Tensor, prototypes: Tensor, given: object, sample: bool) -> None:
    """Integers [B], or probabilities [B, K]; to draw from, probabilities only."""
    probabilities = (z.shape[0], prototypes.shape[0])
    expected = f"integer labels [{z.shape[0]}] or probabilities {list(probabilities)}"
    if not isinstance(given, Tensor):
        raise TypeError(f"{op}: labels_or_assignments must be a tensor: {expected}; got {_checks.describe(given)}")
    _checks.check_same_device(op, "z", z, "labels_or_assignments", given)
    _checks.check_dense(op, "labels_or_assignments", given)
    if given.dtype in _checks.FLOATING:
        fits = given.shape == probabilities
    else:
        fits = given.dtype != torch.bool and not given.is_complex() and given.shape == (z.shape[0],)
    if not fits:
        raise ValueError(f"{op}: labels_or_assignments must be {expected}; got {_checks.describe(given)}")
    if sample and given.dtype not in _checks.FLOATING:
        raise ValueError(
            f"{op}: sample=True needs probabilities {list(probabilities)}, got labels; pass the soft assignment"
        )


def check_weights(op: str, z: Tensor, probabilities: Tensor, skip_nonfinite: bool) -> None:
    """Rows to draw from: no NaN, nothing negative, not all zero, where the values are at hand."""
    if z.device.type != "cpu" or torch.compiler.is_compiling() or _calls.is_transformed():
        return
    weights = probabilities.detach()
    total = weights.sum(-1, dtype=torch.float64)
    wrong = ~((weights >= 0).all(-1) & (total > 0) & total.isfinite())
    if skip_nonfinite:
        wrong &= z.detach().isfinite().all(-1)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{op}: sample=True draws from probabilities that are finite, not negative and not all zero; row {row} is not; "
            "skip_nonfinite=True leaves out rows where z is not finite"
        )


def check_revive(op: str, z: Tensor, prototypes: Tensor, revive: object) -> None:
    if isinstance(revive, Tensor):
        _checks.check_dense(op, "revive", revive)
    if not isinstance(revive, Tensor) or revive.dtype != torch.bool or revive.shape != prototypes.shape[:1]:
        raise ValueError(
            f"{op}: revive must be a bool tensor of shape [{prototypes.shape[0]}]; got {_checks.describe(revive)}"
        )
    _checks.check_same_device(op, "z", z, "revive", revive)


def check_sums(op: str, prototypes: object, sums: object, counts: object) -> None:
    _checks.check_matrix(op, "prototypes", prototypes, "[K, D]")
    assert isinstance(prototypes, Tensor)
    if not isinstance(sums, Tensor) or sums.shape != prototypes.shape or sums.dtype != torch.float64:
        raise ValueError(f"{op}: sums must be float64 of shape {list(prototypes.shape)}; got {_checks.describe(sums)}")
    if not isinstance(counts, Tensor) or counts.shape != prototypes.shape[:1] or counts.dtype != torch.int64:
        raise ValueError(f"{op}: counts must be int64 of shape [{prototypes.shape[0]}]; got {_checks.describe(counts)}")
    _checks.check_same_device(op, "prototypes", prototypes, "sums", sums)
    _checks.check_same_device(op, "prototypes", prototypes, "counts", counts)
