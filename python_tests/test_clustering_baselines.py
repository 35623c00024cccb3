# SPDX-License-Identifier: MIT
"""VAESim's baselines: losses in closed form, responsibilities, networks, schedules, collapse, presets."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

pytest.importorskip("accelerate", reason="the baselines need the extra protokernels[train]")

from protokernels.baselines import clustering, gmvae, vade, vae_kmeans
from protokernels.models import build_networks
from protokernels.papers.vaesim import kl_divergence as gaussian_kl


def random_mixture(K: int, D: int, *, scale: float = 1.0) -> vade.Mixture:
    log_weights = torch.log_softmax(torch.randn(K, dtype=torch.float64), dim=0)
    return vade.Mixture(log_weights, scale * torch.randn(K, D).double(), 0.5 * torch.randn(K, D).double())


class TestVAE:
    def test_loss_against_torch_distributions(self) -> None:
        torch.manual_seed(0)
        x, reconstruction = torch.rand(2, 6, 1, 4, 4, dtype=torch.float64)
        mean, log_variance = torch.randn(2, 6, 3, dtype=torch.float64)
        config = vae_kmeans.VAEKMeansConfig(beta=0.7, prior_std=0.8)
        losses = vae_kmeans.vae_loss(x, reconstruction, mean, log_variance, config)
        prior = Normal(torch.zeros(3, dtype=torch.float64), 0.8)
        kl = kl_divergence(Normal(mean, (log_variance / 2).exp()), prior).sum(dim=1).mean()
        error = ((x - reconstruction) ** 2).sum(dim=(1, 2, 3)).mean()
        torch.testing.assert_close(losses["loss"], error + 0.7 * kl)

    @pytest.mark.parametrize(("preset", "weight"), [("official", 0.03125), ("matched", 0.005)])
    def test_released_weights_are_the_same_loss_in_other_units(self, preset: str, weight: float) -> None:
        """Mean squared error + weight * mean KL, times the number of pixels; 0.005 is VAESim's."""
        torch.manual_seed(0)
        config = vae_kmeans.VAEKMeansConfig.preset(preset, "mnist")
        x, reconstruction = torch.rand(2, 5, 1, 32, 32, dtype=torch.float64)
        mean, log_variance = torch.randn(2, 5, 32, dtype=torch.float64)
        ours = vae_kmeans.vae_loss(x, reconstruction, mean, log_variance, config)["loss"]
        kl = gaussian_kl(mean, log_variance, 1.0 if preset == "official" else 0.8) / 32
        torch.testing.assert_close(ours, 1024 * ((x - reconstruction).square().mean() + weight * kl.mean()))

    @pytest.mark.parametrize("name", ["paper", "official-mnist", "official-pneumonia", "small"])
    def test_the_decoder_has_no_trace_of_a_condition(self, name: Any) -> None:
        sizes: dict[str, Any] = {"channels": 1, "image_size": 32, "latent_dim": 6}
        with_condition, plain = (build_networks(name, **sizes, condition_dim=K)[1] for K in (5, 0))
        first = plain.layers[0].weight
        saved = (
            5 * plain.side**2 + plain.side**2 + first.shape[1] * 16
        )  # its layer, and one channel of the first convolution
        assert count(with_condition) - count(plain) == saved
        assert plain(torch.randn(2, 6)).shape == (2, 1, 32, 32)

    def test_the_elbow_finds_separate_clusters_and_says_when_there_is_none(self) -> None:
        generator = torch.Generator().manual_seed(0)
        z = 20 * torch.eye(6).repeat(50, 1) + torch.randn(300, 6, generator=generator)
        config = vae_kmeans.VAEKMeansConfig(candidates=(2, 4, 6, 8, 10, 12, 400), kmeans_starts=3)
        elbow = vae_kmeans.choose_clusters(z, config, seed=0)
        assert (elbow.chosen, elbow.found) == (6, True) and 400 not in elbow.n_clusters
        without = vae_kmeans.choose_clusters(z, replace(config, candidates=(2, 3, 4, 5)), seed=0)  # a straight line
        assert (without.chosen, without.found) == (5, False)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class TestGMVAE:
    def model(self, **changes: Any) -> tuple[gmvae.GMVAE, gmvae.GMVAEConfig]:
        torch.manual_seed(0)
        config = gmvae.GMVAEConfig(image_size=8, num_clusters=4, latent_dim=5, hidden_dim=16, **changes)
        return gmvae.GMVAE(config, 1), config

    def test_terms_against_torch_distributions(self) -> None:
        model, _ = self.model()
        x, gumbel, noise = torch.rand(7, 1, 8, 8), torch.randn(7, 4), torch.randn(7, 5)
        out = model(x, gumbel, noise, 0.7)
        losses = gmvae.gmvae_loss(x, out)
        wide = gmvae.GMVAEOutput(*(value.double() for value in out))
        bernoulli = torch.distributions.Bernoulli(torch.sigmoid(wide.pixel_logits), validate_args=False)
        bce = -bernoulli.log_prob(x.double()).sum(dim=(1, 2, 3)).mean()
        q = Independent(Normal(wide.mean, wide.variance.sqrt()), 1)
        p = Independent(Normal(wide.prior_mean, wide.prior_variance.sqrt()), 1)
        gaussian = (q.log_prob(wide.z) - p.log_prob(wide.z)).mean()
        categorical = kl_divergence(Categorical(logits=wide.logits), Categorical(logits=torch.zeros(4).double())).mean()
        for key, expected in (("reconstruction", bce), ("gaussian", gaussian), ("categorical", categorical)):
            torch.testing.assert_close(losses[key].double(), expected, rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(
            losses["loss"], losses["reconstruction"] + losses["gaussian"] + losses["categorical"]
        )
        torch.testing.assert_close(out.z, out.mean + out.variance.sqrt() * noise, rtol=1e-5, atol=1e-6)

    def test_the_sample_of_the_component_is_jangs(self) -> None:
        """softmax((logits + Gumbel) / tau) goes into q(z|x, y) and p(z|y), and its largest entry follows softmax(logits)."""
        model, _ = self.model()
        x, gumbel = torch.rand(3, 1, 8, 8), torch.randn(3, 4)
        out = model(x, gumbel, torch.zeros(3, 5), 0.5)
        y = torch.softmax((model.component(x.flatten(1)) + gumbel) / 0.5, dim=1)
        torch.testing.assert_close(out.prior_mean, y @ model.prior_mean.weight.T + model.prior_mean.bias)
        torch.testing.assert_close(out.z, model.posterior(x, y)[0])
        logits = torch.tensor([2.0, 0.0, 1.0, -1.0])
        noise = gmvae.gumbel_noise((200_000, 4), torch.Generator().manual_seed(0))
        drawn = torch.bincount((logits + noise).argmax(dim=1), minlength=4) / 200_000
        torch.testing.assert_close(drawn, torch.softmax(logits, 0), rtol=0, atol=4e-3)  # 3.6 standard errors
        assert float(noise.mean()) == pytest.approx(0.5772, abs=6e-3) and bool(noise.isfinite().all())
        assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.02)

    def test_extreme_logits_stay_finite(self) -> None:
        logits = torch.tensor([[1e4, -1e4, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
        kl = gmvae.component_kl(logits)
        torch.testing.assert_close(kl.detach(), torch.tensor([math.log(4), 0.0]), rtol=1e-6, atol=1e-6)
        (gradient,) = torch.autograd.grad(kl.sum(), logits)
        assert bool(gradient.isfinite().all())
        variance = gmvae.positive(torch.tensor([-1e3, 1e3]))
        assert variance[0] > 0 and variance.log().isfinite().all() and variance[1] == 1000

    def test_every_parameter_gets_a_gradient(self) -> None:
        model, _ = self.model()
        x = torch.rand(6, 1, 8, 8)
        gmvae.gmvae_loss(x, model(x, torch.randn(6, 4), torch.randn(6, 5), 1.0))["loss"].backward()
        assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())

    def test_public_sizes_and_temperature(self) -> None:
        config = gmvae.GMVAEConfig.preset("paper", "mnist")
        assert (config.num_clusters, config.latent_dim, config.batch_size, config.epochs) == (10, 64, 64, 100)
        linear = lambda a, b: a * b + b  # noqa: E731
        component = linear(784, 512) + linear(512, 512) + linear(512, 10)
        posterior = linear(794, 512) + linear(512, 512) + 2 * linear(512, 64)
        generative = 2 * linear(10, 64) + linear(64, 512) + linear(512, 512) + linear(512, 784)
        assert count(gmvae.GMVAE(config, 1)) == component + posterior + generative
        assert config.temperature(0) == 1 and config.temperature(25) == pytest.approx(0.5**0.5, rel=1e-6)
        assert config.temperature(50) == pytest.approx(0.5, rel=1e-6) and config.temperature(99) == 0.5

    def test_centers_are_the_priors_means(self) -> None:
        model, _ = self.model()
        torch.testing.assert_close(model.centers(), model.prior_mean.weight.T + model.prior_mean.bias)

    def test_evaluation_draws_nothing_unless_asked(self) -> None:
        model, _ = self.model()
        x = torch.rand(9, 1, 8, 8)
        first, second = model.represent(x, None), model.represent(x, None)
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
        sampled = model.represent(x, torch.Generator().manual_seed(0))
        assert torch.equal(sampled[1], first[1]) and not torch.equal(sampled[0], first[0])


class TestResponsibilities:
    """Equation 16, K10 of the specification: in logarithms from end to end."""

    def test_against_torch_distributions(self) -> None:
        torch.manual_seed(0)
        mixture, z = random_mixture(5, 3), torch.randn(40, 3, dtype=torch.float64)
        components = Independent(Normal(mixture.means, (mixture.log_variances / 2).exp()), 1)
        oracle = MixtureSameFamily(Categorical(logits=mixture.log_weights), components)
        joint = mixture.log_weights + components.log_prob(z[:, None])
        torch.testing.assert_close(vade.log_responsibilities(z, mixture), joint - oracle.log_prob(z)[:, None])

    def test_float32_against_a_float64_oracle_far_from_every_component(self) -> None:
        """Densities down to exp(-1e7): both ports' exp(...) + 1e-10 makes all components equal there."""
        torch.manual_seed(1)
        wide = random_mixture(6, 10, scale=3.0)
        narrow = vade.Mixture(*(value.float() for value in wide))
        z = torch.cat([torch.randn(50, 10) * 3, torch.randn(50, 10) * 1000])
        exact = vade.log_responsibilities(z.double(), vade.Mixture(*(value.double() for value in narrow)))
        ours = vade.log_responsibilities(z, narrow)
        assert bool(ours.isfinite().all()) and exact.min() < -1e5
        # a sum of 10 terms of size exact, in float32; the softmax adds the largest logarithm's own rounding
        scale = exact.abs() + 0.5 * ((z.double()[:, None] - narrow.means) ** 2 / narrow.log_variances.exp()).sum(dim=2)
        assert bool(((ours - exact).abs() <= 2e-6 * scale + 1e-6).all())
        assert torch.equal(ours.argmax(dim=1), exact.argmax(dim=1))
        torch.testing.assert_close(ours.exp().sum(dim=1), torch.ones(100), rtol=1e-5, atol=0)
        naive = torch.exp(narrow.log_weights - 0.5 * (z[:, None] - narrow.means).square().sum(dim=2)) + 1e-10
        naive = naive / naive.sum(dim=1, keepdim=True)
        assert float(naive[50:].max()) < 0.2  # what this function is for

    def test_gradient_where_densities_underflow(self) -> None:
        mixture = vade.Mixture(torch.tensor([0.5, 0.5]).log(), torch.tensor([[0.0], [0.01]]), torch.zeros(2, 1))
        z = torch.tensor([[60.0]], requires_grad=True)  # both densities are exp(-1800); their ratio is exp(0.6)
        gamma = vade.log_responsibilities(z, mixture).exp()
        ratio = math.exp((60**2 - 59.99**2) / 2)
        share = ratio / (1 + ratio)
        assert gamma[0, 1].item() == pytest.approx(share, rel=1e-3)
        (gradient,) = torch.autograd.grad(gamma[0, 1], z)
        assert float(gradient) == pytest.approx(0.01 * share * (1 - share), rel=1e-3)

    def test_one_component_and_equal_components(self) -> None:
        z = torch.randn(3, 2)
        one = vade.Mixture(torch.zeros(1), torch.zeros(1, 2), torch.zeros(1, 2))
        assert torch.equal(vade.log_responsibilities(z, one), torch.zeros(3, 1))
        equal = vade.Mixture(torch.tensor([0.25, 0.75]).log(), torch.ones(2, 2), torch.ones(2, 2))
        torch.testing.assert_close(vade.log_responsibilities(z, equal).exp(), torch.tensor([[0.25, 0.75]]).expand(3, 2))


class TestVaDE:
    def outputs(self) -> tuple[Tensor, vade.VaDEOutput, vade.Mixture]:
        torch.manual_seed(0)
        mean, log_variance, noise = torch.randn(3, 8, 4, dtype=torch.float64)
        output = vade.VaDEOutput(
            torch.randn(8, 1, 3, 3).double(), mean + noise * (log_variance / 2).exp(), mean, log_variance
        )
        return torch.rand(8, 1, 3, 3).double(), output, random_mixture(5, 4)

    def test_terms_against_torch_distributions(self) -> None:
        x, output, mixture = self.outputs()
        losses = vade.vade_loss(x, output, mixture)
        components = Normal(mixture.means, (mixture.log_variances / 2).exp())
        q = Normal(output.mean[:, None], (output.log_variance / 2).exp()[:, None])
        kls = kl_divergence(q, components).sum(dim=2)  # [8, 5]
        torch.testing.assert_close(vade.component_kls(output.mean, output.log_variance, mixture), kls)
        gamma = vade.log_responsibilities(output.z, mixture).exp()
        torch.testing.assert_close(losses["gaussian"], (gamma * kls).sum(dim=1).mean())
        expected = kl_divergence(Categorical(probs=gamma), Categorical(logits=mixture.log_weights)).mean()
        torch.testing.assert_close(losses["categorical"], expected)
        bernoulli = torch.distributions.Bernoulli(logits=output.pixel_logits, validate_args=False)
        torch.testing.assert_close(losses["reconstruction"], -bernoulli.log_prob(x).sum(dim=(1, 2, 3)).mean())

    def test_it_is_equation_12(self) -> None:
        """The two KL terms are the paper's sum, written term by term."""
        x, output, mixture = self.outputs()
        losses = vade.vade_loss(x, output, mixture)
        gamma = vade.log_responsibilities(output.z, mixture).exp()
        variance, deviation = output.log_variance.exp()[:, None], output.mean[:, None] - mixture.means
        inner = mixture.log_variances + (variance + deviation.square()) / mixture.log_variances.exp()
        paper = 0.5 * (gamma * inner.sum(dim=2)).sum(dim=1)
        paper = paper - (gamma * (mixture.log_weights - gamma.log())).sum(dim=1)
        paper = paper - 0.5 * (1 + output.log_variance).sum(dim=1)
        torch.testing.assert_close(losses["loss"], losses["reconstruction"] + paper.mean())

    def test_gradients_against_finite_differences(self) -> None:
        x, output, mixture = self.outputs()

        def loss(z: Tensor, mean: Tensor, log_variance: Tensor, *values: Tensor) -> Tensor:
            moved = vade.VaDEOutput(output.pixel_logits, z, mean, log_variance)
            prior = vade.Mixture(torch.log_softmax(values[0], 0), *values[1:])
            return vade.vade_loss(x, moved, prior)["loss"]

        inputs = (output.z, output.mean, output.log_variance, *mixture)
        assert torch.autograd.gradcheck(loss, tuple(value.clone().requires_grad_() for value in inputs))

    def test_degenerate_mixtures_stay_finite(self) -> None:
        """A component without weight, one far away, and one that is narrow."""
        x, output, _ = self.outputs()
        logits = torch.tensor([0.0, -1e6, 0.0, 0.0], requires_grad=True)
        means = torch.zeros(4, 4)
        means[2] = 1e6
        log_variances = torch.zeros(4, 4)
        log_variances[3] = -13.8  # scikit-learn's floor
        mixture = vade.Mixture(torch.log_softmax(logits, 0), means.requires_grad_(), log_variances.requires_grad_())
        narrow = vade.VaDEOutput(*(value.float() for value in output))
        loss = vade.vade_loss(x.float(), narrow, mixture)["loss"]
        gradients = torch.autograd.grad(loss, (logits, means, log_variances))
        assert bool(loss.isfinite()) and all(bool(gradient.isfinite().all()) for gradient in gradients)

    def small(self, **changes: Any) -> tuple[vade.VaDE, vade.VaDEConfig]:
        torch.manual_seed(0)
        config = vade.VaDEConfig(image_size=6, num_clusters=3, latent_dim=2, hidden=(8, 4), **changes)
        return vade.VaDE(config, 1), config

    @pytest.mark.parametrize("start", ["constant", "copied", "random"])
    def test_the_mixture_starts_as_scikit_learns(self, start: Any) -> None:
        from sklearn.mixture import GaussianMixture

        model, config = self.small(log_variance_start=start)
        images = torch.rand(90, 1, 6, 6) * (torch.arange(90) % 3 + 1)[:, None, None, None] / 3
        before = model.log_variance.weight.clone()
        assert model.represent(images, None)[1] is None  # no clusters before there is a mixture
        vade.initialize_mixture(model, images, config, seed=4)
        with torch.no_grad():
            z, clusters = model.represent(images, None)
            _, log_variance = model.encode(images)
        oracle = GaussianMixture(3, covariance_type="diag", random_state=4).fit(z.double().numpy())
        gamma = vade.log_responsibilities(z, model.mixture).exp().detach().double()
        np.testing.assert_allclose(gamma, oracle.predict_proba(z.double().numpy()), rtol=1e-3, atol=1e-4)
        assert clusters is not None and np.array_equal(clusters, oracle.predict(z.double().numpy()))
        if start == "constant":
            average = np.log(0.1 * oracle.weights_ @ oracle.covariances_)
            np.testing.assert_allclose(log_variance.numpy(), np.tile(average, (90, 1)), rtol=1e-4)
        else:
            assert torch.equal(model.log_variance.weight, model.mean.weight if start == "copied" else before)

    def test_a_mixture_needs_images_and_finite_vectors(self) -> None:
        model, config = self.small()
        with pytest.raises(ValueError, match=r"3 components needs at least as many images.* got 2 images"):
            vade.initialize_mixture(model, torch.rand(2, 1, 6, 6), config, seed=0)
        with pytest.raises(ValueError, match="1 of them with NaN"):
            vade.initialize_mixture(model, torch.rand(9, 1, 6, 6).index_fill(0, torch.tensor([3]), math.nan), config, 0)

    def test_schedules(self) -> None:
        pytorch = vade.VaDEConfig.preset("pytorch", "mnist")
        rates = [pytorch.learning_rate * pytorch.learning_rate_factor(epoch) for epoch in (0, 49, 50, 59, 60, 349)]
        assert rates == pytest.approx([1e-3, 1e-3, 2e-3, 2e-3, 2e-3 * 0.95, 2e-3 * 0.95**29])
        assert pytorch.total_epochs == 350 and (pytorch.batch_size, pytorch.transductive) == (800, False)
        keras = vade.VaDEConfig.preset("keras", "mnist")
        factors = [keras.learning_rate_factor(epoch) for epoch in (50, 60, 3000)]
        assert factors == pytest.approx([1, 0.9, 0.1]) and (keras.batch_size, keras.transductive) == (100, True)
        fair = vade.VaDEConfig.preset("fair", "mnist")
        assert fair.learning_rate_factor(fair.pretraining_epochs) == 1
        assert fair.learning_rate_factor(fair.total_epochs) == pytest.approx(0)

    def test_public_sizes(self) -> None:
        linear = lambda a, b: a * b + b  # noqa: E731
        encoder = linear(784, 500) + linear(500, 500) + linear(500, 2000) + 2 * linear(2000, 10)
        decoder = linear(10, 2000) + linear(2000, 500) + linear(500, 500) + linear(500, 784)
        assert count(vade.VaDE(vade.VaDEConfig(), 1)) == encoder + decoder + 10 + 200


class TestCollapse:
    def test_usage(self) -> None:
        even = clustering.cluster_usage(torch.arange(12) % 4, 6)
        assert even == {"clusters_used": 4.0, "largest_cluster": 0.25, "effective_clusters": pytest.approx(4.0)}
        one = clustering.cluster_usage(torch.full((9,), 5), 6)
        assert one == {"clusters_used": 1.0, "largest_cluster": 1.0, "effective_clusters": 1.0}
        skewed = clustering.cluster_usage(torch.tensor([0] * 9 + [1]), 2)
        assert skewed["effective_clusters"] == pytest.approx(math.exp(-0.9 * math.log(0.9) - 0.1 * math.log(0.1)))

    def test_active_dimensions(self) -> None:
        z = torch.zeros(1000, 4)
        z[:, 0] = torch.randn(1000)
        z[:, 1] = 0.05 * torch.randn(1000)  # variance 0.0025: nothing is written there
        z[:, 2] = 7.0
        assert clustering.active_dimensions(z) == 1.0

    def test_watching_changes_nothing_and_sees_a_collapse(self) -> None:
        torch.manual_seed(0)
        model = gmvae.GMVAE(gmvae.GMVAEConfig(image_size=4, num_clusters=3, latent_dim=2, hidden_dim=8), 1)
        with torch.no_grad():
            model.component[-1].bias.copy_(torch.tensor([0.0, 50.0, 0.0]))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        measures = clustering.watch(model, torch.rand(clustering.WATCHED * 2 + 1, 1, 4, 4))
        assert measures["clusters_used"] == measures["largest_cluster"] == measures["effective_clusters"] == 1.0
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
