# SPDX-License-Identifier: MIT
"""Every public function under calls that nobody would write by hand; ``fuzz`` says what is asked of the answers and how to draw more."""

from __future__ import annotations

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

import protokernels
from python_tests.fuzz import examples, judge
from python_tests.fuzz_calls import CALLS, drawn


@pytest.mark.parametrize("name", CALLS)
@examples(few=60)
@given(data=st.data())
def test_the_answer_is_right_or_a_clear_error(name: str, data: st.DataObject) -> None:
    judge(data.draw(drawn(CALLS[name])))


def test_every_public_function_is_drawn() -> None:
    public = {name for name in protokernels.__all__ if inspect.isfunction(getattr(protokernels, name))}
    assert public == set(CALLS)
