# SPDX-License-Identifier: MIT
"""How many clusters: the elbow of the inertia by the kneedle criterion.

V. Satopää, J. Albrecht, D. Irwin, B. Raghavan. Finding a "kneedle" in a haystack: detecting knee points in system
behavior. ICDCS workshops 2011.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor

from ..ops._checks import check_real, check_whole, describe
from .kmeans import KMeans


class Elbow(NamedTuple):
    """What ``choose_n_clusters`` returns."""

    n_clusters: tuple[int, ...]
    inertias: tuple[float, ...]
    chosen: int
    """The elbow, or the fallback."""
    found: bool
    """Whether there is an elbow."""
    model: KMeans
    """Of the chosen number."""


def find_elbow(n_clusters: Sequence[int], inertias: Sequence[float], *, sensitivity: float = 1.0) -> int | None:
    """The number of clusters from which on more of them lower the inertia no more than on the whole.

    Both axes are stretched to [0, 1]; the elbow is the first point whose distance ``(1 - y) - x`` from the diagonal is a
    local maximum and from which it falls by ``sensitivity`` mean steps of x before the next one; behind a local minimum
    that it falls below 0 is enough (kneedle, for a convex decreasing curve).

    Args:
        n_clusters: at least three whole numbers, ascending.
        inertias: as many, finite.
        sensitivity: S of the criterion; larger ones ask for a clearer elbow.

    Returns:
        One of ``n_clusters``, or None where the curve has no elbow.

    Raises:
        TypeError: no sequences of numbers. ValueError: lengths differ, fewer than three points, not whole, not ascending, not
        finite.

    Example:
        >>> from protokernels.cluster import find_elbow
        >>> find_elbow([2, 3, 4, 5, 6], [100.0, 40.0, 10.0, 8.0, 7.0])
        4
    """
    n_clusters, inertias = _listed(n_clusters), _listed(inertias)
    for name, values in (("n_clusters", n_clusters), ("inertias", inertias)):
        if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
            raise TypeError(f"find_elbow: {name} must be a sequence of numbers; got {describe(values)}")
        for value in values:
            check_real("find_elbow", f"every one of {name}", value)
    check_real("find_elbow", "sensitivity", sensitivity)
    x, y = [float(n) for n in n_clusters], [float(value) for value in inertias]
    if len(x) != len(y) or len(x) < 3:
        raise ValueError(f"find_elbow: expected at least three points, as many of each; got {len(x)} and {len(y)}")
    if not all(n.is_integer() for n in x):
        raise ValueError(f"find_elbow: n_clusters must be whole numbers; got {list(n_clusters)}")
    if any(b <= a for a, b in pairwise(x)):
        raise ValueError(f"find_elbow: n_clusters must ascend; got {list(n_clusters)}")
    if not all(map(math.isfinite, y)):
        raise ValueError(f"find_elbow: inertias must be finite; got {list(inertias)}")
    low, high = min(y), max(y)
    if high == low:
        return None
    apart = [(high - b) / (high - low) - (a - x[0]) / (x[-1] - x[0]) for a, b in zip(x, y, strict=True)]
    fall = sensitivity / (len(x) - 1)  # the mean step of x
    inner = range(1, len(x) - 1)
    peaks = {i for i in inner if apart[i] >= apart[i - 1] and apart[i] >= apart[i + 1]}
    troughs = {i for i in inner if apart[i] <= apart[i - 1] and apart[i] <= apart[i + 1]}
    peak, threshold = -1, float("-inf")
    for i in inner:
        if i in peaks:
            peak, threshold = i, apart[i] - fall
        elif i in troughs:
            threshold = 0.0
        if peak >= 0 and apart[i + 1] < threshold:
            return int(n_clusters[peak])
    return None


def choose_n_clusters(
    x: Tensor,  # [N, D]
    candidates: Sequence[int],
    *,
    fallback: int | None = None,
    **options: Any,
) -> Elbow:
    """Fits ``KMeans`` with each of the candidates and chooses the elbow of the inertia.

    Args:
        x: the rows to cluster.
        candidates: numbers of clusters, ascending.
        fallback: what to choose where there is no elbow; default: the middle one of the candidates.
        options: of ``KMeans``.

    Returns:
        Candidates and inertias, the chosen number, whether there was an elbow, and the ``KMeans`` of that number.

    Raises:
        TypeError, ValueError: as ``find_elbow`` and ``KMeans.fit``, or a fallback that is no candidate.

    Example:
        >>> import torch
        >>> from protokernels.cluster import choose_n_clusters
        >>> x = torch.cat([center + 0.1 * torch.randn(50, 2) for center in torch.tensor([[0.0, 0], [9, 0], [0, 9], [9, 9]])])
        >>> choose_n_clusters(x, range(2, 9)).chosen
        4
    """
    candidates = _listed(candidates)
    if not isinstance(candidates, Sequence) or isinstance(candidates, (str, bytes)):
        raise TypeError(
            f"choose_n_clusters: candidates must be a sequence of whole numbers; got {describe(candidates)}"
        )
    for candidate in candidates:
        check_whole("choose_n_clusters", "every candidate", candidate)
    numbers = tuple(candidates)
    if fallback is not None:
        fallback = _listed(fallback)
        check_whole("choose_n_clusters", "fallback", fallback)
        if fallback not in numbers:
            raise ValueError(
                f"choose_n_clusters: the fallback must be a candidate, one of {list(numbers)}; got {fallback}"
            )
    if len(numbers) < 3:
        raise ValueError(f"choose_n_clusters: expected at least three candidates; got {list(numbers)}")
    if any(b <= a for a, b in pairwise(numbers)):
        raise ValueError(f"choose_n_clusters: the candidates must ascend; got {list(numbers)}")
    models = [KMeans(n, **options) for n in numbers]
    if isinstance(x, Tensor) and x.dim() == 2 and len(x) < numbers[-1]:
        raise ValueError(f"choose_n_clusters: {numbers[-1]} clusters need as many rows; got {describe(x)}")
    models = [model.fit(x) for model in models]
    inertias = tuple(model.inertia_ for model in models)
    found = find_elbow(numbers, inertias)
    middle = fallback if fallback is not None else numbers[len(numbers) // 2]
    chosen = found if found is not None else middle
    return Elbow(numbers, inertias, chosen, found is not None, models[numbers.index(chosen)])


def _listed(values: Any) -> Any:
    """A NumPy array or a tensor as a list of Python's numbers, NumPy's number as Python's; anything else as it is."""
    return values.tolist() if hasattr(values, "tolist") else values
