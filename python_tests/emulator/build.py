# SPDX-License-Identifier: MIT
"""Builds and loads the CUDA emulator: one small Python module per op.

The module of an op is made of `csrc/emulator/bind_<op>.cpp`, the kernels `csrc/ops/cuda/<op>_*.cu` and the emulator
itself. It exists in three variants:

- `"watched"`: every memory access of a kernel is checked (bounds, races, reads before writes). The one to use.
- `"plain"`: no checks beyond barriers, alignment and poison, and threads as on processors other than x86-64. Not faster.
- `"address"`: compiled with AddressSanitizer; use it through `run_under_address_sanitizer`.

A test of an op looks like this:

    emulator = load("prototypes")
    for seed in SEEDS:
        emulator.configure(seed=seed)
        out = poisoned((n, k))
        emulator.soft_assign(z, prototypes, out)

Builds lie under `build/emulator` and are brought up to date by ninja at every call.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

Variant = Literal["watched", "plain", "address"]

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "emulator"
COMPILER = os.environ.get("CXX", "g++")
RUNTIME = ("fiber", "runtime", "memory", "warp", "atomics", "watchdog")

SEEDS = (0, 1, 2, 3, 4)
"""Thread orders that a kernel test goes through; 0 is the natural order."""

COMMON_FLAGS = (
    "-std=c++20 -fPIC -fvisibility=hidden -fno-gnu-unique -fno-strict-aliasing -Icsrc"
    " -Wall -Wextra -Wno-unknown-pragmas"
)
ADDRESS_FLAGS = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,alignment,bounds -fno-sanitize-recover=all"
# A call in every basic block, to notice a kernel that never ends; the address variant has a time limit from outside.
WATCHDOG_FLAGS = "-fsanitize-coverage=trace-pc"
RUNTIME_FLAGS = {
    "watched": "-O2 -DPK_EMULATOR_WATCHED",
    "plain": "-O2 -DPK_EMULATOR_UCONTEXT",
    "address": ADDRESS_FLAGS,
}
# -O1 everywhere: -O2 takes the compiler nearly twice as long, and kernels are compiled once for tests of a few seconds.
KERNEL_FLAGS = {
    "watched": f"-O1 -g1 -fsanitize=thread --param=tsan-instrument-func-entry-exit=0 {WATCHDOG_FLAGS}",
    "plain": f"-O1 -g1 {WATCHDOG_FLAGS}",
    "address": ADDRESS_FLAGS,
}
# The watched build must not link the thread sanitizer's library: watch.cpp takes its place.
LINK_FLAGS: dict[Variant, str] = {"watched": "", "plain": "", "address": "-fsanitize=address,alignment,bounds"}


class BuildError(RuntimeError):
    """The emulator or a kernel did not compile; the message holds the compiler's output."""


def _ninja() -> str | None:
    beside_python = Path(sys.executable).parent / "ninja"
    return str(beside_python) if beside_python.exists() else shutil.which("ninja")


def missing_tools() -> str | None:
    """Returns what is missing to build the emulator here, or None."""
    missing = [name for name, found in ((COMPILER, shutil.which(COMPILER)), ("ninja", _ninja())) if found is None]
    if importlib.util.find_spec("pybind11") is None:
        missing.append("pybind11")
    return f"the emulator needs {' and '.join(missing)}" if missing else None


def operations() -> list[str]:
    """Returns the ops that have a binding file, `selftest` among them."""
    return sorted(path.stem.removeprefix("bind_") for path in (ROOT / "csrc/emulator").glob("bind_*.cpp"))


def _kernels(op: str) -> list[Path]:
    if op == "selftest":
        return sorted((ROOT / "csrc/emulator/selftest").glob("*.cu"))
    return sorted((ROOT / "csrc/ops/cuda").glob(f"{op}_*.cu"))


def _target(op: str, variant: Variant) -> Path:
    return FOLDER / variant / op / f"protokernels_emulator{sysconfig.get_config_var('EXT_SUFFIX')}"


def _ninja_file() -> str:
    import pybind11

    includes = " ".join(f"-isystem {path}" for path in (sysconfig.get_paths()["include"], pybind11.get_include()))
    lines = ["ninja_required_version = 1.5", "builddir = build/emulator"]
    for name, flags in (
        ("bind", f"-O0 {includes}"),
        *((f"runtime_{variant}", flags) for variant, flags in RUNTIME_FLAGS.items()),
        *((f"kernel_{variant}", f"{flags} -x c++") for variant, flags in KERNEL_FLAGS.items()),
    ):
        lines += [
            f"rule {name}",
            f"  command = {COMPILER} {COMMON_FLAGS} {flags} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
    for variant, flags in LINK_FLAGS.items():
        lines += [f"rule link_{variant}", f"  command = {COMPILER} -shared {flags} $in -o $out -ldl"]
    # Each object stands once, whatever number of modules it goes into.
    objects: dict[str, str] = {}

    def compiled(rule: str, source: Path, folder: str) -> str:
        relative = source.relative_to(ROOT)
        target = f"build/emulator/{folder}/objects/{relative.with_suffix('.o')}"
        objects[target] = f"build {target}: {rule} {relative}"
        return target

    links = []
    for op in operations():
        binding = compiled("bind", ROOT / f"csrc/emulator/bind_{op}.cpp", "common")
        for variant in LINK_FLAGS:
            inputs = [binding]
            parts = (*RUNTIME, "watch") if variant == "watched" else RUNTIME
            inputs += [compiled(f"runtime_{variant}", ROOT / f"csrc/emulator/{part}.cpp", variant) for part in parts]
            inputs += [compiled(f"kernel_{variant}", kernel, variant) for kernel in _kernels(op)]
            target = _target(op, variant).relative_to(ROOT)
            links.append(f"build {target}: link_{variant} {' '.join(inputs)}")
    return "\n".join([*lines, *objects.values(), *links]) + "\n"


def build(op: str, variant: Variant = "watched") -> Path:
    """Brings the module of `op` up to date and returns its path.

    Raises:
        BuildError: a tool is missing, the op has no binding file, or the compiler refused.
    """
    missing = missing_tools()
    if missing:
        raise BuildError(missing)
    if op not in operations():
        raise BuildError(
            f"emulator: op must be one of {', '.join(operations())}; got {op}; add csrc/emulator/bind_{op}.cpp"
        )
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        script = FOLDER / "build.ninja"
        text = _ninja_file()
        if not script.exists() or script.read_text() != text:
            script.write_text(text)
        target = _target(op, variant)
        command = [str(_ninja()), "-f", str(script.relative_to(ROOT)), str(target.relative_to(ROOT))]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    if result.returncode != 0:
        raise BuildError(f"emulator: building {op} ({variant}) failed\n{result.stdout[-6000:]}{result.stderr[-2000:]}")
    return target


def _import(path: Path) -> ModuleType:
    # pybind11 keeps modules by their full name, so each one gets its own: <variant>.<op>.protokernels_emulator.
    name = f"{path.parent.parent.name}.{path.parent.name}.protokernels_emulator"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BuildError(f"emulator: {path} is not an extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def load(op: str, variant: Variant = "watched") -> Any:
    """Builds and imports the emulator module of `op`; see the module docstring for the variants."""
    if variant == "address" and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        raise BuildError("emulator: the address variant runs only inside run_under_address_sanitizer")
    return _import(build(op, variant))


def run_under_address_sanitizer(op: str, code: str, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a new process where `emulator` is the AddressSanitizer build of `op` and `np` is NumPy.

    Args:
        op: name of the op.
        code: statements; they run after the imports.
        timeout: seconds.

    Returns:
        The finished process. The sanitizer's report, if there is one, stands in `stderr`, and `returncode` is not 0.
    """
    path = build(op, "address")
    # The C++ library must be there when the sanitizer looks for the function that throws.
    libraries = [
        subprocess.run(
            [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, timeout=60, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    prelude = (
        "import numpy as np\nfrom pathlib import Path\nfrom python_tests.emulator.build import _import, poisoned\n"
        f"emulator = _import(Path({str(path)!r}))\n"
    )
    return subprocess.run(
        [sys.executable, "-c", prelude + code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def poisoned(shape: int | tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Returns an array for an output: what a kernel forgets to write stays NaN (all bits set, for integers)."""
    array = np.empty(shape, dtype=dtype)
    array.reshape(-1).view(np.uint8)[:] = 0xFF
    return array
