# SPDX-License-Identifier: MIT
"""The CUDA kernels of `contrastive` that take vectors out of images and bring their gradient back, run by the emulator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from .emulator.build import load, missing_tools, poisoned

pytestmark = pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))

Array = np.ndarray[Any, Any]
KINDS = {"f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16}
LAYOUTS = ("planar", "channels last", "padded", "embeddings")


def storage(values: torch.Tensor) -> Array:
    return np.asarray(values.view(torch.uint16) if values.dtype == torch.bfloat16 else values)


def images(layout: str, C: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [N, C, P] and the dense memory it lies in."""
    generator = torch.Generator().manual_seed(C)
    if layout == "embeddings":
        memory = torch.randn(50, C, generator=generator, dtype=torch.float64).to(dtype)
        return memory.unsqueeze(2), memory
    if layout == "channels last":
        memory = torch.randn(3, 25, C, generator=generator, dtype=torch.float64).to(dtype)
        return memory.transpose(1, 2), memory
    memory = torch.randn(3, C, 25, generator=generator, dtype=torch.float64).to(dtype)
    if layout == "planar":
        return memory, memory
    memory = torch.randn(4, C + 2, 60, generator=generator, dtype=torch.float64).to(dtype)
    return memory[1:, 1:-1, 3:53:2], memory


class TestPack:
    @pytest.mark.parametrize("normalize", [True, False])
    @pytest.mark.parametrize("C", [1, 16, 20, 130])
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_vectors_and_their_gradient(self, kind: str, layout: str, C: int, normalize: bool) -> None:
        emulator = load("contrastive")
        emulator.configure(seed=C)
        x, memory = images(layout, C, KINDS[kind])
        N, _, P = x.shape
        if kind != "f16":
            x[0, :, 0] = 0
            x[1, :, -1] *= 1e-20 if kind != "f64" else 1e-150
        order = torch.randperm(N * P, generator=torch.Generator().manual_seed(1))[: N * P - 7]
        order = torch.cat([order, torch.tensor([i for i in (0, 2 * P - 1) if i not in order])]).long()
        R, compute = len(order), np.float64 if kind == "f64" else np.float32
        packed, norms = poisoned((R, -(-C // 16) * 16), compute), poisoned(R, compute)
        place = (x.storage_offset(), x.shape, x.stride())
        getattr(emulator, f"pack_{kind}")(storage(memory), *place, order.numpy(), normalize, packed, norms)

        f = x.double().permute(0, 2, 1).reshape(N * P, C)[order].requires_grad_()
        length = f.detach().norm(dim=1, keepdim=True)
        counts = length > 1e-12
        unit_vectors = f / torch.where(counts, f, 1.0).norm(dim=1, keepdim=True)
        expected = torch.where(counts, unit_vectors, 0.0) if normalize else f
        unit = 2.0**-52 if kind == "f64" else 2.0**-23
        np.testing.assert_allclose(packed[:, :C], expected.detach(), rtol=4 * unit, atol=0)
        assert (packed[:, C:] == 0).all()
        length = torch.where(counts, length, torch.inf) if normalize else torch.ones_like(length)
        np.testing.assert_allclose(norms, length[:, 0], rtol=2 * unit)

        gradient = torch.randn(packed.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        gradient = np.asarray(gradient, compute)
        into = np.zeros_like(storage(memory))
        getattr(emulator, f"unpack_{kind}")(
            gradient, packed, norms, order.numpy(), *place[1:], normalize, x.storage_offset(), into
        )
        (exact,) = torch.autograd.grad((expected * torch.from_numpy(gradient[:, :C])).sum(), f)
        grad_memory = torch.from_numpy(into).view(KINDS[kind]).view(memory.shape)
        grad_x = grad_memory.as_strided(x.shape, x.stride(), x.storage_offset())
        actual = grad_x.double().permute(0, 2, 1).reshape(N * P, C)
        rounding = {"f64": 2.0**-52, "f32": 2.0**-23, "f16": 2.0**-10, "bf16": 2.0**-7}[kind]
        size = torch.from_numpy(np.abs(gradient[:, :C])).double()
        size = size + size.sum(1, keepdim=True) * torch.from_numpy(np.abs(packed[:, :C])).double() * normalize
        bound = (rounding + 4 * unit) * size / length + (2.0**-24 if kind == "f16" else 0)
        excess = (actual[order] - exact).abs() - bound
        assert (excess <= 0).all(), f"{float(excess.max()):.3g} above the tolerance"
        outside = torch.ones(N * P, dtype=torch.bool)
        outside[order] = False
        assert (actual[outside] == 0).all()
        grad_x.zero_()
        assert not grad_memory.any()  # nothing was written beside x
