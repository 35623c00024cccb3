# SPDX-License-Identifier: MIT
"""Compiles the kernels with CMake and ninja into ``protokernels/_C.abi3.so``. Everything else stands in pyproject.toml.

Environment:
    PROTOKERNELS_CUDA        auto (default): CUDA kernels if nvcc is found and GPUs, if any, are new enough; on: an error if not; off:
    CPU kernels only
    PROTOKERNELS_CUDA_ARCHS  e.g. "80;90a;100"; default: the GPUs of this machine from 8.0 on, or where there is none 80, 90a, 100
    (from CUDA 12.8 on) and PTX for later ones
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).parent.resolve()
FIRST_ARCH = 80  # what the kernels need
FIRST_CUDA = (12, 0)  # of which nvcc knows C++20
FIRST_GCC, LAST_GCC = 12, 20  # those that are looked for by their number


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


def output_of(*command: str) -> str:
    """What a program prints, or nothing if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def cxx() -> str | None:
    """The C++ compiler: CXX, or the first of c++, g++, g++-20, ..., g++-12 that will do; None if there is none at all."""
    asked = os.environ.get("CXX", "").strip()
    numbered = [f"g++-{version}" for version in range(LAST_GCC, FIRST_GCC - 1, -1)]
    seen = []
    for candidate in [asked] if asked else ["c++", "g++", *numbered, "clang++"]:
        if shutil.which(shlex.split(candidate)[0]) is None:
            continue
        text = output_of(*shlex.split(candidate), "--version")
        version = re.search(r"\b(\d+)\.\d+\.\d+", text) if "Free Software Foundation" in text else None
        if version and int(version[1]) >= FIRST_GCC:
            return candidate
        seen.append(f"{candidate} is {'g++ ' + version[0] if version else 'another compiler'}")
    if not seen and not asked:
        return None
    raise SetupError(
        f"the kernels need g++ {FIRST_GCC} or later, but {', '.join(seen) or f'CXX={asked} was not found'}: install g++-{FIRST_GCC} or a "
        "later one, which is found by this name, or set CXX"
    )


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


def gpu_archs() -> list[int]:
    """Compute capabilities of the GPUs present, such as 90, in order."""
    tool = shutil.which("nvidia-smi")
    lines = output_of(tool, "--query-gpu=compute_cap", "--format=csv,noheader").splitlines() if tool else []
    return sorted({int(line.replace(".", "")) for line in lines if re.fullmatch(r"\s*\d+\.\d+\s*", line)})


def archs_for(gpus: list[int], known: list[int]) -> str:
    """Architectures as CMake writes them: for these GPUs, or without any for A100, H100/H200, B200 and what comes later; known: to nvcc."""

    def machine_code(arch: int) -> str:
        return f"{arch}a-real" if arch == 90 else f"{arch}-real"  # 90a: with wgmma

    def ptx_of_the_newest(limit: int) -> str:
        return f"{max((arch for arch in known if arch <= limit), default=FIRST_ARCH)}-virtual"

    if gpus:  # one that nvcc does not know yet gets PTX, which the driver translates
        archs = [machine_code(gpu) if gpu in known else ptx_of_the_newest(gpu) for gpu in gpus]
    else:
        archs = [*(machine_code(arch) for arch in (80, 90, 100) if arch in known), ptx_of_the_newest(100)]
    return ";".join(dict.fromkeys(archs))


def cuda_archs() -> tuple[str | None, str]:
    """The CUDA compiler to use (None: CPU only) and the architectures to build for."""
    mode = os.environ.get("PROTOKERNELS_CUDA", "auto").lower()
    if mode not in ("auto", "on", "off"):
        raise SetupError(f"PROTOKERNELS_CUDA must be auto, on or off; got {mode!r}")
    if mode == "off":
        return None, ""
    asked = os.environ.get("PROTOKERNELS_CUDA_ARCHS", "").replace(",", ";").replace(" ", ";").strip(";")
    compiler, gpus = nvcc(), gpu_archs()
    missing = None
    if compiler is None:
        missing = "nvcc was not found: install the CUDA toolkit, or set CUDACXX or CUDA_HOME to it"
    elif not asked and gpus and gpus[-1] < FIRST_ARCH:
        missing = (
            "the kernels need a GPU of compute capability 8.0 or later, which this machine does not have; "
            'set PROTOKERNELS_CUDA_ARCHS ("80;90a") to build for another one'
        )
    if compiler is None or missing:
        if mode == "on":
            raise SetupError(f"PROTOKERNELS_CUDA=on but {missing}")
        print(f"protokernels: building the CPU kernels only (PROTOKERNELS_CUDA=on makes this an error): {missing}")
        return None, ""
    release = re.search(r"release (\d+)\.(\d+)", output_of(compiler, "--version"))
    if release and (int(release[1]), int(release[2])) < FIRST_CUDA:
        raise SetupError(
            f"{compiler} is of CUDA {release[1]}.{release[2]}, which is too old: the kernels need CUDA 12.0 or later; set CUDACXX or "
            "CUDA_HOME to such a one, or PROTOKERNELS_CUDA=off to build the CPU kernels only"
        )
    if asked:
        return compiler, asked
    gpus = [gpu for gpu in gpus if gpu >= FIRST_ARCH]
    known = [int(arch) for arch in re.findall(r"compute_(\d+)\b", output_of(compiler, "--list-gpu-arch"))]
    return compiler, archs_for(gpus, known or [*gpus, 80, 90, 100])


class CMakeBuild(build_ext):
    """Runs CMake and ninja. Without a C++ compiler the package is installed on its reference backend, and says so."""

    def build_extension(self, extension: Extension) -> None:
        cpp = cxx()
        if cpp is None:
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
        if not os.environ.get("CXX"):
            configure.append(f"-DCMAKE_CXX_COMPILER={cpp}")
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
