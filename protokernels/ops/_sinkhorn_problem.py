# SPDX-License-Identifier: MIT
"""Arguments of the Sinkhorn functions: what they must be, and the form in which both backends take them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .. import backend
from ..reference.sinkhorn import FEASIBLE_MASS
from . import _calls, _checks

Gradient = Literal["unrolled", "implicit", "envelope"]
Penalty = float | tuple[float, float]
GRADIENTS = ("unrolled", "implicit", "envelope")
ANNEALED_RANGE = 1e4
"""Annealing spans this ratio between the range of the costs and epsilon; what is beyond is one last jump."""


class Problem(NamedTuple):
    """Masses, epsilon and options of a batch, in the type that is computed in; all tensors contiguous."""

    a: Tensor  # [B, N]
    b: Tensor  # [B, M]
    epsilon: Tensor  # [B]
    start: Tensor | None  # [B, M], g
    num_iters: int
    tol: float
    rho: tuple[float, float]  # inf: exact marginal

    def detached(self, epsilon: Tensor, start: Tensor | None) -> Problem:
        """One iteration of this problem at another epsilon, from another start."""
        return self._replace(a=self.a.detach(), b=self.b.detach(), epsilon=epsilon, start=start, num_iters=1, tol=0.0)


def prepare(
    op: str,
    like: Tensor,  # costs or features, whose device counts
    sizes: tuple[int, int, int],  # B, N, M
    dtype: torch.dtype,
    a: Tensor | None,  # [B, N] or [N]
    b: Tensor | None,  # [B, M] or [M]
    row_mask: Tensor | None,  # [B, N] or [N] bool
    column_mask: Tensor | None,  # [B, M] or [M] bool
    epsilon: float | Tensor,
    num_iters: int,
    tol: float,
    marginal_penalty: Penalty | None,
    init: Tensor | None,  # [B, M] or [M]
) -> Problem:
    B, N, M = sizes
    check_iterations(op, num_iters, tol)
    rho = penalties(op, marginal_penalty)
    known = a is None and b is None and row_mask is None and column_mask is None
    masses = (
        _mass(op, ("a", "row_mask", "N"), a, row_mask, like, B, N, dtype),
        _mass(op, ("b", "column_mask", "M"), b, column_mask, like, B, M, dtype),
    )
    if not known and values_are_at_hand(like):
        _check_masses(op, {"a": (a, row_mask), "b": (b, column_mask)}, *masses, balanced=rho == (math.inf, math.inf))
    start = None
    if init is not None:
        _check_vector(op, "init", init, like, B, M, "M", (dtype, *_checks.FLOATING))
        start = init.detach().to(dtype)
        # -inf: that column was absent or had no partner where init comes from. Here it may have one, and nothing is known of it.
        start = torch.where(start == -math.inf, 0.0, start).expand(B, M).contiguous()
    return Problem(*masses, _epsilon(op, epsilon, like, B, dtype), start, num_iters, float(tol), rho)


def values_are_at_hand(like: Tensor) -> bool:
    """Looking at values costs nothing, and there are some: on the CPU, not while tracing, nor under ``torch.func``, nor in fakes."""
    if like.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing() or _calls.is_transformed():
        return False
    return not hasattr(like, "fake_mode")


def anneal(
    problem: Problem,
    factor: float,
    spread: Tensor,  # [B], largest minus smallest cost
    solve: Callable[[Problem], Tensor],
) -> Problem:
    """`problem` with a start from one iteration each at epsilon = max(spread * factor^k, epsilon), k = 0, 1, ...

    The number of steps depends on `factor` alone, so nothing is read from the device.
    """
    epsilon, start = problem.epsilon.detach(), problem.start
    for k in range(math.ceil(math.log(ANNEALED_RANGE) / -math.log(factor))):
        start = solve(problem.detached(torch.maximum(spread * factor**k, epsilon), start))
    return problem._replace(start=start)


def check_iterations(op: str, num_iters: object, tol: object) -> None:
    if isinstance(num_iters, bool) or not isinstance(num_iters, int):
        raise TypeError(f"{op}: num_iters must be an integer of at least 1; got {_checks.describe(num_iters)}")
    if num_iters < 1:
        raise ValueError(f"{op}: num_iters must be at least 1; got {num_iters}")
    _checks.check_whole(op, "num_iters", num_iters)
    if isinstance(tol, bool) or not isinstance(tol, (int, float)):
        raise TypeError(f"{op}: tol must be a number, 0 for no early stop; got {_checks.describe(tol)}")
    if not 0 <= tol <= _checks.LARGEST:
        raise ValueError(f"{op}: tol must be finite and not negative, 0 for no early stop; got {tol}")


def check_annealing(op: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: annealing must be a number in (0, 1) or None; got {_checks.describe(value)}")
    if not 0.0 < value < 1.0:
        raise ValueError(f"{op}: annealing must lie in (0, 1), such as 0.5 to halve epsilon in each step; got {value}")


def check_gradient(op: str, gradient: object, rho: tuple[float, float]) -> None:
    if not isinstance(gradient, str) or gradient not in GRADIENTS:
        raise ValueError(f"{op}: gradient must be 'unrolled', 'implicit' or 'envelope'; got {gradient!r}")
    if gradient == "implicit" and rho != (math.inf, math.inf):
        raise ValueError(
            f"{op}: gradient='implicit' is for exact marginals only; "
            "use gradient='unrolled' or 'envelope' with marginal_penalty"
        )


def check_batch(op: str, name: str, value: object, shape: str) -> None:
    """A floating-point tensor with two dimensions (one problem) or three."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor of shape {shape}; got {_checks.describe(value)}")
    _checks.check_dense(op, name, value)
    if value.dtype not in _checks.FLOATING:
        raise TypeError(
            f"{op}: {name} must be float32, float64, bfloat16 or float16 of shape {shape}; got {_checks.describe(value)}; "
            f"convert it, e.g. {name}.float()"
        )
    if value.dim() not in (2, 3):
        raise ValueError(f"{op}: {name} must have shape {shape}; got {_checks.describe(value)}")


# ------------------------------------------------------------------------------------------------------------------- helpers


def _mass(
    op: str,
    names: tuple[str, str, str],
    value: object,
    mask: object,
    like: Tensor,
    B: int,
    n: int,
    dtype: torch.dtype,
) -> Tensor:  # [B, n]
    """The masses given, or equal ones with the total 1; 0 where the mask says so."""
    name, mask_name, letter = names
    if mask is not None:
        _check_vector(op, mask_name, mask, like, B, n, letter, (torch.bool,))
        assert isinstance(mask, Tensor)
    if value is None:
        if mask is None:
            return torch.full((B, n), 1.0 / n, dtype=dtype, device=like.device)
        present = mask.to(dtype)
        return (present / present.sum(-1, keepdim=True).clamp(min=1.0)).expand(B, n).contiguous()
    _check_vector(op, name, value, like, B, n, letter, _checks.FLOATING)
    assert isinstance(value, Tensor)
    mass = value.to(dtype)
    if mask is not None:
        mass = torch.where(mask, mass, 0.0)
    return mass.expand(B, n).contiguous()


def _check_vector(
    op: str,
    name: str,
    value: object,
    like: Tensor,
    B: int,
    n: int,
    letter: str,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    kind = "bool" if dtypes == (torch.bool,) else "floating-point"
    expected = f"a {kind} tensor of shape [B, {letter}] = [{B}, {n}] or [{letter}] = [{n}]"
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        advice = "; True marks what is present" if kind == "bool" else ""
        raise TypeError(f"{op}: {name} must be {expected}; got {_checks.describe(value)}{advice}")
    _checks.check_dense(op, name, value)
    # One by one: torch.compile finds a shape [3, n] not to be `in` shapes of which one is [B, n], B a symbol that may be 3.
    if value.shape != (B, n) and value.shape != (1, n) and value.shape != (n,):
        raise ValueError(f"{op}: {name} must be {expected}; got {_checks.describe(value)}")
    if value.device != like.device:
        raise ValueError(
            f"{op}: {name} is on {value.device} and the problem on {like.device}; pass {name}.to({str(like.device)!r})"
        )


def _check_masses(
    op: str,
    given: dict[str, tuple[Tensor | None, Tensor | None]],  # by name: masses, mask
    a: Tensor,  # [B, N]
    b: Tensor,  # [B, M]
    *,
    balanced: bool,
) -> None:
    """Values of masses. The operator says in one pass that nothing is wrong; only else is it worth the time to see what."""
    masked = any(mass is not None and mask is not None for mass, mask in given.values())  # what masks hide counts, too
    if not masked and backend.native_serves(a.device) and _calls.kernel("sinkhorn_masses_fit")(a, b, balanced):
        return
    for name, (mass, _) in given.items():
        if mass is None or not mass.numel():
            continue
        lowest, highest = (float(bound) for bound in mass.detach().to(a.dtype).aminmax())
        if not (lowest >= 0 and highest < math.inf):
            what = "NaN" if math.isnan(lowest) else lowest if lowest < 0 else highest
            raise ValueError(
                f"{op}: {name} must hold finite masses, 0 or more; got one that is {what}; 0 marks absence"
            )
    if balanced:
        _check_totals(op, a, b)


def _check_totals(op: str, a: Tensor, b: Tensor) -> None:
    total_a, total_b = a.detach().sum(1), b.detach().sum(1)
    wrong = (total_a - total_b).abs() > FEASIBLE_MASS * torch.maximum(total_a, total_b)
    if bool(wrong.any()):
        index = int(wrong.int().argmax())
        raise ValueError(
            f"{op}: rows and columns must have the same total mass; problem {index} has sum(a) = {float(total_a[index]):.6g} and "
            f"sum(b) = {float(total_b[index]):.6g}; normalise them in float32 or float64, or pass marginal_penalty to let masses differ"
        )


def _epsilon(op: str, value: object, like: Tensor, B: int, dtype: torch.dtype) -> Tensor:  # [B]
    if isinstance(value, Tensor):
        _checks.check_dense(op, "epsilon", value)
        if not value.is_floating_point() or (value.numel() != 1 and value.shape != (B,)):
            raise ValueError(
                f"{op}: epsilon must be a positive number or a floating-point tensor with one element or of shape "
                f"[B] = [{B}]; got {_checks.describe(value)}"
            )
        if value.device != like.device:
            raise ValueError(
                f"{op}: epsilon is on {value.device} and the problem on {like.device}; pass epsilon.to({str(like.device)!r})"
            )
        converted = value.to(dtype)
        if values_are_at_hand(like):
            number, tiny = converted.detach(), torch.finfo(dtype).tiny
            if not bool(((number >= tiny) & (number <= 1 / tiny)).all()):  # kernels multiply by the inverse
                raise ValueError(
                    f"{op}: epsilon must be positive and finite; got {value.detach().flatten()[:8].tolist()} for {_named(dtype)}"
                )
        return converted.reshape(-1).expand(B).contiguous()
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(f"{op}: epsilon must be a positive number or a tensor; got {_checks.describe(value)}")
    if not torch.finfo(dtype).tiny <= value <= 1 / torch.finfo(dtype).tiny:
        raise ValueError(
            f"{op}: epsilon must be positive and finite; got {value} for {_named(dtype)}; the smallest cost that matters is a start"
        )
    return _calls.filled(like, (B,), value, dtype)  # type: ignore[arg-type]


def _named(dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}, which must hold its inverse too"


def penalties(op: str, value: object) -> tuple[float, float]:
    pair = value if isinstance(value, tuple) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{op}: marginal_penalty must be one number or two (rows, columns); got {len(pair)}")
    rho = []
    for number in pair:
        if number is None:
            number = math.inf
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(
                f"{op}: marginal_penalty must be a positive number or a tuple of two; got {_checks.describe(number)}"
            )
        if not 0 < number <= _checks.LARGEST and number != math.inf:
            raise ValueError(f"{op}: marginal_penalty must be positive, or None for exact marginals; got {number}")
        rho.append(float(number))
    return rho[0], rho[1]
