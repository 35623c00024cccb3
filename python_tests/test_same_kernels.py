# SPDX-License-Identifier: MIT
"""benchmarks/same_kernels.py on made-up libraries."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from benchmarks import same_kernels


def image(code: dict[str, bytes], machine: int = same_kernels.CUDA_MACHINE) -> bytes:
    """An ELF image with a section of code for each kernel."""
    names, body, sections = b"\0.names\0", b"", []
    for name, content in code.items():
        sections.append((len(names), 64 + len(body), len(content)))
        names, body = names + f".text.{name}\0".encode(), body + content
    sections.append((1, 64 + len(body), len(names)))
    table = b"".join(struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, at, length, 0, 0, 0, 0) for name, at, length in sections)
    header = same_kernels.MAGIC + bytes(14) + struct.pack("<H", machine) + bytes(20)
    header += (
        struct.pack("<Q", 64 + len(body) + len(names))
        + bytes(10)
        + struct.pack("<HHH", 64, len(sections), len(sections) - 1)
    )
    assert len(header) == 64
    return header + body + names + table


def library(path: Path, *images: bytes) -> Path:
    path.write_bytes(same_kernels.MAGIC + bytes(100) + bytes(8).join(images) + bytes(32))
    return path


def test_kernels_are_compared_by_their_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    host = image({"on_the_host": b"none"}, machine=62)
    then = library(tmp_path / "then.so", image({"a": b"1111", "b": b"2222"}), host, image({"c": b"33"}))
    now = library(tmp_path / "now.so", image({"a": b"1111", "renamed": b"33"}), image({"b": b"2223", "new": b""}))
    arguments = [str(then), str(now), "--commits", "one", "two", "--json", str(tmp_path / "out.json")]
    assert same_kernels.main(arguments) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert record == {"then": "one", "now": "two", "kernels": 4, "same": 2, "others": ["b", "new"]}
    assert "2 of 4 kernels have the code they had" in capsys.readouterr().out


def test_a_library_without_device_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    then = library(tmp_path / "then.so", image({"a": b"1"}, machine=62))
    assert same_kernels.main([str(then), str(then)]) == 1
    assert "holds no device code" in capsys.readouterr().err
