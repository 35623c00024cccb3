# SPDX-License-Identifier: MIT
"""Python processes that cost no import of torch: each is forked from a server that has imported it and nothing of ours.

This file imports nothing heavy, since every such process reads it.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


class Fork:
    """A started process; ``folder`` is where it runs and keeps what it prints, in ``stdout.NAME`` and ``stderr.NAME``.

    Its ``sys.path`` is that of this process, after ``package_folder``, if given. It has the variables of ``environment`` and no
    others; torch was imported with those of this process.
    """

    def __init__(
        self,
        code: str,
        folder: Path,
        environment: Mapping[str, str],
        package_folder: Path | None = None,
        name: str = "",
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch"])
        self.code, self.outputs = code, [folder / f"stdout.{name}", folder / f"stderr.{name}"]
        arguments = (code, str(folder), dict(environment), package_folder and str(package_folder), self.outputs)
        self.process = context.Process(target=_run, args=arguments)
        self.process.start()

    def wait_for(self, words: str, seconds: float) -> None:
        """Waits until it has printed ``words``, and fails where it ends without or takes longer than ``seconds``."""
        end = time.monotonic() + seconds
        while not self.outputs[0].exists() or words not in self.outputs[0].read_text():
            assert self.process.is_alive() and time.monotonic() < end, self.finish(seconds=0).stderr
            time.sleep(0.005)

    def finish(self, seconds: float) -> subprocess.CompletedProcess[str]:
        """Waits until it ends, or kills it after ``seconds``, which gives the return code -9."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        assert self.process.exitcode is not None
        printed = [path.read_text() if path.exists() else "" for path in self.outputs]
        return subprocess.CompletedProcess([self.code], self.process.exitcode, *printed)


def run_ranks(script: str, folder: Path, arguments: Sequence[Sequence[object]], seconds: float = 240.0) -> None:
    """Runs ``script`` once for every list of its arguments, all at a time; every process has to end well.

    They have the variables that torchrun sets: a script may join the others by ``dist.init_process_group("gloo")``.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    environment = {
        **os.environ,
        **address,
        "WORLD_SIZE": str(len(arguments)),
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
    }
    ranks = []
    for rank, words in enumerate(arguments):
        code = f"""
import runpy, sys
sys.argv = {[script, *map(str, words)]}
runpy.run_path({script!r}, run_name="__main__")
"""
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(Fork(code, folder, {**environment, **own}, name=str(rank)))
    end = time.monotonic() + seconds
    done = [rank.finish(max(0.0, end - time.monotonic())) for rank in ranks]
    assert [process.returncode for process in done] == [0] * len(ranks), "\n".join(process.stderr for process in done)


def _run(code: str, folder: str, environment: dict[str, str], package_folder: str | None, outputs: list[Path]) -> None:
    for descriptor, path in zip((1, 2), outputs, strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    ours = [name for name in sys.modules if name.split(".")[0] == "protokernels"]
    assert not ours, f"the server has imported {ours[0]}"
    if package_folder is not None:
        sys.path.insert(0, package_folder)
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
