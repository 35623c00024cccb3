# SPDX-License-Identifier: MIT
"""The op `prototypes` against its peers, on the CPU and on CUDA.

pytest benchmarks/bench_prototypes.py --results benchmarks/results/prototypes_cpu.json [-k 2048x32x10] [--seconds 2]
pytest benchmarks/bench_prototypes.py --device cuda --results FILE.json
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import protokernels
from benchmarks import prototypes_peers as peers
from benchmarks.measure_cuda import EAGER, GRAPH, Bind, bind, bind_gradient, gradients_agree

COMPILED = "torch.compile of argmax + index_add"


@dataclass(frozen=True)
class Case:
    """B embeddings of length D, K prototypes; `skewed`: 99 % of the rows lie at ten prototypes."""

    B: int
    D: int
    K: int
    temperature: float = 0.1
    skewed: bool = False

    @property
    def name(self) -> str:
        extra = (", skewed" if self.skewed else "") + (f", tau {self.temperature:g}" if self.temperature != 0.1 else "")
        return f"{self.B}x{self.D}x{self.K}{extra}"

    def tensors(self, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        z, q = (torch.randn(n, self.D, generator=generator, device=device) for n in (self.B, self.K))
        if self.skewed:
            crowd = torch.randint(0, 10, (self.B * 99 // 100,), generator=generator, device=device)
            z[: len(crowd)] = 0.3 * z[: len(crowd)] + q[crowd]
        return z, q

    def tensors_and_gradient(self, seed: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(seed + 10_000)
        return *self.tensors(seed, device), torch.randn(self.B, self.K, generator=generator, device=device)

    def step_limit(self) -> tuple[float, float]:
        """z is read, c, labels and prototypes are written; two operations for each product."""
        return 2.0 * self.B * self.K * self.D, 4.0 * self.B * (self.D + self.K + 2)

    def gradient_limit(self) -> tuple[float, float]:
        """Three products of that size; z is read twice, c written and read, both gradients once."""
        return 6.0 * self.B * self.K * self.D, 4.0 * self.B * (3 * self.D + 3 * self.K)


CASES = [
    Case(2048, 32, 10),
    Case(2048, 128, 256),
    Case(16384, 64, 64),
    Case(16384, 64, 64, temperature=0.01),
    Case(65536, 128, 256),
    Case(65536, 128, 256, skewed=True),
    Case(65536, 32, 10),
]
SWEEP = [Case(B, 64, 64) for B in (256, 1024, 4096, 16384, 65536)]
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def step_of(z: Tensor, q: Tensor, case: Case, sample: bool = False) -> Callable[[], protokernels.PrototypeStep]:
    return lambda: protokernels.prototype_step(
        z, q, temperature=case.temperature, new_weight=peers.WEIGHT, sample=sample
    )


def check_agreement(step: protokernels.PrototypeStep, peer: tuple[Tensor, ...]) -> None:
    """The peer computes the same thing: c, labels up to near ties, prototypes whose members are the same."""
    c, labels, new = peer[:3]
    torch.testing.assert_close(step.assignment, c, rtol=2e-3, atol=1e-6)
    other = (step.labels != labels).nonzero().flatten()
    assert len(other) <= 1e-3 * len(labels)
    torch.testing.assert_close(c[other, step.labels[other]], c[other, labels[other]], rtol=2e-3, atol=0.0)
    touched = torch.zeros(len(new), dtype=torch.bool, device=new.device)
    touched[step.labels[other]] = touched[labels[other]] = True
    torch.testing.assert_close(step.prototypes[~touched], new[~touched], rtol=1e-4, atol=1e-5)


@EVERY_CASE
class TestStep:
    """Assignment written out, labels, counts and the moving average."""

    @pytest.mark.parametrize("sample", [False, True], ids=["argmax", "sampled"])
    def test_ours(self, benchmark: Any, contest: Any, case: Case, sample: bool) -> None:
        z, q = case.tensors()
        name = "protokernels, sampled labels" if sample else "protokernels"
        step = step_of(z, q, case, sample)
        with torch.no_grad():
            contest(benchmark, step, step, limit=case.step_limit(), **self._facts(case, name))

    @pytest.mark.parametrize("name", peers.TORCH_PEERS)
    def test_torch(self, benchmark: Any, contest: Any, case: Case, name: str) -> None:
        z, q = case.tensors()
        peer, sample = peers.TORCH_PEERS[name], "multinomial" in name
        ours = step_of(z, q, case, sample)
        with torch.no_grad():
            if not sample:
                check_agreement(ours(), peer(z, q, case.temperature))
            facts = self._facts(case, name, against="protokernels, sampled labels" if sample else "protokernels")
            contest(benchmark, lambda: peer(z, q, case.temperature), ours, **facts)

    def test_compiled(self, benchmark: Any, contest: Any, case: Case) -> None:
        torch.compiler.reset()
        z, q = case.tensors()
        ours, peer = step_of(z, q, case), torch.compile(peers.argmax_index_add, dynamic=False)
        with torch.no_grad():
            contest(benchmark, lambda: peer(z, q, case.temperature), ours, **self._facts(case, COMPILED))
            check_agreement(ours(), peer(z, q, case.temperature))

    @pytest.mark.parametrize("name", peers.LIBRARY_PEERS)
    def test_library(self, benchmark: Any, contest: Any, case: Case, name: str) -> None:
        module, prepare = peers.LIBRARY_PEERS[name]
        pytest.importorskip(module, reason=f"{name} is not installed; pip install 'protokernels[bench]'")
        z, q = case.tensors()
        contest(benchmark, prepare(z, q, case.temperature), step_of(z, q, case), **self._facts(case, name))

    @staticmethod
    def _facts(case: Case, contender: str, against: str = "protokernels") -> dict[str, Any]:
        return {
            "what": "step",
            "case": case.name,
            "order": CASES.index(case),
            "contender": contender,
            "against": against,
            "leaves_out": peers.LEAVES_OUT.get(contender, ""),
        }


@EVERY_CASE
class TestForwardAndBackward:
    """Soft assignment with gradients of embeddings and prototypes."""

    @pytest.mark.parametrize("name", ["protokernels", "torch", "torch.compile"])
    def test_gradient(self, benchmark: Any, contest: Any, case: Case, name: str) -> None:
        torch.compiler.reset()
        z, q = (x.requires_grad_() for x in case.tensors())
        grad_c = torch.randn(case.B, case.K, generator=torch.Generator().manual_seed(1))

        def run(assign: Callable[[Tensor, Tensor], Any]) -> Callable[[], tuple[Tensor, ...]]:
            return lambda: torch.autograd.grad(assign(z, q), (z, q), grad_c)

        ours = run(lambda z, q: protokernels.soft_assign(z, q, temperature=case.temperature))
        plain = run(lambda z, q: peers.soft_assignment(z, q, case.temperature))
        compiled = torch.compile(peers.soft_assignment, dynamic=False)
        contender = {
            "protokernels": ours,
            "torch": plain,
            "torch.compile": run(lambda z, q: compiled(z, q, case.temperature)),
        }[name]
        for a, b in zip(ours(), contender(), strict=True):
            # |a - b| relative to the length of the whole gradient: single elements cancel
            assert float((a - b).norm()) <= 1e-3 * float(b.norm())
        facts = {"what": "forward and backward", "case": case.name, "order": CASES.index(case), "contender": name}
        limit = case.gradient_limit() if name == "protokernels" else None
        contest(benchmark, contender, ours, limit=limit, **facts)


@pytest.mark.parametrize("case", SWEEP, ids=lambda case: f"{case.B} rows")
class TestSweep:
    """How time grows with the number of rows, at D = K = 64."""

    @pytest.mark.parametrize("name", ["protokernels", "torch argmax + index_add"])
    def test_sweep(self, benchmark: Any, contest: Any, case: Case, name: str) -> None:
        z, q = case.tensors()
        ours = step_of(z, q, case)
        contender = ours if name == "protokernels" else lambda: peers.argmax_index_add(z, q, case.temperature)
        facts = {"what": "sweep over rows", "case": case.name, "order": case.B, "contender": name, "size": case.B}
        with torch.no_grad():
            contest(benchmark, contender, ours, limit=case.step_limit() if contender is ours else None, **facts)


OURS, SAMPLED = "protokernels", "protokernels, sampled labels"
TUNED = {"torch.compile": "default", "torch.compile max-autotune": "max-autotune-no-cudagraphs"}
STEP_ON_CUDA = [
    *((name, mode) for name in (OURS, "torch argmax + index_add") for mode in (EAGER, GRAPH)),
    (SAMPLED, EAGER),
    (SAMPLED, GRAPH),
    ("torch multinomial + index_add", EAGER),
    *((name, EAGER) for name in peers.CUDA_LIBRARY_PEERS),
    ("torch one-hot matmul", GRAPH),
    ("torch loop over clusters", EAGER),
    ("torch.compile", EAGER),
    ("torch.compile", GRAPH),
    ("torch.compile max-autotune", GRAPH),
]
GRADIENT_ON_CUDA = [(name, mode) for name in (OURS, "torch", *TUNED) for mode in (EAGER, GRAPH)]


def ours_on_cuda(case: Case, sample: bool = False) -> Bind:
    def step(z: Tensor, q: Tensor) -> protokernels.PrototypeStep:
        return step_of(z, q, case, sample)()

    return bind(step)


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("name", "mode"), STEP_ON_CUDA)
def test_step_on_cuda(cuda_contest: Any, case: Case, name: str, mode: str) -> None:
    """What `TestStep` measures, on CUDA."""
    torch.compiler.reset()
    t, sample = case.temperature, name == SAMPLED or "multinomial" in name
    exact = not sample and name not in peers.CUDA_LIBRARY_PEERS
    ours = contender = ours_on_cuda(case, sample)
    if name in TUNED:
        contender = bind(torch.compile(peers.argmax_index_add, dynamic=False, mode=TUNED[name]), t)
    elif name in peers.TORCH_PEERS:
        contender = bind(peers.TORCH_PEERS[name], t)
    elif name in peers.CUDA_LIBRARY_PEERS:
        module, prepare = peers.CUDA_LIBRARY_PEERS[name]
        pytest.importorskip(module, reason=f"{name} is not installed")
        contender = lambda z, q: prepare(z, q, t)  # noqa: E731
    cuda_contest(
        contender,
        ours,
        case.tensors,
        mode=mode,
        limit=(*case.step_limit(), "3xtf32") if name in (OURS, SAMPLED) else None,
        agree=check_agreement if exact and name != OURS else None,
        what="step",
        case=case.name,
        order=CASES.index(case),
        contender=name,
        against=SAMPLED if sample else OURS,
        leaves_out=peers.LEAVES_OUT.get(name, ""),
    )


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("name", "mode"), GRADIENT_ON_CUDA)
def test_gradient_on_cuda(cuda_contest: Any, case: Case, name: str, mode: str) -> None:
    """What `TestForwardAndBackward` measures, on CUDA."""
    torch.compiler.reset()

    def assign(z: Tensor, q: Tensor) -> Tensor:
        c = protokernels.soft_assign(z, q, temperature=case.temperature)
        assert isinstance(c, Tensor)
        return c

    ours = bind_gradient(assign, of=2)
    if name == OURS:
        contender = ours
    else:
        plain = peers.soft_assignment
        if name in TUNED:
            plain = torch.compile(plain, dynamic=False, mode=TUNED[name])
        contender = bind_gradient(plain, case.temperature, of=2)
    cuda_contest(
        contender,
        ours,
        case.tensors_and_gradient,
        mode=mode,
        limit=(*case.gradient_limit(), "3xtf32") if name == OURS else None,
        agree=None if name == OURS else gradients_agree,
        what="forward and backward",
        case=case.name,
        order=CASES.index(case),
        contender=name,
    )
