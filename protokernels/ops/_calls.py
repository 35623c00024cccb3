# SPDX-License-Identifier: MIT
"""How the native operators are called and differentiated.

A gradient registered with ``torch.library`` is run by Python inside the dispatcher: one call, forward and backward, crosses between the
two half a dozen times, which costs more than the kernels on small problems. Eagerly, ``call`` therefore goes to the kernel at once, or
through a ``torch.autograd.Function`` of the same formula where a gradient is wanted. Everything else (torch.compile, torch.export, fake
tensors, ``torch.func``, tensor subclasses, modes) sees the registered operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _native

Formula = Callable[..., Any]
_KERNELS: dict[str, Any] = {}
_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}
_TRANSFORMED: dict[str, type[torch.autograd.Function]] = {}
_NUMBERS = frozenset((type(None), bool, int, float, list, tuple))
"""Arguments of these types are no tensors; to ask ``isinstance`` of each would take longer than some kernels."""
_NO_FORWARD_MODE = (
    "{}: the native kernels have no forward-mode derivative; use `with protokernels.backend.use('reference')` "
    "around the call"
)
_below_autograd: Any = getattr(torch._C, "_AutoDispatchBelowAutograd", None)
_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", None)
_function_modes: Any = getattr(torch._C, "_len_torch_function_stack", None)
_transforms: Any = getattr(torch._C, "_are_functorch_transforms_active", None)
_CAN_SHORTEN = all(part is not None for part in (_below_autograd, _modes, _function_modes, _transforms))
"""These four are torch's own and not promised to users; where one is missing every call takes the registered way."""


def register(name: str, fake: Formula, *, setup: Formula | None = None, backward: Formula | None = None) -> None:
    """Gives a native operator its shapes and, if it has one, its gradient; without the native library nothing.

    Args:
        name: of the operator in ``torch.ops.protokernels``.
        fake: takes the operator's arguments, returns empty tensors like its results.
        setup: ``setup_context`` of ``torch.library.register_autograd``.
        backward: takes the context and the gradients of the results, returns one for each argument.
    """
    if _native.LIBRARY is None:
        return
    qualified = f"protokernels::{name}"
    torch.library.register_fake(qualified)(fake)
    if backward is None:
        return
    if setup is None:
        torch.library.register_autograd(qualified, backward)
    else:
        torch.library.register_autograd(qualified, backward, setup_context=setup)
    _FUNCTIONS[name] = _function(name, setup, backward)
    _TRANSFORMED[name] = _transformed(name, setup, backward)


def call(name: str, *arguments: Any) -> Any:
    """Calls a native operator, differentiably if one of the arguments asks for a gradient."""
    if not torch.compiler.is_compiling() and is_transformed() and name in _TRANSFORMED:
        return _TRANSFORMED[name].apply(*arguments)
    tensors = None if torch.compiler.is_compiling() else _plain_tensors(arguments)
    if tensors is None:
        return getattr(torch.ops.protokernels, name)(*arguments)
    if getattr(forward_ad, "_current_level", -1) >= 0 and _has_tangent(tensors):
        raise NotImplementedError(_NO_FORWARD_MODE.format(name))
    if name in _FUNCTIONS and torch.is_grad_enabled():
        for x in tensors:
            if x.requires_grad:
                return _FUNCTIONS[name].apply(*arguments)
    with _below_autograd():
        return kernel(name)(*arguments)


def filled(like: Tensor, shape: Sequence[int], value: float, dtype: torch.dtype) -> Tensor:
    """A tensor of this number on the device of ``like``. ``torch.compile`` holds a number that it fills a tensor with, or gives to an
    operator, as a constant and compiles anew for the next one; the product of a tensor and a number it compiles once for all."""
    if torch.compiler.is_compiling():
        return (like.new_ones(shape, dtype=torch.float64) * value).to(dtype)
    # torch takes no integer of more than 64 bits
    return like.new_full(shape, float(value) if isinstance(value, int) else value, dtype=dtype)


def is_transformed() -> bool:
    """Under ``torch.func.vmap``, ``grad`` and the like, where tensors may stand for many and have no values to look at."""
    return _transforms is not None and bool(_transforms())


def kernel(name: str) -> Any:
    """The operator itself: to find it by its name takes as long as a small call."""
    if name not in _KERNELS:
        _KERNELS[name] = getattr(torch.ops.protokernels, name).default
    return _KERNELS[name]


def _function(name: str, setup: Formula | None, backward: Formula) -> type[torch.autograd.Function]:
    def forward(ctx: Any, *arguments: Any) -> Any:
        with _below_autograd():
            output = kernel(name)(*arguments)
        if setup is not None:
            setup(ctx, arguments, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"protokernels_{name}", (torch.autograd.Function,), members)


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _transformed(name: str, setup: Formula | None, backward: Formula) -> type[torch.autograd.Function]:
    """For ``torch.func``, which takes no gradient that ``torch.library`` registered."""

    def forward(*arguments: Any) -> Any:
        return getattr(torch.ops.protokernels, name)(*arguments)

    def jvp(ctx: Any, *_tangents: Any) -> Any:
        raise NotImplementedError(_NO_FORWARD_MODE.format(name))

    members = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup or _keep_nothing),
        "backward": staticmethod(backward),
        "jvp": staticmethod(jvp),
        "generate_vmap_rule": True,
    }
    return type(f"protokernels_{name}_transformed", (torch.autograd.Function,), members)


def _plain_tensors(arguments: tuple[Any, ...]) -> list[Tensor] | None:
    """The tensors among the arguments, if they are of torch's own classes and nobody watches or transforms calls."""
    if not _CAN_SHORTEN or _modes() or _function_modes() or _transforms() or torch.jit.is_tracing():
        return None
    tensors = []
    for x in arguments:
        kind = type(x)
        if kind is Tensor or kind is torch.nn.Parameter:
            tensors.append(x)
        elif kind not in _NUMBERS and isinstance(x, Tensor):
            return None
    return tensors


def _has_tangent(tensors: list[Tensor]) -> bool:
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
