# SPDX-License-Identifier: MIT
"""The op `contrastive` against its peers on the CPU, forward and backward from the features.

pytest benchmarks/bench_contrastive.py --results benchmarks/results/contrastive_cpu.json [-k block] [--seconds 2]
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from benchmarks import contrastive_peers as peers
from benchmarks.contrastive_cases import (
    EMBEDDINGS,
    LARGEST_MATRIX,
    LOCAL,
    OURS,
    SWEEP,
    VIEWS,
    WHAT_EMBEDDINGS,
    WHAT_LOCAL,
    WHAT_VIEWS,
    Case,
    Embeddings,
    Local,
    Views,
    facts,
    our_embeddings,
    our_local,
    our_views,
)
from benchmarks.contrastive_peers import Call
from benchmarks.measure import ROOT, peak_mb
from benchmarks.results_file import identity

MEMORY_GB = 16  # of a process in which a peer is tried that is likely to need more


def admit(name: str, ours: Call, peer: Call) -> None:
    """Skips a peer whose gradient is another, or none: the released loop divides by zero where a class has one pixel."""
    try:
        expected, actual = peer(), ours()
    except Exception as error:
        pytest.skip(f"{name} fails: {type(error).__name__}: {str(error).strip().splitlines()[0][:100]}")
    apart = ((actual - expected).norm() / expected.norm()).item()
    if not apart <= 1e-3:
        pytest.skip(f"{name} gives something else: {apart:.2g} of its length apart")


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
