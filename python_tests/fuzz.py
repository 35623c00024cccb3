# SPDX-License-Identifier: MIT
"""Calls that hypothesis draws, right and wrong ones, and what every public function owes to any of them.

An answer is right, compared with the float64 reference where inputs are finite and moderate, or an error of a documented
type whose message names the function. Never a crash, a hang, a NaN from finite input, an
error that only a reader of the code understands; inputs stay as they are.

``PROTOKERNELS_FUZZ=2000 pytest python_tests/test_fuzz.py`` draws that many calls of every function instead of a few.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from protokernels import backend

EXAMPLES = int(os.environ.get("PROTOKERNELS_FUZZ", "0"))
ERRORS = (TypeError, ValueError, NotImplementedError, RuntimeError)
HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, torch.float64, *HALVES)
EPSILON = {dtype: torch.finfo(dtype).eps for dtype in FLOATS}
FILLS = ("normal", "normal", "normal", "zero", "constant", "denormal", "tiny", "huge", "nan", "inf")
MODERATE = ("normal", "zero", "constant")
LAYOUTS = ("plain", "plain", "transposed", "sliced", "offset", "expanded", "channels_last", "negative")


def examples(few: int) -> settings:
    """Every run draws the same few calls; a long one always new ones."""
    return settings(
        max_examples=EXAMPLES or few,
        deadline=None,
        derandomize=not EXAMPLES,
        suppress_health_check=list(HealthCheck),
        database=None,
    )


@dataclass
class Call:
    """A function and what it is called with."""

    run: Callable[..., Any]
    names: tuple[str, ...]  # one of them stands in every error's message
    arguments: dict[str, Any]
    others: frozenset[str] = frozenset()  # arguments that are changed on purpose
    tolerance: float = 0.0  # of the results, in units of the rounding of the type computed in, relative to their largest; 0: not compared
    gradient_tolerance: float = 0.0
    moderate: bool = True
    overflow: bool = False  # products of finite values may exceed the type, as in plain torch
    wrong: str = ""
    kept: tuple[str, ...] = field(default=())  # never replaced by something wrong

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={_shown(value)}" for name, value in self.arguments.items())
        return f"{self.names[0]}({shown})" + (f" with a wrong {self.wrong}" if self.wrong else "")


def _shown(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)[:60]
    text = f"<{str(value.dtype)[6:]} {list(value.shape)} {value.device}"
    if value.layout == torch.strided:
        text += f" strides {list(value.stride())}" + (" grad" if value.requires_grad else "")
        if value.device.type == "cpu" and value.numel() <= 12 and value.dtype in (*FLOATS, torch.int64, torch.bool):
            text += f" {value.tolist()}"
    return text + ">"


# --------------------------------------------------------------------------------------------------------------------- drawing


class Draws:
    """Drawing for one call: sizes, tensors, numbers."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
        self.moderate = True
        self.huge = False

    def one(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def size(self, *values: int) -> int:
        return self.one(*(values or (1, 2, 3, 5, 8, 17, 0, 33)))

    def tensor(
        self, *shape: int, dtype: torch.dtype | None = None, fills: tuple[str, ...] = FILLS, gradient: bool = True
    ) -> Tensor:
        dtype = dtype or self.one(*FLOATS)
        fill, layout = self.one(*fills), self.one(*LAYOUTS)
        self.moderate &= fill in MODERATE
        self.huge |= fill == "huge"
        x = self._layout(self._fill(shape, fill).to(dtype), layout)
        return x.requires_grad_(gradient and self.one(False, True))

    def _fill(self, shape: tuple[int, ...], fill: str) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if fill in ("zero", "constant"):
            return torch.full(shape, 0.0 if fill == "zero" else 0.75, dtype=torch.float64)
        if fill in ("denormal", "tiny", "huge"):
            return x * {"denormal": 1e-42, "tiny": 1e-30, "huge": 1e30}[fill]
        if fill in ("nan", "inf") and x.numel():
            place = int(torch.randint(x.numel(), (1,), generator=self.generator))
            x.view(-1)[place] = float(fill) if fill == "nan" else self.one(torch.inf, -torch.inf)
        return x

    def _layout(self, x: Tensor, layout: str) -> Tensor:
        if layout == "transposed" and x.dim() > 1:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if layout == "sliced" and x.dim():
            return torch.stack([x, torch.full_like(x, 7.0)], -1).flatten(-2)[..., ::2]
        if layout == "offset":
            return torch.cat([x.new_full((3,), 7.0), x.flatten()])[3:].view(x.shape)
        if layout == "expanded" and x.dim() and x.shape[0]:
            return x[:1].clone().expand(x.shape)
        if layout == "channels_last" and x.dim() == 4:
            return x.contiguous(memory_format=torch.channels_last)
        if layout == "negative":
            return torch._neg_view(-x)
        return x.clone()

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(dtype)

    def mask(self, *shape: int) -> Tensor:
        mask = torch.rand(shape, generator=self.generator) < 0.7
        mask[..., :1] = True
        return mask

    def wrong(self, call: Call) -> Call:
        """The call with one argument replaced by something that is hardly ever meant."""
        known = [
            n for n, p in inspect.signature(call.run).parameters.items() if p.kind != inspect.Parameter.VAR_KEYWORD
        ]
        name = self.one(*(n for n in known if n not in call.kept))
        before = call.arguments.get(name)
        value = self.one(
            *_WRONG_NUMBERS, *_WRONG_THINGS, *(_wrong_tensors(before) if isinstance(before, Tensor) else ())
        )
        if name in UNBOUNDED and isinstance(value, int) and 16 < value < 2**63:
            value = -3  # a request for that much work is meant as it is
        call.arguments = {**call.arguments, name: value}
        call.wrong, call.moderate, call.tolerance, call.gradient_tolerance = name, False, 0.0, 0.0
        return call


UNBOUNDED = frozenset({"num_iters", "max_iter", "n_init", "size", "num_prototypes", "dim", "n_clusters", "count"})
_WRONG_NUMBERS = (
    -1, 0, 1, 2.5, True, False, float("nan"), float("inf"), -float("inf"), 1e-320, 1e-50, 1e-40, 1e300, 1e39, -1e300, 2**31,
    2**62, 2**63 - 1, 2**63, -(2**63) - 1, 10**400, 1j,
)  # fmt: skip
_WRONG_THINGS = (
    None, "text", "", b"bytes", [], (), [1.0, 2.0], (1, 2), [0.5, 1, 2, 3], {"a": 1}, object(), np.zeros((2, 2)), np.float32(0.5),
    np.int64(2), torch.float32, torch.zeros(()), torch.zeros(1), torch.tensor(float("nan")), torch.zeros(2, 3),
    torch.zeros(2, 3, dtype=torch.complex64),
    torch.zeros(2, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.int32), torch.empty(0), torch.Generator(),
)  # fmt: skip


def _wrong_tensors(x: Tensor) -> tuple[Any, ...]:
    """What is nearly the tensor that was meant."""
    x = x.detach().resolve_neg()
    changed = [x.tolist(), x.to("meta"), x.unsqueeze(0), x[None, None, None], x.flatten(), x.to(torch.complex64)]
    changed += [x.to(torch.int32), x.to(torch.bool), x.to(torch.int64), x.to(torch.uint8)]
    changed += [x.to(torch.float8_e4m3fn), x.to_sparse()]
    if x.dim():
        changed += [
            x[0] if len(x) else x,
            x[:-1],
            x[:0],
            x.repeat(2, *(1,) * (x.dim() - 1)),
            x[..., :-1],
            x[..., :0],
            x.float().numpy(),
        ]
    return tuple(changed)


# --------------------------------------------------------------------------------------------------------------------- judging


def judge(call: Call) -> None:
    """Runs it, forward and backward, and fails unless the answer is right or a clear error."""
    before = {name: _copy(value) for name, value in call.arguments.items()}
    try:
        results, gradients = outcome(call.run, call.arguments)
    except ERRORS as error:
        _check_error(call, error)
        results = gradients = None
    for name, value in call.arguments.items():
        if name not in call.others:
            assert _same(value, before[name]), f"{call!r} changed {name}"
    if results is None:
        assert call.wrong or not call.moderate, f"{call!r} was refused"
        return
    tensors = [x for x in call.arguments.values() if isinstance(x, Tensor)]
    plain = all(x.device.type == "cpu" and x.layout == torch.strided for x in tensors)
    if plain and all(_finite(x) for x in call.arguments.values()) and not call.overflow:
        for name, x in {**results, **gradients}.items():
            assert not _has_nan(x), f"{call!r}: NaN in {name} from finite input"
    if call.tolerance and call.moderate:
        with backend.use("reference"):
            expected, slopes = outcome(call.run, {n: _wide(x, before[n]) for n, x in call.arguments.items()})
        rounding = max([EPSILON[torch.float32], *(EPSILON[x.dtype] for x in tensors if x.dtype in HALVES)])
        if any(x.dtype == torch.float64 for x in tensors):
            rounding = (
                EPSILON[torch.float64]
                if all(x.dtype in (torch.float64, torch.int64, torch.bool) for x in tensors)
                else rounding
            )
        for found, oracle, factor in (
            (results, expected, call.tolerance),
            (gradients, slopes, call.gradient_tolerance),
        ):
            for name, x in found.items():
                if factor:
                    _near(call, name, x, oracle[name], factor * rounding)


def outcome(run: Callable[..., Any], arguments: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Floating-point results by name, and the gradients of a weighted sum of them by the arguments that ask for one."""
    results = _named(run(**arguments))
    leaves = {n: x for n, x in arguments.items() if isinstance(x, Tensor) and x.requires_grad}
    outputs = [x for x in results.values() if x.requires_grad]
    gradients: dict[str, Tensor] = {}
    if leaves and outputs:
        total = sum((x.double() * _weights(x)).sum() for x in outputs)
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        gradients = {f"the gradient of {n}": g for n, g in zip(leaves, found, strict=True) if g is not None}
        for (n, x), g in zip(leaves.items(), found, strict=True):
            assert g is None or (g.shape == x.shape and g.dtype == x.dtype), f"gradient of {n}: {g.shape} {g.dtype}"
    return {n: x.detach() for n, x in results.items()}, gradients


def _weights(x: Tensor) -> Tensor:
    return torch.linspace(-1.0, 2.0, max(x.numel(), 1), dtype=torch.float64, device=x.device)[: x.numel()].view(x.shape)


def _named(value: Any, name: str = "result") -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {name: value} if value.is_floating_point() else {}
    if hasattr(value, "_asdict"):
        value = value._asdict()
    elif hasattr(value, "transport_cost"):
        value = {n: getattr(value, n) for n in ("plan", "transport_cost", "entropic_value", "marginal_error")}
    elif isinstance(value, (tuple, list)):
        value = dict(zip(map(str, range(len(value))), value, strict=True))
    parts = value.items() if isinstance(value, dict) else ()
    return {inner: x for part, v in parts for inner, x in _named(v, part).items()}


def _check_error(call: Call, error: Exception) -> None:
    text = str(error)
    assert any(name in text for name in call.names), (
        f"{call!r}: {type(error).__name__} names none of {call.names}: {text[:300]}"
    )
    assert "protokernels::" not in text, f"{call!r}: the message is that of the dispatcher: {text[:300]}"
    assert type(error) is not RuntimeError or "must" in text or ":" in text, text


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor) and value.device.type == "cpu" and value.layout == torch.strided:
        return value.detach().clone()
    return None


def _same(value: Any, copy: Any) -> bool:
    if copy is None or value.dtype == torch.float8_e4m3fn:
        return True
    return value.grad is None and torch.equal(torch.nan_to_num(value.detach(), 123.0), torch.nan_to_num(copy, 123.0))


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return bool(value.detach().to(torch.complex128).isfinite().all())
    return not isinstance(value, float) or -1e300 < value < 1e300


def _has_nan(x: Tensor) -> bool:
    return x.device.type == "cpu" and bool(x.isnan().any())


def _wide(value: Any, before: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return before.double().contiguous().resolve_neg().requires_grad_(value.requires_grad)


def _near(call: Call, name: str, x: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = 1.0 + float(expected.abs().max()) if expected.numel() else 1.0
    error = float((x.double() - expected.double()).abs().max()) if x.numel() else 0.0
    assert x.shape == expected.shape, f"{call!r}: {name} has shape {list(x.shape)}, expected {list(expected.shape)}"
    assert error <= tolerance * scale, (
        f"{call!r}: {name} is off by {error:.3g}, more than {tolerance:.3g} of {scale:.3g}"
    )
