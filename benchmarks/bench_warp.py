# SPDX-License-Identifier: MIT
"""The op `warp` against its peers, forward alone and forward with backward, on the CPU and on CUDA.

pytest benchmarks/bench_warp.py --results benchmarks/results/warp_cpu.json [-k chain] [--seconds 2]
pytest benchmarks/bench_warp.py --device cuda --results FILE.json
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import protokernels
from benchmarks import warp_peers as peers
from benchmarks.measure import peak_mb
from benchmarks.measure_cuda import EAGER, GRAPH, Bind, bind, bind_gradient

OURS = "protokernels"
Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    B: int
    C: int
    side: int

    @property
    def name(self) -> str:
        return f"{self.B}x{self.C}x{self.side}x{self.side}"

    def tensors(self, seed: int = 0, device: str = "cpu", noise: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """images, params inside (0, 1), and the gradient of the result."""
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(self.B, self.C, self.side, self.side, generator=generator)
        params = torch.rand(self.B, 7, generator=generator) * 0.9 + 0.05
        if not noise:
            params[:, 1] = 0
        grad = torch.randn(images.shape, generator=generator)
        return images.to(device), params.to(device), grad.to(device)

    @property
    def pixels(self) -> int:
        return self.B * self.C * self.side**2


CASES = [Case(64, 1, 28), Case(32, 1, 128), Case(16, 3, 224)]
SWEEP = [Case(8, 1, side) for side in (16, 32, 64, 128, 256, 512)]

# Operations of a pixel, forward and backward. Blur: 26 multiply-adds; backward both filters of the gradient and of the image along one axis
# each (52) and the adjoint along the other (13). Noise: half a Philox block in the integer units, some 25 operations of a logarithm, a sine
# and a cosine. Rotation: coordinates 4, interpolation 9; backward those again, slopes and weights 14, four additions.
OPERATIONS = {"chain": (52 + 25 + 8 + 13, 130 + 25 + 25 + 31), "blur": (52, 130), "rotation": (13, 31)}
# Bytes: the image in and out; backward gradient and image in, gradient out.
BYTES = (8, 12)


def limit(part: str, case: Case, backward: bool) -> tuple[float, float]:
    forward, back = OPERATIONS[part]
    return float(case.pixels * (forward + back * backward)), float(case.pixels * (BYTES[0] + BYTES[1] * backward))


def our_chain(images: Tensor, params: Tensor) -> Tensor:
    return protokernels.transform(images, params)


def our_blur(images: Tensor, params: Tensor) -> Tensor:
    return protokernels.gaussian_blur(images, peers.SIGMA_MAX * params[:, 0], radius=peers.RADIUS)


def our_rotation(images: Tensor, params: Tensor) -> Tensor:
    return protokernels.transform(images, params, order=("rotate",))


OUR: dict[str, peers.Transform] = {"chain": our_chain, "blur": our_blur, "rotation": our_rotation}
WAYS = ("forward", "forward and backward")


def call_of(function: peers.Transform, way: str, *tensors: Tensor) -> Call:
    """Gradients go to images and parameters."""
    images, params, grad = tensors
    if way == WAYS[0]:
        return bind(function)(images, params)
    return bind_gradient(function, of=2)(images, params, grad)


def admit(ours: peers.Transform, peer: peers.Transform, case: Case, device: str = "cpu") -> None:
    """The same answer without noise, which everybody draws for themselves; gradients but for that of the noise.

    Those of the parameters to a hundredth: in float32 a coordinate beside a pixel's centre may fall on either side, where the derivative
    jumps.
    """
    images, params, grad = case.tensors(noise=False, device=device)
    found = []
    for function in (ours, peer):
        leaves = [images.clone().requires_grad_(), params.clone().requires_grad_()]
        result = function(*leaves)
        of_images, of_params = torch.autograd.grad(result, leaves, grad)
        of_params[:, 1] = 0
        found.append((result.detach(), of_images, of_params))
    for a, b, tolerance in zip(*found, (1e-3, 1e-3, 1e-2), strict=True):
        assert float((a - b).norm()) <= tolerance * float(b.norm())


def facts(part: str, way: str, case: Case, name: str, **more: Any) -> dict[str, Any]:
    row = {"what": f"{part}, {way}", "case": case.name, "sizes": "B x C x H x W", "order": CASES.index(case)}
    return {**row, "contender": name, **more}


def peer_of(part: str, name: str) -> peers.Transform:
    module, prepare = peers.TABLES[part][name]
    pytest.importorskip(module, reason=f"{name}: {module} is not installed")
    transform: peers.Transform = prepare()
    return transform


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("part", OUR)
class TestWarp:
    def test_ours(self, benchmark: Any, contest: Any, case: Case, part: str, way: str) -> None:
        ours = call_of(OUR[part], way, *case.tensors())
        bound = limit(part, case, way != WAYS[0])
        contest(benchmark, ours, ours, limit=bound, **facts(part, way, case, OURS, peak_mb=peak_mb(ours)))

    @pytest.mark.parametrize("name", ["torch", "torch.compile", "kornia"])
    def test_peer(self, benchmark: Any, contest: Any, case: Case, part: str, way: str, name: str) -> None:
        function = peer_of(part, name)
        admit(OUR[part], function, case)
        ours, peer = (call_of(one, way, *case.tensors()) for one in (OUR[part], function))
        contest(benchmark, peer, ours, **facts(part, way, case, name, peak_mb=peak_mb(peer)))


@pytest.mark.parametrize("case", SWEEP, ids=lambda case: f"side = {case.side}")
@pytest.mark.parametrize("name", [OURS, "torch"])
def test_sweep(benchmark: Any, contest: Any, case: Case, name: str) -> None:
    """How the time of the chain with its gradients grows with the image; `size` is the number of pixels."""
    ours = call_of(our_chain, WAYS[1], *case.tensors())
    contender = ours if name == OURS else call_of(peer_of("chain", name), WAYS[1], *case.tensors())
    bound = limit("chain", case, True) if name == OURS else None
    row = {"what": "sweep over the side of the image", "case": case.name, "sizes": "B x C x H x W", "order": case.side}
    contest(benchmark, contender, ours, limit=bound, size=case.pixels, contender=name, **row)


def on_cuda(function: peers.Transform, way: str) -> Bind:
    return partial(call_of, function, way)


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("mode", [EAGER, GRAPH])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [OURS, "torch", "torch.compile", "kornia"])
@pytest.mark.parametrize("part", OUR)
def test_on_cuda(cuda_contest: Any, case: Case, mode: str, way: str, name: str, part: str) -> None:
    """What the class above measures, on CUDA."""
    function = OUR[part] if name == OURS else peer_of(part, name)
    if name != OURS:
        admit(OUR[part], function, case, cuda_contest.gpu.device)
    cuda_contest(
        on_cuda(function, way),
        on_cuda(OUR[part], way),
        case.tensors,
        mode=mode,
        limit=(*limit(part, case, way != WAYS[0]), "fp32") if name == OURS else None,
        **facts(part, way, case, name),
    )
