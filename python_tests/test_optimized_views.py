# SPDX-License-Identifier: MIT
"""Optimized views: networks, Eq. 1 with its signs and readings, what moves in which step, labels, strategies, presets."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("accelerate", reason="optimized views need the extra protokernels[train]")

from protokernels.papers import optimized_views as paper
from protokernels.papers._optimized_views_config import TRANSFORMATIONS
from protokernels.papers._optimized_views_networks import (
    ConvolutionalEncoder,
    TransformationNetwork,
    frozen,
    still,
)
from protokernels.papers.optimized_views import STRATEGIES, OptimizedViews, OptimizedViewsConfig

SMALL = OptimizedViewsConfig.preset("fair", data="digits", image_size=16, width=2, m_width=2)
PAIRS = [name for name, strategy in STRATEGIES.items() if strategy.loss == "pairs"]


def model(config: OptimizedViewsConfig = SMALL, seed: int = 0) -> OptimizedViews:
    torch.manual_seed(seed)
    return paper.new_model(config, 1).train()


def batch(count: int = 12, size: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels (a third unknown, both classes among the rest) and seeds of noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.interpolate(torch.rand(count, 1, 4, 4, generator=generator), (size, size), mode="bilinear")
    return x, torch.arange(count) % 3 - 1, torch.arange(count) + 7


def state(*modules: nn.Module | None) -> list[Tensor]:
    return [value.clone() for module in modules if module is not None for value in module.state_dict().values()]


def smooth_encoder() -> Any:
    """An f without kinks and batch normalisation: a small step changes the loss as the gradient says."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(1, 16, 5, stride=3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class TestNetworks:
    @pytest.mark.parametrize(("side", "channels"), [(16, 1), (33, 3), (64, 1)])
    def test_shapes(self, side: int, channels: int) -> None:
        x = torch.rand(3, channels, side, side)
        Lambda = TransformationNetwork(channels)(x)
        assert Lambda.shape == (3, 7) and bool(((Lambda > 0) & (Lambda < 1)).all())
        encoder = ConvolutionalEncoder(channels, 4)
        assert encoder(x).shape == (3, 32) and encoder.dim == 32

    def test_counts_of_layers_are_the_papers(self) -> None:
        def convolutions(module: nn.Module) -> list[tuple[int, int]]:
            return [(c.in_channels, c.out_channels) for c in module.modules() if isinstance(c, nn.Conv2d)]

        config = OptimizedViewsConfig.preset("paper", data="brats")
        network = OptimizedViews(config, 1)
        assert convolutions(network.f) == [
            (1, 32),
            (32, 32),
            (32, 64),
            (64, 64),
            (64, 128),
            (128, 128),
            (128, 256),
            (256, 256),
        ]
        assert network.M is not None and convolutions(network.M) == [(1, 16), (16, 32)]
        assert [tuple(layer.weight.shape) for layer in network.g if isinstance(layer, nn.Linear)] == [
            (256, 256),
            (128, 256),
        ]
        assert network.p.weight.shape == (1, 256)

    def test_lambda_starts_in_the_middle(self) -> None:
        Lambda = TransformationNetwork(1).eval()(batch()[0])
        assert (Lambda - 0.5).abs().max() < 0.25

    def test_strategies_start_from_the_same_encoder(self) -> None:
        first, *others = (model(replace(SMALL, strategy=name)) for name in STRATEGIES)
        for other in others:
            assert same(state(*first.parts()), state(*other.parts()))
        assert [model(replace(SMALL, strategy=name)).M is not None for name in STRATEGIES] == [
            strategy.views == "M" for strategy in STRATEGIES.values()
        ]

    def test_densenet_has_the_papers_width(self) -> None:
        network = model(replace(SMALL, encoder="densenet121", image_size=32)).eval()
        with torch.no_grad():
            latents = network.embed(torch.rand(2, 1, 32, 32))
        assert latents.h.shape == (2, 1024) and latents.z.shape == (2, 128)

    def test_a_transformation_is_the_ops(self) -> None:
        """Lambda's columns and the order are those of `protokernels.transform`."""
        x, _, seed = batch()
        network = model(replace(SMALL, order=("hflip",)))
        Lambda = torch.zeros(len(x), 7)
        Lambda[:, 4] = 1
        assert torch.equal(network.transform(x, Lambda, seed), x.flip(3))
        assert TRANSFORMATIONS == ("blur", "noise", "crop", "hflip", "vflip", "rotate")


class TestContrast:
    def test_equation_2_by_hand(self) -> None:
        generator = np.random.default_rng(0)
        z_M, z = generator.normal(size=(2, 5, 4))
        s = z_M @ z.T
        losses = [-math.log(math.exp(s[i, i]) / sum(math.exp(s[i, j]) for j in range(5) if j != i)) for i in range(5)]
        tensors, printed = (torch.tensor(z_M), torch.tensor(z)), replace(SMALL, normalize=False, temperature=1.0)
        assert paper.contrast(*tensors, printed) == pytest.approx(np.mean(losses), rel=1e-9)
        assert paper.contrast(*tensors, replace(printed, reduction="sum")) == pytest.approx(sum(losses), rel=1e-9)

    def test_readings(self) -> None:
        z_M, z = torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        unit = [torch.nn.functional.normalize(value, dim=1) for value in (z_M, z)]
        scores = unit[0] @ unit[1].T / 0.3
        expected = torch.nn.functional.cross_entropy(scores, torch.arange(6))
        config = replace(SMALL, normalize=True, temperature=0.3, denominator="all")
        assert paper.contrast(z_M, z, config) == pytest.approx(float(expected), rel=1e-9)
        both = (expected + torch.nn.functional.cross_entropy(scores.T, torch.arange(6))) / 2
        assert paper.contrast(z_M, z, replace(config, symmetric=True)) == pytest.approx(float(both), rel=1e-9)


class TestCrossEntropy:
    def test_unknown_labels_take_no_part(self) -> None:
        logits, y = torch.tensor([0.3, -2.0, 1.0, 5.0], requires_grad=True), torch.tensor([1, -1, 0, -1])
        loss = paper.cross_entropy(logits, y)
        expected = (-math.log(1 / (1 + math.exp(-0.3))) - math.log(1 - 1 / (1 + math.exp(-1.0)))) / 2
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        loss.backward()
        assert (
            logits.grad is not None
            and logits.grad[[1, 3]].tolist() == [0, 0]
            and bool((logits.grad[[0, 2]] != 0).all())
        )

    def test_a_batch_without_labels_is_zero_with_a_zero_gradient(self) -> None:
        logits = torch.tensor([1e30, -1e30, 0.0], requires_grad=True)
        loss = paper.cross_entropy(logits, torch.full((3,), -1))
        loss.backward()
        assert loss.item() == 0 and logits.grad is not None and logits.grad.tolist() == [0, 0, 0]

    def test_whole_steps_without_labels(self) -> None:
        x, _, seed = batch()
        network, y = model(), torch.full((len(x),), -1)
        plain = network.embed(x)
        for losses, key in (
            (paper.transformation_losses(network, x, y, plain.z, seed), "m_loss"),
            (paper.encoder_losses(network, network.embed(x.flip(2)), plain, y), "loss"),
        ):
            losses[key].backward()
            assert all(torch.isfinite(value).all() for value in losses.values())
        assert network.p.weight.grad is not None and not network.p.weight.grad.any()


class TestSteps:
    """What moves, and in which direction."""

    def losses_of_M(self, network: OptimizedViews) -> dict[str, Tensor]:
        x, y, seed = batch()
        with still(*network.parts()), torch.no_grad():
            keys = network.embed(x).z
        return paper.transformation_losses(network, x, y, keys, seed)

    def losses_of_f(self, network: OptimizedViews) -> dict[str, Tensor]:
        x, y, seed = batch()
        plain = network.embed(x)
        with torch.no_grad(), frozen(network.M):
            assert network.M is not None
            x_M = network.transform(x, network.M(x), seed)
        return paper.encoder_losses(network, network.embed(x_M), plain, y)

    def test_the_step_of_M_moves_M_alone(self) -> None:
        network = model()
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
        for _ in range(2):  # the second with a state in the optimiser
            before, of_M = state(*network.parts()), state(network.M)
            optimizer.zero_grad()
            self.losses_of_M(network)["m_loss"].backward()
            optimizer.step()
            assert same(before, state(*network.parts()))
            assert network.M is not None
            for name, parameter in network.M.named_parameters():
                assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
                assert parameter.grad.any(), name
            assert not any(
                torch.equal(a, b) for a, b in zip(of_M, state(network.M), strict=True) if a.is_floating_point()
            )
        assert all(parameter.requires_grad for parameter in network.parameters())

    def test_the_step_of_f_moves_f_g_and_p_alone(self) -> None:
        network = model()
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
        for _ in range(2):
            before, of_M = state(*network.parts()), state(network.M)
            optimizer.zero_grad()
            self.losses_of_f(network)["loss"].backward()
            optimizer.step()
            assert same(of_M, state(network.M))
            assert not any(torch.equal(a, b) for a, b in zip(before, state(*network.parts()), strict=True))

    def draws(self) -> paper.Draws:
        return paper.Draws(torch.rand(12, 7), None, torch.arange(12), torch.arange(12) + 50)

    @pytest.mark.parametrize("view", ["new", "shared"])
    def test_a_batch_moves_M_then_the_others(self, view: Any) -> None:
        network, (x, y, _) = model(replace(SMALL, view=view)), batch()
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
        moved = []

        def optimise(loss: Tensor) -> None:
            before = [state(module) for module in (network.M, *network.parts())]
            parameters = [[p.clone() for p in module.parameters()] for module in (network.M, *network.parts())]  # type: ignore[union-attr]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            after = [list(module.parameters()) for module in (network.M, *network.parts())]  # type: ignore[union-attr]
            moved.append([not same(a, b) for a, b in zip(parameters, after, strict=True)])  # type: ignore[arg-type]
            buffers = [state(module) for module in (network.M, *network.parts())]
            assert [not same(a, b) for a, b in zip(before, buffers, strict=True)] == moved[-1]

        for turn in (True, False, True):
            moved.clear()
            losses = paper.alternate(network, x, y, self.draws(), optimise, turn_of_M=turn)
            assert moved == [[True, False, False, False]] * turn + [[False, True, True, True]]
            assert ("m_loss" in losses) is turn and all(torch.isfinite(value).all() for value in losses.values())

    def test_a_shared_view_gives_the_gradients_of_its_two_steps(self) -> None:
        """M's as if its step had been made with that view, those of f, g and p as if X_M had been made by M before its step."""
        x, y, _ = batch()
        network, draws = model(replace(SMALL, view="shared")), self.draws()
        expected = copy.deepcopy(network)
        gradients: list[list[Tensor | None]] = []

        def keep(loss: Tensor) -> None:
            network.zero_grad(set_to_none=True)
            loss.backward()
            gradients.append([None if p.grad is None else p.grad.clone() for p in network.parameters()])

        paper.alternate(network, x, y, draws, keep)
        plain = expected.embed(x)
        assert expected.M is not None
        of_M = paper.transformation_losses(expected, x, y, plain.z, draws.seed_f)["m_loss"]
        with torch.no_grad(), frozen(expected.M):
            x_M = expected.transform(x, expected.M(x), draws.seed_f)
        of_f = paper.encoder_losses(expected, expected.embed(x_M), plain, y)["loss"]
        for loss, found in zip((of_M, of_f), gradients, strict=True):
            wanted = torch.autograd.grad(loss, list(expected.parameters()), allow_unused=True, retain_graph=True)
            assert any(value is not None for value in found)
            for one, other in zip(found, wanted, strict=True):
                assert (one is None) is (other is None)
                if one is not None and other is not None:
                    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("statistics", ["both", "untransformed"])
    def test_running_statistics_are_those_that_are_asked_for(self, statistics: Any) -> None:
        x, y, _ = batch()
        for turn in (True, False):
            network, expected = (model(replace(SMALL, statistics=statistics)) for _ in range(2))
            paper.alternate(network, x, y, self.draws(), lambda loss: None, turn_of_M=turn)
            expected.embed(x)  # the step of M leaves no trace in f
            assert same(state(network.f), state(expected.f)) is (statistics == "untransformed")
            with torch.no_grad(), frozen(expected.M):
                assert expected.M is not None
                expected.embed(expected.transform(x, expected.M(x), self.draws().seed_f))
            assert same(state(network.f), state(expected.f)) is (statistics == "both")

    @pytest.mark.parametrize(("sign", "harder"), [("text", True), ("printed", False)])
    def test_M_makes_pairs_hard_and_f_makes_them_agree(self, sign: Any, harder: bool) -> None:
        network = model(replace(SMALL, sign=sign, alphas=(1, 0, 1, 0, 0)))
        network.f = smooth_encoder()
        before = self.losses_of_M(network)["m_contrast"].item()
        assert network.M is not None
        optimizer = torch.optim.Adam(network.M.parameters(), lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            self.losses_of_M(network)["m_loss"].backward()
            optimizer.step()
        after_M = self.losses_of_M(network)["m_contrast"].item()
        assert (after_M > before) is harder
        before = self.losses_of_f(network)["contrast"].item()
        optimizer = torch.optim.Adam([p for part in network.parts() for p in part.parameters()], lr=1e-3)
        for _ in range(5):
            optimizer.zero_grad()
            self.losses_of_f(network)["loss"].backward()
            optimizer.step()
        assert (self.losses_of_f(network)["contrast"].item() < before) is harder

    def test_M_learns_to_be_classified(self) -> None:
        network = model(replace(SMALL, alphas=(0, 1, 1, 1, 1)))
        network.f = smooth_encoder()
        before = self.losses_of_M(network)["m_cross_entropy"].item()
        assert network.M is not None
        optimizer = torch.optim.Adam(network.M.parameters(), lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            self.losses_of_M(network)["m_loss"].backward()
            optimizer.step()
        assert self.losses_of_M(network)["m_cross_entropy"].item() < before

    def test_weights_are_those_of_equation_1(self) -> None:
        network = model(replace(SMALL, alphas=(0.3, 5.0, 0.7, 2.0, 3.0)))
        of_M, of_f = self.losses_of_M(copy.deepcopy(network)), self.losses_of_f(network)
        assert of_M["m_loss"].item() == pytest.approx(
            -0.3 * of_M["m_contrast"].item() + 5 * of_M["m_cross_entropy"].item(), rel=1e-5
        )
        expected = 0.7 * of_f["contrast"] + 2 * of_f["view_cross_entropy"] + 3 * of_f["cross_entropy"]
        assert of_f["loss"].item() == pytest.approx(expected.item(), rel=1e-5)

    @pytest.mark.parametrize("order", [("noise", "crop", "hflip", "vflip"), TRANSFORMATIONS])
    def test_the_gradient_of_M_against_differences(self, order: Any) -> None:
        """Through p, g, f and T into M's last layer, along a random direction; f is smooth here, so that differences mean something."""
        x, y, seed = batch(6)
        network = model(replace(SMALL, order=order))
        network.f = smooth_encoder()
        assert network.M is not None
        keys = network.embed(x).z.detach()
        weight = network.M.head.weight
        direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))

        def value(step: float) -> float:
            with torch.no_grad():
                kept = weight.clone()
                weight.add_(direction, alpha=step)
                loss = paper.transformation_losses(network, x, y, keys, seed)["m_loss"].item()
                weight.copy_(kept)
            return loss

        (gradient,) = torch.autograd.grad(paper.transformation_losses(network, x, y, keys, seed)["m_loss"], weight)
        difference = (value(1e-3) - value(-1e-3)) / 2e-3
        # The loss is about 6 in float32: its rounding, some 1e-6, over the step of 2e-3.
        assert float((gradient * direction).sum()) == pytest.approx(difference, rel=1e-2, abs=2e-3)
