# SPDX-License-Identifier: MIT
"""The module `protokernels.nn.Prototypes`: start, training, evaluation, state, and two processes against one."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from protokernels import prototype_step, soft_assign
from protokernels.nn import LinearTemperature, Prototypes
from python_tests import forks
from python_tests.distributed import prototypes_worker as worker
from python_tests.places import PLACES, Place, default_dtype
from python_tests.prototypes_oracle import draw, oracle

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a C++ compiler"
)


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


def started(place: Place, K: int, D: int, **options: Any) -> Prototypes:
    """A module whose prototypes are known, in training mode."""
    module = Prototypes(K, D, **options).to(place.device)
    module.load_state_dict({**module.state_dict(), "prototypes": draw(1, K, D)[1], "initialized": torch.tensor(True)})
    return module.train()


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


class TestInitialisation:
    def test_the_first_batch_gives_distinct_rows(self, place: Place) -> None:
        z = draw(40, 8, 5)[0].to(place.device)
        module = Prototypes(8, 5, new_weight=0.0, generator=place.seeded(1)).to(place.device)
        assert not module.initialized and not module.prototypes.any()
        module(z)
        rows = [(z == q).all(dim=1).nonzero().item() for q in module.prototypes]
        assert len(set(rows)) == 8 and bool(module.initialized)
        chosen = module.prototypes.clone()
        module(draw(40, 8, 5, seed=2)[0].to(place.device))
        assert torch.equal(module.prototypes, chosen)  # once only; the weight of the new mean is 0

    def test_the_generator_decides(self, place: Place) -> None:
        z = draw(40, 8, 5)[0].to(place.device)
        starts = []
        for seed in (1, 1, 2):
            module = Prototypes(8, 5, generator=torch.Generator().manual_seed(seed)).to(place.device)
            module.initialize(z)
            starts.append(module.prototypes)
        assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])

    def test_as_many_rows_as_prototypes_are_enough_and_fewer_are_not(self) -> None:
        z = torch.randn(4, 5)
        module = Prototypes(4, 5, new_weight=0.0).train()
        module(z)
        assert torch.equal(module.prototypes.sort(dim=0).values, z.sort(dim=0).values)
        with pytest.raises(
            ValueError, match=r"at least num_prototypes = 5 rows to start from; got 4; use a larger batch"
        ):
            Prototypes(5, 5)(z)

    def test_rows_that_are_not_finite_are_not_drawn(self, place: Place) -> None:
        z = draw(8, 4, 5)[0].to(place.device)
        z[2, 1], z[5, 0] = math.nan, math.inf
        for seed in range(10):
            module = Prototypes(6, 5, skip_nonfinite=True, generator=place.seeded(seed)).to(place.device)
            module.initialize(z)
            assert module.prototypes.isfinite().all()
        with pytest.raises(ValueError, match="num_prototypes = 7 rows to start from; got 6 without NaN and infinity"):
            Prototypes(7, 5, skip_nonfinite=True).to(place.device).initialize(z)

    def test_arrays_are_named(self) -> None:
        fresh, started_one = Prototypes(2, 3), Prototypes(2, 3)
        started_one(torch.rand(4, 3))
        asleep = Prototypes(2, 3)
        asleep(torch.rand(4, 3))
        for work in (fresh, fresh.initialize, started_one, started_one.assign, asleep.eval()):
            with pytest.raises(
                TypeError, match=r"z must be a torch.Tensor of shape .*; got a numpy.ndarray \[4, 3\]; pass torch"
            ):
                work(torch.rand(4, 3).numpy())  # type: ignore[arg-type]

    def test_wrong_input_is_named(self) -> None:
        module = Prototypes(4, 5)
        with pytest.raises(ValueError, match=r"z must have shape \[B, 5\]; got \[8, 3\]"):
            module(torch.randn(8, 3))
        with pytest.raises(ValueError, match="hold NaN or infinity; check the encoder"):
            module(torch.full((8, 5), math.nan))
        assert not module.initialized
        for use in (module.eval(), module.assign):
            with pytest.raises(RuntimeError, match="not initialised yet; run one batch in training mode"):
                use(torch.randn(8, 5))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_prototypes": 0}, "num_prototypes and dim must be at least 1; got 0 and 5"),
            ({"dim": 0}, "got 4 and 0"),
            ({"similarity": "l2"}, "similarity must be 'cosine' or 'dot'; got 'l2'"),
            ({"similarity": np.zeros(2)}, "similarity must be 'cosine' or 'dot'; got array"),
            ({"new_weight": 1.01}, r"new_weight must lie in \[0, 1\]; got 1.01"),
            ({"temperature": 0.0}, "temperature must be positive and finite, or a schedule; got 0.0"),
            ({"temperature": math.inf}, "got inf"),
            ({"revive_after": 0}, "revive_after must be at least 1 or None; got 0"),
        ],
    )
    def test_wrong_options_are_named(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=f"^Prototypes: .*{message}"):
            Prototypes(**{"num_prototypes": 4, "dim": 5, **options})


class TestTemperature:
    def test_linear_schedule(self) -> None:
        schedule = LinearTemperature(start=1.0, end=0.01, until=0.5)
        for progress, expected in ((-1.0, 1.0), (0.0, 1.0), (0.25, 0.505), (0.5, 0.01), (1.0, 0.01)):
            assert schedule(progress) == pytest.approx(expected, rel=1e-12)
        for wrong in (
            {"start": 0.0},
            {"end": -1.0},
            {"until": 0.0},
            {"until": 1.5},
            {"start": math.inf},
            {"end": math.inf},
        ):
            with pytest.raises(
                ValueError, match="LinearTemperature: start and end must be positive and finite, until in"
            ):
                LinearTemperature(**wrong)

    def test_progress_moves_the_temperature(self, place: Place) -> None:
        z = draw(40, 8, 5)[0].to(place.device)
        module = started(place, 8, 5, temperature=LinearTemperature(2.0, 0.1), new_weight=0.0)
        for progress, temperature in ((0.0, 2.0), (0.25, 1.05), (0.9, 0.1)):
            module.progress = progress
            assert module.temperature == pytest.approx(temperature)
            oracle(z, module.prototypes, module.temperature, "cosine").check_assignment(module(z))

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("schedule", [LinearTemperature(), lambda progress: 0.1 + 0.5**progress])
    def test_a_schedule_is_compiled_twice_at_most(self, place: Place, training: bool, schedule: Any) -> None:
        torch.compiler.reset()
        module = started(place, 8, 5, temperature=schedule).train(training)
        other = copy.deepcopy(module)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(module, fullgraph=True, backend=counter)
        for i in range(20):
            module.progress = other.progress = i / 20
            gradients = []
            for run in (compiled, other):
                z = draw(33, 8, 5, seed=i)[0].to(place.device).requires_grad_()
                c = run(z)
                gradients.append([c, *torch.autograd.grad(c.square().sum(), z)])
            for a, b in zip(*gradients, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert counter.frame_count <= 2


class TestTraining:
    @pytest.mark.parametrize("similarity", ["cosine", "dot"])
    def test_a_step_is_prototype_step(self, place: Place, similarity: Any) -> None:
        z = draw(129, 8, 5)[0].to(place.device)
        module = started(place, 8, 5, temperature=0.2, new_weight=0.7, similarity=similarity)
        expected = prototype_step(z, module.prototypes, temperature=0.2, new_weight=0.7, similarity=similarity)
        c = module(z)
        assert torch.equal(c, expected.assignment) and torch.equal(module.prototypes, expected.prototypes)
        assert torch.equal(module.last_counts, expected.counts)
        again = prototype_step(z, expected.prototypes, temperature=0.2, new_weight=0.7, similarity=similarity)
        assert torch.equal(module.assign(z), again.labels)

    def test_the_gradient_is_that_of_the_old_prototypes(self, place: Place) -> None:
        x = draw(129, 8, 7)[0].to(place.device)
        encoder = nn.Linear(7, 5).to(place.device)
        module = started(place, 8, 5, temperature=0.2, new_weight=0.9)
        old = module.prototypes.clone()
        expected = torch.autograd.grad(soft_assign(encoder(x), old, temperature=0.2).square().sum(), encoder.weight)[0]
        optimiser = torch.optim.SGD(encoder.parameters(), lr=0.1)
        before = encoder.weight.detach().clone()
        loss = module(encoder(x)).square().sum()
        assert not torch.equal(module.prototypes, old)
        loss.backward()
        assert encoder.weight.grad is not None and torch.equal(encoder.weight.grad, expected)
        optimiser.step()
        torch.testing.assert_close(encoder.weight.detach(), before - 0.1 * expected, rtol=1e-6, atol=1e-7)
        assert not list(module.parameters()) and not module.prototypes.requires_grad

    @pytest.mark.parametrize("compiler", ["aot_eager_decomp_partition", pytest.param("inductor", marks=needs_compiler)])
    def test_compiled_training_is_eager_training(self, place: Place, compiler: str) -> None:
        torch.compiler.reset()
        modules = [started(place, 8, 5, temperature=0.2) for _ in range(2)]
        compiled = torch.compile(modules[1], fullgraph=True, backend=compiler)
        for seed in range(3):
            gradients = []
            for run in (modules[0], compiled):
                z = draw(129, 8, 5, seed=seed)[0].to(place.device).requires_grad_()
                c = run(z)
                gradients.append(torch.autograd.grad((c[:, 0] + c.square().sum(1)).sum(), z)[0])
            torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)
            for name, value in modules[0].state_dict().items():
                torch.testing.assert_close(modules[1].state_dict()[name], value, rtol=1e-6, atol=1e-6)

    def test_two_passes_before_one_backward(self, place: Place) -> None:
        z = draw(129, 8, 5)[0].to(place.device).requires_grad_()
        module = started(place, 8, 5, temperature=0.2)
        (module(z).square().sum() + module(2 * z).square().sum()).backward()
        assert z.grad is not None and z.grad.isfinite().all()

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_a_checkpoint_may_not_compute_it_again(self, place: Place, reentrant: bool) -> None:
        z = draw(129, 8, 5)[0].to(place.device).requires_grad_()
        module = started(place, 8, 5, temperature=0.2)
        moved = copy.deepcopy(module)
        moved(z.detach())
        c = checkpoint(module, z, use_reentrant=reentrant)
        with pytest.raises(RuntimeError, match=r"Prototypes: .* within a backward pass, .* leave this module out of"):
            c.square().sum().backward()
        assert torch.equal(module.prototypes, moved.prototypes)  # moved once
        module.eval(), moved.eval()
        expected = torch.autograd.grad(moved(z).square().sum(), z)[0]
        z.grad = None
        checkpoint(module, z, use_reentrant=reentrant).square().sum().backward()
        assert z.grad is not None and torch.equal(z.grad, expected)

    def test_a_torch_that_tells_of_no_backward_pass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("protokernels.nn.prototypes._backward_pass", None)
        z = torch.randn(9, 3, requires_grad=True)
        Prototypes(2, 3)(z).square().sum().backward()
        assert z.grad is not None

    def test_evaluation_changes_nothing(self, place: Place) -> None:
        z = draw(129, 8, 5)[0].to(place.device)
        module = started(place, 8, 5, temperature=0.2, revive_after=1, sample=True).eval()
        before = state(module)
        c = module(z)
        module.assign(z)
        for name, value in module.state_dict().items():
            assert torch.equal(value, before[name]), name
        oracle(z, module.prototypes, 0.2, "cosine").check_assignment(c)
        torch.compiler.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(z), c, rtol=1e-6, atol=1e-7)

    def test_sampled_labels(self, place: Place) -> None:
        z = draw(300, 8, 5)[0].to(place.device)
        modules = [started(place, 8, 5, temperature=1.0, sample=True, generator=place.seeded(s)) for s in (3, 3, 4)]
        old = modules[0].prototypes.clone()
        for module in modules:
            module(z)
        expected = prototype_step(z, old, temperature=1.0, new_weight=0.95, sample=True, generator=place.seeded(3))
        assert torch.equal(modules[0].prototypes, expected.prototypes)
        assert torch.equal(modules[1].prototypes, expected.prototypes)
        assert not torch.equal(modules[2].prototypes, expected.prototypes)

    def test_sampled_labels_under_another_default_type(self, place: Place) -> None:
        z = draw(300, 8, 5)[0].to(place.device)
        moved = []
        for dtype in (torch.float32, torch.float64):
            module = started(place, 8, 5, temperature=1.0, sample=True, generator=place.seeded(3))
            with default_dtype(dtype):
                module(z)
            moved.append(module.prototypes)
        assert torch.equal(*moved) and moved[1].dtype == torch.float32

    def test_rows_that_are_not_finite(self, place: Place) -> None:
        z = draw(129, 8, 5)[0].to(place.device)
        z[7, 2] = math.nan
        skipping, plain = (started(place, 8, 5, skip_nonfinite=skip) for skip in (True, False))
        skipping(z), plain(z)
        assert skipping.prototypes.isfinite().all() and int(skipping.last_counts.sum()) == 128
        assert plain.prototypes.isnan().any(dim=1).sum() == 1

    def test_revival_after_so_many_empty_updates(self, place: Place) -> None:
        module = Prototypes(4, 4, similarity="dot", new_weight=1.0, revive_after=3, generator=place.seeded(1))
        module = module.to(place.device)
        module.load_state_dict({**module.state_dict(), "prototypes": torch.eye(4), "initialized": torch.tensor(True)})
        only_first = torch.tensor([[5.0, 0, 0, 0], [6.0, 0, 0, 0], [7.0, 0, 0, 0]], device=place.device)
        both = torch.cat([only_first, torch.tensor([[0, 9.0, 0, 0]], device=place.device)])
        for z, empty in ((only_first, [0, 1, 1, 1]), (both, [0, 0, 2, 2])):
            module(z)
            assert module.empty_updates.tolist() == empty
            assert torch.equal(module.prototypes[2:], torch.eye(4, device=place.device)[2:])
        module(only_first)
        assert module.empty_updates.tolist() == [0, 1, 0, 0]
        rows = [(only_first == q).all(dim=1).nonzero().flatten().tolist() for q in module.prototypes[2:]]
        assert len(rows[0]) == len(rows[1]) == 1 and rows[0] != rows[1]
        assert module.prototypes[1].tolist() == [0, 9, 0, 0]  # one empty update is not three

    def test_autocast(self, place: Place) -> None:
        x = draw(129, 8, 7)[0].to(place.device)
        encoder = nn.Linear(7, 5).to(place.device)
        module = started(place, 8, 5, temperature=0.2)
        old = module.prototypes.clone()
        with torch.autocast(place.device, torch.bfloat16):
            z = encoder(x)
            c = module(z)
        assert z.dtype == torch.bfloat16 and c.dtype == module.prototypes.dtype == torch.float32
        oracle(z, old, 0.2, "cosine").check_assignment(c)
        c.square().sum().backward()
        assert encoder.weight.grad is not None and encoder.weight.grad.any() and encoder.weight.grad.isfinite().all()


def run_ranks(folder: Path, world_size: int) -> list[dict[str, Any]]:
    words = [(rank, world_size, folder / "store", folder / f"{rank}.pt") for rank in range(world_size)]
    forks.run_ranks(worker.__file__, folder, words)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


class TestProcesses:
    @pytest.fixture(scope="class")
    @staticmethod
    def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
        return run_ranks(tmp_path_factory.mktemp("ranks"), 2)

    @pytest.fixture(scope="class")
    @staticmethod
    def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
        return run_ranks(tmp_path_factory.mktemp("four_ranks"), 4)

    @pytest.mark.parametrize("number", ["ranks", "four_ranks"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_ranks_equal_one_with_the_whole_batch(
        self, request: pytest.FixtureRequest, number: str, dtype: torch.dtype
    ) -> None:
        module = worker.given_start(Prototypes(worker.K, worker.D, temperature=0.1, new_weight=0.9, dtype=dtype), dtype)
        whole = worker.train(module, worker.batches(dtype))
        parts = [rank[str(dtype)] for rank in request.getfixturevalue(number)]
        # The ranks' float64 sums are added in another order than one rank's; scores at temperature 0.1 carry that on.
        rounding = 2e-13 if dtype == torch.float64 else 2e-5
        for step in range(len(worker.BATCHES)):
            for part in parts:
                assert torch.equal(part["prototypes"][step], parts[0]["prototypes"][step])
                assert torch.equal(part["counts"][step], whole["counts"][step])
            torch.testing.assert_close(parts[0]["prototypes"][step], whole["prototypes"][step], rtol=0.0, atol=rounding)
            for name in ("assignments", "gradients"):
                together = torch.cat([part[name][step] for part in parts])
                torch.testing.assert_close(together, whole[name][step], rtol=0.0, atol=rounding)

    def test_every_rank_starts_from_the_rows_of_the_first(self, ranks: list[dict[str, Any]]) -> None:
        first, second = (rank["initial"] for rank in ranks)
        assert torch.equal(first, second)
        own = worker.batches(torch.float32)[0][:32]
        assert len({(own == q).all(dim=1).nonzero().item() for q in first}) == worker.K

    def test_every_rank_revives_the_same_prototypes_with_the_same_rows(self, ranks: list[dict[str, Any]]) -> None:
        for (prototypes, empty), (other, other_empty) in zip(*(rank["revival"] for rank in ranks), strict=True):
            assert torch.equal(prototypes, other) and torch.equal(empty, other_empty)
        (before, empty), (after, cleared) = ranks[0]["revival"]
        assert empty.tolist() == [0, 0, 0, 1, 1, 1] and not cleared.any()
        assert torch.equal(before[3:], torch.eye(worker.K)[3:])
        rows = 10 * torch.eye(worker.K)[:2]  # what rank 0 holds: two rows for three dead prototypes
        assert torch.equal(after[3:5].sort(dim=0).values, rows.sort(dim=0).values)
        assert torch.equal(after[5], before[5])
