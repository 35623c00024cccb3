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
from python_tests.prototypes_oracle import check_update, draw, needs_gpu, needs_native, oracle

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


class TestContract:
    def test_another_stream(self) -> None:
        z, q = on_gpu(16384, 64, 64)
        expected = prototype_step(z, q, temperature=0.1, new_weight=0.95)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # work that ran on the default stream would not wait for this
            late = z.clone()
            step = prototype_step(late, q, temperature=0.1, new_weight=0.95)
            late.zero_()
        stream.synchronize()
        assert torch.equal(step.assignment, expected.assignment) and torch.equal(step.prototypes, expected.prototypes)

    def test_capture_and_replay(self) -> None:
        z, q = on_gpu(2048, 10, 32)
        z.requires_grad_()

        def work() -> list[Tensor]:
            step = prototype_step(z, q, temperature=0.1, new_weight=0.95, return_entropy=True)
            assert step.entropy is not None
            (gradient,) = torch.autograd.grad(step.assignment.square().sum() + step.entropy.sum(), z)
            updated, _ = update_prototypes(q, z, step.labels, new_weight=0.5)
            return [step.assignment, step.labels, step.prototypes, step.counts, gradient, updated]

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = work()
        for seed in (1, 2):
            with torch.no_grad():
                z.copy_(on_gpu(2048, 10, 32, seed)[0])
            for tensor in captured:
                tensor.detach().fill_(0)
            graph.replay()
            torch.cuda.synchronize()
            for a, b in zip(captured, work(), strict=True):
                assert torch.equal(a, b)

    def test_nothing_waits_for_the_device(self) -> None:
        z, q = on_gpu(2048, 10, 32)
        z.requires_grad_()
        temperature = torch.tensor(0.1, device="cuda")
        module = Prototypes(10, 32, temperature=0.1, revive_after=2).cuda()
        module(z)  # initialisation looks at the embeddings once
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step = prototype_step(z, q, temperature=temperature, new_weight=0.95, sample=True, skip_nonfinite=True)
            step.assignment.square().sum().backward()
            update_prototypes(q, z, step.labels, new_weight=0.5)
            module(z).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

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
