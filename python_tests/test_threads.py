# SPDX-License-Identifier: MIT
"""How long the threads of a command spin while they wait for each other, as OpenMP itself says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile

import pytest

from protokernels._threads import TURNS, is_command

DOCTOR = ["-m", "protokernels", "doctor"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("python /usr/bin/protokernels train vaesim", True),
        ("python -m protokernels train vaesim", True),
        ("python -u -m protokernels doctor", True),
        ("python -m pytest protokernels", False),
        ("python train.py protokernels", False),
        ("python -c pass", False),
        ("python -m", False),
        ("python", False),
    ],
)
def test_the_command_is_known_by_its_line(line: str, expected: bool) -> None:
    assert is_command(line.split()) is expected


def spins(arguments: list[str], **settings: str) -> str:
    """What OpenMP has read, in a process of its own."""
    cleared = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment = {**cleared, "OMP_DISPLAY_ENV": "verbose", **settings}
    with tempfile.TemporaryDirectory() as folder:  # away from the sources, where nothing is built
        done = subprocess.run(
            [sys.executable, *arguments], env=environment, cwd=folder, capture_output=True, text=True, timeout=300
        )
    assert done.returncode == 0, done.stderr
    found = re.search(r"GOMP_SPINCOUNT = '(\w+)'", done.stderr)
    if found is None:
        pytest.skip("torch's OpenMP is not GNU's, and has no such setting")
    return found[1]


def test_threads_of_a_command_spin_for_a_short_while() -> None:
    assert spins(DOCTOR) == TURNS


@pytest.mark.parametrize("setting", [{"GOMP_SPINCOUNT": "77"}, {"OMP_WAIT_POLICY": "passive"}])
def test_a_setting_of_the_users_stays(setting: dict[str, str]) -> None:
    assert spins(DOCTOR, **setting) == setting.get("GOMP_SPINCOUNT", "0")


def test_a_program_that_imports_the_package_keeps_the_default() -> None:
    assert spins(["-c", "import protokernels"]) == spins(["-c", "import torch"]) != TURNS
