# SPDX-License-Identifier: MIT
"""k-means by Lloyd's iterations on the kernels of ``nearest``: one pass over the rows assigns them and sums the clusters.

S. Lloyd, Least squares quantization in PCM (1982). D. Arthur and S. Vassilvitskii, k-means++: the advantages of careful seeding (2007).
"""

from __future__ import annotations

import math
import sys
import warnings
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ops._checks import check_matrix, check_real, check_same_device, check_whole, describe
from ..ops.nearest import Assignment, assign, closer_to_candidates, nearest
from ..ops.prototypes import blend_prototypes, update_prototypes
from ..reference.nearest import row_sums

PARAMETERS = ("n_clusters", "init", "n_init", "max_iter", "tol", "random_state")


class _Solution(NamedTuple):
    centers: Tensor  # [K, D]
    labels: Tensor  # [N]
    inertia: float
    iterations: int
    empty: int


class KMeans:
    """Clusters rows so that ``sum_i |x_i - center of i's cluster|^2``, the inertia, is small.

    From ``n_init`` starts by k-means++ (with 2 + log K trials a center, as in scikit-learn) rows go to their nearest
    center, centers to the mean of their rows, until no row changes its cluster or the centers move less than ``tol``
    allows; the start that ends with the least inertia wins. A center without rows moves to the row that is farthest from
    its own. The result depends on ``random_state`` only: not on the number of threads, nor on the order in which sums are
    taken.

    Names and meanings are those of ``sklearn.cluster.KMeans`` as far as they are here; there are no weights of rows, no ``n_init="auto"``
    and no ``init="random"``. Data are tensors, on any device. scikit-learn's tools (``clone``, ``Pipeline``, ``cross_val_score``,
    ``GridSearchCV``) take a model as they take their own; behind a step that gives arrays stands ``FunctionTransformer(torch.from_numpy)``.

    Args:
        n_clusters: K.
        init: ``"k-means++"``, or centers [K, D] to start from, once.
        n_init: number of starts.
        max_iter: iterations of one start, at most.
        tol: stops when the squared movement of all centers is at most ``tol`` times the mean variance of the columns.
        random_state: seed of k-means++.

    Attributes:
        cluster_centers_: [K, D], float64 for float64 data, else float32.
        labels_: [N] int64, cluster of each row of ``fit``.
        inertia_: sum of squared distances to the own center.
        n_iter_: iterations of the best start.

    Example:
        >>> import torch
        >>> from protokernels.cluster import KMeans
        >>> x = torch.tensor([[0.0], [0.2], [9.0], [9.4]])
        >>> model = KMeans(2, random_state=0).fit(x)
        >>> sorted(model.cluster_centers_[:, 0].tolist()), round(model.inertia_, 2)
        ([0.10000000149011612, 9.199999809265137], 0.1)
        >>> bool(model.predict(torch.tensor([[8.0]])) == model.labels_[2])
        True
    """

    cluster_centers_: Tensor
    labels_: Tensor
    inertia_: float
    n_iter_: int

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: str | Tensor = "k-means++",
        n_init: int = 10,
        max_iter: int = 300,
        tol: float = 1e-4,
        random_state: int = 0,
    ) -> None:
        for name, value in (("n_clusters", n_clusters), ("n_init", n_init), ("max_iter", max_iter)):
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise ValueError(f"KMeans: {name} must be a positive integer; got {value!r}")
        check_real("KMeans", "tol", float(tol) if isinstance(tol, np.floating) else tol)
        if not 0 <= tol < math.inf:
            raise ValueError(f"KMeans: tol must be a finite number, not negative; got {tol!r}")
        if not isinstance(init, Tensor) and not (isinstance(init, str) and init == "k-means++"):
            got = repr(init) if isinstance(init, str) else describe(init)
            raise ValueError(f"KMeans: init must be 'k-means++' or a tensor of centers [K, D]; got {got}")
        check_whole("KMeans", "random_state", int(random_state) if isinstance(random_state, Integral) else random_state)
        self.n_clusters, self.init, self.n_init = n_clusters, init, n_init
        self.max_iter, self.tol, self.random_state = max_iter, tol, random_state

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments, as scikit-learn's tools ask for them."""
        return {name: getattr(self, name) for name in PARAMETERS}

    def set_params(self, **params: Any) -> KMeans:
        """Changes arguments of the constructor; what ``fit`` found stays until the next one."""
        if unknown := sorted(params.keys() - set(PARAMETERS)):
            raise ValueError(f"KMeans: unknown parameters {', '.join(unknown)}; known are {', '.join(PARAMETERS)}")
        for name, value in KMeans(**{**self.get_params(), **params}).get_params().items():
            setattr(self, name, value)
        return self

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn, from 1.6 on, wants to know before it fits, scores or searches."""
        sklearn = sys.modules["sklearn.utils"]  # that asks; nothing here needs it otherwise
        transforms = sklearn.TransformerTags(preserves_dtype=["float32", "float64"])
        return sklearn.Tags("clusterer", sklearn.TargetTags(required=False), transforms)

    def __repr__(self) -> str:
        init = self.init if isinstance(self.init, str) else describe(self.init)
        values = {**self.get_params(), "init": init}
        return f"KMeans({', '.join(f'{name}={value!r}' for name, value in values.items())})"

    def fit(self, x: Tensor, y: None = None) -> KMeans:  # [N, D]
        """Finds the centers of ``x``; ``y`` is not looked at.

        Raises:
            TypeError: no floating-point tensor. ValueError: wrong shape, NaN or infinity, fewer rows than clusters, or
                numbers whose squares the type cannot hold.
        """
        x = self._checked("fit", x)
        if len(x) < self.n_clusters:
            raise ValueError(f"KMeans: {self.n_clusters} clusters need as many rows; got {describe(x)}")
        generator = torch.Generator().manual_seed(int(self.random_state))
        threshold = float(self.tol) * _mean_variance(x) if self.tol > 0 else 0.0
        best: _Solution | None = None
        for _ in range(1 if isinstance(self.init, Tensor) else self.n_init):
            found = self._lloyd(x, self._start(x, generator), threshold)
            if best is None or found.inertia < best.inertia:
                best = found
        assert best is not None
        if not math.isfinite(best.inertia) or _vanishes(x, best.inertia):
            raise ValueError(
                f"KMeans: squared distances of these rows are {'less' if math.isfinite(best.inertia) else 'more'} than "
                f"{str(x.dtype).removeprefix('torch.')} can hold; scale x"
                f"{'' if x.dtype == torch.float64 else ', or pass x.double()'}"
            )
        if best.empty:
            stopped = best.inertia > 0 and best.iterations >= self.max_iter
            warnings.warn(
                f"KMeans: {best.empty} of {self.n_clusters} clusters have no rows: "
                + (
                    f"the iterations ended at max_iter = {self.max_iter} before their centers had moved to some; raise max_iter"
                    if stopped
                    else "there are fewer distinct rows than clusters, as far as squared distances tell"
                ),
                RuntimeWarning,
                stacklevel=2,
            )
        self.cluster_centers_, self.labels_ = best.centers, best.labels
        self.inertia_, self.n_iter_ = best.inertia, best.iterations
        return self

    def predict(self, x: Tensor) -> Tensor:  # [N, D] -> [N] int64
        """The cluster of each row: the nearest center, of equally near ones the first."""
        return assign(self._against_centers("predict", x), self.cluster_centers_).labels

    def fit_predict(self, x: Tensor, y: None = None) -> Tensor:  # [N, D] -> [N] int64
        """``fit(x).labels_``."""
        return self.fit(x).labels_

    def fit_transform(self, x: Tensor, y: None = None) -> Tensor:  # [N, D] -> [N, K]
        """``fit(x).transform(x)``."""
        return self.fit(x).transform(x)

    def score(self, x: Tensor, y: None = None) -> float:  # [N, D]
        """Minus the inertia of ``x``, so that more is better."""
        found = assign(self._against_centers("score", x), self.cluster_centers_, with_distances=True)
        assert found.distances is not None
        return -float(row_sums(found.distances[None]))

    def transform(self, x: Tensor) -> Tensor:  # [N, D] -> [N, K]
        """Euclidean distances to every center; float64 if the rows or the centers are."""
        x, centers = self._against_centers("transform", x), self.cluster_centers_
        wide = torch.promote_types(x.dtype, centers.dtype)
        return torch.cdist(x.to(wide), centers.to(wide), compute_mode="donot_use_mm_for_euclid_dist")

    def _checked(self, method: str, x: Tensor) -> Tensor:
        check_matrix(f"KMeans.{method}", "x", x, "[N, D]")
        if x.shape[1] == 0:
            raise ValueError(f"KMeans.{method}: x must have at least one column; got {describe(x)}")
        x = x.detach()
        if x.dtype != torch.float64:
            x = x.float()
        if not bool(x.sum().isfinite() or x.isfinite().all()):  # a finite sum has finite terms only
            raise ValueError(
                f"KMeans.{method}: x holds NaN or infinity; leave those rows out, e.g. x[x.isfinite().all(1)]"
            )
        return x

    def _against_centers(self, method: str, x: Tensor) -> Tensor:
        if not hasattr(self, "cluster_centers_"):
            raise RuntimeError(f"KMeans.{method}: call fit first")
        x, centers = self._checked(method, x), self.cluster_centers_
        check_same_device(f"KMeans.{method}", "x", x, "cluster_centers_", centers)
        if x.shape[1] != centers.shape[1]:
            raise ValueError(f"KMeans.{method}: x must have {centers.shape[1]} columns, as in fit; got {describe(x)}")
        return x

    def _start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        if not isinstance(self.init, Tensor):
            return _k_means_plus_plus(x, self.n_clusters, generator)
        centers = self.init.detach().to(x.device, x.dtype)
        if centers.shape != (self.n_clusters, x.shape[1]) or not bool(centers.isfinite().all()):
            raise ValueError(
                f"KMeans: init must hold finite centers [{self.n_clusters}, {x.shape[1]}]; got {describe(self.init)}"
            )
        return centers

    def _lloyd(self, x: Tensor, centers: Tensor, threshold: float) -> _Solution:
        labels, iterations, least = None, 0, math.inf
        while True:
            found = assign(x, centers, with_sums=True)
            before, labels = labels, found.labels
            iterations += 1
            if before is None or not torch.equal(before, labels):
                moved = _means(x, centers, found)
                settled = float((moved.double() - centers.double()).square().sum()) <= threshold
                centers = moved
                if iterations < self.max_iter and not settled:
                    continue
                found = assign(x, centers, with_distances=True)  # the rows' clusters among the centers as they are now
            solution = _solution(x, centers, found, iterations)
            # A center without rows while some row is off its own has yet to move there; least: so that rounding makes no endless round
            if not (solution.empty and 0 < solution.inertia < least and iterations < self.max_iter):
                return solution
            labels, least = None, solution.inertia


def _mean_variance(x: Tensor) -> float:
    """The mean of the variances of the columns: the squared distances from the mean row, over all entries."""
    if x.numel() == 0:
        return 0.0
    everything = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    mean = update_prototypes(torch.zeros_like(x[:1]), x, everything, new_weight=1.0).prototypes
    return float(row_sums(nearest(x, mean, 1).distances.T)) / x.numel()


def _vanishes(x: Tensor, inertia: float) -> bool:
    """Whether even the squared distances across all rows are below the normal numbers, though rows differ."""
    tiny = torch.finfo(x.dtype).tiny
    if inertia >= tiny * x.numel():
        return False
    extent = float((x.amax(0).double() - x.amin(0).double()).max())
    return 0 < extent < math.sqrt(tiny)


def _solution(x: Tensor, centers: Tensor, found: Assignment, iterations: int) -> _Solution:
    empty = len(centers) - int((torch.bincount(found.labels, minlength=len(centers)) > 0).sum())
    return _Solution(centers, found.labels, float(row_sums(_distances(x, centers, found)[None])), iterations, empty)


def _distances(x: Tensor, centers: Tensor, found: Assignment) -> Tensor:  # [N]
    if found.distances is None:
        found = assign(x, centers, with_distances=True)
    assert found.distances is not None
    return found.distances


def _means(x: Tensor, centers: Tensor, found: Assignment) -> Tensor:
    """The mean of each cluster; one without rows takes the row that is farthest from its own center."""
    assert found.sums is not None and found.counts is not None
    empty = (found.counts == 0).nonzero()[:, 0]
    if len(empty) == 0:
        return blend_prototypes(centers, found.sums, found.counts, new_weight=1.0)
    distances = _distances(x, centers, found)
    far = distances.sort(descending=True, stable=True).indices[: len(empty)]
    far = far[distances[far] > 0]  # rows on their own center are no use anywhere else
    labels = found.labels.clone()
    labels[far] = empty[: len(far)]
    return update_prototypes(centers, x, labels, new_weight=1.0).prototypes


def _k_means_plus_plus(x: Tensor, count: int, generator: torch.Generator) -> Tensor:  # [N, D] -> [count, D]
    """Rows drawn in proportion to their squared distance from those drawn before; of a few draws the one that lowers the sum most."""
    trials = 2 + int(math.log(count))
    chosen = [int(torch.randint(len(x), (1,), generator=generator, device="cpu"))]
    closest = closer_to_candidates(x, x[chosen], x.new_full((len(x),), math.inf))[0][0]
    for _ in range(count - 1):
        cumulative = closest.cumsum(0, dtype=torch.float64)
        shares = torch.rand(trials, generator=generator, dtype=torch.float64, device="cpu")
        draws = shares.to(x.device) * cumulative[-1]
        candidates = torch.searchsorted(cumulative, draws, right=True).clamp(max=len(x) - 1)
        closer, totals = closer_to_candidates(x, x[candidates], closest)
        best = int(totals.argmin())
        closest = closer[best]
        chosen.append(int(candidates[best]))
    return x[chosen]
