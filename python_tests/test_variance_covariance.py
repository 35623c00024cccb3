# SPDX-License-Identifier: MIT
"""Variance and covariance terms: both forms against loops and numpy, gradients, degenerate batches; heads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from protokernels.models import mlp_head
from protokernels.nn import variance_covariance_loss


def expected(z: Tensor) -> tuple[float, float]:
    values = z.detach().double().numpy()
    covariance = np.cov(values, rowvar=False).reshape(z.shape[1], z.shape[1])
    variance = np.maximum(0, 1 - np.sqrt(np.diag(covariance) + 1e-4)).mean()
    return float(variance), float(((covariance**2).sum() - (np.diag(covariance) ** 2).sum()) / z.shape[1])


class TestValue:
    @pytest.mark.parametrize(("count", "dim"), [(2, 1), (2, 9), (7, 7), (30, 5), (5, 130)])
    def test_both_forms_against_numpy(self, count: int, dim: int) -> None:
        z = 0.8 * torch.randn(count, dim, generator=torch.Generator().manual_seed(count)) + 3
        for branch in ("auto", "gram", "covariance"):
            for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
                variance, covariance = variance_covariance_loss(z.to(dtype), branch=branch)  # type: ignore[arg-type]
                wanted = expected(z)
                assert float(variance) == pytest.approx(wanted[0], rel=tolerance, abs=tolerance)
                assert float(covariance) == pytest.approx(wanted[1], rel=tolerance, abs=tolerance)
                assert variance.dtype == covariance.dtype == dtype

    def test_collapsed_and_white_embeddings(self) -> None:
        variance, covariance = variance_covariance_loss(torch.ones(8, 4))
        assert float(variance) == pytest.approx(1 - math.sqrt(1e-4)) and covariance == 0
        white = math.sqrt(3) * torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])  # unbiased variance 4
        variance, covariance = variance_covariance_loss(white)
        assert variance == 0 and covariance == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize("count", [0, 1])
    def test_fewer_than_two_embeddings_give_zero(self, count: int) -> None:
        z = torch.full((count, 3), math.inf, requires_grad=True)
        variance, covariance = variance_covariance_loss(z)
        (variance + covariance).backward()
        assert variance == covariance == 0 and z.grad is not None and torch.equal(z.grad, torch.zeros(count, 3))


class TestGradient:
    @pytest.mark.parametrize(("count", "dim"), [(4, 11), (9, 3)])
    def test_forms_agree_and_gradcheck(self, count: int, dim: int) -> None:
        z = 0.5 * torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        z.requires_grad_()
        gradients = []
        for branch in ("gram", "covariance"):
            assert torch.autograd.gradcheck(lambda x, b=branch: variance_covariance_loss(x, branch=b), z)
            gradients.append(torch.autograd.grad(variance_covariance_loss(z, branch=branch)[1], z)[0])  # type: ignore[arg-type]
            assert gradients[-1].sum(dim=0).abs().max() < 1e-12  # shifting all embeddings changes nothing
        torch.testing.assert_close(*gradients)

    @settings(max_examples=50, deadline=None)
    @given(
        count=st.integers(2, 40), dim=st.integers(1, 40), scale=st.sampled_from([1e-3, 0.3, 1.0, 50.0]),
        shift=st.sampled_from([0.0, -3.0, 100.0]), seed=st.integers(0, 2**31 - 1),
    )  # fmt: skip
    def test_on_any_embeddings_forms_agree_and_columns_sum_to_zero(
        self, count: int, dim: int, scale: float, shift: float, seed: int
    ) -> None:
        z = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        z = (shift + scale * z).requires_grad_()
        found = []
        for branch in ("gram", "covariance"):
            terms = variance_covariance_loss(z, branch=branch)  # type: ignore[arg-type]
            grads = [torch.autograd.grad(term, z, retain_graph=True)[0] for term in terms]
            for grad in grads:
                assert float(grad.sum(0).abs().max()) <= 1e-12 * (1 + float(grad.abs().max())) * count
            found.append((*terms, *grads))
        for one, other in zip(*found, strict=True):
            size = float(one.detach().abs().max())
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10 * size + 1e-12 * scale**4)

    def test_closed_form(self) -> None:
        """4 / (D (N - 1)) c offdiag(K)."""
        z = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
        c = (z - z.mean(0)).detach()
        K = c.T @ c / 5
        (gradient,) = torch.autograd.grad(variance_covariance_loss(z)[1], z)
        torch.testing.assert_close(gradient, 4 / (4 * 5) * c @ (K - torch.diag(K.diagonal())))


class TestContract:
    def test_half_precision_and_autocast_compute_in_float32(self) -> None:
        z = torch.randn(6, 40, generator=torch.Generator().manual_seed(3)).bfloat16()
        plain = variance_covariance_loss(z.float())
        with torch.autocast("cpu", torch.bfloat16):
            mixed = variance_covariance_loss(z)
        assert all(torch.equal(one, other) for one, other in zip(plain, mixed, strict=True))

    def test_shapes_without_values(self) -> None:
        z = torch.empty(7, 5, device="meta", requires_grad=True)
        sum(variance_covariance_loss(z), z.new_zeros(())).backward()
        assert z.grad is not None and z.grad.is_meta

    def test_refusals(self) -> None:
        for bad in (torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 0)):
            with pytest.raises(ValueError, match=r"shape \[N, D\]"):
                variance_covariance_loss(bad)
        with pytest.raises(ValueError, match="auto, gram, covariance"):
            variance_covariance_loss(torch.zeros(2, 2), branch="svd")  # type: ignore[arg-type]


class TestHead:
    def test_layers(self) -> None:
        kinds = (nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear)
        modules = list(mlp_head(4, 8, 5))
        assert len(modules) == len(kinds) and all(map(isinstance, modules, kinds))
        assert torch.isfinite(mlp_head(4, 8, 5)(torch.randn(1, 4))).all()  # in training, a batch of one
        assert [type(module) for module in mlp_head(4, 8, 5, layers=1)] == [nn.Linear]
        assert mlp_head(4, 8, 5, layers=2)(torch.randn(3, 4)).shape == (3, 5)
        with pytest.raises(ValueError, match="at least 1; got 0"):
            mlp_head(4, 8, 5, layers=0)
