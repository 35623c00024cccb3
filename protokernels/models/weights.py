# SPDX-License-Identifier: MIT
"""Files of weights that nobody vouches for: nothing in them is run, and what is not as it should be is named."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor


def load_untrusted(source: Path | IO[bytes], name: str, map_location: str | torch.device = "cpu") -> Any:
    """What ``torch.save`` wrote: tensors, numbers, text and containers of them, opened with ``weights_only=True``.

    Args:
        source: a file or its content.
        name: of the file, for the message.
        map_location: device of the tensors.

    Raises:
        ValueError: the file is damaged, or holds anything else, which could run any code when read.
        OSError, MemoryError: the system does not give the file, or not the room for it.
    """
    try:
        return torch.load(source, map_location=map_location, weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # damage shows in any way: torch reads names, sizes and types from the file
        # torch's own words recommend weights_only=False; the reason stands behind them.
        reason = error.__context__ if isinstance(error, pickle.UnpicklingError) else error
        raise ValueError(
            f"{name} cannot be read as a file of weights ({first_line(reason or error)}); it is damaged, or holds more than "
            "tensors, numbers and text and could run any code when read"
        ) from error


def first_line(error: BaseException) -> str:
    """What an error says, without the lines of advice that torch adds."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def check_names(own: dict[str, Tensor], state: dict[str, Tensor], path: Path, network: str) -> None:
    """Refuses weights that are not those of ``network``, which has the state ``own``; counters of batches may be missing.

    Raises:
        ValueError: names or shapes differ; says which is the first.
    """
    needed = {name for name in own if not name.endswith("num_batches_tracked")}
    if missing := sorted(needed - state.keys()):
        raise ValueError(
            f"{path} is not a {network} with torchvision's names: {len(missing)} tensors are missing, the first is "
            f"{missing[0]!r}; the file starts with {', '.join(list(state)[:3]) or 'nothing of its kind'}"
        )
    if strange := sorted(state.keys() - own.keys()):
        raise ValueError(
            f"{path} holds {len(strange)} tensors that {network} does not have, the first is {strange[0]!r}; a deeper "
            "network?"
        )
    for name, value in state.items():
        if value.shape != own[name].shape:
            raise ValueError(f"{path}: {name} must have shape {list(own[name].shape)}; got {list(value.shape)}")


def read_weights(path: Path, network: str, published: str) -> dict[str, Tensor]:
    """Tensors by name, from a file that nobody vouches for.

    Raises:
        FileNotFoundError: says where the weights of ``network`` are ``published``.
        ValueError: not a file of weights.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no weight file {path}; nothing is downloaded: fetch torchvision's {network} weights "
            f"(https://download.pytorch.org/models/{published}) and give their path"
        )
    state = load_untrusted(path, str(path))
    given = type(state).__name__
    if isinstance(state, dict):
        others = [(name, value) for name, value in state.items() if not isinstance(value, Tensor)]
        given = f"a dictionary with {type(others[0][1]).__name__} under {others[0][0]!r}" if others else ""
    if given:
        raise ValueError(f"{path}: expected a dictionary of tensors by name, and nothing else; got {given}")
    return {str(name): value for name, value in state.items()}
