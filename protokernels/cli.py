# SPDX-License-Identifier: MIT
"""The command line.

protokernels train vaesim|optiml|local-contrast|optimized-views|contrastive-autoencoder [--preset NAME] [--data NAME] [...]
                             train, evaluate, draw
protokernels ablate optiml|local-contrast|optimized-views [--only ABLATION ...] [...]   train and score every ablation of a paper
protokernels sweep PAPER [--over FIELD=VALUE,VALUE ...] [...]   train and score a paper over values of its fields, one at a time
protokernels table PAPER [SOURCE ...] [...]   a paper's table beside ours: what is missing is trained, or runs are collected
protokernels evaluate RUN    score a run again from its newest checkpoint
protokernels figures RUN     draw a run's pictures again
protokernels predict local-contrast --checkpoint RUN VOLUME ...   label volumes for NIfTI volumes
protokernels embed RUN IMAGES   embeddings of any number of images, file to file
protokernels doctor          what is installed, built and in use, and why not

Every command has --help. ``doctor`` needs torch only; the others need the extra ``protokernels[train]``.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence

from . import backend
from ._version import __version__
from .memory import keep_memory

_TRAIN_MODULES = ("accelerate", "matplotlib", "medmnist", "monai", "nibabel", "rich", "scipy", "sklearn", "tyro")
_COMMANDS = {  # by the module that has a function of the command's name
    "train": "commands",
    "ablate": "commands",
    "sweep": "sweeps",
    "table": "tables",
    "evaluate": "commands",
    "figures": "commands",
    "predict": "prediction",
    "embed": "embedding",
}
_REPORTED = ("CheckpointError", "NativeUnavailableError")  # RuntimeErrors whose message is meant for the user
_NO_MEMORY = (  # what torch says where no memory is left, on the CPU and on a GPU, or none is as large
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "Storage size calculation overflowed",
)
_SAID = ("ProcessLostError",)  # those whose message is on stderr already


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0, 1 for a problem that was reported, 2 for a wrong command line,
    130 after Ctrl-C."""
    if arguments is None:  # the process is this command's own
        keep_memory()
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what the terminal's encoding lacks is no error
    try:
        status = _run(words)
        print(end="", flush=True)
        return status
    except BrokenPipeError:  # the reader has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python's own flush goes
        return _ended(1)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in _TRAIN_MODULES:
            raise
        return _complain(
            f'`protokernels {words[0]}` needs {error.name}; install it with: pip install "protokernels[train]"'
        )
    except KeyboardInterrupt as stop:
        return _complain(str(stop) or "stopped", status=getattr(stop, "exit_code", 130))
    except _UsageError as error:
        return _complain(str(error), status=2)
    except (ValueError, OSError, FloatingPointError) as error:
        alone = isinstance(error, OSError) and getattr(error, "others_wait", False)  # see losses_told
        return _ended(_complain(str(error), of_one=alone))
    except (RuntimeError, MemoryError) as error:
        if type(error).__name__ in _SAID:
            return _ended(1)
        if type(error).__name__ in _REPORTED or str(error).startswith("PROTOKERNELS_"):
            return _ended(_complain(str(error)))
        if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
            reason = str(error).partition("\n")[0]
            message = f"there is not enough memory ({reason}); choose smaller sizes, or smaller batches"
            return _ended(_complain(message, of_one=True))
        raise


def _run(words: list[str]) -> int:
    """The command of these words."""
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if words else 2
    if words[0] == "--version":
        print(__version__)
        return 0
    backend.get()  # of the environment: a wrong one is named before anything is loaded or made
    return _command(words[0])(words[1:])


class _UsageError(Exception):
    """The command line is wrong."""


def _command(name: str) -> Callable[[list[str]], int]:
    if name == "doctor":
        return _doctor
    if name not in _COMMANDS:
        raise _UsageError(f"unknown command {name!r}; expected one of {', '.join(_COMMANDS)}, doctor")
    # Imported here: the extra that it needs may be missing, and `doctor` has to run all the same.
    command: Callable[[list[str]], int] = getattr(importlib.import_module(f"protokernels.{_COMMANDS[name]}"), name)
    return command


def _doctor(words: list[str]) -> int:
    if words and words[0] not in ("-h", "--help"):
        raise _UsageError(f"`protokernels doctor` takes no arguments; got {' '.join(words)}")
    if words:
        print("protokernels doctor\n\nWhat is installed, built and in use, and why not.")
        return 0
    return int(importlib.import_module("protokernels.doctor").main() or 0)


def _ended(status: int) -> int:
    """The exit status. One of several processes ends here: torch can wait for ever for the threads of a group that others have left."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _complain(message: str, status: int = 1, *, of_one: bool = False) -> int:
    """Says ``message``; one of several processes speaks for all, unless the others know nothing of what has come to this one."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or of_one:
        print(f"protokernels: {'' if rank == '0' else f'process {rank}: '}{message}", file=sys.stderr)
    return status
