# SPDX-License-Identifier: MIT
"""No kernel's result depends on what its memory held before: where all new memory holds NaN, infinities and more, every bit is as it was.

Sizes are narrower than a vector of the processor, where kernels read beside rows most. A process's memory is filled by a
`posix_memalign`, which torch takes its memory from, of our own; by NaN alone what compares first would not be found.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import protokernels

SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 13, 17, 31)
DTYPES = (torch.float32, torch.float64)
Results = list[Tensor]
FILLING = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* NaN, infinities, zeros, huge and small numbers of either type. */
static const uint64_t things[8] = {0xffffffffffffffff, 0x7f8000007f800000, 0xff800000ff800000, 0x7ff0000000000000,
                                   0xfff0000000000000, 0, 0xff000000fe000000, 0x3f8000003f800000};

int posix_memalign(void** memory, size_t alignment, size_t size) {
  static uint64_t state;
  static int (*real)(void**, size_t, size_t);
  if (!real) real = dlsym(RTLD_NEXT, "posix_memalign"), state = strtoull(getenv("FILLED_FROM"), 0, 10);
  int failed = real(memory, alignment, size);
  uint64_t thing = 0;
  for (size_t at = 0; !failed && at < size; at += 8) {
    if (at % 32 == 0) state = state * 6364136223846793005u + 1442695040888963407u, thing = things[state >> 61];
    memcpy((char*)*memory + at, &thing, size - at < 8 ? size - at : 8);
  }
  return failed;
}
"""


IN_CHILD = """
import sys
sys.path.append(sys.argv[1])
import torch
from python_tests.test_uninitialised import run_all
assert torch.empty(1000).isnan().any()
torch.save(run_all(), sys.argv[2])
"""


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum((k + 1) * size for k, size in enumerate(shape)))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def with_gradients(function: Callable[..., Any], *inputs: Tensor) -> Results:
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    found = function(*inputs)
    values = [found] if isinstance(found, Tensor) else [value for value in found if value is not None]
    total = sum((value * draw(*value.shape).to(value)).sum() for value in values if value.requires_grad)
    return [*(value.detach() for value in values), *torch.autograd.grad(total, inputs)]


def solution(result: protokernels.SinkhornResult) -> tuple[Tensor, ...]:
    return result.f, result.g, result.transport_cost, result.entropic_value, result.plan


def warp(name: str) -> Callable[[int, torch.dtype], Results]:
    def run(n: int, dtype: torch.dtype) -> Results:
        images, params, seed = draw(2, 2, 5, n, dtype=dtype), draw(2, 7, dtype=dtype).abs() + 0.1, torch.arange(2)
        volumes, one = draw(2, 1, 3, 4, n, dtype=dtype), params[:, 0]
        both: dict[str, Callable[[], Results]] = {
            "transform": lambda: with_gradients(lambda x, p: protokernels.transform(x, p, seed=seed), images, params),
            "back": lambda: with_gradients(
                lambda x, p: protokernels.transform(
                    x, p, seed=seed, order=["rotate", "vflip", "hflip", "crop", "noise", "blur"], blur_padding="zeros"
                ),
                images,
                params,
            ),
            "crop": lambda: with_gradients(protokernels.soft_crop, images, params[:, 2:4].clone()),
            "crop of volumes": lambda: with_gradients(protokernels.soft_crop, volumes, params[:, 1:4].clone()),
            "flip": lambda: with_gradients(protokernels.blend_flip, images, one),
            "blur": lambda: with_gradients(protokernels.gaussian_blur, volumes, one),
            "noise": lambda: with_gradients(lambda x, s: protokernels.gaussian_noise(x, s, seed=seed), images, one),
            "rotate": lambda: with_gradients(
                lambda x, a: protokernels.rotate(x, a, padding_mode="border"), images, one
            ),
            "affine": lambda: with_gradients(
                lambda x, m: protokernels.affine_warp(x, m, size=(3, n + 1)), images, draw(2, 2, 3, dtype=dtype)
            ),
            "affine of volumes": lambda: with_gradients(
                lambda x, m: protokernels.affine_warp(x, m, padding_mode="reflection"),
                volumes,
                draw(2, 3, 4, dtype=dtype),
            ),
        }
        return both[name]()

    return run


def prototypes(n: int, dtype: torch.dtype) -> Results:
    z, q = draw(n, 5, dtype=dtype), draw(7, 5, dtype=dtype)
    wide = with_gradients(
        lambda z, q: protokernels.soft_assign(z, q, temperature=0.3, return_entropy=True), draw(3, n, dtype=dtype),
        draw(2, n, dtype=dtype),
    )  # fmt: skip
    return wide + with_gradients(
        lambda z, q: protokernels.prototype_step(z, q, temperature=0.3, new_weight=0.3).assignment, z, q
    )


def sinkhorn(n: int, dtype: torch.dtype) -> Results:
    found: Results = []
    for gradient in ("unrolled", "implicit"):
        found += with_gradients(
            lambda c, gradient=gradient: solution(
                protokernels.sinkhorn(c, epsilon=0.5, num_iters=20, gradient=gradient)
            ),
            draw(2, n, 6, dtype=dtype).abs(),
        )
    x, y = draw(2, n, 3, dtype=dtype), draw(2, 6, 3, dtype=dtype)
    found += with_gradients(
        lambda x, y: protokernels.sinkhorn_features(x, y, epsilon=0.5, num_iters=20, cost="cosine").entropic_value, x, y
    )
    points, others = torch.tensor([[0.6], [2.5], [4.3]], dtype=dtype), torch.tensor([[2.8], [2.5], [1.7]], dtype=dtype)
    masses = torch.tensor([0.2, 0.3, 0.5], dtype=dtype), torch.tensor([1, 1e-15, 1e-18], dtype=dtype)
    found += solution(  # a step that sums scales is followed by one in logarithms
        protokernels.sinkhorn_features(points, others, *masses, epsilon=0.01, num_iters=3, cost="sqeuclidean")
    )
    return found + with_gradients(
        lambda x, y: protokernels.sinkhorn_divergence(x, y, epsilon=5.0, num_iters=20),
        x.mT.contiguous(),
        draw(2, 4, n, dtype=dtype),
    )


def contrastive(n: int, dtype: torch.dtype) -> Results:
    classes = torch.arange(n) % 3
    found = with_gradients(lambda z: protokernels.supcon_loss(z, classes), draw(n, 5, dtype=dtype))
    found += with_gradients(lambda z: protokernels.supcon_loss(z, torch.arange(9) % 2), draw(9, n, dtype=dtype))
    found += with_gradients(protokernels.cross_view_loss, draw(n, 5, dtype=dtype), draw(n, 5, dtype=dtype).flip(0))
    found += with_gradients(protokernels.nt_xent_loss, draw(4, n, dtype=dtype), draw(4, n, dtype=dtype).flip(0))
    labels = (torch.arange(2 * 4 * n) % 4).view(2, 4, n)
    maps = draw(2, 3, 4, n, dtype=dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        for options in (
            {"block_size": 3},
            {"stride": 2, "reduction": "none"},
            {"ignore_index": 1, "temperature": 0.01},
        ):
            found += with_gradients(
                lambda x, layout=layout, options=options: protokernels.local_contrastive_loss(
                    x.contiguous(memory_format=layout), labels, **options
                ),
                maps,
            )
    return found


def neighbours(n: int, dtype: torch.dtype) -> Results:
    queries, bank = draw(n, 3, dtype=dtype), draw(9, 3, dtype=dtype)
    model = protokernels.cluster.KMeans(2, n_init=2).fit(draw(n + 3, n, dtype=dtype))
    return [
        *protokernels.nearest(queries, bank, 4),
        *protokernels.nearest(bank, bank, min(n, 9)),
        model.cluster_centers_,
    ]


RUNS = {
    **{
        name: warp(name)
        for name in (
            *("transform", "back", "crop", "crop of volumes", "flip", "blur", "noise", "rotate"),
            *("affine", "affine of volumes"),
        )
    },
    "prototypes": prototypes,
    "sinkhorn": sinkhorn,
    "contrastive": contrastive,
    "neighbours": neighbours,
}


def run_all() -> dict[str, Results]:
    return {f"{name} {dtype} {n}": run(n, dtype) for name, run in RUNS.items() for dtype in DTYPES for n in SIZES}


@pytest.fixture(scope="module")
def expected() -> dict[str, Results]:
    return run_all()


@pytest.fixture(scope="module", params=[1, 2])
def in_filled_memory(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Results]:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not protokernels.backend.native_serves(torch.device("cpu")):
        pytest.skip("needs a C compiler and the native library")
    folder = tmp_path_factory.mktemp("memory")
    source, library, out = folder / "fill.c", folder / "fill.so", folder / "results.pt"
    source.write_text(FILLING)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    preload = " ".join(filter(None, (str(library), os.environ.get("LD_PRELOAD"))))
    environment = {**os.environ, "LD_PRELOAD": preload, "FILLED_FROM": str(request.param)}
    root = str(Path(__file__).resolve().parents[1])  # for the helpers; the package is the one that is tested here
    command = [sys.executable, "-c", IN_CHILD, root, str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results: dict[str, Results] = torch.load(out, weights_only=True)
    return results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RUNS)
def test_bits_do_not_depend_on_old_memory(
    name: str, dtype: torch.dtype, expected: dict[str, Results], in_filled_memory: dict[str, Results]
) -> None:
    for n in SIZES:
        key = f"{name} {dtype} {n}"
        assert len(in_filled_memory[key]) == len(expected[key]) > 0
        for k, (now, before) in enumerate(zip(in_filled_memory[key], expected[key], strict=True)):
            torch.testing.assert_close(
                now, before, rtol=0, atol=0, equal_nan=True, msg=lambda m, k=k, key=key: f"{key}, {k}: {m}"
            )
