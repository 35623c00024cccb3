# SPDX-License-Identifier: MIT
"""Tests once more in a process that may use one CPU instruction set only."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from protokernels import _native
from python_tests import forks
from python_tests.places import needs_native

ROOT = Path(__file__).resolve().parents[1]
LEVELS = {  # level -> the processor's flags that it needs, by their names in /proc/cpuinfo
    "generic": set[str](),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
}


class AtEveryLevel:
    """Inherited by a test class that names ``FILES`` and, as pytest's ``-k``, which of their tests are ``CHOSEN``. They run
    natively on the CPU at every level but that of the outer run, and all of them have to pass. Of a test's cases the first
    runs and a third of the others; ``PROTOKERNELS_CPU_LEVEL=generic pytest`` runs all of them."""

    FILES: Sequence[str]
    CHOSEN = "TestValue or TestGradient"
    SECONDS = 300

    @needs_native
    @pytest.mark.parametrize("level", list(LEVELS))
    def test_every_level(self, level: str, tmp_path: Path) -> None:
        if "PROTOKERNELS_CPU_LEVEL" in os.environ:
            pytest.skip("the outer test run limits the level already")
        if _native.build_info()["cpu_level"] == level:
            pytest.skip(f"{level} is what the other tests of this run use")
        if missing := LEVELS[level] - cpu_flags():
            pytest.skip(f"this processor lacks {', '.join(sorted(missing))}")
        files = [f"python_tests/{name}.py" for name in ("test_cpu_level", *self.FILES)]
        chosen = f"(cpu-native and ({self.CHOSEN})) or the_level_asked_for"
        words = ["-q", "-p", "no:cacheprovider", "-p", "python_tests.some_cases", *files, "-k", chosen]
        code = f"import os, pytest\nos.chdir({str(ROOT)!r})\nraise SystemExit(pytest.main({words}))"
        run = forks.Fork(code, tmp_path, {**os.environ, "PROTOKERNELS_CPU_LEVEL": level}).finish(self.SECONDS)
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
        assert "skipped" not in run.stdout.splitlines()[-1] and " passed" in run.stdout.splitlines()[-1]


def cpu_flags() -> set[str]:
    """The processor's flags; empty where there is no /proc/cpuinfo."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return set()
    lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")]
    return set(lines[0].split(":")[1].split()) if lines else set()
