# SPDX-License-Identifier: MIT
"""What limits the instruction sets does limit them; `cpu_levels.py` runs this beside an op's tests."""

from __future__ import annotations

import os

import pytest

from protokernels import _native


def test_the_level_asked_for_is_the_level_used() -> None:
    wanted = os.environ.get("PROTOKERNELS_CPU_LEVEL")
    if wanted is None:
        pytest.skip("only where PROTOKERNELS_CPU_LEVEL is set, as in AtEveryLevel")
    assert _native.build_info()["cpu_level"] == wanted
