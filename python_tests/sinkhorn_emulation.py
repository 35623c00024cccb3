# SPDX-License-Identifier: MIT
"""Problems of `sinkhorn` for the emulator tests, their runs, and the float64 answers beside them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protokernels.reference import sinkhorn as reference

from .emulator.build import poisoned
from .sinkhorn_oracle import Answer, check, log_error, solve_batch

BALANCED = (math.inf, math.inf)
TYPES = {"f32": torch.float32, "f64": torch.float64}


def numpy(x: Tensor | None) -> Any:
    """What the emulator takes; None stays."""
    return None if x is None else x.detach().contiguous().numpy()


class Case:
    """Two problems with absent rows and columns and forbidden pairs, and their runs in the emulator."""

    def __init__(self, kind: str, N: int, M: int, *, epsilon: float = 0.05, num_iters: int = 6, **options: Any) -> None:
        generator = torch.Generator().manual_seed(1000 * N + M)
        self.kind, self.dtype, self.num_iters = kind, TYPES[kind], num_iters
        self.tol: float = options.pop("tol", 0.0)
        self.rho: tuple[float, float] = options.pop("rho", BALANCED)
        start: bool = options.pop("start", False)
        assert not options
        cost = 2 * torch.rand(2, N, M, generator=generator)
        a, b = (0.1 + torch.rand(2, n, generator=generator) for n in (N, M))
        if N > 2 and M > 2:
            cost[0, 0, : M // 2], a[0, 1], b[1, 2] = math.inf, 0, 0
        self.a, self.b = (x.div(x.sum(1, keepdim=True)).to(self.dtype) for x in (a, b))
        self.cost = cost.to(self.dtype)
        self.epsilon = torch.tensor([epsilon, 1.5 * epsilon], dtype=self.dtype)
        self.start = 0.1 * torch.randn(2, M, generator=generator).to(self.dtype) if start else None
        self.grad_f, self.grad_g, self.grad_transport, self.grad_entropic = (
            torch.randn(shape, generator=generator).to(self.dtype) for shape in ((2, N), (2, M), (2,), (2,))
        )

    @classmethod
    def of(cls, kind: str, cost: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, num_iters: int) -> Case:
        """A given problem, and no loss yet."""
        case = cls(kind, *cost.shape[1:], num_iters=num_iters)
        case.cost, case.a, case.b, case.epsilon = (x.to(case.dtype) for x in (cost, a, b, epsilon))
        case.grad_f, case.grad_g = torch.zeros_like(case.a), torch.zeros_like(case.b)
        case.grad_transport = case.grad_entropic = torch.zeros_like(case.epsilon)
        return case

    def empty(self, *shape: int) -> Any:
        return poisoned(shape, np.float32 if self.kind == "f32" else np.float64)

    def forward(self, emulator: Any) -> SimpleNamespace:
        B, N, M = self.cost.shape
        out = SimpleNamespace(
            f=self.empty(B, N), g=self.empty(B, M), transport_cost=self.empty(B), entropic_value=self.empty(B),
            marginal_error=self.empty(B), iterations=poisoned(B, np.int64), feasible=np.zeros(B, bool),
            history=self.empty(B, self.num_iters, N + M),
        )  # fmt: skip
        inputs = (self.cost, self.a, self.b, self.epsilon, self.start)
        getattr(emulator, f"forward_{self.kind}")(
            *map(numpy, inputs), self.num_iters, self.tol, *self.rho, *vars(out).values()
        )
        return out

    def plan(self, emulator: Any, out: SimpleNamespace) -> Any:
        plan = self.empty(*self.cost.shape)
        getattr(emulator, f"plan_{self.kind}")(numpy(self.cost), out.f, out.g, numpy(self.epsilon), plan)
        return plan

    def answers(self) -> list[Answer]:
        return solve_batch(
            self.cost, self.a, self.b, self.epsilon, self.num_iters, self.start, tol=self.tol, rho=self.rho
        )

    def check_values(self, emulator: Any) -> SimpleNamespace:
        out = self.forward(emulator)
        result = {name: torch.from_numpy(value) for name, value in vars(out).items()}
        result["plan"] = torch.from_numpy(self.plan(emulator, out))
        check(SimpleNamespace(**result), self.answers(), self.cost, self.epsilon, self.a)
        return out

    def backward(self, emulator: Any, out: SimpleNamespace, implicit: bool = False) -> dict[str, Any]:
        inputs = (self.cost, self.a, self.b, self.epsilon)
        gradients = {name: self.empty(*x.shape) for name, x in zip(("cost", "a", "b", "epsilon"), inputs, strict=True)}
        getattr(emulator, f"backward_{self.kind}")(
            *map(numpy, (*inputs, self.start)),
            *(out.f, out.g, out.iterations, None if implicit else out.history, 0 if implicit else self.num_iters),
            *map(numpy, (self.grad_f, self.grad_g, self.grad_transport, self.grad_entropic)),
            implicit, *self.rho, *gradients.values(),
        )  # fmt: skip
        return gradients

    def autograd(self, dtype: torch.dtype, implicit: bool = False) -> dict[str, Tensor]:
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (self.cost, self.a, self.b, self.epsilon)]
        start = None if self.start is None else self.start.to(dtype)
        if implicit:
            solution = reference.solve_implicit(*inputs, start, self.num_iters, self.tol)
            entropic = reference.solve_envelope(*inputs, start, self.num_iters, self.tol, self.rho).entropic_value
        else:
            solution = reference.solve(*inputs, start, self.num_iters, self.tol, self.rho)
            entropic = solution.entropic_value
        loss = (solution.transport_cost * self.grad_transport + entropic * self.grad_entropic).sum()
        for potential, weight in ((solution.f, self.grad_f), (solution.g, self.grad_g)):
            loss = loss + torch.where(potential == -math.inf, 0.0, potential * weight).sum()
        return dict(zip(("cost", "a", "b", "epsilon"), torch.autograd.grad(loss, inputs), strict=True))

    def check_gradients(self, gradients: dict[str, Any], expected: dict[str, Tensor], rough: dict[str, Tensor]) -> None:
        answers = self.answers()
        error = max(
            log_error(answer, C.numpy(), float(eps), self.dtype, self.num_iters)
            for answer, C, eps in zip(answers, self.cost, self.epsilon, strict=True)
        )
        for name, actual in gradients.items():
            reach = 8 * float((rough[name].double() - expected[name]).abs().max())
            scale = float(expected[name].abs().max())
            if name == "epsilon":  # a sum of terms of both signs
                finite = self.cost.isfinite()
                scale = float(
                    (torch.where(finite, expected["cost"] * self.cost, 0).abs().sum((1, 2)) / self.epsilon).max()
                )
            np.testing.assert_allclose(actual, expected[name], rtol=0, atol=reach + error * scale, err_msg=name)

    def check_unrolled(self, emulator: Any) -> None:
        gradients = self.backward(emulator, self.forward(emulator))
        self.check_gradients(gradients, self.autograd(torch.float64), self.autograd(self.dtype))
