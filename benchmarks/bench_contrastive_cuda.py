# SPDX-License-Identifier: MIT
"""The op `contrastive` against its peers on CUDA, forward and backward from the features, in float32, tf32 and bfloat16.

pytest benchmarks/bench_contrastive_cuda.py --device cuda --results FILE.json [-k 8192]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import contrastive_peers as peers
from benchmarks.contrastive_cases import (
    EMBEDDINGS,
    LARGEST_MATRIX,
    LOCAL,
    OURS,
    ROUNDED,
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
from benchmarks.measure_cuda import EAGER, GRAPH, Bind

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
    """What `bench_contrastive.py` measures, on CUDA."""
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
