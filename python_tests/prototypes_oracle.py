# SPDX-License-Identifier: MIT
"""The equations of the op `prototypes` in NumPy float64, and how far rounding may take a right answer from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NORM_FLOOR = 1e-12


# (B, K, D): one, two, a vector's width less and more than one, several tiles with a remainder, wide K and D
SIZES = [
    (1, 1, 1), (2, 1, 3), (1, 2, 31), (31, 33, 2), (33, 31, 33), (129, 2, 129), (129, 129, 31), (300, 10, 32),
    (2, 600, 5), (3, 7, 600), (40, 520, 530),
]  # fmt: skip


def draw(B: int, K: int, D: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Embeddings [B, D] of lengths that differ by e^3 and prototypes [K, D]."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(B, D, generator=generator) * torch.rand(B, 1, generator=generator).mul(3).exp()
    return z.to(dtype), torch.randn(K, D, generator=generator).to(dtype)


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def as_numpy(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


def rounding(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Error of storing float64 values as `dtype`; half precision may be reached through float32, which rounds twice."""
    return np.asarray(unit_roundoff(dtype) * (1 + 2.0**-10) * (np.abs(values) + torch.finfo(dtype).smallest_normal))


def compare(actual: Tensor, expected: np.ndarray, error: np.ndarray) -> None:
    """`actual` is `expected` up to `error`, stored in its own type."""
    assert actual.shape == expected.shape
    allowed = error + rounding(np.abs(expected) + error, actual.dtype)
    difference = np.abs(as_numpy(actual) - expected)
    assert (difference <= allowed).all(), f"error up to {(difference / allowed).max():.2f} times what rounding explains"


@dataclass(frozen=True)
class Oracle:
    """c, H and the scores in float64, and how far a result computed in the compute type may be from them."""

    scores: np.ndarray  # [B, K]
    assignment: np.ndarray  # [B, K]
    entropy: np.ndarray  # [B]
    score_error: np.ndarray  # [B, 1], absolute
    relative_error: np.ndarray  # [B, 1], of c
    assignment_error: np.ndarray  # [B, K], absolute
    entropy_error: np.ndarray  # [B], absolute

    def check_assignment(self, c: Tensor) -> None:
        compare(c, self.assignment, self.assignment_error)

    def check_entropy(self, entropy: Tensor) -> None:
        compare(entropy, self.entropy, self.entropy_error)

    def check_labels(self, labels: Tensor) -> None:
        """The most similar prototype, wherever rounding can tell it from the others."""
        assert labels.dtype == torch.int64
        chosen = labels.cpu().numpy()
        best = self.scores.max(axis=1)
        reached = np.take_along_axis(self.scores, chosen[:, None], axis=1)[:, 0]
        assert (best - reached <= 2 * self.score_error[:, 0]).all()
        second = np.sort(self.scores, axis=1)[:, -2] if self.scores.shape[1] > 1 else best - np.inf
        clear = best - second > 2 * self.score_error[:, 0]
        np.testing.assert_array_equal(chosen[clear], self.scores.argmax(axis=1)[clear])


def unit(x: np.ndarray) -> np.ndarray:
    norm = np.sqrt((x * x).sum(axis=1, keepdims=True))
    return np.where(norm <= NORM_FLOOR, 0.0, x / np.where(norm <= NORM_FLOOR, 1.0, norm))


def oracle(z: Tensor, prototypes: Tensor, temperature: float, similarity: str) -> Oracle:
    """The definition, on the values that the tensors hold.

    With u the unit roundoff of the compute type (2^-24 or 2^-53), M the largest sum_d |z_d q_d| of a row:

    * a score: at most 4 u from scaling both vectors, D u from the sum, 4 u from the temperature and the shift by the
      maximum, relative to M / temperature. Written as (D + 16) u: it leaves room for products in three TF32 parts,
      whose error is below 2^-22.
    * c = exp(s) / sum exp(s): errors d of the scores change log c by at most 2 d; exp, the sum of K terms and the
      division add (K + 16) u, a logarithm taken on the way 4 u log K. What is below the smallest normal number may be
      flushed to zero.
    * H: |dH| <= sum c |log c + H| d <= 2 d log K; its own sums add (K + 16) u of terms no larger than log K each.
    """
    x, q = as_numpy(z), as_numpy(prototypes)
    if similarity == "cosine":
        x, q = unit(x), unit(q)
    (_, D), K = x.shape, q.shape[0]
    dtype = compute_dtype(z, prototypes)
    u = unit_roundoff(dtype)
    scores = x @ q.T / temperature
    largest = (np.abs(x) @ np.abs(q).T).max(axis=1, keepdims=True) / temperature
    shifted = scores - scores.max(axis=1, keepdims=True)
    log_c = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    c = np.exp(log_c)
    entropy = -(c * log_c).sum(axis=1)
    score_error = (D + 16) * u * largest
    relative = np.expm1(2 * score_error) + (K + 16 + 4 * np.log(K)) * u
    floor = 2 * torch.finfo(dtype).tiny
    entropy_error = 2 * np.log(K) * (score_error[:, 0] + (K + 16) * u) + 4 * u
    return Oracle(scores, c, entropy, score_error, relative, c * relative + floor, entropy_error)


def plain_soft_assign(z: Tensor, prototypes: Tensor, temperature: Tensor, similarity: str) -> tuple[Tensor, Tensor]:
    """c [B, K] and H [B] for vectors that are not zero, as a reader would write them; autograd differentiates it."""
    if similarity == "cosine":
        z, prototypes = z / z.norm(dim=1, keepdim=True), prototypes / prototypes.norm(dim=1, keepdim=True)
    s = z @ prototypes.T / temperature
    return s.softmax(dim=1), -(s.softmax(dim=1) * s.log_softmax(dim=1)).sum(dim=1)


def gradient_errors(
    z: Tensor,  # [B, D]
    prototypes: Tensor,  # [K, D]
    temperature: float,
    similarity: str,
    grad_assignment: Tensor,  # [B, K]
    grad_entropy: Tensor,  # [B]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How far the gradients of z, prototypes and temperature may be from float64, by elements.

    A worst case would be hundreds of times what happens, so the errors are taken as independent with mean zero (Higham and Mary,
    "A new approach to probabilistic rounding error analysis", 2019): squares add, a sum of n terms errs by sqrt(n) u. That is
    sqrt(D) + sqrt(K) + 8 roundings in c, relative to the longest score, and sqrt(B) more in the sums over the batch; each term of the
    backward formula carries them. Four standard deviations are allowed.
    """
    truth = oracle(z, prototypes, temperature, similarity)
    x, q = as_numpy(z), as_numpy(prototypes)
    x_norm, q_norm = np.linalg.norm(x, axis=1, keepdims=True), np.linalg.norm(q, axis=1, keepdims=True)
    if similarity == "cosine":
        x, q = x / x_norm, q / q_norm
    g, h, c = as_numpy(grad_assignment), as_numpy(grad_entropy)[:, None], truth.assignment
    log_c = np.log(np.maximum(c, 1e-300))
    ds = c**2 * (g**2 + (c * g**2).sum(axis=1, keepdims=True) + h**2 * (log_c**2 + truth.entropy[:, None] ** 2 + 1))
    to_z, to_q = ds @ q**2 / temperature**2, ds.T @ x**2 / temperature**2
    to_temperature = (ds * (x**2 @ (q**2).T)).sum() / temperature**4
    if similarity == "cosine":
        to_z = (to_z + x**2 * to_z.sum(axis=1, keepdims=True)) / x_norm**2
        to_q = (to_q + q**2 * to_q.sum(axis=1, keepdims=True)) / q_norm**2
    longest = max(1.0, float((np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(q, axis=1)).max()) / temperature)
    roundings = np.sqrt(x.shape[1]) + np.sqrt(c.shape[1]) + 8
    u = unit_roundoff(compute_dtype(z, prototypes))
    row, column = 4 * u * roundings * longest, 4 * u * (roundings * longest + np.sqrt(len(x)))
    return row * np.sqrt(to_z), column * np.sqrt(to_q), column * np.sqrt(to_temperature)


def expected_sums(z: Tensor, labels: Tensor, K: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums [K, D] and counts [K] of the rows with labels in [0, K), one row after the other."""
    chosen = labels.cpu().numpy()
    kept = (chosen >= 0) & (chosen < K)
    sums = np.zeros((K, z.shape[1]))
    np.add.at(sums, chosen[kept], as_numpy(z)[kept])
    return sums, np.bincount(chosen[kept], minlength=K)


def check_update(
    prototypes: Tensor, z: Tensor, labels: Tensor, new_weight: float, updated: Tensor, counts: Tensor
) -> None:
    """The moving average: sums in float64 in any order, one rounding to the prototypes' type, empty clusters kept."""
    K = prototypes.shape[0]
    sums, expected_counts = expected_sums(z, labels, K)
    magnitudes, _ = expected_sums(z.abs(), labels, K)
    np.testing.assert_array_equal(counts.cpu().numpy(), expected_counts)
    n = np.maximum(expected_counts, 1)[:, None]
    old = as_numpy(prototypes)
    blended = np.where(expected_counts[:, None] > 0, new_weight * sums / n + (1 - new_weight) * old, old)
    double = (len(labels) + 8) * 2.0**-53 * (new_weight * magnitudes / n + (1 - new_weight) * np.abs(old))
    assert updated.dtype == prototypes.dtype
    compare(updated, blended, double)
    empty = torch.from_numpy(expected_counts == 0)
    assert torch.equal(updated.cpu()[empty], prototypes.cpu()[empty])
