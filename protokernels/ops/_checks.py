# SPDX-License-Identifier: MIT
"""Argument checks shared by the ops. An error says what was expected, what came and what to do."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

LARGEST = sys.float_info.max
"""Whole numbers may be larger, and are not finite as floating-point ones."""
LEAST_TEMPERATURE = 1e-30
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def describe(value: object) -> str:
    """``float32 [8, 32] on cpu`` for a tensor, the type's name for anything else; what to do about NumPy's."""
    if isinstance(value, Tensor) and value.is_nested:
        return "a nested tensor"
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    if isinstance(value, np.generic):
        return f"numpy.{type(value).__name__}; pass {'int' if isinstance(value, np.integer) else 'float'}(...) of it"
    if isinstance(value, np.ndarray):
        return f"a numpy.ndarray {list(value.shape)}; pass torch.from_numpy(...) of it"
    return type(value).__name__


def is_dense(value: Tensor) -> bool:
    """Elements lie in memory by strides and have one shape, unlike those of a sparse or a nested tensor."""
    return value.layout is torch.strided and not value.is_nested


def check_dense(op: str, name: str, value: Tensor) -> None:
    if is_dense(value):
        return
    if value.is_nested:
        raise TypeError(f"{op}: {name} must be a dense tensor; got a nested one; pass {name}.to_padded_tensor(0.0)")
    raise TypeError(f"{op}: {name} must be a dense tensor; got the layout {value.layout}; pass {name}.to_dense()")


def check_matrix(op: str, name: str, value: object, shape: str) -> None:
    """A floating-point tensor with two dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor of shape {shape}; got {describe(value)}")
    check_dense(op, name, value)
    if value.dtype not in FLOATING:
        raise TypeError(
            f"{op}: {name} must be float32, float64, bfloat16 or float16 of shape {shape}; got {describe(value)}; "
            f"convert it, e.g. {name}.float()"
        )
    if value.dim() != 2:
        advice = (
            f"; pass {name}[None] for a single row" if value.dim() == 1 else f"; flatten it, e.g. {name}.flatten(0, -2)"
        )
        raise ValueError(f"{op}: {name} must have shape {shape}; got {describe(value)}{advice if value.dim() else ''}")


def check_same_device(op: str, first_name: str, first: Tensor, name: str, value: Tensor) -> None:
    if first.device != value.device:
        raise ValueError(
            f"{op}: {first_name} is on {first.device} and {name} on {value.device}; move one of them, e.g. {name}.to({first_name}.device)"
        )


def check_unit_interval(op: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number in [0, 1]; got {describe(value)}")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{op}: {name} must lie in [0, 1]; got {value}")
    return float(value)


def check_flag(op: str, name: str, value: object) -> None:
    if value is not True and value is not False:
        raise TypeError(f"{op}: {name} must be True or False; got {describe(value)}")


def check_real(op: str, name: str, value: object) -> None:
    """A number, of whatever value, that a floating-point number can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number; got {describe(value)}")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{op}: {name} must be a number that float64 can hold; got a larger one")


def check_whole(op: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be a whole number; got {describe(value)}")
    if abs(value) >= 2**63:
        raise ValueError(f"{op}: {name} must be a whole number that int64 can hold; got a larger one")


def check_interval(op: str, name: str, value: object) -> None:
    """Two numbers, in a tuple or list."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{op}: {name} must be a range of two numbers (low, high); got {value!r}")
    for number in value:
        check_real(op, name, number)


def check_generator(op: str, value: object) -> None:
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(f"{op}: generator must be a torch.Generator or None; got {describe(value)}")


def drawn_by(generator: torch.Generator | None) -> dict[str, Any]:
    """The keywords that have ``torch.rand`` and the like draw from this generator, none for torch's own: an explicit ``generator=None``
    takes no symbolic size, so that a compiled or exported function would be one for a single batch size."""
    return {} if generator is None else {"generator": generator}


def check_choice(op: str, name: str, value: object, choices: tuple[object, ...]) -> object:
    """One of ``choices``; no number stands for a truth value."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
    return value


def check_temperature(op: str, value: object, device: torch.device) -> None:
    """A positive finite number, or a one-element floating-point tensor (whose value is not read: that would wait for the device)."""
    if isinstance(value, Tensor):
        check_dense(op, "temperature", value)
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"{op}: temperature must be a positive number or a one-element float tensor; got {describe(value)}"
            )
        if value.device != device:
            raise ValueError(f"{op}: temperature is on {value.device} and z on {device}; pass temperature.to(z.device)")
        return
    check_temperature_number(op, value, " or a one-element float tensor")


def check_temperature_number(op: str, value: object, otherwise: str = "") -> None:
    """A positive finite number; ``otherwise``: what else the function takes."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(f"{op}: temperature must be a positive number{otherwise}; got {describe(value)}")
    if isinstance(value, (int, float)) and not 0 < value <= LARGEST:
        raise ValueError(f"{op}: temperature must be positive and finite; got {value}")
    if isinstance(value, (int, float)) and value < LEAST_TEMPERATURE:
        raise ValueError(
            f"{op}: temperature must be at least {LEAST_TEMPERATURE}, or float32 cannot hold the scores; got {value}"
        )
