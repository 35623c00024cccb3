# SPDX-License-Identifier: MIT
"""The CUDA kernels of `sinkhorn_features`, run on the CPU by the emulator and compared with float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from protokernels.reference import sinkhorn as reference

from .emulator.build import load, missing_tools, poisoned
from .sinkhorn_emulation import BALANCED, Case, numpy
from .sinkhorn_oracle import check

pytestmark = pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))


class TestFeatures:
    """x [2, N, D] and y [2, M, D]: the cost is that of the reference, the rest that of the dense oracle."""

    @pytest.mark.parametrize("cosine", [False, True], ids=["sqeuclidean", "cosine"])
    @pytest.mark.parametrize(("kind", "N", "M", "D"), [("f32", 1, 1, 3), ("f32", 5, 140, 33), ("f32", 70, 33, 70),
                                                       ("f32", 9, 131, 17), ("f32", 65, 30, 140),
                                                       ("f64", 65, 34, 3), ("f64", 2, 1, 40)])  # fmt: skip
    def test_matches_the_dense_problem(self, kind: str, N: int, M: int, D: int, cosine: bool) -> None:
        emulator = load("sinkhorn")
        generator = torch.Generator().manual_seed(D)
        case = Case(kind, N, M, epsilon=0.1, num_iters=3)
        x, y = ((torch.randn(2, n, D, generator=generator) / D**0.5).to(case.dtype) for n in (N, M))
        if cosine and N > 2:
            x[0, 2] = 0
        metric = "cosine" if cosine else "sqeuclidean"
        for seed, tol, rho in ((0, 0.0, BALANCED), (1, 0.05, BALANCED), (2, 0.0, (0.5, 0.3))):
            emulator.configure(seed=seed)
            case.tol, case.rho = tol, rho
            case.cost = reference.cost_matrix(x.double(), y.double(), metric)
            out = self.run(emulator, case, x, y, cosine)
            tensors = {name: torch.from_numpy(value) for name, value in vars(out).items()}
            tensors["plan"] = reference.plan(
                case.cost, tensors["f"].double(), tensors["g"].double(), case.epsilon.double()
            )
            check(SimpleNamespace(**tensors), case.answers(), case.cost, case.epsilon, case.a)
        self.check_gradients(emulator, case, x, y, out, metric)

    @staticmethod
    def run(emulator: Any, case: Case, x: Tensor, y: Tensor, cosine: bool) -> SimpleNamespace:
        (B, N, _), M = x.shape, y.shape[1]
        out = SimpleNamespace(
            f=case.empty(B, N), g=case.empty(B, M), transport_cost=case.empty(B), entropic_value=case.empty(B),
            marginal_error=case.empty(B), iterations=poisoned(B, np.int64), feasible=np.zeros(B, bool),
        )  # fmt: skip
        getattr(emulator, f"features_{case.kind}")(
            *map(numpy, (x, y, case.a, case.b, case.epsilon, None)),
            *(cosine, case.num_iters, case.tol, *case.rho, *vars(out).values()),
        )
        return out

    @staticmethod
    def check_gradients(emulator: Any, case: Case, x: Tensor, y: Tensor, out: SimpleNamespace, metric: str) -> None:
        gradients = [case.empty(*shape) for shape in (x.shape, y.shape, (2,))]
        arrays = (numpy(x), numpy(y), out.f, out.g, numpy(case.epsilon))
        run = getattr(emulator, f"features_backward_{case.kind}")
        run(*arrays, numpy(case.grad_entropic), metric == "cosine", *gradients)
        inputs = [z.to(torch.float64, copy=True).requires_grad_() for z in (x, y, case.epsilon)]
        cost, upstream = reference.cost_matrix(*inputs[:2], metric), case.grad_entropic.double()
        P = reference.plan(
            cost, *(torch.from_numpy(z).double() for z in (out.f, out.g)), case.epsilon.double()
        ).detach()
        value = (P * cost).sum((1, 2)) + inputs[2] * (torch.special.xlogy(P, P) - P).sum((1, 2))
        expected = torch.autograd.grad((value * upstream).sum(), inputs)
        # log P rounds terms of up to max C / epsilon; a gradient adds up terms P |x - y|
        error = 32 * torch.finfo(case.dtype).eps * (8 + float(cost.detach().max() / case.epsilon.min()))
        weight = float((P.sum((1, 2)) * upstream.abs()).max())
        norm = float(max(x.norm(dim=2).max(), y.norm(dim=2).max()))
        shortest = min(float(z.norm(dim=2)[z.norm(dim=2) > 0].min()) for z in (x, y))
        scales = [weight / shortest if metric == "cosine" else weight * norm * 4] * 2 + [float(expected[2].abs().max())]
        for actual, value, scale in zip(gradients, expected, scales, strict=True):
            np.testing.assert_allclose(actual, value, rtol=0, atol=error * scale)
        run(*arrays, None, metric == "cosine", *gradients)
        assert all((gradient == 0).all() for gradient in gradients)
