# SPDX-License-Identifier: MIT
"""The op `warp` on CUDA beyond small values: large images, launches, streams, graphs, no waiting, repetition, large problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from protokernels import _native, affine_warp, backend, gaussian_blur, gaussian_noise, rotate, transform
from protokernels.reference import warp_noise
from python_tests.cuda_contract import CudaContract, need_memory, nothing_waits, on
from python_tests.places import needs_gpu, needs_native
from python_tests.warp_oracle import STAGES, draw, kinks, rotation_kinks

pytestmark = [pytest.mark.cuda, needs_native, needs_gpu]

SHAPES = [(64, 1, 28, 28), (32, 1, 128, 128), (16, 3, 224, 224), (3, 2, 131, 517)]
ORDERS: list[Sequence[str]] = [
    STAGES,
    STAGES[::-1],
    ("noise", "rotate", "crop", "blur", "hflip"),
    ("blur",),
    ("rotate",),
]


def value_and_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, weight_of(y).to(y.device, y.dtype))]


def weight_of(y: Tensor) -> Tensor:  # float64 on the CPU, of the shape of y
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def coordinate_rounding(shape: Sequence[int]) -> float:
    """Relative to the norm: a float32 coordinate is known to a rounding of the side, and pixels drawn at random differ as much as they
    are large. The CPU's float32 kernel is off by up to 0.8 of this."""
    return 2**-24 * max(shape[2:]) + 1e-6


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double().cpu() - expected).norm() / expected.norm().clamp(min=1e-30))


def kernels_of(step: Callable[[], Any]) -> list[str]:
    """Names of the kernels of this op that a step launches."""
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if "warp_" in event.name and "kernel" in event.name]


class TestValue:
    def test_the_library_holds_cuda_kernels(self) -> None:
        assert _native.build_info()["cuda_archs"], "the library in use was built without CUDA kernels"

    @pytest.mark.parametrize("order", ORDERS, ids="-".join)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_chains_of_large_images(self, shape: tuple[int, int, int, int], order: Sequence[Any]) -> None:
        images, params, seed = draw(shape, seed=1)
        with backend.use("reference"):
            exact = value_and_gradients(
                lambda x, p: transform(x, p, order=order, seed=seed), images.double(), params.double()
            )
        found = value_and_gradients(
            lambda x, p: transform(x, p, order=order, seed=seed.cuda()), images.double().cuda(), params.double().cuda()
        )
        for a, b in zip(found, exact, strict=True):
            assert relative(a, b) < 1e-12
        found = value_and_gradients(
            lambda x, p: transform(x, p, order=order, seed=seed.cuda()), images.cuda(), params.cuda()
        )
        near = coordinate_rounding(shape)
        assert relative(found[0], exact[0]) < near
        assert relative(found[1], exact[1]) < near
        assert relative(found[2][:, :6], exact[2][:, :6]) < near
        error = (found[2][:, 6].double().cpu() - exact[2][:, 6]).abs()
        assert bool((error <= self._kinks_of_the_rotation(images.double(), params.double(), seed, order)).all())
        # most samples have no output at a jump
        assert float(error.median()) <= 1e-4 * float(exact[2][:, 6].abs().mean())

    @staticmethod
    def _kinks_of_the_rotation(images: Tensor, params: Tensor, seed: Tensor, order: Sequence[Any]) -> Tensor:  # [B]
        if "rotate" not in order:
            return torch.zeros(len(images), dtype=torch.float64)
        at = order.index("rotate")
        with backend.use("reference"):
            before = transform(images, params, order=order[:at], seed=seed)
            turned = transform(before, params, order=("rotate",)).requires_grad_()
            y = transform(turned, params, order=order[at + 1 :], seed=seed)
            (grad,) = torch.autograd.grad(y, turned, weight_of(y))
        return rotation_kinks(before, params[:, 6], grad)

    @pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
    @pytest.mark.parametrize("shape", [(4, 3, 200, 310), (2, 2, 40, 50, 60)], ids=str)
    def test_affine_warps_of_large_images(self, shape: tuple[int, ...], padding: Any) -> None:
        images = draw(shape, seed=2)[0].double()
        dims = len(shape) - 2
        generator = torch.Generator().manual_seed(3)
        matrix = torch.eye(dims, dims + 1) + 0.2 * torch.randn(shape[0], dims, dims + 1, generator=generator)
        matrix = matrix.double()
        with backend.use("reference"):
            exact = value_and_gradients(lambda x, m: affine_warp(x, m, padding_mode=padding), images, matrix)
        found = value_and_gradients(lambda x, m: affine_warp(x, m, padding_mode=padding), images.cuda(), matrix.cuda())
        for a, b, tolerance in zip(found, exact, (1e-12, 1e-10, 1e-10), strict=True):
            assert relative(a, b) < tolerance
        found = value_and_gradients(
            lambda x, m: affine_warp(x, m, padding_mode=padding), images.float().cuda(), matrix.float().cuda()
        )
        near = coordinate_rounding(shape)
        assert relative(found[0], exact[0]) < near
        assert relative(found[1], exact[1]) < near
        allowed = kinks(images, matrix, weight_of(exact[0]), ["zeros", "border", "reflection"].index(padding))
        assert bool(((found[2].double().cpu() - exact[2]).abs() <= allowed).all())


class TestLaunches:
    @pytest.mark.parametrize(("shape", "each"), [((64, 1, 28, 28), 1), ((32, 1, 128, 128), 2), ((16, 3, 224, 224), 2)])
    def test_of_the_default_order(self, shape: tuple[int, int, int, int], each: int) -> None:
        images, params, seed = on("cuda", draw(shape))
        weight = torch.ones_like(images)
        assert len(kernels_of(lambda: transform(images.detach(), params.detach(), seed=seed))) == each
        both = kernels_of(lambda: torch.autograd.grad(transform(images, params, seed=seed), (images, params), weight))
        assert len(both) == 2 * each

    def test_of_single_stages(self) -> None:
        images = torch.rand(4, 1, 128, 128, device="cuda")
        for stage in (
            lambda: gaussian_blur(images, 1.5),
            lambda: rotate(images, 0.3),
            lambda: gaussian_noise(images, 0.1),
        ):
            assert len(kernels_of(stage)) == 1


class TestContract(CudaContract):
    """Chains over several tiles and in one, with three channels; affine warps with every padding."""

    def draw(self, seed: int) -> tuple[Tensor, ...]:
        matrix = torch.eye(2, 3) + 0.2 * torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(seed))
        return *draw((4, 3, 90, 75), seed), *draw((6, 1, 28, 28), seed), matrix

    def work(self, *inputs: Tensor) -> list[Tensor]:
        images, params, seed, small, small_params, small_seed, matrix = inputs
        results = [
            transform(images, params, seed=seed),
            transform(images, params, seed=seed, order=STAGES[::-1]),
            transform(small, small_params, seed=small_seed),
            *(affine_warp(images, matrix, padding_mode=padding) for padding in ("zeros", "border", "reflection")),
        ]
        total = torch.stack([result.square().sum() for result in results]).sum()
        gradients = torch.autograd.grad(total, (images, params, small, small_params, matrix))
        return [*(result.detach() for result in results), *gradients]

    def test_keys_that_are_drawn_do_not_wait_either(self) -> None:
        images, params, *_ = on("cuda", self.draw(0))
        generator = torch.Generator("cuda").manual_seed(1)

        def step() -> None:
            y = transform(images, params, generator=generator, enabled=("noise", "rotate"))
            gaussian_noise(gaussian_blur(y, 0.7), 0.1).sum().backward()

        for _ in range(2):
            step()
        with nothing_waits():
            step()


class TestDeterminism:
    def test_twenty_repeats_agree_to_the_bit(self) -> None:
        inputs = on("cuda", TestContract().draw(0))
        first = TestContract().work(*inputs)
        for _ in range(19):
            for a, b in zip(first, TestContract().work(*inputs), strict=True):
                assert torch.equal(a, b)

    def test_a_sample_does_not_depend_on_its_batch(self) -> None:
        images, params, seed = (x.cuda() for x in draw((9, 2, 100, 140)))
        whole = value_and_gradients(lambda x, p: transform(x, p, seed=seed), images, params)
        alone = transform(images[4:5], params[4:5], seed=seed[4:5])
        assert torch.equal(alone, whole[0][4:5])


class TestPast2To31Elements:
    """Offsets that 32 bits do not hold; the last samples show it, which alone are a small problem with the same bits."""

    def test_images(self) -> None:
        need_memory(60)
        B, side = 2**31 // 1024**2 + 3, 1024
        images = torch.empty(B, 1, side, side, dtype=torch.bfloat16, device="cuda").uniform_()
        _, params, seed = (x.cuda() for x in draw((B, 1, 1, 1), seed=1))
        grad = torch.empty_like(images).uniform_()
        ends = []
        for part in (slice(None), slice(B - 2, None)):
            x, p = images[part].detach().requires_grad_(), params[part].detach().requires_grad_()
            y = transform(x, p, seed=seed[part])
            found = [y.detach(), *torch.autograd.grad(y, (x, p), grad[part])]
            ends.append([result[-2:].clone() for result in found])
            del x, p, y, found
        for a, b in zip(*ends, strict=True):
            assert torch.equal(a, b)

    def test_noise_within_one_sample(self) -> None:
        need_memory(20)
        C, side = 2**31 // 1024**2 + 2, 1024
        noise = gaussian_noise(
            torch.zeros(1, C, side, side, dtype=torch.bfloat16, device="cuda"),
            1.0,
            seed=torch.tensor([7], device="cuda"),
        )
        first = C * side * side - 4096
        block = torch.arange(first // 4, first // 4 + 1024)
        zero = torch.zeros_like(block)
        words = warp_noise.philox((block & warp_noise.MASK, block >> 32, zero, zero), (zero + 7, zero))
        length = (-2 * ((torch.stack(words[::2]).double() + 0.5) / 2**32).log()).sqrt()
        angle = torch.stack(words[1::2]).double() * (2 * torch.pi / 2**32)
        exact = torch.stack([length * angle.cos(), length * angle.sin()], 1).permute(2, 0, 1).flatten()
        found = noise.flatten()[-4096:].double().cpu()
        torch.testing.assert_close(found, exact, rtol=2**-8, atol=1e-5)
