# SPDX-License-Identifier: MIT
"""What M costs in a training step of Ruppli et al. 2022: the step with M against the same step with random parameters.

python benchmarks/optimized_views_steps.py [--preset fair] [--data brain_tumor] [--device cpu] [--out FILE.json]

On the CPU, processor time of one thread; on a GPU, time on the clock between two waits for the device. The lines take turns, round after
round, and the least of several counts: what the machine's other users do disturbs that less. Images are random numbers, a tenth of the
labels is known; nothing depends on what they show.

The lines: ``random`` and ``M``, both with supervision; ``M-shared``, one view and one pass through f for both steps; ``M-every-4``, M's
step in one batch of four (the mean over four); ``M-twice``, a step of M that passes X through f again instead of sharing f(X);
``M-alone``, no part of a step: M forward and backward with T and its gradient, what M adds beside the passes through f. The paper says
that M costs 20 to 25 %.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a file, it finds the other benchmarks

from benchmarks.measure import describe_run
from benchmarks.results_file import target
from protokernels import backend
from protokernels.papers import optimized_views as paper
from protokernels.papers.optimized_views import Draws, OptimizedViewsConfig


def contenders(config: OptimizedViewsConfig, device: str) -> dict[str, tuple[Callable[[], object], int]]:
    """Name -> what is timed, and how many steps it makes."""
    torch.manual_seed(0)
    size, count = config.image_size, config.batch_size
    x = torch.rand(count, 1, size, size, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.where(torch.arange(count) % 10 == 0, torch.arange(count) // 10 % 2, -1).to(device)
    draws = Draws(
        torch.rand(count, 7, device=device),
        None,
        torch.arange(count, device=device),
        torch.arange(count, device=device) + count,
    )

    def step(strategy: str, turn_of_M: bool = True, again: bool = False, view: str = "new") -> Callable[[], object]:
        own = OptimizedViewsConfig.from_dict({**config.record(), "strategy": strategy, "view": view})
        model = paper.new_model(own, 1).to(device).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=own.learning_rate)

        def optimise(loss: torch.Tensor) -> None:
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

        def one() -> None:
            if again:
                with torch.no_grad(), paper.still(*model.parts()):
                    model.embed(x)
            paper.alternate(model, x, y, draws, optimise, turn_of_M=turn_of_M)

        return one

    with_M = step("self-supervised+supervision")
    without = step("self-supervised+supervision", turn_of_M=False)
    model = paper.new_model(OptimizedViewsConfig.from_dict(config.record()), 1).to(device).train()
    gradient = torch.randn_like(x)

    def alone() -> None:
        assert model.M is not None
        model.transform(x, model.M(x), draws.seed_M).backward(gradient)

    def every_4() -> None:
        with_M()
        for _ in range(3):
            without()

    return {
        "random": (step("random+supervision"), 1),
        "M": (with_M, 1),
        "M-shared": (step("self-supervised+supervision", view="shared"), 1),
        "M-every-4": (every_4, 4),
        "M-twice": (step("self-supervised+supervision", again=True), 1),
        "M-alone": (alone, 1),
    }


def measure(config: OptimizedViewsConfig, device: str, rounds: int) -> dict[str, float]:
    """Milliseconds per step, the least of ``rounds``."""
    if device == "cpu":
        torch.set_num_threads(1)
    clock = time.process_time if device == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {}
    functions = contenders(config, device)
    for _ in range(rounds + 1):  # the first is not counted
        for name, (function, steps) in functions.items():
            if device != "cpu":
                torch.cuda.synchronize()
            start = clock()
            function()
            if device != "cpu":
                torch.cuda.synchronize()
            times.setdefault(name, []).append(1e3 * (clock() - start) / steps)
    return {name: min(values[1:]) for name, values in times.items()}


def table(runs: dict[str, Any]) -> str:
    lines = [
        "| preset, data | encoder | images | random | M | one view | M every 4th | X twice | M and T alone |",
        "|---" * 9 + "|",
    ]
    for name, run in runs.items():
        times, config = run["ms"], run["config"]
        cells = [f"{times['random']:.0f} ms"]
        cells += [
            f"+{100 * (times[key] / times['random'] - 1):.0f} %" for key in ("M", "M-shared", "M-every-4", "M-twice")
        ]
        cells.append(f"{100 * times['M-alone'] / times['random']:.0f} %")
        width = "" if config["encoder"] == "densenet121" else f", width {config['width']}"
        images = f"{config['batch_size']} x {config['image_size']} px"
        lines.append(f"| {name} | {config['encoder']}{width} | {images} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="fair", choices=("paper", "fair"))
    parser.add_argument("--data", default="brain_tumor")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=target)
    arguments = parser.parse_args()
    config = OptimizedViewsConfig.preset(arguments.preset, data=arguments.data)
    run = {
        "run": describe_run(),
        "device": arguments.device,
        "backend": backend.get(),
        "config": config.record(),
        "ms": measure(config, arguments.device, arguments.rounds),
    }
    device = "" if arguments.device == "cpu" else f", {arguments.device}"
    runs = {f"{arguments.preset}, {arguments.data}{device}": run}
    print(table(runs))
    if arguments.out is not None:
        before = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        arguments.out.write_text(json.dumps({**before, **runs}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
