# SPDX-License-Identifier: MIT
"""The public interface is the one that `public_api.txt` says: no name, parameter, default or option changes by accident."""

from __future__ import annotations

import difflib
import inspect

import pytest

from python_tests import public_api


def test_the_interface_is_the_one_on_file() -> None:
    held, now = public_api.FILE.read_text(), public_api.public_api()
    difference = "".join(difflib.unified_diff(held.splitlines(True), now.splitlines(True), "on file", "now", n=0))
    assert not difference, (
        f"the public interface has changed:\n{difference}"
        "If that is meant: `python python_tests/public_api.py --write`, and a line in CHANGELOG.md that says what callers do now."
    )


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda x, *, k=1: x, "(x, *, k=1)"),
        (lambda x, _kept=None: x, "(x)"),
    ],
)
def test_a_signature_holds_what_callers_can_name(function: object, text: str) -> None:
    assert public_api.signature(function) == text


def test_every_function_that_is_public_is_documented() -> None:
    import protokernels
    from protokernels import cluster, nn

    for module in (protokernels, nn, cluster):
        for name in module.__all__:
            value = getattr(module, name)
            if callable(value):
                assert inspect.getdoc(value), f"{module.__name__}.{name} has no docstring"
