# SPDX-License-Identifier: MIT
"""The op `nearest` under torch's machinery: opcheck, compile, export, autocast, inference; and under every CPU instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from protokernels import nearest
from python_tests.cpu_levels import AtEveryLevel
from python_tests.nearest_oracle import check, draw
from python_tests.places import NATIVE_PLACES, PLACES, Place


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


class TestContract:
    @pytest.mark.parametrize("place", NATIVE_PLACES)
    @pytest.mark.parametrize("cosine", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_opcheck(self, place: Place, dtype: torch.dtype, cosine: bool) -> None:
        queries, bank = (x.to(place.device, dtype) for x in draw(33, 50, 7))
        torch.library.opcheck(torch.ops.protokernels.nearest_search, (queries, bank, 3, cosine))

    @pytest.mark.parametrize("place", NATIVE_PLACES)
    def test_compile_without_graph_breaks(self, place: Place) -> None:
        torch.compiler.reset()

        def work(queries: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
            found = nearest(2 * queries, bank, 3)
            return found.distances.mean(), found.indices.T

        compiled = torch.compile(work, fullgraph=True, backend="aot_eager", dynamic=True)
        for N, M in ((33, 50), (70, 129), (129, 40)):
            queries, bank = (x.to(place.device) for x in draw(N, M, 7))
            for a, b in zip(compiled(queries, bank), work(queries, bank), strict=True):
                assert torch.equal(a, b)

    @pytest.mark.parametrize("place", NATIVE_PLACES)
    def test_export_with_a_free_batch_size(self, place: Place) -> None:
        class Classifier(nn.Module):
            bank: Tensor

            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("bank", draw(1, 60, 7)[1])

            def forward(self, x: Tensor) -> Tensor:
                return nearest(x, self.bank, 3, metric="cosine").indices

        model = Classifier().to(place.device)
        x = torch.randn(33, 7, device=place.device)
        exported = torch.export.export(model, (x[:8],), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
        assert torch.equal(exported.module()(x), model(x))
        assert "protokernels.nearest_search" in exported.graph_module.code

    def test_autocast_changes_nothing(self, place: Place) -> None:
        queries, bank = (x.to(place.device) for x in draw(33, 90, 7))
        with torch.autocast(place.device, torch.bfloat16):
            check(queries, bank, 4, "sqeuclidean")

    def test_inference_mode_and_no_grad(self, place: Place) -> None:
        queries, bank = (x.to(place.device).requires_grad_() for x in draw(33, 90, 7))
        with torch.inference_mode():
            check(queries, bank, 4, "cosine")
        with torch.no_grad():
            check(queries, bank, 4, "cosine")


class TestInstructionSets(AtEveryLevel):
    """All values: the same bits at every level, since they are compared with the definition's."""

    FILES = ("test_nearest", "test_nearest_assign", "test_nearest_seed")
    CHOSEN = "TestValue"
