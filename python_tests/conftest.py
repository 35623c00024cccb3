# SPDX-License-Identifier: MIT
"""Which `protokernels` the tests see: the installed one, never the bare source tree beside them.

`pytest` finds the package where Python finds it: in site-packages after `pip install .`, in the checkout after
`pip install -e .` or an in-place build. The checkout itself is only appended to the path, for the helpers in
`python_tests` and `benchmarks`, so it cannot hide an installed package. Processes that tests start inherit the choice.

`python -m pytest` puts the checkout first. If its library was never built while an installed package has one, the
tests would quietly run on the reference backend; that is an error here.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _has_library(package: Path) -> bool:
    return any(package.glob("_C*.so"))


def _package() -> Path:
    """Returns the folder of the package under test; ends the run if there is none or the wrong one."""
    spec = importlib.util.find_spec("protokernels")
    if spec is None or spec.origin is None:
        pytest.exit("protokernels is not installed: run `pip install -c constraints.txt '.[test]'` first", returncode=4)
    package = Path(spec.origin).resolve().parent
    if package == ROOT / "protokernels" and not _has_library(package):
        for entry in sys.path:
            other = Path(entry or ".").resolve() / "protokernels"
            if other != package and _has_library(other):
                pytest.exit(
                    f"the tests would import {package}, which has no native library, instead of the installed {other}: "
                    "run `pytest --import-mode=importlib`, not `python -m pytest`, without the checkout in PYTHONPATH",
                    returncode=4,
                )
    return package


# The package is looked up before the checkout joins the path: else one that is not installed would seem to be.
PACKAGE = _package()
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

# Child processes see the same package: they do not put their working folder first, and find an in-place build.
os.environ["PYTHONSAFEPATH"] = "1"
os.environ.pop("PYTEST_ADDOPTS", None)  # options of this run, by now read; a pytest that a test starts has its own
if PACKAGE.parent == ROOT:
    given = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry and Path(entry) != ROOT]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *given])


def pytest_report_header() -> list[str]:
    """Says in the first lines of a run what is being tested."""
    from protokernels import _native, backend

    library = _native.LIBRARY.name if _native.LIBRARY is not None else f"none: {_native.PROBLEM}"
    return [f"protokernels: {PACKAGE} (native library: {library}; backend: {backend.get()})"]


@pytest.fixture
def own_threads() -> Iterator[None]:
    """The number of threads as it was, for what sets it."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs train on and score a fourth of the embedded digits: for tests of what a run does, not of how well it learns."""
    from dataclasses import replace

    from protokernels.data import Split, load_dataset

    def some(split: Split) -> Split:
        return Split(split.images[::4], split.labels[::4])

    digits = load_dataset("digits")
    assert digits.val is not None
    few = replace(digits, train=some(digits.train), val=some(digits.val), test=some(digits.test))
    monkeypatch.setattr("protokernels.training.experiment.load_dataset", lambda *_arguments, **_keywords: few)
