# SPDX-License-Identifier: MIT
"""Compiles the kernels with CMake and ninja into ``protokernels/_C.abi3.so``. Everything else stands in pyproject.toml.

Environment:
    PROTOKERNELS_CUDA        auto (default): CUDA kernels if nvcc is found; on: an error if it is not; off: CPU kernels only
    PROTOKERNELS_CUDA_ARCHS  e.g. "80;90a;100"; default: the GPUs of this machine, or 80, 90a, 100 and PTX for later
    chips where there is none
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).parent.resolve()
PORTABLE_ARCHS = (
    "80-real;90a-real;100"  # machine code for A100, H100/H200, B200; PTX of the last for whatever comes later
)


def torch_installation() -> tuple[Path, str]:
    """Where torch lies and its version, without importing it (that takes seconds and may need CUDA libraries)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SetupError("torch is not installed: drop --no-build-isolation, or install torch>=2.10 first")
    root = Path(spec.origin).parent
    match = re.search(r"__version__ *(?::[^=]*)?= *['\"]([^'\"]+)", (root / "version.py").read_text())
    version = match.group(1) if match else "unknown"
    parts = re.match(r"(\d+)\.(\d+)", version)
    if parts and (int(parts[1]), int(parts[2])) < (2, 10):
        raise SetupError(f"torch {version} is too old to build with: the stable ABI used here needs torch>=2.10")
    return root, version


def nvcc() -> str | None:
    """The CUDA compiler: CUDACXX, CUDA_HOME, PATH or /usr/local/cuda, in this order."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [
        os.environ.get("CUDACXX"),
        f"{home}/bin/nvcc" if home else None,
        shutil.which("nvcc"),
        "/usr/local/cuda/bin/nvcc",
    ]
    return next((c for c in candidates if c and shutil.which(c)), None)


def gpu_archs() -> str | None:
    """Compute capabilities of the GPUs present, as CMake writes them, or None."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        query = subprocess.run(
            [tool, "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = sorted(
        {line.strip().replace(".", "") for line in query.stdout.splitlines() if re.fullmatch(r"\d+\.\d+", line.strip())}
    )
    return ";".join(f"{arch}a-real" if arch == "90" else f"{arch}-real" for arch in found) or None  # 90a: with wgmma


def cuda_archs() -> tuple[str | None, str]:
    """The CUDA compiler to use (None: CPU only) and the architectures to build for."""
    mode = os.environ.get("PROTOKERNELS_CUDA", "auto").lower()
    if mode not in ("auto", "on", "off"):
        raise SetupError(f"PROTOKERNELS_CUDA must be auto, on or off; got {mode!r}")
    if mode == "off":
        return None, ""
    compiler = nvcc()
    if compiler is None:
        if mode == "on":
            raise SetupError(
                "PROTOKERNELS_CUDA=on but nvcc was not found: install the CUDA toolkit, or set CUDACXX or CUDA_HOME to it"
            )
        print("protokernels: nvcc not found, building the CPU kernels only (PROTOKERNELS_CUDA=on makes this an error)")
        return None, ""
    archs = os.environ.get("PROTOKERNELS_CUDA_ARCHS", "").replace(",", ";").replace(" ", ";").strip(";")
    return compiler, archs or gpu_archs() or PORTABLE_ARCHS


class CMakeBuild(build_ext):
    """Runs CMake and ninja. Without a C++ compiler the package is installed on its reference backend, and says so."""

    def build_extension(self, extension: Extension) -> None:
        if (
            shutil.which(os.environ.get("CXX", "c++")) is None
            and shutil.which("g++") is None
            and shutil.which("clang++") is None
        ):
            if os.environ.get("PROTOKERNELS_CUDA", "auto").lower() == "on":
                raise SetupError("PROTOKERNELS_CUDA=on but there is no C++ compiler: install g++ 12 or later")
            print(
                "protokernels: no C++ compiler found; installing without native kernels. `protokernels doctor` repeats this."
            )
            return
        torch_root, torch_version = torch_installation()
        compiler, archs = cuda_archs()
        output = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            shutil.which("cmake") or "cmake",
            "-GNinja",
            f"-S{ROOT}",
            f"-B{build}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DTORCH_ROOT={torch_root}",
            f"-DTORCH_VERSION={torch_version}",
            f"-DCUDA_ARCHS={archs}",
        ]
        ninja = shutil.which("ninja")
        if ninja:
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        if compiler:
            configure.append(f"-DCMAKE_CUDA_COMPILER={compiler}")
        try:
            subprocess.run(configure, check=True)
            subprocess.run([configure[0], "--build", str(build)], check=True)
        except FileNotFoundError as error:
            raise CompileError(f"cmake was not found ({error}): pip install cmake ninja") from error
        except subprocess.CalledProcessError as error:
            raise CompileError(f"the native build failed; the compiler's message stands above ({error})") from error


class Abi3Wheel(bdist_wheel):
    """One wheel for every Python from 3.10 on: nothing in it depends on the interpreter's version."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return ("cp310", "abi3", platform) if python.startswith("cp") else (python, abi, platform)


setup(
    ext_modules=[Extension("protokernels._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Abi3Wheel},
)
