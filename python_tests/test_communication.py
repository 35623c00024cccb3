# SPDX-License-Identifier: MIT
"""What the table of communication says is what three processes exchange."""

from __future__ import annotations

import pytest

pytest.importorskip("accelerate", reason="training needs the extra protokernels[train]")

from benchmarks import communication


def test_processes_exchange_what_the_formulas_say() -> None:
    counts = {3: communication.count(3)}
    assert communication.differences(counts) == []
    doubled = {3: [2 * value for value in counts[3]]}
    assert len(communication.differences(doubled)) == len(communication.CASES)
    cells = communication.cells(communication.record(counts))
    assert len(cells) == len(communication.CASES) + 1 and len({len(line) for line in cells}) == 1


def test_one_process_exchanges_nothing() -> None:
    assert all(case.expected(1) == 0 for case in communication.CASES)
