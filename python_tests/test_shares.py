# SPDX-License-Identifier: MIT
"""`benchmarks/shares.py`: reading the profiler's report, and parts that claim the functions they are meant for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import shares

REPORT = """
# Samples: 5K of event 'cpu-clock'
#
    40.00%  _C.abi3.so                               [.] void (anonymous namespace)::product<float, 2>(long, float const*)
    10.00%  _C.abi3.so                               [.] (anonymous namespace)::sum_part<float, true>
    30.00%  libtorch_cpu.so                          [.] at::native::sum
     5.00%  _C.abi3.so                               [.] (anonymous namespace)::unpack_planes<float, float>
     5.00%  _C.abi3.so                               [.] protokernels::(anonymous namespace)::check_plan
     1.00%  [kernel.kallsyms]                        [k] clear_page_erms
"""


def test_only_the_library_counts() -> None:
    found = shares.samples(REPORT)
    assert sum(found.values()) == 60 and not any("native::sum" in name for name in found)
    assert shares.shares(found, {"products": r"::product<", "exponentials": r"sum_part<", "moves": r"pack"}) == {
        "products": 0.667,
        "exponentials": 0.167,
        "moves": 0.083,
        "other": 0.083,
    }


def test_a_report_without_the_library_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no function of the library"):
        shares.shares(shares.samples("   99.00%  libc.so.6  [.] malloc"), {"all": "."})


@pytest.mark.parametrize("name", list(shares.CASES)[:1] + list(shares.CASES)[-1:])
def test_a_case_runs(name: str) -> None:
    assert shares.main(["--child", name, "--seconds", "0.01"]) == 0


def test_the_record_is_of_these_cases() -> None:
    record = json.loads((Path(shares.__file__).parent / "results" / "shares_cpu.json").read_text())
    assert [row["case"] for row in record["rows"]] == list(shares.CASES)
    for row in record["rows"]:
        assert list(row["shares"]) == [*shares.CASES[row["case"]][1], "other"]
        assert abs(sum(row["shares"].values()) - 1) < 0.01


def test_without_out_nothing_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = Path(shares.__file__).parent / "results" / "shares_cpu.json"
    before = record.read_text()
    monkeypatch.setattr(shares.shutil, "which", lambda name: name)
    monkeypatch.setattr(shares, "measure", lambda *_: {"other": 1.0})
    try:
        assert shares.main([]) == 0
        assert record.read_text() == before
    finally:
        record.write_text(before)
    assert shares.main(["--out", str(tmp_path / "mine.json")]) == 0
    assert [row["case"] for row in json.loads((tmp_path / "mine.json").read_text())["rows"]] == list(shares.CASES)
