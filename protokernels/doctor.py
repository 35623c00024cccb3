# SPDX-License-Identifier: MIT
"""What is installed, what was built, what this machine offers, and which code a call will run.

    $ protokernels doctor
    protokernels   0.1.0  (/usr/lib/python3/site-packages/protokernels)
    Python         3.12.3
    torch          2.13.0+cpu
    numpy          2.4.6
    native code    _C.abi3.so, built with torch 2.13.0+cpu and GNU 13.3.0
    CUDA kernels   none: built for the CPU only
    CPU level      avx512  (this CPU: avx512)
    threads        8 of 8 logical CPUs
    GPUs           none seen: torch was built without CUDA
    backend        auto
      cpu          native
    extras         train: yes   test: pybind11 is missing   bench: faiss is missing   dev: build is missing
    data           /data  (PROTOKERNELS_DATA)

    Everything is in order.

Imports torch and numpy only, never fails, and ends with code 0 exactly when native kernels serve the CPU.

    >>> from protokernels import doctor
    >>> sorted(doctor.report())[:4]
    ['backend', 'cpu', 'cuda', 'data']
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from . import _native, backend
from ._version import __version__

EXTRAS: dict[str, tuple[str, ...]] = {
    "train": ("accelerate", "matplotlib", "medmnist", "monai", "nibabel", "rich", "sklearn", "tyro"),
    "test": ("abi3audit", "hypothesis", "pybind11", "pytest", "pytest_benchmark"),
    "bench": ("faiss", "pytest_benchmark", "vector_quantize_pytorch"),
    "dev": ("build", "mypy", "ruff"),
}
"""The modules that tell whether an optional extra is installed."""

LEVEL_FLAGS: dict[str, tuple[str, ...]] = {
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "avx2": ("avx2", "fma", "f16c"),
}
"""CPU features that each level of the kernels needs, best level first."""


def report() -> dict[str, Any]:
    """Collects everything the doctor prints, as plain values that ``json.dumps`` accepts.

    Returns:
        ``protokernels``, ``python``, ``torch``, ``numpy``: versions. ``native``: the library's path and what it was
        built with, or the problem. ``cpu``: level in use, level of the machine, threads. ``cuda``: compiler and
        architectures in the file, CUDA of torch, GPUs, each with its compute capability and how the file covers it.
        ``backend``: the one selected and, per device, what runs (``"native"``, ``"reference"`` or ``None``: calls
        raise) and the reason. ``extras``: per extra the modules that are missing. ``data``: the folder of
        PROTOKERNELS_DATA. ``problems``: one sentence, with what to do, for everything that needs attention.

    Example:
        >>> from protokernels import doctor
        >>> doctor.report()["backend"]["selected"] in ("auto", "native", "reference")
        True
    """
    build, build_problem = _build_info()
    archs = re.findall(r"[^\s;,]+", build.get("cuda_archs", ""))
    gpus, gpu_problem = _gpus(archs)
    devices = ["cpu", *(gpu["device"] for gpu in gpus)]
    result: dict[str, Any] = {
        "protokernels": {"version": __version__, "path": str(Path(__file__).parent)},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "native": {
            "library": str(_native.LIBRARY) if _native.LIBRARY is not None else None,
            "torch": build.get("torch"),
            "compiler": build.get("compiler"),
            "problem": _native.PROBLEM or build_problem,
        },
        "cpu": {
            "level": build.get("cpu_level"),
            "machine_level": machine_level(_cpu_flags()),
            "threads": torch.get_num_threads(),
            "logical_cpus": os.cpu_count(),
        },
        "cuda": {
            "compiler": build.get("cuda_compiler") or None,
            "archs": archs,
            "torch": torch.version.cuda,
            "gpus": gpus,
            "problem": gpu_problem,
        },
        "backend": {
            "selected": backend.get(),
            "in_use": {device: _in_use(device, build_problem) for device in devices},
        },
        "extras": {extra: [name for name in modules if not _importable(name)] for extra, modules in EXTRAS.items()},
        "data": _data_root(),
    }
    result["problems"] = _problems(result)
    return result


def main() -> int:
    """Prints the report; returns 0 if native kernels serve the CPU, else 1.

    Example:
        >>> from protokernels import doctor
        >>> code = doctor.main()  # doctest: +ELLIPSIS
        protokernels   ...
    """
    facts = report()
    for name, text in _lines(facts):
        print(f"{name:<15}{text}".rstrip())
    print()
    for problem in facts["problems"]:
        print(problem)
    if not facts["problems"]:
        print("Everything is in order.")
    return 0 if facts["native"]["problem"] is None else 1


def covers(archs: Iterable[str], capability: tuple[int, int]) -> str | None:
    """How code built for ``archs`` runs on a GPU: as ``"machine code"``, as ``"PTX"`` (compiled at first use) or not.

    Args:
        archs: entries as CMake writes them: ``"80"`` holds machine code and PTX, ``"80-real"`` and ``"80-virtual"`` one
            of them; an ``a`` (``"90a"``) binds to exactly this GPU, an ``f`` (``"100f"``) to its family.
        capability: compute capability (major, minor).

    Returns:
        ``"machine code"``, ``"PTX"`` or ``None``.

    Example:
        >>> covers(["80-real", "100"], (8, 6)), covers(["80-real", "100"], (12, 0)), covers(["80-real", "100"], (9, 0))
        ('machine code', 'PTX', None)
    """
    found = None
    for entry in archs:
        match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", entry)
        if match is None:
            continue
        built, letter, kind = (int(match[1]), int(match[2])), match[3], match[4]
        if letter == "a":
            fits_code = fits_ptx = built == capability
        else:
            fits_code = built[0] == capability[0] and built[1] <= capability[1]
            fits_ptx = fits_code if letter == "f" else built <= capability
        if kind != "-virtual" and fits_code:
            return "machine code"
        if kind != "-real" and fits_ptx:
            found = "PTX"
    return found


def machine_level(flags: Iterable[str]) -> str:
    """The best level of the CPU kernels for a CPU with these features, as ``/proc/cpuinfo`` names them.

    Example:
        >>> machine_level(["sse2", "avx2", "fma", "f16c"])
        'avx2'
    """
    present = set(flags)
    return next((level for level, needed in LEVEL_FLAGS.items() if present.issuperset(needed)), "generic")


# ------------------------------------------------------------------------------------------------------ looking around


def _build_info() -> tuple[dict[str, Any], str | None]:
    try:
        return _native.build_info(), None
    except RuntimeError as error:  # a wrong PROTOKERNELS_CPU_LEVEL stops every native call, this one too
        return {}, f"the native library is there but refuses to work: {str(error).splitlines()[0]}"


def _cpu_flags() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, flags=re.M)
    return match[1].split() if match else []


def _gpus(archs: Sequence[str]) -> tuple[list[dict[str, Any]], str | None]:
    if torch.version.cuda is None:
        return [], "torch was built without CUDA"
    try:
        if not torch.cuda.is_available():
            return [], "torch finds no usable GPU or driver"
        found = []
        for index in range(torch.cuda.device_count()):
            capability = torch.cuda.get_device_capability(index)
            found.append(
                {
                    "device": f"cuda:{index}",
                    "name": torch.cuda.get_device_name(index),
                    "capability": f"{capability[0]}.{capability[1]}",
                    "covered_by": covers(archs, capability),
                }
            )
        return found, None
    except (RuntimeError, AssertionError) as error:
        return [], f"torch fails to ask the driver: {str(error).splitlines()[0]}"


def _in_use(device: str, build_problem: str | None) -> dict[str, str | None]:
    selected = backend.get()
    if selected == "reference":
        return {"runs": "reference", "reason": "selected"}
    reason = build_problem or backend.unavailable_reason(device.split(":")[0])
    if reason is None:
        return {"runs": "native", "reason": None}
    # a library that loads but refuses to work is not replaced by the reference: its calls raise
    return {"runs": "reference" if selected == "auto" and build_problem is None else None, "reason": reason}


def _importable(module: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
        return spec is not None and spec.origin is not None  # a mere folder of that name has no origin
    except (ImportError, ValueError):
        return False


def _data_root() -> dict[str, Any]:
    root = os.environ.get("PROTOKERNELS_DATA") or None
    return {"root": root, "exists": root is not None and Path(os.path.expanduser(root)).is_dir()}


def _problems(facts: dict[str, Any]) -> list[str]:
    found = []
    problem = facts["native"]["problem"]
    if problem is not None:
        found.append(f"No native kernels on the CPU: {problem}.")
    for gpu in facts["cuda"]["gpus"]:
        name = f"{gpu['device']} ({gpu['name']})"
        if problem is None and not facts["cuda"]["archs"]:
            advice = "install nvcc and reinstall with PROTOKERNELS_CUDA=on"
            found.append(f"{name} runs the plain PyTorch reference: no CUDA kernels were built; {advice}.")
        elif problem is None and gpu["covered_by"] is None:
            arch = gpu["capability"].replace(".", "")
            found.append(f"The CUDA kernels do not run on {name}: reinstall with PROTOKERNELS_CUDA_ARCHS={arch}.")
    if facts["data"]["root"] is not None and not facts["data"]["exists"]:
        found.append(f"PROTOKERNELS_DATA names a folder that does not exist: {facts['data']['root']}.")
    return found


# ------------------------------------------------------------------------------------------------------------ printing


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    native, cpu, cuda = facts["native"], facts["cpu"], facts["cuda"]
    if native["library"] is None:
        library = "none"
    elif native["torch"] is None:
        library = Path(native["library"]).name
    else:
        library = f"{Path(native['library']).name}, built with torch {native['torch']} and {native['compiler']}"
    if cuda["archs"]:
        kernels = f"{', '.join(cuda['archs'])}, built with {cuda['compiler']}"
    else:
        kernels = "none" if native["library"] is None or native["torch"] is None else "none: built for the CPU only"
    gpus = [_gpu_line(gpu, bool(cuda["archs"])) for gpu in cuda["gpus"]] or [f"none seen: {cuda['problem']}"]
    if cuda["torch"] is not None:
        gpus.append(f"torch was built for CUDA {cuda['torch']}")
    lines = [
        ("protokernels", f"{facts['protokernels']['version']}  ({facts['protokernels']['path']})"),
        ("Python", facts["python"]),
        ("torch", facts["torch"]),
        ("numpy", facts["numpy"]),
        ("native code", library),
        ("CUDA kernels", kernels),
        ("CPU level", f"{cpu['level'] or 'none'}  (this CPU: {cpu['machine_level']})"),
        ("threads", f"{cpu['threads']} of {cpu['logical_cpus']} logical CPUs"),
        *_labelled("GPUs", gpus),
        ("backend", facts["backend"]["selected"]),
        *(
            (f"  {device}", use["runs"] or "none: every call raises")
            for device, use in facts["backend"]["in_use"].items()
        ),
        ("extras", "   ".join(_extra_text(extra, missing) for extra, missing in facts["extras"].items())),
        ("data", _data_text(facts["data"])),
    ]
    return lines


def _labelled(label: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    return [(label if index == 0 else "", text) for index, text in enumerate(texts)]


def _gpu_line(gpu: dict[str, Any], built: bool) -> str:
    if gpu["covered_by"]:
        covered = f"served by {gpu['covered_by']} in the file"
    else:
        covered = "not covered by the file" if built else "no kernels built"
    return f"{gpu['device']}: {gpu['name']}, compute capability {gpu['capability']}, {covered}"


def _extra_text(extra: str, missing: Sequence[str]) -> str:
    if not missing:
        return f"{extra}: yes"
    return f"{extra}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"


def _data_text(data: dict[str, Any]) -> str:
    if data["root"] is None:
        return "PROTOKERNELS_DATA is not set (the embedded data sets need no folder)"
    return f"{data['root']}  (PROTOKERNELS_DATA{'' if data['exists'] else '; does not exist'})"


if __name__ == "__main__":
    sys.exit(main())
