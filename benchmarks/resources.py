# SPDX-License-Identifier: MIT
"""What each CUDA kernel takes of a multiprocessor, by the assembler's own report; needs nvcc, no GPU.

    python benchmarks/resources.py            # every csrc/ops/cuda/*.cu -> benchmarks/results/resources.json
    python benchmarks/resources.py csrc/ops/cuda/warp_kernel.cu --arch sm_80            # these only, on the screen

Registers, spills, stack and static shared memory are read from `ptxas -v`; the threads of a block from the kernel's
`__launch_bounds__`. A kernel with dynamic shared memory says how much in a comment above it, at the size that counts:

    // resources: dynamic shared 34816 bytes

The command fails when a kernel spills registers, uses local memory, or leaves one of these facts open. A file whose code, with all that
it includes, is the one that the JSON was measured on is not compiled again (`--all` does it all the same).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "resources.json"
FLAGS = ("-std=c++20", "-O3", "-cubin", "-Xptxas", "-v")


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor has (CUDA programming guide, "Compute capabilities")."""

    warps: int
    blocks: int
    registers: int
    shared_bytes: int
    shared_bytes_per_block: int


LIMITS = {
    "sm_80": Limits(warps=64, blocks=32, registers=65536, shared_bytes=164 * 1024, shared_bytes_per_block=163 * 1024),
    "sm_90": Limits(warps=64, blocks=32, registers=65536, shared_bytes=228 * 1024, shared_bytes_per_block=227 * 1024),
    "sm_100": Limits(warps=64, blocks=32, registers=65536, shared_bytes=228 * 1024, shared_bytes_per_block=227 * 1024),
}

SHIPPED = {"sm_90": "sm_90a"}
"""What is compiled for an architecture where that is not its name: wgmma is of sm_90a alone (see setup.py)."""


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture; sizes in bytes, occupancy as a share of the multiprocessor's warps."""

    file: str
    kernel: str
    architecture: str
    threads: int | None
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    static_shared: int
    dynamic_shared: int | None
    allowed_spill: int = 0
    blocks_per_multiprocessor: int | None = None
    occupancy: float | None = None
    limited_by: str | None = None

    def problems(self) -> list[str]:
        """Returns one sentence for everything that must not be."""
        where = f"{self.file}: {self.kernel} on {self.architecture}"
        found = []
        if max(self.spill_stores, self.spill_loads) > self.allowed_spill:
            found.append(
                f"{where} spills registers ({self.spill_stores} bytes stored, {self.spill_loads} loaded);"
                " use fewer or a looser bound, or say '// resources: spills at most N bytes' and why"
            )
        if self.stack > self.allowed_spill:
            found.append(f"{where} uses {self.stack} bytes of local memory; index its arrays with constants")
        if self.threads is None:
            found.append(f"{where} does not say how many threads a block has; add __launch_bounds__")
        if self.dynamic_shared is None:
            found.append(
                f"{where} does not say how much dynamic shared memory it uses;"
                " add '// resources: dynamic shared N bytes'"
            )
        if self.blocks_per_multiprocessor == 0:
            found.append(f"{where} does not fit on a multiprocessor; {self.limited_by} is short")
        return found


def occupancy(architecture: str, threads: int, registers: int, shared_bytes: int) -> tuple[int, float, str]:
    """Returns blocks per multiprocessor, the share of its warps they fill, and what limits them.

    Registers are given out per warp in units of 256, and warps evenly to four schedulers; every block takes 1 KB of
    shared memory for the system beside its own, in units of 128 bytes.
    """
    limits = LIMITS[architecture]
    warps = -(-threads // 32)
    registers_per_warp = -(-registers * 32 // 256) * 256
    warps_by_registers = limits.registers // 4 // registers_per_warp * 4 if registers_per_warp else limits.warps
    shared_per_block = -(-(shared_bytes + 1024) // 128) * 128
    candidates = {
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
        "registers": warps_by_registers // warps,
        "shared memory": 0 if shared_bytes > limits.shared_bytes_per_block else limits.shared_bytes // shared_per_block,
    }
    limited_by = min(candidates, key=lambda name: candidates[name])
    blocks = candidates[limited_by]
    return blocks, blocks * warps / limits.warps, limited_by


def parse_assembler(report: str) -> dict[str, dict[str, int]]:
    """Reads `ptxas -v`: per mangled entry name its registers, spills, stack and static shared memory."""
    found: dict[str, dict[str, int]] = {}
    entry: dict[str, int] = {}
    in_entry = False
    for line in report.splitlines():
        compiling = re.search(r"Compiling entry function '(\w+)'", line)
        properties = re.search(r"Function properties for (\w+)", line)
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)
        used = re.search(r"Used (\d+) registers", line)
        if compiling:
            entry = found.setdefault(
                compiling[1], {"registers": 0, "spill_stores": 0, "spill_loads": 0, "stack": 0, "static_shared": 0}
            )
        elif properties:
            in_entry = properties[1] in found and found[properties[1]] is entry
        elif frame and in_entry:
            entry.update(stack=int(frame[1]), spill_stores=int(frame[2]), spill_loads=int(frame[3]))
        elif used:
            shared = re.search(r"(\d+) bytes smem", line)
            entry.update(registers=int(used[1]), static_shared=int(shared[1]) if shared else 0)
    return found


def parse_ptx(ptx: str) -> dict[str, tuple[int | None, bool]]:
    """Reads PTX: per mangled entry name the threads of its launch bounds and whether it has dynamic shared memory."""
    found = {}
    for part in re.split(r"\.entry\s+", ptx)[1:]:
        name = re.match(r"\w+", part)
        bounds = re.search(r"\.maxntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", part.split("{", 1)[0])
        threads = None
        if bounds:
            threads = int(bounds[1]) * int(bounds[2] or 1) * int(bounds[3] or 1)
        if name:
            found[name[0]] = (threads, "pk_dynamic_shared" in part)
    return found


def declared(source: str, note: str) -> dict[str, int]:
    """Returns kernel name -> bytes from the comments "// resources: NOTE N bytes" above the kernels."""
    start = rf"//\s*resources: {note} (\d+) bytes"
    pattern = start + r".*?__global__[^(]*?(?:__launch_bounds__\s*\([^)]*\)[^(]*?)?(\w+)\s*\("
    found: dict[str, int] = {}
    for match in re.finditer(start, source):
        if kernel := re.match(pattern, source[match.start() :], flags=re.S):
            found[kernel[2]] = int(kernel[1])
    return found


def code_of(source: Path) -> dict[Path, str]:
    """Returns a file and all headers of this package that nvcc sees with it, with their texts."""
    texts: dict[Path, str] = {}
    pending = [source]
    while pending:
        path = pending.pop()
        if path in texts:
            continue
        texts[path] = path.read_text()
        for name in re.findall(r'#include "((?!emulator/)[^"]+)"', texts[path]):  # nvcc never sees the emulator
            pending += [place for place in (ROOT / "csrc" / name, path.parent / name) if place.is_file()][:1]
    return texts


def demangle(names: Sequence[str]) -> dict[str, str]:
    """Returns mangled name -> readable name without return type and parameters; unchanged without c++filt."""
    if shutil.which("c++filt") is None or not names:
        return {name: name for name in names}
    output = subprocess.run(["c++filt", *names], capture_output=True, text=True, timeout=60, check=True).stdout
    readable = []
    for line in output.splitlines():
        # Drops "(anonymous namespace)::" and the casts of template arguments, such as "(int)4".
        text = re.sub(r"\(anonymous namespace\)::|\([\w: ]+\)(?=-?\d)", "", line).removeprefix("void ")
        readable.append(re.sub(r"\(.*$", "", text))
    return dict(zip(names, readable, strict=True))


def measure(source: Path, architecture: str) -> list[Kernel]:
    """Compiles one `.cu` file for one architecture and returns its kernels in the order of their names.

    Raises:
        RuntimeError: nvcc is missing or refuses the file.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("resources: nvcc is not on the PATH; install the CUDA toolkit")
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *FLAGS, f"-arch={SHIPPED.get(architecture, architecture)}", "--keep"]
        command += ["--keep-dir", folder, "-I", str(ROOT / "csrc"), "-o", f"{folder}/kernel.cubin", str(source)]
        process = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if process.returncode != 0:
            raise RuntimeError(f"resources: nvcc refuses {source.name} for {architecture}\n{process.stderr[-4000:]}")
        entries = parse_assembler(process.stdout + process.stderr)
        facts: dict[str, tuple[int | None, bool]] = {}
        for ptx in Path(folder).glob("*.ptx"):
            facts.update(parse_ptx(ptx.read_text()))
    text = "\n".join(code_of(source).values())
    sizes, allowed = declared(text, "dynamic shared"), declared(text, "spills at most")
    names = demangle(list(entries))
    relative = str(source.relative_to(ROOT)) if source.is_relative_to(ROOT) else source.name
    kernels = []
    for mangled, numbers in entries.items():
        threads, has_dynamic = facts.get(mangled, (None, False))
        base_name = re.sub(r"<.*$", "", names[mangled]).split("::")[-1]
        dynamic = sizes.get(base_name) if has_dynamic else 0
        place: tuple[int | None, float | None, str | None] = (None, None, None)
        if threads is not None and dynamic is not None:
            place = occupancy(architecture, threads, numbers["registers"], numbers["static_shared"] + dynamic)
        kernels.append(
            Kernel(
                file=relative,
                kernel=names[mangled],
                architecture=architecture,
                threads=threads,
                dynamic_shared=dynamic,
                allowed_spill=allowed.get(base_name, 0),
                blocks_per_multiprocessor=place[0],
                occupancy=place[1],
                limited_by=place[2],
                **numbers,
            )
        )
    return sorted(kernels, key=lambda kernel: kernel.kernel)


def digest(source: Path) -> str:
    """A fingerprint of what decides a file's numbers: its code, that of the package's headers it includes, and the flags.

    Comments do not count, apart from those that this tool reads.
    """
    seen: dict[Path, str] = {}
    for path, text in code_of(source).items():
        code = re.sub(r"//(?!\s*resources:).*$", "", text, flags=re.M)
        seen[path] = "\n".join(line for line in map(str.strip, code.splitlines()) if line)
    parts = [" ".join(FLAGS), seen.pop(source), *(seen[path] for path in sorted(seen))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def known(table: Path, source: Path, architectures: Sequence[str]) -> list[Kernel] | None:
    """The kernels of a file as the table has them, if it was measured on the same code, toolkit and architectures."""
    if not table.is_file():
        return None
    recorded = json.loads(table.read_text())
    relative = str(source.relative_to(ROOT)) if source.is_relative_to(ROOT) else source.name
    if recorded["toolkit"] != toolkit_version() or recorded.get("code", {}).get(relative) != digest(source):
        return None
    kernels = [Kernel(**kernel) for kernel in recorded["kernels"] if kernel["file"] == relative]
    return kernels if {kernel.architecture for kernel in kernels} == set(architectures) else None


def toolkit_version() -> str:
    """Returns nvcc's version, such as "13.0.88"."""
    output = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    version = re.search(r"release \S+, V(\S+)", output)
    return version[1] if version else "unknown"


def project_kernels() -> list[Path]:
    """Returns every CUDA source of the package."""
    return sorted((ROOT / "csrc" / "ops" / "cuda").glob("*.cu"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table, writes the JSON; returns 1 when something must be repaired."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sources", nargs="*", type=Path, help="default: every csrc/ops/cuda/*.cu")
    parser.add_argument("--arch", nargs="+", default=list(LIMITS), choices=list(LIMITS))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/resources.json if everything is measured")
    parser.add_argument(
        "--all", action="store_true", help="compile also what has not changed since the JSON was written"
    )
    options = parser.parse_args(arguments)
    sources = [path.resolve() for path in options.sources] or project_kernels()
    kernels: list[Kernel] = []
    for source in sources:
        found = None if options.all else known(RESULT, source, options.arch)
        if found is None:
            found = [kernel for architecture in options.arch for kernel in measure(source, architecture)]
        kernels += found
    problems = [problem for kernel in kernels for problem in kernel.problems()]
    head = f"{'kernel':<56}{'arch':<8}{'threads':>8}{'regs':>6}{'spill':>7}{'stack':>7}{'shared':>9}{'occup.':>8}"
    print(head + "  limited by")
    for kernel in kernels:
        shared = kernel.static_shared + (kernel.dynamic_shared or 0)
        share = "?" if kernel.occupancy is None else f"{100 * kernel.occupancy:.0f} %"
        print(
            f"{kernel.kernel[:54]:<56}{kernel.architecture:<8}{kernel.threads or '?':>8}{kernel.registers:>6}"
            f"{kernel.spill_stores + kernel.spill_loads:>7}{kernel.stack:>7}{shared:>9}{share:>8}"
            f"  {kernel.limited_by or '?'}"
        )
    everything = not options.sources and set(options.arch) == set(LIMITS)
    if out := options.out or (RESULT if everything else None):
        out.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "toolkit": toolkit_version(),
            "problems": problems,
            "code": {str(path.relative_to(ROOT)): digest(path) for path in sources if path.is_relative_to(ROOT)},
            "kernels": [asdict(kernel) for kernel in kernels],
        }
        out.write_text(json.dumps(report, indent=1) + "\n")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
