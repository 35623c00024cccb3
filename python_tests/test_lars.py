# SPDX-License-Identifier: MIT
"""LARS against a loop over tensors, its options, its state; and the schedule with a ramp."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate", reason="training needs the extra protokernels[train]")

from protokernels.training.optimizers import LARS, ramp_cosine


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (5,), (2, 3, 2, 2), ())]


def give_gradients(weights: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)


class TestLars:
    @pytest.mark.parametrize("weight_decay", [0.0, 0.1])
    def test_sparse_gradients_are_refused_before_anything_changes(self, weight_decay: float) -> None:
        table, other = nn.Embedding(5, 3, sparse=True), nn.Parameter(torch.ones(2, 2))
        before = table.weight.detach().clone()
        optimizer = LARS([{"params": [other]}, {"params": [table.weight]}], lr=1.0, weight_decay=weight_decay)
        (table(torch.tensor([1, 4])).sum() + other.sum()).backward()
        with pytest.raises(TypeError, match=r"that of a parameter \[5, 3\] is sparse: take sparse=False"):
            optimizer.step()
        assert torch.equal(table.weight, before) and torch.equal(other, torch.ones(2, 2))

    def test_two_steps_by_hand_with_all_tensors_scaled_and_the_rate_inside(self) -> None:
        """The released code's form: v <- 0.9 v + lr eta |w| / |g| g, w <- w - v, for a matrix and a bias, with a rate that changes."""
        weight, bias = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([2.0]))
        optimizer = LARS([weight, bias], lr=0.01, scaled="all", lr_in_momentum=True)
        weight.grad, bias.grad = torch.tensor([[0.6, -0.8]]), torch.tensor([-4.0])  # lengths 1 and 4
        optimizer.step()
        first, bias_first = 0.01 * 0.001 * 5.0 * torch.tensor([[0.6, -0.8]]), 0.01 * 0.001 * 2.0 / 4.0 * -4.0
        torch.testing.assert_close(weight.detach(), torch.tensor([[3.0, 4.0]]) - first)
        torch.testing.assert_close(bias.detach(), torch.tensor([2.0 - bias_first]))
        optimizer.param_groups[0]["lr"] = 0.25
        before = weight.detach().clone()
        weight.grad = torch.tensor([[2.0, 0.0]])
        bias.grad = None
        optimizer.step()
        second = 0.9 * first + 0.25 * 0.001 * before.norm() / 2.0 * torch.tensor([[2.0, 0.0]])
        torch.testing.assert_close(weight.detach(), before - second, rtol=1e-6, atol=0)
        torch.testing.assert_close(bias.detach(), torch.tensor([2.0 - bias_first]))  # no gradient, no step

    @pytest.mark.parametrize("scaled", ["matrices", "all", "none"])
    @pytest.mark.parametrize("inside", [False, True])
    def test_equals_a_loop_over_tensors(self, scaled: Any, inside: bool) -> None:
        weights = parameters()
        expected = [weight.detach().clone() for weight in weights]
        velocity = [torch.zeros_like(weight) for weight in expected]
        optimizer = LARS(weights, lr=0.3, weight_decay=0.1, eta=0.02, scaled=scaled, lr_in_momentum=inside)
        for step in range(3):
            rate = optimizer.param_groups[0]["lr"] = 0.3 / (step + 1)
            give_gradients(weights, step)
            for index, weight in enumerate(weights):
                assert weight.grad is not None
                gradient = weight.grad.clone()
                if scaled == "all" or (scaled == "matrices" and weight.ndim > 1):
                    gradient = gradient + 0.1 * expected[index]
                    gradient = 0.02 * expected[index].norm() / gradient.norm() * gradient
                velocity[index] = 0.9 * velocity[index] + (rate if inside else 1.0) * gradient
                expected[index] = expected[index] - (1.0 if inside else rate) * velocity[index]
            gradients = [weight.grad.clone() for weight in weights if weight.grad is not None]
            optimizer.step()
            assert all(torch.equal(a, w.grad) for a, w in zip(gradients, weights, strict=True))  # left as they were
        for weight, value in zip(weights, expected, strict=True):
            torch.testing.assert_close(weight.detach(), value, rtol=1e-5, atol=1e-6)

    def test_without_scaling_it_is_sgd(self) -> None:
        ours, theirs = parameters(), parameters()
        optimizers = LARS(ours, lr=0.1, scaled="none"), torch.optim.SGD(theirs, lr=0.1, momentum=0.9)
        for step in range(3):
            for weights, optimizer in zip((ours, theirs), optimizers, strict=True):
                give_gradients(weights, step)
                optimizer.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)

    def test_groups_have_their_own_options(self) -> None:
        weights = parameters()
        optimizer = LARS([{"params": weights[:1], "scaled": "none"}, {"params": weights[1:], "lr": 0.0}], lr=0.1)
        before = [weight.detach().clone() for weight in weights]
        give_gradients(weights, 0)
        optimizer.step()
        assert weights[0].grad is not None
        torch.testing.assert_close(weights[0].detach(), before[0] - 0.1 * weights[0].grad)
        assert all(torch.equal(a, w) for a, w in zip(before[1:], weights[1:], strict=True))

    @pytest.mark.parametrize("zero", ["weight", "gradient"])
    def test_no_length_means_no_scaling(self, zero: str) -> None:
        weight = nn.Parameter(torch.zeros(2, 2) if zero == "weight" else torch.ones(2, 2))
        weight.grad = torch.ones(2, 2) if zero == "weight" else torch.zeros(2, 2)
        LARS([weight], lr=0.5).step()
        assert torch.equal(weight.detach(), torch.full((2, 2), -0.5 if zero == "weight" else 1.0))

    def test_state_dict_goes_on_with_the_same_bits(self) -> None:
        whole, parts = parameters(), parameters()
        first, second = (LARS(w, lr=0.1, scaled="all", lr_in_momentum=True) for w in (whole, parts))
        for step in range(2):
            give_gradients(whole, step)
            first.step()
            give_gradients(parts, step)
            second.step()
        again = [nn.Parameter(weight.detach().clone()) for weight in parts]
        third = LARS(again, lr=9.0)
        third.load_state_dict(copy.deepcopy(second.state_dict()))
        assert third.param_groups[0]["lr_in_momentum"] is True and third.param_groups[0]["lr"] == 0.1
        give_gradients(whole, 2)
        first.step()
        give_gradients(again, 2)
        third.step()
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))

    def test_a_state_from_before_the_options_means_their_defaults(self) -> None:
        optimizer = LARS(parameters(), lr=0.1)
        state = optimizer.state_dict()
        for name in ("scaled", "lr_in_momentum"):
            del state["param_groups"][0][name]
        optimizer.load_state_dict(state)
        assert (optimizer.param_groups[0]["scaled"], optimizer.param_groups[0]["lr_in_momentum"]) == ("matrices", False)

    def test_closure_has_gradients(self) -> None:
        weight = nn.Parameter(torch.ones(2, 2))
        optimizer = LARS([weight], lr=0.5)

        def closure() -> torch.Tensor:
            loss = weight.square().sum()
            loss.backward()
            return loss

        assert optimizer.step(closure).item() == 4.0 and float(weight.detach().sum()) < 4.0

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"lr": -1.0}, "got -1.0"),
            ({"lr": 1.0, "momentum": 1.0}, "momentum in"),
            ({"lr": 1.0, "eta": 0.0}, "eta must be positive"),
            ({"lr": 1.0, "weight_decay": float("nan")}, "must not be negative"),
            ({"lr": 1.0, "scaled": "vectors"}, "matrices, all, none; got 'vectors'"),
        ],
    )
    def test_refusals(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            LARS(parameters(), **changes)


def test_ramp_then_cosine() -> None:
    """0.01 to 0.25 in 10 epochs, then 90 epochs to 0.05, as factors of 0.25."""
    factor = ramp_cosine(100, 10, start=0.04, end=0.2)
    rates = [0.25 * factor(epoch) for epoch in (0, 5, 10, 55, 100, 200)]
    assert rates == pytest.approx([0.01, 0.13, 0.25, 0.15, 0.05, 0.05])
    assert ramp_cosine(1, 0, 0.1, 0.0)(0) == 1.0
