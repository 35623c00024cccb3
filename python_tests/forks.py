# SPDX-License-Identifier: MIT
"""Python processes that cost no import of torch: each is forked from a server that has imported it and nothing of ours.

This file imports nothing heavy, since every such process reads it.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def run(
    code: str, package_folder: Path, folder: Path, environment: Mapping[str, str], timeout: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a new process that finds packages in ``package_folder`` first, as ``python -c`` would with that PYTHONPATH.

    Args:
        code: statements.
        package_folder: the folder that stands first in ``sys.path``.
        folder: where the process runs; what it prints goes to two files there.
        environment: all of its environment variables.
        timeout: seconds, after which the process is killed.

    Returns:
        The finished process, with what it printed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    outputs = [folder / "stdout", folder / "stderr"]
    arguments = (code, str(package_folder), str(folder), dict(environment), *map(str, outputs))
    process = context.Process(target=_run, args=arguments)
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
    returncode = process.exitcode
    assert returncode is not None
    return subprocess.CompletedProcess([code], returncode, *(path.read_text() for path in outputs))


def _run(code: str, package_folder: str, folder: str, environment: dict[str, str], stdout: str, stderr: str) -> None:
    for descriptor, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    ours = [name for name in sys.modules if name.split(".")[0] == "protokernels"]
    assert not ours, f"the server has imported {ours[0]}"
    sys.path.insert(0, package_folder)
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
