# SPDX-License-Identifier: MIT
"""The CUDA benchmarks of `contrastive` and `sinkhorn` without a GPU, with libraries that compute what the peers document, under the peers'
names and signatures; the device is that of `test_measure_cuda.py`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import bench_contrastive_cuda, bench_sinkhorn, contrastive_peers, sinkhorn_peers
from benchmarks.contrastive_cases import Embeddings, Views
from benchmarks.measure_cuda import EAGER, GRAPH, CudaContest
from python_tests.test_measure_cuda import RUN, FakeGpu

CALLS: list[dict[str, Any]] = []


def cal_inf_loss(q: Tensor, k: Tensor, labels: Any = None, scale: Any = None, head_dim: int = 256) -> Tensor:
    assert head_dim == q.shape[1] and scale.dim() == 0 and q.is_contiguous() and k.is_contiguous()
    return F.cross_entropy(scale * q @ k.T, labels)


def linear_cross_entropy(
    e: Tensor, c: Tensor, targets: Tensor, ignore_index: int = -100, filter_eps: float | str | None = "high"
) -> Tensor:
    assert e.dtype == c.dtype == torch.bfloat16 and e.is_contiguous() and c.is_contiguous()
    CALLS.append({"filter_eps": filter_eps})
    return F.cross_entropy(e.float() @ c.float().T, targets)


class SamplesLoss:
    """Dual value and gradient of the alternating updates, C = |x - y|^2 / 2, the entropy counted against the product of the masses."""

    def __init__(
        self, loss: str, *, backend: str, half_cost: bool, eps: float, n_iters: int, use_epsilon_scaling: bool, debias: bool,
        normalize: bool, allow_tf32: bool, autotune: bool,
    ) -> None:  # fmt: skip
        assert loss == "sinkhorn" and backend == "alternating" and half_cost and not (use_epsilon_scaling or debias)
        self.eps, self.n_iters = eps, n_iters

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        assert x.dim() == y.dim() == 2
        N, eps = len(x), self.eps
        cost = (x.unsqueeze(1) - y.unsqueeze(0)).square().sum(2) / 2
        with torch.no_grad():
            g = torch.zeros(N)
            for _ in range(self.n_iters):
                f = -eps * torch.logsumexp((g - cost) / eps - math.log(N), 1)
                g = -eps * torch.logsumexp((f.unsqueeze(1) - cost) / eps - math.log(N), 0)
            plan = ((f.unsqueeze(1) + g - cost) / eps - 2 * math.log(N)).exp()
        return f.mean() + g.mean() + (plan * (cost - cost.detach())).sum()


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    for name, function in {
        "inf_cl": cal_inf_loss, "cut_cross_entropy": linear_cross_entropy, "flash_sinkhorn": SamplesLoss
    }.items():  # fmt: skip
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def contest(tmp_path: Path) -> Iterator[CudaContest]:
    gpu = FakeGpu()
    gpu.cache_bytes = 10  # two sets of inputs
    yield CudaContest(gpu, 1e-3, RUN, tmp_path / "rows.json")


def row_of(contest: CudaContest) -> dict[str, Any]:
    assert contest.results is not None
    (row,) = json.loads(contest.results.read_text())["rows"]
    return row


EMBEDDINGS, VIEWS, ONE_WAY = Embeddings(96, 16), Views(80, 16), Views(80, 16, symmetric=False)
SMALL = [EMBEDDINGS, VIEWS, ONE_WAY]


@pytest.mark.usefixtures("libraries")
@pytest.mark.filterwarnings("ignore:CUDA is not available or torch_xla:UserWarning")
class TestContrastive:
    @pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
    @pytest.mark.parametrize("name", ["protokernels", "torch"])
    def test_everyone(self, contest: CudaContest, case: Any, name: str) -> None:
        bench_contrastive_cuda.test_on_cuda(contest, case, EAGER, name)
        row = row_of(contest)
        assert row["contender"] == name and ("limit_ms" in row) == (name == "protokernels")

    @pytest.mark.parametrize(
        ("case", "name", "rate"),
        [
            *((case, bench_contrastive_cuda.TF32, "tf32") for case in SMALL),
            *((case, bench_contrastive_cuda.BF16, "bf16") for case in SMALL),
            (EMBEDDINGS, bench_contrastive_cuda.BF16_INPUT, "bf16"),
        ],
        ids=lambda x: x if isinstance(x, str) else x.name,
    )
    def test_precisions(self, contest: CudaContest, case: Any, name: str, rate: str) -> None:
        bench_contrastive_cuda.test_precision_on_cuda(contest, case, GRAPH, name)
        row = row_of(contest)
        assert (row["contender"], row["rate"], row["against"]) == (name, rate, "protokernels")

    @pytest.mark.parametrize(
        ("case", "name"),
        [(case, name) for case in SMALL for name in bench_contrastive_cuda.CUDA_PEERS[type(case)]],
        ids=lambda x: x if isinstance(x, str) else x.name,
    )
    def test_peers(self, contest: CudaContest, case: Any, name: str) -> None:
        peer = bench_contrastive_cuda.CUDA_PEERS[type(case)][name]
        if find_spec(peer.module) is None:
            pytest.skip(f"{peer.module} is not installed")
        bench_contrastive_cuda.test_peer_on_cuda(contest, case, name, EAGER)
        row = row_of(contest)
        assert row["against"] == bench_contrastive_cuda.OF_RATE[peer.rate] and "limit_ms" not in row
        if "cut" in name:
            assert {call["filter_eps"] for call in CALLS} == {"high" if "filtered" in name else None}
            assert bool(row["leaves_out"]) == ("filtered" in name)

    def test_a_peer_with_another_gradient_is_skipped(
        self, contest: CudaContest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        twice = lambda p: lambda: 2 * contrastive_peers.inf_cl(p)()  # noqa: E731
        changed = replace(contrastive_peers.CUDA_VIEWS["inf-cl"], prepare=twice)
        monkeypatch.setitem(contrastive_peers.CUDA_VIEWS, "inf-cl", changed)
        with pytest.raises(pytest.skip.Exception, match=r"inf-cl gives something else: 0\.5"):
            bench_contrastive_cuda.test_peer_on_cuda(contest, VIEWS, "inf-cl", EAGER)

    def test_a_failure_of_ours_is_not_blamed_on_a_peer(
        self, contest: CudaContest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runs: list[int] = []

        def works_once(_: Any) -> Tensor:
            runs.append(0)
            if len(runs) > 1:
                raise RuntimeError("broken")
            return torch.ones(1)

        ours = (contrastive_peers.EMBEDDINGS, lambda p: lambda: works_once(p), "embeddings")
        monkeypatch.setitem(bench_contrastive_cuda.FOR_CASE, Embeddings, ours)
        with pytest.raises(RuntimeError, match=r"^broken$") as caught:
            bench_contrastive_cuda.test_on_cuda(contest, EMBEDDINGS, EAGER, "protokernels")
        assert type(caught.value) is RuntimeError

    def test_sizes_that_the_goals_name(self) -> None:
        names = {case.name for case in bench_contrastive_cuda.ON_CUDA}
        assert {"32768x128", "2x8192x128", "2x32768x128", "2x32768x128, one way"} <= names


@pytest.mark.usefixtures("libraries")
class TestSinkhorn:
    @pytest.mark.parametrize("backward", [False, True])
    @pytest.mark.parametrize("name", ["protokernels", *sinkhorn_peers.FEATURES])
    def test_features(self, contest: CudaContest, name: str, backward: bool) -> None:
        bench_sinkhorn.test_features_on_cuda(contest, (1, 60, 8, 30), GRAPH, backward, name)
        row = row_of(contest)
        assert row["contender"] == name and ("limit_ms" in row) == (name == "protokernels")

    def test_one_problem_at_a_time(self, contest: CudaContest) -> None:
        with pytest.raises(pytest.skip.Exception, match="one problem at a time"):
            bench_sinkhorn.test_features_on_cuda(contest, (2, 60, 8, 30), EAGER, False, "flash-sinkhorn")

    @pytest.mark.parametrize(
        ("what", "name"),
        [(what, name) for what, table in bench_sinkhorn.CUDA.items() for name in table if "compile" not in name],
    )
    def test_dense(self, contest: CudaContest, what: str, name: str) -> None:
        module = "ot" if name.startswith("POT") else "geomloss" if name.startswith("geomloss") else "torch"
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
        bench_sinkhorn.test_on_cuda(contest, bench_sinkhorn.Case(2, 24, 60), EAGER, what, name)
        assert row_of(contest)["contender"] == name

    def test_geomloss_is_not_captured(self, contest: CudaContest) -> None:
        with pytest.raises(pytest.skip.Exception):
            bench_sinkhorn.test_on_cuda(
                contest, bench_sinkhorn.Case(2, 24, 60), GRAPH, "value, forward and backward", bench_sinkhorn.GEOMLOSS
            )
