# SPDX-License-Identifier: MIT
"""What makes one file serve every Python from 3.10 and every torch from 2.10, and what an import may do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch

import protokernels
from protokernels import _native

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(protokernels.__file__).parent

# The C functions of torch that this package uses. All exist in torch 2.10 (torch/csrc/inductor/aoti_torch/c/shim.h
# and generated/c_shim_aten.h beside it, torch/csrc/stable/c/shim.h). A new name here needs a look at those files of that release.
TORCH_FUNCTIONS = """
    aoti_torch_abi_version aoti_torch_aten_fill__Scalar aoti_torch_aten_narrow aoti_torch_create_device_guard
    aoti_torch_delete_device_guard
    aoti_torch_empty_strided aoti_torch_delete_library_object aoti_torch_delete_tensor_object aoti_torch_dtype_element_size
    aoti_torch_get_current_cuda_stream aoti_torch_get_data_ptr aoti_torch_get_device_index aoti_torch_get_device_type
    aoti_torch_get_dim aoti_torch_get_dtype aoti_torch_get_numel aoti_torch_get_size aoti_torch_get_sizes
    aoti_torch_get_stride
    aoti_torch_is_contiguous aoti_torch_library_def aoti_torch_library_init_def aoti_torch_library_init_impl
    aoti_torch_new_tensor_handle aoti_torch_new_uninitialized_tensor
    aoti_torch_device_type_cpu aoti_torch_device_type_cuda aoti_torch_device_type_meta aoti_torch_device_type_mps
    aoti_torch_device_type_privateuse1 aoti_torch_device_type_xpu
    aoti_torch_dtype_bfloat16 aoti_torch_dtype_bool aoti_torch_dtype_complex128 aoti_torch_dtype_complex32
    aoti_torch_dtype_complex64 aoti_torch_dtype_float16 aoti_torch_dtype_float32 aoti_torch_dtype_float64
    aoti_torch_dtype_float8_e4m3fn aoti_torch_dtype_float8_e4m3fnuz aoti_torch_dtype_float8_e5m2
    aoti_torch_dtype_float8_e5m2fnuz aoti_torch_dtype_int16 aoti_torch_dtype_int32 aoti_torch_dtype_int64
    aoti_torch_dtype_int8 aoti_torch_dtype_uint16 aoti_torch_dtype_uint32 aoti_torch_dtype_uint64 aoti_torch_dtype_uint8
    aoti_torch_layout__mkldnn aoti_torch_layout_jagged aoti_torch_layout_sparse_bsc aoti_torch_layout_sparse_bsr
    aoti_torch_layout_sparse_coo aoti_torch_layout_sparse_csc aoti_torch_layout_sparse_csr aoti_torch_layout_strided
    aoti_torch_memory_format_channels_last aoti_torch_memory_format_channels_last_3d
    aoti_torch_memory_format_contiguous_format aoti_torch_memory_format_preserve_format
    torch_call_dispatcher torch_delete_list torch_get_num_threads torch_library_impl
    torch_list_get_item torch_list_push_back torch_list_size torch_new_list_reserve_size
    torch_new_string_handle torch_parallel_for
"""
# And the macros of its headers. All exist in those of torch 2.10; later releases have more of them.
TORCH_MACROS = "STABLE_TORCH_LIBRARY STABLE_TORCH_LIBRARY_IMPL STD_TORCH_CHECK TORCH_BOX TORCH_ERROR_CODE_CHECK"
ONLY_ON_CUDA_TORCH = frozenset({"aoti_torch_get_current_cuda_stream"})

TORCH_NAMESPACE = re.compile(r"N[rVKRO]*(?:2at|3c10|5torch|6caffe2)")
"""A namespace of torch inside a mangled name, also as an argument of a template of the standard library."""

RUNTIME_LIBRARIES = re.compile(r"@+(?:GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$")
STANDARD_NAMESPACE = re.compile(r"_Z(?:N[KVRO]*)?(?:TV|TI|TS)?(?:S[tabsiod]|9__gnu_cxx)")
FROM_THE_LINKER = frozenset(("_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"))


@pytest.fixture(scope="module")
def library() -> Path:
    if _native.LIBRARY is None:
        pytest.skip("installed without native code")
    return _native.LIBRARY


def binutil(name: str, *arguments: str | Path) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"{name} (binutils) is not installed, so symbols cannot be read")
    command = [name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def undefined(library: Path) -> dict[str, str]:
    """Symbols the library takes from elsewhere, with their version -> the kind of reference ("U" or, for weak, "w")."""
    lines = (line.split() for line in binutil("nm", "-D", "--undefined-only", library).splitlines())
    return {name: kind for kind, name in lines}


def bare(symbol: str) -> str:
    return symbol.split("@")[0]


def versions_in_header(text: str) -> dict[str, tuple[int, int]]:
    """Every function a header declares -> the first torch that has it, by the preprocessor guards around it."""
    found: dict[str, tuple[int, int]] = {}
    guards: list[tuple[int, int]] = []
    for line in text.splitlines():
        directive = re.match(r"\s*#\s*(if|ifdef|ifndef|endif)\b(.*)", line)
        if directive and directive[1] == "endif":
            guards.pop()
        elif directive:
            version = re.search(r"TORCH_FEATURE_VERSION >= TORCH_VERSION_(\d+)_(\d+)_\d+", directive[2])
            guards.append((int(version[1]), int(version[2])) if version else (0, 0))
        for name in re.findall(r"\b(?:aoti_)?torch_\w+(?=\()", line):
            found.setdefault(name, max(guards, default=(0, 0)))
    return found


class TestLibrary:
    def test_one_file_for_every_python(self, library: Path) -> None:
        assert library.name == "_C.abi3.so"
        assert [path.name for path in PACKAGE.glob("*.so")] == ["_C.abi3.so"]

    def test_no_cpp_symbol_of_torch(self, library: Path) -> None:
        assert [symbol for symbol in undefined(library) if TORCH_NAMESPACE.search(symbol)] == []

    def test_the_search_for_cpp_symbols_of_torch_finds_them(self) -> None:
        foreign = ["_ZN2at4_ops3add4callE", "_ZN3c104impl8GPUTraceE", "_ZN5torch8autograd5GraphE"]
        inside = ["_ZNSt6vectorIN2at6TensorESaIS1_EED1Ev", "_ZNK3c1010TensorImpl4sizeEl", "_ZTIN3c105ErrorE"]
        for symbol in (*foreign, *inside):
            assert TORCH_NAMESPACE.search(symbol), symbol
        for symbol in ("_ZNSt6vectorIiSaIiEE2atEm", "_ZN12protokernels3runE", "_ZN4c102atE", "_ZSt16__throw_bad_castv"):
            assert not TORCH_NAMESPACE.search(symbol), symbol

    def test_every_undefined_symbol_has_a_known_home(self, library: Path) -> None:
        strange = [
            symbol
            for symbol in undefined(library)
            if not (
                RUNTIME_LIBRARIES.search(symbol)
                or STANDARD_NAMESPACE.match(symbol)
                or re.match(r"Py[A-Z]|_Py_", symbol)
                or re.match(r"(aoti_)?torch_", symbol)
                or symbol in FROM_THE_LINKER
            )
        ]
        assert strange == []

    def test_torch_is_reached_through_functions_that_2_10_has(self, library: Path) -> None:
        used = {bare(symbol) for symbol in undefined(library) if re.match(r"(aoti_)?torch_", symbol)}
        assert used - set(re.findall(r"\w+", TORCH_FUNCTIONS)) == set(), (
            "check that torch 2.10 has them, then add them to TORCH_FUNCTIONS"
        )
        headers = Path(torch.__file__).parent / "include/torch/csrc"
        inductor = headers / "inductor/aoti_torch"
        shims = [inductor / "c/shim.h", inductor / "generated/c_shim_aten.h", headers / "stable/c/shim.h"]
        if not all(path.exists() for path in shims):
            pytest.skip("this torch comes without headers, so the second half of the check is not possible")
        since = {}
        for path in shims:
            since.update(versions_in_header(path.read_text()))
        assert len(since) > 100
        assert {name for name in used if since.get(name, (99, 0)) > (2, 10)} == set()

    def test_macros_of_torch_are_those_that_2_10_has(self) -> None:
        """The library is to be built with torch 2.10, too, whose headers know fewer of them."""
        macro = re.compile(r"\b(?:[A-Z]+_)*TORCH_[A-Z_]+\b")
        sources = [
            path.read_text() for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh")
        ]
        used = {name for text in sources for name in macro.findall(text) if not name.startswith("PROTOKERNELS_")}
        assert used == set(TORCH_MACROS.split()), "compile with the headers of torch 2.10, then change TORCH_MACROS"

    def test_header_guards_are_read(self) -> None:
        text = (
            "#ifndef A\nint torch_old(int x);\n#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_11_0\n#ifdef USE_CUDA\n"
            "int torch_new(\n#endif\n#endif\nint aoti_torch_plain();\n#endif\n"
        )
        assert versions_in_header(text) == {"torch_old": (0, 0), "torch_new": (2, 11), "aoti_torch_plain": (0, 0)}

    def test_what_only_a_cuda_torch_has_is_optional(self, library: Path) -> None:
        kinds = {bare(symbol): kind for symbol, kind in undefined(library).items()}
        assert {kinds[name] for name in ONLY_ON_CUDA_TORCH & kinds.keys()} <= {"w"}

    def test_nothing_of_ours_is_visible_to_other_libraries(self, library: Path) -> None:
        defined = [line.split()[-1] for line in binutil("nm", "-D", "--defined-only", library).splitlines()]
        assert "PyInit__C" in defined
        assert [name for name in defined if "protokernels" in name] == []

    def test_needs_no_cuda_and_no_python_library_and_finds_torch_beside_it(self, library: Path) -> None:
        dynamic = binutil("readelf", "-d", library)
        needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
        system = {
            "libstdc++.so.6",
            "libm.so.6",
            "libgcc_s.so.1",
            "libc.so.6",
            "libpthread.so.0",
            "libdl.so.2",
            "librt.so.1",
        }
        linker = {name for name in needed if name.startswith("ld-linux")}
        assert set(needed) - system - linker == {"libtorch.so", "libtorch_cpu.so", "libc10.so"}
        assert re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.+)\]", dynamic) == ["$ORIGIN/../torch/lib"]

    def test_abi3audit(self, library: Path, tmp_path: Path) -> None:
        if importlib.util.find_spec("abi3audit") is None:
            pytest.skip("abi3audit is not installed; it belongs to the extra protokernels[test]")
        out = tmp_path / "report.json"
        command = [sys.executable, "-m", "abi3audit", "--strict", "--report", "--assume-minimum-abi3", "3.10"]
        done = subprocess.run([*command, "-o", out, library], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        (spec,) = json.loads(out.read_text())["specs"].values()
        result = spec["object"]["result"]
        assert result["is_abi3"] and result["is_abi3_baseline_compatible"], result
        assert tuple(map(int, result["computed"].split("."))) <= (3, 10)

    def test_no_instruction_set_leaks_into_another(self, library: Path) -> None:
        """The linker keeps one of several equal weak functions: an AVX-512 one must never be a candidate."""
        objects = sorted(ROOT.glob("build/temp*/CMakeFiles/*.dir/**/*.o"))
        levels = sorted({found[1] for path in objects if (found := re.search(r"kernels_(\w+)\.dir", str(path)))})
        if len(levels) < 2:
            pytest.skip("no build folder with objects of several instruction sets in this checkout")
        weak: dict[str, set[str]] = {name: set() for name in (*levels, "others")}
        for path in objects:
            found = re.search(r"kernels_(\w+)\.dir", str(path))
            lines = (line.split() for line in binutil("nm", "--defined-only", path).splitlines())
            names = {parts[-1] for parts in lines if len(parts) == 3 and parts[1] in "WVu"}
            weak[found[1] if found else "others"] |= {name for name in names if not name.startswith("DW.ref.")}
        shared = {(a, b): sorted(weak[a] & weak[b]) for a, b in combinations(weak, 2) if weak[a] & weak[b]}
        assert shared == {}


class TestImport:
    def test_loads_torch_numpy_and_nothing_else(self, tmp_path: Path) -> None:
        code = "import sys, torch, numpy; old = set(sys.modules); import protokernels; print(*set(sys.modules) - old)"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        added = {name.split(".")[0] for name in done.stdout.split()}
        assert added - set(sys.stdlib_module_names) == {"protokernels"}  # of torch neither: its compilers take seconds
        everything = "import sys, protokernels, protokernels.doctor; protokernels.doctor.report(); print(*sys.modules)"
        done = subprocess.run(
            [sys.executable, "-c", everything], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        upstairs = {
            "sklearn",
            "scipy",
            "matplotlib",
            "accelerate",
            "tyro",
            "rich",
            "medmnist",
            "torchvision",
            "monai",
            "nibabel",
        }
        assert upstairs & {name.split(".")[0] for name in done.stdout.split()} == set()


class TestInstalled:
    def test_the_wheel_is_for_every_python_from_3_10(self) -> None:
        try:
            distribution = importlib.metadata.distribution("protokernels")
        except importlib.metadata.PackageNotFoundError:
            pytest.skip("the package is not installed, only built in place")
        tags = re.findall(r"^Tag: (.+)$", distribution.read_text("WHEEL") or "", flags=re.M)
        assert tags and all(tag.startswith("cp310-abi3-linux_") for tag in tags), tags
        files = [str(path) for path in distribution.files or [] if "__pycache__" not in str(path)]
        if not any(name.startswith("protokernels/") for name in files):
            pytest.skip("an editable installation: the files are those of the checkout")
        assert "protokernels/py.typed" in files
        foreign = ("csrc", "python_tests", "benchmarks", "build", "tests")
        assert [name for name in files if name.split("/")[0] in foreign] == []
        assert [name for name in files if name.endswith(".so")] in (["protokernels/_C.abi3.so"], [])
