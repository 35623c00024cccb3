# SPDX-License-Identifier: MIT
"""What the contrastive losses take, and what they say about anything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from . import _checks

Form = Literal["supcon", "in", "paper", "negout"]
Denominator = Literal["all", "negatives"]
Precision = Literal["highest", "high", "medium"]
Scope = Literal["group", "image"]
Reduction = Literal["group", "anchor", "image", "none"]
Gather = bool | Literal["ring"]
Size = int | Sequence[int]

FORMS, DENOMINATORS, PRECISIONS = get_args(Form), get_args(Denominator), get_args(Precision)
SCOPES, REDUCTIONS = get_args(Scope), get_args(Reduction)
LONGEST_AXIS = 2**31 - 1
"""A plan counts rows in int32; larger blocks and strides are the same as this."""
_INT64 = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.int64)


def form_of(op: str, denominator: Denominator) -> Form:
    """The form that has this denominator."""
    _checks.check_choice(op, "denominator", denominator, DENOMINATORS)
    return "supcon" if denominator == "all" else "negout"


def check_choices(op: str, temperature: object, form: object, precision: object, gather: object = False) -> None:
    """What all losses take by name."""
    if isinstance(temperature, Tensor):
        raise TypeError(
            f"{op}: temperature must be a number; got {_checks.describe(temperature)}; to learn it, multiply the vectors, for cosines "
            "those of length 1, by its inverse's root and pass normalize=False, temperature=1"
        )
    _checks.check_temperature_number(op, temperature)
    _checks.check_choice(op, "form", form, FORMS)
    _checks.check_choice(op, "precision", precision, PRECISIONS)
    _checks.check_choice(op, "gather", gather, (False, True, "ring"))


def check_local(
    op: str,
    temperature: object,
    block_size: object,
    stride: object,
    form: object,
    scope: object,
    reduction: object,
    precision: object,
) -> None:
    """What :func:`local_contrastive_loss` takes by name."""
    check_choices(op, temperature, form, precision)
    _checks.check_choice(op, "scope", scope, SCOPES)
    _checks.check_choice(op, "reduction", reduction, REDUCTIONS)
    if block_size is not None and stride is not None:
        raise ValueError(f"{op}: give block_size or stride, not both; got block_size={block_size} and stride={stride}")


def check_features(op: str, features: object) -> None:
    expected = "[N, C, H, W] or [N, C, D, H, W]"
    if not isinstance(features, Tensor) or features.dtype not in _checks.FLOATING:
        raise TypeError(f"{op}: features must be a floating-point tensor {expected}; got {_checks.describe(features)}")
    _checks.check_dense(op, "features", features)
    if features.dim() not in (4, 5) or features.shape[1] == 0:
        raise ValueError(
            f"{op}: features must have shape {expected} with at least one channel; got {_checks.describe(features)}"
        )


def check_views(op: str, first: object, second: object) -> int:
    _checks.check_matrix(op, "first", first, "[N, D]")
    _checks.check_matrix(op, "second", second, "[N, D]")
    assert isinstance(first, Tensor) and isinstance(second, Tensor)
    _checks.check_same_device(op, "first", first, "second", second)
    if first.shape != second.shape or first.shape[1] == 0:
        raise ValueError(
            f"{op}: first and second must have the same shape [N, D] with D at least 1; got {list(first.shape)} and "
            f"{list(second.shape)}"
        )
    return first.shape[0]


def class_labels(op: str, labels: object, shape: Sequence[int], expected: str, name: str, beside: Tensor) -> Tensor:
    """The labels as int64; they lie where ``beside``, the argument ``name``, does."""
    if not isinstance(labels, Tensor) or labels.dtype not in _INT64:
        raise TypeError(
            f"{op}: labels must be an integer tensor {expected} that int64 can hold; got {_checks.describe(labels)}"
        )
    _checks.check_dense(op, "labels", labels)
    if labels.shape != torch.Size(shape):
        raise ValueError(f"{op}: labels must have shape {list(shape)}; got {_checks.describe(labels)}")
    _checks.check_same_device(op, name, beside, "labels", labels)
    classes: Tensor = labels.to(torch.int64)
    return classes


def check_class(op: str, name: str, value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"{op}: {name} must be an integer or None; got {_checks.describe(value)}")
    if value is not None and not -(2**63) <= value < 2**63:
        raise ValueError(f"{op}: {name} must be a class that int64 labels can hold; got {value}")


def pixel_labels(
    op: str, features: Tensor, labels: Tensor | None, background: int | None, scope: str, ignore_index: int | None
) -> tuple[Tensor, int | None]:
    shape = (features.shape[0], *features.shape[2:])
    check_class(op, "background", background)
    check_class(op, "ignore_index", ignore_index)
    if labels is not None:
        return class_labels(op, labels, shape, "[N, H, W] or [N, D, H, W]", "features", features), background
    if features.shape[0] % 2 or scope == "image" or ignore_index is not None:
        raise ValueError(
            f"{op}: without labels the maps are two views of N / 2 images, stacked: N must be even, scope 'group' and ignore_index None; "
            f"got N = {features.shape[0]}, scope {scope!r} and ignore_index {ignore_index}"
        )
    half = (shape[0] // 2, *shape[1:])
    places = (
        torch.arange(half[0] * features[0, 0].numel(), device=features.device)
        if shape[0]
        else torch.empty(0, dtype=torch.int64, device=features.device)
    )
    return places.view(half).repeat(2, *(1,) * (len(shape) - 1)), None


def sizes(op: str, name: str, value: Size | None, axes: int, default: int) -> list[int]:
    """One number for each axis."""
    if value is None:
        return [default] * axes
    several: list[int] = list(value) if isinstance(value, Sequence) else [value] * axes
    if len(several) != axes or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in several):
        foreign = next((v for v in several if isinstance(v, np.generic)), None)
        came = repr(value) if foreign is None else _checks.describe(foreign)
        raise ValueError(f"{op}: {name} must be a positive integer or one for each of the {axes} axes; got {came}")
    return [min(v, LONGEST_AXIS) for v in several]
