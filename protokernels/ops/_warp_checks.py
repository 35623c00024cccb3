# SPDX-License-Identifier: MIT
"""What the transformations take, what they say about anything else, and their arguments as the kernels want them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..reference.prototypes import compute_dtype
from ..reference.warp import STAGES
from . import _calls, _checks

Stage = Literal["blur", "noise", "crop", "hflip", "vflip", "rotate"]
Padding = Literal["reflect", "replicate", "zeros"]
AffinePadding = Literal["zeros", "border", "reflection"]
Enabled = Sequence[Stage] | Tensor | None

IMAGES = "[B, C, H, W]"
VOLUMES = "[B, C, H, W] or [B, C, D, H, W]"
ALL_STAGES = (1 << len(STAGES)) - 1
COLUMNS = 7
"""Parameters of a sample: the crop has two."""
MOST_RADIUS = 64
"""Largest radius of the blur, as in csrc/ops/warp.h."""
MOST_PIXELS = 1 << 30
"""A side and a whole image have fewer, as in csrc/ops/warp.h."""


def check_images(op: str, images: object, *, volumes: bool = True) -> None:
    expected = VOLUMES if volumes else IMAGES
    if not isinstance(images, Tensor):
        raise TypeError(f"{op}: images must be a torch.Tensor of shape {expected}; got {_checks.describe(images)}")
    _checks.check_dense(op, "images", images)
    if images.dtype not in _checks.FLOATING:
        raise TypeError(
            f"{op}: images must be float32, float64, bfloat16 or float16 of shape {expected}; got {_checks.describe(images)}; "
            "convert them, e.g. images.float()"
        )
    if images.dim() not in ((4, 5) if volumes else (4,)):
        advice = "; pass images[:, None] for one channel" if images.dim() == 3 else ""
        if images.dim() == 5:
            advice = "; for volumes there is each transformation alone"
        raise ValueError(f"{op}: images must have shape {expected}; got {_checks.describe(images)}{advice}")


def beside(op: str, images: Tensor, name: str, value: object, shape: Sequence[int], expected: str) -> Tensor:
    """``value`` in the dtype that ``images`` are computed in, if it is a floating-point tensor of this shape on their device."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(
            f"{op}: {name} must be a floating-point tensor of shape {expected}; got {_checks.describe(value)}"
        )
    _checks.check_dense(op, name, value)
    if value.shape != torch.Size(shape):
        raise ValueError(
            f"{op}: {name} must have shape {expected} = {list(shape)} for images {list(images.shape)}; got {_checks.describe(value)}"
        )
    _checks.check_same_device(op, "images", images, name, value)
    dtype = compute_dtype(images)
    return value if value.dtype == dtype else value.to(dtype)


def column(op: str, images: Tensor, name: str, value: object) -> Tensor:  # [B, 7]
    """The parameters of a chain of one stage that has one, from one number for all samples or one for each.

    It stands in every column, which is quicker than zeros in the others: they are not read, and their gradients are zeros.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        dtype = compute_dtype(images)
        check_range(op, name, value, dtype)
        return _calls.filled(images, (images.shape[0], COLUMNS), value, dtype)
    return per_sample(op, images, name, value).unsqueeze(1).expand(images.shape[0], COLUMNS)


def per_sample(op: str, images: Tensor, name: str, value: object) -> Tensor:  # [B]
    """One number for every sample, from a number, a tensor with one, or [B]."""
    B = images.shape[0]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        dtype = compute_dtype(images)
        check_range(op, name, value, dtype)
        return _calls.filled(images, (B,), value, dtype)
    if isinstance(value, Tensor) and value.dim() == 0:
        return beside(op, images, name, value, (), "[B] or []").expand(B)
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a number or a floating-point tensor [B]; got {_checks.describe(value)}")
    return beside(op, images, name, value, (B,), "[B]")


def check_range(op: str, name: str, value: float, dtype: torch.dtype) -> None:
    """Infinity and NaN are numbers of a type; what is larger than its largest is none."""
    if torch.finfo(dtype).max < abs(value) != math.inf:
        raise ValueError(
            f"{op}: {name} must be a number that {str(dtype).removeprefix('torch.')} can hold; got a larger one"
        )


def positions(op: str, images: Tensor, value: object) -> Tensor:  # [B, 2] or [B, 3]
    """The centre of the crop for every sample, from one for all or [B, axes]."""
    B, axes = images.shape[0], images.dim() - 2
    if isinstance(value, Sequence):
        for number in value:
            _checks.check_real(op, "each number of center", number)
            check_range(op, "center", number, compute_dtype(images))
        numbers = [
            _calls.filled(images, (), number, compute_dtype(images)) for number in value
        ]  # no copy to the device
        value = torch.stack(numbers) if numbers else images.new_empty(0)
    if isinstance(value, Tensor) and value.dim() == 1:
        return beside(op, images, "center", value, (axes,), f"[{axes}]").expand(B, axes)
    return beside(op, images, "center", value, (B, axes), f"[B, {axes}]")


def check_number(op: str, name: str, value: object, *, positive: bool = False) -> float:
    kind = "positive" if positive else "not negative"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, {kind}; got {_checks.describe(value)}")
    if not 0 <= value <= _checks.LARGEST or (positive and value == 0):
        raise ValueError(f"{op}: {name} must be finite and {kind}; got {value}")
    return float(value)


def check_radius(op: str, value: object, name: str = "radius") -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be a whole number of pixels; got {_checks.describe(value)}")
    if not 0 <= value <= MOST_RADIUS:
        raise ValueError(f"{op}: {name} must lie in [0, {MOST_RADIUS}]; got {value}")
    return value


def is_stage(value: object) -> bool:
    return isinstance(value, str) and value in STAGES


def stage_numbers(op: str, order: object) -> list[int]:
    if isinstance(order, str) or not isinstance(order, Sequence) or not all(is_stage(stage) for stage in order):
        raise ValueError(
            f"{op}: order must be a sequence of names out of {', '.join(map(repr, STAGES))}; got {order!r}"
        )
    numbers = [STAGES.index(stage) for stage in order]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{op}: order must name a transformation once at most; got {order!r}")
    return numbers


def enabled_bits(op: str, images: Tensor, enabled: object) -> Tensor | None:  # [B] int32, bit k: stage k
    """None where all are on."""
    B = images.shape[0]
    if enabled is None:
        return None
    if isinstance(enabled, Tensor):
        _checks.check_dense(op, "enabled", enabled)
        if enabled.dtype != torch.bool or enabled.shape != (B, len(STAGES)):
            raise ValueError(
                f"{op}: enabled must be a bool tensor of shape [B, {len(STAGES)}] = {[B, len(STAGES)]}, in the order "
                f"{', '.join(STAGES)}; got {_checks.describe(enabled)}"
            )
        _checks.check_same_device(op, "images", images, "enabled", enabled)
        powers = 1 << torch.arange(len(STAGES), dtype=torch.int32, device=images.device)
        return (enabled * powers).sum(1, dtype=torch.int32)
    if isinstance(enabled, str) or not isinstance(enabled, Sequence) or not all(is_stage(stage) for stage in enabled):
        raise ValueError(
            f"{op}: enabled must be None, a sequence of names out of {', '.join(map(repr, STAGES))} or a bool tensor "
            f"[B, {len(STAGES)}]; got {enabled!r}"
        )
    bits = sum({1 << STAGES.index(stage) for stage in enabled})
    return torch.full((B,), bits, dtype=torch.int32, device=images.device)


def seeds(op: str, images: Tensor, generator: object, seed: object, *, used: bool = True) -> Tensor | None:  # [B] int64
    """A key for every sample: the ones given, or drawn on the device of the images; None where nothing is random."""
    B = images.shape[0]
    if generator is not None and seed is not None:
        raise ValueError(f"{op}: give generator or seed, not both")
    if seed is not None:
        if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
            raise TypeError(
                f"{op}: seed must be an int64 tensor [B], a key for every sample; got {_checks.describe(seed)}"
            )
        _checks.check_dense(op, "seed", seed)
        if seed.shape != (B,):
            raise ValueError(f"{op}: seed must have shape [B] = [{B}]; got {_checks.describe(seed)}")
        _checks.check_same_device(op, "images", images, "seed", seed)
        return seed
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"{op}: generator must be a torch.Generator; got {_checks.describe(generator)}")
        if generator.device.type != images.device.type:
            raise ValueError(
                f"{op}: generator is on {generator.device} and images on {images.device}; make one there, "
                f"torch.Generator('{images.device}')"
            )
    if not used:
        return None
    limits = (-(2**63), 2**63 - 1)
    return torch.randint(*limits, (B,), dtype=torch.int64, device=images.device, **_checks.drawn_by(generator))


def output_size(op: str, images: Tensor, size: object) -> list[int]:
    sides = list(images.shape[2:])
    if size is None:
        return sides
    whole = isinstance(size, Sequence) and all(
        isinstance(side, (int, torch.SymInt)) and not isinstance(side, bool) for side in size
    )
    if not whole or not isinstance(size, Sequence) or len(size) != len(sides) or any(side < 0 for side in size):
        raise ValueError(
            f"{op}: size must be {len(sides)} whole numbers, the sides of the output, for images {list(images.shape)}; got {size!r}"
        )
    if 0 in sides and 0 not in size:
        raise ValueError(
            f"{op}: images {list(images.shape)} have no pixels to take {list(size)} from; pass a size with a 0 or other images"
        )
    if all(isinstance(side, int) for side in size) and (max(size) >= MOST_PIXELS or math.prod(size) >= MOST_PIXELS):
        raise ValueError(f"{op}: an image or volume must have fewer than 2^30 pixels; got the size {list(size)}")
    return list(size)
