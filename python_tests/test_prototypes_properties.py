# SPDX-License-Identifier: MIT
"""What holds for the op `prototypes` on any problem: invariants on sizes, values and seeds that hypothesis chooses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from protokernels import prototype_step, soft_assign, update_prototypes
from python_tests.places import PLACES, Place
from python_tests.prototypes_oracle import as_numpy, check_update, draw, oracle

# One fixture serves all examples of a test: it only selects the backend.
COMMON = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

ODD = st.sampled_from([1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 65, 129])
TEMPERATURES = st.sampled_from([0.01, 0.07, 0.5, 1.0, 20.0, 100.0])
SEEDS = st.integers(0, 2**31 - 1)
SIMILARITIES = st.sampled_from(["cosine", "dot"])


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


def problem(place: Place, B: int, K: int, D: int, seed: int) -> tuple[Tensor, Tensor]:
    z, q = draw(B, K, D, seed)
    return z.to(place.device), q.to(place.device)


class TestValue:
    @COMMON
    @given(B=ODD, K=ODD, D=ODD, temperature=TEMPERATURES, similarity=SIMILARITIES, seed=SEEDS)
    def test_float64_agrees(
        self, place: Place, B: int, K: int, D: int, temperature: float, similarity: Any, seed: int
    ) -> None:
        z, q = problem(place, B, K, D, seed)
        step = prototype_step(z, q, temperature=temperature, new_weight=0.9, similarity=similarity, return_entropy=True)
        expected = oracle(z, q, temperature, similarity)
        expected.check_assignment(step.assignment)
        expected.check_labels(step.labels)
        assert step.entropy is not None
        expected.check_entropy(step.entropy)
        check_update(q, z, step.labels, 0.9, step.prototypes, step.counts)

    @COMMON
    @given(B=ODD, K=ODD, D=ODD, temperature=TEMPERATURES, seed=SEEDS)
    def test_rows_of_the_assignment_are_distributions(
        self, place: Place, B: int, K: int, D: int, temperature: float, seed: int
    ) -> None:
        z, q = problem(place, B, K, D, seed)
        c = soft_assign(z, q, temperature=temperature)
        assert (c >= 0).all()
        # K terms, each within an ulp or so after one common scale
        np.testing.assert_allclose(as_numpy(c).sum(axis=1), 1.0, atol=(K + 8) * 2.0**-24)

    @COMMON
    @given(B=ODD, K=ODD, D=ODD, seed=SEEDS)
    def test_permuting_the_rows_permutes_c_and_keeps_the_prototypes(
        self, place: Place, B: int, K: int, D: int, seed: int
    ) -> None:
        z, q = problem(place, B, K, D, seed)
        order = torch.randperm(B, generator=torch.Generator().manual_seed(seed)).to(place.device)
        one = prototype_step(z, q, temperature=0.1, new_weight=0.9)
        other = prototype_step(z[order], q, temperature=0.1, new_weight=0.9)
        if place.backend == "native":  # a row is computed alone, wherever it stands
            assert torch.equal(other.assignment, one.assignment[order]) and torch.equal(other.labels, one.labels[order])
        else:
            oracle(z[order], q, 0.1, "cosine").check_assignment(other.assignment)
        if torch.equal(other.labels, one.labels[order]):
            assert torch.equal(other.counts, one.counts)
            # float64 sums in another order, then one rounding each: they may fall on neighbouring float32 numbers
            torch.testing.assert_close(other.prototypes, one.prototypes, rtol=2.0**-23, atol=1e-12)

    @COMMON
    @given(B=ODD, K=ODD, D=ODD, seed=SEEDS)
    def test_permuting_the_prototypes_permutes_the_columns(
        self, place: Place, B: int, K: int, D: int, seed: int
    ) -> None:
        z, q = problem(place, B, K, D, seed)
        order = torch.randperm(K, generator=torch.Generator().manual_seed(seed)).to(place.device)
        one = prototype_step(z, q, temperature=0.1, new_weight=0.9)
        other = prototype_step(z, q[order], temperature=0.1, new_weight=0.9)
        oracle(z, q[order], 0.1, "cosine").check_assignment(other.assignment)
        oracle(z, q, 0.1, "cosine").check_labels(order[other.labels])
        assert int(one.counts.sum()) == int(other.counts.sum()) == B

    @COMMON
    @given(B=ODD, K=ODD, D=ODD, seed=SEEDS, power=st.integers(-16, 90))
    def test_cosine_ignores_the_length_of_vectors(
        self, place: Place, B: int, K: int, D: int, seed: int, power: int
    ) -> None:
        z, q = problem(place, B, K, D, seed)
        rows = torch.randint(0, 5, (B, 1), generator=torch.Generator().manual_seed(seed)).to(place.device)
        c = soft_assign(z, q, temperature=0.1)
        longer = soft_assign(z * 2.0**power * 2.0**rows, q * 2.0 ** -(power // 4), temperature=0.1)
        torch.testing.assert_close(longer, c, rtol=0, atol=2.0**-22)  # powers of two round nowhere
        oracle(3.7 * z, 0.3 * q, 0.1, "cosine").check_assignment(soft_assign(3.7 * z, 0.3 * q, temperature=0.1))

    @COMMON
    @given(B=ODD, K=ODD, D=ODD, seed=SEEDS)
    def test_dot_of_unit_vectors_is_cosine(self, place: Place, B: int, K: int, D: int, seed: int) -> None:
        z, q = problem(place, B, K, D, seed)
        z, q = torch.nn.functional.normalize(z.double()), torch.nn.functional.normalize(q.double())
        torch.testing.assert_close(
            soft_assign(z, q, temperature=0.1, similarity="dot"), soft_assign(z, q, temperature=0.1), rtol=1e-12, atol=0
        )

    @COMMON
    @given(B=ODD, K=ODD, D=ODD, seed=SEEDS, temperature=TEMPERATURES)
    def test_entropy_lies_between_zero_and_log_k_and_grows_with_the_temperature(
        self, place: Place, B: int, K: int, D: int, seed: int, temperature: float
    ) -> None:
        z, q = (x.double() for x in problem(place, B, K, D, seed))
        entropies = []
        for factor in (1, 2):
            result = soft_assign(z, q, temperature=factor * temperature, return_entropy=True)
            assert result.entropy is not None
            entropies.append(result.entropy)
        rounding = 1e-11
        assert (entropies[0] >= -rounding).all() and (entropies[1] <= np.log(K) + rounding).all()
        assert (entropies[1] >= entropies[0] - rounding).all()

    @COMMON
    @given(B=ODD, K=ODD, D=ODD, seed=SEEDS, weight=st.floats(0, 1, width=32))
    def test_counts_add_up_and_the_blend_lies_between_old_and_mean(
        self, place: Place, B: int, K: int, D: int, seed: int, weight: float
    ) -> None:
        z, q = problem(place, B, K, D, seed)
        labels = torch.randint(-2, K, (B,), generator=torch.Generator().manual_seed(seed)).to(place.device)
        updated, counts = update_prototypes(q, z, labels, new_weight=weight)
        check_update(q, z, labels, weight, updated, counts)
        assert int(counts.sum()) == int((labels >= 0).sum())
        means, _ = update_prototypes(q, z, labels, new_weight=1.0)
        slack = 2.0**-22 * torch.maximum(q.abs(), means.abs())
        assert (updated >= torch.minimum(q, means) - slack).all() and (updated <= torch.maximum(q, means) + slack).all()


class TestGradient:
    @COMMON
    @given(B=ODD, K=ODD, D=ODD, seed=SEEDS)
    def test_cosine_gradients_are_orthogonal_to_their_vectors(
        self, place: Place, B: int, K: int, D: int, seed: int
    ) -> None:
        z, q = (x.double().requires_grad_() for x in problem(place, B, K, D, seed))
        c = soft_assign(z, q, temperature=0.3)
        weights = torch.randn(B, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(place.device)
        grad_z, grad_q = torch.autograd.grad((c * weights).sum(), (z, q))
        for x, grad in ((z, grad_z), (q, grad_q)):
            along = (x * grad).sum(dim=1).detach()
            # the projection removes a component as large as the weights allow
            scale = 100 * weights.abs().sum() * 2.0**-53
            assert (along.abs() <= scale).all()

    @COMMON
    @given(B=ODD, K=ODD, D=ODD, seed=SEEDS, similarity=SIMILARITIES)
    def test_the_sum_of_a_row_has_no_gradient(
        self, place: Place, B: int, K: int, D: int, seed: int, similarity: Any
    ) -> None:
        z, q = (x.requires_grad_() for x in problem(place, B, K, D, seed))
        c = soft_assign(z, q, temperature=50.0, similarity=similarity)
        for grad, other in zip(torch.autograd.grad(c.sum(), (z, q)), (q, z), strict=True):
            # rows of c sum to 1 within (K + 8) u; what is left is that times the other factor, B times for the prototypes
            norm = 1.0 if similarity == "cosine" else float(other.detach().norm())
            shortest = float(min(z.detach().norm(dim=1).min(), q.detach().norm(dim=1).min()))
            scale = max(norm, 1 / shortest if similarity == "cosine" else norm)
            assert float(grad.abs().max()) <= 2 * (K + 8) * 2.0**-24 * B * scale / 50.0
