# SPDX-License-Identifier: MIT
"""What the stages of `gpu.py` left behind, read from their files, and the summary made of it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.table import table


@dataclass
class Details:
    """What a stage found in one line, what is wrong, and what was left out with its reason."""

    found: str = ""
    problems: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)


def read_junit(path: Path) -> Details:
    """Counts, failures and reasons of skips in pytest's own report."""
    if not path.exists():
        return Details("pytest left no report")
    try:
        cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    except ElementTree.ParseError as error:
        return Details(f"pytest's report is damaged: {error}")
    details, skips = Details(), 0
    for case in cases:
        name = f"{case.get('classname', '')}::{case.get('name', '')}".removeprefix("::")
        for kind in ("failure", "error"):
            for element in case.findall(kind):
                first = (element.get("message") or "").strip().splitlines()
                details.problems.append(f"{name}: {first[0][:300] if first else kind}")
        for element in case.findall("skipped"):
            skips += 1
            details.left_out.setdefault(element.get("message") or "no reason", []).append(name)
    failed = sum(1 for case in cases if case.find("failure") is not None or case.find("error") is not None)
    details.found = f"{len(cases) - failed - skips} passed, {failed} failed, {skips} skipped"
    return details


def read_tests(path: Path) -> Details:
    """The report of a stage that must have tested something: without a library or a GPU all tests are skipped."""
    details = read_junit(path)
    if re.match(r"0 passed, 0 failed", details.found):
        details.problems.append(f"no test ran: {details.found}; the reasons stand under what was left out")
    return details


def read_sanitizer(log: Path) -> Details:
    """Errors that compute-sanitizer reported, also in a log without its last line."""
    text = log.read_text(errors="replace") if log.exists() else ""
    reported = re.findall(
        r"^=+ ((?:Invalid|Misaligned|Error: Race|Race|Illegal|Out-of-range|Memory access).*)$", text, flags=re.M
    )
    summary = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", text, flags=re.M)
    problems = [f"{count} times: {what}" for what, count in Counter(reported).most_common(10)]
    found = "; ".join(summary) or f"{len(reported)} reports"
    tests = re.findall(r"^[^\n]*?(\d+ (?:passed|failed|skipped|deselected)\b[^\n]* in [\d.]+s)", text, flags=re.M)
    return Details(found + (f"; {tests[-1]}" if tests else ""), problems)


def read_rows(rows: Path, report: Path) -> Details:
    """How many rows the results file holds, and what failed or could not be measured."""
    details = read_junit(report)
    count = len(json.loads(rows.read_text())["rows"]) if rows.exists() else 0
    held = details.left_out.pop("the results file holds this row", [])
    details.found = f"{count} rows" + (f", {len(held)} of them from before" if held else "")
    return details


def summary_text(summary: dict[str, Any], results: dict[str, Any]) -> str:
    """The summary as Markdown: stages, failures, what was left out, tables of the benchmarks."""
    lines = [
        f"# protokernels on {summary['gpu']}",
        "",
        f"{summary['date']}, commit {summary['commit']}, compute capability {summary['capability']}, torch {summary['torch']}, "
        f"CUDA {summary['cuda']}, GPUs: {summary['gpus']}.",
        "",
        "| stage | state | seconds | found | commit |",
        "|---|---|---|---|---|",
    ]
    stages: Sequence[dict[str, Any]] = summary["stages"]
    for record in stages:
        cells = (record["stage"], record["state"], f"{record['seconds']:.0f}", record["found"], record["commit"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += [f"| {name} | not run | | | |" for name in summary["not_run"]]
    problems = [f"- {record['stage']}: {problem}" for record in stages for problem in record["problems"]]
    left_out = [
        f"- {record['stage']}: {reason} ({len(names)}: {names[0]}{', ...' if len(names) > 1 else ''})"
        for record in stages
        for reason, names in record["left_out"].items()
    ]
    for title, part in (("Failures", problems), ("Left out", left_out)):
        lines += ["", f"## {title}", "", *part] if part else []
    if results:
        lines += ["", "## Benchmarks", "", table(results)]
    return "\n".join(lines) + "\n"
