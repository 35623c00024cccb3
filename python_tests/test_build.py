# SPDX-License-Identifier: MIT
"""How the package is built: the choice of CUDA, the source archive, a build without a compiler, one that must fail."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from protokernels.doctor import covers

ROOT = Path(__file__).resolve().parents[1]
NVCC = "/cuda/bin/nvcc"


@pytest.fixture
def tools() -> dict[str, str]:
    """The programs on the PATH of the machine that `setup_script` sees; the test fills it."""
    return {}


@pytest.fixture
def answers() -> dict[str, str]:
    """What those programs print, by an argument; the test fills it."""
    return {}


@pytest.fixture
def setup_script(monkeypatch: pytest.MonkeyPatch, tools: dict[str, str], answers: dict[str, str]) -> ModuleType:
    """setup.py as a module, without running it; no trace of CUDA in the environment."""
    setuptools = pytest.importorskip("setuptools", "77", reason="setuptools>=77 is needed to load setup.py")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("protokernels_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("PROTOKERNELS_CUDA", "PROTOKERNELS_CUDA_ARCHS", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module.shutil, "which", lambda name, *_, **__: tools.get(name))

    def run(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, "".join(answers.get(word, "") for word in command), "")

    monkeypatch.setattr(module.subprocess, "run", run)
    return module


class TestCudaChoice:
    def test_on_without_nvcc_is_an_error_that_says_what_to_do(
        self, setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PROTOKERNELS_CUDA", "on")
        with pytest.raises(setup_script.SetupError, match=r"PROTOKERNELS_CUDA=on but nvcc was not found.*CUDA_HOME"):
            setup_script.cuda_archs()

    def test_auto_without_nvcc_builds_for_the_cpu_and_says_so(
        self, setup_script: ModuleType, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert setup_script.cuda_archs() == (None, "")
        out = capsys.readouterr().out
        assert "building the CPU kernels only" in out and "nvcc was not found: install the CUDA toolkit" in out

    def test_off_ignores_nvcc(
        self, setup_script: ModuleType, tools: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tools.update({"nvcc": NVCC, NVCC: NVCC})
        monkeypatch.setenv("PROTOKERNELS_CUDA", "OFF")
        assert setup_script.cuda_archs() == (None, "")

    @pytest.mark.parametrize("value", ["yes", "1", "cpu", ""])
    def test_other_values_are_refused(
        self, setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch, value: str
    ) -> None:
        monkeypatch.setenv("PROTOKERNELS_CUDA", value)
        with pytest.raises(setup_script.SetupError, match=f"must be auto, on or off; got '{value}'"):
            setup_script.cuda_archs()

    @pytest.mark.parametrize("value", ["auto", "on"])
    def test_the_default_list_covers_three_generations_and_what_comes_later(
        self, setup_script: ModuleType, tools: dict[str, str], monkeypatch: pytest.MonkeyPatch, value: str
    ) -> None:
        tools.update({"nvcc": NVCC, NVCC: NVCC})
        monkeypatch.setenv("PROTOKERNELS_CUDA", value)
        compiler, archs = setup_script.cuda_archs()
        assert compiler == NVCC
        served = {capability: covers(archs.split(";"), capability) for capability in ((8, 0), (9, 0), (10, 0))}
        assert set(served.values()) == {"machine code"}, served
        assert covers(archs.split(";"), (13, 0)) == "PTX"

    @pytest.mark.parametrize("value", ["80;90a", "80,90a", "80 90a", " 80;90a; "])
    def test_a_list_of_ones_own(
        self, setup_script: ModuleType, tools: dict[str, str], monkeypatch: pytest.MonkeyPatch, value: str
    ) -> None:
        tools.update({"nvcc": NVCC, NVCC: NVCC})
        monkeypatch.setenv("PROTOKERNELS_CUDA_ARCHS", value)
        assert setup_script.cuda_archs() == (NVCC, "80;90a")

    @pytest.mark.parametrize(
        "gpus, known, expected",
        [
            ("9.0 8.6 9.0", "80 86 90 100 120", "86-real;90a-real"),
            ("12.0", "80 86 90 100 120", "120-real"),
            ("12.0 10.0", "80 86 90", "90-virtual"),
            ("7.5 8.0", "75 80 90", "80-real"),
            ("9.0", "", "90a-real"),
            ("", "80 86 90", "80-real;90a-real;90-virtual"),
            ("", "80 86 90 100 103 120", "80-real;90a-real;100-real;100-virtual"),
        ],
    )
    def test_gpus_that_are_present_and_those_that_nvcc_knows(
        self,
        setup_script: ModuleType,
        tools: dict[str, str],
        answers: dict[str, str],
        gpus: str,
        known: str,
        expected: str,
    ) -> None:
        tools.update({"nvcc": NVCC, NVCC: NVCC, "nvidia-smi": "/bin/nvidia-smi"})
        answers["--query-gpu=compute_cap"] = "\n".join(gpus.split())
        answers["--list-gpu-arch"] = "\n".join(f"compute_{arch}" for arch in known.split())
        assert setup_script.cuda_archs() == (NVCC, expected)

    def test_gpus_that_are_too_old(
        self,
        setup_script: ModuleType,
        tools: dict[str, str],
        answers: dict[str, str],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        tools.update({"nvcc": NVCC, NVCC: NVCC, "nvidia-smi": "/bin/nvidia-smi"})
        answers["--query-gpu=compute_cap"] = "7.5\n6.1\n"
        assert setup_script.cuda_archs() == (None, "")
        assert "need a GPU of compute capability 8.0 or later" in capsys.readouterr().out
        monkeypatch.setenv("PROTOKERNELS_CUDA", "on")
        with pytest.raises(setup_script.SetupError, match=r"PROTOKERNELS_CUDA=on but .* set PROTOKERNELS_CUDA_ARCHS"):
            setup_script.cuda_archs()
        monkeypatch.setenv("PROTOKERNELS_CUDA_ARCHS", "90a")
        assert setup_script.cuda_archs() == (NVCC, "90a")

    def test_a_compiler_that_is_too_old(
        self, setup_script: ModuleType, tools: dict[str, str], answers: dict[str, str]
    ) -> None:
        tools.update({"nvcc": NVCC, NVCC: NVCC})
        answers["--version"] = "Cuda compilation tools, release 11.8, V11.8.89"
        with pytest.raises(
            setup_script.SetupError, match=rf"{NVCC} is of CUDA 11.8.*12.0 or later.*PROTOKERNELS_CUDA=off"
        ):
            setup_script.cuda_archs()
        answers["--version"] = "Cuda compilation tools, release 12.0, V12.0.76"
        assert setup_script.cuda_archs()[0] == NVCC

    def test_the_toolkit_named_by_cuda_home_goes_before_the_path(
        self, setup_script: ModuleType, tools: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tools.update({NVCC: NVCC, "nvcc": "/bin/nvcc", "/bin/nvcc": "/bin/nvcc"})
        assert setup_script.nvcc() == "/bin/nvcc"
        monkeypatch.setenv("CUDA_HOME", "/cuda")
        assert setup_script.nvcc() == NVCC


def gnu(version: str) -> str:
    return f"g++ (Ubuntu {version}-1ubuntu1~22.04) {version}\nCopyright (C) 2022 Free Software Foundation, Inc."


class TestCompilerChoice:
    @pytest.mark.parametrize(
        "versions, expected",
        [
            ({"c++": gnu("12.2.0")}, "c++"),
            ({"c++": gnu("11.4.0"), "g++": gnu("11.4.0"), "g++-12": gnu("12.3.0"), "g++-14": gnu("14.2.0")}, "g++-14"),
            ({"c++": "Debian clang version 19.1.7", "g++": gnu("13.3.0"), "clang++": "clang version 19.1.7"}, "g++"),
            ({}, None),
        ],
    )
    def test_the_first_that_will_do(
        self,
        setup_script: ModuleType,
        tools: dict[str, str],
        answers: dict[str, str],
        versions: dict[str, str],
        expected: str | None,
    ) -> None:
        tools.update({name: f"/bin/{name}" for name in versions})
        answers.update(versions)
        assert setup_script.cxx() == expected

    def test_none_that_will_do(self, setup_script: ModuleType, tools: dict[str, str], answers: dict[str, str]) -> None:
        tools.update({"g++": "/bin/g++", "clang++": "/bin/clang++"})
        answers.update({"g++": gnu("11.4.0"), "clang++": "clang version 19.1.7"})
        message = r"g\+\+ 12 or later, but g\+\+ is g\+\+ 11.4.0, clang\+\+ is another compiler: install g\+\+-12"
        with pytest.raises(setup_script.SetupError, match=message):
            setup_script.cxx()

    def test_the_one_that_is_asked_for(
        self, setup_script: ModuleType, tools: dict[str, str], answers: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tools.update({"g++": "/bin/g++", "ccache": "/bin/ccache", "old": "/bin/old"})
        answers.update({"g++": gnu("12.2.0"), "ccache": "", "old": gnu("10.2.1")})
        monkeypatch.setenv("CXX", "ccache g++")
        assert setup_script.cxx() == "ccache g++"
        for value, found in (("old", r"old is g\+\+ 10.2.1"), ("gone", "CXX=gone was not found")):
            monkeypatch.setenv("CXX", value)
            with pytest.raises(setup_script.SetupError, match=found):
                setup_script.cxx()


def source_tree(folder: Path) -> Path:
    """A copy of the checkout's sources, with two leftovers of a build that no archive may contain."""
    tree = folder / "protokernels"
    unwanted = shutil.ignore_patterns(
        ".*", "build", "dist", "runs", "__pycache__", "*.egg-info", "*.so", "*.o", "*.pyc"
    )
    shutil.copytree(ROOT, tree, ignore=unwanted)
    (tree / "protokernels" / "_C.abi3.so").write_bytes(b"stale")
    (tree / "csrc" / "stale.o").write_bytes(b"stale")
    return tree


def build_backend(tree: Path, hook: str, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Calls a hook of the build backend as a front end does, without isolation."""
    pytest.importorskip("setuptools", "77", reason="setuptools>=77 is needed to build the package without isolation")
    out.mkdir()
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(out)!r}))"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PROTOKERNELS"))}
    command = [sys.executable, "-c", code]
    environment = {**inherited, **environment}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=300, check=False)


class TestBuild:
    def test_the_source_archive_is_complete_and_holds_nothing_compiled(self, tmp_path: Path) -> None:
        tree = source_tree(tmp_path)
        done = build_backend(tree, "build_sdist", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        (archive,) = (tmp_path / "out").glob("protokernels-*.tar.gz")
        with tarfile.open(archive) as opened:
            names = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
        wanted = {"CMakeLists.txt", "LICENSE", "README.md", "constraints.txt", "pyproject.toml", "setup.py"}
        for folder in ("csrc", "python_tests", "benchmarks", "protokernels"):
            files = {str(path.relative_to(tree)) for path in (tree / folder).rglob("*") if path.is_file()}
            wanted |= {name for name in files if not name.endswith((".so", ".o", ".pyc"))}
        assert wanted - names == set()
        assert [name for name in names if name.endswith((".so", ".o", ".pyc"))] == []

    def test_without_a_compiler_the_wheel_has_no_library_and_the_build_says_so(self, tmp_path: Path) -> None:
        tree = source_tree(tmp_path)
        (tree / "protokernels" / "_C.abi3.so").unlink()
        empty = tmp_path / "empty"
        empty.mkdir()
        done = build_backend(tree, "build_wheel", tmp_path / "out", PATH=str(empty), CXX="")
        assert done.returncode == 0, done.stderr
        assert "no C++ compiler found; installing without native kernels" in done.stdout
        (wheel,) = (tmp_path / "out").glob("*.whl")
        names = zipfile.ZipFile(wheel).namelist()
        assert [name for name in names if name.endswith(".so")] == []
        assert "protokernels/__init__.py" in names and "protokernels/py.typed" in names
        assert {name.split("/")[0].split("-")[0] for name in names} == {"protokernels"}

    @pytest.mark.parametrize(
        ("value", "message"),
        [("on", "PROTOKERNELS_CUDA=on but nvcc was not found"), ("maybe", "must be auto, on or off; got 'maybe'")],
    )
    def test_a_build_that_cannot_be_as_asked_fails(self, tmp_path: Path, value: str, message: str) -> None:
        compiler = shutil.which(os.environ.get("CXX", "c++"))
        if compiler is None:
            pytest.skip("without a C++ compiler the build ends earlier")
        tree = source_tree(tmp_path)
        script = (tree / "setup.py").read_text()
        assert "/usr/local/cuda/bin/nvcc" in script  # the one place that no environment variable hides
        (tree / "setup.py").write_text(script.replace("/usr/local/cuda/bin/nvcc", str(tmp_path / "nvcc")))
        empty = tmp_path / "empty"
        empty.mkdir()
        environment = {"PROTOKERNELS_CUDA": value, "CXX": compiler, "PATH": str(empty), "CUDACXX": "", "CUDA_HOME": ""}
        done = build_backend(tree, "build_wheel", tmp_path / "out", **environment)
        assert done.returncode != 0
        assert message in done.stdout + done.stderr
        assert list((tmp_path / "out").glob("*.whl")) == []
