# SPDX-License-Identifier: MIT
"""The op `contrastive` under torch's machinery: opcheck, compile, export, autocast; and under every CPU instruction set."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from protokernels import cross_view_loss, local_contrastive_loss, nt_xent_loss, supcon_loss
from python_tests.contrastive_oracle import brute_force, check_close, draw_maps, rounding
from python_tests.cpu_levels import AtEveryLevel
from python_tests.places import NATIVE_PLACES, PLACES, Place

OPS = torch.ops.protokernels
NO_BACKWARD = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
"""All of opcheck but the check that a gradient is registered, for what has none."""


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


def planned(place: Place, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    features, labels = (x.to(place.device) for x in draw_maps((2, 5, 6, 7), seed=1))
    arguments = ([1, 4, 3], [1, 1, 1], False, False, 0, 2, 0, 0)
    return features.to(dtype).flatten(2), labels[:, None], OPS.contrastive_plan(labels[:, None], *arguments)


@pytest.mark.parametrize("place", NATIVE_PLACES)
class TestContract:
    @pytest.mark.parametrize("drop", [False, True])
    @pytest.mark.parametrize("per_image", [False, True])
    def test_opcheck_plan(self, place: Place, drop: bool, per_image: bool) -> None:
        labels = planned(place)[1]
        arguments = (labels, [0, 4, 4], [1, 1, 1], per_image, drop, 0, None, 2, 1)
        torch.library.opcheck(OPS.contrastive_plan, arguments, test_utils=NO_BACKWARD)

    @pytest.mark.parametrize(
        "dtype, normalize",
        [(torch.float32, True), (torch.float64, False), (torch.bfloat16, True), (torch.float16, False)],
    )
    def test_opcheck_pack(self, place: Place, dtype: torch.dtype, normalize: bool) -> None:
        x, _, (order, *_) = planned(place, dtype)
        for layout in (x, x.mT.contiguous().mT):
            torch.library.opcheck(OPS.contrastive_pack, (layout.detach().requires_grad_(), order, normalize))
            packed, norms = OPS.contrastive_pack(layout, order, normalize)
            grad = torch.randn_like(packed)
            for channels_last in (False, True):
                arguments = (grad, packed, norms, order, layout, normalize, channels_last)
                torch.library.opcheck(OPS.contrastive_unpack, arguments, test_utils=NO_BACKWARD)

    @pytest.mark.parametrize(
        "dtype, form, layout",
        [
            (torch.float32, 0, "[N, C, H, W]"),
            (torch.float32, 1, "[N, C, P]"),
            (torch.float64, 2, "channels last"),
            (torch.bfloat16, 3, "transposed"),
        ],
    )
    def test_opcheck_losses(self, place: Place, dtype: torch.dtype, form: int, layout: str) -> None:
        x, _, plan = planned(place, dtype)
        maps = x.unflatten(2, (-1, 2))
        x = {
            "[N, C, H, W]": maps,
            "[N, C, P]": x,
            "channels last": maps.movedim(1, -1).contiguous().movedim(-1, 1),
            "transposed": maps.mT.contiguous().mT,  # the axes of the pixels cannot be read as one
        }[layout].detach()
        settings = (0.1, True, form, 0)
        torch.library.opcheck(OPS.contrastive_losses, (x.requires_grad_(), None, *plan, *settings))
        total, losses, *kept = (y.detach() for y in OPS.contrastive_losses(x, None, *plan, *settings))
        kept = [*kept[:2], *plan, kept[2], x.detach(), losses, *settings, layout == "channels last"]
        grads = (total, None) if form % 2 else (None, losses)
        torch.library.opcheck(OPS.contrastive_losses_backward, (*grads, *kept), test_utils=NO_BACKWARD)

    @pytest.mark.parametrize("crossing", [False, True])
    def test_opcheck_losses_of_two_views(self, place: Place, crossing: bool) -> None:
        first, second = (view.requires_grad_() for view in torch.randn(2, 9, 5, device=place.device))
        plan = OPS.contrastive_views(first.detach(), 9, crossing, True)
        torch.library.opcheck(OPS.contrastive_losses, (first, second, *plan, 0.5, True, 0, 0))

    def test_opcheck_between_two_sets(self, place: Place) -> None:
        first, second = torch.randn(2, 33, 32, device=place.device) / 6
        groups = torch.tensor([[0, 33, 33] * 2], dtype=torch.int32, device=place.device)
        rows = torch.arange(33, dtype=torch.int32, device=place.device)
        ranges = torch.stack([rows, rows + 1, torch.full_like(rows, -1)], dim=1)
        arguments = (first, second, groups, ranges, None, 19, 0.5, False, 0, 0)
        torch.library.opcheck(OPS.contrastive_forward, arguments, test_utils=NO_BACKWARD)
        statistics = OPS.contrastive_forward(*arguments)[2]
        own, none = (statistics, torch.randn_like(statistics[:3])), (None, None)
        arguments = (first, second, groups, ranges, *own, *none, 19, 0.5, False, 0)
        torch.library.opcheck(OPS.contrastive_backward, arguments, test_utils=NO_BACKWARD)

    def test_views_of_different_types_are_an_error_of_the_operator(self, place: Place) -> None:
        plan = OPS.contrastive_views(torch.ones(1, device=place.device), 3, False, True)
        with pytest.raises(RuntimeError, match="both views must be"):
            OPS.contrastive_losses(
                torch.ones(3, 4, device=place.device),
                torch.ones(3, 4, dtype=torch.float64, device=place.device),
                *plan,
                0.5,
                True,
                0,
                0,
            )


def compiled(function: Callable[..., Tensor], place: Place, compiler: str, *shapes: tuple[int, ...]) -> None:
    """Values and gradients of the compiled function equal those of the function, for several sizes."""
    torch.compiler.reset()
    faster = torch.compile(function, fullgraph=True, backend=compiler, dynamic=True)
    for shape in shapes:
        features, labels = (x.to(place.device) for x in draw_maps(shape, seed=3))
        results = []
        for run in (function, faster):
            leaf = features.clone().requires_grad_()
            loss = run(leaf, labels)
            results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", NATIVE_PLACES)
class TestCompile:
    @pytest.mark.parametrize("options", [{"block_size": 4}, {"stride": 2}, {}, {"form": "paper", "reduction": "image"}])
    def test_maps_without_graph_breaks(self, place: Place, options: dict[str, Any]) -> None:
        with place.selected():
            compiled(
                lambda x, y: local_contrastive_loss(2 * x, y, **options),
                place,
                "aot_eager",
                (2, 5, 8, 8),
                (3, 5, 9, 12),
            )
            compiled(lambda x, y: local_contrastive_loss(x, None, block_size=3), place, "aot_eager", (2, 5, 8, 8))

    def test_embeddings_without_graph_breaks(self, place: Place) -> None:
        def loss(x: Tensor, labels: Tensor) -> Tensor:
            rows, classes = x.flatten(1), labels.flatten(1)[:, 0]
            first, second = rows.tensor_split(2)
            return supcon_loss(rows, classes) + nt_xent_loss(first, second) + cross_view_loss(first, second.tanh())

        with place.selected():
            compiled(loss, place, "aot_eager", (8, 5, 1, 2), (12, 5, 1, 2))

    def test_ignored_labels_without_graph_breaks(self, place: Place) -> None:
        def loss(x: Tensor, labels: Tensor) -> Tensor:
            rows, classes = x.flatten(1), labels.flatten(1)[:, 0]
            return supcon_loss(rows, classes, ignore_index=0) + local_contrastive_loss(x, labels, ignore_index=1)

        with place.selected():
            compiled(loss, place, "aot_eager", (8, 5, 4, 2), (12, 5, 4, 3))

    @pytest.mark.parametrize("symmetric", [None, True, False])
    def test_two_views_are_compiled_once_for_all_sizes(self, place: Place, symmetric: bool | None) -> None:
        def loss(first: Tensor, second: Tensor) -> Tensor:
            if symmetric is None:
                return nt_xent_loss(first, second)
            return cross_view_loss(first, second, symmetric=symmetric)

        class Head(nn.Module):
            def forward(self, first: Tensor, second: Tensor) -> Tensor:
                return loss(first, second)

        graphs = []
        with place.selected():
            torch.compiler.reset()
            faster = torch.compile(
                loss, dynamic=True, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph
            )
            views = [tuple(torch.rand(size, 4, device=place.device) for _ in range(2)) for size in (2, 3, 5, 8, 13)]
            for first, second in views:
                assert torch.equal(faster(first, second), loss(first, second))
            assert len(graphs) == 1
            batch = torch.export.Dim("batch", min=2)
            exported = torch.export.export(Head(), views[2], dynamic_shapes=({0: batch}, {0: batch})).module()
            assert torch.equal(exported(*views[3]), loss(*views[3]))

    @pytest.mark.skipif(
        shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a C++ compiler"
    )
    def test_with_inductor(self, place: Place) -> None:
        # code kept on disk may be that of an operator whose results had other shapes
        with place.selected(), torch._inductor.config.patch(force_disable_caches=True):
            compiled(lambda x, y: local_contrastive_loss(x.tanh(), y, block_size=4), place, "inductor", (2, 5, 8, 8))

    def test_export_with_a_free_batch_size(self, place: Place) -> None:
        class Head(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 5, 1)

            def forward(self, x: Tensor, labels: Tensor) -> Tensor:
                return local_contrastive_loss(self.conv(x), labels, block_size=4)

        with place.selected():
            head = Head().to(place.device)
            batch = torch.export.Dim("batch", min=2)
            x, labels = (t.to(place.device) for t in draw_maps((4, 3, 8, 8), seed=4))
            exported = torch.export.export(head, (x, labels), dynamic_shapes=({0: batch}, {0: batch}))
            x, labels = (t.to(place.device) for t in draw_maps((6, 3, 8, 8), seed=5))
            assert torch.equal(exported.module()(x, labels), head(x, labels))
            assert "protokernels.contrastive_losses" in exported.graph_module.code


class TestAutocast:
    def test_half_precision_comes_in_and_the_loss_is_computed_in_float32(self, place: Place) -> None:
        features, labels = (x.to(place.device) for x in draw_maps((2, 8, 6, 6), seed=6))
        conv = nn.Conv2d(8, 19, 1).to(place.device)
        with torch.autocast(place.device, torch.bfloat16):
            half = conv(features)
            assert half.dtype == torch.bfloat16
            loss = local_contrastive_loss(half, labels, block_size=3)
        assert loss.dtype == torch.float32
        expected = brute_force(half.detach().cpu(), labels.cpu(), temperature=0.1, block_size=3)
        check_close(loss.detach(), expected, rounding(torch.float32, 19, 0.1))
        loss.backward()
        assert conv.weight.grad is not None and conv.weight.grad.isfinite().all() and conv.weight.grad.any()

    def test_no_gradient_is_recorded_where_none_is_wanted(self, place: Place) -> None:
        features, labels = (x.to(place.device) for x in draw_maps((2, 8, 6, 6), seed=7))
        features.requires_grad_()
        with torch.no_grad():
            assert not local_contrastive_loss(features, labels).requires_grad
        with torch.inference_mode():
            assert local_contrastive_loss(features, labels).isfinite()


class TestInstructionSets(AtEveryLevel):
    """Values, gradients and edges."""

    FILES = ("test_contrastive", "test_contrastive_edges", "test_contrastive_scores")


@pytest.mark.parametrize("place", NATIVE_PLACES)
class TestTypes:
    @pytest.mark.parametrize("loss", [nt_xent_loss, cross_view_loss])
    @pytest.mark.parametrize(
        "types",
        [
            (torch.bfloat16, torch.bfloat16),
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.bfloat16),
            (torch.float32, torch.float64),
        ],
    )
    def test_views_of_one_or_two_types(
        self, place: Place, loss: Callable[..., Tensor], types: tuple[torch.dtype, torch.dtype]
    ) -> None:
        views = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        found = []
        for choice in (place, Place(place.device, "reference")):
            with choice.selected():
                leaves = [v.to(place.device, t).requires_grad_() for v, t in zip(views, types, strict=True)]
                value = loss(*leaves, temperature=0.5)
                found.append((value.detach(), *torch.autograd.grad(value, leaves)))
        for native, expected in zip(*found, strict=True):
            assert native.dtype == expected.dtype
            step = torch.finfo(native.dtype).eps  # both round once to their type
            torch.testing.assert_close(native, expected, rtol=max(step, 2e-6), atol=1e-6)
