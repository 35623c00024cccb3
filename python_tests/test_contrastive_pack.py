# SPDX-License-Identifier: MIT
"""Vectors out of maps and gradients back into them: any part of the places, in any order and layout, gives the right numbers, and
each vector the same bits whatever stands beside it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from python_tests.cpu_levels import AtEveryLevel
from python_tests.places import NATIVE_PLACES, Place, needs_native

OPS = torch.ops.protokernels
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(1, 2, 1), (3, 5, 2), (2, 16, 31), (1, 33, 33), (2, 3, 129), (4, 17, 160)]


@pytest.fixture(params=NATIVE_PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


def draw(shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Maps with a vector of zeros, and their places in any order."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x[0, :, 0] = 0
    return x.to(dtype), torch.randperm(shape[0] * shape[2], generator=generator)


def vectors(x: Tensor, order: Tensor) -> Tensor:
    return x.double().transpose(1, 2).flatten(0, 1)[order]


def parts_of(order: Tensor) -> list[Tensor]:
    """All of it, most, sorted most (long runs of neighbours), a few."""
    most = order[: (3 * len(order) + 3) // 4]
    return [order, most, most.sort().values, order[: (len(order) + 4) // 5]]


@needs_native
class TestValue:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_pack(self, place: Place, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        x, every = draw(shape, dtype)
        exact = 1e-13 if dtype == torch.float64 else 1e-6
        for order in parts_of(every):
            wanted = vectors(x, order)
            lengths = wanted.norm(dim=1)
            for normalize in (True, False):
                packed, norms = OPS.contrastive_pack(x.to(place.device), order.to(place.device), normalize)
                unit = wanted / lengths.clamp(min=1e-12)[:, None] if normalize else wanted
                torch.testing.assert_close(packed.cpu().double()[:, : shape[1]], unit, rtol=exact, atol=exact)
                assert not packed[:, shape[1] :].any()
                expected = torch.where(lengths > 0, lengths, torch.inf) if normalize else torch.ones_like(lengths)
                torch.testing.assert_close(norms.cpu().double(), expected, rtol=exact, atol=0)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_every_order_and_layout_gives_the_same_bits(
        self, place: Place, shape: tuple[int, int, int], dtype: torch.dtype
    ) -> None:
        x, every = draw(shape, dtype)
        x, every = x.to(place.device), every.to(place.device)
        beside = x.mT.contiguous().mT  # channels beside each other
        whole, lengths = OPS.contrastive_pack(x, every, True)
        row_of = every.argsort()
        for order in parts_of(every):
            packed, norms = OPS.contrastive_pack(x, order, True)
            assert torch.equal(packed, whole[row_of[order]]) and torch.equal(norms, lengths[row_of[order]])
            for one, other in zip((packed, norms), OPS.contrastive_pack(beside, order, True), strict=True):
                assert torch.equal(one, other)
        for order in (every, every[: (len(every) + 1) // 2]):  # no plan names a place twice; nothing may be lost for it
            rows = whole[row_of[order]]
            assert torch.equal(OPS.contrastive_pack(x, torch.cat([order, order]), True)[0], torch.cat([rows, rows]))


@needs_native
class TestGradient:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_unpack(self, place: Place, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        x, every = draw(shape, dtype)
        x, every = x.to(place.device), every.to(place.device)
        exact = {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, 2 * torch.finfo(dtype).eps)
        for order in parts_of(every):
            packed, norms = OPS.contrastive_pack(x, order, True)
            grad = torch.randn(packed.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            grad = grad.to(packed)
            f, df = packed.double()[:, : shape[1]], grad.double()[:, : shape[1]]
            grad[:, shape[1] :] = 0
            expected = torch.zeros(shape[0] * shape[2], shape[1], dtype=torch.float64, device=x.device)
            expected[order] = (df - f * (f * df).sum(1, keepdim=True)) / norms.double()[:, None]
            expected = expected.view(shape[0], shape[2], shape[1]).transpose(1, 2)
            given = [OPS.contrastive_unpack(grad, packed, norms, order, x, True, last) for last in (False, True)]
            assert torch.equal(*given)
            assert given[0].dtype == dtype and given[0].is_contiguous()
            torch.testing.assert_close(given[0].double(), expected, rtol=exact, atol=exact)
            plain = OPS.contrastive_unpack(grad, packed, norms, order, x, False, False)
            as_it_is = torch.zeros_like(expected.transpose(1, 2).flatten(0, 1))
            as_it_is[order] = grad.double()[:, : shape[1]]
            wanted = as_it_is.view(shape[0], shape[2], shape[1]).transpose(1, 2).to(dtype)
            assert torch.equal(plain, wanted)


class TestEveryLevel(AtEveryLevel):
    FILES = ("test_contrastive_pack",)
