# SPDX-License-Identifier: MIT
"""The op `nearest` and k-means on it against their peers, on the CPU and on CUDA.

pytest benchmarks/bench_nearest.py --results benchmarks/results/nearest_cpu.json [-k 60000x10000x32] [--seconds 2]
pytest benchmarks/bench_nearest.py --device cuda --results FILE.json
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import protokernels
from benchmarks import measure
from benchmarks import nearest_peers as peers
from benchmarks.measure_cuda import EAGER, GRAPH, bind
from protokernels.cluster import KMeans

OURS = "protokernels"


@dataclass(frozen=True)
class Case:
    """N queries against M rows of length D."""

    N: int
    M: int
    D: int
    k: int
    copies: int = 1
    """How often every row stands in the bank: equal distances."""

    @property
    def name(self) -> str:
        extra = f", every row {self.copies} times" if self.copies > 1 else ""
        return f"{self.N}x{self.M}x{self.D}, k = {self.k}{extra}"

    def tensors(self, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        queries, bank = (
            torch.randn(n, self.D, generator=generator, device=device) for n in (self.N, self.M // self.copies)
        )
        return queries, bank.repeat(self.copies, 1)

    def limit(self) -> tuple[float, float]:
        """Two operations for each product; queries and bank are read, the result written."""
        return 2.0 * self.N * self.M * self.D, 4.0 * self.D * (self.N + self.M) + 12.0 * self.N * self.k


CASES = [
    Case(60_000, 10_000, 32, 5),
    Case(60_000, 10_000, 32, 1),
    Case(60_000, 10_000, 32, 64),
    Case(60_000, 50, 32, 1),
    Case(2_000, 10_000, 784, 5),
    Case(10_000, 10_000, 128, 10),
    Case(10_000, 10_000, 32, 5, copies=2),
    Case(64, 100_000, 64, 5),
    Case(1, 100_000, 64, 5),
    Case(60_000, 10_000, 32, 200),
]
SWEEP = [Case(20_000, M, 32, 5) for M in (100, 1_000, 10_000, 100_000)]
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def ours_of(queries: Tensor, bank: Tensor, case: Case) -> Callable[[], protokernels.NearestResult]:
    return lambda: protokernels.nearest(queries, bank, case.k)


def check_agreement(ours: tuple[Tensor, Tensor], peer: tuple[Tensor, Tensor]) -> None:
    """The peer's distances are ours up to the cancellation of its float32 form, its neighbours ours up to near ties."""
    torch.testing.assert_close(peer[0].float(), ours[0], rtol=1e-3, atol=1e-3)
    assert float((peer[1] != ours[1]).float().mean()) < 0.01 or bool((ours[0][:, 1:] == ours[0][:, :-1]).any())


def facts(case: Case, contender: str, what: str = "search") -> dict[str, Any]:
    return {
        "what": what,
        "case": case.name,
        "sizes": "queries x rows x D",
        "order": CASES.index(case) if case in CASES else case.M,
        "contender": contender,
        "leaves_out": peers.LEAVES_OUT.get(contender, ""),
    }


@EVERY_CASE
class TestSearch:
    """Distances and indices of the nearest rows, from raw queries and bank."""

    def test_ours(self, benchmark: Any, contest: Any, case: Case) -> None:
        ours = ours_of(*case.tensors(), case)
        contest(benchmark, ours, ours, limit=case.limit(), peak_mb=measure.peak_mb(ours), **facts(case, OURS))

    @pytest.mark.parametrize("name", peers.TORCH_PEERS)
    def test_torch(self, benchmark: Any, contest: Any, case: Case, name: str) -> None:
        queries, bank = case.tensors()
        ours, peer = ours_of(queries, bank, case), lambda: peers.TORCH_PEERS[name](queries, bank, case.k)
        check_agreement(ours(), peer())
        contest(benchmark, peer, ours, peak_mb=measure.peak_mb(peer), **facts(case, name))

    @pytest.mark.parametrize("name", peers.LIBRARY_PEERS)
    def test_library(self, benchmark: Any, contest: Any, case: Case, name: str) -> None:
        module, prepare = peers.LIBRARY_PEERS[name]
        pytest.importorskip(module, reason=f"{name} is not installed; pip install 'protokernels[bench]'")
        queries, bank = case.tensors()
        ours, peer = ours_of(queries, bank, case), prepare(queries, bank, case.k)
        check_agreement(ours(), peer())
        contest(benchmark, peer, ours, peak_mb=measure.peak_mb(peer), **facts(case, name))


@pytest.mark.parametrize("case", SWEEP, ids=lambda case: f"{case.M} rows")
@pytest.mark.parametrize("name", [OURS, "faiss, flat"])
class TestSweep:
    """How time grows with the size of the bank."""

    def test_sweep(self, benchmark: Any, contest: Any, case: Case, name: str) -> None:
        queries, bank = case.tensors()
        ours = contender = ours_of(queries, bank, case)
        if name != OURS:
            pytest.importorskip("faiss", reason="faiss is not installed; pip install 'protokernels[bench]'")
            contender = peers.faiss_flat(queries, bank, case.k)  # type: ignore[assignment]
        limit = case.limit() if name == OURS else None
        contest(
            benchmark, contender, ours, limit=limit, size=case.M, **facts(case, name, "sweep over rows of the bank")
        )


KMEANS = [(60_000, 32, 50, 10), (60_000, 32, 256, 5), (10_000, 784, 20, 10)]


@pytest.mark.parametrize(("N", "D", "K", "iterations"), KMEANS, ids=lambda value: str(value))
@pytest.mark.parametrize("name", [OURS, "scikit-learn", "faiss"])
def test_kmeans(benchmark: Any, contest: Any, N: int, D: int, K: int, iterations: int, name: str) -> None:
    """Lloyd's iterations from the same start, as many for everyone."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator)
    start = x[:K].clone()

    def ours() -> float:
        return KMeans(K, init=start, max_iter=iterations, tol=0.0).fit(x).inertia_

    def sklearn() -> float:
        from sklearn.cluster import KMeans as Theirs

        model = Theirs(K, init=start.numpy(), n_init=1, max_iter=iterations, tol=0.0, algorithm="lloyd")
        return float(model.fit(x.numpy()).inertia_)

    def faiss() -> float:
        import faiss as library  # type: ignore[import-not-found, unused-ignore]

        library.omp_set_num_threads(torch.get_num_threads())
        model = library.Kmeans(D, K, niter=iterations, min_points_per_centroid=1, max_points_per_centroid=N + 1)
        model.train(x.numpy(), init_centroids=start.numpy())
        return float(model.index.search(x.numpy(), 1)[0].sum())

    contender = {OURS: ours, "scikit-learn": sklearn, "faiss": faiss}[name]
    if name == "faiss":
        pytest.importorskip("faiss", reason="faiss is not installed; pip install 'protokernels[bench]'")
    assert contender() == pytest.approx(ours(), rel=1e-3)
    about = {"what": "k-means", "case": f"{N}x{D}, K = {K}, {iterations} iterations", "sizes": "rows x D", "order": K}
    limit = (
        (2.0 * N * K * D * (iterations + 1), 4.0 * N * D * (iterations + 1)) if name == OURS else None
    )  # rows read once
    contest(benchmark, contender, ours, limit=limit, contender=name, **about)


@pytest.mark.parametrize(("N", "D", "K", "iterations"), KMEANS, ids=lambda value: str(value))
@pytest.mark.parametrize("name", [OURS, "scikit-learn"])
def test_kmeans_fit(benchmark: Any, contest: Any, N: int, D: int, K: int, iterations: int, name: str) -> None:
    """What a user calls: one start by k-means++ and as many iterations for both. faiss draws its start at random."""
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))

    def ours() -> float:
        return KMeans(K, n_init=1, max_iter=iterations, tol=0.0).fit(x).inertia_

    def sklearn() -> float:
        from sklearn.cluster import KMeans as Theirs

        model = Theirs(K, n_init=1, max_iter=iterations, tol=0.0, algorithm="lloyd", random_state=0)
        return float(model.fit(x.numpy()).inertia_)

    contender = {OURS: ours, "scikit-learn": sklearn}[name]
    assert contender() == pytest.approx(ours(), rel=0.01)  # they draw different rows
    about = {"what": "k-means++ and k-means", "case": f"{N}x{D}, K = {K}, {iterations} iterations"}
    trials, rows = 2 + int(math.log(K)), N * D
    limit = (
        (rows * (2.0 * K * (iterations + 1) + 3.0 * trials * (K - 1)), 4.0 * rows * (iterations + K))
        if name == OURS
        else None
    )  # rows read once in an iteration and for every center of the start
    contest(benchmark, contender, ours, limit=limit, contender=name, sizes="rows x D", order=K, **about)


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, mode) for name in (OURS, *peers.TORCH_PEERS) for mode in (EAGER, GRAPH)),
        ("torch.compile of mm + topk", EAGER),
    ],
)
def test_search_on_cuda(cuda_contest: Any, case: Case, name: str, mode: str) -> None:
    """What `TestSearch` measures, on CUDA."""
    torch.compiler.reset()

    def search(queries: Tensor, bank: Tensor) -> protokernels.NearestResult:
        return protokernels.nearest(queries, bank, case.k)

    ours = contender = bind(search)
    if name in peers.TORCH_PEERS:
        contender = bind(peers.TORCH_PEERS[name], case.k)
    elif name != OURS:
        block = torch.compile(peers.one_block, dynamic=False)
        contender = bind(
            lambda q, b: tuple(
                torch.cat(x) for x in zip(*(block(p, b, case.k) for p in peers.blocks(q, b)), strict=True)
            )
        )
    cuda_contest(
        contender,
        ours,
        case.tensors,
        mode=mode,
        limit=(*case.limit(), "tf32") if name == OURS else None,
        agree=None if name == OURS else check_agreement,
        **facts(case, name),
    )
