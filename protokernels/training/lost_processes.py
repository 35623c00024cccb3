# SPDX-License-Identifier: MIT
"""What is said, and by whom, when one of the processes that train together is gone.

The others notice at their next exchange: at once with gloo, whose connections the system closes. A host that falls silent is
noticed after torch's time limit (30 minutes with gloo, 10 with NCCL), unless ``torchrun`` ends the processes before.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from .distributed import process_count

PATIENCE = 2.0  # seconds: a process that is being killed closes its connections a little before it has ended
_ABOUT_CONNECTIONS = re.compile(r"gloo|NCCL|connection|broken pipe|timed out|timeout", re.IGNORECASE)


class ProcessLostError(RuntimeError):
    """One of several processes has ended; the message has been said on stderr by one of the others."""


class Peer(NamedTuple):
    """A process that trains with the others."""

    host: str
    pid: int


@contextmanager
def losses_told(folder: Path) -> Iterator[None]:
    """Turns the failure of an exchange with other processes into a :class:`ProcessLostError` that names those that have ended.

    Any other error may be this process's alone, but for a divergence: it gets an attribute ``others_wait`` that is true.

    Args:
        folder: of the run, for the message.
    """
    if process_count() == 1:
        yield
        return
    peers: list[Peer] = [Peer("", 0)] * process_count()
    dist.all_gather_object(peers, Peer(socket.gethostname(), os.getpid()))
    try:
        yield
    except FloatingPointError:  # of sums over all processes: it has come to all of them
        raise
    except Exception as error:
        exchange = isinstance(error, RuntimeError) and _ABOUT_CONNECTIONS.search(str(error))
        if not exchange and not isinstance(error, dist.DistError):
            vars(error)["others_wait"] = True
            raise
        if threading.current_thread() is threading.main_thread():
            signal.signal(
                signal.SIGTERM, signal.SIG_IGN
            )  # torchrun sends it to those that remain; this one is at its end
        rank, ended = dist.get_rank(), _ended(peers)
        message = _message(peers, ended, folder)
        if rank == min(set(range(len(peers))) - set(ended), default=rank):  # one speaks for all
            print(f"protokernels: {message}", file=sys.stderr, flush=True)
        raise ProcessLostError(message) from error


def _ended(peers: list[Peer]) -> list[int]:
    """Ranks of the processes on this machine that have ended, as soon as there is one."""
    here, deadline = socket.gethostname(), time.monotonic() + PATIENCE
    while True:
        ended = [rank for rank, peer in enumerate(peers) if peer.host == here and has_ended(peer.pid)]
        if ended or time.monotonic() > deadline:
            return ended
        time.sleep(0.05)


def _message(peers: list[Peer], ended: list[int], folder: Path) -> str:
    if ended:
        which = ", ".join(
            f"process {rank} of {len(peers)} (number {peers[rank].pid} on {peers[rank].host})" for rank in ended
        )
        what = f"{which} has ended; see what it said, or whether the system ended it (memory?)"
    else:
        hosts = ", ".join(sorted({peer.host for peer in peers}))
        what = f"the connection to another of {len(peers)} processes is gone, but none has ended here; see to {hosts}"
    return (
        f"{what}. The others end as well; start all {len(peers)} again with --resume (`table` without) to go on from the newest "
        f"checkpoint in {folder}"
    )


def has_ended(pid: int) -> bool:
    """Whether no such process is left on this machine, or only what its parent has not collected yet."""
    if Path("/proc/self/stat").is_file():
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
        except OSError:
            return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # there, but not ours
    return False
