# SPDX-License-Identifier: MIT
"""Transfer to few labels: AUROC against counting pairs, nested stratified subsets, selection that never sees the test split."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from protokernels.evaluation import (
    TRANSFER_PROTOCOLS,
    AdamWProtocol,
    Labelled,
    TransferConfig,
    auroc,
    evaluate_transfer,
    fine_tune,
    label_subsets,
)
from protokernels.evaluation import transfer as transfer_module
from protokernels.evaluation.classifier import fit_adamw, fit_logistic, label_loss, seeded_linear, selection_score
from protokernels.models import GaussianEncoder
from python_tests.places import default_dtype

FAST = AdamWProtocol(learning_rate=3e-3, epochs=4, patience=4, batch_size=32)
CONFIG = TransferConfig(
    fractions=(0.1, 1.0), fine_tune_fractions=(0.3,), weight_decays=(0.1, 1e-2), fine_tune=FAST, probe_adamw=FAST
)


class Encoder(nn.Module):
    """A tiny network with batch normalisation that returns a dense map [B, 12, 4, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        dense: Tensor = self.body(images)
        return dense


def seeded_encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder()


def made(count: int, seed: int, several: bool = False) -> Labelled:
    """Images whose brightness, and with several labels also their slope, tells the labels."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.arange(count) % 2).float(), (torch.arange(count) // 2 % 2).float()
    ramp = torch.linspace(-1, 1, 8)[None, None, None, :]
    images = 0.4 * torch.randn(count, 1, 8, 8, generator=generator) + first[:, None, None, None]
    images = images + 0.7 * second[:, None, None, None] * ramp
    return Labelled(images, torch.stack([first, second], dim=1) if several else first.long())


def by_counting(scores: Tensor, truth: Tensor) -> float:
    pairs = itertools.product(scores[truth].tolist(), scores[~truth].tolist())
    wins = [1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs]
    return sum(wins) / len(wins)


class TestAuroc:
    def test_hand_cases(self) -> None:
        scores = torch.tensor([[0.1], [0.4], [0.35], [0.8]])
        truth = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
        assert auroc(scores, truth, ["a"]).macro == pytest.approx(0.75)
        assert auroc(-scores, truth, ["a"]).macro == pytest.approx(0.25)
        assert auroc(torch.zeros(4, 1), truth, ["a"]).macro == pytest.approx(0.5)

    @given(st.integers(0, 10_000), st.integers(2, 25), st.integers(1, 5))
    @settings(max_examples=40, deadline=None)
    def test_counts_pairs(self, seed: int, count: int, classes: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randint(0, 4, (count, classes), generator=generator).double()  # many ties
        truth = torch.randint(0, 2, (count, classes), generator=generator).bool()
        names = [f"class {index}" for index in range(classes)]
        found = auroc(scores, truth, names)
        mixed = [k for k in range(classes) if truth[:, k].any() and not truth[:, k].all()]
        assert list(found.per_class) == [names[k] for k in mixed]
        assert set(found.left_out) == set(names) - set(found.per_class)
        expected = [by_counting(scores[:, k], truth[:, k]) for k in mixed]
        assert list(found.per_class.values()) == pytest.approx(expected)
        assert found.macro == (pytest.approx(sum(expected) / len(expected)) if mixed else None)

    def test_one_label_per_image_is_one_against_the_rest(self) -> None:
        torch.manual_seed(0)
        scores, labels = torch.randn(30, 3), torch.arange(30) % 3
        found = auroc(scores, labels, list("abc"))
        probabilities = scores.double().softmax(dim=1)
        assert found.per_class == auroc(probabilities, F.one_hot(labels, 3).float(), list("abc")).per_class
        two = auroc(scores[:, :2], labels.clamp(max=1), ["no", "yes"])
        assert two.per_class == {"yes": pytest.approx(by_counting(scores[:, 1] - scores[:, 0], labels >= 1))}

    @pytest.mark.parametrize("classes", [2, 3, 5])
    def test_an_offset_per_image_changes_nothing(self, classes: int) -> None:
        """Single labels; the areas of three and more classes are those of scikit-learn."""
        generator = torch.Generator().manual_seed(classes)
        logits = torch.randn(60, classes, generator=generator, dtype=torch.float64)
        offsets = 10 * torch.randn(60, 1, generator=generator, dtype=torch.float64)
        labels = torch.arange(60) % classes
        names = [str(index) for index in range(classes)]
        found = auroc(logits, labels, names)
        assert auroc(logits + offsets, labels, names).per_class == pytest.approx(found.per_class, abs=1e-12)
        probabilities = logits.softmax(dim=1)
        if classes > 2:
            expected = roc_auc_score(labels.numpy(), probabilities.numpy(), multi_class="ovr", average="macro")
            assert found.macro == pytest.approx(expected, abs=1e-12)
        assert selection_score(logits + offsets, labels) == pytest.approx(found.macro, abs=1e-12)
        assert auroc(probabilities.log(), labels, names).macro == pytest.approx(found.macro, abs=1e-12)

    @pytest.mark.parametrize("classes", [2, 3])
    def test_scores_in_half_precision_are_not_rounded_again(self, classes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        labels, names = torch.arange(200) % classes, [str(index) for index in range(classes)]
        logits = 10 * torch.randn(200, classes, generator=generator)
        for scores in (logits.bfloat16(), 5000 * logits.half().clamp(-10, 10), logits + 1e6):
            assert auroc(scores, labels, names) == auroc(scores.double(), labels, names)

    @pytest.mark.parametrize("classes", [2, 3])
    def test_minus_infinity_is_the_logit_of_probability_0(self, classes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        labels, names = torch.arange(60) % classes, [str(index) for index in range(classes)]
        logits = torch.randn(60, classes, generator=generator, dtype=torch.float64)
        logits[torch.rand(60, classes, generator=generator) < 0.2] = -1e4  # a probability of 0, as float64 has it
        logits[logits.amax(1) == -1e4] = 0.0
        none = logits.masked_fill(logits == -1e4, -torch.inf)
        shares = none.softmax(1)
        for name, area in auroc(none, labels, names).per_class.items():
            counted = by_counting(shares[:, int(name)], labels == int(name))
            assert area == pytest.approx(counted, abs=1e-12)
        both = F.one_hot(labels, classes).float()
        assert auroc(none, both, names) == auroc(logits, both, names)

    def test_classes_without_both_labels_are_named(self) -> None:
        targets = torch.tensor([[1.0, 0, 1], [1, 0, 0]])
        found = auroc(torch.rand(2, 3), targets, ["always", "never", "mixed"])
        assert found.left_out == ("always", "never") and list(found.per_class) == ["mixed"]
        nothing = auroc(torch.rand(2, 2), targets[:, :2], ["always", "never"])
        assert nothing.macro is None and "macro_auroc" not in nothing.as_dict()

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match="one column per class name"):
            auroc(torch.rand(3, 2), torch.zeros(3, dtype=torch.int64), ["a"])
        with pytest.raises(ValueError, match="class names must differ; got 'a', 'b', 'a'"):
            auroc(torch.rand(3, 3), torch.arange(3), ["a", "b", "a"])
        with pytest.raises(ValueError, match="1 of 3 rows of scores hold NaN"):
            auroc(torch.tensor([[0.1], [float("nan")], [0.2]]), torch.zeros(3, 1), ["a"])
        with pytest.raises(ValueError, match="1 of 3 rows of logits have no softmax"):
            auroc(torch.tensor([[0.1, 0, 0], [torch.inf, 0, 0], [0, 0, -torch.inf]]), torch.arange(3), list("abc"))
        with pytest.raises(ValueError, match="zeros and ones of shape"):
            auroc(torch.rand(3, 2), torch.full((3, 2), 2.0), ["a", "b"])
        with pytest.raises(ValueError, match=r"0\.\.1"):
            auroc(torch.rand(3, 2), torch.tensor([0, 1, 2]), ["a", "b"])


class TestSubsets:
    FRACTIONS = (0.01, 0.05, 0.1, 0.3, 1.0)

    def test_stratified_and_nested(self) -> None:
        labels = torch.cat([torch.zeros(700), torch.ones(250), torch.full((50,), 2.0)]).long()
        subsets = label_subsets(labels, self.FRACTIONS, num_classes=3)
        for smaller, larger in itertools.pairwise(self.FRACTIONS):
            assert set(subsets[smaller].tolist()) < set(subsets[larger].tolist())
        for fraction in self.FRACTIONS[1:]:
            counts = labels[subsets[fraction]].bincount(minlength=3).double()
            assert len(subsets[fraction]) == round(fraction * 1000)
            assert (counts - fraction * torch.tensor([700.0, 250, 50])).abs().max() <= 2
        assert subsets[1.0].tolist() == list(range(1000))
        assert labels[subsets[0.01]].unique().tolist() == [0, 1, 2]

    @given(st.integers(0, 10_000), st.integers(1, 80), st.integers(1, 6))
    @settings(max_examples=40, deadline=None)
    def test_every_class_that_exists_is_in_the_smallest(self, seed: int, count: int, classes: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        targets = (torch.rand(count, classes, generator=generator) < 0.1).float()
        subsets = label_subsets(targets, self.FRACTIONS, num_classes=classes, seed=seed)
        few = targets[subsets[0.01]]
        assert torch.equal(few.any(dim=0), targets.any(dim=0))
        assert bool((few.sum(1) == 0).any()) == bool((targets.sum(1) == 0).any())
        assert len(few) <= max(round(0.01 * count), classes + 1)
        for smaller, larger in itertools.pairwise(self.FRACTIONS):
            assert set(subsets[smaller].tolist()) <= set(subsets[larger].tolist())

    def test_seeded(self) -> None:
        labels = torch.arange(200) % 4
        state = torch.get_rng_state()
        first, again, other = (label_subsets(labels, [0.1], num_classes=4, seed=s)[0.1].tolist() for s in (1, 1, 2))
        assert first == again != other and torch.equal(state, torch.get_rng_state())

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match=r"lie in \(0, 1\]"):
            label_subsets(torch.zeros(3, dtype=torch.int64), [0.0], num_classes=1)
        with pytest.raises(ValueError, match="at least one image"):
            label_subsets(torch.zeros(0, dtype=torch.int64), [1.0], num_classes=1)


class TestLogistic:
    def test_is_scikit_learns(self) -> None:
        torch.manual_seed(0)
        x, labels = torch.randn(80, 5), torch.arange(80) % 3
        x[:, 0] += labels
        data = Labelled(x, labels)
        fitted = fit_logistic(data, data, num_classes=3, weight_decays=(0.05,))
        # C = 1 / (N * weight decay); sklearn does not penalise the bias, here the penalty is small
        oracle = LogisticRegression(C=1 / (80 * 0.05), tol=1e-8, max_iter=1000).fit(x.numpy(), labels.numpy())
        ours = fitted.module(x).softmax(dim=1).detach()
        torch.testing.assert_close(
            ours.double(), torch.from_numpy(oracle.predict_proba(x.numpy())).double(), rtol=0, atol=2e-3
        )

    def test_several_labels_are_separate_problems(self) -> None:
        torch.manual_seed(0)
        x = torch.randn(60, 4)
        targets = (x[:, :2] + 0.5 * torch.randn(60, 2) > 0).float()
        both = fit_logistic(Labelled(x, targets), Labelled(x, targets), num_classes=2, weight_decays=(0.01,))
        for k in range(2):  # mean over two classes: half the weight of the loss
            one = Labelled(x, targets[:, k : k + 1])
            alone = fit_logistic(one, one, num_classes=1, weight_decays=(0.02,))
            torch.testing.assert_close(both.module(x)[:, k], alone.module(x)[:, 0], rtol=0, atol=5e-3)

    def test_validation_chooses_the_weight_decay(self) -> None:
        generator = torch.Generator().manual_seed(0)
        signal = torch.randn(400, 60, generator=generator)
        labels = ((signal[:, 0] + 0.5 * torch.randn(400, generator=generator)) > 0).long()
        train, val = Labelled(signal[:40], labels[:40]), Labelled(signal[40:], labels[40:])
        scores = {
            decay: fit_logistic(train, val, num_classes=2, weight_decays=(decay,)).val_score
            for decay in (10, 1e-1, 1e-5)
        }
        chosen = fit_logistic(train, val, num_classes=2, weight_decays=(1e-5, 1e-1, 10))
        assert chosen.val_score == pytest.approx(max(scores.values()), abs=2e-3)
        assert scores[chosen.weight_decay] == pytest.approx(max(scores.values()), abs=2e-3)

    @pytest.mark.parametrize("several", [False, True])
    def test_classes_with_one_label_only_stay_finite(self, several: bool) -> None:
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
        targets = torch.tensor([[1.0, 0.0]]).expand(6, 2) if several else torch.zeros(6, dtype=torch.int64)
        data = Labelled(x, targets)
        fitted = fit_logistic(data, data, num_classes=2, weight_decays=(1e-4, 1.0))
        logits = fitted.module(x)
        assert torch.isfinite(logits).all() and (logits[:, 0] > logits[:, 1]).all()

    def test_refuses_no_weight_decay(self) -> None:
        data = made(8, 0)
        with pytest.raises(ValueError, match="positive numbers, at least one"):
            fit_logistic(data, data, num_classes=2, weight_decays=())


class TestAdamW:
    def test_keeps_the_best_epoch(self) -> None:
        train, val = made(60, 0), made(40, 1)
        module = nn.Sequential(nn.Flatten(), seeded_linear(64, 2, 0))
        fitted = fit_adamw(module, train, val, replace(FAST, epochs=8))
        with torch.no_grad():
            assert selection_score(module(val.inputs), val.targets) == fitted.val_score
        assert fitted.epoch is not None and 1 <= fitted.epoch <= 8

    def test_stops_after_patience(self) -> None:
        calls = 0

        class Counted(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(64, 2))

            def forward(self, x: Tensor) -> Tensor:
                nonlocal calls
                calls += self.training
                return 0.0 * (x.flatten(1) @ self.weight)  # never gets better

        fitted = fit_adamw(Counted(), made(32, 0), made(8, 1), replace(FAST, epochs=50, patience=3, batch_size=32))
        assert fitted.epoch == 1 and calls == 4

    def test_small_sets_are_visited_several_times(self) -> None:
        module = nn.Sequential(nn.Flatten(), seeded_linear(64, 2, 0))
        seen: list[int] = []
        module.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])) if m.training else None)
        fit_adamw(module, made(10, 0), made(8, 1), replace(FAST, epochs=1, batch_size=4, least_steps=7))
        assert seen == [4, 3, 3] * 3

    def test_one_image(self) -> None:
        fitted = fine_tune(seeded_encoder(), made(1, 0), made(8, 1), 2, FAST)
        assert all(torch.isfinite(value).all() for value in fitted.module.state_dict().values())

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match="at least 1"):
            fit_adamw(nn.Linear(2, 2), made(4, 0), made(4, 1), replace(FAST, epochs=0))
        with pytest.raises(ValueError, match="no parameter"):
            fit_adamw(nn.Flatten(), made(4, 0), made(4, 1), FAST)

    def test_diverged_validation_is_never_chosen(self) -> None:
        assert selection_score(torch.full((3, 2), float("nan")), torch.zeros(3, dtype=torch.int64)) == -float("inf")

    def test_without_both_labels_the_loss_selects(self) -> None:
        logits, targets = torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.zeros(2, dtype=torch.int64)
        assert selection_score(logits, targets) == pytest.approx(-float(label_loss(logits, targets)))


@pytest.fixture(scope="module")
def encoder() -> Iterator[Encoder]:
    yield seeded_encoder()


def run(encoder: nn.Module, several: bool = False, test: Labelled | None = None, **changes: object) -> dict:  # type: ignore[type-arg]
    names = ["bright", "ramp"] if several else ["dark", "bright"]
    config = replace(CONFIG, **changes)  # type: ignore[arg-type]
    parts = [made(80, 0, several), made(40, 1, several), test or made(60, 2, several)]
    return evaluate_transfer(encoder, *parts, class_names=names, config=config, seed=3)


class TestTransfer:
    @pytest.mark.parametrize("several", [False, True])
    @pytest.mark.parametrize("probe", ["lbfgs", "adamw"])
    def test_learns_what_the_images_tell(self, encoder: Encoder, several: bool, probe: str) -> None:
        results = run(
            encoder, several, probe=probe, probe_adamw=replace(FAST, epochs=30, patience=30, learning_rate=3e-2)
        )
        assert list(results["probe"]) == ["10%", "100%"] and list(results["fine_tune"]) == ["30%"]
        row = results["probe"]["100%"]
        assert row["macro_auroc"] > 0.9 and row["images"] == 80 and row["left_out"] == []
        assert list(row["auroc"]) == (["bright", "ramp"] if several else ["bright"])
        assert ("accuracy" in row) != several
        assert results["fine_tune"]["30%"]["images"] == 24 and results["fine_tune"]["30%"]["epoch"] >= 1

    def test_adamw_sees_the_features_as_they_are(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """L-BFGS sees them standardised."""
        heads: list[nn.Module] = []
        monkeypatch.setattr(transfer_module, "_scores", lambda model, *_: heads.append(model.module) or {})
        parts = [Labelled(5 + 0.1 * part.inputs.flatten(1), part.targets) for part in (made(40, 0), made(20, 1))]
        for probe in ("adamw", "lbfgs"):
            config = replace(CONFIG, probe=probe, fractions=(1.0,), fine_tune_fractions=())
            evaluate_transfer(nn.Identity(), *parts, parts[1], class_names=["a", "b"], config=config, seed=3)
        plain = fit_adamw(seeded_linear(64, 2, 3), *parts, FAST, seed=3).module
        found, standardised = (head(parts[1].inputs) for head in heads)
        assert torch.equal(found, plain(parts[1].inputs)) and not torch.allclose(standardised, found)
        assert [type(head) for head in heads] == [nn.Linear, transfer_module.Standardised]

    @pytest.mark.parametrize("training", [False, True])
    def test_the_encoder_stays_as_it_is(self, training: bool) -> None:
        encoder = seeded_encoder().train(training)
        encoder.body[1].eval()  # frozen statistics
        before = {name: value.clone() for name, value in encoder.state_dict().items()}
        run(encoder)
        assert [part.training for part in (encoder, encoder.body, encoder.body[1])] == [training, training, False]
        assert all(p.grad is None for p in encoder.parameters())
        assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())

    def test_same_seed_same_numbers(self, encoder: Encoder) -> None:
        assert run(encoder) == run(encoder)

    def test_labels_of_the_test_split_choose_nothing(self, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
        """Other test labels and images: epoch, weight decay and every weight stay the same to the bit."""
        fitted: list[dict[str, Tensor]] = []
        chosen: list[tuple[object, ...]] = []
        score = transfer_module._scores

        def watch(model: transfer_module.Fitted, *rest: object) -> dict[str, object]:
            fitted.append({name: value.clone() for name, value in model.module.state_dict().items()})
            chosen.append((model.epoch, model.weight_decay, model.val_score))
            return score(model, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(transfer_module, "_scores", watch)
        test = made(60, 2)
        first = run(encoder, test=test)
        second = run(encoder, test=Labelled(test.inputs * 3, test.targets.roll(1)))
        assert first["probe"]["100%"]["macro_auroc"] != second["probe"]["100%"]["macro_auroc"]
        half = len(fitted) // 2
        assert half == 3 and chosen[:half] == chosen[half:]
        for one, other in zip(fitted[:half], fitted[half:], strict=True):
            assert all(torch.equal(value, other[name]) for name, value in one.items())

    def test_a_test_class_without_both_labels_is_named(self, encoder: Encoder) -> None:
        test = made(20, 2, several=True)
        alone = Labelled(test.inputs, torch.stack([test.targets[:, 0], torch.zeros(20)], dim=1))
        row = run(encoder, several=True, test=alone)["probe"]["100%"]
        assert row["left_out"] == ["ramp"] and row["macro_auroc"] == row["auroc"]["bright"]

    def test_constant_features(self) -> None:
        """A collapsed encoder scores one half, not NaN."""

        class Collapsed(nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                return torch.ones(len(images), 5)

        results = run(Collapsed(), fine_tune_fractions=())
        assert results["probe"]["100%"]["macro_auroc"] == 0.5 and results["fine_tune"] == {}

    def test_bf16(self, encoder: Encoder) -> None:
        parts = made(80, 0), made(40, 1), made(60, 2)
        results = evaluate_transfer(encoder, *parts, class_names=["a", "b"], config=CONFIG, precision="bf16")
        assert results["probe"]["100%"]["macro_auroc"] > 0.9

    def test_refusals(self, encoder: Encoder) -> None:
        class Broken(nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                return torch.full((len(images), 3), float("nan"))

        with pytest.raises(ValueError, match="diverged"):
            run(Broken())
        with pytest.raises(ValueError, match="all several"):
            evaluate_transfer(encoder, made(8, 0), made(8, 1), made(8, 2, several=True), class_names=["a", "b"])
        with pytest.raises(ValueError, match="at least 1"):
            Labelled(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))

    def test_the_sister_protocol(self) -> None:
        config = TRANSFER_PROTOCOLS["sister"]
        assert config.probe == "adamw" and config.probe_adamw.learning_rate == 3e-3
        assert (config.fine_tune.epochs, config.fine_tune.patience, config.fine_tune.batch_size) == (300, 10, 128)


def test_the_default_type_makes_no_difference(encoder: Encoder) -> None:
    parts = [made(40, seed) for seed in range(3)]
    expected, found = [], []
    for dtype, results in ((torch.float32, expected), (torch.float64, found)):
        with default_dtype(dtype):
            for probe in ("lbfgs", "adamw"):
                config = replace(CONFIG, probe=probe, fine_tune=replace(FAST, flip=True, epochs=2))  # type: ignore[arg-type]
                results.append(evaluate_transfer(encoder, *parts, class_names=["dark", "bright"], config=config))
    assert found == expected


def test_what_does_not_fit_is_named(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match="probe must be 'lbfgs' or 'adamw'; got 'L-BFGS'"):
        TransferConfig(probe="L-BFGS")  # type: ignore[arg-type]
    parts, names = [made(20, seed) for seed in range(3)], ["dark", "bright"]
    with pytest.raises(ValueError, match="precision must be 'fp32' or 'bf16'; got 'fp16'"):
        evaluate_transfer(encoder, *parts, class_names=names, precision="fp16")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"must give features \[B, D\] .*; got float32 \[20, 1, 64\] for images \[20, 1"
    ):
        evaluate_transfer(nn.Flatten(2), *parts, class_names=names)
    with pytest.raises(ValueError, match=r"must give features \[B, D\] .*; got tuple for images"):
        evaluate_transfer(GaussianEncoder(1, 8, 4, widths=(2,), activated=True), *parts, class_names=names)
    damaged = replace(parts[2], inputs=parts[2].inputs.index_fill(0, torch.tensor([3]), torch.inf))
    with pytest.raises(ValueError, match="gives test features that are not finite"):
        evaluate_transfer(nn.Flatten(), parts[0], parts[1], damaged, class_names=names)
    features = [Labelled(part.inputs.flatten(1), part.targets) for part in parts]
    with pytest.raises(ValueError, match=r"flip needs images \[N, C, H, W\]; got inputs float32 \[20, 64\]"):
        fine_tune(nn.Linear(64, 4), features[0], features[1], 2, replace(FAST, flip=True))
