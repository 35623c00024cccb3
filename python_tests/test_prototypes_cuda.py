# SPDX-License-Identifier: MIT
"""The op `prototypes` on CUDA beyond its values: streams, graphs, no waiting for the device, traps, large problems."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from protokernels import _native, prototype_step, soft_assign, update_prototypes
from protokernels.nn import Prototypes
from python_tests.cuda_contract import ELEMENTS_OF_INT32, CudaContract, need_memory, nothing_waits, on
from python_tests.places import needs_gpu, needs_native
from python_tests.prototypes_oracle import check_update, draw, oracle

pytestmark = [pytest.mark.cuda, needs_native, needs_gpu]
ROOT = Path(__file__).resolve().parents[1]


def on_gpu(B: int, K: int, D: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    z, q = draw(B, K, D, seed)
    return z.cuda(), q.cuda()


class TestValue:
    def test_the_library_holds_cuda_kernels(self) -> None:
        assert _native.build_info()["cuda_archs"], "the library in use was built without CUDA kernels"

    @pytest.mark.parametrize(("B", "K", "D"), [(2048, 10, 32), (16384, 64, 64), (70001, 256, 128), (5000, 1000, 768)])
    def test_large_problems(self, B: int, K: int, D: int) -> None:
        z, q = on_gpu(B, K, D)
        step = prototype_step(z, q, temperature=0.1, new_weight=0.95)
        expected = oracle(z, q, 0.1, "cosine")
        expected.check_assignment(step.assignment)
        expected.check_labels(step.labels)
        check_update(q, z, step.labels, 0.95, step.prototypes, step.counts)

    def test_one_cluster_takes_almost_everything(self) -> None:
        z, q = on_gpu(65536, 256, 32)
        z[:65000] = 0.1 * z[:65000] + 10 * q[3]
        step = prototype_step(z, q, temperature=0.01, new_weight=0.95)
        assert int(step.counts[3]) > 64000
        check_update(q, z, step.labels, 0.95, step.prototypes, step.counts)


class TestGradient:
    @pytest.mark.parametrize(("B", "K", "D"), [(2048, 10, 32), (8192, 256, 128)])
    def test_the_same_gradients_as_on_the_cpu(self, B: int, K: int, D: int) -> None:
        results = []
        for device in ("cpu", "cuda"):
            z, q = (x.double().to(device).requires_grad_() for x in draw(B, K, D))
            c = soft_assign(z, q, temperature=0.5)
            results.append([g.cpu() for g in torch.autograd.grad(c.square().sum(), (z, q))])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


class TestContract(CudaContract):
    def draw(self, seed: int) -> tuple[Tensor, ...]:
        return draw(2048, 10, 32, seed)

    def work(self, *inputs: Tensor) -> list[Tensor]:
        z, q = inputs
        step = prototype_step(z, q, temperature=0.1, new_weight=0.95, return_entropy=True)
        assert step.entropy is not None
        gradients = torch.autograd.grad(step.assignment.square().sum() + step.entropy.sum(), (z, q))
        updated, counts = update_prototypes(q, z, step.labels, new_weight=0.5)
        kept = [step.assignment, step.labels, step.entropy, step.prototypes, step.counts]
        return [*kept, *gradients, updated.detach(), counts]

    def test_sampling_and_the_module_do_not_wait_either(self) -> None:
        z, q = on("cuda", self.draw(0))
        temperature = torch.tensor(0.1, device="cuda", requires_grad=True)
        module = Prototypes(10, 32, temperature=0.1, revive_after=2).cuda()

        def steps() -> None:
            step = prototype_step(z, q, temperature=temperature, new_weight=0.95, sample=True, skip_nonfinite=True)
            step.assignment.square().sum().backward()
            update_prototypes(q, z, step.assignment.detach(), new_weight=0.5, sample=True)
            module(z).square().sum().backward()

        for _ in range(3):  # initialisation looks at the embeddings once
            steps()
        with nothing_waits():
            steps()

    def test_a_label_of_k_or_more_stops_the_program(self) -> None:
        program = (
            "import torch, protokernels; "
            "z = torch.ones(4, 3, device='cuda'); q = torch.eye(3, device='cuda'); "
            "protokernels.update_prototypes(q, z, torch.tensor([0, 3, 1, 2], device='cuda'), new_weight=0.5); "
            "torch.cuda.synchronize()"
        )
        run = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
        assert run.returncode != 0 and "CUDA error" in run.stderr

    def test_mixed_devices_are_named(self) -> None:
        z, q = on_gpu(8, 3, 5)
        with pytest.raises(ValueError, match=r"z is on cpu and prototypes on cuda:0; move one of them"):
            soft_assign(z.cpu(), q, temperature=0.1)


class TestDeterminism:
    def test_twenty_repeats_agree_to_the_bit(self) -> None:
        z, q = on_gpu(70001, 256, 128)
        z.requires_grad_(), q.requires_grad_()

        def everything() -> list[Any]:
            step = prototype_step(z, q, temperature=0.2, new_weight=0.95, return_entropy=True)
            assert step.entropy is not None
            gradients = torch.autograd.grad(step.assignment.square().sum() + step.entropy.sum(), (z, q))
            return [*step, *gradients]

        first = everything()
        for _ in range(19):
            for a, b in zip(first, everything(), strict=True):
                assert torch.equal(a, b)


class TestPast2To31Elements:
    """Offsets that 32 bits do not hold; the last rows show it."""

    def test_embeddings(self) -> None:
        need_memory(20)
        B, D, K = ELEMENTS_OF_INT32 // 64 + 1000, 64, 3
        z = torch.empty(B, D, dtype=torch.bfloat16, device="cuda").normal_(generator=seeded())
        q = torch.randn(K, D, device="cuda", generator=seeded())
        step = prototype_step(z, q, temperature=0.1, new_weight=1.0)
        self.check_ends(z, q, step.assignment, step.labels)
        self.check_sums(z, step.labels, step.sums, step.counts)

    def test_assignments(self) -> None:
        need_memory(40)
        D, K = 8, 260
        B = ELEMENTS_OF_INT32 // K + 1000
        z = torch.randn(B, D, device="cuda", generator=seeded())
        q = torch.randn(K, D, device="cuda", generator=seeded())
        step = prototype_step(z, q, temperature=0.1, new_weight=1.0)
        self.check_ends(z, q, step.assignment, step.labels)
        self.check_sums(z, step.labels, step.sums, step.counts)

    def test_gradients(self) -> None:
        need_memory(75)
        D, K, tail = 8, 260, 500
        B = ELEMENTS_OF_INT32 // K + 1000
        z = torch.randn(B, D, device="cuda", generator=seeded()).requires_grad_()
        q = torch.randn(K, D, device="cuda", generator=seeded()).requires_grad_()
        c = soft_assign(z, q, temperature=0.5)
        weight = torch.zeros_like(c)  # only the last rows count, so a small problem has the same gradient
        weight[-tail:] = torch.randn(tail, K, device="cuda", generator=seeded())
        gradients = torch.autograd.grad(c, (z, q), weight)
        assert not gradients[0][:-tail].any()
        small_z, small_q = z.detach()[-tail:].clone().requires_grad_(), q.detach().clone().requires_grad_()
        expected = torch.autograd.grad(
            soft_assign(small_z, small_q, temperature=0.5), (small_z, small_q), weight[-tail:]
        )
        for a, b in zip((gradients[0][-tail:], gradients[1]), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    @staticmethod
    def check_ends(z: Tensor, q: Tensor, c: Tensor, labels: Tensor) -> None:
        for rows in (slice(0, 500), slice(len(z) - 500, len(z))):
            expected = oracle(z[rows], q, 0.1, "cosine")
            expected.check_assignment(c[rows])
            expected.check_labels(labels[rows])

    @staticmethod
    def check_sums(z: Tensor, labels: Tensor, sums: Tensor, counts: Tensor) -> None:
        expected, magnitude = torch.zeros_like(sums), torch.zeros_like(sums)
        for part, chosen in zip(z.split(2**20), labels.split(2**20), strict=True):
            expected.index_add_(0, chosen, part.double())
            magnitude.index_add_(0, chosen, part.double().abs())
        assert torch.equal(counts, torch.bincount(labels, minlength=len(sums)))
        assert bool(((sums - expected).abs() <= len(z) * 2.0**-53 * magnitude).all())


def seeded() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(0)
