# SPDX-License-Identifier: MIT
"""Running small numerical work on one thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch and, where threadpoolctl is installed (scikit-learn brings it), for BLAS and OpenMP.

    For thousands of small steps: waking a second thread for each costs more than it saves, on a busy machine up to a
    hundredfold. The results also stop depending on the number of threads. The former numbers are restored at the end.
    """
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(1)
        try:
            from threadpoolctl import threadpool_limits  # type: ignore[import-untyped,unused-ignore]
        except ImportError:
            pass
        else:
            stack.enter_context(threadpool_limits(limits=1))
        yield
