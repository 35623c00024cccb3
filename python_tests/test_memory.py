# SPDX-License-Identifier: MIT
"""`keep_memory`: blocks that a step frees are there for the next one, without a page fault."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="it sets glibc's malloc; elsewhere it returns False"
)

STEPS = """
import resource, sys, torch
from protokernels.memory import keep_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    print(keep_memory())
else:
    print(None)
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(16 << 20) for _ in range(3)]
    del blocks
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 3 * (64 << 20) // os.sysconf("SC_PAGE_SIZE")


def steps(how: str, **variables: str) -> tuple[str, list[int]]:
    """What `keep_memory` returned, and the page faults of six steps that each fill three blocks of 64 MB."""
    chosen = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(chosen)} | variables
    ran = subprocess.run(
        [sys.executable, "-c", STEPS, how], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    answer, *faults = ran.stdout.split()
    return answer, [int(number) for number in faults]


def test_steps_find_their_memory_again() -> None:
    answer, faults = steps("keep")
    assert answer == "True"
    assert min(faults[2:]) < PAGES // 100  # the least: the system may move a page at any time
    _, without = steps("as it is")
    assert min(faults[2:]) <= min(without[2:])


def test_a_choice_of_the_environment_stays() -> None:
    answer, _ = steps("keep", MALLOC_TRIM_THRESHOLD_="65536")
    assert answer == "False"


@pytest.mark.parametrize("name", ["GLIBC_TUNABLES", "MALLOC_ARENA_MAX"])
def test_any_choice_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from protokernels.memory import keep_memory

    monkeypatch.setenv(name, "1")
    assert keep_memory() is False


def test_the_command_keeps_and_a_call_from_python_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from protokernels import cli

    calls = []
    monkeypatch.setattr(cli, "keep_memory", lambda: calls.append("kept"))
    assert cli.main(["--version"]) == 0
    assert calls == []
    monkeypatch.setattr(sys, "argv", ["protokernels", "--version"])
    assert cli.main() == 0
    assert calls == ["kept"]
