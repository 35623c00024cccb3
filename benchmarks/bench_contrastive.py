# SPDX-License-Identifier: MIT
"""The op `contrastive` against its peers, forward and backward from the features, on the CPU and on CUDA.

pytest benchmarks/bench_contrastive.py --results benchmarks/results/contrastive_cpu.json [-k block] [--seconds 2]
pytest benchmarks/bench_contrastive.py --device cuda --results FILE.json
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

import protokernels
from benchmarks import contrastive_peers as peers
from benchmarks.contrastive_peers import Call, EmbeddingProblem, LocalProblem, ViewsProblem
from benchmarks.measure import ROOT, identity, peak_mb
from benchmarks.measure_cuda import EAGER, GRAPH, Bind

OURS = "protokernels"
SIZES = "maps or embeddings"
LARGEST_MATRIX = 1 << 27  # numbers in one temporary of a peer: with six of them, 3 GB
MEMORY_GB = 16  # of a process in which a peer is tried that is likely to need more


@dataclass(frozen=True)
class Local:
    """Four maps of 160 x 160 pixels, C channels, so many of them foreground, in patches of three classes: smooth ones, or squares of 8 x 8
    pixels, where no class has a single pixel in a block."""

    C: int = 16
    block: int = 16  # 0: one block
    stride: int = 1
    foreground: float = 0.17
    temperature: float = 0.1
    side: int = 160
    maps: int = 4
    squares: bool = False

    @property
    def name(self) -> str:
        way = f"blocks of {self.block}" if self.block else f"stride {self.stride}" if self.stride > 1 else "all pixels"
        more = (f", {self.foreground:.0%} foreground" if self.foreground != 0.17 else "") + (
            f", temperature {self.temperature:g}" if self.temperature != 0.1 else ""
        )
        more += ", labels in squares" if self.squares else ""
        return f"{self.maps}x{self.C}x{self.side}x{self.side}, {way}{more}"

    def tensors(self, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(self.maps, self.C, self.side, self.side, generator=generator)
        coarse = torch.randn(self.maps, 1, self.side // 8, self.side // 8, generator=generator)
        mode = "nearest" if self.squares else "bilinear"
        smooth = torch.nn.functional.interpolate(coarse, scale_factor=8, mode=mode)[:, 0]
        threshold = smooth.flatten()[:: max(1, smooth.numel() // 100_000)].quantile(1 - self.foreground)
        labels = torch.where(smooth > threshold, 1 + ((smooth - threshold) * 3).clamp(0, 2).long(), 0)
        return features.to(device), labels.to(device)

    def problem(self, *tensors: Tensor) -> LocalProblem:
        return LocalProblem(*(tensors or self.tensors()), self.block, self.stride, self.temperature)

    def groups(self) -> list[tuple[int, int]]:
        """Vectors and anchors of every group."""
        labels = self.tensors()[1].unsqueeze(1).float()
        flat = peers.blocks(self.problem(labels, labels), labels).squeeze(-1)
        return [(len(group), int((group > 0).sum())) for group in flat]

    def limit(self) -> tuple[float, float]:
        """Every pair once, forward 2 C and backward 6 C flop; features, packed vectors and both gradients move once each way."""
        pairs = sum(A * S - A * A / 2 for S, A in self.groups())
        moved = self.maps * self.C * self.side**2 // self.stride**2
        return 8.0 * self.C * pairs, 4.0 * 8 * moved

    def matrix(self) -> int:
        """Numbers in one matrix of all scores, all blocks together."""
        return sum(S * S for S, _ in self.groups())


@dataclass(frozen=True)
class Embeddings:
    """N embeddings of ten classes."""

    N: int
    D: int = 128
    temperature: float = 0.1

    @property
    def name(self) -> str:
        return f"{self.N}x{self.D}" + (f", temperature {self.temperature:g}" if self.temperature != 0.1 else "")

    def tensors(self, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        embeddings = torch.randn(self.N, self.D, generator=generator)
        return embeddings.to(device), torch.randint(0, 10, (self.N,), generator=generator).to(device)

    def problem(self, *tensors: Tensor) -> EmbeddingProblem:
        return EmbeddingProblem(*(tensors or self.tensors()), self.temperature)

    def limit(self) -> tuple[float, float]:
        return 8.0 * self.D * self.N**2 / 2, 4.0 * 8 * self.N * self.D

    def matrix(self) -> int:
        return self.N**2


@dataclass(frozen=True)
class Views:
    """Two views of N images; `symmetric`: in both directions."""

    N: int
    D: int = 128
    temperature: float = 0.1
    symmetric: bool = True

    @property
    def name(self) -> str:
        return f"2x{self.N}x{self.D}" + ("" if self.symmetric else ", one way")

    def tensors(self, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        first, noise = torch.randn(2, self.N, self.D, generator=generator)
        return first.to(device), (first + noise).to(device)

    def problem(self, *tensors: Tensor) -> ViewsProblem:
        return ViewsProblem(*(tensors or self.tensors()), self.temperature, self.symmetric)

    def limit(self) -> tuple[float, float]:
        return 8.0 * self.D * self.N**2, 4.0 * 8 * 2 * self.N * self.D

    def matrix(self) -> int:
        return self.N**2


LOCAL = [
    Local(),
    Local(squares=True),
    Local(foreground=0.05),
    Local(foreground=0.5),
    Local(temperature=0.01),
    Local(block=0, stride=4),
    Local(C=64, block=0, stride=4),
    Local(C=64),
    Local(side=512),
    Local(block=0),
]
EMBEDDINGS = [
    Embeddings(512),
    Embeddings(2048),
    Embeddings(2048, temperature=0.01),
    Embeddings(4096),
    Embeddings(8192),
    Embeddings(65536, 64),
]
SWEEP = [Embeddings(N) for N in (128, 256, 512, 1024, 2048, 4096)]
VIEWS = [Views(256), Views(1024), Views(4096)]
ROUNDED = [Embeddings(2048), Embeddings(8192), Embeddings(32768), Views(4096)]
"""Cases on CUDA in less than the accuracy of float32, with those below; views one way are what a cross-entropy over classes computes."""
ROUNDED += [Views(N, symmetric=symmetric) for symmetric in (True, False) for N in (8192, 32768)]
Case = Local | Embeddings | Views


def our_local(p: LocalProblem) -> Call:
    leaf = p.features.detach().clone().requires_grad_()
    places = {"block_size": p.block} if p.block else {"stride": p.stride}

    def run() -> Tensor:
        loss = protokernels.local_contrastive_loss(leaf, p.labels, temperature=p.temperature, **places)  # type: ignore[arg-type]
        return torch.autograd.grad(loss, leaf)[0]

    return run


def our_embeddings(p: EmbeddingProblem, precision: Any = "highest", dtype: torch.dtype = torch.float32) -> Call:
    leaf = p.embeddings.detach().to(dtype, copy=True).requires_grad_()

    def run() -> Tensor:
        loss = protokernels.supcon_loss(leaf, p.labels, temperature=p.temperature, precision=precision)
        return torch.autograd.grad(loss, leaf)[0]

    return run


def our_views(p: ViewsProblem, precision: Any = "highest") -> Call:
    leaves = [x.detach().clone().requires_grad_() for x in (p.first, p.second)]
    options: dict[str, Any] = {"temperature": p.temperature, "symmetric": p.symmetric, "precision": precision}
    return lambda: torch.cat(torch.autograd.grad(protokernels.cross_view_loss(*leaves, **options), leaves))


def admit(name: str, ours: Call, peer: Call) -> None:
    """Skips a peer whose gradient is another, or none: the released loop divides by zero where a class has one pixel."""
    try:
        expected, actual = peer(), ours()
    except Exception as error:
        pytest.skip(f"{name} fails: {type(error).__name__}: {str(error).strip().splitlines()[0][:100]}")
    apart = ((actual - expected).norm() / expected.norm()).item()
    if not apart <= 1e-3:
        pytest.skip(f"{name} gives something else: {apart:.2g} of its length apart")


def facts(what: str, case: Case, name: str, **more: Any) -> dict[str, Any]:
    order = LOCAL.index(case) if isinstance(case, Local) else case.N
    return {"what": what, "case": case.name, "sizes": SIZES, "order": order, "contender": name, **more}


def peer_call(table: dict[str, tuple[str, Callable[[Any], Call]]], case: Case, name: str, p: Any) -> Call:
    module, prepare = table[name]
    pytest.importorskip(module, reason=f"{name}: {module} is not installed")
    if case.matrix() > LARGEST_MATRIX and name != "torch, block by block":
        pytest.skip(f"{name}: a matrix of {4e-9 * case.matrix():.0f} GB, several times over")
    if (
        name == "torch, block by block"
        and isinstance(case, Local)
        and not case.block
        and case.matrix() > LARGEST_MATRIX
    ):
        pytest.skip(f"{name}: a matrix of {4e-9 * case.matrix():.0f} GB, several times over")
    torch.compiler.reset()
    return prepare(p)


WHAT_LOCAL, WHAT_EMBEDDINGS = "pixels, forward and backward", "embeddings, forward and backward"
WHAT_VIEWS = "two views, forward and backward"


@pytest.mark.parametrize("case", LOCAL, ids=lambda case: case.name)
class TestLocal:
    def test_ours(self, benchmark: Any, contest: Any, case: Local) -> None:
        ours = our_local(case.problem())
        contest(benchmark, ours, ours, limit=case.limit(), **facts(WHAT_LOCAL, case, OURS, peak_mb=peak_mb(ours)))

    @pytest.mark.parametrize("name", peers.LOCAL)
    def test_peer(self, benchmark: Any, contest: Any, case: Local, name: str) -> None:
        p = case.problem()
        ours, peer = our_local(p), peer_call(peers.LOCAL, case, name, p)
        admit(name, ours, peer)
        contest(benchmark, peer, ours, **facts(WHAT_LOCAL, case, name, peak_mb=peak_mb(peer)))


def runs_out_of_memory(name: str, case: Embeddings) -> bool:
    """Tries a peer in a process that may take `MEMORY_GB`. Its first matrix of all scores is what fails, before anything is computed."""
    program = f"from benchmarks import bench_contrastive as b; b.try_peer({name!r}, b.{case!r})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    found = done.stdout.split()
    assert found in (["runs"], ["out-of-memory"]), f"{name} failed otherwise: {done.stderr[-2000:]}"
    return found == ["out-of-memory"]


def try_peer(name: str, case: Embeddings) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_GB << 30,) * 2)
    try:
        peers.EMBEDDINGS[name][1](case.problem())()
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        print("out-of-memory")
    else:
        print("runs")


def peers_out_of_memory(case: Embeddings) -> str:
    here = [name for name, (module, _) in peers.EMBEDDINGS.items() if find_spec(module) is not None]
    failed = [name for name in here if runs_out_of_memory(name, case)]
    return f"out of {MEMORY_GB} GB of memory: {', '.join(failed)}"


@pytest.mark.parametrize("case", EMBEDDINGS, ids=lambda case: case.name)
class TestEmbeddings:
    def test_ours(self, benchmark: Any, contest: Any, case: Embeddings) -> None:
        ours = our_embeddings(case.problem())
        if identity(facts(WHAT_EMBEDDINGS, case, OURS)) in contest.held:
            pytest.skip("the results file holds this row")
        more: dict[str, Any] = {"peak_mb": peak_mb(ours)}
        rounds = None
        if case.matrix() > 8 * LARGEST_MATRIX:  # many seconds a call
            more["others"], rounds = peers_out_of_memory(case), 2
        contest(benchmark, ours, ours, limit=case.limit(), rounds=rounds, **facts(WHAT_EMBEDDINGS, case, OURS, **more))

    @pytest.mark.parametrize("name", peers.EMBEDDINGS)
    def test_peer(self, benchmark: Any, contest: Any, case: Embeddings, name: str) -> None:
        p = case.problem()
        ours, peer = our_embeddings(p), peer_call(peers.EMBEDDINGS, case, name, p)
        admit(name, ours, peer)
        contest(benchmark, peer, ours, **facts(WHAT_EMBEDDINGS, case, name, peak_mb=peak_mb(peer)))


@pytest.mark.parametrize("case", VIEWS, ids=lambda case: case.name)
class TestViews:
    def test_ours(self, benchmark: Any, contest: Any, case: Views) -> None:
        ours = our_views(case.problem())
        contest(benchmark, ours, ours, limit=case.limit(), **facts(WHAT_VIEWS, case, OURS, peak_mb=peak_mb(ours)))

    @pytest.mark.parametrize("name", peers.VIEWS)
    def test_peer(self, benchmark: Any, contest: Any, case: Views, name: str) -> None:
        p = case.problem()
        ours, peer = our_views(p), peer_call(peers.VIEWS, case, name, p)
        admit(name, ours, peer)
        contest(benchmark, peer, ours, **facts(WHAT_VIEWS, case, name, peak_mb=peak_mb(peer)))


@pytest.mark.parametrize("case", SWEEP, ids=lambda case: f"N = {case.N}")
@pytest.mark.parametrize("name", [OURS, "torch"])
def test_sweep(benchmark: Any, contest: Any, case: Embeddings, name: str) -> None:
    """How time grows with N."""
    p = case.problem()
    ours = our_embeddings(p)
    contender = ours if name == OURS else peers.EMBEDDINGS[name][1](p)
    limit = case.limit() if name == OURS else None
    contest(benchmark, contender, ours, limit=limit, **facts("sweep over N", case, name, size=case.N))


FOR_CASE: dict[type, tuple[Any, Any, str]] = {
    Local: (peers.LOCAL, our_local, WHAT_LOCAL),
    Embeddings: (peers.EMBEDDINGS, our_embeddings, WHAT_EMBEDDINGS),
    Views: (peers.VIEWS, our_views, WHAT_VIEWS),
}


def on_cuda(function: Callable[[Any], Call], case: Case) -> Bind:
    def run(*tensors: Tensor) -> Any:
        return function(case.problem(*tensors))

    return run


ON_CUDA = [*LOCAL, *EMBEDDINGS, *VIEWS]
ON_CUDA += [case for case in ROUNDED if case not in ON_CUDA]
TF32, BF16, BF16_INPUT = f"{OURS}, tf32", f"{OURS}, bf16", f"{OURS}, bf16 embeddings"
PRECISIONS = {
    OURS: ("highest", "3xtf32"),
    TF32: ("high", "tf32"),
    BF16: ("medium", "bf16"),
    BF16_INPUT: ("medium", "bf16"),
}
OF_RATE = {"3xtf32": OURS, "tf32": TF32, "bf16": BF16}
ALLOWED = {"3xtf32": 1e-3, "tf32": 5e-3, "bf16": 2e-2}
"""How far gradients may be apart in their norm: some ten roundings of an operand."""
OUR_ROUNDED = [(case, name) for case in ROUNDED for name in (TF32, BF16)] + [(Embeddings(8192), BF16_INPUT)]
CUDA_PEERS = {Embeddings: peers.CUDA_EMBEDDINGS, Views: peers.CUDA_VIEWS}
PEERS_ON_CUDA = [
    (case, name, mode)
    for case in ROUNDED
    for name, peer in CUDA_PEERS[type(case)].items()
    for mode in ((EAGER, GRAPH) if peer.in_graph else (EAGER,))
]


def apart(one: Tensor, other: Tensor) -> float:
    """|one - other| relative to the length of the other."""
    return float((one.float() - other.float()).norm() / other.float().norm())


def ours_at(name: str, case: Case) -> Bind:
    ours = FOR_CASE[type(case)][1]
    if name != OURS:
        ours = partial(ours, precision=PRECISIONS[name][0])
    if name == BF16_INPUT:
        ours = partial(ours, dtype=torch.bfloat16)
    return on_cuda(ours, case)


def refuse_large(name: str, case: Case, largest: int) -> None:
    if case.matrix() > largest:
        pytest.skip(f"{name}: a matrix of {4e-9 * case.matrix():.0f} GB, several times over")


@pytest.mark.cuda
@pytest.mark.parametrize("case", ON_CUDA, ids=lambda case: case.name)
@pytest.mark.parametrize("mode", [EAGER, GRAPH])
@pytest.mark.parametrize("name", [OURS, "torch", "torch.compile"])
def test_on_cuda(cuda_contest: Any, case: Case, mode: str, name: str) -> None:
    """What the classes above measure, on CUDA."""
    if name != OURS:
        refuse_large(name, case, 8 * LARGEST_MATRIX)
    torch.compiler.reset()
    table, ours, what = FOR_CASE[type(case)]

    def agree(one: Tensor, other: Tensor) -> None:
        assert apart(one, other) <= ALLOWED["3xtf32"]

    cuda_contest(
        on_cuda(ours if name == OURS else table[name][1], case),
        on_cuda(ours, case),
        case.tensors,
        mode=mode,
        limit=(*case.limit(), "3xtf32") if name == OURS else None,
        agree=None if name == OURS else agree,
        peer=name != OURS,
        **facts(what, case, name),
    )


@pytest.mark.cuda
@pytest.mark.parametrize(("case", "name"), OUR_ROUNDED, ids=lambda x: x if isinstance(x, str) else x.name)
@pytest.mark.parametrize("mode", [EAGER, GRAPH])
def test_precision_on_cuda(cuda_contest: Any, case: Case, mode: str, name: str) -> None:
    """Ours with products in tf32 and in bfloat16, against ours at the accuracy of float32."""
    rate = PRECISIONS[name][1]

    def agree(highest: Tensor, rounded: Tensor) -> None:
        assert apart(rounded, highest) <= ALLOWED[rate]

    cuda_contest(
        ours_at(name, case),
        ours_at(OURS, case),
        case.tensors,
        mode=mode,
        limit=(*case.limit(), rate),
        agree=agree,
        peer=False,
        **facts(FOR_CASE[type(case)][2], case, name, against=OURS),
    )


@pytest.mark.cuda
@pytest.mark.parametrize(("case", "name", "mode"), PEERS_ON_CUDA, ids=lambda x: x if isinstance(x, str) else x.name)
def test_peer_on_cuda(cuda_contest: Any, case: Case, name: str, mode: str) -> None:
    """Peers that work in tf32 or bfloat16, or wait for the device, against ours at the same precision."""
    peer = CUDA_PEERS[type(case)][name]
    if find_spec(peer.module) is None:
        pytest.skip(f"{name}: {peer.module} is not installed")
    if peer.largest:
        refuse_large(name, case, peer.largest)
    torch.compiler.reset()

    def agree(ours: Tensor, theirs: Tensor) -> None:
        distance = apart(ours, theirs)
        if not distance <= (peer.allowed or ALLOWED[peer.rate]):
            pytest.skip(f"{name} gives something else: {distance:.2g} of its length apart")

    against = OF_RATE[peer.rate]
    cuda_contest(
        on_cuda(peer.prepare, case),
        ours_at(against, case),
        case.tensors,
        mode=mode,
        agree=agree if peer.compared else None,
        peer=True,
        **facts(FOR_CASE[type(case)][2], case, name, against=against, leaves_out=peer.leaves_out),
    )
