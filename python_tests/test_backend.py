# SPDX-License-Identifier: MIT
"""Which code runs, native kernels or reference; and what happens where the native library is not what it should be."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import protokernels
from protokernels import _native, backend
from protokernels.ops import _calls
from protokernels.ops import prototypes as ops
from python_tests import forks

PACKAGE = Path(protokernels.__file__).parent
HAS_COMPILER = any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++"))

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def restored_backend() -> Iterator[None]:
    previous = backend.get()
    yield
    backend.set(previous)


@pytest.fixture
def native_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backends that served the calls of the test, in order."""
    calls: list[str] = []
    original = backend.native_serves

    def recorded(device: torch.device) -> bool:
        serves = original(device)
        calls.append("native" if serves else "reference")
        return serves

    monkeypatch.setattr(ops.backend, "native_serves", recorded)
    return calls


@pytest.fixture
def call() -> Callable[[], torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(5, 4, generator=generator)
    prototypes = torch.randn(3, 4, generator=generator)

    def soft_assign() -> torch.Tensor:
        assignment = protokernels.soft_assign(z, prototypes, temperature=0.5)
        assert isinstance(assignment, torch.Tensor)
        return assignment

    return soft_assign


@pytest.fixture
def copied(tmp_path: Path) -> Run:
    """Runs Python code against a copy of the package whose native library is missing, or is the bytes given."""
    folder = tmp_path / "copy"
    shutil.copytree(PACKAGE, folder / "protokernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))

    def run(code: str, library: bytes | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        if library is not None:
            (folder / "protokernels" / "_C.abi3.so").write_bytes(library)
        inherited = {k: v for k, v in os.environ.items() if k not in ("PROTOKERNELS_BACKEND", "PROTOKERNELS_CPU_LEVEL")}
        check = (
            f"import protokernels\nassert protokernels.__file__.startswith({str(folder)!r}), protokernels.__file__\n"
        )
        fork = forks.Fork(check + textwrap.dedent(code), tmp_path, {**inherited, **environment}, package_folder=folder)
        return fork.finish(seconds=120)

    return run


class TestSelection:
    def test_native_code_is_what_these_tests_test(self) -> None:
        if _native.LIBRARY is None and not HAS_COMPILER:
            pytest.skip("installed without a C++ compiler, so without native code")
        assert _native.PROBLEM is None
        assert _native.LIBRARY is not None and _native.LIBRARY.parent == PACKAGE

    def test_auto_takes_native_code_on_the_cpu(self, native_calls: list[str], call: Callable[[], torch.Tensor]) -> None:
        backend.set("auto")
        call()
        assert native_calls == ["native" if _native.LIBRARY is not None else "reference"]

    @pytest.mark.skipif(_native.LIBRARY is None, reason="installed without native code")
    def test_both_give_the_same_values(self, native_calls: list[str], call: Callable[[], torch.Tensor]) -> None:
        values = {}
        for name in ("native", "reference"):
            with backend.use(name):
                values[name] = call()
        assert native_calls == ["native", "reference"]
        torch.testing.assert_close(values["native"], values["reference"])

    def test_reference_calls_no_native_operator(
        self, monkeypatch: pytest.MonkeyPatch, call: Callable[[], torch.Tensor]
    ) -> None:
        class Forbidden:
            def __getattr__(self, name: str) -> object:
                raise AssertionError(f"native operator {name} was asked for")

        monkeypatch.setattr(torch.ops, "protokernels", Forbidden(), raising=False)
        monkeypatch.setattr(_calls, "_KERNELS", {})  # those that earlier calls have found
        backend.set("reference")
        assert call().shape == (5, 3)
        if _native.LIBRARY is not None:
            backend.set("native")
            with pytest.raises(AssertionError, match="prototypes_forward"):
                call()

    def test_use_restores_after_an_exception(self) -> None:
        backend.set("auto")
        with pytest.raises(KeyError), backend.use("reference"):
            assert backend.get() == "reference"
            raise KeyError
        assert backend.get() == "auto"

    def test_use_nests(self) -> None:
        backend.set("reference")
        with backend.use("auto"):
            with backend.use("reference"):
                assert backend.get() == "reference"
            assert backend.get() == "auto"
        assert backend.get() == "reference"

    @pytest.mark.parametrize("name", ["cuda", "Native", "", None, 1])
    def test_unknown_names_are_refused(self, name: object) -> None:
        before = backend.get()
        with pytest.raises(ValueError, match="expected one of auto, native, reference; got"):
            backend.set(name)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="expected one of"), backend.use(name):  # type: ignore[arg-type]
            pass
        assert backend.get() == before

    def test_native_has_nothing_for_other_devices(self) -> None:
        backend.set("native")
        z = torch.zeros(2, 3, device="meta")
        with pytest.raises(backend.NativeUnavailableError, match=r"cannot serve meta: .*'meta'|cannot serve meta: "):
            protokernels.soft_assign(z, z, temperature=1.0)
        backend.set("auto")
        assert protokernels.soft_assign(z, z, temperature=1.0).shape == (2, 2)  # type: ignore[union-attr]

    def test_a_build_without_cuda_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_native, "LIBRARY", PACKAGE / "_C.abi3.so")
        monkeypatch.setattr(_native, "build_info", lambda: {"cuda_archs": ""})
        monkeypatch.setattr(backend, "_cuda_built", None)
        backend.set("native")
        with pytest.raises(backend.NativeUnavailableError, match="PROTOKERNELS_CUDA=on"):
            backend.native_serves(torch.device("cuda", 0))
        backend.set("auto")
        with pytest.warns(RuntimeWarning, match=r"runs its plain PyTorch reference on cuda:0"):
            assert not backend.native_serves(torch.device("cuda", 0))


class TestEnvironment:
    @pytest.mark.parametrize("name", backend.NAMES)
    def test_sets_the_start_value(self, copied: Run, name: str) -> None:
        done = copied("print(protokernels.backend.get())", PROTOKERNELS_BACKEND=name)
        assert done.stdout == f"{name}\n", done.stderr

    def test_an_unknown_name_is_refused_where_it_is_used_first(self, copied: Run) -> None:
        done = copied(
            """
            import sys, torch
            sys.argv[0] = "protokernels"  # whatever the program is called
            for use in (
                protokernels.backend.get,
                lambda: protokernels.soft_assign(torch.eye(2), torch.eye(2), temperature=1.0),
                lambda: protokernels.backend.use("native").__enter__(),
            ):
                try:
                    use()
                except ValueError as error:
                    print(error)
            protokernels.backend.set("reference")
            print(protokernels.backend.get())
            """,
            PROTOKERNELS_BACKEND="gpu",
        )
        refused = "PROTOKERNELS_BACKEND: expected one of auto, native, reference; got 'gpu'\n"
        assert done.stdout == 3 * refused + "reference\n", done.stderr


CALLS = """
import torch
from protokernels import backend
z, prototypes = torch.eye(2, requires_grad=True), torch.eye(2)
step = protokernels.prototype_step(z, prototypes, temperature=0.5, new_weight=0.5)
step.assignment.sum().backward()
assert step.counts.tolist() == [1, 1]
assert protokernels.nn.Prototypes(2, 2)(torch.eye(2)).shape == (2, 2)
backend.set("native")
try:
    protokernels.soft_assign(z, prototypes, temperature=0.5)
except backend.NativeUnavailableError as error:
    print(error)
"""

DOCTOR = """
from protokernels import doctor
raise SystemExit(doctor.main())
"""


class TestWithoutTheLibrary:
    def test_import_and_auto_work_and_native_says_what_is_missing(self, copied: Run) -> None:
        done = copied(CALLS)
        assert done.returncode == 0, done.stderr
        assert "backend 'native' cannot serve cpu: the package was installed without its native library" in done.stdout
        assert "compiler" in done.stdout and "pip install" in done.stdout
        assert done.stderr == ""

    def test_the_doctor_says_why_and_what_to_do(self, copied: Run) -> None:
        done = copied(DOCTOR)
        assert done.returncode == 1, done.stderr
        assert "native code    none\n" in done.stdout
        assert "  cpu          reference\n" in done.stdout
        assert "No native kernels on the CPU: the package was installed without its native library" in done.stdout


def _unrelated_library() -> bytes:
    """An intact shared library that registers no operators."""
    import _struct

    path = getattr(_struct, "__file__", None)
    return Path(path).read_bytes() if path else b""


class TestBrokenLibrary:
    @pytest.mark.parametrize(
        "content",
        [b"", b"not a library", b"\x7fELF" + bytes(200)],
        ids=["empty", "text", "header only"],
    )
    def test_import_and_auto_work_and_native_names_the_file(self, copied: Run, content: bytes) -> None:
        done = copied(CALLS, library=content)
        assert done.returncode == 0, done.stderr
        assert "backend 'native' cannot serve cpu: " in done.stdout
        assert "_C.abi3.so does not load" in done.stdout

    @pytest.mark.skipif(_native.LIBRARY is None, reason="installed without native code")
    def test_a_truncated_library_does_not_take_the_import_down(self, copied: Run) -> None:
        assert _native.LIBRARY is not None
        content = _native.LIBRARY.read_bytes()
        done = copied(CALLS, library=content[: len(content) // 3])
        assert done.returncode == 0, done.stderr
        assert "_C.abi3.so does not load" in done.stdout

    def test_the_reason_is_that_of_the_systems_loader(self, copied: Run) -> None:
        done = copied(CALLS, library=b"\x7fELF" + bytes(200))
        assert re.search(r"_C\.abi3\.so does not load beside torch [\w.+]+: [^;]*ELF", done.stdout)

    def test_a_library_of_something_else_is_refused(self, copied: Run) -> None:
        content = _unrelated_library()
        if not content:
            pytest.skip("this Python has no extension module as a file to take as an example")
        done = copied(CALLS, library=content)
        assert done.returncode == 0, done.stderr
        assert "backend 'native' cannot serve cpu: " in done.stdout

    def test_the_doctor_says_why(self, copied: Run) -> None:
        done = copied(DOCTOR, library=b"not a library")
        assert done.returncode == 1, done.stderr
        assert "No native kernels on the CPU: " in done.stdout
        assert "_C.abi3.so does not load" in done.stdout
