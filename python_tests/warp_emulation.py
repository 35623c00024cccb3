# SPDX-License-Identifier: MIT
"""Runs the CUDA kernels of `warp` in the emulator, with the float64 reference and what rounding may take from it beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protokernels.reference import warp as reference

from .emulator.build import poisoned
from .prototypes_oracle import compute_dtype, unit_roundoff
from .warp_oracle import draw, rounding

KINDS = {"f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16}
BLUR, NOISE, CROP, HFLIP, VFLIP, ROTATE = STAGES = range(6)
SIGMA_MAX, NOISE_STD, SHARPNESS = 2.0, 0.1, 1.0

Array = np.ndarray[Any, Any]


def as_array(x: Tensor) -> Array:
    x = x.detach().contiguous()
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def as_tensor(x: Array, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(x).view(dtype)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Array:
    return poisoned(
        tuple(shape),
        {torch.bfloat16: np.uint16, torch.float16: np.float16}.get(dtype, as_array(torch.zeros((), dtype=dtype)).dtype),
    )


def compare(actual: Tensor, expected: Tensor, error: float | Tensor) -> None:
    """Equal up to `error` and one rounding to the type of `actual`."""
    assert actual.shape == expected.shape
    allowed = error + 1.001 * unit_roundoff(actual.dtype) * (expected.abs() + error) + torch.finfo(actual.dtype).tiny
    off = (actual.double() - expected).abs() / allowed
    assert bool((off <= 1).all()), f"off by {float(off.nan_to_num(math.inf).max()):.2f} times what rounding explains"


def same_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())


class Chain:
    """Inputs of a chain; `run` gives output, gradient by the images and gradient by the parameters."""

    def __init__(
        self,
        kind: str,
        shape: tuple[int, int, int, int],
        order: Sequence[int] = STAGES,
        *,
        radius: tuple[int, int] = (6, 6),
        padding: int = 0,
        enabled: Sequence[int] | None = None,
    ) -> None:
        self.kind, self.dtype = kind, KINDS[kind]
        self.images, self.params, self.seed = draw(shape, seed=sum(shape), dtype=self.dtype)
        generator = torch.Generator().manual_seed(1)
        self.grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)
        self.enabled = torch.full((shape[0],), 63, dtype=torch.int32)
        if enabled is not None:
            self.enabled = torch.tensor(enabled, dtype=torch.int32)
        self.half = [shape[2] / 8, shape[3] / 8]
        self.order, self.radius, self.padding = list(order), list(radius), padding

    def run(self, emulator: Any, *, images: bool = True, params: bool = True) -> list[Tensor]:
        options = emulator.Options(
            order=self.order,
            radius=self.radius,
            sigma_max=SIGMA_MAX,
            noise_std=NOISE_STD,
            half=self.half,
            sharpness=SHARPNESS,
            padding=self.padding,
        )
        inputs = [as_array(x) for x in (self.images, self.params, self.enabled, self.seed)]
        output, by_images = empty(self.images.shape, self.dtype), empty(self.images.shape, self.dtype)
        by_params = empty(self.params.shape, self.params.dtype)
        getattr(emulator, f"forward_{self.kind}")(*inputs, options, output)
        getattr(emulator, f"backward_{self.kind}")(
            as_array(self.grad), *inputs, options, by_images if images else None, by_params if params else None
        )
        return [
            as_tensor(output, self.dtype),
            as_tensor(by_images, self.dtype),
            as_tensor(by_params, self.params.dtype),
        ]

    def expected(self) -> list[Tensor]:
        images, params = self.images.double().clone().requires_grad_(), self.params.double().clone().requires_grad_()
        rest = (self.order, self.radius, SIGMA_MAX, NOISE_STD, self.half, SHARPNESS, self.padding)
        output = reference.transform(images, params, self.enabled, self.seed, *rest)
        return [output.detach(), *torch.autograd.grad(output, (images, params), self.grad.double())]

    def check(self, found: Sequence[Tensor]) -> None:
        output, by_images, by_params = self.expected()
        error = rounding(self.images, radius=max(self.radius), sharpness=SHARPNESS, noise=NOISE_STD)
        compare(found[0], output, error)
        # an adjoint has the weights of its stage; at an edge that reflects they add up to 2
        compare(found[1], by_images, 4 * rounding(self.grad, radius=max(self.radius), sharpness=SHARPNESS))
        compare(found[2], by_params, self.parameter_rounding())

    def parameter_rounding(self) -> Tensor:  # [B, 7]
        """Sums of G times a derivative of the output: 2 M per flip and, for crop and rotation, per pixel by which they move."""
        H, W = self.images.shape[2:]
        u, sides = unit_roundoff(compute_dtype(self.images)), max(H, W)
        largest = float(self.images.abs().max()) + 7 * NOISE_STD
        lever = torch.tensor([2 * SIGMA_MAX, 7 * NOISE_STD, SHARPNESS * W, SHARPNESS * H, 2, 2, 2 * math.pi * sides])
        return u * (64 + 64 * sides) * largest * self.grad.double().abs().sum((1, 2, 3))[:, None] * lever.double()


class AffineCase:
    """Inputs of an affine warp; `run` gives output, gradient by the images and gradient by the matrix."""

    def __init__(
        self, kind: str, shape: tuple[int, ...], size: tuple[int, ...], padding: int = 0, *, scale: float = 1.0
    ) -> None:
        self.kind, self.dtype, self.size, self.padding = kind, KINDS[kind], size, padding
        generator = torch.Generator().manual_seed(sum(shape))
        B, dims = shape[0], len(size)
        self.images = torch.rand(shape, generator=generator, dtype=torch.float64).to(self.dtype)
        matrix = torch.eye(dims, dims + 1).double()
        matrix = matrix + 0.3 * torch.randn(B, dims, dims + 1, generator=generator, dtype=torch.float64)
        matrix[:, :, :dims] *= scale
        matrix[:, :, dims] *= 3
        self.matrix = matrix.to(compute_dtype(self.images))
        self.grad = torch.randn(*shape[:2], *size, generator=generator, dtype=torch.float64).to(self.dtype)

    def run(self, emulator: Any, *, images: bool = True, matrix: bool = True) -> list[Tensor]:
        inputs = as_array(self.images), as_array(self.matrix), list(self.size), self.padding
        output, by_images = empty(self.grad.shape, self.dtype), empty(self.images.shape, self.dtype)
        by_matrix = empty(self.matrix.shape, self.matrix.dtype)
        getattr(emulator, f"affine_forward_{self.kind}")(*inputs, output)
        getattr(emulator, f"affine_backward_{self.kind}")(
            as_array(self.grad), *inputs, by_images if images else None, by_matrix if matrix else None
        )
        return [
            as_tensor(output, self.dtype),
            as_tensor(by_images, self.dtype),
            as_tensor(by_matrix, self.matrix.dtype),
        ]

    def expected(self) -> list[Tensor]:
        images, matrix = self.images.double().clone().requires_grad_(), self.matrix.double().clone().requires_grad_()
        output = reference.affine_warp(images, matrix, list(self.size), self.padding)
        return [output.detach(), *torch.autograd.grad(output, (images, matrix), self.grad.double())]

    def check(self, found: Sequence[Tensor]) -> None:
        output, by_images, by_matrix = self.expected()
        # the farthest coordinate, in pixels, and its four roundings
        u, reach = unit_roundoff(compute_dtype(self.images)), 2.0 * max(*self.images.shape[2:], *self.size)
        reach *= max(1.0, float(self.matrix.abs().nan_to_num().max()))
        largest, total = float(self.images.abs().max()), float(self.grad.double().abs().sum())
        compare(found[0], output, 24 * u * reach * largest)
        # what lands on a pixel bounds its error: all of |G| where the matrix is singular
        ones = torch.ones_like(self.images, dtype=torch.float64).requires_grad_()
        spread = reference.affine_warp(ones, self.matrix.double(), list(self.size), self.padding)
        (landed,) = torch.autograd.grad(spread, ones, self.grad.double().abs())
        compare(found[1], by_images, float(24 * u * reach * (landed.max() + self.grad.double().abs().max())))
        compare(found[2], by_matrix, 64 * u * reach * max(self.size) * largest * total)
