# SPDX-License-Identifier: MIT
"""The resource check of the CUDA kernels: what it reads, what it refuses, and that all kernels of the package pass."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("resources", ROOT / "benchmarks" / "resources.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["resources"] = module
    spec.loader.exec_module(module)
    return module


resources = _load()
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed here")

ASSEMBLER_REPORT = """
ptxas info    : 16 bytes gmem
ptxas info    : Compiling entry function '_Z4goodPf' for 'sm_80'
ptxas info    : Function properties for _Z6helperf
    64 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for _Z4goodPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 4096 bytes smem, 360 bytes cmem[0]
ptxas info    : Compile time = 1.000 ms
ptxas info    : Compiling entry function '_Z7spilledPf' for 'sm_80'
ptxas info    : Function properties for _Z7spilledPf
    128 bytes stack frame, 124 bytes spill stores, 120 bytes spill loads
ptxas info    : Used 32 registers, 360 bytes cmem[0]
"""

# With one register bound too tight, one array indexed at run time, and one sound kernel with dynamic shared memory.
KERNELS = """
#include "common/simt.cuh"
namespace {
template <int count>
__global__ void __launch_bounds__(1024, 2) spilling_kernel(const float* in, float* out) {
    float values[count];
    for (int i = 0; i < count; ++i) values[i] = in[i * 1024 + threadIdx.x];
    __syncthreads();
    for (int i = 0; i < count; ++i) out[i * 1024 + threadIdx.x] = values[(i + 1) % count] * values[(i + 7) % count];
}
__global__ void __launch_bounds__(128) local_kernel(const int* in, float* out) {
    float values[8];
    for (int i = 0; i < 8; ++i) values[i] = out[i];
    for (int i = 0; i < 8; ++i) values[in[i] & 7] += 1.0f;
    out[threadIdx.x] = values[in[threadIdx.x] & 7];
}
// resources: dynamic shared 40960 bytes
template <typename T>
__global__ void __launch_bounds__(256) sound_kernel(const T* in, T* out) {
    PK_SHARED(T, fixed, 256);
    PK_DYNAMIC_SHARED(T, scratch);
    fixed[threadIdx.x] = in[threadIdx.x];
    scratch[threadIdx.x] = in[256 + threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = fixed[255 - threadIdx.x] + scratch[255 - threadIdx.x];
}
__global__ void open_kernel(float* out) {
    PK_DYNAMIC_SHARED(float, scratch);
    scratch[threadIdx.x] = 1.0f;
    __syncthreads();
    out[threadIdx.x] = scratch[blockDim.x - 1 - threadIdx.x];
}
}  // namespace
int launch_all(const float* in, const int* index, float* out, void* stream) {
    int status = PK_LAUNCH((spilling_kernel<96>), 1, 1024, 0, stream, in, out);
    status |= PK_LAUNCH(local_kernel, 1, 128, 0, stream, index, out);
    status |= PK_LAUNCH((sound_kernel<float>), 1, 256, 40960, stream, in, out);
    return status | PK_LAUNCH(open_kernel, 1, 32, 128, stream, out);
}
"""


class TestReading:
    def test_assembler_report(self) -> None:
        assert resources.parse_assembler(ASSEMBLER_REPORT) == {
            "_Z4goodPf": {"registers": 40, "spill_stores": 0, "spill_loads": 0, "stack": 0, "static_shared": 4096},
            "_Z7spilledPf": {
                "registers": 32,
                "spill_stores": 124,
                "spill_loads": 120,
                "stack": 128,
                "static_shared": 0,
            },
        }

    def test_ptx(self) -> None:
        ptx = (
            ".visible .entry _Z1aPf(\n.param .u64 x\n)\n.maxntid 128, 2, 1\n{ ret; }\n"
            ".visible .entry _Z1bPf(\n)\n.maxntid 64\n{ mov pk_dynamic_shared; }\n.entry _Z1cPf()\n{ ret; }\n"
        )
        assert resources.parse_ptx(ptx) == {"_Z1aPf": (256, False), "_Z1bPf": (64, True), "_Z1cPf": (None, False)}

    def test_declared_dynamic_shared_memory(self) -> None:
        assert resources.declared(KERNELS, "dynamic shared") == {"sound_kernel": 40960}

    def test_several_notes_above_one_kernel(self) -> None:
        notes = "// resources: spills at most 8 bytes\n// resources: dynamic shared 64 bytes\n"
        text = notes + "__global__ void __launch_bounds__(32) a(int) {}"
        assert resources.declared(text, "spills at most") == {"a": 8}
        assert resources.declared(text, "dynamic shared") == {"a": 64}

    def test_notes_in_headers_count(self, tmp_path: Path) -> None:
        (tmp_path / "b.cuh").write_text("// resources: dynamic shared 96 bytes\n__global__ void b(int) {}")
        (tmp_path / "a.cu").write_text('#include "b.cuh"\n')
        texts = resources.code_of(tmp_path / "a.cu").values()
        assert resources.declared("\n".join(texts), "dynamic shared") == {"b": 96}


class TestOccupancy:
    """Against numbers worked out by hand from the tables of the CUDA programming guide."""

    @pytest.mark.parametrize(
        ("architecture", "threads", "registers", "shared", "expected"),
        [
            ("sm_80", 256, 32, 0, (8, 1.0, "warps")),
            ("sm_80", 256, 64, 0, (4, 0.5, "registers")),
            ("sm_80", 256, 65, 0, (3, 0.375, "registers")),  # 72 registers a thread are given out: 7 warps a scheduler
            ("sm_80", 32, 16, 0, (32, 0.5, "blocks")),
            ("sm_80", 128, 32, 40 * 1024, (4, 0.25, "shared memory")),
            ("sm_90", 128, 32, 40 * 1024, (5, 0.3125, "shared memory")),
            ("sm_90", 1024, 64, 0, (1, 0.5, "registers")),
            ("sm_80", 128, 32, 163 * 1024, (1, 0.0625, "shared memory")),
            ("sm_80", 128, 32, 163 * 1024 + 1, (0, 0.0, "shared memory")),
            ("sm_100", 100, 255, 0, (2, 0.125, "registers")),
        ],
    )
    def test_blocks_and_share(
        self, architecture: str, threads: int, registers: int, shared: int, expected: tuple[int, float, str]
    ) -> None:
        assert resources.occupancy(architecture, threads, registers, shared) == expected


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    source = tmp_path_factory.mktemp("kernels") / "kernels.cu"
    source.write_text(KERNELS)
    return {kernel.kernel: "\n".join(kernel.problems()) for kernel in resources.measure(source, "sm_80")}


@needs_nvcc
class TestRefusals:
    def test_spills(self, problems: dict[str, str]) -> None:
        assert "spills registers" in problems["spilling_kernel<96>"]

    def test_an_allowance_for_spills_holds_to_the_byte(self) -> None:
        spilling = dict(
            file="a.cu", kernel="k", architecture="sm_80", threads=32, registers=255, spill_stores=8, spill_loads=12
        )
        rest = dict(stack=8, static_shared=0, dynamic_shared=0, blocks_per_multiprocessor=1)
        assert resources.Kernel(**spilling, **rest, allowed_spill=12).problems() == []
        assert len(resources.Kernel(**spilling, **rest, allowed_spill=11).problems()) == 1
        assert len(resources.Kernel(**spilling, **rest).problems()) == 2

    def test_local_memory(self, problems: dict[str, str]) -> None:
        assert "bytes of local memory" in problems["local_kernel"]
        assert "spills" not in problems["local_kernel"]

    def test_unknown_sizes(self, problems: dict[str, str]) -> None:
        assert "add __launch_bounds__" in problems["open_kernel"]
        assert "// resources: dynamic shared N bytes" in problems["open_kernel"]

    def test_a_sound_kernel_has_none(self, problems: dict[str, str]) -> None:
        assert problems["sound_kernel<float>"] == ""


class TestDigest:
    """What lets a file's numbers stand for it: its code and that of its headers, nothing else."""

    def test_code_counts_and_comments_do_not(self, tmp_path: Path) -> None:
        source, header = tmp_path / "a.cu", tmp_path / "a.cuh"
        source.write_text('#include "a.cuh"\n#include "common/simt.cuh"\nint x = 1;\n')
        header.write_text("// resources: dynamic shared 64 bytes\nint y = 2;\n")
        before = resources.digest(source)
        source.write_text('#include "a.cuh"  // why\n#include "common/simt.cuh"\n\n  int x = 1;\n')
        assert resources.digest(source) == before
        header.write_text("// resources: dynamic shared 96 bytes\nint y = 2;\n")
        assert resources.digest(source) != before
        header.write_text("// resources: dynamic shared 64 bytes\nint y = 3;\n")
        assert resources.digest(source) != before

    @needs_nvcc
    def test_a_table_of_other_code_or_another_toolkit_is_not_used(self, tmp_path: Path) -> None:
        source, table = tmp_path / "a.cu", tmp_path / "table.json"
        source.write_text("int x = 1;\n")
        kernel = {
            "file": "a.cu", "kernel": "k", "architecture": "sm_80", "threads": 32, "registers": 1, "spill_stores": 0,
            "spill_loads": 0, "stack": 0, "static_shared": 0, "dynamic_shared": 0,
        }  # fmt: skip
        report = {"toolkit": resources.toolkit_version(), "code": {"a.cu": resources.digest(source)}}
        assert resources.known(table, source, ["sm_80"]) is None
        table.write_text(json.dumps({**report, "kernels": [kernel]}))
        (found,) = resources.known(table, source, ["sm_80"])
        assert found.kernel == "k"
        assert resources.known(table, source, ["sm_80", "sm_90"]) is None
        table.write_text(json.dumps({**report, "toolkit": "1.0", "kernels": [kernel]}))
        assert resources.known(table, source, ["sm_80"]) is None
        table.write_text(json.dumps({**report, "kernels": [kernel]}))
        source.write_text("int x = 2;\n")
        assert resources.known(table, source, ["sm_80"]) is None


@needs_nvcc
def test_some_files_or_architectures_leave_the_table_of_all_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, table = tmp_path / "a.cu", tmp_path / "table.json"
    source.write_text("__global__ void __launch_bounds__(32) own_kernel(float* x) { x[threadIdx.x] = 1; }\n")
    monkeypatch.setattr(resources, "RESULT", table)
    monkeypatch.setattr(resources, "project_kernels", lambda: [source])
    assert resources.main([str(source)]) == resources.main(["--arch", "sm_80"]) == 0
    assert "own_kernel" in capsys.readouterr().out and not table.exists()
    assert resources.main([]) == 0 and table.exists()


@needs_nvcc
def test_every_kernel_passes_and_the_table_is_current(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "resources.json"
    status = resources.main(["--out", str(out)])
    assert status == 0, capsys.readouterr().err
    measured = json.loads(out.read_text())
    assert {Path(kernel["file"]) for kernel in measured["kernels"]} == {
        path.relative_to(ROOT) for path in resources.project_kernels()
    }
    recorded = json.loads(resources.RESULT.read_text())
    if recorded["toolkit"] == measured["toolkit"]:
        assert recorded == measured, "run: python benchmarks/resources.py"
    else:

        def names(table: dict[str, Any]) -> set[tuple[str, str, str]]:
            return {(kernel["file"], kernel["kernel"], kernel["architecture"]) for kernel in table["kernels"]}

        assert names(recorded) == names(measured), "run: python benchmarks/resources.py"
