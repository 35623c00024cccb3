# SPDX-License-Identifier: MIT
"""Where the process is the command ``protokernels``, its threads spin for a short while only when they wait for each other.

The threads of a step meet several hundred times a second. GNU's OpenMP, which torch has, lets those that have arrived spin for
milliseconds. That costs nothing while every thread has a core of its own, and nearly everything once another program wants one: on two
cores, beside one busy process, an epoch of VAESim takes 20 s where it takes 2.8 with ``TURNS``. Without a busy neighbour both take the
same; not to spin at all is slower there, by up to 80 % in small steps (scratch runs: ``protokernels train vaesim --epochs 4`` beside
``python -c "while True: pass"``, with the default, ``GOMP_SPINCOUNT`` or ``OMP_WAIT_POLICY=passive`` set).

OpenMP reads the setting once, when torch loads it, so this module is imported before torch. In a program that imports protokernels
nothing is changed, and a setting of the user's stays as it is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import PurePath

TURNS = "10000"
"""Of the waiting loop, then a thread sleeps; tens of microseconds. The default is 300,000."""


def is_command(arguments: Sequence[str]) -> bool:
    """Whether a command line, with the interpreter first, runs ``protokernels`` or ``-m protokernels``."""
    for number, argument in enumerate(arguments[1:], 1):
        if argument == "-m":
            return [*arguments, ""][number + 1] == "protokernels"
        if not argument.startswith("-"):
            return PurePath(argument).name == "protokernels"
    return False


if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ and is_command(sys.orig_argv):
    os.environ.setdefault("GOMP_SPINCOUNT", TURNS)
