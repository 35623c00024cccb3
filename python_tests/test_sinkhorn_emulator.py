# SPDX-License-Identifier: MIT
"""The CUDA kernels of `sinkhorn`, run on the CPU by the emulator and compared with float64.

Values against the NumPy oracle, gradients against autograd through the float64 reference. In float32 a gradient may be
off by eight times what the same reference loses in float32, plus the error of log P that the oracle derives: that is
where the rounding of the potentials enters every weight of the gradient.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from protokernels.reference import sinkhorn as reference

from .emulator.build import SEEDS, load, missing_tools
from .sinkhorn_emulation import BALANCED, Case, numpy
from .sinkhorn_oracle import Weights, draw, norm_error

pytestmark = pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))
# Sizes by the kernels that serve them: K twice in registers (up to 32, 56 and 64), once (up to 128 and 208), in shared memory, streamed
ON_CHIP = [
    ("f32", 1, 1),
    ("f32", 2, 1),
    ("f32", 31, 32),
    ("f32", 33, 2),
    ("f32", 49, 49),
    ("f32", 57, 64),
    ("f32", 65, 127),
]
ON_CHIP += [("f32", 129, 40), ("f32", 3, 240), ("f64", 1, 2), ("f64", 33, 31), ("f64", 64, 49)]
STREAMED = [("f32", 300, 3), ("f32", 5, 261), ("f32", 33, 258), ("f64", 66, 33), ("f64", 1, 70)]


class TestForward:
    @pytest.mark.parametrize("epsilon", [0.05, 0.005])
    @pytest.mark.parametrize(("kind", "N", "M"), ON_CHIP + STREAMED)
    def test_matches_the_oracle(self, kind: str, N: int, M: int, epsilon: float) -> None:
        emulator = load("sinkhorn")
        emulator.configure(seed=1)
        Case(kind, N, M, epsilon=epsilon).check_values(emulator)

    @pytest.mark.parametrize(("kind", "N", "M"), [("f32", 33, 49), ("f32", 70, 140), ("f32", 3, 260), ("f64", 20, 70)])
    def test_the_order_of_threads_changes_no_bit(self, kind: str, N: int, M: int) -> None:
        emulator = load("sinkhorn")
        case = Case(kind, N, M, num_iters=3, tol=1e-3)
        results = []
        for seed in SEEDS:
            emulator.configure(seed=seed)
            out = case.forward(emulator)
            results.append({**vars(out), **case.backward(emulator, out)})
        for other in results[1:]:
            for name, value in other.items():
                np.testing.assert_array_equal(value, results[0][name], err_msg=name)

    @pytest.mark.parametrize(("kind", "N", "M"), [("f32", 31, 20), ("f32", 49, 49), ("f32", 20, 140), ("f64", 66, 9)])
    def test_a_problem_stops_at_its_tolerance(self, kind: str, N: int, M: int) -> None:
        emulator = load("sinkhorn")
        emulator.configure(seed=2)
        out = Case(kind, N, M, epsilon=0.2, num_iters=60, tol=1e-2).check_values(emulator)
        assert out.iterations[0] != out.iterations[1] and out.iterations.max() < 60
        assert (out.marginal_error <= 1e-2).all()

    @pytest.mark.parametrize("rho", [(0.5, 0.2), (math.inf, 0.3), (0.3, math.inf)])
    @pytest.mark.parametrize(("kind", "N", "M"), [("f32", 31, 33), ("f32", 2, 140), ("f64", 9, 70)])
    def test_unbalanced(self, kind: str, N: int, M: int, rho: tuple[float, float]) -> None:
        emulator = load("sinkhorn")
        emulator.configure(seed=3)
        Case(kind, N, M, rho=rho, start=True).check_values(emulator)
        Case(kind, N, M, rho=rho, tol=1e-3, num_iters=40, epsilon=0.2).check_values(emulator)

    @pytest.mark.parametrize(("kind", "N", "M"), [("f32", 40, 30), ("f32", 140, 4), ("f64", 70, 4)])
    def test_weights_that_run_away_are_taken_in_again(self, kind: str, N: int, M: int) -> None:
        """C / epsilon in the thousands: the scaled kernel leaves its range every few iterations."""
        emulator = load("sinkhorn")
        emulator.configure(seed=4)
        case = Case(kind, N, M, epsilon=0.001, num_iters=12, start=True)
        case.check_values(emulator)
        case.check_unrolled(emulator)

    @pytest.mark.parametrize(("kind", "N", "M"), [("f32", 5, 7), ("f32", 40, 5), ("f32", 5, 130), ("f64", 70, 5)])
    def test_blocked_rows_and_columns_are_flagged(self, kind: str, N: int, M: int) -> None:
        emulator = load("sinkhorn")
        emulator.configure(seed=2)
        for rho in (BALANCED, (0.5, 0.5)):
            case = Case(kind, N, M, rho=rho)
            case.cost[0, 3], case.cost[1, :, 1] = math.inf, math.inf
            out = case.check_values(emulator)
            assert not out.feasible.any()
            assert out.f[0, 3] == -math.inf and out.g[1, 1] == -math.inf
            for value in case.backward(emulator, out).values():
                assert np.isfinite(value).all()

    @pytest.mark.parametrize(("kind", "N", "M"), [("f32", 6, 7), ("f32", 40, 5), ("f32", 5, 130), ("f64", 70, 5)])
    def test_masses_that_differ_are_flagged(self, kind: str, N: int, M: int) -> None:
        emulator = load("sinkhorn")
        case = Case(kind, N, M)
        case.a[1] *= 1.01
        assert case.check_values(emulator).feasible.tolist() == [True, False]

    @pytest.mark.parametrize(("kind", "N", "M"), [("f32", 6, 7), ("f32", 40, 5), ("f32", 5, 130), ("f64", 70, 5)])
    def test_nan_stays_in_its_problem(self, kind: str, N: int, M: int) -> None:
        emulator = load("sinkhorn")
        case = Case(kind, N, M, tol=1e-6)
        clean = case.forward(emulator)
        case.cost[1, 0, 0] = math.nan
        out = case.forward(emulator)
        np.testing.assert_array_equal(out.f[0], clean.f[0])
        assert np.isnan(out.transport_cost[1]) and not np.isnan(out.transport_cost[0])
        case = Case(kind, N, M, start=True)
        assert case.start is not None
        case.start[1] = math.nan
        out = case.forward(emulator)
        assert np.isnan(out.transport_cost[1]) and not np.isnan(out.transport_cost[0])

    @pytest.mark.parametrize(
        ("kind", "N", "M"),
        [("f32", 6, 7), ("f32", 40, 5), ("f32", 63, 64), ("f32", 5, 130), ("f32", 5, 260), ("f64", 70, 5)],
    )
    @pytest.mark.parametrize("mass", [math.inf, -math.inf, math.nan, -1.0, 3e38])
    def test_masses_that_are_none_end_in_their_problem(self, kind: str, N: int, M: int, mass: float) -> None:
        """Nobody looks at them on a GPU: every thread must take the same way nevertheless."""
        emulator = load("sinkhorn")
        emulator.configure(seed=1)
        for tol in (0.0, 1e-6):
            clean = Case(kind, N, M, tol=tol).forward(emulator)
            for side in ("a", "b"):
                case = Case(kind, N, M, tol=tol)
                getattr(case, side)[1, 3] = mass
                out = case.forward(emulator)
                np.testing.assert_array_equal(out.f[0], clean.f[0])
                assert np.isnan(out.transport_cost[1]) or not out.feasible[1]

    @pytest.mark.parametrize(("kind", "N", "M"), [("f32", 6, 7), ("f32", 40, 5), ("f32", 5, 130), ("f64", 70, 5)])
    def test_forbidden_pairs_alone_leave_a_problem_empty(self, kind: str, N: int, M: int) -> None:
        emulator = load("sinkhorn")
        for rho in (BALANCED, (0.5, 0.5)):
            case = Case(kind, N, M, rho=rho)
            case.cost[1] = math.inf
            out = case.forward(emulator)
            assert not out.feasible[1] and np.isneginf(out.f[1]).all() and np.isneginf(out.g[1]).all()
            assert out.transport_cost[1] == 0
            for name, value in case.backward(emulator, out).items():
                assert np.isfinite(value).all(), name

    def test_limits_of_the_architecture_choose_the_kernel(self) -> None:
        emulator = load("sinkhorn")
        small, large = 163 * 1024, 227 * 1024
        shapes = [(32, 32), (33, 1), (64, 64), (128, 65), (129, 129), (196, 196), (240, 220), (257, 1), (250, 250)]
        assert [emulator.tier(N, M, False, large) for N, M in shapes] == [0, 1, 1, 2, 3, 3, 3, 4, 4]
        assert [emulator.tier(N, M, False, small) for N, M in shapes] == [0, 1, 1, 2, 3, 4, 4, 4, 4]
        assert [emulator.tier(N, M, True, large) for N, M in shapes[:4]] == [1, 1, 1, 4]

    @pytest.mark.parametrize(("N", "M"), [(131, 196), (208, 40)])
    def test_wide_problems_on_sm_90(self, N: int, M: int) -> None:
        emulator = load("sinkhorn")
        emulator.configure(seed=1, architecture="sm_90")
        for epsilon in (0.05, 0.005):
            Case("f32", N, M, epsilon=epsilon, num_iters=3).check_values(emulator)
        emulator.configure(seed=1)

    def test_the_largest_problem_on_chip_launches(self) -> None:
        emulator = load("sinkhorn")
        emulator.configure(seed=1, architecture="sm_90")
        case = Case("f32", 220, 240, num_iters=1)
        out = case.check_values(emulator)
        case.backward(emulator, out)
        emulator.configure(seed=1)


class TestUnrolled:
    @pytest.mark.parametrize("epsilon", [0.05, 0.005])
    @pytest.mark.parametrize(("kind", "N", "M"), ON_CHIP + STREAMED)
    def test_matches_autograd(self, kind: str, N: int, M: int, epsilon: float) -> None:
        emulator = load("sinkhorn")
        emulator.configure(seed=1)
        Case(kind, N, M, epsilon=epsilon, num_iters=4).check_unrolled(emulator)

    @pytest.mark.parametrize(("kind", "N", "M"), [("f32", 20, 20), ("f32", 49, 33), ("f32", 9, 140), ("f64", 33, 66)])
    def test_options(self, kind: str, N: int, M: int) -> None:
        emulator = load("sinkhorn")
        emulator.configure(seed=2)
        Case(kind, N, M, epsilon=0.2, num_iters=40, tol=1e-2, start=True).check_unrolled(emulator)
        for rho in ((0.5, 0.2), (math.inf, 0.3), (0.3, math.inf)):
            Case(kind, N, M, num_iters=3, rho=rho, start=True).check_unrolled(emulator)

    def test_absent_upstream_gradients_are_zero(self) -> None:
        emulator = load("sinkhorn")
        for kind, N, M in (("f32", 5, 6), ("f32", 3, 260), ("f64", 65, 2)):
            case = Case(kind, N, M)
            out = case.forward(emulator)
            case.grad_f, case.grad_g = torch.zeros_like(case.grad_f), torch.zeros_like(case.grad_g)
            case.grad_entropic = torch.zeros_like(case.grad_entropic)
            expected = case.backward(emulator, out)
            case.grad_f = case.grad_g = case.grad_entropic = None  # type: ignore[assignment]
            for name, value in case.backward(emulator, out).items():
                np.testing.assert_array_equal(value, expected[name])


class TestImplicit:
    @pytest.mark.parametrize(("kind", "N", "M"), [("f32", 1, 1), ("f32", 9, 31), ("f32", 40, 49), ("f32", 100, 6),
                                                  ("f32", 130, 8), ("f32", 4, 258), ("f64", 33, 20), ("f64", 66, 5)])  # fmt: skip
    def test_matches_the_dense_solve(self, kind: str, N: int, M: int) -> None:
        emulator = load("sinkhorn")
        emulator.configure(seed=1)
        case = Case(kind, N, M, epsilon=0.5, num_iters=40)
        present = (case.a > 0).to(case.dtype), (case.b > 0).to(case.dtype)
        case.grad_f, case.grad_g = case.grad_f * present[0], case.grad_g * present[1]
        excess = (case.grad_f.sum(1) - case.grad_g.sum(1)) / present[1].sum(1)  # f + c, g - c must change nothing
        case.grad_g += excess[:, None] * present[1]
        exact = reference.solve(
            *(x.double() for x in (case.cost, case.a, case.b, case.epsilon)), None, case.num_iters, 0.0, BALANCED
        )
        out = SimpleNamespace(
            f=numpy(exact.f.to(case.dtype)), g=numpy(exact.g.to(case.dtype)), iterations=np.full(2, 40)
        )
        gradients = case.backward(emulator, out, implicit=True)
        for name, mask in zip(("a", "b"), present, strict=True):
            assert (gradients[name][mask.numpy() == 0] == 0).all()
        case.check_gradients(gradients, case.autograd(torch.float64, True), case.autograd(case.dtype, True))

    def test_parts_that_do_not_touch(self) -> None:
        """Five problems in one: the linear system is singular five times, and rounding leaves mass between them."""
        emulator = load("sinkhorn")
        emulator.configure(seed=1)
        generator = torch.Generator().manual_seed(0)
        case = Case("f32", 280, 30, epsilon=0.1, num_iters=500)
        apart = torch.arange(280).unsqueeze(1) // 56 != torch.arange(30) // 6
        case.cost = 2 * torch.rand(2, 280, 30, generator=generator).masked_fill(apart, math.inf)
        case.a, case.b = torch.full((2, 280), 1 / 280), torch.full((2, 30), 1 / 30)
        inputs = [x.double() for x in (case.cost, case.a, case.b, case.epsilon)]
        exact = reference.solve(*inputs, None, case.num_iters, 0.0, BALANCED)
        plan = reference.plan(inputs[0], exact.f, exact.g, inputs[3])
        pull = plan * torch.randn(plan.shape, generator=generator) / inputs[3].view(2, 1, 1)  # of a loss of the plan
        case.grad_f, case.grad_g = pull.sum(2).float(), pull.sum(1).float()
        out = SimpleNamespace(f=numpy(exact.f.float()), g=numpy(exact.g.float()), iterations=np.full(2, 500))
        actual = torch.from_numpy(case.backward(emulator, out, implicit=True)["cost"]).double()
        expected = case.autograd(torch.float64, implicit=True)["cost"]
        assert (actual - expected).norm() < 1e-4 * expected.norm()

    @pytest.mark.parametrize("smallest", [1e-10, 1e-30])
    @pytest.mark.parametrize(
        ("kind", "N", "M"), [("f32", 9, 7), ("f32", 9, 70), ("f32", 9, 261), ("f64", 9, 7), ("f64", 9, 70)]
    )
    def test_masses_far_apart(self, kind: str, N: int, M: int, smallest: float) -> None:
        """The lightest entries are the larger part of every scaled norm; the others have to be met all the same."""
        emulator = load("sinkhorn")
        emulator.configure(seed=1)
        cost, a, b = draw(1, N, M)
        for mass in (a, b):
            mass[:, -3:] = torch.tensor([smallest, 10 * smallest, smallest])
            mass[:, :-3] /= mass[:, :-3].sum()
        case = Case.of(kind, cost, a, b, torch.tensor([0.3]), 1000)
        inputs = [x.double().requires_grad_() for x in (case.cost, case.a, case.b, case.epsilon)]
        exact = reference.solve(*inputs, None, 1000, 0.0, BALANCED)
        out = SimpleNamespace(
            f=numpy(exact.f.to(case.dtype)), g=numpy(exact.g.to(case.dtype)), iterations=np.full(1, 1000)
        )
        weights = Weights.draw(1, N, M, gauge_free=True)
        losses = {
            "transport": (exact.transport_cost.sum(), 0.0),
            "potentials": ((weights.f * exact.f).sum() + (weights.g * exact.g).sum(), 1.0),
        }
        for loss, of_potentials in losses.values():
            case.grad_f, case.grad_g = (of_potentials * w.to(case.dtype) for w in (weights.f, weights.g))
            case.grad_transport = torch.full((1,), 1 - of_potentials, dtype=case.dtype)
            found = case.backward(emulator, out, implicit=True)
            expected = torch.autograd.grad(loss, inputs, retain_graph=True)
            for name, value in zip(("cost", "a", "b", "epsilon"), expected, strict=True):
                actual = torch.from_numpy(found[name]).double()
                if name in ("a", "b"):  # by their logarithms, but for a constant of all: what a softmax passes on
                    mass = getattr(case, name).double()
                    actual, value = (mass * (x - (mass * x).sum() / mass.sum()) for x in (actual, value))
                assert norm_error(actual, value) < (1e-4 if kind == "f32" else 1e-11)

    @pytest.mark.parametrize(
        ("kind", "N", "M"), [("f32", 8, 8), ("f32", 120, 70), ("f32", 280, 30), ("f64", 8, 8), ("f64", 80, 30)]
    )
    def test_a_loss_that_shifts_parts_against_each_other(self, kind: str, N: int, M: int) -> None:
        """Along the constants of the parts it has no derivative, and what is left a convention decides; but it is not large."""
        emulator = load("sinkhorn")
        emulator.configure(seed=1)
        generator = torch.Generator().manual_seed(0)
        cost = torch.rand(1, N, M, generator=generator).double()
        cost[0, : N // 2, M // 2 :] = cost[0, N // 2 :, : M // 2] = math.inf
        case = Case.of(kind, cost, torch.full((1, N), 1 / N), torch.full((1, M), 1 / M), torch.tensor([0.3]), 500)
        exact = reference.solve(
            *(x.double() for x in (case.cost, case.a, case.b, case.epsilon)), None, 500, 0.0, BALANCED
        )
        out = SimpleNamespace(
            f=numpy(exact.f.to(case.dtype)), g=numpy(exact.g.to(case.dtype)), iterations=np.full(1, 500)
        )
        case.grad_f, case.grad_g = (torch.randn(1, n, generator=generator).to(case.dtype) for n in (N, M))
        found = torch.from_numpy(case.backward(emulator, out, implicit=True)["cost"]).double()
        assert found.norm() < 2 * case.autograd(torch.float64, implicit=True)["cost"].norm()


class TestPlan:
    @pytest.mark.parametrize(("kind", "N", "M"), [("f32", 1, 1), ("f32", 33, 270), ("f64", 70, 31)])
    def test_plan_and_envelope_gradients(self, kind: str, N: int, M: int) -> None:
        emulator = load("sinkhorn")
        emulator.configure(seed=1)
        case = Case(kind, N, M)
        out = case.forward(emulator)
        plan = case.plan(emulator, out)
        weight = torch.randn(plan.shape, generator=torch.Generator().manual_seed(0)).to(case.dtype)
        inputs = [torch.from_numpy(x).double().requires_grad_() for x in (numpy(case.cost), out.f, out.g)]
        epsilon = case.epsilon.to(torch.float64, copy=True).requires_grad_()
        exact = reference.plan(*inputs, epsilon)
        error = 16 * torch.finfo(case.dtype).eps * float(2 / case.epsilon.min())  # log P rounds terms of 2 / epsilon
        np.testing.assert_allclose(plan, exact.detach(), rtol=error, atol=1e-37)
        gradients = [self_like(case, x) for x in (numpy(case.cost), out.f, out.g, numpy(case.epsilon))]
        getattr(emulator, f"plan_backward_{kind}")(
            numpy(weight), plan, numpy(case.cost), out.f, out.g, numpy(case.epsilon), *gradients
        )
        expected = torch.autograd.grad((exact * weight).sum(), [*inputs, epsilon], retain_graph=True)
        for actual, value in zip(gradients, expected, strict=True):
            np.testing.assert_allclose(actual, value, rtol=0, atol=error * float(value.abs().max() + 1e-30))

        grad_cost, grad_epsilon = self_like(case, numpy(case.cost)), self_like(case, numpy(case.epsilon))
        getattr(emulator, f"envelope_{kind}")(
            numpy(case.cost), out.f, out.g, numpy(case.epsilon), numpy(case.grad_entropic), grad_cost, grad_epsilon
        )
        P = exact.detach()
        upstream = case.grad_entropic.double()
        np.testing.assert_allclose(grad_cost, P * upstream[:, None, None], rtol=error, atol=1e-37)
        entropy = (torch.special.xlogy(P, P) - P).sum((1, 2)) * upstream
        np.testing.assert_allclose(grad_epsilon, entropy, rtol=0, atol=error * float(entropy.abs().max()))


def self_like(case: Case, x: Any) -> Any:
    return case.empty(*x.shape)
