# SPDX-License-Identifier: MIT
"""The CUDA kernels of `contrastive`, run on the CPU by the emulator and compared with sums over all pairs in float64.

Memory is watched, and several orders of threads must give the same bits: a missing barrier, a race, a read before a write
or an access out of bounds fails here without a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from protokernels.ops._contrastive_plan import crossing_plan

from .contrastive_pairs import FORMS, PRECISIONS, SOME, TYPES, Group, Problem, check_gradient
from .emulator.build import SEEDS, load, missing_tools

pytestmark = pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))


class TestForward:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("kind", TYPES)
    def test_several_groups(self, kind: str, form: str) -> None:
        emulator = load("contrastive")
        problem = Problem(SOME, C=20, form=form, kind=kind, before=3)
        results = []
        for seed in SEEDS:
            emulator.configure(seed=seed)
            results.append(problem.forward(emulator))
        problem.check_forward(results[0])
        for other in results[1:]:
            for name, value in other.items():
                np.testing.assert_array_equal(value, results[0][name], err_msg=name)

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("unit", [True, False])
    @pytest.mark.parametrize("C", [1, 16, 20, 130])
    def test_lengths_and_precisions(self, C: int, unit: bool, precision: str) -> None:
        emulator = load("contrastive")
        emulator.configure(seed=1)
        problem = Problem([Group([40, 33], 20)], C=C, unit=unit, precision=precision, form="in")
        problem.check_forward(problem.forward(emulator))

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("unit", [True, False])
    @pytest.mark.parametrize("C", [20, 70, 130])
    def test_where_a_block_has_little_shared_memory(self, C: int, unit: bool, precision: str) -> None:
        emulator = load("contrastive")
        emulator.configure(seed=1, architecture="sm_89")
        problem = Problem([Group([40, 33], 20)], C=C, unit=unit, precision=precision, form="in")
        out = problem.forward(emulator)
        gradient = problem.backward(emulator, problem.losses(emulator))
        emulator.configure()
        problem.check_forward(out)
        check_gradient(problem, gradient, problem, problem)

    @pytest.mark.parametrize("rows", [1, 2, 31, 33, 129])
    def test_odd_sizes(self, rows: int) -> None:
        emulator = load("contrastive")
        emulator.configure(seed=2)
        for groups in ([Group([rows])], [Group([rows // 2, rows - rows // 2], 70)]):
            problem = Problem(groups, form="paper" if rows % 2 else "negout")
            problem.check_forward(problem.forward(emulator))

    def test_two_sets(self) -> None:
        emulator = load("contrastive")
        rows, columns = (
            [Group([20, 3, 11], 4), Group([7], 60), Group([], 3)],
            [Group([5, 50, 2], 9), Group([40]), Group([], 80)],
        )
        for kind in TYPES:
            problem = Problem(rows, columns_of=columns, kind=kind, form="negout")
            problem.check_forward(problem.forward(emulator))

    @pytest.mark.parametrize("unit", [True, False])
    @pytest.mark.parametrize(
        ("rows", "C", "architecture"), [(300, 16, "sm_80"), (530, 65, "sm_80"), (300, 65, "sm_90")]
    )
    def test_columns_cut_into_shares(self, rows: int, C: int, architecture: str, unit: bool) -> None:
        emulator = load("contrastive")
        # shorter vectors: every block has a range of all work (test_ranges_of_several_tiles)
        if C > 64:
            assert emulator.forward_grid(rows, rows, 1, -(-C // 16) * 16)[1] == (1 if architecture == "sm_90" else 2)
        problem = Problem([Group([4, rows - 40], 36)], C=C, unit=unit, precision="high")
        results = []
        for seed in SEEDS[:3]:
            emulator.configure(seed=seed, architecture=architecture)
            results.append(problem.forward(emulator))
        emulator.configure()
        problem.check_forward(results[0])
        for other in results[1:]:
            for name, value in other.items():
                np.testing.assert_array_equal(value, results[0][name], err_msg=name)

    @pytest.mark.parametrize("kind", TYPES)
    def test_more_groups_than_threads(self, kind: str) -> None:
        emulator = load("contrastive")
        emulator.configure(seed=1)
        sizes = np.random.default_rng(0).integers(0, 4, (300, 3))
        problem = Problem([Group([a], b, ignored=c) for a, b, c in sizes.tolist()], kind=kind, C=5, form="in")
        problem.check_forward(problem.forward(emulator))

    def test_ranges_of_several_tiles(self) -> None:
        """More units than blocks: a block goes on with one tile, does some alone and begins another."""
        emulator = load("contrastive")
        small = [Group([a], b, ignored=c) for a, b, c in np.random.default_rng(0).integers(0, 4, (400, 3)).tolist()]
        problem = Problem([*small[:150], Group([40, 200], 300), *small[150:], Group([300], 3), Group([2], 300)], C=8)
        results = []
        for seed in SEEDS[:2]:
            emulator.configure(seed=seed)
            results.append((problem.forward(emulator), problem.backward(emulator, problem.losses(emulator))))
        emulator.configure()
        problem.check_forward(results[0][0])
        check_gradient(problem, results[0][1], problem, problem)
        for name, value in results[1][0].items():
            np.testing.assert_array_equal(value, results[0][0][name], err_msg=name)
        np.testing.assert_array_equal(results[1][1], results[0][1])

    @pytest.mark.parametrize("kind", TYPES)
    def test_without_groups_or_anchors(self, kind: str) -> None:
        emulator = load("contrastive")
        for groups in ([], [Group([], 70)], [Group([], 0, ignored=9)], [Group([1, 1, 1], 4)]):
            problem = Problem(groups, kind=kind, before=5)
            out = problem.forward(emulator)
            problem.check_forward(out)
            assert (out["losses"] == 0).all() and out["total"] == 0
        problem = Problem([], kind=kind)
        np.testing.assert_array_equal(problem.forward(emulator)["total"], 0)

    def test_without_weights_there_is_no_total(self) -> None:
        emulator = load("contrastive")
        for kind in TYPES:
            problem = Problem(SOME, kind=kind)
            out, weighted = problem.forward(emulator, weights=False), problem.forward(emulator)
            assert np.isnan(out["total"]).all()
            np.testing.assert_array_equal(out["losses"], weighted["losses"])

    @pytest.mark.parametrize("temperature", [0.0251, 0.02])
    def test_duplicates_and_opposites(self, temperature: float) -> None:
        """Scores of +-40 and +-50: the bound just holds, and just does not."""
        emulator = load("contrastive")
        for form in FORMS:
            problem = Problem([Group([6, 6], 60)], temperature=temperature, form=form)
            problem.rows[:] = problem.rows[0]
            problem.rows[6:12] *= -1
            problem.rows[3] = 0
            assert problem.bounded == (temperature > 0.025)
            problem.check_forward(problem.forward(emulator))

    def test_identical_vectors_have_closed_forms(self) -> None:
        emulator = load("contrastive")
        expected = {"supcon": np.log(29), "in": np.log(29), "paper": (np.log(20) - np.log(9)) / 9, "negout": np.log(20)}
        for form, loss in expected.items():
            problem = Problem([Group([10, 5], 15)], form=form)
            problem.rows[:] = problem.rows[0]
            np.testing.assert_allclose(problem.forward(emulator)["losses"][:10], loss, atol=2e-5)

    def test_one_positive_and_nothing_else_is_exactly_nothing(self) -> None:
        emulator = load("contrastive")
        for kind in TYPES:
            for form in FORMS:
                problem = Problem([Group([2]), Group([2, 1])], kind=kind, form=form, C=7)
                losses = problem.forward(emulator)["losses"]
                assert (losses[:2] == 0).all() and (losses[2:4] != 0).all() and losses[4] == 0
                gradient = problem.backward(emulator, problem.losses(emulator))
                assert (gradient[:2] == 0).all() and gradient[2:].any()

    def test_large_scores_need_the_maximum(self) -> None:
        emulator = load("contrastive")
        problem = Problem([Group([20, 20], 30)], C=24, unit=False, scale=30.0, form="supcon")
        assert np.abs(problem.pairs()[0]).max() > 1e5
        problem.check_forward(problem.forward(emulator))

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(("C", "kind"), [(1, "f32"), (20, "f32"), (70, "f32"), (130, "f32"), (7, "f64")])
    def test_scores_beyond_the_range_are_not_left_out(self, C: int, kind: str, form: str) -> None:
        """The scores of two opposite vectors are -infinity: as positives, and as the negatives of another problem."""
        emulator = load("contrastive")
        long = 1e20 if kind == "f32" else 1e160
        needs_negatives = form in ("paper", "negout")
        for precision in PRECISIONS if kind == "f32" else PRECISIONS[:1]:
            options: Any = {
                "C": C,
                "unit": False,
                "temperature": 1.0,
                "precision": precision,
                "kind": kind,
                "form": form,
            }
            problem = Problem([Group([3], 4), Group([2], 300)], **options)
            problem.rows[:], problem.grad_losses[:] = 0, 1
            problem.rows[7:9, 0] = long, -long
            out = problem.forward(emulator)
            assert (out["losses"][7:9] == np.inf).all() and np.isfinite(out["losses"][:7]).all()
            assert (out["losses"][9:] == 0).all() and out["total"] == np.inf
            gradient = problem.backward(emulator, problem.losses(emulator))
            assert (gradient[:7] == 0).all() and (gradient[9:] == 0).all()
            if form in ("supcon", "negout"):
                np.testing.assert_allclose(gradient[7:9, 0], [2 * long, -2 * long], rtol=1e-2)
            else:  # shares of nothing
                assert np.isnan(gradient[7:9, 0]).all()

            problem = Problem([Group([2], 1)], **options)
            problem.rows[:] = 0
            problem.rows[0, 0], problem.rows[2, 0] = long, -long
            expected = [-np.inf, 0, 0] if needs_negatives else [0, np.log(2), 0]
            np.testing.assert_allclose(problem.forward(emulator)["losses"], expected, atol=1e-6)
            gradient = problem.backward(emulator, problem.losses(emulator))
            assert np.isnan(gradient[0, 0]) == needs_negatives

    def test_nan_stays_in_its_group(self) -> None:
        emulator = load("contrastive")
        for kind in TYPES:
            for unit in (True, False):
                problem = Problem([Group([9, 3]), Group([20, 20], 30)], kind=kind, unit=unit)
                clean = problem.forward(emulator)["losses"]
                problem.rows[2, 1] = np.nan
                losses = problem.forward(emulator)["losses"]
                assert np.isnan(losses[:12]).all()
                np.testing.assert_array_equal(losses[12:], clean[12:])


class TestCrossing:
    """One set of two views that do not meet themselves, as `cross_view_loss` has it."""

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("kind", TYPES)
    @pytest.mark.parametrize("count", [1, 33, 130])
    def test_rows_meet_the_other_view_only(self, count: int, kind: str, symmetric: bool) -> None:
        emulator = load("contrastive")
        plan = crossing_plan(count, symmetric, torch.device("cpu"))
        problem = Problem([Group([1] * count)] * 2, C=20, kind=kind)
        problem.group_table, problem.ranges = plan.groups.numpy(), plan.ranges.numpy()
        results = []
        for seed in SEEDS[:3]:
            emulator.configure(seed=seed)
            problem.check_forward(problem.forward(emulator))
            results.append(problem.backward(emulator, problem.losses(emulator)))
        check_gradient(problem, results[0], problem, problem)
        for other in results[1:]:
            np.testing.assert_array_equal(other, results[0])


class TestBackward:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("kind", TYPES)
    def test_several_groups(self, kind: str, form: str) -> None:
        emulator = load("contrastive")
        problem = Problem(SOME, C=20, form=form, kind=kind, before=3)
        results = []
        for seed in SEEDS:
            emulator.configure(seed=seed)
            results.append(problem.backward(emulator, problem.losses(emulator)))
        check_gradient(problem, results[0], problem, problem)
        for other in results[1:]:
            np.testing.assert_array_equal(other, results[0])

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("unit", [True, False])
    @pytest.mark.parametrize("C", [1, 16, 20, 130])
    def test_lengths_and_precisions(self, C: int, unit: bool, precision: str) -> None:
        emulator = load("contrastive")
        emulator.configure(seed=1)
        problem = Problem([Group([40, 33], 20)], C=C, unit=unit, precision=precision, form="supcon")
        check_gradient(problem, problem.backward(emulator, problem.losses(emulator)), problem, problem)

    @pytest.mark.parametrize("rows", [1, 2, 31, 33, 129])
    def test_odd_sizes(self, rows: int) -> None:
        emulator = load("contrastive")
        emulator.configure(seed=2)
        for groups in ([Group([rows])], [Group([rows // 2, rows - rows // 2], 70)]):
            problem = Problem(groups, form="paper" if rows % 2 else "in")
            check_gradient(problem, problem.backward(emulator, problem.losses(emulator)), problem, problem)

    @pytest.mark.parametrize(("kind", "unit"), [("f32", True), ("f32", False), ("f64", True)])
    def test_two_sets(self, kind: str, unit: bool) -> None:
        emulator = load("contrastive")
        emulator.configure(seed=3)
        rows = [Group([20, 3, 11], 4), Group([7], 60, ignored=2), Group([], 3)]
        columns = [Group([5, 50, 2], 9), Group([40], 1), Group([], 80)]
        problem = Problem(rows, C=33, columns_of=columns, kind=kind, unit=unit, form="in")
        other = problem.exchanged()
        out = problem.forward(emulator)
        problem.check_forward(out)
        own, others = problem.losses(emulator), other.losses(emulator)
        check_gradient(problem, problem.backward(emulator, own), problem, None)
        check_gradient(problem, problem.backward(emulator, None, others), None, other)
        check_gradient(problem, problem.backward(emulator, own, others), problem, other)
        check_gradient(problem, problem.backward(emulator, None), None, None)

    @pytest.mark.parametrize("unit", [True, False])
    @pytest.mark.parametrize(("rows", "C"), [(300, 16), (300, 20), (530, 65), (530, 257)])
    def test_columns_cut_into_shares(self, rows: int, C: int, unit: bool) -> None:
        emulator = load("contrastive")
        if C > 64:
            _, shares, slices = emulator.backward_grid(rows, rows, 1, -(-C // 16) * 16)
            assert shares == 2 and slices == (3 if C == 257 else 1)
        problem = Problem([Group([4, 56], rows - 60)], C=C, unit=unit, precision="high")
        results = []
        for seed in SEEDS[:2]:
            emulator.configure(seed=seed)
            results.append(problem.backward(emulator, problem.losses(emulator)))
        check_gradient(problem, results[0], problem, problem)
        for other in results[1:]:
            np.testing.assert_array_equal(other, results[0])

    @pytest.mark.parametrize("kind", TYPES)
    def test_more_groups_than_threads(self, kind: str) -> None:
        emulator = load("contrastive")
        emulator.configure(seed=1)
        sizes = np.random.default_rng(0).integers(0, 4, (300, 3))
        problem = Problem([Group([a], b, ignored=c) for a, b, c in sizes.tolist()], kind=kind, C=5, form="in")
        check_gradient(problem, problem.backward(emulator, problem.losses(emulator)), problem, problem)

    @pytest.mark.parametrize("kind", TYPES)
    def test_without_groups_or_anchors(self, kind: str) -> None:
        emulator = load("contrastive")
        for groups in ([], [Group([], 70)], [Group([], 0, ignored=9)], [Group([1, 1, 1], 4)]):
            for unit in (True, False):
                problem = Problem(groups, kind=kind, unit=unit, before=5, form="paper")
                assert (problem.backward(emulator, problem.losses(emulator)) == 0).all()

    @pytest.mark.parametrize("temperature", [0.0251, 0.02])
    def test_duplicates_and_opposites(self, temperature: float) -> None:
        emulator = load("contrastive")
        for form in FORMS:
            problem = Problem([Group([6, 6], 60)], temperature=temperature, form=form)
            problem.rows[:] = problem.rows[0]
            problem.rows[6:12] *= -1
            problem.rows[3] = 0
            problem.grad_losses *= 2.0**16  # a scaled loss
            check_gradient(problem, problem.backward(emulator, problem.losses(emulator)), problem, problem)

    def test_large_scores_need_the_maximum(self) -> None:
        emulator = load("contrastive")
        for form in FORMS:
            problem = Problem([Group([20, 20], 30)], C=24, unit=False, scale=3.0, form=form)
            assert np.abs(problem.pairs()[0]).max() > 1e3
            check_gradient(problem, problem.backward(emulator, problem.losses(emulator)), problem, problem)


class TestCoefficients:
    @pytest.mark.parametrize("kind", TYPES)
    @pytest.mark.parametrize("form", FORMS)
    def test_the_derivative_by_statistics(self, form: str, kind: str) -> None:
        """Central differences of the loss by p, n and l of its row."""
        emulator = load("contrastive")
        problem = Problem(SOME, kind=kind, form=form)
        statistics = problem.forward(emulator)["statistics"]
        p, n, linear = statistics.astype(np.float64)
        _, _, positive, _, _ = problem.pairs()
        count = np.maximum(positive.sum(1), 1)
        losses = {
            "supcon": lambda p, n, s: np.logaddexp(p, n) - s / count,
            "in": lambda p, n, s: np.logaddexp(p, n) - p,
            "paper": lambda p, n, s: (n - p) / count,
            "negout": lambda p, n, s: n - s / count,
        }[form]
        some = np.isfinite(p) & (np.isfinite(n) | ((form in ("supcon", "in")) & (count > 1)))
        expected = np.zeros((3, len(p)))
        with np.errstate(invalid="ignore"):
            for k in range(3):
                step = [1e-5 * (k == i) for i in range(3)]
                up = losses(p + step[0], n + step[1], linear + step[2])
                down = losses(p - step[0], n - step[1], linear - step[2])
                expected[k] = np.where(some, problem.grad_losses * (up - down) / 2e-5, 0)
        actual = problem.coefficients(emulator, statistics)
        assert (actual[:, ~some] == 0).all() and some.any()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)
