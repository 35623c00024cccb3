# SPDX-License-Identifier: MIT
"""The linear probe: scikit-learn as the oracle, protocols, the same numbers on every run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from protokernels.evaluation import (
    GradientProtocol,
    LinearProtocol,
    classification_scores,
    linear_probe,
)
from protokernels.evaluation.classifier import Labelled, fit_logistic, seeded_linear
from python_tests.blobs import blobs
from python_tests.places import default_dtype


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class TestLinearProbe:
    @pytest.mark.parametrize(
        ("protocol", "rate", "epochs", "outputs"), [("paper", 3e-4, 200, 4), ("official", 1e-3, 10, 10)]
    )
    def test_equals_a_torch_layer_trained_by_autograd(
        self, protocol: LinearProtocol, rate: float, epochs: int, outputs: int, threads: Callable[[int], None]
    ) -> None:
        threads(1)
        x, y = blobs(1100)  # two full batches and a part
        probe = linear_probe(x, y, num_classes=4, protocol=protocol, seed=5)
        generator = torch.Generator().manual_seed(5)
        start = (torch.rand(outputs, 9, generator=generator) * 2 - 1) / math.sqrt(8)
        layer = torch.nn.Linear(8, outputs).double()
        with torch.no_grad():
            layer.weight.copy_(start[:, :8])
            layer.bias.copy_(start[:, 8])
        optimizer = torch.optim.Adam(layer.parameters(), lr=rate)
        for _ in range(epochs):
            order = torch.randperm(1100, generator=generator)
            for index in order.split(512):
                optimizer.zero_grad()
                F.cross_entropy(layer(x[index].double()), y[index]).backward()
                optimizer.step()
        torch.testing.assert_close(probe.weight.double(), layer.weight.detach(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(probe.bias.double(), layer.bias.detach(), rtol=1e-3, atol=1e-4)

    def test_initial_weights_are_those_of_nn_linear(self) -> None:
        # torch.nn.Linear: weight and bias uniform in +-1/sqrt(D); visible before any step has moved them far
        layer = torch.nn.Linear(100, 64)
        probe = linear_probe(
            torch.zeros(4, 100), torch.tensor([0, 1, 2, 3]), num_classes=64, protocol="official", seed=1
        )
        assert probe.weight.abs().max() <= 0.1 and layer.weight.abs().max() <= 0.1  # zero input: no gradient on weights
        assert abs(float(probe.weight.std() / layer.weight.detach().std()) - 1) < 0.05

    def test_fair_equals_sklearn(self) -> None:
        x, y = blobs(400)
        x = x * torch.logspace(-3, 3, 8) + 100.0
        queries = blobs(200, seed=1)[0] * torch.logspace(-3, 3, 8) + 100.0
        for labels in (y, (y > 1).long(), (y > 1).long() * 2 + 1):  # four classes, two, two that are not 0 and 1
            oracle = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x.double(), labels)
            probe = linear_probe(x, labels, num_classes=4, protocol="fair")
            assert probe.predict(queries).tolist() == oracle.predict(queries.double()).tolist()

    def test_fair_does_not_depend_on_scale_but_paper_does(self) -> None:
        x, y = blobs(400)
        queries = blobs(200, seed=1)[0]
        for protocol, equal in (("fair", True), ("paper", False)):
            predictions = [
                linear_probe(x * scale, y, num_classes=4, protocol=protocol).predict(queries * scale)  # type: ignore[arg-type]
                for scale in (1.0, 1e-3)
            ]
            assert torch.equal(*predictions) == equal

    @pytest.mark.parametrize("protocol", ["paper", "official", "fair"])
    def test_learns_and_is_deterministic(self, protocol: LinearProtocol, threads: Callable[[int], None]) -> None:
        x, y = blobs(8000, spread=0.3)  # `paper` needs some 3,000 of its small steps to forget where it began
        state = torch.get_rng_state()
        first = linear_probe(x, y, num_classes=4, protocol=protocol, seed=3)
        assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
        threads(1)
        second = linear_probe(x, y, num_classes=4, protocol=protocol, seed=3)
        assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)
        assert torch.get_num_threads() == 1
        other = linear_probe(x, y, num_classes=4, protocol=protocol, seed=4)
        assert torch.equal(first.weight, other.weight) == (protocol == "fair")
        if protocol != "official":
            assert (first.predict(x) == y).float().mean() > 0.95

    def test_official_has_ten_outputs_that_can_win(self) -> None:
        x, y = blobs(60, classes=2)
        probe = linear_probe(x, y, num_classes=2, protocol="official")
        assert probe.weight.shape == (10, 8)
        prediction = probe.predict(x)
        assert int(prediction.max()) >= 2
        expected = float((prediction == y).float().mean())
        assert classification_scores(prediction, y, 2)["accuracy"] == pytest.approx(expected)
        assert linear_probe(x, y, num_classes=12, protocol="official").weight.shape == (12, 8)

    @pytest.mark.parametrize("protocol", ["paper", "fair"])
    def test_one_class_and_constant_features(self, protocol: LinearProtocol) -> None:
        x, y = blobs(600)
        x[:, 2] = 7.7
        one = torch.full_like(y, 2)
        assert (linear_probe(x, one, num_classes=4, protocol=protocol).predict(x) == 2).float().mean() > 0.99
        probe = linear_probe(x, y, num_classes=4, protocol=protocol)
        assert bool(torch.isfinite(probe.weight).all())
        assert linear_probe(x[:1], y[:1], num_classes=4, protocol="fair").predict(x[:1]).tolist() == [y[0].item()]

    def test_fair_never_predicts_a_class_without_samples(self) -> None:
        x, y = blobs(200, classes=3)
        probe = linear_probe(x, y, num_classes=5, protocol="fair")
        assert int(probe.predict(100 * torch.randn(500, 8)).max()) <= 2

    def test_refusals(self) -> None:
        x, y = blobs(10)
        probe = linear_probe(x, y, num_classes=4, protocol="fair")
        assert probe.predict(x[:0]).shape == (0,)
        with pytest.raises(ValueError, match=r"shape \[N, 8\]"):
            probe.predict(x[:, :2])
        with pytest.raises(ValueError, match="must be finite"):
            probe.predict(x / 0.0)
        with pytest.raises(ValueError, match="must be finite; 10 of 10 rows"):
            linear_probe(x * torch.nan, y, num_classes=4)
        with pytest.raises(ValueError, match="protocol must be"):
            linear_probe(x, y, num_classes=4, protocol="other")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="'fair' or a GradientProtocol; got None"):
            linear_probe(x, y, num_classes=4, protocol=None)  # type: ignore[arg-type]
        for values in ((1e-3, 0), (1e-3, 1, 0), (-0.1, 1), (math.nan, 1)):
            with pytest.raises(
                ValueError, match="epochs and batch_size must be at least 1, learning_rate finite and not"
            ):
                GradientProtocol(*values)
        with pytest.raises(ValueError, match=r"0\.\.2"):
            linear_probe(x, y, num_classes=3)

    @pytest.mark.parametrize("protocol", ["paper", "official", "fair"])
    def test_the_default_type_makes_no_difference(self, protocol: LinearProtocol) -> None:
        x, y = blobs(60)
        before = linear_probe(x, y, num_classes=4, protocol=protocol)
        with default_dtype(torch.float64):
            after = linear_probe(x, y, num_classes=4, protocol=protocol)
            assert torch.equal(after.predict(x), before.predict(x))
        assert torch.equal(after.weight, before.weight) and after.weight.dtype == before.weight.dtype


def test_heads_and_probes_of_transfer_leave_the_global_generator_alone() -> None:
    state, data = torch.get_rng_state(), Labelled(torch.arange(8.0).view(4, 2), torch.arange(4) % 2)
    head = seeded_linear(2, 3, seed=0)
    assert torch.equal(head.weight, seeded_linear(2, 3, seed=0).weight) and not head.bias.any()
    assert fit_logistic(data, data, num_classes=2, weight_decays=(0.1,)).module.weight.isfinite().all()
    assert torch.equal(torch.get_rng_state(), state)
