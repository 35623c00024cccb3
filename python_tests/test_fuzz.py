# SPDX-License-Identifier: MIT
"""Every public function under calls that nobody would write by hand; ``fuzz`` says what is asked of the answers and how to draw more."""

from __future__ import annotations

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

import protokernels
from protokernels import cluster
from python_tests import fuzz_calls, fuzz_modules
from python_tests.fuzz import Call, examples, judge

CALLS = {**fuzz_calls.CALLS, **fuzz_modules.CALLS}


@pytest.mark.parametrize("name", CALLS)
@examples(few=10)
@given(data=st.data())
def test_the_answer_is_right_or_a_clear_error(name: str, data: st.DataObject) -> None:
    judge(data.draw(fuzz_calls.drawn(CALLS[name])))


def test_every_public_name_is_drawn() -> None:
    functions = {name for name in protokernels.__all__ if inspect.isfunction(getattr(protokernels, name))}
    results = {"ViewStrength", "Elbow"}  # an argument of RandomViews, drawn with it; what choose_n_clusters returns
    public = functions | {*protokernels.nn.__all__, *cluster.__all__} - results
    assert public == set(CALLS), "add what is missing to CALLS in fuzz_calls.py or fuzz_modules.py"


PROCESSES = {"gather"}
"""Arguments that need other processes."""


@pytest.mark.parametrize("name", CALLS)
def test_every_argument_is_drawn(name: str) -> None:
    """Not in the place of what is meant only: with values that are."""
    calls: list[Call] = []

    @examples(few=80)
    @given(data=st.data())
    def draw(data: st.DataObject) -> None:
        calls.append(data.draw(fuzz_calls.meant(CALLS[name])))

    draw()
    drawn = {argument for call in calls for argument in call.arguments}
    assert set(inspect.signature(calls[0].run).parameters) - drawn <= PROCESSES
