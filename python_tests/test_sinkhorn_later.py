# SPDX-License-Identifier: MIT
"""What is done with a Sinkhorn result later: second derivatives, plans after a change in place, inference mode, copies; and torch.func."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import protokernels
from python_tests.places import PLACES, Place

Value = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


def problem() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    cost, a = torch.rand(3, 4, 5, generator=generator, dtype=torch.float64), torch.rand(3, 4, generator=generator) + 0.1
    return cost, (a / a.sum(1, keepdim=True)).double()


def of_features(cost: Tensor, a: Tensor) -> Tensor:
    points = torch.linspace(-1, 1, 15, dtype=cost.dtype, device=cost.device).view(5, 3).expand(3, 5, 3)
    return protokernels.sinkhorn_features(cost[:, :, :3], points, a, epsilon=0.5).entropic_value


def of_clouds(cost: Tensor, a: Tensor) -> Tensor:
    points = torch.linspace(-1, 1, 15, dtype=cost.dtype, device=cost.device).view(5, 3).expand(3, 5, 3)
    return protokernels.sinkhorn_divergence(cost[:, :, :3], points, a, epsilon=0.5)


def of_costs(gradient: str) -> Value:
    def value(cost: Tensor, a: Tensor) -> Tensor:
        return protokernels.sinkhorn(cost, a, epsilon=0.5, num_iters=200, gradient=gradient).entropic_value

    return value


FIRST_ORDER = {
    "features": of_features,
    "divergence": of_clouds,
    "envelope": of_costs("envelope"),
    "implicit": of_costs("implicit"),
}


def along(x: Tensor) -> Tensor:
    """A direction in which masses keep their total."""
    direction = torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).view(x.shape) ** 3
    return direction - direction.mean(-1, keepdim=True)


def curvature(value: Value, argument: int, place: Place) -> Tensor:
    """The derivative along a direction of the gradient's part along it."""
    inputs = [x.to(place.device) for x in problem()]
    x = inputs[argument].requires_grad_()
    direction = along(x.detach())
    (first,) = torch.autograd.grad(value(*inputs).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first * direction).sum(), x)
    return (second * direction).sum()


class TestSecondDerivative:
    @pytest.mark.parametrize("argument", [0, 1])
    @pytest.mark.parametrize("name", FIRST_ORDER)
    def test_right_or_refused(self, place: Place, name: str, argument: int) -> None:
        """On native code the envelope's derivative by masses is a potential, which has one of its own; all else is refused."""
        value = FIRST_ORDER[name]
        if place.backend == "reference" or argument == 0 or name not in ("envelope", "implicit"):
            with pytest.raises(NotImplementedError, match="second derivative"):
                curvature(value, argument, place)
            return
        found = float(curvature(value, argument, place))
        inputs = [x.to(place.device) for x in problem()]
        step = 1e-3 * along(inputs[argument])

        def at(shift: float) -> float:
            moved = [x + shift * step if k == argument else x for k, x in enumerate(inputs)]
            return float(value(*moved).square().sum())

        assert found == pytest.approx((at(1) - 2 * at(0) + at(-1)) / 1e-6, rel=1e-2)

    @pytest.mark.parametrize("name", FIRST_ORDER)
    def test_a_penalty_beside_a_loss_is_not_left_out(self, place: Place, name: str) -> None:
        """The gradient of a linear value does not depend on gradients that come in, and yet on the input."""
        cost, a = (x.to(place.device) for x in problem())
        a.requires_grad_()
        (first,) = torch.autograd.grad(FIRST_ORDER[name](cost, a).sum(), a, create_graph=True)
        assert first.requires_grad

    @pytest.mark.parametrize("name", FIRST_ORDER)
    def test_forward_mode_is_refused(self, place: Place, name: str) -> None:
        cost, a = (x.to(place.device) for x in problem())
        with pytest.raises(NotImplementedError, match=r"forward.mode"):
            torch.func.jvp(lambda c: FIRST_ORDER[name](c, a), (cost,), (cost,))
        with pytest.raises(NotImplementedError, match=r"forward.mode"), forward_ad.dual_level():
            FIRST_ORDER[name](cost, forward_ad.make_dual(a, a))


class TestChangedInPlace:
    @pytest.mark.parametrize("what", ["plan", "apply"])
    @pytest.mark.parametrize("source", ["costs", "features", "epsilon"])
    def test_a_plan_of_something_else_is_refused(self, place: Place, source: str, what: str) -> None:
        cost = problem()[0].to(place.device)
        points, epsilon = cost[:, :, :3].clone(), torch.full((3,), 0.5, dtype=cost.dtype, device=place.device)
        if source == "features":
            result = protokernels.sinkhorn_features(points, points.flip(1), epsilon=epsilon)
        else:
            result = protokernels.sinkhorn(cost, epsilon=epsilon)
        {"costs": cost, "features": points, "epsilon": epsilon}[source].mul_(2)
        read = (lambda: result.plan) if what == "plan" else lambda: result.apply(result.g.unsqueeze(-1))
        with pytest.raises(RuntimeError, match=r"SinkhornResult.*: what was solved has been changed in place"):
            read()

    def test_convergence_by_other_masses_is_refused(self, place: Place) -> None:
        """As in a loop whose batches are copied into one buffer. A tolerance needs no masses; a plan neither."""
        cost, a = (x.to(place.device) for x in problem())
        result, by_tol = (protokernels.sinkhorn(cost, a, epsilon=5.0, num_iters=50, tol=tol) for tol in (0.0, 1e-3))
        assert bool(result.converged.all())
        a.zero_()
        with pytest.raises(RuntimeError, match=r"SinkhornResult.converged: .* changed in place"):
            result.converged  # noqa: B018
        assert bool(by_tol.converged.all()) and bool((result.plan.sum((1, 2)) > 0).all())

    def test_a_plan_read_before_stays(self, place: Place) -> None:
        cost, _ = (x.to(place.device) for x in problem())
        result = protokernels.sinkhorn(cost)
        before = result.plan.clone()
        cost.zero_()
        assert torch.equal(result.plan, before) and torch.equal(result.apply(before.mT), before @ before.mT)

    def test_what_was_written_before_does_not_matter(self, place: Place) -> None:
        cost = problem()[0].to(place.device)
        result = protokernels.sinkhorn(cost.mul_(0.5).add_(0.1))
        torch.testing.assert_close(result.plan.sum((1, 2)), torch.ones_like(result.transport_cost))

    def test_a_plan_read_in_inference_mode_may_be_read_again(self, place: Place) -> None:
        cost = problem()[0].to(place.device)
        result, weight = protokernels.sinkhorn(cost), torch.ones_like(cost).requires_grad_()
        with torch.inference_mode():
            inside = protokernels.sinkhorn(cost).plan
            early = result.plan
        (weight * result.plan).sum().backward()
        assert torch.equal(result.plan, early) and torch.equal(result.plan, inside)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
class TestVmap:
    @pytest.mark.parametrize("argument", ["a", "row_mask", "epsilon"])
    def test_over_masses_masks_and_epsilons(self, place: Place, argument: str) -> None:
        cost, a = (x.to(place.device) for x in problem())
        each = {"a": a, "row_mask": a > a.amin(1, keepdim=True), "epsilon": a[:, 0] + 0.3}[argument]
        solve: Value = lambda c, x: protokernels.sinkhorn(c, **{argument: x}).transport_cost  # noqa: E731
        expected = torch.stack([solve(c, x) for c, x in zip(cost, each, strict=True)])
        torch.testing.assert_close(torch.func.vmap(solve)(cost, each), expected)

    @pytest.mark.parametrize("name", FIRST_ORDER)
    def test_of_gradients(self, place: Place, name: str) -> None:
        cost, a = (x.to(place.device) for x in problem())
        one: Value = lambda c, m: FIRST_ORDER[name](c.expand(3, 4, 5), m.expand(3, 4)).sum()  # noqa: E731
        found = torch.func.vmap(torch.func.grad(one, argnums=1))(cost, a)
        expected = torch.stack([torch.func.grad(one, argnums=1)(c, m) for c, m in zip(cost, a, strict=True)])
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("penalty", [None, 1.0])
    @pytest.mark.parametrize("gradient", ["unrolled", "implicit"])
    def test_inside_of_a_gradient(self, place: Place, gradient: Any, penalty: float | None) -> None:
        """What stands for many problems does not say that a gradient is wanted, and all of few iterations counts."""
        if penalty is not None and gradient == "implicit":
            pytest.skip("the implicit gradient is for exact marginals")
        cost, _ = (x.to(place.device) for x in problem())
        epsilon = torch.tensor(0.3, dtype=cost.dtype, device=place.device, requires_grad=True)
        weight = torch.arange(1.0, 4.0, dtype=cost.dtype, device=place.device)

        def solve(c: Tensor) -> Tensor:
            return protokernels.sinkhorn(
                c, epsilon=epsilon, num_iters=2, gradient=gradient, marginal_penalty=penalty
            ).transport_cost

        leaf = cost.clone().requires_grad_()
        expected = torch.autograd.grad((solve(leaf) * weight).sum(), (leaf, epsilon))
        found = torch.autograd.grad((torch.func.vmap(solve)(leaf) * weight).sum(), (leaf, epsilon))
        torch.testing.assert_close(found, expected)
        of_all = torch.func.grad(lambda c: (torch.func.vmap(solve)(c) * weight).sum())
        torch.testing.assert_close(of_all(cost), expected[0])
        compiled = torch.compile(lambda c: (torch.func.vmap(solve)(c) * weight).sum(), backend="eager")
        torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], expected[0])

    def test_by_the_envelope_nothing_else_has_a_gradient(self, place: Place) -> None:
        leaf = problem()[0].to(place.device).requires_grad_()
        for name in ("transport_cost", "plan"):
            solve = lambda c, name=name: getattr(protokernels.sinkhorn(c, gradient="envelope"), name)  # noqa: E731
            assert not torch.func.vmap(solve)(leaf).requires_grad, name


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
class TestCopies:
    """As a DataLoader's worker sends them, or `copy` makes them."""

    def test_have_a_plan(self, copied: Any) -> None:
        for result in (protokernels.sinkhorn(problem()[0]), protokernels.sinkhorn_features(problem()[0], problem()[0])):
            other = copied(result)
            assert torch.equal(other.plan, result.plan)

    def test_know_what_was_changed(self, copied: Any) -> None:
        cost = problem()[0]
        result = protokernels.sinkhorn(cost)
        good = copied(result)
        good._source[0].mul_(2)
        cost.add_(1)
        for changed in (good, copied(result), copied(copied(result))):
            with pytest.raises(RuntimeError, match="changed in place"):
                changed.plan  # noqa: B018

    def test_know_of_changed_masses(self, copied: Any) -> None:
        cost, a = problem()
        result = protokernels.sinkhorn(cost, a)
        assert torch.equal(copied(result).converged, result.converged)
        a.mul_(2)
        for changed in (copied(result), copied(copied(result))):
            with pytest.raises(RuntimeError, match="changed in place"):
                changed.converged  # noqa: B018


def test_forward_mode_of_native_code_is_refused_by_name() -> None:
    if not protokernels.backend.native_serves(torch.device("cpu")):
        pytest.skip("needs the native library")
    cost = problem()[0]
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda c: protokernels.sinkhorn(c).transport_cost, (cost,), (cost,))


def test_the_reference_has_that_of_the_iterations() -> None:
    with protokernels.backend.use("reference"):
        cost, _ = problem()
        torch.autograd.gradgradcheck(
            lambda c: protokernels.sinkhorn(c, epsilon=0.5, num_iters=5).entropic_value, cost.requires_grad_()
        )


def test_forward_mode_of_the_iterations() -> None:
    cost, a = problem()
    with protokernels.backend.use("reference"):
        tangent = torch.linspace(-1, 1, cost.numel(), dtype=cost.dtype).view(cost.shape)
        _, forward = torch.func.jvp(lambda c: of_costs("unrolled")(c, a), (cost,), (tangent,))
        (backward,) = torch.autograd.grad(of_costs("unrolled")(cost.requires_grad_(), a).sum(), cost)
    torch.testing.assert_close(forward.sum(), (backward * tangent).sum())
