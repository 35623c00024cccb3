# SPDX-License-Identifier: MIT
"""The op `prototypes` on input that goes wrong easily: zero, tiny, huge, tied and NaN vectors, no rows, odd strides."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from protokernels import prototype_step, soft_assign
from python_tests.places import PLACES, Place
from python_tests.prototypes_oracle import draw, oracle


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


class TestValue:
    def test_one_prototype_takes_everything(self, place: Place) -> None:
        z, q = (x.to(place.device) for x in draw(33, 1, 5))
        result = soft_assign(z, q, temperature=0.01, return_labels=True, return_entropy=True)
        assert result.labels is not None and result.entropy is not None
        assert torch.equal(result.assignment, torch.ones_like(result.assignment))
        assert torch.equal(result.entropy, torch.zeros_like(result.entropy)) and not result.labels.any()

    @pytest.mark.parametrize("K", [1, 2, 31, 33, 129])
    def test_a_zero_vector_is_uniform_with_entropy_log_k(self, place: Place, K: int) -> None:
        z, q = (x.to(place.device) for x in draw(5, K, 9))
        z[1], z[3] = 0.0, 1e-13  # the second is below the floor
        cases: tuple[tuple[Any, list[int]], ...] = (("cosine", [1, 3]), ("dot", [1]))
        for similarity, zero_rows in cases:
            result = soft_assign(z, q, temperature=0.01, similarity=similarity, return_labels=True, return_entropy=True)
            for row in zero_rows:
                # K equal terms: their sum and the division round
                torch.testing.assert_close(
                    result.assignment[row], torch.full_like(result.assignment[row], 1 / K), rtol=2.0**-22, atol=0
                )
                assert result.entropy is not None and result.labels is not None
                assert float(result.entropy[row]) == pytest.approx(math.log(K), rel=1e-6, abs=1e-6)
                assert result.labels[row] == 0
            oracle(z, q, 0.01, similarity).check_assignment(result.assignment)

    def test_a_zero_prototype_scores_zero(self, place: Place) -> None:
        z, q = draw(33, 5, 9)
        q[2] = 0
        expected = oracle(z, q, 0.1, "cosine")
        assert not expected.scores[:, 2].any()
        expected.check_assignment(soft_assign(z.to(place.device), q.to(place.device), temperature=0.1))

    def test_the_floor_of_a_norm(self, place: Place) -> None:
        z = torch.tensor([[0.9e-12, 0.0], [1.1e-12, 0.0]], dtype=torch.float64, device=place.device)
        c = soft_assign(z, torch.eye(2, dtype=torch.float64, device=place.device), temperature=0.1)
        assert c[0].tolist() == [0.5, 0.5]
        assert float(c[1, 0]) == pytest.approx(1 / (1 + math.exp(-10)), rel=1e-12)

    @pytest.mark.parametrize("scale", [1e30, 1e-11, 3e37])
    def test_long_and_short_vectors_have_a_direction(self, place: Place, scale: float) -> None:
        generator = torch.Generator().manual_seed(3)
        z = torch.nn.functional.normalize(torch.randn(33, 31, generator=generator)) * scale
        q = torch.nn.functional.normalize(torch.randn(10, 31, generator=generator)) * scale
        expected = oracle(z, q, 0.1, "cosine")
        assert expected.entropy.max() < math.log(10) - 0.01  # nothing counted as zero
        expected.check_assignment(soft_assign(z.to(place.device), q.to(place.device), temperature=0.1))

    @pytest.mark.parametrize("long", [0, 1])
    def test_gradients_beside_the_longest_vectors(self, place: Place, long: int) -> None:
        """1 / 2e38 is subnormal in float32; the gradients of the other side are not small."""
        generator = torch.Generator().manual_seed(3)
        pair = [torch.nn.functional.normalize(torch.randn(n, 19, generator=generator)) for n in (5, 7)]
        # On a GPU the scores' gradients are divided by the length of z in float32 before they meet z (README, Limits).
        pair[long] *= 1e34 if place.device == "cuda" and long == 0 else 2e38
        weight = torch.randn(5, 7, generator=generator)
        found = [x.to(place.device).requires_grad_() for x in pair]
        truth = [x.double().requires_grad_() for x in pair]
        (grad,) = torch.autograd.grad(soft_assign(*found, temperature=0.1), found[1 - long], weight.to(place.device))
        (expected,) = torch.autograd.grad(soft_assign(*truth, temperature=0.1), truth[1 - long], weight.double())
        torch.testing.assert_close(grad.cpu().double(), expected, rtol=1e-4, atol=1e-5)

    def test_tiny_values_count_as_zero(self, place: Place) -> None:
        c = soft_assign(
            torch.full((3, 4), 1e-30, device=place.device), torch.eye(4, device=place.device), temperature=0.01
        )
        assert torch.equal(c, torch.full_like(c, 0.25))

    def test_ties_go_to_the_lowest_index(self, place: Place) -> None:
        _, q = draw(1, 70, 19)
        q[69] = q[40] = q[33] = q[20]  # other lanes, other vectors
        q[19] = q[3]
        z = torch.stack([q[69], q[3], q[19], q[20]]).to(place.device)
        result = soft_assign(z, q.to(place.device), temperature=0.1, return_labels=True)
        assert result.labels is not None
        assert result.labels.tolist() == [20, 3, 3, 20]

    def test_a_nan_row_stays_alone(self, place: Place) -> None:
        z, q = draw(70, 11, 19)
        clean = soft_assign(z.to(place.device), q.to(place.device), temperature=0.1)
        for bad, value in ((0, math.nan), (37, math.inf), (69, -math.inf)):
            z[bad, 5] = value
        result = soft_assign(
            z.to(place.device), q.to(place.device), temperature=0.1, return_labels=True, return_entropy=True
        )
        assert result.entropy is not None and result.labels is not None
        bad_rows = torch.zeros(70, dtype=torch.bool, device=place.device)
        bad_rows[[0, 37, 69]] = True
        assert result.assignment[bad_rows].isnan().all() and result.entropy[bad_rows].isnan().all()
        assert torch.equal(result.assignment[~bad_rows], clean[~bad_rows])
        assert result.labels[bad_rows].tolist() == [0, 0, 0]  # as torch.argmax has it

    def test_large_outputs_equal_those_of_their_pieces(self, place: Place) -> None:
        """Outputs of more than 24 MB take another way into memory."""
        z, q = (x.to(place.device) for x in draw(24601, 256, 256))
        grad = torch.linspace(-1, 1, 256, device=place.device).expand(24601, 256)
        z.requires_grad_()
        c = soft_assign(z, q, temperature=0.1)
        (grad_z,) = torch.autograd.grad(c, z, grad)
        for rows in (slice(0, 100), slice(12000, 12100), slice(24501, 24601)):
            piece = z.detach()[rows].clone().requires_grad_()
            expected = soft_assign(piece, q, temperature=0.1)
            torch.testing.assert_close(c[rows], expected, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(
                grad_z[rows], torch.autograd.grad(expected, piece, grad[rows])[0], rtol=1e-4, atol=1e-7
            )

    def test_no_rows(self, place: Place) -> None:
        q = torch.randn(5, 7, device=place.device)
        z = torch.empty(0, 7, device=place.device, requires_grad=True)
        step = prototype_step(z, q, temperature=0.1, new_weight=0.95, return_entropy=True)
        assert step.assignment.shape == (0, 5) and step.labels.shape == (0,) and step.entropy is not None
        assert step.entropy.shape == (0,) and not step.sums.any() and not step.counts.any()
        assert torch.equal(step.prototypes, q)
        (step.assignment.sum() + step.entropy.sum()).backward()
        assert z.grad is not None and z.grad.shape == (0, 7)

    def test_any_strides(self, place: Place) -> None:
        z, q = (x.to(place.device) for x in draw(37, 11, 19))
        expected = prototype_step(z, q, temperature=0.1, new_weight=0.5)
        wide = torch.full((74, 45), math.nan, device=place.device)
        wide[::2, 3:22] = z
        steps = {
            "rows and columns of a wider matrix": (wide[::2, 3:22], q),
            "transposed": (z.T.contiguous().T, q.T.contiguous().T),
            "every other column": (
                torch.stack([z, z], dim=2).flatten(1)[:, ::2],
                torch.stack([q, q], dim=2).flatten(1)[:, 1::2],
            ),
        }
        for name, (strided_z, strided_q) in steps.items():
            assert torch.equal(strided_z, z) and torch.equal(strided_q, q)
            step = prototype_step(strided_z, strided_q, temperature=0.1, new_weight=0.5)
            if place.backend == "native":
                assert torch.equal(step.assignment, expected.assignment), name
                assert torch.equal(step.prototypes, expected.prototypes), name
            else:  # a BLAS may add in another order for another layout
                torch.testing.assert_close(step.assignment, expected.assignment, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(step.prototypes, expected.prototypes, rtol=1e-5, atol=1e-6)
        expanded = soft_assign(z[:1].expand(50, 19), q[2:3].expand(4, 19), temperature=0.1)
        assert torch.equal(expanded, torch.full((50, 4), 0.25, device=place.device))
