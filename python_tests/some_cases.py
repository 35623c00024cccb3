# SPDX-License-Identifier: MIT
"""A pytest plugin, `-p python_tests.some_cases`: of every test the first case runs and a third of the others, the same ones every time.

For runs that go through tests a second time, with another instruction set or under a sanitizer.
"""

from __future__ import annotations

import zlib

import pytest


@pytest.hookimpl(trylast=True)  # of what -k leaves
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Takes the other cases out."""
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    met: set[str] = set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        chosen = test not in met or zlib.crc32(item.nodeid.encode()) % 3 == 0
        met.add(test)
        (kept if chosen else left_out).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)
