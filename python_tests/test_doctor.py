# SPDX-License-Identifier: MIT
"""The doctor: what it finds, what it says, and its exit code. Missing and broken libraries stand in test_backend.py."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import protokernels
from protokernels import _native, backend, doctor

needs_native = pytest.mark.skipif(_native.LIBRARY is None, reason="installed without native code")

BUILD = {
    "torch": "2.13.0",
    "compiler": "GNU 13.3.0",
    "cuda_compiler": "nvcc 13.0.88",
    "cuda_archs": "80-real 90a-real 100",
    "cpu_level": "avx2",
}


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The package as if built with BUILD; what the test changes in the dictionary counts."""
    build = dict(BUILD)
    monkeypatch.setattr(_native, "LIBRARY", Path("/somewhere/protokernels/_C.abi3.so"))
    monkeypatch.setattr(_native, "PROBLEM", None)
    monkeypatch.setattr(_native, "build_info", lambda: build)
    monkeypatch.setattr(backend, "_cuda_built", None)
    monkeypatch.setattr(backend, "_current", "auto")
    monkeypatch.delenv("PROTOKERNELS_DATA", raising=False)
    return build


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, int]]]:
    """The GPUs torch finds; the test fills the list."""
    found: list[tuple[str, tuple[int, int]]] = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(found))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: found[index][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: found[index][1])
    return found


def printed(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = doctor.main()
    return code, capsys.readouterr().out


class TestThisMachine:
    def test_the_report_is_plain_data_with_the_true_versions(self) -> None:
        facts = json.loads(json.dumps(doctor.report()))
        assert facts["protokernels"]["version"] == protokernels.__version__
        assert facts["torch"] == torch.__version__
        assert facts["numpy"] == numpy.__version__
        assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
        assert facts["cpu"]["threads"] == torch.get_num_threads()
        assert facts["backend"]["selected"] == backend.get()

    @needs_native
    def test_native_code_serves_the_cpu_and_the_exit_code_is_0(self, capsys: pytest.CaptureFixture[str]) -> None:
        with backend.use("auto"):
            facts = doctor.report()
            code, text = printed(capsys)
        assert code == 0
        assert facts["backend"]["in_use"]["cpu"] == {"runs": "native", "reason": None}
        assert facts["native"]["library"] == str(_native.LIBRARY)
        assert facts["cpu"]["level"] in ("generic", "avx2", "avx512")
        assert "  cpu          native\n" in text

    @needs_native
    @pytest.mark.skipif("PROTOKERNELS_CPU_LEVEL" in os.environ, reason="PROTOKERNELS_CPU_LEVEL limits the level")
    def test_the_level_in_use_is_the_best_of_this_cpu(self) -> None:
        facts = doctor.report()
        assert facts["cpu"]["level"] == facts["cpu"]["machine_level"]

    @needs_native
    @pytest.mark.parametrize(
        ("level", "code", "line"),
        [("generic", 0, "CPU level      generic  (this CPU: "), ("sse", 1, "must be generic, avx2 or avx512; got sse")],
    )
    def test_a_chosen_level_and_a_wrong_one(self, level: str, code: int, line: str, tmp_path: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-c", "from protokernels import doctor; raise SystemExit(doctor.main())"],
            env={**os.environ, "PROTOKERNELS_CPU_LEVEL": level, "PROTOKERNELS_BACKEND": "auto"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert line in done.stdout
        assert ("every call raises" in done.stdout) == (code == 1)

    def test_the_text_is_aligned(self, capsys: pytest.CaptureFixture[str]) -> None:
        table = printed(capsys)[1].split("\n\n")[0].splitlines()
        assert len(table) >= 12
        for line in table:
            assert len(line) > 15 and line[14] == " " and line[15] != " ", line
            assert line == line.rstrip()

    def test_the_selected_reference_is_not_a_problem(
        self, built: dict[str, str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with backend.use("reference"):
            code, text = printed(capsys)
        assert code == 0
        assert "backend        reference\n" in text and "  cpu          reference\n" in text
        assert "Everything is in order." in text


class TestGpus:
    def test_one_that_the_file_covers(
        self,
        built: dict[str, str],
        gpus: list[tuple[str, tuple[int, int]]],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        gpus.append(("NVIDIA H200", (9, 0)))
        code, text = printed(capsys)
        assert code == 0
        assert "CUDA kernels   80-real, 90a-real, 100, built with nvcc 13.0.88\n" in text
        assert "cuda:0: NVIDIA H200, compute capability 9.0, served by machine code in the file" in text
        assert "  cuda:0       native\n" in text
        assert "Everything is in order." in text

    def test_two_and_one_is_not_covered(
        self,
        built: dict[str, str],
        gpus: list[tuple[str, tuple[int, int]]],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        built["cuda_archs"] = "90-real"
        gpus += [("NVIDIA H200", (9, 0)), ("NVIDIA B200", (10, 0))]
        code, text = printed(capsys)
        assert code == 0
        assert "cuda:1: NVIDIA B200, compute capability 10.0, not covered by the file" in text
        assert (
            "The CUDA kernels do not run on cuda:1 (NVIDIA B200): reinstall with PROTOKERNELS_CUDA_ARCHS=100." in text
        )
        assert "cuda:0 (" not in text

    def test_a_file_without_cuda_kernels(
        self,
        built: dict[str, str],
        gpus: list[tuple[str, tuple[int, int]]],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        built["cuda_archs"] = built["cuda_compiler"] = ""
        gpus.append(("NVIDIA A100", (8, 0)))
        code, text = printed(capsys)
        assert code == 0
        assert "CUDA kernels   none: built for the CPU only\n" in text
        assert "  cuda:0       reference\n" in text
        assert "install nvcc and reinstall with PROTOKERNELS_CUDA=on" in text

    def test_a_driver_that_fails(
        self, built: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fails() -> bool:
            raise RuntimeError("CUDA unknown error\nlong advice")

        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", fails)
        code, text = printed(capsys)
        assert code == 0
        assert "none seen: torch fails to ask the driver: CUDA unknown error\n" in text

    @pytest.mark.parametrize(
        ("archs", "capability", "expected"),
        [
            (["80-real"], (8, 0), "machine code"),
            (["80-real"], (8, 9), "machine code"),
            (["80-real"], (7, 5), None),
            (["80-real"], (9, 0), None),
            (["86-real"], (8, 0), None),
            (["80"], (9, 0), "PTX"),
            (["80-virtual"], (8, 0), "PTX"),
            (["80-virtual", "80-real"], (8, 0), "machine code"),
            (["90a"], (9, 0), "machine code"),
            (["90a"], (10, 0), None),
            (["100f"], (10, 3), "machine code"),
            (["100f"], (12, 0), None),
            (["100"], (12, 0), "PTX"),
            (["native", "all"], (8, 0), None),
            ([], (8, 0), None),
        ],
    )
    def test_which_gpus_an_architecture_list_covers(
        self, archs: list[str], capability: tuple[int, int], expected: str | None
    ) -> None:
        assert doctor.covers(archs, capability) == expected


class TestSurroundings:
    def test_missing_extras_are_named(
        self, built: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        original = importlib.util.find_spec

        def hidden(name: str, package: str | None = None) -> Any:
            return None if name in ("tyro", "rich", "faiss") else original(name, package)

        monkeypatch.setattr(importlib.util, "find_spec", hidden)
        assert doctor.report()["extras"]["train"][-2:] == ["rich", "tyro"]
        text = printed(capsys)[1]
        assert "rich, tyro are missing" in text
        assert "Everything is in order." in text

    def test_a_folder_is_not_an_installed_module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "protokernels_no_such_module").mkdir()
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(doctor, "EXTRAS", {"train": ("protokernels_no_such_module", "numpy")})
        assert doctor.report()["extras"] == {"train": ["protokernels_no_such_module"]}

    def test_extras_are_those_of_the_project(self) -> None:
        from importlib.metadata import PackageNotFoundError, metadata

        try:
            provided = metadata("protokernels").get_all("Provides-Extra")
        except PackageNotFoundError:
            pytest.skip("the package is not installed, only built in place")
        assert sorted(doctor.EXTRAS) == sorted(provided or [])

    def test_data_folder(
        self,
        built: dict[str, str],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert "PROTOKERNELS_DATA is not set" in printed(capsys)[1]
        monkeypatch.setenv("PROTOKERNELS_DATA", str(tmp_path))
        assert f"data           {tmp_path}  (PROTOKERNELS_DATA)\n" in printed(capsys)[1]
        monkeypatch.setenv("PROTOKERNELS_DATA", "~nobody-here/x")
        assert "names a folder that does not exist: ~nobody-here/x." in printed(capsys)[1]
        monkeypatch.setenv("PROTOKERNELS_DATA", str(tmp_path / "absent"))
        code, text = printed(capsys)
        assert code == 0
        assert f"PROTOKERNELS_DATA names a folder that does not exist: {tmp_path / 'absent'}." in text

    @pytest.mark.parametrize(
        ("flags", "level"),
        [
            ("avx2 fma f16c avx512f avx512bw avx512dq avx512vl", "avx512"),
            ("avx2 fma f16c avx512f avx512bw avx512dq", "avx2"),
            ("avx2 fma", "generic"),
            ("", "generic"),
        ],
    )
    def test_the_level_a_cpu_could_run(self, flags: str, level: str) -> None:
        assert doctor.machine_level(flags.split()) == level
