# SPDX-License-Identifier: MIT
"""Times of the cases that have a goal on an H200, and what every kernel in them takes: the fast look, without peers.

python benchmarks/gpu_targets.py --out FILE.json [--only prototypes 8192x128]

Each case is captured in a CUDA graph and replayed; inputs stay the same, so small ones are in the second-level cache, unlike in
`bench_<op>.py --device cuda`, whose inputs rotate. Kernel times are torch's profiler's, of three calls launched from Python.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the benchmarks are no installed package

import protokernels as pk
from benchmarks import measure_cuda
from benchmarks.bench_warp import Case as WarpCase
from benchmarks.contrastive_cases import Embeddings, Local
from benchmarks.results_file import target

Call = Callable[[], Any]
ROUNDS = 5


def prototypes(rows: int, D: int, K: int) -> Call:
    z, q = torch.randn(rows, D, device="cuda"), torch.randn(K, D, device="cuda")
    return torch.no_grad()(lambda: pk.prototype_step(z, q, temperature=0.1, new_weight=0.01))


def sinkhorn(B: int, N: int, num_iters: int, of: str) -> Call:
    x, y = (torch.nn.functional.normalize(torch.randn(B, N, 64, device="cuda"), dim=2) for _ in range(2))
    cost = (1 - x @ y.mT).requires_grad_()
    weight = torch.randn_like(cost)
    if of == "forward":
        return torch.no_grad()(lambda: pk.sinkhorn(cost, num_iters=num_iters, gradient="envelope").plan)
    if of == "value":
        return lambda: torch.autograd.grad(
            pk.sinkhorn(cost, num_iters=num_iters, gradient="envelope").entropic_value.sum(), cost
        )
    gradient: Any = of
    return lambda: torch.autograd.grad(pk.sinkhorn(cost, num_iters=num_iters, gradient=gradient).plan, cost, weight)


def features(N: int, D: int, num_iters: int) -> Call:
    x, y = (torch.randn(1, N, D, device="cuda") for _ in range(2))
    return torch.no_grad()(lambda: pk.sinkhorn_features(x, y, num_iters=num_iters).entropic_value)


def local(case: Local) -> Call:
    x, labels = case.tensors(0, "cuda")
    x.requires_grad_()
    where: dict[str, Any] = {"block_size": case.block} if case.block else {"stride": case.stride}
    return lambda: torch.autograd.grad(pk.local_contrastive_loss(x, labels, temperature=case.temperature, **where), x)


def embeddings(N: int, precision: Any) -> Call:
    x, labels = Embeddings(N).tensors(0, "cuda")
    x.requires_grad_()
    return lambda: torch.autograd.grad(pk.supcon_loss(x, labels, temperature=0.1, precision=precision), x)


def warp(B: int, C: int, side: int) -> Call:
    images, params, grad = (tensor.requires_grad_() for tensor in WarpCase(B, C, side).tensors(0, "cuda"))
    return lambda: torch.autograd.grad(pk.transform(images, params), (images, params), grad.detach())


def nearest(N: int, M: int, D: int, k: int) -> Call:
    queries, bank = torch.randn(N, D, device="cuda"), torch.randn(M, D, device="cuda")
    return lambda: pk.nearest(queries, bank, k)


CASES: dict[str, tuple[float | None, Callable[[], Call]]] = {
    "prototypes, step 2048x32x10": (8, partial(prototypes, 2048, 32, 10)),
    "prototypes, step 2048x128x256": (None, partial(prototypes, 2048, 128, 256)),
    "prototypes, step 65536x128x256": (45, partial(prototypes, 65536, 128, 256)),
    "prototypes, step 65536x32x10": (None, partial(prototypes, 65536, 32, 10)),
    "sinkhorn, forward 64x49x49, 100 it": (25, partial(sinkhorn, 64, 49, 100, "forward")),
    "sinkhorn, value f+b 64x49x49, 100 it": (40, partial(sinkhorn, 64, 49, 100, "value")),
    "sinkhorn, implicit plan f+b 64x49x49, 100 it": (60, partial(sinkhorn, 64, 49, 100, "implicit")),
    "sinkhorn, unrolled plan f+b 64x49x49, 100 it": (None, partial(sinkhorn, 64, 49, 100, "unrolled")),
    "sinkhorn, forward 16x196x196, 100 it": (60, partial(sinkhorn, 16, 196, 100, "forward")),
    "sinkhorn, implicit plan f+b 16x196x196, 100 it": (None, partial(sinkhorn, 16, 196, 100, "implicit")),
    "sinkhorn, forward 4x1024x1024, 50 it": (250, partial(sinkhorn, 4, 1024, 50, "forward")),
    "sinkhorn, forward 1x4096x4096, 10 it": (200, partial(sinkhorn, 1, 4096, 10, "forward")),
    "sinkhorn, forward 1x4096x4096, 100 it": (1300, partial(sinkhorn, 1, 4096, 100, "forward")),
    "sinkhorn, features 4096, D = 64, 100 it": (2000, partial(features, 4096, 64, 100)),
    "sinkhorn, features 10240, D = 64, 100 it": (9000, partial(features, 10240, 64, 100)),
    "contrastive f+b, 4x16x160x160, blocks of 16": (60, partial(local, Local())),
    "contrastive f+b, 4x16x160x160, stride 4": (30, partial(local, Local(block=0, stride=4))),
    "contrastive f+b, 4x64x160x160, stride 4": (60, partial(local, Local(C=64, block=0, stride=4))),
    "contrastive f+b, 4x16x160x160, all pixels": (3000, partial(local, Local(block=0))),
    "contrastive f+b, 2048x128, float32": (25, partial(embeddings, 2048, "highest")),
    "contrastive f+b, 8192x128, float32": (None, partial(embeddings, 8192, "highest")),
    "contrastive f+b, 8192x128, tf32": (300, partial(embeddings, 8192, "high")),
    "contrastive f+b, 8192x128, bf16": (200, partial(embeddings, 8192, "medium")),
    "contrastive f+b, 32768x128, tf32": (3200, partial(embeddings, 32768, "high")),
    "contrastive f+b, 32768x128, bf16": (2200, partial(embeddings, 32768, "medium")),
    "nearest, 60000x10000x32, k = 5": (160, partial(nearest, 60000, 10000, 32, 5)),
    "nearest, 60000x50x32, k = 1": (None, partial(nearest, 60000, 50, 32, 1)),
    "warp, chain f+b 64x1x28x28": (10, partial(warp, 64, 1, 28)),
    "warp, chain f+b 32x1x128x128": (12, partial(warp, 32, 1, 128)),
    "warp, chain f+b 16x3x224x224": (40, partial(warp, 16, 3, 224)),
}
"""Name -> goal in microseconds, and what makes the call."""


def kernels_of(call: Call) -> dict[str, dict[str, float]]:
    """Launches and microseconds of every kernel in one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
    found: dict[str, dict[str, float]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            entry = found.setdefault(event.name[:90], {"launches": 0.0, "us": 0.0})
            entry["launches"] += 1 / 3
            entry["us"] += event.device_time_total / 3
    return {
        name: {key: round(value, 2) for key, value in entry.items()}
        for name, entry in sorted(found.items(), key=lambda pair: -pair[1]["us"])
    }


def measure_case(gpu: measure_cuda.Gpu, call: Call) -> dict[str, Any]:
    for _ in range(3):
        call()
    replay = gpu.graph(measure_cuda.sweep([call]))
    replay()
    calls = measure_cuda.calls_in_sweep(1)
    eager = sorted(gpu.seconds(measure_cuda.sweep([call])) / calls for _ in range(ROUNDS))[ROUNDS // 2]
    graph = sorted(gpu.seconds(replay) / calls for _ in range(ROUNDS))[ROUNDS // 2]
    return {"eager_us": round(1e6 * eager, 2), "graph_us": round(1e6 * graph, 2), "kernels": kernels_of(call)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=target, required=True)
    parser.add_argument("--only", nargs="*", default=[""], help="cases whose name holds one of these")
    options = parser.parse_args()
    gpu = measure_cuda.Gpu()
    report: dict[str, Any] = {"run": measure_cuda.describe_run(gpu), "rows": []}
    for name, (goal, make) in CASES.items():
        if any(part in name for part in options.only):
            row = {"case": name, "goal_us": goal, **measure_case(gpu, make())}
            report["rows"].append(row)
            print(
                f"{name:<48} {row['graph_us']:>10.1f} us in a graph, {row['eager_us']:>10.1f} from Python; goal {goal}"
            )
            options.out.write_text(json.dumps(report, indent=1) + "\n")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
