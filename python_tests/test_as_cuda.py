# SPDX-License-Identifier: MIT
"""The plugin `python_tests.emulator.as_cuda`: under it the tests of this file launch every CUDA kernel's launch function, and pass."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import protokernels
from protokernels import backend
from python_tests import forks
from python_tests.emulator import as_cuda, build, missing_tools
from python_tests.places import needs_native

pytestmark = [needs_native, pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))]

ROOT = Path(__file__).resolve().parents[1]
LAUNCHED = {
    "prototypes": {"forward", "backward", "accumulate", "blend"},
    "sinkhorn": {"forward", "backward", "plan", "plan_backward", "envelope", "features", "features_backward"},
    "contrastive": {"plan", "views", "pack", "unpack", "forward", "backward", "coefficients"},
    "warp": {"forward", "backward", "affine_forward", "affine_backward"},
    "nearest": {"search"},
}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def check(function: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> None:
    """Native values and gradients in float32, beside those of the reference in float64."""

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        values = function(*leaves)
        total = sum((x.square().sum() for x in values), torch.zeros((), dtype=dtype))
        return [*(x.detach() for x in values), *torch.autograd.grad(total, leaves)]

    with backend.use("native"):
        found = run(torch.float32)
    with backend.use("reference"):
        expected = run(torch.float64)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


class TestFunctions:
    """By the CPU's kernels here, by the CUDA kernels under the plugin."""

    def test_prototypes(self) -> None:
        def step(z: Tensor, prototypes: Tensor) -> list[Tensor]:
            found = protokernels.prototype_step(z, prototypes, temperature=0.5, new_weight=0.9, return_entropy=True)
            updated = protokernels.update_prototypes(prototypes, z, torch.arange(70) % 5, new_weight=0.9)
            return [found.assignment, found.entropy, found.prototypes.detach(), updated.prototypes.detach()]  # type: ignore[list-item]

        check(step, draw(70, 9), draw(5, 9))

    @pytest.mark.parametrize("gradient", ["unrolled", "implicit", "envelope"])
    def test_sinkhorn(self, gradient: Any) -> None:
        def solve(cost: Tensor) -> list[Tensor]:
            found = protokernels.sinkhorn(cost, epsilon=0.7, num_iters=200, gradient=gradient)
            return [found.entropic_value] if gradient == "envelope" else [found.entropic_value, found.plan]

        check(solve, draw(2, 9, 7))

    def test_sinkhorn_with_a_row_that_is_absent(self) -> None:
        def solve(cost: Tensor) -> list[Tensor]:
            filled = torch.cat([cost, torch.full_like(cost[:, :1], torch.nan)], 1)
            mask = torch.arange(filled.shape[1]).expand(filled.shape[:2]) < cost.shape[1]
            return [protokernels.sinkhorn(filled, row_mask=mask, epsilon=0.7, num_iters=20).plan]

        check(solve, draw(2, 5, 7))

    def test_sinkhorn_from_features(self) -> None:
        def solve(x: Tensor, y: Tensor) -> list[Tensor]:
            return [protokernels.sinkhorn_features(x, y, epsilon=1.0, num_iters=200).entropic_value]

        check(solve, draw(2, 9, 6), draw(2, 7, 6))

    def test_contrastive(self) -> None:
        labels = torch.arange(2 * 8 * 8).view(2, 8, 8) % 3
        check(lambda x: [protokernels.local_contrastive_loss(x, labels, block_size=4)], draw(2, 6, 8, 8))
        check(lambda x, y: [protokernels.nt_xent_loss(x, y)], draw(20, 9), draw(20, 9).flip(0))

    def test_warp(self) -> None:
        seed, images, params = torch.arange(2), draw(2, 2, 21, 18), draw(2, 7).sigmoid()
        check(lambda x, p: [protokernels.transform(x, p, seed=seed)], images, params)
        check(lambda x, m: [protokernels.affine_warp(x, m, padding_mode="border")], images, draw(2, 2, 3))

    def test_nearest(self) -> None:
        queries, bank = draw(20, 9), draw(100, 9)
        with backend.use("native"):
            found = protokernels.nearest(queries, bank, 5)
        distances, indices = torch.cdist(queries.double(), bank.double()).square().topk(5, largest=False)
        assert torch.equal(found.indices, indices)
        torch.testing.assert_close(found.distances.double(), distances)


@pytest.mark.parametrize("name", as_cuda.OTHERWISE)
def test_what_is_left_out_is_there(name: str) -> None:
    file, part, test = name.split("::")
    text = (ROOT / "python_tests" / file).read_text().partition(f"\nclass {part}:\n")[2].partition("\nclass ")[0]
    assert f"    def {test}(" in text


@pytest.mark.parametrize("architecture", ["sm_80", "sm_89"])
def test_under_the_plugin_they_run_the_cuda_kernels(architecture: str, tmp_path: Path) -> None:
    for op in LAUNCHED:
        build(op)  # minutes, where no other test has
    words = ["-q", "-p", "no:cacheprovider", "-p", "python_tests.emulator.as_cuda", __file__, "-k", "TestFunctions"]
    words += ["--emulator-architecture", architecture]
    code = f"import os, pytest\nos.chdir({str(ROOT)!r})\nraise SystemExit(pytest.main({words}))"
    run = forks.Fork(code, tmp_path, os.environ).finish(300)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    summary = re.search(r"^launches of emulated CUDA kernels: (.*)$", run.stdout, flags=re.M)
    assert summary is not None, run.stdout[-1000:]
    assert set(re.findall(r"[1-9]\d* (\w+)", summary[1])) == {f"{op}_{x}" for op in LAUNCHED for x in LAUNCHED[op]}
