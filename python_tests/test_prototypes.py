# SPDX-License-Identifier: MIT
"""The op `prototypes`: soft assignment and the fused step, against float64 and closed forms.

`test_prototypes_edges.py` holds zero, huge, tied and NaN vectors, `test_prototypes_update.py` the moving average,
`test_prototypes_properties.py` invariants on random problems, `test_prototypes_torch.py` what torch does with the op
(compile, export, autocast), `test_nn_prototypes.py` the module.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import protokernels
from protokernels import prototype_step, soft_assign
from python_tests.places import PLACES, Place
from python_tests.prototypes_oracle import (
    SIZES,
    as_numpy,
    check_update,
    compare,
    draw,
    gradient_errors,
    oracle,
    plain_soft_assign,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


class TestValue:
    @pytest.mark.parametrize("similarity", ["cosine", "dot"])
    @pytest.mark.parametrize(("B", "K", "D"), SIZES)
    def test_every_output_within_rounding_of_float64(
        self, place: Place, B: int, K: int, D: int, similarity: Any
    ) -> None:
        z, q = draw(B, K, D, seed=B + K + D)
        for temperature in (0.01, 0.1, 1.0, 100.0):
            expected = oracle(z, q, temperature, similarity)
            step = prototype_step(
                z.to(place.device),
                q.to(place.device),
                temperature=temperature,
                new_weight=0.95,
                similarity=similarity,
                return_entropy=True,
            )
            expected.check_assignment(step.assignment)
            expected.check_labels(step.labels)
            assert step.entropy is not None
            expected.check_entropy(step.entropy)
            check_update(q, z, step.labels, 0.95, step.prototypes, step.counts)

    @pytest.mark.parametrize("z_dtype", DTYPES)
    @pytest.mark.parametrize("q_dtype", DTYPES)
    def test_every_pair_of_types(self, place: Place, z_dtype: torch.dtype, q_dtype: torch.dtype) -> None:
        z, q = draw(33, 31, 33, seed=1)
        z, q = z.to(place.device, z_dtype), q.to(place.device, q_dtype)
        for similarity in ("cosine", "dot"):
            step = prototype_step(z, q, temperature=0.5, new_weight=0.25, similarity=similarity, return_entropy=True)
            expected = oracle(z, q, 0.5, similarity)
            assert step.entropy is not None
            assert step.assignment.dtype == step.entropy.dtype == torch.promote_types(z_dtype, q_dtype)
            expected.check_assignment(step.assignment)
            expected.check_entropy(step.entropy)
            expected.check_labels(step.labels)
            check_update(q, z, step.labels, 0.25, step.prototypes, step.counts)
            assert step.sums.dtype == torch.float64

    def test_float64_is_computed_in_float64(self, place: Place) -> None:
        z, q = draw(129, 31, 33, dtype=torch.float64)
        z[:, 0] += 1e-9  # lost in float32
        expected = oracle(z, q, 0.05, "cosine")
        assert expected.assignment_error.max() < 1e-11
        expected.check_assignment(soft_assign(z.to(place.device), q.to(place.device), temperature=0.05))

    def test_labels_and_entropy_come_only_when_asked_for(self, place: Place) -> None:
        z, q = (x.to(place.device) for x in draw(33, 5, 7))
        plain = soft_assign(z, q, temperature=0.3)
        assert isinstance(plain, Tensor)
        with_labels = soft_assign(z, q, temperature=0.3, return_labels=True)
        with_entropy = soft_assign(z, q, temperature=0.3, return_entropy=True)
        assert isinstance(with_labels, protokernels.SoftAssignment)
        assert isinstance(with_entropy, protokernels.SoftAssignment)
        assert with_labels.entropy is None and with_entropy.labels is None
        assert torch.equal(plain, with_labels.assignment) and torch.equal(plain, with_entropy.assignment)
        assert with_labels.labels is not None
        oracle(z, q, 0.3, "cosine").check_labels(with_labels.labels)

    def test_two_prototypes_are_a_sigmoid(self, place: Place) -> None:
        angle = torch.linspace(-3, 3, 129, dtype=torch.float64, device=place.device)
        z = 7.0 * torch.stack([angle.cos(), angle.sin()], dim=1)
        q = torch.tensor([[3.0, 0.0], [0.0, 0.5]], dtype=torch.float64, device=place.device)
        c = soft_assign(z, q, temperature=0.2)
        torch.testing.assert_close(c[:, 0], torch.sigmoid((angle.cos() - angle.sin()) / 0.2), rtol=1e-13, atol=1e-14)

    def test_the_step_is_assignment_and_update(self, place: Place) -> None:
        z, q = (x.to(place.device) for x in draw(300, 10, 32))
        step = prototype_step(z, q, temperature=0.1, new_weight=0.95)
        parts = soft_assign(z, q, temperature=0.1, return_labels=True)
        assert parts.labels is not None
        updated = protokernels.update_prototypes(q, z, parts.labels, new_weight=0.95)
        assert torch.equal(step.assignment, parts.assignment) and torch.equal(step.labels, parts.labels)
        assert torch.equal(step.counts, updated.counts) and torch.equal(step.prototypes, updated.prototypes)

    def test_a_temperature_tensor_is_its_value(self, place: Place) -> None:
        z, q = (x.to(place.device) for x in draw(33, 10, 32))
        expected = soft_assign(z, q, temperature=0.25)
        for shape in ((), (1,), (1, 1)):
            for dtype in DTYPES:
                tensor = torch.full(shape, 0.25, dtype=dtype, device=place.device)
                assert torch.equal(soft_assign(z, q, temperature=tensor), expected)


class TestGradient:
    @pytest.mark.parametrize("similarity", ["cosine", "dot"])
    @pytest.mark.parametrize(("B", "K", "D"), [(3, 4, 5), (1, 1, 1), (2, 9, 1), (33, 2, 3)])
    def test_gradcheck(self, place: Place, B: int, K: int, D: int, similarity: Any) -> None:
        z, q = (x.to(place.device).requires_grad_() for x in draw(B, K, D, seed=5, dtype=torch.float64))
        temperature = torch.tensor([0.7], dtype=torch.float64, device=place.device, requires_grad=True)

        def outputs(z: Tensor, q: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
            result = soft_assign(z, q, temperature=temperature, similarity=similarity, return_entropy=True)
            assert result.entropy is not None
            return result.assignment, result.entropy

        assert torch.autograd.gradcheck(outputs, (z, q, temperature))

    @pytest.mark.parametrize("similarity", ["cosine", "dot"])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("B", "K", "D"), [(1, 1, 1), (33, 31, 33), (129, 33, 65), (300, 10, 32), (5, 520, 530)])
    def test_within_rounding_of_float64(
        self, place: Place, B: int, K: int, D: int, dtype: torch.dtype, similarity: Any
    ) -> None:
        z, q = (x.to(place.device).requires_grad_() for x in draw(B, K, D, seed=K, dtype=dtype))
        generator = torch.Generator().manual_seed(9)
        # upstream gradients that every type can hold
        grad_c = torch.randn(B, K, generator=generator).bfloat16().clamp(-4, 4).to(place.device)
        grad_h = torch.randn(B, generator=generator).bfloat16().clamp(-4, 4).to(place.device)
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        tau = torch.tensor(
            0.5 if similarity == "cosine" else 32.0, dtype=compute, device=place.device, requires_grad=True
        )
        result = soft_assign(z, q, temperature=tau, similarity=similarity, return_entropy=True)
        assert result.entropy is not None
        outputs = (result.assignment, result.entropy)
        actual = torch.autograd.grad(outputs, (z, q, tau), (grad_c.to(dtype), grad_h.to(dtype)))

        exact = [x.detach().double().requires_grad_() for x in (z, q, tau)]
        outputs = plain_soft_assign(exact[0], exact[1], exact[2], similarity)
        expected = torch.autograd.grad(outputs, exact, (grad_c.double(), grad_h.double()))
        errors = gradient_errors(z, q, float(tau.detach()), similarity, grad_c, grad_h)
        for a, e, error, like in zip(actual, expected, errors, (z, q, tau), strict=True):
            assert a.dtype == like.dtype
            compare(a, as_numpy(e), error)

    def test_zero_vectors_pass_no_gradient(self, place: Place) -> None:
        z, q = (x.to(place.device) for x in draw(33, 10, 19))
        z[4], q[7] = 0, 0
        z.requires_grad_(), q.requires_grad_()
        c = soft_assign(z, q, temperature=0.1)
        (c * torch.arange(10.0, device=place.device)).sum().backward()
        assert z.grad is not None and q.grad is not None
        assert z.grad.isfinite().all() and q.grad.isfinite().all()
        assert not z.grad[4].any() and not q.grad[7].any()
        assert z.grad[[3, 5]].any(dim=1).all() and q.grad[[6, 8]].any(dim=1).all()

    def test_a_sharp_temperature_gives_finite_gradients(self, place: Place) -> None:
        z, q = (x.to(place.device).requires_grad_() for x in draw(129, 31, 33))
        temperature = torch.tensor(0.001, device=place.device, requires_grad=True)
        result = soft_assign(z, q, temperature=temperature, return_entropy=True)
        assert result.entropy is not None
        assert (result.assignment == 0).any()  # where c log c is 0 times infinity
        (result.assignment[:, 0].sum() + result.entropy.sum()).backward()
        for x in (z, q, temperature):
            assert x.grad is not None and x.grad.isfinite().all()

    def test_subnormal_numbers_of_the_caller_stay(self, place: Place) -> None:
        """The CPU kernels flush them to zero while they work: on every thread that they ran on this must be over afterwards."""
        z, q = (x.to(place.device).requires_grad_() for x in draw(4096, 64, 64))
        soft_assign(z, q, temperature=0.005).square().sum().backward()
        assert (torch.full((1 << 18,), 1e-40) * 0.5).all()  # on all threads

    @pytest.mark.parametrize(
        "wanted", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
    )
    def test_only_what_needs_a_gradient_gets_one(self, place: Place, wanted: tuple[bool, ...]) -> None:
        z, q = (x.to(place.device) for x in draw(33, 10, 19))
        everything = [x.clone().requires_grad_() for x in (z, q, torch.tensor(0.5, device=place.device))]
        some = [x.detach().clone().requires_grad_(want) for x, want in zip(everything, wanted, strict=True)]
        for z, q, temperature in (everything, some):
            soft_assign(z, q, temperature=temperature)[:, ::2].square().sum().backward()
        for want, full, x in zip(wanted, everything, some, strict=True):
            if want:
                assert x.grad is not None and full.grad is not None and torch.equal(x.grad, full.grad)
            else:
                assert x.grad is None

    def test_the_assignment_may_be_used_twice(self, place: Place) -> None:
        z, q = (x.to(place.device) for x in draw(33, 10, 19))
        z.requires_grad_()
        c = soft_assign(z, q, temperature=0.5)
        (first,) = torch.autograd.grad(c[:, 0].sum(), z, retain_graph=True)
        (second,) = torch.autograd.grad(c.square().sum(), z, retain_graph=True)
        (both,) = torch.autograd.grad(c[:, 0].sum() + c.square().sum(), z)
        torch.testing.assert_close(both, first + second, rtol=1e-5, atol=1e-6 * float(both.abs().max()))

    def test_the_step_differentiates_like_the_assignment(self, place: Place) -> None:
        gradients = []
        for fused in (False, True):
            z, q = (x.to(place.device).requires_grad_() for x in draw(129, 10, 19))
            if fused:
                step = prototype_step(z, q, temperature=0.5, new_weight=0.95)
                assert not (step.prototypes.requires_grad or step.sums.requires_grad)
                c = step.assignment
            else:
                c = soft_assign(z, q, temperature=0.5)
            gradients.append(torch.autograd.grad(c.square().sum(), (z, q)))
        for a, b in zip(*gradients, strict=True):
            assert torch.equal(a, b)

    def test_a_second_derivative_is_refused_natively_and_right_in_the_reference(self, place: Place) -> None:
        z, q = (x.to(place.device).requires_grad_() for x in draw(3, 4, 5, dtype=torch.float64))
        if place.backend == "reference":
            assert torch.autograd.gradgradcheck(lambda z, q: soft_assign(z, q, temperature=0.7), (z, q))
            return
        (gradient,) = torch.autograd.grad(soft_assign(z, q, temperature=0.7).square().sum(), z, create_graph=True)
        with pytest.raises(NotImplementedError, match=r"no second derivative; use .*reference"):
            gradient.sum().backward()


def call(**changes: Any) -> Any:
    """soft_assign on a right problem, with some arguments changed."""
    arguments: dict[str, Any] = {"z": torch.ones(4, 3), "prototypes": torch.eye(3), "temperature": 0.1}
    arguments.update(changes)
    return soft_assign(arguments.pop("z"), arguments.pop("prototypes"), **arguments)


class TestContract:
    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"z": [[1.0]]}, TypeError, r"z must be a torch.Tensor of shape \[B, D\]; got list"),
            (
                {"z": torch.ones(4, 3, dtype=torch.int64)},
                TypeError,
                r"z must be float32.*got int64 \[4, 3\] on cpu; convert it",
            ),
            ({"prototypes": torch.ones(3, 3, dtype=torch.bool)}, TypeError, r"prototypes must be float32.*got bool"),
            ({"z": torch.ones(3)}, ValueError, r"z must have shape \[B, D\]; got float32 \[3\] on cpu; pass z\[None\]"),
            ({"z": torch.ones(2, 4, 3)}, ValueError, r"z must have shape.*flatten it, e.g. z.flatten\(0, -2\)"),
            ({"z": torch.ones(4, 2)}, ValueError, r"must share D; got \[4, 2\] and \[3, 3\]"),
            ({"prototypes": torch.ones(0, 3)}, ValueError, r"at least one vector.*got \[0, 3\]"),
            (
                {"z": torch.ones(4, 0), "prototypes": torch.ones(3, 0)},
                ValueError,
                r"at least one dimension; got \[3, 0\]",
            ),
            (
                {"prototypes": torch.ones(3, 3, device="meta")},
                ValueError,
                r"z is on cpu and prototypes on meta; move one",
            ),
            ({"similarity": "euclidean"}, ValueError, r"similarity must be 'cosine' or 'dot'; got 'euclidean'"),
            ({"similarity": np.zeros(2)}, ValueError, r"similarity must be 'cosine' or 'dot'; got array"),
            ({"temperature": 0.0}, ValueError, r"temperature must be positive and finite; got 0.0"),
            ({"temperature": -1}, ValueError, r"temperature must be positive and finite; got -1"),
            ({"temperature": math.nan}, ValueError, r"temperature must be positive and finite; got nan"),
            ({"temperature": math.inf}, ValueError, r"temperature must be positive and finite; got inf"),
            ({"temperature": "warm"}, TypeError, r"temperature must be a positive number.*got str"),
            ({"temperature": True}, TypeError, r"temperature must be a positive number.*got bool"),
            ({"temperature": torch.ones(2)}, ValueError, r"one-element float tensor; got float32 \[2\]"),
            ({"temperature": torch.tensor(1)}, ValueError, r"one-element float tensor; got int64"),
            ({"temperature": torch.ones((), device="meta")}, ValueError, r"temperature is on meta and z on cpu"),
        ],
    )
    def test_wrong_arguments_are_named(self, changes: dict[str, Any], error: type[Exception], message: str) -> None:
        assert call().shape == (4, 3)
        with pytest.raises(error, match=f"^soft_assign: .*{message}"):
            call(**changes)

    @pytest.mark.parametrize(
        ("weight", "error", "message"),
        [
            (1.5, ValueError, r"new_weight must lie in \[0, 1\]; got 1.5"),
            (math.nan, ValueError, "got nan"),
            ("0.5", TypeError, "got str"),
        ],
    )
    def test_a_wrong_weight_is_named(self, weight: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=f"^prototype_step: new_weight .*{message}|^prototype_step: .*{message}"):
            prototype_step(torch.ones(4, 3), torch.eye(3), temperature=0.1, new_weight=weight)

    def test_inputs_are_left_as_they_were(self, place: Place) -> None:
        z, q = (x.to(place.device) for x in draw(129, 10, 33))
        temperature = torch.tensor(0.1, device=place.device)
        before = [x.clone() for x in (z, q, temperature)]
        z.requires_grad_(), q.requires_grad_()
        step = prototype_step(z, q, temperature=temperature, new_weight=0.95, sample=True, skip_nonfinite=True)
        step.assignment.square().sum().backward()
        for x, copy in zip((z, q, temperature), before, strict=True):
            assert torch.equal(x, copy)


class TestDeterminism:
    def test_twenty_repeats_and_any_number_of_threads_agree_to_the_bit(self, place: Place) -> None:
        threads = torch.get_num_threads()
        z, q = (x.to(place.device).requires_grad_() for x in draw(5000, 33, 65))
        results = []
        try:
            for repeat in range(20):
                # the matrix products of torch, which the reference is made of, depend on the number of threads
                torch.set_num_threads(1 + repeat % 2 if place.backend == "native" else 1)
                results.append(self._everything(z, q))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a, b)

    def test_two_python_threads_do_not_disturb_each_other(self, place: Place) -> None:
        problems = [
            tuple(x.to(place.device).requires_grad_() for x in draw(2000, 33, 65, seed=seed)) for seed in (1, 2)
        ]
        expected = [self._everything(*problem) for problem in problems]
        mistakes: list[str] = []
        start = threading.Barrier(2)

        def work(index: int) -> None:
            start.wait()
            for _ in range(10):
                for a, b in zip(self._everything(*problems[index]), expected[index], strict=True):
                    if not torch.equal(a, b):
                        mistakes.append(f"thread {index}")

        threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not mistakes

    @staticmethod
    def _everything(z: Tensor, q: Tensor) -> list[Tensor]:
        step = prototype_step(z, q, temperature=0.2, new_weight=0.95, return_entropy=True)
        assert step.entropy is not None
        gradients = torch.autograd.grad(step.assignment.square().sum() + step.entropy.sum(), (z, q))
        return [step.assignment, step.labels, step.entropy, step.sums, step.counts, step.prototypes, *gradients]
