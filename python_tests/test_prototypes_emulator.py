# SPDX-License-Identifier: MIT
"""The CUDA kernels of `prototypes`, run on the CPU by the emulator and compared with the float64 reference.

Every case runs under several seeds (orders of threads and blocks) with memory watched: a missing barrier, a race, a
read before a write or an
access out of bounds fails here without a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from protokernels.reference import prototypes as reference

from .emulator.build import SEEDS, load, missing_tools, poisoned

pytestmark = pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))

KINDS = {"f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16}
# (B, D, K): odd sizes, one row, one prototype, several tiles, no rows; sums on the way (K D <= 1024) and from labels;
# every number of fragments; K and D too large for shared memory, K too large for scores in shared memory
SHAPES = [
    (1, 1, 1), (2, 31, 2), (33, 33, 31), (129, 32, 10), (65, 7, 130), (70, 260, 5), (0, 4, 3), (0, 40, 30),
    (50, 40, 45), (35, 16, 100), (37, 20, 190), (33, 130, 250), (20, 5, 400), (18, 600, 100),
]  # fmt: skip

# (B, D, K): odd sizes, no rows, one of everything; every kernel: K <= 64 with D <= 64 and not, K <= 128, K <= 256
BACKWARD_SHAPES = [
    (1, 1, 1), (70, 33, 31), (129, 64, 64), (37, 100, 10), (0, 5, 3), (40, 128, 100), (35, 17, 130), (66, 126, 256),
]  # fmt: skip


def as_numpy(x: torch.Tensor) -> np.ndarray[Any, Any]:
    x = x.contiguous()
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


class Case:
    """Inputs of one case, its run in the emulator and its oracle in float64."""

    def __init__(
        self, kind: str, shape: tuple[int, int, int], similarity: str, *, sample: bool = False, stride: int = 0
    ) -> None:
        B, D, K = shape
        generator = torch.Generator().manual_seed(B * 1000 + D * 10 + K)
        self.kind, self.similarity, self.K, self.D, self.B = kind, similarity, K, D, B
        self.compute = torch.float64 if kind == "f64" else torch.float32
        self.stride = D + stride
        self.storage = torch.randn(B, self.stride, generator=generator, dtype=torch.float64).to(KINDS[kind])
        self.z = self.storage[:, :D]
        self.prototypes = torch.randn(K, D, generator=generator, dtype=torch.float64).to(self.compute)
        self.uniform = torch.rand(B, generator=generator) if sample else None
        self.temperature = 0.3

    def run(
        self, emulator: Any, *, skip_nonfinite: bool = False, temperature_on_device: bool = False
    ) -> dict[str, np.ndarray[Any, Any]]:
        compute = np.float64 if self.kind == "f64" else np.float32
        out = {
            "assignment": poisoned((self.B, self.K), compute),
            "labels": poisoned((self.B,), np.int64),
            "entropy": poisoned((self.B,), compute),
            "sums": poisoned((self.K, self.D), np.float64),
            "counts": poisoned((self.K,), np.int64),
            "updated": poisoned((self.K, self.D), compute),
        }
        getattr(emulator, f"forward_{self.kind}")(
            as_numpy(self.storage),
            self.B,
            self.stride,
            as_numpy(self.prototypes),
            np.array([self.temperature], compute) if temperature_on_device else None,
            1.0 if temperature_on_device else self.temperature,
            self.similarity == "cosine",
            None if self.uniform is None else self.uniform.numpy(),
            skip_nonfinite,
            out["assignment"],
            out["labels"],
            out["entropy"],
            out["sums"],
            out["counts"],
            0.95,
            out["updated"],
        )
        return out

    def check(self, out: dict[str, np.ndarray[Any, Any]]) -> None:
        z, q = self.z.double(), self.prototypes.double()
        c, _, entropy = reference.soft_assign(z, q, self.temperature, self.similarity)
        # float32: scores are exact to a few units in the last place of sum |z_d q_d| / temperature (three tf32
        # products drop low x low, 2^-22)
        magnitude = 1.0 if self.similarity == "cosine" else float((z.abs() @ q.abs().T).max()) if self.B else 1.0
        tolerance = 1e-13 * (1 + magnitude) if self.kind == "f64" else 2.0**-20 * (1 + magnitude) / self.temperature
        np.testing.assert_allclose(out["assignment"], c, rtol=0, atol=tolerance)
        np.testing.assert_allclose(out["entropy"], entropy, rtol=0, atol=tolerance * np.log(self.K + 1) * 2)
        if self.uniform is None:
            chosen = c.gather(1, torch.from_numpy(out["labels"])[:, None])[:, 0]
            assert (
                bool((chosen >= c.max(-1).values - 2 * tolerance).all()) if self.B else True
            )  # the argmax, but for ties within rounding
        # labels may differ from the oracle's in near-ties, so the update is checked against the labels that were chosen
        sums, counts = reference.accumulate(z, torch.from_numpy(out["labels"]), self.K, False)
        np.testing.assert_array_equal(out["counts"], counts)
        scale = float(z.abs().sum(0).max()) if self.B else 1.0
        np.testing.assert_allclose(out["sums"], sums, rtol=0, atol=4e-15 * scale)
        expected = reference.blend(q, torch.from_numpy(out["sums"]), counts, 0.95)
        # two terms that may cancel: the error is one rounding of each, and of the result
        atol = (2.0**-52 if self.kind == "f64" else 2.0**-24) * float(
            q.abs().max() + (sums.abs() / counts.clamp(min=1)[:, None]).max()
        )
        np.testing.assert_allclose(
            out["updated"], expected, rtol=2.0**-23 if self.kind != "f64" else 2.0**-52, atol=atol
        )


class TestForward:
    @pytest.mark.parametrize("similarity", ["cosine", "dot"])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("kind", ["f32", "f64"])
    def test_matches_float64_reference(self, kind: str, shape: tuple[int, int, int], similarity: str) -> None:
        emulator = load("prototypes")
        case = Case(kind, shape, similarity)
        first = None
        for seed in SEEDS[:2]:
            emulator.configure(seed=seed)
            out = case.run(emulator)
            case.check(out)
            first = first or out
            for name, value in out.items():
                np.testing.assert_array_equal(value, first[name], err_msg=f"{name} depends on the order of threads")

    @pytest.mark.parametrize("shape", [(67, 35, 12), (35, 64, 17), (20, 5, 400)])
    @pytest.mark.parametrize("kind", ["f16", "bf16"])
    def test_half_precision_rows(self, kind: str, shape: tuple[int, int, int]) -> None:
        emulator = load("prototypes")
        emulator.configure(seed=3)
        case = Case(kind, shape, "cosine")
        case.check(case.run(emulator))

    def test_row_stride_and_temperature_on_device(self) -> None:
        emulator = load("prototypes")
        emulator.configure(seed=1)
        case = Case("f32", (40, 17, 9), "dot", stride=5)
        case.check(case.run(emulator, temperature_on_device=True))

    @pytest.mark.parametrize("shape", [(16 * 264 * 8 + 70, 3, 4), (16 * 132 * 8 + 70, 8, 129)])
    def test_a_warp_takes_several_tiles(self, shape: tuple[int, int, int]) -> None:
        emulator = load("prototypes")
        case = Case("f32", shape, "cosine")
        case.check(case.run(emulator))

    @pytest.mark.parametrize(("kind", "K"), [("f32", 300), ("f64", 150)])
    def test_where_a_block_has_little_shared_memory(self, kind: str, K: int) -> None:
        """Scores and tiles together are more than the 99 KB of compute capability 8.9: scores wait in the output."""
        emulator = load("prototypes")
        emulator.configure(architecture="sm_89")
        case = Case(kind, (20, 5, K), "cosine")
        case.check(case.run(emulator))
        emulator.configure()

    def test_all_seeds_agree_bit_for_bit(self) -> None:
        emulator = load("prototypes")
        case = Case("f32", (200, 40, 20), "cosine")
        outputs = []
        for seed in SEEDS:
            emulator.configure(seed=seed)
            outputs.append(case.run(emulator))
        for out in outputs[1:]:
            for name, value in out.items():
                np.testing.assert_array_equal(value, outputs[0][name])

    def test_sampling_follows_the_inverse_distribution_function(self) -> None:
        emulator = load("prototypes")
        emulator.configure(seed=2)
        case = Case("f64", (129, 6, 70), "cosine", sample=True)
        out = case.run(emulator)
        case.check(out)
        assert case.uniform is not None
        c = torch.from_numpy(out["assignment"])
        np.testing.assert_array_equal(out["labels"], reference.sample_labels(c, case.uniform))

    @pytest.mark.parametrize("shape", [(129, 6, 70), (40, 6, 10)])
    def test_sampling_from_float32_weights(self, shape: tuple[int, int, int]) -> None:
        emulator = load("prototypes")
        emulator.configure(seed=2)
        case = Case("f32", shape, "cosine", sample=True)
        out = case.run(emulator)
        case.check(out)
        assert case.uniform is not None
        cumulative = torch.from_numpy(out["assignment"]).double().cumsum(1)
        label, u = torch.from_numpy(out["labels"])[:, None], case.uniform.double()
        after = cumulative.gather(1, label)[:, 0]
        before = torch.where(label[:, 0] > 0, cumulative.gather(1, (label - 1).clamp(min=0))[:, 0], 0.0)
        rounding = 2.0**-23 * (shape[2] + 16)  # of the sum, the cumulative sums and the threshold
        assert bool(((before <= u + rounding) & (u <= after + rounding)).all())

    def test_rows_of_any_length(self) -> None:
        emulator = load("prototypes")
        for similarity, exponents in (("cosine", (-120, -36, 0, 60, 120)), ("dot", (-140, -60, 0, 5))):
            case = Case("f32", (40, 19, 20), similarity)
            scale = torch.tensor(exponents, dtype=torch.float64)[torch.arange(40) % len(exponents)]
            case.storage[:] = (case.storage.double() * 2.0 ** scale[:, None]).float()
            out = case.run(emulator)
            c, _, _ = reference.soft_assign(case.z.double(), case.prototypes.double(), case.temperature, similarity)
            largest = (case.z.double().abs() @ case.prototypes.double().abs().T).max(1, keepdim=True).values
            error = 2.0**-20 * (1 + (1.0 if similarity == "cosine" else largest)) / case.temperature
            assert bool(((torch.from_numpy(out["assignment"]) - c).abs() <= error).all())

    def test_sampling_never_returns_an_impossible_label(self) -> None:
        emulator = load("prototypes")
        case = Case("f32", (64, 4, 40), "cosine", sample=True)
        case.temperature = 1e-3
        case.uniform = torch.full((64,), 1 - 2.0**-24)
        out = case.run(emulator)
        assert bool((torch.from_numpy(out["assignment"]).gather(1, torch.from_numpy(out["labels"])[:, None]) > 0).all())

    def test_zero_rows_and_nan_rows(self) -> None:
        emulator = load("prototypes")
        emulator.configure(seed=1)
        case = Case("f32", (70, 12, 7), "cosine")
        case.storage[3] = 0
        case.storage[5, 2] = float("nan")
        for skip in (False, True):
            out = case.run(emulator, skip_nonfinite=skip)
            np.testing.assert_allclose(out["assignment"][3], 1 / 7, rtol=1e-6)
            assert np.isnan(out["assignment"][5]).all()
            clean = np.delete(out["assignment"], 5, axis=0)
            assert np.isfinite(clean).all()
            assert out["labels"][5] == (-1 if skip else 0)
            poisoned_clusters = np.isnan(out["updated"]).any(axis=1)
            assert poisoned_clusters.tolist() == [not skip] + [False] * 6
            assert out["counts"].sum() == (69 if skip else 70)

    def test_ties_take_the_lowest_index(self) -> None:
        emulator = load("prototypes")
        case = Case("f32", (40, 8, 45), "cosine")
        case.prototypes[:] = case.prototypes[:1]
        assert (case.run(emulator)["labels"] == 0).all()

    def test_empty_cluster_keeps_its_prototype(self) -> None:
        emulator = load("prototypes")
        case = Case("f32", (10, 4, 30), "cosine")
        out = case.run(emulator)
        empty = out["counts"] == 0
        assert empty.any()
        np.testing.assert_array_equal(out["updated"][empty], case.prototypes.numpy()[empty])


class TestBackward:
    @staticmethod
    def run(
        emulator: Any, case: Case, grad_c: torch.Tensor, grad_h: torch.Tensor | None, c: torch.Tensor
    ) -> dict[str, np.ndarray[Any, Any]]:
        out = {
            "z": poisoned((case.B, case.D), np.float32),
            "prototypes": poisoned((case.K, case.D), np.float32),
            "temperature": poisoned((1,), np.float32),
        }
        if case.kind != "f32":
            out["z"] = np.full((case.B, case.D), 0x7FFF, np.uint16)
            out["z"] = out["z"] if case.kind == "bf16" else out["z"].view(np.float16)
        getattr(emulator, f"backward_{case.kind}")(
            grad_c.numpy(),
            None if grad_h is None else grad_h.numpy(),
            c.numpy(),
            as_numpy(case.storage),
            case.B,
            case.stride,
            as_numpy(case.prototypes),
            case.temperature,
            case.similarity == "cosine",
            out["z"],
            out["prototypes"],
            out["temperature"],
        )
        return out

    @classmethod
    def check(cls, case: Case, *, with_entropy: bool, seeds: tuple[int, ...] = (0, 1)) -> None:
        emulator = load("prototypes")
        generator = torch.Generator().manual_seed(7)
        grad_c = torch.randn(case.B, case.K, generator=generator)
        grad_h = torch.randn(case.B, generator=generator) if with_entropy else None
        z, q = case.z.double().requires_grad_(), case.prototypes.double().requires_grad_()
        temperature = torch.tensor(case.temperature, dtype=torch.float64, requires_grad=True)
        c, _, entropy = reference.soft_assign(z, q, temperature, case.similarity)
        loss = (c * grad_c).sum() + ((entropy * grad_h).sum() if grad_h is not None else 0.0)
        expected = torch.autograd.grad(loss, (z, q, temperature))
        first = None
        for seed in seeds:
            emulator.configure(seed=seed)
            out = cls.run(emulator, case, grad_c, grad_h, c.detach().float())
            first = first or out
            for (name, value), truth in zip(out.items(), expected, strict=True):
                np.testing.assert_array_equal(value, first[name], err_msg=f"{name} depends on the order of threads")
                got = torch.from_numpy(value.view(np.float32) if name != "z" or case.kind == "f32" else value)
                if name == "z" and case.kind == "bf16":
                    got = got.view(torch.bfloat16)
                error = 2.0**-19 if name != "z" or case.kind == "f32" else 2.0**-8
                scale = float(truth.abs().max()) if truth.numel() else 1.0
                if name == "temperature":  # a sum of terms that cancel
                    upstream = grad_c.abs() + (0 if grad_h is None else 2 * grad_h.abs()[:, None] * np.log(case.K + 1))
                    longest = (
                        float((z.norm(dim=1)[:, None] * q.norm(dim=1)).max())
                        if case.similarity == "dot" and case.B
                        else 1.0
                    )
                    scale = float((c * upstream).sum()) * longest / case.temperature**2
                np.testing.assert_allclose(
                    got.double().reshape(truth.shape), truth, rtol=error, atol=error * max(scale, 1e-3), err_msg=name
                )

    @pytest.mark.parametrize("similarity", ["cosine", "dot"])
    @pytest.mark.parametrize("shape", BACKWARD_SHAPES, ids=str)
    def test_matches_float64_reference(self, shape: tuple[int, int, int], similarity: str) -> None:
        case = Case("f32", shape, similarity)
        if similarity == "dot":
            case.temperature = 3.0
        self.check(case, with_entropy=shape[0] % 2 == 1)

    @pytest.mark.parametrize("kind", ["f16", "bf16"])
    def test_half_precision_rows(self, kind: str) -> None:
        self.check(Case(kind, (70, 36, 20), "cosine"), with_entropy=True)

    def test_row_stride(self) -> None:
        self.check(Case("f32", (40, 17, 9), "cosine", stride=5), with_entropy=False)

    def test_a_block_takes_several_tiles_and_stages(self) -> None:
        self.check(Case("f32", (64 * 132 * 2 + 70, 8, 6), "cosine"), with_entropy=True, seeds=(0,))

    def test_a_zero_row_and_a_zero_prototype_have_no_gradient(self) -> None:
        emulator = load("prototypes")
        case = Case("f32", (20, 12, 7), "cosine")
        case.storage[3], case.prototypes[2] = 0, 0
        c, _, _ = reference.soft_assign(case.z.double(), case.prototypes.double(), case.temperature, "cosine")
        out = self.run(emulator, case, torch.randn(20, 7), None, c.float())
        assert not out["z"][3].any() and not out["prototypes"][2].any()
        assert all(np.isfinite(value).all() for value in out.values())


class TestAccumulate:
    @pytest.mark.parametrize("kind", list(KINDS))
    def test_matches_reference(self, kind: str) -> None:
        emulator = load("prototypes")
        generator = torch.Generator().manual_seed(5)
        z = torch.randn(150, 21, generator=generator).to(KINDS[kind])
        z[7, 3] = float("nan")
        labels = torch.randint(-1, 6, (150,), generator=generator)
        labels[7] = 2
        for seed, skip in ((0, False), (1, True)):
            emulator.configure(seed=seed)
            sums, counts = poisoned((6, 21), np.float64), poisoned((6,), np.int64)
            getattr(emulator, f"accumulate_{kind}")(as_numpy(z), labels.numpy(), 21, 21, skip, sums, counts)
            expected, expected_counts = reference.accumulate(z, labels, 6, skip)
            np.testing.assert_array_equal(counts, expected_counts)
            np.testing.assert_allclose(sums, expected, rtol=0, atol=1e-13)
            assert np.isnan(sums[2]).any() == (not skip)

    @pytest.mark.parametrize(
        ("B", "K", "D", "share"),
        [(9000, 300, 3, 0.0), (2000, 700, 18, 0.9), (5000, 3, 5, 0.0), (700, 2, 4, 0.999), (130, 40, 33, 0.0)],
        ids=["sorted three times", "three ranges of clusters", "many chunks", "one cluster", "few rows"],
    )
    def test_chunks_segments_and_ranges(self, B: int, K: int, D: int, share: float) -> None:
        emulator = load("prototypes")
        generator = torch.Generator().manual_seed(B)
        z = torch.randn(B, D, generator=generator)
        labels = torch.randint(-1, K, (B,), generator=generator)
        labels[torch.rand(B, generator=generator) < share] = K - 1
        first = None
        for seed in SEEDS[:2]:
            emulator.configure(seed=seed)
            sums, counts = poisoned((K, D), np.float64), poisoned((K,), np.int64)
            emulator.accumulate_f32(as_numpy(z), labels.numpy(), D, D, False, sums, counts)
            expected, expected_counts = reference.accumulate(z, labels, K, False)
            np.testing.assert_array_equal(counts, expected_counts)
            np.testing.assert_allclose(sums, expected, rtol=0, atol=2e-16 * float(z.abs().sum()))
            first = sums if first is None else first
            np.testing.assert_array_equal(sums, first)

    def test_label_too_large_traps(self) -> None:
        emulator = load("prototypes")
        z, labels = np.ones((3, 2), np.float32), np.array([0, 2, 1])
        with pytest.raises(emulator.EmulatorError):
            emulator.accumulate_f32(z, labels, 2, 2, False, poisoned((2, 2), np.float64), poisoned((2,), np.int64))


class TestBlend:
    @pytest.mark.parametrize("kind", list(KINDS))
    def test_matches_reference(self, kind: str) -> None:
        emulator = load("prototypes")
        generator = torch.Generator().manual_seed(6)
        q = torch.randn(9, 33, generator=generator).to(KINDS[kind])
        sums, counts = torch.randn(9, 33, generator=generator, dtype=torch.float64), torch.arange(9)
        updated = np.empty_like(as_numpy(q))
        getattr(emulator, f"blend_{kind}")(as_numpy(q), sums.numpy(), counts.numpy(), 0.9, updated)
        expected = as_numpy(reference.blend(q, sums, counts, 0.9))
        if kind in ("f32", "f64"):
            np.testing.assert_allclose(updated, expected, rtol=1e-6 if kind == "f32" else 1e-14)
        else:  # the last bit may differ: sum * (w / n) here, (sum / n) * w there
            assert np.abs(updated.view(np.int16).astype(int) - expected.view(np.int16).astype(int)).max() <= 1
