# SPDX-License-Identifier: MIT
"""The op `warp` under torch's machinery: opcheck, compile, export, autocast; and under every CPU instruction set."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from protokernels import (
    affine_warp,
    blend_flip,
    gaussian_blur,
    gaussian_noise,
    rotate,
    soft_crop,
    transform,
)
from python_tests.cpu_levels import AtEveryLevel
from python_tests.places import NATIVE_PLACES, PLACES, Place
from python_tests.test_warp import draw_matrices, on
from python_tests.warp_oracle import draw

OPS = torch.ops.protokernels
NO_BACKWARD = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
"""All of opcheck but the check that a gradient is registered, for what has none."""
HAS_COMPILER = any(shutil.which(name) for name in ("g++", "clang++"))
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


@pytest.mark.parametrize("place", NATIVE_PLACES)
class TestContract:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 0], []])
    def test_opcheck_chain(self, place: Place, dtype: torch.dtype, order: list[int]) -> None:
        images, params, rest = self._chain(place, dtype, order)
        torch.library.opcheck(OPS.warp_forward, (images.requires_grad_(), params.requires_grad_(), *rest))

    def test_without_bits_and_seeds(self, place: Place) -> None:
        """All stages on, and 0, without tensors that say so."""
        images, params, (_, _, *rest) = self._chain(place, torch.float32, [0, 1, 2, 3, 4, 5])
        leaves = images.requires_grad_(), params.requires_grad_()
        torch.library.opcheck(OPS.warp_forward, (*leaves, None, None, *rest))
        full = torch.full((3,), 63, dtype=torch.int32, device=place.device)
        given = OPS.warp_forward(*leaves, full, torch.zeros(3, dtype=torch.int64, device=place.device), *rest)
        left_out = OPS.warp_forward(*leaves, None, None, *rest)
        assert torch.equal(given, left_out)
        for one, other in zip(*(torch.autograd.grad(x.square().sum(), leaves) for x in (given, left_out)), strict=True):
            assert torch.equal(one, other)

    @pytest.mark.parametrize("need", [(True, True), (True, False), (False, True)])
    def test_opcheck_backward_of_the_chain(self, place: Place, need: tuple[bool, bool]) -> None:
        images, params, rest = self._chain(place, torch.float32, [0, 1, 2, 3, 4, 5])
        leaves = [t.clone().requires_grad_(n) for t, n in zip((images, params), need, strict=True)]
        torch.library.opcheck(OPS.warp_forward, (*leaves, *rest), test_utils="test_aot_dispatch_dynamic")
        arguments = (torch.randn_like(images), images, params, *rest, *need)
        torch.library.opcheck(OPS.warp_backward, arguments, test_utils=NO_BACKWARD)

    @staticmethod
    def _chain(place: Place, dtype: torch.dtype, order: list[int]) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        images, params, seed = on(place, *draw((3, 2, 9, 7), seed=1, dtype=dtype))
        enabled = torch.tensor([63, 0, 37], dtype=torch.int32, device=place.device)
        return images, params, (enabled, seed, order, [3, 0], 2.0, 0.1, 0.4, 1.0, 1)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("shape", "size"), [((3, 2, 9, 7), [4, 8]), ((2, 1, 3, 4, 5), [2, 6, 3])])
    def test_opcheck_affine(self, place: Place, dtype: torch.dtype, shape: tuple[int, ...], size: list[int]) -> None:
        images, matrix = self._affine(place, dtype, shape)
        torch.library.opcheck(OPS.warp_affine_forward, (images.requires_grad_(), matrix.requires_grad_(), size, 1))

    @pytest.mark.parametrize("need", [(True, True), (True, False), (False, True)])
    @pytest.mark.parametrize(("shape", "size"), [((3, 2, 9, 7), [4, 8]), ((2, 1, 3, 4, 5), [2, 6, 3])])
    def test_opcheck_backward_of_affine(
        self, place: Place, shape: tuple[int, ...], size: list[int], need: tuple[bool, bool]
    ) -> None:
        images, matrix = self._affine(place, torch.float32, shape)
        grad = torch.randn((*shape[:2], *size), device=place.device)
        arguments = (grad, images, matrix, 2, *need)
        torch.library.opcheck(OPS.warp_affine_backward, arguments, test_utils=NO_BACKWARD)

    @staticmethod
    def _affine(place: Place, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        images, matrix = draw(shape, seed=2, dtype=dtype)[0], draw_matrices(shape, seed=3)
        matrix = matrix.double() if dtype == torch.float64 else matrix
        return images.to(place.device), matrix.to(place.device)


def everything(images: Tensor, params: Tensor, matrix: Tensor, seed: Tensor) -> Tensor:
    """All functions, on what other operators have made."""
    x = transform(images.sin(), params.sigmoid(), seed=seed)
    x = transform(x, params, seed=seed, order=["rotate", "noise"], enabled=torch.rand_like(params[:, :6]) < 2)
    x = affine_warp(x, matrix, padding_mode="border") + affine_warp(x, 2 * matrix, padding_mode="reflection")
    x = gaussian_blur(x, params[:, 0], radius=2) + gaussian_noise(x, 0.1, seed=seed)
    return rotate(blend_flip(soft_crop(x, params[:, 2:4]), params[:, 4]), params[:, 5], padding_mode="border")


def chain_and_map(images: Tensor, params: Tensor, matrix: Tensor, seed: Tensor) -> Tensor:
    return affine_warp(transform(images.sin(), params.sigmoid(), seed=seed, radius=2), matrix, padding_mode="border")


def compiled(place: Place, compiler: str, *shapes: tuple[int, ...], **options: Any) -> None:
    """Values and gradients of the compiled function equal those of the function. The reference is many small operators, whose
    tracing takes long: two functions of it must do."""
    torch.compiler.reset()
    function = everything if place.backend == "native" else chain_and_map
    faster = torch.compile(function, fullgraph=True, backend=compiler, **options)
    for shape in shapes:
        images, params, seed = on(place, *draw(shape, seed=4))
        matrix = draw_matrices(shape, seed=5).to(place.device)
        results = []
        for run in (function, faster):
            leaves = [t.clone().requires_grad_() for t in (images, params, matrix)]
            y = run(*leaves, seed)
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaves)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * max(1.0, a.abs().max().item()))


class TestCompile:
    def test_without_graph_breaks(self, place: Place) -> None:
        compiled(place, "aot_eager", (2, 2, 9, 12))

    @pytest.mark.parametrize("place", NATIVE_PLACES)
    def test_with_other_sizes(self, place: Place) -> None:
        with place.selected():
            compiled(place, "aot_eager", (2, 2, 9, 12), (3, 2, 9, 12), (5, 1, 16, 8), dynamic=True)

    @pytest.mark.parametrize("place", NATIVE_PLACES)
    def test_affine_maps_are_compiled_once_for_all_sizes(self, place: Place) -> None:
        torch.compiler.reset()
        counter = CompileCounter()

        def warped(x: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
            return affine_warp(x, matrix), affine_warp(x, matrix, size=(x.shape[3] + 1, x.shape[2]))

        function = torch.compile(warped, fullgraph=True, backend=counter)
        for height, width in ((5, 7), (8, 9), (11, 6), (17, 23)):
            shape = (2, 1, height, width)
            images, matrix = on(place, draw(shape, seed=17)[0], draw_matrices(shape, seed=18))
            for actual, expected in zip(function(images, matrix), warped(images, matrix), strict=True):
                assert torch.equal(actual, expected)
        assert counter.frame_count == 2  # of the first size, then of any

    @pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler")
    @pytest.mark.parametrize("place", NATIVE_PLACES)
    def test_with_inductor(self, place: Place) -> None:
        with place.selected():
            compiled(place, "inductor", (2, 2, 9, 12))

    def test_seeds_are_drawn_inside_the_graph(self, place: Place) -> None:
        images, params, _ = on(place, *draw((3, 1, 8, 8), seed=6))
        function = torch.compile(lambda x, p: transform(x, p), fullgraph=True, backend="aot_eager")
        first, second = function(images, params), function(images, params)
        assert not torch.equal(first, second)
        torch.manual_seed(7)
        again = function(images, params)
        torch.manual_seed(7)
        assert torch.equal(function(images, params), again)

    def test_seeds_are_drawn_for_any_number_of_images(self, place: Place) -> None:
        """The second batch size makes torch compile for sizes that are no numbers; export is asked to."""
        torch.compiler.reset()
        compile = partial(torch.compile, fullgraph=True, backend="aot_eager")
        noise = compile(lambda x: gaussian_noise(x, 0.5))
        chain = compile(lambda x, p: transform(x, p, order=["noise"]))
        for count in (8, 5, 3):
            images, params, _ = on(place, *draw((count, 1, 6, 7), seed=14))
            for changed in (noise(images) - images, chain(images, params) - images):
                assert changed.shape == images.shape and len(changed.flatten(1).unique(dim=0)) == count

        class Noise(nn.Module):
            def forward(self, images: Tensor, params: Tensor) -> Tensor:
                return transform(images, params, order=["noise"])

        batch = torch.export.Dim("batch", min=2)
        images, params, _ = on(place, *draw((4, 1, 6, 7), seed=15))
        exported = torch.export.export(Noise(), (images, params), dynamic_shapes=({0: batch}, {0: batch}))
        images, params, _ = on(place, *draw((7, 1, 6, 7), seed=16))
        changed = exported.module()(images, params) - images
        assert len(changed.flatten(1).unique(dim=0)) == 7

    @pytest.mark.parametrize("dynamic", [None, True])
    def test_rotate_by_several_numbers(self, place: Place, dynamic: bool | None) -> None:
        """The second number makes torch trace for a symbol."""
        images = draw((2, 1, 7, 7), seed=17)[0].to(place.device)
        for padding in ("zeros", "border"):
            torch.compiler.reset()
            turned = partial(rotate, padding_mode=padding)
            faster = torch.compile(turned, fullgraph=True, backend="aot_eager", dynamic=dynamic)
            for angle in (0.3, 1e5):
                torch.testing.assert_close(faster(images, angle), turned(images, angle), rtol=0, atol=1e-6)

    def test_export_with_a_free_batch_size(self, place: Place) -> None:
        class Chain(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = nn.Linear(64, 7)

            def forward(self, images: Tensor, seed: Tensor) -> Tensor:
                return transform(images, self.head(images.flatten(1)).sigmoid(), seed=seed)

        chain = Chain().to(place.device)
        batch = torch.export.Dim("batch", min=2)
        images, _, seed = on(place, *draw((4, 1, 8, 8), seed=8))
        exported = torch.export.export(chain, (images, seed), dynamic_shapes=({0: batch}, {0: batch}))
        images, _, seed = on(place, *draw((7, 1, 8, 8), seed=9))
        assert torch.equal(exported.module()(images, seed), chain(images, seed))
        if place.backend == "native":
            assert "protokernels.warp_forward" in exported.graph_module.code


class TestAutocast:
    def test_images_keep_their_type_and_parameters_of_half_precision_are_taken(self, place: Place) -> None:
        images, params, seed = on(place, *draw((3, 1, 8, 8), seed=10))
        head = nn.Linear(7, 7).to(place.device)
        with torch.autocast(place.device, torch.bfloat16):
            values = head(params)
            assert values.dtype == torch.bfloat16
            y = transform(images, values.sigmoid(), seed=seed)
            matrix = draw_matrices((3, 1, 8, 8)).to(place.device)
            moved = affine_warp(images, matrix)
        assert y.dtype == moved.dtype == torch.float32
        assert torch.equal(y, transform(images, values.sigmoid().float(), seed=seed))
        assert torch.equal(moved, affine_warp(images, matrix))
        y.square().sum().backward()
        assert head.weight.grad is not None and head.weight.grad.isfinite().all() and head.weight.grad.any()

    def test_no_gradient_is_recorded_where_none_is_wanted(self, place: Place) -> None:
        images, params, seed = on(place, *draw((3, 1, 8, 8), seed=11))
        params.requires_grad_()
        with torch.no_grad():
            assert not transform(images, params, seed=seed).requires_grad
        with torch.inference_mode():
            assert torch.equal(transform(images, params, seed=seed), transform(images, params.detach(), seed=seed))


class TestFunctionTransforms:
    def test_grad(self, place: Place) -> None:
        """torch.func differentiates no operator that torch.library registered; the call finds it an autograd.Function."""
        images, params, seed = on(place, *draw((2, 1, 5, 6), seed=12))
        matrix = draw_matrices((2, 1, 5, 6)).to(place.device)
        calls: list[tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = [
            (lambda x, p: transform(x, p, seed=seed).square().sum(), params),
            (lambda x, m: affine_warp(x, m).square().sum(), matrix),
        ]
        for call, second in calls:
            grads = torch.func.grad(call, argnums=(0, 1))(images, second)
            x, p = images.clone().requires_grad_(), second.clone().requires_grad_()
            for now, then in zip(grads, torch.autograd.grad(call(x, p), (x, p)), strict=True):
                torch.testing.assert_close(now, then)

    @pytest.mark.filterwarnings("ignore:.*There is a performance drop:UserWarning")
    def test_vmap(self, place: Place) -> None:
        """Never needed, since the batch is a dimension of the op; a loop on the kernels."""
        images, params, _ = on(place, *draw((6, 1, 5, 6), seed=13))
        matrix, seed = on(place, draw_matrices((6, 1, 5, 6)), torch.arange(2))
        x, p, m = images.view(3, 2, 1, 5, 6), params.view(3, 2, 7), matrix.view(3, 2, 2, 3)
        chain = torch.func.vmap(lambda x, p: transform(x, p, seed=seed))(x, p)
        assert torch.equal(chain.flatten(0, 1), transform(images, params, seed=seed.repeat(3)))
        maps = torch.func.vmap(affine_warp)(x, m)
        assert torch.equal(maps.flatten(0, 1), affine_warp(images, matrix))


class TestInstructionSets(AtEveryLevel):
    """Values, gradients and edges, of images and volumes."""

    FILES = ("test_warp", "test_warp_edges", "test_warp_gradient", "test_warp_volumes", "test_warp_noise")
    CHOSEN = "TestValue or TestGradient or TestClosedForms"
    SECONDS = 600
