# SPDX-License-Identifier: MIT
"""The house rules that a machine can check: one op in eight places, imports that go down only, files of one kind."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import protokernels
import protokernels.cluster
import protokernels.nn

ROOT = Path(__file__).resolve().parents[1]

PLACES = (
    "csrc/ops/{op}.h",
    "csrc/ops/{op}.cpp",
    "csrc/ops/cpu/{op}_kernel.cpp",
    "csrc/ops/cuda/{op}_kernel.cu",
    "protokernels/ops/{op}.py",
    "protokernels/reference/{op}.py",
    "python_tests/test_{op}.py",
    "benchmarks/bench_{op}.py",
)
LIBRARY_SERVICES = frozenset({"build_info"})
"""Schemas about the library itself, which are no ops."""

FLOORS = {
    **dict.fromkeys(("_version", "_threads", "_native", "memory", "backend", "reference"), 0),
    **dict.fromkeys(("ops", "doctor"), 1),
    **dict.fromkeys(("nn", "cluster", "__init__"), 2),
    **dict.fromkeys(("models", "data", "evaluation", "training", "inference"), 3),
    **dict.fromkeys(("papers", "baselines", "figures"), 4),
    "results": 3,
    **dict.fromkeys(("sweeps", "tables"), 5),
    **dict.fromkeys(("ablations", "cli", "commands", "embedding", "prediction", "__main__"), 5),
}
"""Every part of the package and the floor it stands on; a part imports its own floor and those below."""
GROUND = 2
"""The highest floor that has torch and numpy only."""

SOURCE_FOLDERS = ("protokernels", "csrc", "python_tests", "benchmarks")
SUFFIXES = frozenset({".py", ".h", ".cpp", ".cu", ".cuh", ".sh"})
LONGEST = 450


def source_files() -> list[Path]:
    nested = (path for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*"))
    return sorted(path for path in (*nested, ROOT / "setup.py") if path.suffix in SUFFIXES)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def read(*places: str) -> str:
    """The text of the files that are there; absent ones fail in the test that asks for them."""
    return "\n".join((ROOT / place).read_text() for place in places if (ROOT / place).is_file())


def schemas() -> list[str]:
    """Names of the operators in the table of contents."""
    calls = re.findall(r'\blibrary\.def\(\s*((?:"[^"]*"\s*)+)', read("csrc/library.cpp"))
    return ["".join(re.findall(r'"([^"]*)"', call)).split("(")[0].strip() for call in calls]


def op_of(schema: str) -> str:
    """The op a schema belongs to: the longest header name it starts with, or else the schema without its last word."""
    headers = [path.stem for path in (ROOT / "csrc/ops").glob("*.h")]
    owners = [op for op in headers if schema == op or schema.startswith(f"{op}_")]
    return max(owners, key=len, default=schema.rpartition("_")[0] or schema)


def check_list(place: str, found: Iterable[str], wanted: Iterable[str]) -> None:
    """Fails with what to do about a list."""
    lacking, odd = sorted({*wanted} - {*found}), sorted({*found} - {*wanted})
    assert not lacking, f"{place}: add {', '.join(lacking)}"
    assert not odd, f"{place}: remove {', '.join(odd)}"


OPERATORS = [name for name in schemas() if name not in LIBRARY_SERVICES]
ABOUT_VALUES = {
    "sinkhorn_masses_fit"
}  # no tensor comes out: values are looked at on the CPU only, and never while tracing
OPS = sorted({op_of(name) for name in OPERATORS})


class TestOps:
    def test_the_table_of_contents_is_read(self) -> None:
        assert set(schemas()) >= LIBRARY_SERVICES
        assert "prototypes_forward" in OPERATORS and "prototypes" in OPS

    @pytest.mark.parametrize("op", OPS)
    def test_an_op_has_its_eight_places(self, op: str) -> None:
        missing = [place.format(op=op) for place in PLACES if not (ROOT / place.format(op=op)).is_file()]
        assert missing == [], f"{op}: missing {', '.join(missing)}"

    def test_nothing_stands_in_a_place_without_a_schema(self) -> None:
        for place in PLACES:
            if place.startswith(("csrc/ops", "protokernels/", "benchmarks/")):
                folder, pattern = (ROOT / place.format(op="*")).parent, Path(place.format(op="*")).name
                before, after = pattern.split("*")
                found = {path.name[len(before) : len(path.name) - len(after)] for path in folder.glob(pattern)}
                extra = {name for name in found if not name.startswith(("_", *(f"{op}_" for op in OPS)))} - set(OPS)
                extra -= {"overhead"}  # bench_overhead.py: all public functions
                assert extra == set(), f"{place}: {sorted(extra)} without a schema in csrc/library.cpp"

    def test_the_build_compiles_every_op(self) -> None:
        listed = re.search(r"^set\(OPS ([^)]*)\)", read("CMakeLists.txt"), flags=re.M)
        assert listed is not None
        check_list("OPS in CMakeLists.txt", listed[1].split(), OPS)

    def test_the_reference_names_every_op(self) -> None:
        check_list("protokernels/reference/__init__.py", protokernels.reference.__all__, OPS)

    def test_the_emulator_runs_every_operator_in_the_place_of_the_cpu(self) -> None:
        """Without this `-p python_tests.emulator.as_cuda` passes on the CPU's kernels."""
        from python_tests.emulator import operators
        from python_tests.test_as_cuda import LAUNCHED

        check_list("python_tests/emulator/operators.py", operators.OPERATORS, {*OPERATORS} - ABOUT_VALUES)
        check_list("LAUNCHED in python_tests/test_as_cuda.py", LAUNCHED, OPS)

    def test_the_sanitizers_run_over_every_op(self) -> None:
        tests = re.search(r"python_tests/test_\{([\w,]*)\}", read("csrc/sanitize.sh"))
        assert tests is not None
        check_list("the tests in csrc/sanitize.sh", tests[1].split(","), OPS)

    @pytest.mark.parametrize("operator", OPERATORS)
    def test_an_operator_is_there_for_cpu_cuda_and_tracing(self, operator: str) -> None:
        op = op_of(operator)
        torch_side = "\n".join(path.read_text() for path in (ROOT / "csrc/ops").glob(f"{op}*.cpp"))
        python_side = "\n".join(path.read_text() for path in (ROOT / "protokernels/ops").glob(f"*{op}*.py"))
        about_values = operator in ABOUT_VALUES
        for key in ("CPU",) if about_values else ("CPU", "CUDA"):
            blocks = re.findall(
                rf"STABLE_TORCH_LIBRARY_IMPL\(protokernels, {key},.*?^}}", torch_side, flags=re.M | re.S
            )
            in_library = any(f'"{operator}"' in block for block in blocks)
            in_python = f'torch.library.impl("protokernels::{operator}", "{key}")' in python_side
            assert in_library or in_python, f"{operator}: not registered for {key}"
        assert about_values or f'_calls.register("{operator}", ' in python_side, f"{operator}: no fake kernel"
        called = re.findall(r"torch\.ops\.protokernels\.(\w+)\(", python_side)
        assert called == [], f"{', '.join(called)}: call native operators by _calls.call"

    def test_the_loader_knows_every_operator(self) -> None:
        from protokernels import _native

        check_list("OPERATORS in protokernels/_native.py", _native.OPERATORS, schemas())

    @pytest.mark.parametrize("op", OPS)
    def test_the_tests_of_an_op_have_their_four_parts(self, op: str) -> None:
        files = (ROOT / "python_tests").glob(f"test_{op}*.py")
        trees = [ast.parse(path.read_text()) for path in files if not path.stem.endswith(("_cuda", "_emulator"))]
        classes = {node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}
        missing = {"TestValue", "TestGradient", "TestContract", "TestDeterminism"} - classes
        assert missing == set(), f"python_tests/test_{op}.py: add {', '.join(sorted(missing))}"
        text = read(f"python_tests/test_{op}_cuda.py")
        assert "(CudaContract):" in text, (
            f"python_tests/test_{op}_cuda.py: no class is a CudaContract (cuda_contract.py)"
        )

    @pytest.mark.parametrize("op", OPS)
    def test_the_public_functions_of_an_op_are_exported(self, op: str) -> None:
        tree = ast.parse(read(f"protokernels/ops/{op}.py"))
        public = {
            node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        }
        assert public & set(protokernels.__all__), f"protokernels.__all__ holds nothing of protokernels/ops/{op}.py"


def cuda_files() -> list[Path]:
    return sorted((ROOT / "csrc/ops/cuda").glob("*.cu"))


class TestCuda:
    @pytest.mark.parametrize("path", cuda_files(), ids=lambda path: path.name)
    def test_a_kernel_file_runs_in_the_emulator(self, path: Path) -> None:
        op = op_of(path.stem)
        assert (ROOT / f"csrc/emulator/bind_{op}.cpp").is_file(), f"{path.name}: add csrc/emulator/bind_{op}.cpp"
        tests = "\n".join(test.read_text() for test in (ROOT / "python_tests").glob("test_*.py"))
        assert re.search(rf'\bload\("{op}"', tests), f'{path.name}: no test calls load("{op}") of python_tests.emulator'

    @pytest.mark.parametrize("path", cuda_files(), ids=lambda path: path.name)
    def test_a_kernel_file_knows_neither_torch_nor_where_it_runs(self, path: Path) -> None:
        included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), flags=re.M)
        assert "common/simt.cuh" in included
        assert [name for name in included if name.startswith(("torch/", "ATen/", "c10/", "cuda", "emulator/"))] == []


def public_functions() -> Iterator[tuple[str, object]]:
    for name in protokernels.__all__:
        if inspect.isfunction(getattr(protokernels, name)):
            yield f"protokernels.{name}", getattr(protokernels, name)
    for part in (protokernels.nn, protokernels.cluster):
        yield from ((f"{part.__name__}.{name}", getattr(part, name)) for name in part.__all__ if name != "Elbow")


class TestCpu:
    @pytest.mark.parametrize("path", sorted((ROOT / "csrc/ops/cpu").glob("*.cpp")), ids=lambda path: path.name)
    def test_a_table_of_a_level_is_seen_beyond_its_file(self, path: Path) -> None:
        """Without the declaration the library is built, and does not load."""
        tables = re.findall(r"^const (\w+ PK_LEVEL_TABLE\(\w+\)) =", path.read_text(), flags=re.M)
        headers = [f"csrc/{name}" for name in re.findall(r'^#include "(ops/cpu/.*)"', path.read_text(), flags=re.M)]
        declared = path.read_text() + read(*headers)
        missing = [f"extern const {table};" for table in tables if f"extern const {table};" not in declared]
        assert missing == [], "write this above the table"

    def test_every_avx_512_instruction_is_written_out(self) -> None:
        """So that `EMULATE=avx512 csrc/sanitize.sh` compiles what the AVX-512 level does, where no processor has it."""
        folders = (ROOT / "csrc" / "ops" / "cpu", ROOT / "csrc" / "common")
        sources = "\n".join(path.read_text() for folder in folders for path in folder.iterdir())
        used = set(re.findall(r"\b(_mm512_\w+|__builtin_ia32_\w*512\w*)", sources))
        written = set(re.findall(r"^#define (\w+)\(", read("csrc/emulator/avx512.h"), flags=re.M))
        assert len(used) >= 10 and used == written


class TestDocstrings:
    @pytest.mark.parametrize(
        ("name", "value"), list(public_functions()), ids=lambda value: value if isinstance(value, str) else ""
    )
    def test_a_public_function_or_module_shows_an_example(self, name: str, value: object) -> None:
        assert ">>> " in (inspect.getdoc(value) or ""), f"{name}: its docstring needs an example that runs"

    @pytest.mark.parametrize(
        ("name", "value"), list(public_functions()), ids=lambda value: value if isinstance(value, str) else ""
    )
    def test_a_public_function_says_what_it_takes_gives_and_refuses(self, name: str, value: object) -> None:
        text = inspect.getdoc(value) or ""
        if isinstance(value, type) or re.search(r"(Same arguments|Arguments and errors are those)", text):
            return  # a module: its function says it; or another function does
        missing = [part for part in ("Args:", "Returns:", "Raises:") if part not in text]
        if "Args: as in" not in text:
            missing += [one for one in inspect.signature(value).parameters if not re.search(rf"\b{one}\b", text)]  # type: ignore[arg-type]
        assert missing == [], f"{name}: its docstring lacks {', '.join(missing)}"

    @pytest.mark.parametrize(
        "path",
        [path for path in sorted((ROOT / "protokernels").rglob("*.py")) if path.name != "_version.py"],
        ids=named,
    )
    def test_every_module_says_what_it_is(self, path: Path) -> None:
        assert ast.get_docstring(ast.parse(path.read_text())), f"{named(path)}: no docstring"

    @pytest.mark.parametrize("folder", ["protokernels/ops", "protokernels/reference"])
    def test_a_shape_stands_at_every_tensor(self, folder: str) -> None:
        bare = []
        for path in (ROOT / folder).glob("*.py"):
            lines = path.read_text().splitlines()
            for node in ast.walk(ast.parse("\n".join(lines))):
                if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or path.name.startswith("_"):
                    continue
                for argument in (*node.args.args, *node.args.kwonlyargs):
                    kind = ast.unparse(argument.annotation) if argument.annotation else ""
                    if (
                        re.fullmatch(r"Tensor( \| None)?", kind)
                        and "[" not in lines[argument.lineno - 1].partition("#")[2]
                    ):
                        bare.append(f"{path.name}:{argument.lineno}: {argument.arg}")
        assert bare == [], "write the shape behind the parameter: `z: Tensor,  # [B, D]`"


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything a file of the package imports, also inside functions and by name."""
    package = ["protokernels", *path.relative_to(ROOT / "protokernels").parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, ".".join(["protokernels"] * name.value.startswith(".") + [name.value.lstrip(".")])


def part(path: Path) -> str:
    """The part of the package a file belongs to: its folder or, at the top, its own name."""
    return path.relative_to(ROOT / "protokernels").parts[0].removesuffix(".py")


PACKAGE_FILES = sorted((ROOT / "protokernels").rglob("*.py"))


class TestImports:
    def test_every_part_has_its_floor(self) -> None:
        assert {part(path) for path in PACKAGE_FILES} - FLOORS.keys() == set(), "add the new part to FLOORS"

    @pytest.mark.parametrize("path", PACKAGE_FILES, ids=named)
    def test_imports_go_down_only(self, path: Path) -> None:
        floor = FLOORS[part(path)]
        for line, name in imports(path):
            words = name.split(".")
            if words[0] == "protokernels" and len(words) > 1 and words[1] in FLOORS:
                assert FLOORS[words[1]] <= floor, f"{named(path)}:{line} imports {name} from a floor above its own"

    @pytest.mark.parametrize("path", PACKAGE_FILES, ids=named)
    def test_the_ground_floor_needs_torch_and_numpy_only(self, path: Path) -> None:
        allowed = {"torch", "numpy", "protokernels"} if FLOORS[part(path)] <= GROUND else None
        for line, name in imports(path):
            first = name.split(".")[0]
            assert first != "torchvision", f"{named(path)}:{line} imports torchvision, which a CPU torch does not load"
            if allowed is not None and first not in sys.stdlib_module_names:
                assert first in allowed, f"{named(path)}:{line} imports {first}; the ground floor has torch and numpy"

    @pytest.mark.parametrize("path", sorted((ROOT / "protokernels/papers").glob("[!_]*.py")), ids=named)
    def test_no_paper_imports_another(self, path: Path) -> None:
        for line, name in imports(path):
            if name.startswith("protokernels.papers."):
                other = name.split(".")[2]
                own = other == path.stem or other.startswith(f"_{path.stem}_")  # its further files
                assert own or not (path.parent / f"{other}.py").exists(), f"{named(path)}:{line}: {name}"


class TestFiles:
    def test_there_are_files_of_every_kind(self) -> None:
        assert {path.suffix for path in source_files()} >= {".py", ".h", ".cpp", ".cu", ".cuh"}

    @pytest.mark.parametrize("path", source_files(), ids=named)
    def test_a_source_file_is_short_and_begins_with_its_licence_line(self, path: Path) -> None:
        lines = path.read_text().splitlines()
        first = lines[1] if lines and lines[0].startswith("#!") else lines[0] if lines else ""
        comment = "#" if path.suffix in (".py", ".sh") else "//"
        assert first == f"{comment} SPDX-License-Identifier: MIT"
        assert len(lines) <= LONGEST, f"{len(lines)} lines; split it along its sections"

    @pytest.mark.parametrize("path", source_files(), ids=named)
    def test_no_banner_and_no_note_to_self(self, path: Path) -> None:
        unwanted = rf"\b({'TO' + 'DO'}|{'FIX' + 'ME'}|{'X' * 3}|{'Copy' + 'right'})\b"
        found = [line for line in path.read_text().splitlines() if re.search(unwanted, line)]
        assert found == []
