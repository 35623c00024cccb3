# SPDX-License-Identifier: MIT
"""The moving average of the op `prototypes`: labels, sampling, weights, empty clusters, revival."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import protokernels
from protokernels import prototype_step, update_prototypes, update_prototypes_
from protokernels.ops.prototypes import blend_prototypes, revive_prototypes
from python_tests.places import PLACES, Place, default_dtype, needs_native
from python_tests.prototypes_oracle import check_update, draw, expected_sums

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


class TestValue:
    @pytest.mark.parametrize(("B", "K", "D"), [(1, 1, 1), (2, 31, 33), (129, 2, 31), (300, 33, 129), (1000, 600, 3)])
    def test_means_and_blend(self, place: Place, B: int, K: int, D: int) -> None:
        z, q = (x.to(place.device) for x in draw(B, K, D, seed=B))
        labels = torch.randint(-1, K, (B,), generator=torch.Generator().manual_seed(B)).to(place.device)
        for new_weight in (0.0, 0.05, 0.95, 1.0):
            updated, counts = update_prototypes(q, z, labels, new_weight=new_weight)
            assert counts.dtype == torch.int64
            check_update(q, z, labels, new_weight, updated, counts)

    @pytest.mark.parametrize("z_dtype", DTYPES)
    @pytest.mark.parametrize("q_dtype", DTYPES)
    def test_every_pair_of_types(self, place: Place, z_dtype: torch.dtype, q_dtype: torch.dtype) -> None:
        z, q = draw(129, 11, 33)
        z, q = z.to(place.device, z_dtype), q.to(place.device, q_dtype)
        labels = torch.arange(129, device=place.device) % 10  # the last cluster stays empty
        updated, counts = update_prototypes(q, z, labels, new_weight=0.3)
        check_update(q, z, labels, 0.3, updated, counts)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
    def test_labels_of_every_integer_type(self, place: Place, dtype: torch.dtype) -> None:
        z, q = (x.to(place.device) for x in draw(33, 5, 7))
        labels = (torch.arange(33, device=place.device) % 5).to(dtype)
        updated, counts = update_prototypes(q, z, labels, new_weight=0.3)
        check_update(q, z, labels, 0.3, updated, counts)

    def test_weight_one_gives_class_means_and_weight_zero_changes_nothing(self, place: Place) -> None:
        z, q = (x.to(place.device) for x in draw(200, 7, 19))
        labels = torch.arange(200, device=place.device) % 7
        means = torch.stack([z[labels == k].double().mean(dim=0) for k in range(7)])
        updated, _ = update_prototypes(q, z, labels, new_weight=1.0)
        torch.testing.assert_close(updated, means.float(), rtol=2.0**-23, atol=1e-12)
        updated, _ = update_prototypes(q, z, labels, new_weight=0.0)
        assert torch.equal(updated, q)

    def test_an_empty_cluster_is_kept_bit_for_bit(self, place: Place) -> None:
        z, q = draw(50, 5, 3)
        q[4] = torch.tensor([-0.0, 1e-45, math.nan])
        q = q.to(place.device)
        updated, counts = update_prototypes(
            q, z.to(place.device), torch.full((50,), 2, device=place.device), new_weight=0.5
        )
        assert counts.tolist() == [0, 0, 50, 0, 0]
        kept = [0, 1, 3, 4]
        assert torch.equal(updated[kept].view(torch.int32), q[kept].view(torch.int32))

    def test_negative_labels_are_ignored(self, place: Place) -> None:
        z, q = (x.to(place.device) for x in draw(60, 5, 3))
        labels = torch.arange(60, device=place.device) % 5
        labels[20:] = torch.tensor([-1, -100, -(2**62), -5], device=place.device).repeat(10)
        expected = update_prototypes(q, z[:20], labels[:20], new_weight=0.5)
        z[20:] = math.nan
        updated, counts = update_prototypes(q, z, labels, new_weight=0.5)
        assert torch.equal(updated, expected.prototypes) and torch.equal(counts, expected.counts)

    def test_no_rows(self, place: Place) -> None:
        q = torch.randn(5, 3, device=place.device)
        empty = torch.empty(0, 3, device=place.device)
        updated, counts = update_prototypes(
            q, empty, torch.empty(0, dtype=torch.int64, device=place.device), new_weight=0.9
        )
        assert torch.equal(updated, q) and counts.tolist() == [0] * 5

    def test_probabilities_count_for_the_largest_and_ties_for_the_lowest(self, place: Place) -> None:
        z, q = (x.to(place.device) for x in draw(3, 4, 3))
        c = torch.tensor([[0.1, 0.4, 0.4, 0.1], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 1.0]], device=place.device)
        by_rows, counts = update_prototypes(q, z, c, new_weight=0.5)
        assert counts.tolist() == [1, 1, 0, 1]
        by_labels, _ = update_prototypes(q, z, torch.tensor([1, 0, 3], device=place.device), new_weight=0.5)
        assert torch.equal(by_rows, by_labels)

    def test_strides(self, place: Place) -> None:
        z, q = (x.to(place.device) for x in draw(60, 5, 7))
        labels = torch.arange(60, device=place.device) % 5
        expected, _ = update_prototypes(q, z, labels, new_weight=0.5)
        wide_labels = torch.stack([labels, labels - 100], dim=1)
        updated, _ = update_prototypes(q.T.contiguous().T, z.T.contiguous().T, wide_labels[:, 0], new_weight=0.5)
        assert torch.equal(updated, expected)
        one, counts = update_prototypes(q, z[:1].expand(60, 7), labels[:1].expand(60), new_weight=1.0)
        torch.testing.assert_close(one[0], z[0], rtol=2.0**-23, atol=0)
        assert counts.tolist() == [60, 0, 0, 0, 0]

    def test_in_place(self, place: Place) -> None:
        z, q = (x.to(place.device) for x in draw(60, 5, 7))
        labels = torch.arange(60, device=place.device) % 4
        expected, counts = update_prototypes(q, z, labels, new_weight=0.5)
        for target in (q.clone(), q.T.contiguous().T, torch.nn.Parameter(q.clone())):
            result = update_prototypes_(target, z, labels, new_weight=0.5)
            assert result.prototypes is target and torch.equal(result.counts, counts)
            assert torch.equal(target, expected)

    def test_in_place_of_shared_memory_is_refused(self, place: Place) -> None:
        q, z = torch.zeros(1, 7, device=place.device), torch.ones(2, 7, device=place.device)
        windows = torch.zeros(60, device=place.device)
        overlapping = (
            windows.as_strided((5, 7), (1, 1)),
            windows.as_strided((5, 7), (6, 1)),
            windows.as_strided((5, 7), (4, 6)),
        )
        for target in (q.expand(5, 7), q[:, :1].expand(1, 7), *overlapping):
            with pytest.raises(ValueError, match=r"update_prototypes_: .* pass prototypes.clone\(\)"):
                update_prototypes_(target, z, torch.zeros(2, dtype=torch.int64, device=place.device), new_weight=0.5)
        for strides in ((7, 1), (1, 5), (2, 13)):  # none of theirs lie in one place
            target = torch.zeros(100, device=place.device).as_strided((5, 7), strides)
            update_prototypes_(target, z, torch.zeros(2, dtype=torch.int64, device=place.device), new_weight=0.5)
        with pytest.raises(TypeError, match="prototypes must be"):
            update_prototypes_(None, z, z[:, 0].long(), new_weight=0.5)  # type: ignore[arg-type]

    def test_a_nan_row_spoils_its_cluster_only(self, place: Place) -> None:
        z, q = (x.to(place.device) for x in draw(60, 5, 7))
        labels = torch.arange(60, device=place.device) % 4
        clean, _ = update_prototypes(q, z, labels, new_weight=0.5)
        z[6, 3], z[6, 4] = math.nan, math.inf
        updated, counts = update_prototypes(q, z, labels, new_weight=0.5)
        assert counts.tolist() == [15, 15, 15, 15, 0]
        assert updated[2, 3].isnan() and updated[2, 4].isinf()
        assert torch.equal(updated[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_rows_that_are_not_finite_can_be_skipped(self, place: Place, bad: float) -> None:
        z, q = (x.to(place.device) for x in draw(70, 5, 19))
        keep = torch.ones(70, dtype=torch.bool, device=place.device)
        keep[[0, 33, 69]] = False
        expected = prototype_step(z[keep], q, temperature=0.1, new_weight=0.5)
        z[0, 18] = z[33, 0] = z[69, 7] = bad
        step = prototype_step(z, q, temperature=0.1, new_weight=0.5, skip_nonfinite=True)
        assert step.labels[~keep].tolist() == [-1, -1, -1]
        assert torch.equal(step.labels[keep], expected.labels) and torch.equal(step.counts, expected.counts)
        torch.testing.assert_close(step.prototypes, expected.prototypes, rtol=2.0**-22, atol=1e-12)
        given = torch.where(keep, step.labels, 1)
        alone, counts = update_prototypes(q, z, given, new_weight=0.5, skip_nonfinite=True)
        assert torch.equal(counts, expected.counts)
        torch.testing.assert_close(alone, expected.prototypes, rtol=2.0**-22, atol=1e-12)

    def test_sums_of_many_rows_keep_float64(self, place: Place) -> None:
        z = torch.full((40000, 3), 0.1, device=place.device)
        z[0] = 1e7
        step = prototype_step(z, torch.ones(1, 3, device=place.device), temperature=1.0, new_weight=1.0)
        exact = float(np.float32(1e7)) + 39999 * float(np.float32(0.1))
        assert step.sums[0, 0].item() == pytest.approx(exact, rel=1e-11)

    def test_two_halves_blend_like_the_whole(self, place: Place) -> None:
        z, q = (x.to(place.device) for x in draw(300, 7, 19))
        whole = prototype_step(z, q, temperature=0.1, new_weight=0.95)
        parts = [prototype_step(part, q, temperature=0.1, new_weight=0.95) for part in (z[:113], z[113:])]
        counts = parts[0].counts + parts[1].counts
        blended = blend_prototypes(q, parts[0].sums + parts[1].sums, counts, new_weight=0.95)
        assert torch.equal(counts, whole.counts)
        torch.testing.assert_close(blended, whole.prototypes, rtol=2.0**-22, atol=1e-12)
        sums, _ = expected_sums(z, whole.labels, 7)
        np.testing.assert_allclose(whole.sums.cpu().numpy(), sums, rtol=1e-12, atol=1e-11)


class TestSampling:
    PROBABILITIES = (0.4, 0.0, 0.05, 0.3, 0.25)

    def test_frequencies(self, place: Place) -> None:
        B = 40000
        c = torch.tensor([self.PROBABILITIES], device=place.device).expand(B, 5)
        z, q = torch.ones(B, 1, device=place.device), torch.zeros(5, 1, device=place.device)
        _, counts = update_prototypes(q, z, c, new_weight=0.5, sample=True, generator=place.seeded(11))
        self._check(counts, B)

    def test_frequencies_of_the_fused_step(self, place: Place) -> None:
        B, tau = 40000, 0.5
        logits = torch.tensor(self.PROBABILITIES, dtype=torch.float64).clamp(min=1e-30).log() * tau
        q = logits.float().unsqueeze(1).to(place.device)
        z = torch.ones(B, 1, device=place.device)
        step = prototype_step(
            z, q, temperature=tau, new_weight=0.5, similarity="dot", sample=True, generator=place.seeded(12)
        )
        assert torch.equal(step.counts, step.labels.bincount(minlength=5))
        self._check(step.counts, B)

    def _check(self, counts: torch.Tensor, B: int) -> None:
        """Chi-square with 3 degrees of freedom; 30.7 is exceeded by a right sampler once in a million seeds."""
        observed, expected = counts.double().cpu().numpy(), B * np.array(self.PROBABILITIES)
        assert observed[1] == 0 and observed.sum() == B
        possible = expected > 0
        assert ((observed - expected)[possible] ** 2 / expected[possible]).sum() < 30.7

    def test_rows_are_independent(self, place: Place) -> None:
        B = 4000
        step_labels = []
        for seed in (1, 2):
            z = torch.zeros(B, 3, device=place.device)  # uniform over two prototypes
            q, generator = torch.eye(2, 3, device=place.device), place.seeded(seed)
            step = prototype_step(z, q, temperature=1.0, new_weight=0.5, sample=True, generator=generator)
            step_labels.append(step.labels.cpu())
        a, b = step_labels
        agreement = (a == b).double().mean()  # 0.5 +- 5 standard deviations
        assert abs(float(agreement) - 0.5) < 5 * 0.5 / math.sqrt(B)
        neighbours = (a[1:] == a[:-1]).double().mean()
        assert abs(float(neighbours) - 0.5) < 5 * 0.5 / math.sqrt(B)

    @pytest.mark.parametrize("row", [[0.5, math.nan, 0.5], [1.0, -0.1, 0.1], [0.0, 0.0, 0.0], [math.inf, 0.0, 1.0]])
    def test_what_cannot_be_drawn_from_is_refused(self, place: Place, row: list[float]) -> None:
        if place.device != "cpu":
            pytest.skip("the values would have to be waited for")
        z, q = draw(4, 3, 2)
        c = torch.tensor([[0.2, 0.3, 0.5]]).repeat(4, 1)
        for dtype in DTYPES:
            update_prototypes(q, z, c.to(dtype), new_weight=0.5, sample=True)
        c[2] = torch.tensor(row)
        for update in (update_prototypes, update_prototypes_):
            with pytest.raises(ValueError, match=r"draws from probabilities that are finite, .*; row 2 is not"):
                update(q, z, c, new_weight=0.5, sample=True)
        update_prototypes(q, z, c, new_weight=0.5)  # the largest counts
        z[2, 0] = math.nan
        _, counts = update_prototypes(q, z, c, new_weight=0.5, sample=True, skip_nonfinite=True)
        assert counts.sum() == 3

    def test_nothing_is_looked_at_where_there_are_no_values(self, place: Place) -> None:
        z, q = (x.to(place.device) for x in draw(4, 3, 2))
        c = torch.full((4, 3), 1 / 3, device=place.device)
        torch.compiler.reset()
        compiled = torch.compile(
            lambda c: update_prototypes(q, z, c, new_weight=0.5, sample=True), fullgraph=True, backend="aot_eager"
        )
        assert compiled(c).counts.sum() == 4

    def test_the_generator_decides(self, place: Place) -> None:
        z, q = (x.to(place.device) for x in draw(500, 9, 5))
        arguments: dict[str, Any] = {"temperature": 1.0, "new_weight": 0.5, "sample": True}
        first = prototype_step(z, q, generator=place.seeded(3), **arguments)
        again = prototype_step(z, q, generator=place.seeded(3), **arguments)
        other = prototype_step(z, q, generator=place.seeded(4), **arguments)
        assert torch.equal(first.labels, again.labels) and torch.equal(first.prototypes, again.prototypes)
        assert not torch.equal(first.labels, other.labels)
        torch.manual_seed(5)
        by_global = prototype_step(z, q, **arguments)
        torch.manual_seed(5)
        assert torch.equal(prototype_step(z, q, **arguments).labels, by_global.labels)

    def test_a_cpu_generator_serves_any_device(self, place: Place) -> None:
        z, q = (x.to(place.device) for x in draw(500, 9, 5))
        labels = [
            prototype_step(
                z, q, temperature=1.0, new_weight=0.5, sample=True, generator=torch.Generator().manual_seed(7)
            ).labels
            for _ in range(2)
        ]
        assert torch.equal(*labels)

    def test_torchs_default_type_does_not_matter(self, place: Place) -> None:
        z, q = (x.to(place.device) for x in draw(500, 9, 5))
        results = []
        for dtype in (torch.float32, torch.float64):
            with default_dtype(dtype):
                step = prototype_step(
                    z, q, temperature=1.0, new_weight=0.5, sample=True, generator=place.seeded(3), return_entropy=True
                )
                alone = update_prototypes(q, z, step.assignment, new_weight=0.5, sample=True, generator=place.seeded(3))
            results.append([*step, *alone])
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)

    @needs_native
    @pytest.mark.parametrize("K", [3, 17, 40, 129])
    def test_a_cluster_of_probability_zero_is_never_drawn(self, K: int) -> None:
        # the smallest and the largest number torch.rand gives: rounding in the cumulative sum must not carry the draw
        # past the last possible cluster, nor a threshold of zero stop it before the first
        uniform = torch.tensor([0.0, 1 - 2.0**-24]).repeat(2048)
        z, q = (x.abs() for x in draw(4096, K, 8, seed=K))
        q[0], q[-1] = -100.0, -100.0
        c, labels, *_ = torch.ops.protokernels.prototypes_forward(
            z, q, None, 0.5, False, uniform, True, False, False, 0.0, False
        )
        assert not c[:, [0, -1]].any() and (c.gather(1, labels.unsqueeze(1)) > 0).all()


class TestRevival:
    def test_dead_prototypes_become_distinct_rows(self, place: Place) -> None:
        z, q = (x.to(place.device) for x in draw(40, 6, 3))
        revive = torch.tensor([True, True, True, False, True, True], device=place.device)
        labels = torch.arange(40, device=place.device) % 2  # clusters 2 to 5 are empty, 3 is not marked
        plain, _ = update_prototypes(q, z, labels, new_weight=0.5)
        updated, counts = update_prototypes(q, z, labels, new_weight=0.5, revive=revive, generator=place.seeded(1))
        assert counts.tolist() == [20, 20, 0, 0, 0, 0]
        assert torch.equal(updated[[0, 1, 3]], plain[[0, 1, 3]])
        rows = [(z == updated[k]).all(dim=1).nonzero().item() for k in (2, 4, 5)]
        assert len(set(rows)) == 3
        again, _ = update_prototypes(q, z, labels, new_weight=0.5, revive=revive, generator=place.seeded(1))
        other, _ = update_prototypes(q, z, labels, new_weight=0.5, revive=revive, generator=place.seeded(2))
        assert torch.equal(updated, again) and not torch.equal(updated, other)

    def test_more_dead_prototypes_than_rows(self, place: Place) -> None:
        z, q = (x.to(place.device) for x in draw(2, 5, 3))
        dead = torch.tensor([False, True, True, True, True], device=place.device)
        revived = revive_prototypes(q, z, dead)
        assert torch.equal(revived[[0, 3, 4]], q[[0, 3, 4]])
        assert torch.equal(revived[1:3].sort(dim=0).values, z.sort(dim=0).values)
        assert torch.equal(revive_prototypes(q, z[:0], dead), q)

    def test_a_row_that_is_not_finite_revives_nothing(self, place: Place) -> None:
        z, q = (x.to(place.device) for x in draw(4, 5, 3))
        z[0, 1], z[1, 0], z[3, 2] = math.nan, math.inf, -math.inf
        for seed in range(6):
            revived = revive_prototypes(
                q, z, torch.ones(5, dtype=torch.bool, device=place.device), generator=place.seeded(seed)
            )
            assert torch.equal(revived[0], z[2]) and torch.equal(revived[1:], q[1:])


class TestContract:
    @pytest.mark.parametrize(
        ("labels", "options", "error", "message"),
        [
            (
                [0, 1],
                {},
                TypeError,
                r"labels_or_assignments must be a tensor: integer labels \[4\] or probabilities \[4, 3\]",
            ),
            (torch.zeros(5, dtype=torch.int64), {}, ValueError, r"must be integer labels \[4\] or .*got int64 \[5\]"),
            (torch.zeros(4, 2), {}, ValueError, r"probabilities \[4, 3\]; got float32 \[4, 2\]"),
            (torch.zeros(4), {}, ValueError, r"probabilities \[4, 3\]; got float32 \[4\]"),
            (torch.zeros(4, dtype=torch.bool), {}, ValueError, r"got bool \[4\]"),
            (
                torch.zeros(4, dtype=torch.int64),
                {"sample": True},
                ValueError,
                r"needs probabilities \[4, 3\], got labels; pass",
            ),
            (
                torch.zeros(4, dtype=torch.int64),
                {"new_weight": -0.1},
                ValueError,
                r"new_weight must lie in \[0, 1\]; got -0.1",
            ),
            (
                torch.zeros(4, dtype=torch.int64),
                {"new_weight": True},
                TypeError,
                r"new_weight must be a number in \[0, 1\]; got bool",
            ),
            (
                torch.zeros(4, dtype=torch.int64),
                {"revive": torch.ones(3)},
                ValueError,
                r"revive must be a bool tensor of shape \[3\]; got float32",
            ),
            (
                torch.zeros(4, dtype=torch.int64),
                {"revive": [True] * 3},
                ValueError,
                r"revive must be a bool tensor of shape \[3\]; got list",
            ),
            (
                torch.zeros(4, dtype=torch.int64, device="meta"),
                {},
                ValueError,
                r"z is on cpu and labels_or_assignments on meta",
            ),
        ],
    )
    def test_wrong_arguments_are_named(
        self, labels: Any, options: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=f"^update_prototypes: .*{message}"):
            update_prototypes(torch.eye(3), torch.ones(4, 3), labels, **{"new_weight": 0.5, **options})

    @pytest.mark.parametrize("label", [3, 4, 2**40])
    def test_a_label_of_k_or_more_is_an_error(self, place: Place, label: int) -> None:
        if place.device == "cuda":
            pytest.skip("a device-side trap, as in torch's own indexing, ends the CUDA context of the whole test run")
        with pytest.raises(IndexError, match="label"):
            update_prototypes(torch.eye(3), torch.ones(4, 3), torch.tensor([0, label, 1, 2]), new_weight=0.5)

    def test_blend_names_what_does_not_fit(self) -> None:
        q, sums, counts = torch.eye(3), torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
        assert torch.equal(blend_prototypes(q, sums, counts, new_weight=0.5), q)
        with pytest.raises(ValueError, match=r"blend_prototypes: sums must be float64 of shape \[3, 3\]; got float32"):
            blend_prototypes(q, sums.float(), counts, new_weight=0.5)
        with pytest.raises(ValueError, match=r"blend_prototypes: counts must be int64 of shape \[3\]; got list"):
            blend_prototypes(q, sums, [1, 2, 0], new_weight=0.5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"blend_prototypes: counts must be int64 of shape \[3\]; got int64 \[2\]"):
            blend_prototypes(q, sums, counts[:2], new_weight=0.5)

    def test_inputs_are_left_as_they_were_and_carry_no_gradient(self, place: Place) -> None:
        z, q = (x.to(place.device) for x in draw(60, 5, 7))
        labels = torch.arange(60, device=place.device) % 4
        before = [x.clone() for x in (z, q, labels)]
        z.requires_grad_(), q.requires_grad_()
        result = update_prototypes(
            q, z, labels, new_weight=0.5, revive=torch.ones(5, dtype=torch.bool, device=place.device)
        )
        assert isinstance(result, protokernels.PrototypeUpdate) and not result.prototypes.requires_grad
        for x, copy in zip((z, q, labels), before, strict=True):
            assert torch.equal(x, copy)


class TestDeterminism:
    def test_twenty_repeats_and_any_number_of_threads_agree_to_the_bit(self, place: Place) -> None:
        threads = torch.get_num_threads()
        z, q = (x.to(place.device) for x in draw(20000, 33, 65))
        labels = torch.arange(20000, device=place.device) % 31
        try:
            results = []
            for repeat in range(20):
                torch.set_num_threads(1 + repeat % 2)
                results.append(update_prototypes(q, z, labels, new_weight=0.5).prototypes)
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(results[0], other) for other in results[1:])
