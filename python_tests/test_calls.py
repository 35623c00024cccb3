# SPDX-License-Identifier: MIT
"""The short way to a native operator gives what the registered operator gives, and steps aside where somebody looks on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import protokernels
from protokernels.ops import _calls
from python_tests.places import needs_native

pytestmark = needs_native


def leaves() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z, prototypes = (torch.randn(n, 5, generator=generator) for n in (9, 4))
    return z.requires_grad_(), prototypes.requires_grad_()


def assign(z: Tensor, prototypes: Tensor) -> Tensor:
    c = protokernels.soft_assign(z, prototypes, temperature=0.3)
    assert isinstance(c, Tensor)
    return c


def registered(function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(_calls, "_CAN_SHORTEN", False)
        return function()


def gradients(create_graph: bool = False) -> tuple[Tensor, ...]:
    both = leaves()
    return torch.autograd.grad(assign(*both).square().sum(), both, create_graph=create_graph)


def test_torch_has_what_the_short_way_needs() -> None:
    assert _calls._CAN_SHORTEN


def test_both_ways_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    both = leaves()
    assert torch.equal(assign(*both), registered(lambda: assign(*both), monkeypatch))
    for short, long in zip(gradients(), registered(gradients, monkeypatch), strict=True):
        assert torch.equal(short, long)


def test_the_node_is_our_own_eagerly_and_torchs_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(assign(*leaves()).grad_fn).__name__ == "protokernels_prototypes_forwardBackward"
    assert "GeneratedBackwardFor" in type(registered(lambda: assign(*leaves()), monkeypatch).grad_fn).__name__


def test_no_gradient_is_recorded_where_none_is_wanted() -> None:
    z, prototypes = leaves()
    with torch.no_grad():
        assert not assign(z, prototypes).requires_grad
    assert not assign(z.detach(), prototypes.detach()).requires_grad
    assert assign(z.detach(), prototypes).requires_grad


def test_a_second_derivative_is_an_error_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    def second() -> None:
        gradients(create_graph=True)[0].sum().backward()

    for run in (second, lambda: registered(second, monkeypatch)):
        with pytest.raises(NotImplementedError, match="no second derivative"):
            run()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_forward_mode_derivative_is_an_error_and_never_a_silent_zero(requires_grad: bool) -> None:
    z, prototypes = (x.detach() for x in leaves())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z.clone().requires_grad_(requires_grad), torch.ones_like(z))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            assign(dual, prototypes)
        assert torch.equal(assign(z, prototypes), assign(*leaves()))  # without a tangent as ever


def test_a_mode_sees_the_registered_operator() -> None:
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        gradients()
    assert {"protokernels.prototypes_forward.default", "protokernels.prototypes_backward.default"} <= set(seen)


def test_a_subclass_keeps_its_own_dispatch() -> None:
    class Tagged(Tensor):
        pass

    z, prototypes = (x.detach() for x in leaves())
    assert _calls._plain_tensors((z.as_subclass(Tagged), prototypes)) is None
    assert isinstance(assign(z.as_subclass(Tagged), prototypes), Tagged)
