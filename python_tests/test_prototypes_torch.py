# SPDX-License-Identifier: MIT
"""The op `prototypes` under torch's machinery: opcheck, compile, export, autocast; and under every CPU instruction set."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from protokernels import prototype_step, soft_assign, update_prototypes
from protokernels.ops._prototypes_autograd import _backward_on_cuda
from python_tests.cpu_levels import AtEveryLevel
from python_tests.places import NATIVE_PLACES, PLACES, Place, needs_native
from python_tests.prototypes_oracle import draw, oracle


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


class TestContract:
    @pytest.mark.parametrize("place", NATIVE_PLACES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("form", ["plain", "everything", "sampled"])
    def test_opcheck_forward(self, place: Place, dtype: torch.dtype, form: str) -> None:
        z, q = (x.to(place.device, dtype).requires_grad_() for x in draw(33, 10, 19))
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        temperature = torch.tensor(0.5, dtype=compute, device=place.device, requires_grad=True)
        uniform = torch.rand(33, device=place.device)
        arguments = {
            "plain": (z, q, None, 0.5, True, None, False, False, False, 0.0, False),
            "everything": (z, q, temperature, 1.0, False, None, True, True, True, 0.9, True),
            "sampled": (z.detach(), q, None, 0.5, True, uniform, True, False, True, 0.9, False),
        }[form]
        torch.library.opcheck(torch.ops.protokernels.prototypes_forward, arguments)

    @pytest.mark.parametrize("place", NATIVE_PLACES)
    @pytest.mark.parametrize("with_prototypes", [False, True])
    def test_opcheck_backward(self, place: Place, with_prototypes: bool) -> None:
        z, q = (x.to(place.device) for x in draw(33, 10, 19))
        c = soft_assign(z, q, temperature=0.5)
        grad_c, grad_h = torch.randn(33, 10, device=place.device), torch.randn(33, device=place.device)
        op = torch.ops.protokernels.prototypes_backward
        torch.library.opcheck(op, (grad_c, grad_h, c, z, q, None, 0.5, True, with_prototypes))
        temperature = torch.tensor(0.5, device=place.device)
        torch.library.opcheck(op, (grad_c, None, c, z, q, temperature, 1.0, False, with_prototypes))

    @pytest.mark.parametrize("place", NATIVE_PLACES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_opcheck_update(self, place: Place, dtype: torch.dtype) -> None:
        z, q = (x.to(place.device, dtype) for x in draw(33, 10, 19))
        labels = torch.arange(33, device=place.device) % 11 - 1
        accumulate, blend = torch.ops.protokernels.prototypes_accumulate, torch.ops.protokernels.prototypes_blend
        torch.library.opcheck(accumulate, (z, labels, 10, False))
        sums, counts = accumulate(z, labels, 10, True)
        torch.library.opcheck(blend, (q, sums, counts, 0.9))

    def test_opcheck_of_the_copy(self, place: Place) -> None:
        q = draw(1, 10, 19)[1].to(place.device).requires_grad_()
        torch.library.opcheck(torch.ops.protokernels.prototypes_kept, (q,))
        torch.library.opcheck(torch.ops.protokernels.prototypes_kept, (q.T.detach(),))

    @pytest.mark.parametrize("similarity", ["cosine", "dot"])
    def test_compile_without_graph_breaks(self, place: Place, similarity: Any) -> None:
        torch.compiler.reset()

        def step(z: Tensor, q: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
            step = prototype_step(
                2 * z, q, temperature=temperature, new_weight=0.9, similarity=similarity, return_entropy=True
            )
            assert step.entropy is not None
            new, counts = update_prototypes(step.prototypes, z, step.assignment, new_weight=0.5)
            return step.assignment.square().sum() + step.entropy.sum(), step.labels, step.prototypes, new, counts

        self._compare(step, place, "aot_eager")

    def test_compile_with_a_number_as_temperature_and_another_batch(self, place: Place) -> None:
        torch.compiler.reset()
        compiled = torch.compile(
            lambda z, q: soft_assign(z, q, temperature=0.25), fullgraph=True, backend="aot_eager", dynamic=True
        )
        for B in (33, 70, 129):
            z, q = (x.to(place.device) for x in draw(B, 10, 19))
            oracle(z, q, 0.25, "cosine").check_assignment(compiled(z, q))

    @needs_native
    @pytest.mark.skipif(
        shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a C++ compiler"
    )
    def test_compile_with_inductor(self) -> None:
        torch.compiler.reset()

        def step(z: Tensor, q: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
            result = prototype_step(z.tanh(), q, temperature=temperature, new_weight=0.9)
            return result.assignment.square().sum(), result.labels, result.prototypes

        self._compare(step, Place("cpu", "native"), "inductor")

    @staticmethod
    def _compare(function: Any, place: Place, compiler: str) -> None:
        """Values and gradients of the compiled function equal those of the function."""
        results = []
        for run in (function, torch.compile(function, fullgraph=True, backend=compiler)):
            z, q = (x.to(place.device).requires_grad_() for x in draw(129, 10, 19))
            temperature = torch.tensor(0.5, device=place.device, requires_grad=True)
            loss, *rest = run(z, q, temperature)
            results.append([loss, *rest, *torch.autograd.grad(loss, (z, q, temperature))])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    def test_export_with_a_free_batch_size(self, place: Place) -> None:
        class Head(nn.Module):
            prototypes: Tensor

            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(7, 19)
                self.register_buffer("prototypes", draw(1, 10, 19)[1])

            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                result = soft_assign(self.linear(x), self.prototypes, temperature=0.25, return_labels=True)
                assert result.labels is not None
                return result.assignment, result.labels

        head = Head().to(place.device).eval()
        exported = torch.export.export(
            head, (torch.randn(8, 7, device=place.device),), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)
        )
        x = torch.randn(33, 7, device=place.device)
        for a, b in zip(exported.module()(x), head(x), strict=True):
            assert torch.equal(a, b)
        if place.backend == "native":
            assert "protokernels.prototypes_forward" in exported.graph_module.code

    def test_autocast(self, place: Place) -> None:
        z, q = (x.to(place.device) for x in draw(129, 10, 19))
        linear = nn.Linear(19, 19).to(place.device)
        with torch.autocast(place.device, torch.bfloat16):
            half = linear(z)
            assert half.dtype == torch.bfloat16
            step = prototype_step(half, q, temperature=0.1, new_weight=0.9)
            from_float = soft_assign(z, q, temperature=0.1)
        # the values that came in are half precision; everything after them is computed and returned in float32
        assert step.assignment.dtype == step.prototypes.dtype == torch.float32
        oracle(half, q, 0.1, "cosine").check_assignment(step.assignment)
        oracle(z, q, 0.1, "cosine").check_assignment(from_float)
        step.assignment.square().sum().backward()
        assert linear.weight.grad is not None and linear.weight.grad.isfinite().all() and linear.weight.grad.any()

    @pytest.mark.parametrize("place", NATIVE_PLACES)
    @pytest.mark.parametrize(("K", "D"), [(10, 19), (300, 19), (10, 200)])
    def test_a_backward_pass_within_autocast(self, place: Place, K: int, D: int) -> None:
        leaves = [x.to(place.device).requires_grad_() for x in draw(33, K, D)]
        loss = soft_assign(*leaves, temperature=0.1).square().sum()
        expected = torch.autograd.grad(loss, leaves, retain_graph=True)
        with torch.autocast(place.device, torch.bfloat16):
            found = torch.autograd.grad(loss, leaves)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)

    @needs_native
    def test_products_of_torch_within_autocast(self) -> None:
        """What CUDA does where the prototypes are too many or too long for its kernel."""
        z, q = draw(33, 300, 19)
        c = soft_assign(z, q, temperature=0.1)
        arguments = (2 * c, None, c, z, q, None, 0.1, True, True)
        expected = _backward_on_cuda(*arguments)
        with torch.autocast("cpu", torch.bfloat16):
            found = _backward_on_cuda(*arguments)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)

    def test_no_gradient_is_recorded_where_none_is_wanted(self, place: Place) -> None:
        z, q = (x.to(place.device).requires_grad_() for x in draw(33, 10, 19))
        with torch.no_grad():
            assert not soft_assign(z, q, temperature=0.1).requires_grad
        with torch.inference_mode():
            step = prototype_step(z, q, temperature=0.1, new_weight=0.9)
        oracle(z, q, 0.1, "cosine").check_assignment(step.assignment)


class TestInstructionSets(AtEveryLevel):
    """Values, gradients and edges."""

    FILES = ("test_prototypes", "test_prototypes_edges", "test_prototypes_update")
