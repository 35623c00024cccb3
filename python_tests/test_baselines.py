# SPDX-License-Identifier: MIT
"""The baselines' losses against loops over images in float64, their behaviour at collapse and for one image, their gradients."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("accelerate", reason="the baselines need the extra protokernels[train]")

from protokernels import nt_xent_loss
from protokernels.baselines import BASELINES
from protokernels.baselines.barlow_twins import barlow_twins_loss
from protokernels.baselines.byol import prediction_loss
from protokernels.baselines.common import in_float32, spread
from protokernels.baselines.densecl import correspondence, info_nce
from protokernels.baselines.swav import swapped_loss
from protokernels.baselines.vicreg import vicreg_loss
from protokernels.models import mlp_head

SELF_SUPERVISED = tuple(name for name in BASELINES if name not in ("random_init", "supervised"))
SMALL = {"image_size": 16, "width": 4, "epochs": 2, "warmup_epochs": 1}


def embeddings(count: int = 6, dim: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(count, dim, dtype=torch.float64, generator=generator)
    return first, first + torch.randn(count, dim, dtype=torch.float64, generator=generator)


def dot(x: Tensor, y: Tensor) -> float:
    return sum(float(a) * float(b) for a, b in zip(x, y, strict=True))


def cosine(x: Tensor, y: Tensor) -> float:
    return dot(x, y) / math.sqrt(dot(x, x) * dot(y, y))


def make(name: str, **changes: Any) -> Any:
    """A small method of this name and its configuration."""
    baseline = importlib.import_module(f"protokernels.baselines.{name}").BASELINE
    torch.manual_seed(0)
    config = baseline.CONFIG.preset("fair", "digits", **({**SMALL, **changes}))
    return baseline.build(config, 1)


class TestSimCLR:
    def test_against_loops(self) -> None:
        first, second = embeddings()
        z = [*first, *second]
        total = 0.0
        for i in range(12):
            others = [math.exp(cosine(z[i], z[k]) / 0.3) for k in range(12) if k != i]
            total -= math.log(math.exp(cosine(z[i], z[(i + 6) % 12]) / 0.3) / sum(others))
        assert float(nt_xent_loss(first, second, temperature=0.3)) == pytest.approx(total / 12, rel=1e-12)

    def test_collapse_and_one_image(self) -> None:
        same = torch.ones(7, 4, dtype=torch.float64)
        assert float(nt_xent_loss(same, same, temperature=0.1)) == pytest.approx(math.log(13))
        assert float(nt_xent_loss(same[:1], -same[:1], temperature=0.1)) == 0.0

    def test_small_temperature_does_not_overflow(self) -> None:
        first, second = embeddings()
        assert torch.isfinite(nt_xent_loss(first.float(), second.float(), temperature=1e-3))


class TestBYOL:
    def test_against_loops(self) -> None:
        first, second = embeddings()
        unit = [(p / p.norm(), t / t.norm()) for p, t in zip(first, second, strict=True)]
        expected = sum(dot(p - t, p - t) for p, t in unit) / 6
        assert float(prediction_loss(first, second)) == pytest.approx(expected, rel=1e-12)

    def test_constant_embeddings_are_its_minimum(self) -> None:
        assert float(prediction_loss(torch.ones(3, 4), torch.ones(3, 4))) == pytest.approx(0.0, abs=1e-6)

    def test_no_gradient_to_the_target(self) -> None:
        first, second = (x.requires_grad_() for x in embeddings())
        prediction_loss(first, second).backward()
        assert first.grad is not None and second.grad is None

    def test_the_teacher_follows(self) -> None:
        byol = make("byol", momentum=0.9)
        before = byol.teacher_encoder.conv1.weight.clone()
        assert torch.equal(before, byol.encoder.conv1.weight)
        assert not any(
            p.requires_grad for p in (*byol.teacher_encoder.parameters(), *byol.teacher_projector.parameters())
        )
        with torch.no_grad():
            byol.encoder.conv1.weight.add_(1.0)
        byol.after_step(0.0)
        torch.testing.assert_close(byol.teacher_encoder.conv1.weight, before + 0.1)
        byol.after_step(1.0)  # momentum 1: it stands still
        torch.testing.assert_close(byol.teacher_encoder.conv1.weight, before + 0.1)

    def test_refuses_a_momentum_beyond_one(self) -> None:
        with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\]"):
            make("byol", momentum=1.5)


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("barlow_twins", "redundancy"),
        *(("vicreg", f"{term}_weight") for term in ("invariance", "variance", "covariance")),
    ],
)
def test_terms_of_a_loss_cannot_be_rewarded(name: str, weight: str) -> None:
    with pytest.raises(ValueError, match=f"{weight} must not be negative; got -1"):
        make(name, **{weight: -1.0})


class TestBarlowTwins:
    def test_against_loops(self) -> None:
        first, second = embeddings()
        a, b = (
            [[(float(v) - float(c.mean())) / math.sqrt(float(c.var(correction=0)) + 1e-5) for v in c] for c in z.T]
            for z in (first, second)
        )
        correlation = [[sum(x * y for x, y in zip(p, q, strict=True)) / 6 for q in b] for p in a]
        invariance = sum((1 - correlation[i][i]) ** 2 for i in range(5))
        rest = sum(correlation[i][j] ** 2 for i in range(5) for j in range(5) if i != j)
        found = barlow_twins_loss(first, second, 0.3)
        assert float(found["loss"]) == pytest.approx(invariance + 0.3 * rest, rel=1e-10)
        assert float(found["redundancy"]) == pytest.approx(rest, rel=1e-10)

    @pytest.mark.parametrize("count", [1, 8])
    def test_collapse_and_one_image(self, count: int) -> None:
        z = torch.full((count, 5), 2.0, requires_grad=True)
        loss = barlow_twins_loss(z, z, 0.1)["loss"]
        loss.backward()
        assert loss.item() == 5.0 and z.grad is not None and not z.grad.any()

    def test_independent_of_scale_and_shift(self) -> None:
        first, second = embeddings(count=50)
        one = barlow_twins_loss(first, second, 0.1)["loss"]
        torch.testing.assert_close(barlow_twins_loss(100 * first + 3, second - 8, 0.1)["loss"], one, rtol=1e-3, atol=0)


class TestVICReg:
    def test_against_loops(self) -> None:
        first, second = embeddings()
        total = 25 * sum(dot(x - y, x - y) for x, y in zip(first, second, strict=True)) / 30
        for z in (first, second):
            centred = [[float(v) - float(c.mean()) for v in c] for c in z.T]
            cov = [[sum(x * y for x, y in zip(p, q, strict=True)) / 5 for q in centred] for p in centred]
            total += 25 / 2 * sum(max(0.0, 1 - math.sqrt(cov[d][d] + 1e-4)) for d in range(5)) / 5
            total += sum(cov[i][j] ** 2 for i in range(5) for j in range(5) if i != j) / 5
        assert float(vicreg_loss(first, second, (25, 25, 1))["loss"]) == pytest.approx(total, rel=1e-12)

    def test_collapse_costs_the_variance_term(self) -> None:
        same = torch.ones(8, 5, dtype=torch.float64)
        found = vicreg_loss(same, same, (25, 25, 1))
        assert float(found["variance"]) == pytest.approx(0.99) and float(found["covariance"]) == 0.0
        assert float(found["loss"]) == pytest.approx(25 * 0.99)

    def test_one_image_has_the_invariance_only(self) -> None:
        found = vicreg_loss(torch.zeros(1, 5), torch.ones(1, 5), (25, 25, 1))
        assert found["loss"] == 25 and found["variance"] == found["covariance"] == 0


class TestSwAV:
    def test_against_loops(self) -> None:
        first, second = embeddings()
        q_first, q_second = (x.softmax(dim=1) for x in embeddings(seed=1))
        total = 0.0
        for scores, q in ((first, q_second), (second, q_first)):
            for row, weights in zip(scores, q, strict=True):
                normaliser = math.log(sum(math.exp(float(s) / 0.2) for s in row))
                total -= (
                    sum(float(w) * (float(s) / 0.2 - normaliser) for s, w in zip(row, weights, strict=True)) / 6 / 2
                )
        assert float(swapped_loss(first, second, q_first, q_second, 0.2)) == pytest.approx(total, rel=1e-12)

    def test_the_assignment_is_balanced(self) -> None:
        swav = make("swav", num_prototypes=4, num_iters=50)
        assignment = swav.assignment(torch.rand(32, 4, generator=torch.Generator().manual_seed(0)))
        torch.testing.assert_close(assignment.sum(dim=1), torch.ones(32), rtol=0, atol=1e-4)
        torch.testing.assert_close(assignment.sum(dim=0), torch.full((4,), 8.0), rtol=0, atol=1e-2)

    def test_collapsed_embeddings_keep_all_prototypes_in_play(self) -> None:
        """Where all images look the same, the balanced assignment is uniform: the loss cannot fall below log K."""
        swav = make("swav", num_prototypes=4)
        scores = torch.tensor([[0.9, 0.1, 0.0, -0.3]]).expand(16, 4)
        assignment = swav.assignment(scores)
        assert float(swapped_loss(scores, scores, assignment, assignment, 0.1)) >= math.log(4)


class TestDenseCL:
    def test_info_nce_against_loops(self) -> None:
        query, key = (z / z.norm(dim=1, keepdim=True) for z in embeddings())
        negatives = torch.nn.functional.normalize(embeddings(count=9, seed=3)[0], dim=1)
        total = 0.0
        for q, k in zip(query, key, strict=True):
            positive = math.exp(dot(q, k) / 0.2)
            total -= math.log(positive / (positive + sum(math.exp(dot(q, n) / 0.2) for n in negatives)))
        assert float(info_nce(query, key, negatives, 0.2)) == pytest.approx(total / 6, rel=1e-12)

    def test_correspondence_finds_moved_positions(self) -> None:
        generator = torch.Generator().manual_seed(0)
        dense = torch.randn(3, 8, 10, generator=generator)
        orders = torch.stack([torch.randperm(10, generator=generator) for _ in range(3)])
        moved = dense.gather(2, orders[:, None].expand(-1, 8, -1)) * 3  # position s of moved is orders[s] of dense
        assert torch.equal(correspondence(moved, dense), orders)

    def test_the_queue_replaces_its_oldest_keys(self) -> None:
        densecl = make("densecl", queue_size=5)
        keys = [torch.full((2, 128), float(value)) for value in (1, 2, 3)]
        for key in keys:
            densecl._enqueue(key, -key)
        assert densecl.whole_queue[:, 0].tolist() == [3, 1, 2, 2, 3] and int(densecl.position) == 1
        assert densecl.dense_queue[:, 0].tolist() == [-3, -1, -2, -2, -3]
        densecl._enqueue(torch.arange(7.0)[:, None].expand(7, 128), -keys[0].expand(2, 128)[:1].expand(7, 128))
        assert sorted(densecl.whole_queue[:, 0].tolist()) == [2, 3, 4, 5, 6]

    def test_evaluation_leaves_the_queue(self) -> None:
        densecl = make("densecl").eval()
        before = densecl.whole_queue.clone()
        densecl(torch.rand(4, 1, 16, 16), torch.rand(4, 1, 16, 16))
        assert torch.equal(densecl.whole_queue, before)

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match="queue_size be at least 1"):
            make("densecl", queue_size=0)


@pytest.mark.parametrize("name", SELF_SUPERVISED)
class TestEveryMethod:
    def test_gradient_reaches_the_encoder_and_no_teacher(self, name: str) -> None:
        method = make(name).train()
        first, second = torch.rand(2, 8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        losses = method(first, second)
        losses["loss"].backward()
        assert all(value.ndim == 0 and torch.isfinite(value) for value in losses.values())
        for key, parameter in method.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
            else:
                assert parameter.grad is None, key
        assert method.encoder.conv1.weight.grad.abs().sum() > 0
        teachers = [key for key, p in method.named_parameters() if not p.requires_grad]
        assert bool(teachers) == (name in ("byol", "densecl"))

    def test_one_image_is_finite(self, name: str) -> None:
        method = make(name).train()
        view = torch.rand(1, 1, 16, 16)
        method(view, view)["loss"].backward()
        gradients = [p.grad for p in method.parameters() if p.grad is not None]
        assert all(torch.isfinite(gradient).all() for gradient in gradients)

    def test_black_images_are_finite(self, name: str) -> None:
        """The whole batch looks the same: a collapse that no loss may turn into NaN."""
        method = make(name).train()
        losses = method(torch.zeros(6, 1, 16, 16), torch.zeros(6, 1, 16, 16))
        losses["loss"].backward()
        assert all(torch.isfinite(value) for value in losses.values())
        assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)

    def test_presets_differ_in_the_methods_own_fields_only(self, name: str) -> None:
        baseline = importlib.import_module(f"protokernels.baselines.{name}").BASELINE
        shared = importlib.import_module("protokernels.baselines.random_init").RandomInitConfig
        common = {
            "image_size",
            "stem",
            "width",
            "last_stride",
            "crop_scale",
            "optimizer",
            "learning_rate",
            "weight_decay",
        }
        for preset in ("paper", "fair"):
            ours, theirs = (kind.preset(preset, "chest_nih") for kind in (baseline.CONFIG, shared))
            assert {key: getattr(ours, key) for key in common} == {key: getattr(theirs, key) for key in common}

    def test_all_start_from_one_encoder(self, name: str) -> None:
        assert torch.equal(make(name).encoder.conv1.weight, make("random_init").encoder.conv1.weight)


class TestCommon:
    def test_spread(self) -> None:
        z = torch.randn(5000, 16, generator=torch.Generator().manual_seed(0))
        assert float(spread(z)) == pytest.approx(1.0, abs=0.02)
        assert float(spread(torch.ones(10, 16))) == pytest.approx(0.0, abs=1e-6)

    def test_losses_are_in_float32_under_autocast(self) -> None:
        seen = []

        @in_float32
        def loss(x: Tensor) -> Tensor:
            seen.append((x.dtype, (x @ x.T).dtype))
            return x.sum()

        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss(torch.ones(2, 2, dtype=torch.bfloat16))
            loss(torch.ones(2, 2, dtype=torch.float64))
        assert seen == [(torch.float32, torch.float32), (torch.float64, torch.float64)]

    def test_heads_take_one_image(self) -> None:
        head = mlp_head(3, 4, 5).train()
        assert torch.isfinite(head(torch.randn(1, 3))).all()
        norm, x = head[1], torch.randn(4, 4)
        torch.testing.assert_close(norm(x), (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt())
