# SPDX-License-Identifier: MIT
"""What the benchmarks of the op `contrastive` compute: their cases, ours on them, and how a row is described."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import protokernels
from benchmarks import contrastive_peers as peers
from benchmarks.contrastive_peers import Call, EmbeddingProblem, LocalProblem, ViewsProblem

OURS = "protokernels"
SIZES = "maps or embeddings"
LARGEST_MATRIX = 1 << 27  # numbers in one temporary of a peer: with six of them, 3 GB
WHAT_LOCAL, WHAT_EMBEDDINGS = "pixels, forward and backward", "embeddings, forward and backward"
WHAT_VIEWS = "two views, forward and backward"


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
    Local(temperature=0.07),
    Local(temperature=0.7),
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


def facts(what: str, case: Case, name: str, **more: Any) -> dict[str, Any]:
    order = LOCAL.index(case) if isinstance(case, Local) else case.N
    return {"what": what, "case": case.name, "sizes": SIZES, "order": order, "contender": name, **more}
