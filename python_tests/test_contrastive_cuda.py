# SPDX-License-Identifier: MIT
"""The op `contrastive` on CUDA beyond small values: precisions, large problems, streams, graphs, waiting, memory, repetition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from protokernels import cross_view_loss, local_contrastive_loss, nt_xent_loss, supcon_loss
from python_tests.contrastive_oracle import FORMS, draw_maps
from python_tests.cuda_contract import CudaContract, need_memory, nothing_waits, on
from python_tests.places import needs_gpu, needs_native

pytestmark = [pytest.mark.cuda, needs_native, needs_gpu]

ERROR = {"highest": 2e-6, "high": 2e-3, "medium": 2e-2}
"""Of a score: a unit vector's rounding, 2^-12 (tf32) or 2^-9 (bf16) at the most and less on average, over a temperature of 0.1."""


def embeddings(N: int, D: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (N,), generator=generator)
    means = torch.randn(classes, D, generator=generator)
    return torch.randn(N, D, generator=generator) + means[labels], labels


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double().cpu() - expected).norm() / expected.norm())


def value_and_gradient(loss: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = loss(*leaves)
    return value.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(value, leaves)])


class TestValue:
    @pytest.mark.parametrize("precision", list(ERROR))
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(("N", "D"), [(512, 16), (2048, 64), (3000, 128), (2051, 65), (1500, 300)])
    def test_embeddings(self, N: int, D: int, form: str, precision: str) -> None:
        x, labels = embeddings(N, D, 10)
        exact = supcon_loss(x.double(), labels, form=form)  # type: ignore[arg-type]
        found = supcon_loss(x.cuda(), labels.cuda(), form=form, precision=precision)  # type: ignore[arg-type]
        assert abs(float(found) - float(exact)) < ERROR[precision] * (1 + abs(float(exact)))

    @pytest.mark.parametrize(
        "options", [{"block_size": 16}, {"stride": 4}, {"block_size": 7, "scope": "image"}, {}], ids=str
    )
    def test_maps(self, options: dict[str, Any]) -> None:
        x, labels = draw_maps((4, 20, 50, 70), classes=4)
        exact = local_contrastive_loss(x.double(), labels, reduction="none", **options)
        for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
            found = local_contrastive_loss(x.to("cuda", dtype), labels.cuda(), reduction="none", **options)
            torch.testing.assert_close(found.double().cpu(), exact, rtol=0, atol=tolerance)

    def test_raw_vectors_and_low_temperatures(self) -> None:
        x, labels = embeddings(2000, 48, 5)
        for options in ({"normalize": False, "temperature": 1.0}, {"temperature": 0.01}):
            exact = supcon_loss(x.double(), labels, **options)  # type: ignore[arg-type]
            found = supcon_loss(x.cuda(), labels.cuda(), **options)  # type: ignore[arg-type]
            assert abs(float(found) - float(exact)) < 1e-5 * float(exact)

    def test_more_pairs_than_a_32_bit_index(self) -> None:
        need_memory(4)
        x, labels = embeddings(65536, 32, 100)
        x, labels = x.cuda(), labels.cuda()
        losses = supcon_loss(x, labels, reduction="none")
        for i in (0, 65535):
            s = (
                torch.nn.functional.normalize(x.double(), dim=1)
                @ torch.nn.functional.normalize(x[i].double(), dim=0)
                / 0.1
            )
            others = torch.arange(len(x), device="cuda") != i
            exact = s[others].logsumexp(0) - s[others & (labels == labels[i])].mean()
            assert abs(float(losses[i]) - float(exact)) < 1e-5 * float(exact)

    def test_memory_is_that_of_the_vectors(self) -> None:
        x, labels = (t.cuda() for t in embeddings(65536, 64, 100))
        x.requires_grad_()
        for _ in range(2):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.autograd.grad(supcon_loss(x, labels), x)
            torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before < 100e6  # a matrix of scores would take 17 GB


class TestGradient:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(("N", "D"), [(512, 16), (2048, 64), (3000, 128), (2051, 65), (1500, 300)])
    def test_embeddings(self, N: int, D: int, form: str) -> None:
        x, labels = embeddings(N, D, 10)
        _, exact = value_and_gradient(lambda x: supcon_loss(x, labels, form=form), x.double())  # type: ignore[arg-type]
        for precision, error in {"highest": 2e-5, "high": 5e-3, "medium": 5e-2}.items():
            options = {"form": form, "precision": precision}
            _, found = value_and_gradient(lambda x, o=options: supcon_loss(x, labels.cuda(), **o), x.cuda())
            assert relative(found, exact) < error, precision

    @pytest.mark.parametrize(
        "options", [{"block_size": 16}, {"stride": 4}, {"block_size": 7, "scope": "image"}, {}], ids=str
    )
    def test_maps(self, options: dict[str, Any]) -> None:
        x, labels = draw_maps((4, 20, 50, 70), classes=4)
        _, exact = value_and_gradient(lambda x: local_contrastive_loss(x, labels, **options), x.double())
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5), (torch.bfloat16, 2e-2)):
            for layout in (torch.contiguous_format, torch.channels_last):
                there = x.to("cuda", dtype).to(memory_format=layout)
                _, found = value_and_gradient(lambda x: local_contrastive_loss(x, labels.cuda(), **options), there)
                assert relative(found, exact) < tolerance

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_two_views(self, symmetric: bool) -> None:
        first, second = (embeddings(1500, 100, 10, seed)[0] for seed in (0, 1))
        for loss in (cross_view_loss, nt_xent_loss):
            options = {"symmetric": symmetric} if loss is cross_view_loss else {}
            value, exact = value_and_gradient(
                lambda a, b, f=loss, o=options: f(a, b, **o), first.double(), second.double()
            )
            found, gradient = value_and_gradient(
                lambda a, b, f=loss, o=options: f(a, b, **o), first.cuda(), second.cuda()
            )
            assert abs(float(found) - float(value)) < 1e-5 * float(value)
            assert relative(gradient, exact) < 2e-5


class TestContract(CudaContract):
    """Blocks of an image, and embeddings in three precisions."""

    def draw(self, seed: int) -> tuple[Tensor, ...]:
        maps, labels = draw_maps((4, 16, 64, 64), seed=seed)
        vectors, classes = embeddings(1100, 96, 7, seed)
        return maps, labels, vectors, classes

    def work(self, maps: Tensor, labels: Tensor, vectors: Tensor, classes: Tensor) -> list[Tensor]:
        losses = [local_contrastive_loss(maps, labels, block_size=16), local_contrastive_loss(maps, labels, stride=2)]
        losses += [supcon_loss(vectors, classes, precision=precision) for precision in ("highest", "high", "medium")]
        losses += [
            supcon_loss(vectors, classes, normalize=False, temperature=5.0),
            cross_view_loss(vectors, vectors.flip(0)),
        ]
        return [*(loss.detach() for loss in losses), *torch.autograd.grad(torch.stack(losses).sum(), (maps, vectors))]

    def test_options_wait_for_nothing(self) -> None:
        maps, labels, vectors, _ = on("cuda", self.draw(0))

        def step() -> None:
            local_contrastive_loss(maps, labels, block_size=16, scope="image", reduction="image", ignore_index=2)
            local_contrastive_loss(maps, None, stride=4, reduction="anchor")
            nt_xent_loss(vectors, vectors.flip(0), denominator="negatives")

        step()
        with nothing_waits():
            step()


class TestDeterminism:
    def test_twenty_repeats_agree_to_the_bit(self) -> None:
        inputs = on("cuda", TestContract().draw(0))
        first = TestContract().work(*inputs)
        for _ in range(19):
            for a, b in zip(first, TestContract().work(*inputs), strict=True):
                assert torch.equal(a, b)
