# SPDX-License-Identifier: MIT
"""OPTiML: cost, CV-SIM's readings, objective, gradients, presets, ablations, and whole runs on the embedded digits."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("accelerate", reason="OPTiML needs the extra protokernels[train]")

from protokernels.cli import main
from protokernels.figures.optiml import chosen_positions, partner_places
from protokernels.nn import RandomViews
from protokernels.nn.random_views import ViewParameters
from protokernels.papers import optiml
from protokernels.papers.optiml import ABLATIONS, CrossView, OPTiML, OPTiMLConfig
from protokernels.training import RunFolder

TINY = OPTiMLConfig.preset(
    "fair",
    data="digits",
    epochs=1,
    warmup_epochs=0,
    width=2,
    image_size=24,
    batch_size=400,
    expander_dim=20,
    num_heads=2,
    head_dim=5,
    num_iters=10,
)
WORDS = ["--epochs", "1", "--warmup-epochs", "0", "--width", "2", "--image-size", "24", "--expander-dim", "20"]
WORDS += ["--batch-size", "150", "--num-iters", "10", "--device", "cpu", "--quiet"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def views(count: int = 6, size: int = 24) -> tuple[Tensor, Tensor]:
    first, second = torch.rand(2, count, 1, size, size, generator=generator())
    return first, second


def model(config: OPTiMLConfig = TINY) -> OPTiML:
    torch.manual_seed(0)
    return OPTiML(config, channels=1)


class TestCost:
    def test_against_numpy(self) -> None:
        first, second = (torch.randn(2, count, 7, generator=generator(count)) for count in (5, 4))
        cost = optiml.position_cost(first, second, "cosine").numpy()
        for image in range(2):
            for i in range(5):
                for j in range(4):
                    x, y = first[image, i].numpy(), second[image, j].numpy()
                    expected = 1 - x @ y / (np.linalg.norm(x) * np.linalg.norm(y))
                    assert cost[image, i, j] == pytest.approx(expected, abs=1e-5)

    def test_positions_without_activation_have_cost_one(self) -> None:
        cost = optiml.position_cost(torch.zeros(1, 2, 3), torch.ones(1, 2, 3), "cosine")
        assert torch.equal(cost, torch.ones(1, 2, 2))

    def test_half_precision_and_autocast_compute_in_float32(self) -> None:
        first, second = torch.randn(2, 1, 4, 8, generator=generator()).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            cost = optiml.position_cost(first, second, "cosine")
        wide = optiml.position_cost(first.float(), second.float(), "cosine")
        assert cost.dtype == torch.float32 and torch.equal(cost, wide)

    def test_minus_the_cosine_has_the_same_plan_and_equation_1_another(self) -> None:
        first, second = views()
        solutions = {
            kind: model(replace(TINY, cost=kind, num_iters=200)).align(first, second).solution
            for kind in ("cosine", "neg_cos", "similarity")
        }
        usual, shifted, printed = solutions.values()
        torch.testing.assert_close(shifted.plan, usual.plan, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(shifted.transport_cost, usual.transport_cost - 1, rtol=1e-4, atol=1e-5)
        assert (printed.transport_cost > shifted.transport_cost).all()
        aligned = model(replace(TINY, cost="similarity")).align(first, second)
        torch.testing.assert_close(aligned.cost, 1 - model().align(first, second).cost)

    def test_an_expander_may_end_with_normalisation(self) -> None:
        q = model(replace(TINY, expander_norm=True)).align(*views(64)).q_first
        torch.testing.assert_close(q.std(dim=0, unbiased=False), torch.ones(20), rtol=1e-3, atol=0)


class TestCrossView:
    def make(self, reading: str) -> tuple[CrossView, Tensor, Tensor]:
        torch.manual_seed(1)
        module = CrossView(reading, dim=6, positions=9, num_heads=3, head_dim=4).double()
        shape = (5, 9, 6) if reading == "dense" else (5, 6)
        own, other = torch.randn(2, *shape, dtype=torch.float64)
        return module, own, other

    @pytest.mark.parametrize("reading", ["heads", "batch", "dense"])
    def test_against_loops(self, reading: str) -> None:
        """softmax(Q K^T / sqrt(d)) V, token by token."""
        module, own, other = self.make(reading)
        Q, K, V = own @ module.query.weight.T, other @ module.key.weight.T, other @ module.value.weight.T

        def attend(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
            weights = torch.stack([query @ key / math.sqrt(4) for key in keys]).exp()
            return sum((w * v for w, v in zip(weights, values, strict=True)), torch.zeros(4).double()) / weights.sum()

        expected = []
        for image in range(5):
            heads = [slice(4 * h, 4 * h + 4) for h in range(3)]
            if reading == "heads":
                keys, values = ([x[image, h] for h in heads] for x in (K, V))
                refined = torch.cat([attend(Q[image, h], keys, values) for h in heads])
                expected.append(module.logits(refined))
            elif reading == "batch":
                refined = torch.cat([attend(Q[image, h], list(K[:, h]), list(V[:, h])) for h in heads])
                expected.append(module.logits(refined))
            else:
                rows = [
                    torch.cat([attend(Q[image, n, h], list(K[image, :, h]), list(V[image, :, h])) for h in heads])
                    for n in range(9)
                ]
                expected.append(torch.cat([module.logits(row) for row in rows]))
        torch.testing.assert_close(module(own, other), torch.stack(expected).float(), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(("reading", "alone"), [("heads", True), ("batch", False), ("dense", True)])
    def test_only_one_reading_depends_on_the_rest_of_the_batch(self, reading: str, alone: bool) -> None:
        module, own, other = self.make(reading)
        whole, part = module(own, other)[:2], module(own[:2], other[:2])
        assert torch.allclose(whole, part, atol=1e-6) == alone


class TestObjective:
    def test_weights_by_hand(self) -> None:
        q_s, q_t = torch.tensor([[0.5, 0.5], [-0.5, -0.5]]), torch.tensor([[2.0, -2.0], [-2.0, 2.0]])
        config = replace(TINY, alpha=2.0, beta=3.0, eta=0.5)
        # Var = Cov = 0.5 in q_s: 1 - sqrt(0.5001), 2 * 0.5^2 / 2; Var = -Cov = 8 in q_t: 0 and 2 * 8^2 / 2
        variance, covariance = 1 - math.sqrt(0.5001), 0.25 + 64
        losses = optiml.objective(torch.tensor(0.7), q_s, q_t, config)
        assert losses["loss"] == pytest.approx(2 * 0.7 + 3 * variance + 0.5 * covariance, rel=1e-5)
        halved = optiml.objective(torch.tensor(0.7), q_s, q_t, replace(config, halve_variance=True))
        assert halved["loss"] == pytest.approx(2 * 0.7 + 3 * variance / 2 + 0.5 * covariance, rel=1e-5)
        assert halved["variance"] == pytest.approx(variance / 2, rel=1e-5)

    def test_mse_is_vicregs_distance(self) -> None:
        network, (first, second) = model(replace(TINY, alignment="mse")), views()
        with torch.no_grad():
            q_s, q_t = network.embed(first)[1], network.embed(second)[1]
        assert network(first, second)["alignment"].detach() == pytest.approx(
            float((q_s - q_t).square().mean()), rel=1e-4
        )


class TestModel:
    @pytest.mark.parametrize("side", [24, 32, 20])
    def test_masses_and_plan(self, side: int) -> None:
        network = model(replace(TINY, image_size=side, num_iters=200)).eval()
        aligned = network.align(*views(3, side))
        positions = network.side**2
        assert aligned.cost.shape == (3, positions, positions)
        for mass in (aligned.a, aligned.b):
            torch.testing.assert_close(mass.sum(dim=1), torch.ones(3))
        plan = aligned.solution.plan
        torch.testing.assert_close(plan.sum(dim=1), aligned.b, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(plan.sum(dim=2), aligned.a, rtol=1e-2, atol=1e-4)
        assert aligned.cost.min() >= -1e-6 and aligned.cost.max() <= 2

    def test_masses_of_a_diverged_model_say_so(self) -> None:
        diverged = model()
        diverged.encoder.conv1.weight.data.fill_(math.nan)
        with pytest.raises(
            ValueError, match="masses of the positions are not finite; the model has diverged: train anew"
        ):
            diverged.align(*views())

    def test_swapping_the_views_transposes_the_plan(self) -> None:
        network = model(replace(TINY, num_iters=300)).eval()
        first, second = views()
        one, other = network.align(first, second), network.align(second, first)
        torch.testing.assert_close(one.solution.plan, other.solution.plan.transpose(1, 2), rtol=1e-2, atol=1e-5)
        torch.testing.assert_close(one.solution.transport_cost, other.solution.transport_cost, rtol=1e-3, atol=1e-5)

    def test_equal_views_stay_where_they_are(self) -> None:
        network = model(replace(TINY, epsilon=1e-3, marginals="uniform", value="transport")).eval()
        first, _ = views()
        aligned = network.align(first, first)
        assert aligned.solution.transport_cost.max() < 2e-3
        assert aligned.cost.diagonal(dim1=1, dim2=2).abs().max() < 1e-5

    def test_diagnostics(self) -> None:
        network, pair = model(replace(TINY, marginals="uniform")), views()
        values = network(*pair)
        assert values["positions"] == pytest.approx(network.side**2, rel=1e-5)
        aligned = network.align(*pair)
        spread = (aligned.cost.amax((1, 2)) - aligned.cost.amin((1, 2))).mean()
        assert values["cost_range"] == pytest.approx(float(spread.detach()))
        assert not values["q_std"].requires_grad and values["loss"].requires_grad

    @pytest.mark.parametrize("name", ABLATIONS)
    def test_every_ablation_trains_every_parameter(self, name: str) -> None:
        """No parameter is left out of the graph, which several processes need."""
        network = model(replace(TINY, **ABLATIONS[name]))
        losses = network(*views())
        losses["loss"].backward()
        assert all(torch.isfinite(value).all() for value in losses.values())
        for parameter_name, parameter in network.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), parameter_name

    @pytest.mark.parametrize(
        "changes",
        [
            {"value": "transport", "gradient": "unrolled"},
            {"value": "transport", "gradient": "implicit"},
            {"value": "entropic", "gradient": "envelope"},
        ],
    )
    def test_all_gradients_reach_cvsim(self, changes: dict[str, Any]) -> None:
        network = model(replace(TINY, beta=0.0, eta=0.0, num_iters=200, **changes))
        network(*views())["loss"].backward()
        assert network.cvsim is not None and network.cvsim.query.weight.grad is not None
        assert network.cvsim.query.weight.grad.abs().sum() > 0

    def test_gradients_agree_at_convergence(self) -> None:
        gradients = []
        for gradient in ("unrolled", "envelope", "implicit"):
            network = model(replace(TINY, value="entropic", gradient=gradient, num_iters=400, epsilon=0.1))  # type: ignore[arg-type]
            network(*views())["loss"].backward()
            gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
        for other in gradients[1:]:
            assert (gradients[0] - other).norm() < 1e-3 * gradients[0].norm()

    def test_uniform_masses_and_mse_have_no_cvsim(self) -> None:
        for changes in ({"marginals": "uniform"}, {"alignment": "mse"}):
            assert model(replace(TINY, **changes)).cvsim is None  # type: ignore[arg-type]


class TestConfig:
    def test_presets(self) -> None:
        paper, fair = (OPTiMLConfig.preset(name, "chest_nih") for name in ("paper", "fair"))  # type: ignore[arg-type]
        assert (paper.width, paper.image_size, paper.expander_dim, paper.epochs) == (64, 224, 4096, 300)
        assert (paper.value, paper.gradient, paper.marginals, paper.cvsim) == (
            "transport",
            "unrolled",
            "cvsim",
            "heads",
        )
        assert (paper.alpha, paper.beta, paper.eta, paper.epsilon, paper.num_iters) == (25, 25, 1, 0.05, 50)
        assert (fair.width, fair.image_size, fair.value) == (16, 112, "entropic")
        for config in (paper, fair):
            assert OPTiML(config, 1).side == 7
        assert optiml.PAPER_RESULTS == {}

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"epsilon": 0.0}, "epsilon must be positive"),
            ({"num_iters": 0}, "num_iters must be positive"),
            ({"beta": -1.0}, "beta must not be negative"),
            ({"alpha": math.nan}, "alpha must be finite"),
            ({"gradient": "envelope", "value": "transport"}, 'gradient "envelope" is that of value "entropic"'),
            ({"learning_rate": 0.0}, "learning_rate"),
        ],
    )
    def test_refusals(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            replace(TINY, **changes)

    def test_ablations_change_the_configuration(self) -> None:
        paper = OPTiMLConfig.preset("paper")
        same = [name for name, changes in ABLATIONS.items() if replace(paper, **changes) == paper]
        assert same == ["full", "value-transport"]


def crop(box: list[float], flip: bool = False) -> ViewParameters:
    """Nothing but a crop and a flip."""
    zero, one, no = torch.zeros(1), torch.ones(1), torch.tensor([False])
    seed = torch.zeros(1, dtype=torch.int64)
    return ViewParameters(
        torch.tensor([box]), torch.tensor([[flip, False]]), zero, one, one, zero, one, zero, zero, seed, no
    )


class TestFigures:
    def test_partner_places_follow_crop_and_flip(self) -> None:
        """A bright pixel of the image is found where `partner_places` says."""
        image = torch.zeros(1, 1, 64, 64)
        image[0, 0, 18, 30] = 1
        views, parameters = [], []
        for box, flip in (([0.25, 0.125, 0.5, 0.5], True), ([0.0, 0.1, 0.8, 0.7], False)):
            drawn = crop(box, flip)
            parameters.append(drawn)
            views.append(RandomViews.preset("optiml", 64).make(image, drawn)[0, 0])
        side = 64
        row, column = divmod(int(views[0].argmax()), side)
        place = partner_places(parameters[0], parameters[1], side)[0, row * side + column] * 64 - 0.5
        expected = divmod(int(views[1].argmax()), 64)
        assert place.tolist() == pytest.approx(expected, abs=1.5)

    def test_places_outside_are_unknown(self) -> None:
        whole, part = crop([0.0, 0.0, 1.0, 1.0]), crop([0.5, 0.5, 0.5, 0.5])
        known = torch.isfinite(partner_places(whole, part, 4)).all(dim=2).reshape(4, 4)
        assert known.nonzero().tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]
        torch.testing.assert_close(partner_places(whole, whole, 2)[0, 1], torch.tensor([0.25, 0.75]))

    def test_positions_lie_on_the_map_and_differ(self) -> None:
        for side in (1, 2, 3, 4, 7, 14):
            chosen = chosen_positions(side)
            assert all(0 <= position < side**2 for position in chosen)
            assert len(set(chosen)) == len(chosen) == min(4, side**2)


@pytest.mark.usefixtures("few_digits")
class TestRun:
    def test_train_evaluate_figures(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = tmp_path / "run"
        assert main(["train", "optiml", "--out", str(folder), *WORDS]) == 0
        text = capsys.readouterr().out
        for expected in (
            "linear probe",
            "100%",
            "transport.png",
            "masses.png",
            "grad_cam.png",
            "architecture.png",
            "losses.png",
            "label_fractions_labels.png",
        ):
            assert expected in text, expected
        line = RunFolder.open(folder).metrics()[0]
        assert {
            "alignment",
            "variance",
            "covariance",
            "q_std",
            "cost_range",
            "positions",
            "marginal_error",
        } <= line.keys()
        before = json.loads((folder / "results.json").read_text())
        assert 0 <= before["splits"]["test"]["labels"]["probe"]["100%"]["macro_auroc"] <= 1
        assert main(["evaluate", str(folder)]) == 0
        assert json.loads((folder / "results.json").read_text())["splits"] == before["splits"]
        for path in (folder / "figures").glob("*.png"):
            path.unlink()
        capsys.readouterr()
        assert main(["figures", str(folder)]) == 0
        printed = capsys.readouterr().out.split()
        assert len(printed) == 6 and all(Path(path).stat().st_size > 1000 for path in printed)
        (folder / "metrics.jsonl").unlink()
        assert main(["figures", str(folder)]) == 1 and "there are no metrics to draw" in capsys.readouterr().err

    def test_ablate_runs_what_is_asked_for_and_continues(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "ablations"
        words = ["ablate", "optiml", "--out", str(folder), *WORDS, "--only", "mse", "uniform-marginals"]
        assert main([*words, "--no-figures"]) == 0
        text = capsys.readouterr().out
        assert "mse" in text and "uniform-marginals" in text and "macro AUROC" in text
        assert set(json.loads((folder / "ablations.json").read_text())) == {"mse", "uniform-marginals"}
        config = json.loads((folder / "mse" / "config.json").read_text())["config"]
        assert config["alignment"] == "mse" and config["width"] == 2
        assert main(words) == 1 and "--resume" in capsys.readouterr().err
        before = (folder / "mse" / "results.json").read_bytes()
        assert main([*words[:-1], "full", "--resume"]) == 0
        assert (folder / "mse" / "results.json").read_bytes() == before
        assert set(json.loads((folder / "ablations.json").read_text())) == {"mse", "uniform-marginals", "full"}
        assert (folder / "figures" / "label_fractions_labels.png").stat().st_size > 1000
        assert not (folder / "mse" / "figures" / "transport.png").exists()  # nothing is transported

    @pytest.mark.parametrize("name", ["cost", "cvsim", "gradient", "view_maker"])
    def test_unknown_words_in_the_configuration(self, name: str) -> None:
        with pytest.raises(ValueError, match=rf"OPTiMLConfig: {name} must be one of \w+, \w+.*; got 'magic'"):
            replace(TINY, **{name: "magic"})

    def test_wrong_words(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["ablate", "vaesim"]) == 2 and "optiml" in capsys.readouterr().out
        assert main(["ablate", "optiml", "--only", "magic"]) == 1
        assert "unknown ablations magic; expected some of full, " in capsys.readouterr().err
        with pytest.raises(SystemExit):
            main(["ablate", "optiml", "--help"])
        assert "epsilon-0.02" in capsys.readouterr().out
