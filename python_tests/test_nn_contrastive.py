# SPDX-License-Identifier: MIT
"""The contrastive losses as modules: the function's values, what they refuse when they are made, copies and pickles."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import protokernels
from protokernels.nn import CrossViewLoss, LocalContrastiveLoss, NTXentLoss, SupConLoss
from python_tests.contrastive_oracle import draw_maps

LOCAL: dict[str, Any] = {
    "temperature": 0.2, "block_size": 3, "form": "in", "scope": "image", "reduction": "anchor", "background": 1,
    "ignore_index": 0, "normalize": False, "drop_remainder": True, "precision": "high",
}  # fmt: skip


class TestValue:
    @pytest.mark.parametrize("name", LOCAL)
    def test_every_option_reaches_the_function(self, name: str) -> None:
        features, labels = draw_maps((2, 5, 8, 8), seed=1)
        module = LocalContrastiveLoss(**{name: LOCAL[name]})
        assert torch.equal(
            module(features, labels), protokernels.local_contrastive_loss(features, labels, **{name: LOCAL[name]})
        )
        assert getattr(module, name) == LOCAL[name]

    def test_all_options_together_and_without_labels(self) -> None:
        features, labels = draw_maps((2, 5, 8, 8), seed=2)
        assert torch.equal(
            LocalContrastiveLoss(**LOCAL)(features, labels),
            protokernels.local_contrastive_loss(features, labels, **LOCAL),
        )
        assert torch.equal(
            LocalContrastiveLoss(stride=2)(features), protokernels.local_contrastive_loss(features, None, stride=2)
        )

    def test_embeddings(self) -> None:
        first, second = torch.randn(2, 9, 4)
        labels = torch.arange(9) % 3
        options: dict[str, Any] = {"temperature": 0.3, "form": "negout", "reduction": "none", "normalize": False}
        assert torch.equal(SupConLoss(**options)(first, labels), protokernels.supcon_loss(first, labels, **options))
        options = {"temperature": 0.3, "denominator": "negatives", "normalize": False}
        assert torch.equal(NTXentLoss(**options)(first, second), protokernels.nt_xent_loss(first, second, **options))
        options["symmetric"] = False
        assert torch.equal(
            CrossViewLoss(**options)(first, second), protokernels.cross_view_loss(first, second, **options)
        )


class TestContract:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: LocalContrastiveLoss(temperature=0),
            lambda: LocalContrastiveLoss(block_size=4, stride=4),
            lambda: LocalContrastiveLoss(form="out"),  # type: ignore[arg-type]
            lambda: LocalContrastiveLoss(reduction="mean"),  # type: ignore[arg-type]
            lambda: SupConLoss(reduction="sum"),  # type: ignore[arg-type]
            lambda: SupConLoss(gather="all"),  # type: ignore[arg-type]
            lambda: NTXentLoss(denominator="positives"),  # type: ignore[arg-type]
            lambda: CrossViewLoss(precision="tf32"),  # type: ignore[arg-type]
            lambda: CrossViewLoss(gather=1),  # type: ignore[arg-type]
        ],
    )
    def test_what_is_wrong_is_refused_when_it_is_made(self, make: Any) -> None:
        with pytest.raises(ValueError, match=r"(LocalContrastiveLoss|SupConLoss|NTXentLoss|CrossViewLoss): "):
            make()

    @pytest.mark.parametrize("gather", [True, "ring"])
    def test_modules_pass_on_that_they_gather(self, gather: Any) -> None:
        x = torch.randn(9, 4)
        for module, other in (
            (SupConLoss(gather=gather), torch.arange(9) % 3),
            (NTXentLoss(gather=gather), x),
            (CrossViewLoss(gather=gather), x),
        ):
            with pytest.raises(RuntimeError, match=r"gather needs torch\.distributed"):  # there is no other process
                module(x, other)
            assert f"gather={gather!r}" in repr(module)

    def test_modules_are_copied_pickled_and_have_no_state(self) -> None:
        features, labels = draw_maps((2, 5, 8, 8), seed=3)
        module = LocalContrastiveLoss(0.3, block_size=4)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(other(features, labels), module(features, labels))
        assert not module.state_dict()
        assert "block_size=4" in repr(module) and "dense" in repr(LocalContrastiveLoss())
