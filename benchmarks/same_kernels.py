# SPDX-License-Identifier: MIT
"""Which CUDA kernels of a library have machine code that stands in another one: what a GPU that ran the tests of that has seen of this.

    python benchmarks/same_kernels.py THEN.so NOW.so --commits f51b5d7 HEAD --json benchmarks/results/same_kernels.json

Both are to be built by one nvcc for one architecture (``PROTOKERNELS_CUDA_ARCHS=90a-real``), uncompressed, as the build does it. Code is
compared byte by byte, whatever a kernel is called; constants beside it (``.nv.constant``) and the host's side are not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

MAGIC = b"\x7fELF"
CUDA_MACHINE = 190
CODE = ".text."


def device_images(library: bytes) -> Iterator[bytes]:
    """The ELF images of device code inside a library, which is one itself."""
    at = library.find(MAGIC, 1)
    while at >= 0:
        (machine,) = struct.unpack_from("<H", library, at + 18)
        (table,) = struct.unpack_from("<Q", library, at + 40)
        size, count = struct.unpack_from("<HH", library, at + 58)
        if machine == CUDA_MACHINE:
            yield library[at : at + table + size * count]
        at = library.find(MAGIC, at + 4)


def kernels(image: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and machine code."""
    (table,) = struct.unpack_from("<Q", image, 40)
    size, count, names_at = struct.unpack_from("<HHH", image, 58)
    sections = [struct.unpack_from("<IIQQQQ", image, table + index * size) for index in range(count)]
    names = image[sections[names_at][4] :]
    for name_at, _, _, _, offset, length in sections:
        name = names[name_at : names.index(b"\0", name_at)].decode()
        if name.startswith(CODE):
            yield name.removeprefix(CODE), image[offset : offset + length]


def kernels_of(library: Path) -> list[tuple[str, bytes]]:
    found = [kernel for image in device_images(library.read_bytes()) for kernel in kernels(image)]
    if not found:
        raise ValueError(
            f"{library} holds no device code that is not compressed; build it with nvcc for one architecture, 90a-real say"
        )
    return found


def compared(then: Path, now: Path) -> tuple[int, list[str]]:
    """How many kernels ``now`` holds, and the names of those whose code does not stand in ``then``."""
    known = {code for _, code in kernels_of(then)}
    all_now = kernels_of(now)
    return len(all_now), sorted(name for name, code in all_now if code not in known)


def demangled(names: Sequence[str]) -> list[str]:
    if shutil.which("c++filt") is None or not names:
        return list(names)
    text = subprocess.run(["c++filt"], input="\n".join(names), text=True, capture_output=True, check=True).stdout
    return [name.replace("(anonymous namespace)::", "") for name in text.splitlines()]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("then", type=Path)
    parser.add_argument("now", type=Path)
    parser.add_argument("--commits", nargs=2, metavar=("THEN", "NOW"), default=("", ""))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    try:
        count, others = compared(options.then, options.now)
    except (OSError, ValueError) as error:
        print(f"same_kernels: {error}", file=sys.stderr)
        return 1
    record = {
        "then": options.commits[0],
        "now": options.commits[1],
        "kernels": count,
        "same": count - len(others),
        "others": demangled(others),
    }
    for name in record["others"]:
        print(name)
    print(f"{record['same']} of {count} kernels have the code they had")
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
