# SPDX-License-Identifier: MIT
"""The contrastive autoencoder's parts: networks, losses, phases, prototypes, scores."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("accelerate", reason="the papers need the extra protokernels[train]")

from protokernels.data import ImageDataset, Split
from protokernels.models import PhasedDecoder, contrastive_encoder, contrastive_projector
from protokernels.papers import contrastive_autoencoder as paper
from protokernels.papers._contrastive_autoencoder_scoring import represent, score_model, subset
from protokernels.papers.contrastive_autoencoder import (
    CONFIG,
    ContrastiveAutoencoder,
    ContrastiveAutoencoderConfig,
    Output,
    contrastive_autoencoder_loss,
    find_prototypes,
    make_optimizer,
)
from protokernels.training import make_accelerator
from protokernels.training.optimizers import LARS

TINY = CONFIG.preset(
    "paper", "digits", epochs=3, warmup_epochs=2, ramp_epochs=1, batch_size=300, image_size=16, latent_dim=8,
    encoder_widths=(4, 8, 8), decoder_widths=(8, 4), most_clusters=6, subset=200,
)  # fmt: skip


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def images(number: int, side: int = 16) -> Tensor:
    return torch.rand(number, 1, side, side, generator=torch.Generator().manual_seed(number))


def in_second_phase(config: ContrastiveAutoencoderConfig = TINY, clusters: int = 3) -> ContrastiveAutoencoder:
    torch.manual_seed(0)
    model = ContrastiveAutoencoder(config, channels=1)
    model.begin_second_phase(torch.randn(clusters, config.latent_dim))
    return model


class TestNetworks:
    def test_sizes_of_the_released_code(self) -> None:
        assert count(contrastive_encoder(1, 32, 128)) == 230_688
        assert count(contrastive_projector(128)) == 131_712
        decoder = PhasedDecoder(1, 32, 128)
        first = count(decoder)
        convolutions = 16 * (1 * 128 + 128 * 64 + 64 * 32) + 224 + 2 * 224 + 9 * 32 + 1  # with biases and normalisation
        assert first == 128 * 16 + 16 + convolutions
        decoder.add_condition(6)
        assert count(decoder) == first + (6 * 16 + 16) + (9 * 2 + 1)  # Linear(K, 16), and the 3 x 3 mix of two maps

    def test_the_encoder_halves_four_times(self) -> None:
        names = [type(layer).__name__ for layer in contrastive_encoder(1, 32, 128)]
        assert names == ["Conv2d", "GELU", "BatchNorm2d"] * 3 + ["AvgPool2d", "Flatten", "Linear"]
        shapes, x = [], images(2, 32)
        for layer in contrastive_encoder(1, 32, 128):
            x = layer(x)
            shapes.append(tuple(x.shape[1:]))
        assert shapes[2::3][:3] == [(32, 16, 16), (64, 8, 8), (128, 4, 4)] and shapes[-3:] == [
            (128, 2, 2),
            (512,),
            (128,),
        ]

    @pytest.mark.parametrize(("channels", "side", "seeds"), [(1, 32, 1), (3, 48, 8)])
    def test_shapes(self, channels: int, side: int, seeds: int) -> None:
        torch.manual_seed(0)
        h = contrastive_encoder(channels, side, 5)(torch.rand(2, channels, side, side))
        decoder = PhasedDecoder(channels, side, 5, seed_channels=seeds)
        for c in (None, torch.softmax(torch.randn(2, 4), dim=1)):
            y = decoder(h, c) if c is None or decoder.condition else None
            if y is None:
                decoder.add_condition(4)
                y = decoder(h, c)
            assert y.shape == (2, channels, side, side) and y.min() >= 0 and y.max() <= 1

    def test_the_condition_reaches_the_image_unless_ignored(self) -> None:
        """The released layers for c have no effect; ours do."""
        for ignored in (False, True):
            torch.manual_seed(0)
            decoder = PhasedDecoder(1, 32, 8)
            decoder.add_condition(3, ignored=ignored)
            decoder.eval()
            first, second = decoder(torch.zeros(2, 8), torch.eye(3)[:2])
            assert torch.equal(first, second) == ignored
            c = torch.rand(4, 3, requires_grad=True)
            decoder(torch.randn(4, 8), c).sum().backward()
            assert (c.grad is None) == ignored

    def test_an_unchanged_start_goes_on_with_the_same_images_and_learns_the_condition(self) -> None:
        torch.manual_seed(0)
        decoder, h, c = PhasedDecoder(1, 32, 8, seed_channels=3).eval(), torch.randn(4, 8), torch.eye(4)
        before = decoder(h)
        decoder.add_condition(4, unchanged=True)
        torch.testing.assert_close(decoder(h, c), before, rtol=0, atol=1e-6)
        for _ in range(2):  # the mix moves first, then what it mixes
            decoder.zero_grad()
            decoder(h, c).square().mean().backward()
            with torch.no_grad():
                for parameter in decoder.parameters():
                    assert parameter.grad is not None
                    parameter.sub_(parameter.grad)
        assert decoder.condition is not None and decoder.condition.weight.grad.any()  # type: ignore[union-attr]

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match="multiple of 16; got 24"):
            contrastive_encoder(1, 24, 8)
        decoder = PhasedDecoder(1, 32, 8)
        with pytest.raises(ValueError, match="got \\[1, 3\\]"):
            decoder(torch.zeros(1, 8), torch.zeros(1, 3))
        with pytest.raises(ValueError, match="at least one entry; got 0"):
            decoder.add_condition(0)
        decoder.add_condition(3)
        with pytest.raises(ValueError, match="got none"):
            decoder(torch.zeros(1, 8))
        with pytest.raises(ValueError, match="one is there"):
            decoder.add_condition(3)


class TestLoss:
    def output(self) -> tuple[Tensor, Tensor, Output]:
        torch.manual_seed(0)
        z = torch.randn(6, 5), torch.randn(6, 5)
        return images(6), images(7)[:6], Output((z[0], z[1]), z, None, (images(8)[:6], images(9)[:6]))

    @pytest.mark.parametrize("denominator", ["all", "negatives"])
    def test_both_forms_of_equation_1(self, denominator: Any) -> None:
        """NT-Xent is the cross-entropy of the partner among all others; Eq. 1 as printed leaves the partner out of the sum."""
        x1, x2, output = self.output()
        assert output.z is not None
        losses = contrastive_autoencoder_loss(x1, x2, output, replace(TINY, denominator=denominator))
        unit = F.normalize(torch.cat(output.z).double(), dim=1)
        scores = unit @ unit.T / 0.5
        expected = []
        for i in range(12):
            partner = (i + 6) % 12
            others = [j for j in range(12) if j != i and (denominator == "all" or j != partner)]
            expected.append(torch.logsumexp(scores[i, others], dim=0) - scores[i, partner])
        assert losses["contrastive"].item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)
        reconstruction = (output.y[0] - x1).square().mean() + (output.y[1] - x2).square().mean()
        torch.testing.assert_close(losses["reconstruction"], reconstruction)
        torch.testing.assert_close(losses["loss"], losses["contrastive"] + 0.1 * reconstruction)

    def test_the_second_phase_reconstructs_only(self) -> None:
        x1, x2, output = self.output()
        losses = contrastive_autoencoder_loss(x1, x2, output._replace(z=None), TINY)
        assert losses.keys() == {"loss", "reconstruction"} and losses["loss"] is losses["reconstruction"]


class TestPhases:
    def test_the_second_phase_moves_the_decoder_alone(self) -> None:
        model = in_second_phase().train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer, _ = make_optimizer(model, replace(TINY, optimizer="adam"))
        x1, x2 = images(20), images(21)[:20]
        output = model(x1, x2)
        contrastive_autoencoder_loss(x1, x2, output, TINY)["loss"].backward()
        optimizer.step()
        changed = {
            name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])
        }
        assert changed == {"decoder"}  # batch statistics of the encoder stay too
        conditional = [name for name in before if name.startswith(("decoder.condition", "decoder.mix"))]
        assert (
            all(not torch.equal(model.state_dict()[name], before[name]) for name in conditional)
            and len(conditional) == 4
        )

    def test_the_first_phase_moves_all_three(self) -> None:
        torch.manual_seed(0)
        model = ContrastiveAutoencoder(TINY, channels=1).train()
        x1, x2 = images(20), images(21)[:20]
        contrastive_autoencoder_loss(x1, x2, model(x1, x2), TINY)["loss"].backward()
        moved = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert moved == {"encoder", "projector", "decoder"}
        with pytest.raises(ValueError, match="no prototypes before the second phase"):
            model.assign(torch.zeros(1, 8))

    @pytest.mark.parametrize(("preset", "similarity", "tau"), [("paper", "cosine", 0.1), ("official", "dot", 1.0)])
    def test_soft_assignment(self, preset: Any, similarity: str, tau: float) -> None:
        config = replace(
            TINY,
            **{
                key: getattr(CONFIG.preset(preset), key)
                for key in ("similarity", "assignment_temperature", "condition")
            },
        )
        assert (config.similarity, config.assignment_temperature) == (similarity, tau)
        model, h = in_second_phase(config), torch.randn(9, 8)
        q = model.prototypes
        assert q is not None
        scores = h @ q.T if similarity == "dot" else F.normalize(h, dim=1) @ F.normalize(q, dim=1).T
        torch.testing.assert_close(model.assign(h), torch.softmax(scores / tau, dim=1), rtol=1e-4, atol=1e-6)

    def test_refreshed_prototypes_are_the_means_of_their_members(self) -> None:
        config = replace(TINY, similarity="dot", assignment_temperature=1.0, refresh_prototypes=True)
        model = in_second_phase(config, clusters=4)
        assert model.prototypes is not None
        model.prototypes[3] = model.prototypes[1]  # ties go to the lower index, so 3 stays empty
        before = model.prototypes.clone()
        output = model(images(30), images(31)[:30])
        paper.refresh_prototypes(model, output)
        h = torch.cat(output.h)
        labels = (h @ before.T).argmax(dim=1)
        for k in range(4):
            expected = h[labels == k].mean(dim=0) if (labels == k).any() else before[k]
            torch.testing.assert_close(model.prototypes[k], expected, rtol=1e-4, atol=1e-5)
        assert not (labels == 3).any()

    def test_prototypes_are_kmeans_of_h_in_evaluation_mode(self) -> None:
        torch.manual_seed(0)
        config = replace(TINY, cluster_on="images", num_prototypes=3, subset=50)
        model, x = ContrastiveAutoencoder(config, channels=1), images(80)
        accelerator = make_accelerator("cpu")
        centres, inertias, elbow_found = find_prototypes(model, x, config, 0, accelerator)
        assert centres.shape == (3, 8) and len(inertias) == 0 and not elbow_found
        h = model.eval().encode(x[subset(80, 50, 0)]).detach()
        nearest = torch.cdist(h, centres).argmin(dim=1)
        for k in range(3):  # a fixed point of Lloyd's iteration
            torch.testing.assert_close(centres[k], h[nearest == k].mean(dim=0), rtol=1e-4, atol=1e-4)
        again = find_prototypes(model, x, config, 0, accelerator)[0]
        assert torch.equal(centres, again)

    def test_the_elbow_chooses_among_the_candidates(self) -> None:
        torch.manual_seed(0)
        model = ContrastiveAutoencoder(TINY, channels=1)
        for cluster_on in ("views", "images"):
            config = replace(TINY, cluster_on=cluster_on)
            centres, inertias, _ = find_prototypes(model, images(60), config, 0, make_accelerator("cpu"))
            assert 2 <= len(centres) <= 6 and len(inertias) == 5 == len(model.inertias)
            assert all(a >= b for a, b in pairwise(inertias.tolist()))

    def test_one_schedule_over_both_phases_and_a_new_optimiser(self) -> None:
        config = CONFIG.preset("paper", "mnist")
        model = ContrastiveAutoencoder(replace(config, encoder_widths=(2, 2, 2), decoder_widths=(2, 2)), channels=1)
        rates = []
        for epoch, scheduler_from in ((0, 0), (50, 50)):
            optimizer, scheduler = make_optimizer(model, config, scheduler_from)
            assert isinstance(optimizer, LARS) and not optimizer.state
            group = optimizer.param_groups[0]
            assert (group["scaled"], group["lr_in_momentum"], group["momentum"], group["eta"]) == (
                "all",
                True,
                0.9,
                0.001,
            )
            for _ in range(epoch, epoch + 50):
                rates.append(group["lr"])
                optimizer.step()
                scheduler.step()
        assert [rates[e] for e in (0, 5, 10, 55)] == pytest.approx([0.01, 0.13, 0.25, 0.15])
        expected = [0.05 + 0.2 * (1 + math.cos(math.pi * (e - 10) / 90)) / 2 for e in range(10, 100)]
        assert rates[10:] == pytest.approx(expected) and rates[-1] > 0.05


class TestScores:
    def dataset(self) -> ImageDataset:
        """Two kinds of images: bright at the left, bright at the right."""
        generator = np.random.default_rng(0)

        def split(number: int) -> Split:
            labels = np.arange(number, dtype=np.int64) % 2
            x = generator.integers(0, 60, (number, 16, 16))
            for side in (0, 1):
                x[labels == side, :, 8 * side : 8 * side + 8] += 150
            return Split(x.astype(np.uint8), labels)

        return ImageDataset("made", split(120), split(20), split(30), ("left", "right"))

    def test_by_other_means(self) -> None:
        """Neighbours by scikit-learn, the cluster map by counting; the test labels decide nothing."""
        from sklearn.neighbors import KNeighborsClassifier

        dataset, config = self.dataset(), replace(TINY, subset=60, linear_protocol="fair")
        model = in_second_phase(config, clusters=5)
        scores = score_model(model, dataset, config, seed=3)
        assert scores["images"] == {"train": 120, "test": 30, "val": 20, "val+test": 50}
        assert scores["protocol"] == {"bank": 60, "labels": 24, "knn_k": 5, "linear_protocol": "fair"}
        bank, test = represent(model, dataset.train).take(subset(120, 60, 3)), represent(model, dataset.test)
        assert bank.clusters is not None and test.clusters is not None and model.prototypes is not None
        cosine = F.normalize(test.h, dim=1) @ F.normalize(model.prototypes, dim=1).T
        assert torch.equal(test.clusters, cosine.argmax(dim=1))
        modes = [
            bank.labels[bank.clusters == k].mode().values if (bank.clusters == k).any() else None for k in range(5)
        ]
        overall = bank.labels.mode().values
        predicted = torch.stack([modes[k] if modes[k] is not None else overall for k in test.clusters.tolist()])  # type: ignore[misc]
        right = (predicted == test.labels).double().mean().item()
        assert scores["splits"]["test"]["statistical"]["accuracy"] == pytest.approx(right)
        for key, x, queries in (("knn", bank.h, test.h), ("knn_z", bank.z, test.z)):
            theirs = (
                KNeighborsClassifier(5).fit(x.numpy(), bank.labels.numpy()).score(queries.numpy(), test.labels.numpy())
            )
            assert scores["splits"]["test"][key]["accuracy"] == pytest.approx(theirs)
        assert scores["splits"]["test"]["linear_h"]["accuracy"] > 0.9
        assert scores["splits"]["test"]["majority"]["accuracy"] == 0.5
        flipped = replace(dataset, test=Split(dataset.test.images, 1 - dataset.test.labels))
        mirrored = score_model(model, flipped, config, seed=3)["splits"]["test"]
        for key in ("statistical", "knn", "knn_z", "linear", "linear_h"):
            before = scores["splits"]["test"][key]["accuracy"]
            assert mirrored[key]["accuracy"] == pytest.approx(1 - before), key

    def test_before_the_second_phase_nothing_is_said_of_clusters(self) -> None:
        torch.manual_seed(0)
        scores = score_model(ContrastiveAutoencoder(TINY, 1), self.dataset(), replace(TINY, subset=60), seed=0)
        assert "statistical" not in scores["splits"]["val"] and "clustering" not in scores["splits"]["val"]
        assert scores["prototypes"] == {"number": 0}

    def test_subset(self) -> None:
        chosen = subset(100, 30, seed=1)
        assert len(chosen.unique()) == 30 and chosen.max() < 100 and torch.equal(chosen, subset(100, 30, seed=1))
        assert torch.equal(subset(100, 0, 1), torch.arange(100)) and torch.equal(subset(10, 30, 1), torch.arange(10))
        assert not torch.equal(chosen, subset(100, 30, seed=2))
