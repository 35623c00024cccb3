# SPDX-License-Identifier: MIT
"""What a training step of every paper costs: on our kernels, in plain PyTorch, and in plain PyTorch under torch.compile.

python benchmarks/trainer_steps.py [--preset fair] [--lines vaesim ...] [--ways ours ...] [--out benchmarks/results/trainer_steps.json]

The trainers themselves run, each line in a process of its own, on random images of the preset's size; nothing depends on what they show.
From one step to the next counts everything: the batch, its views, the model, the losses, the optimiser. Times are processor time of one
thread, in ms, least and median of the steps after the first three: what the machine's other users do disturbs them less than the clock.
``plain`` is the reference backend, the same equations in plain PyTorch; ``compiled`` is that with models, losses and views under
torch.compile, whose time to compile is not counted; ``released`` is ``plain`` with VAESim's prototypes as the authors' code computes
them, in our words. The share of the kernels is that of our operators in a profile of ``ours``; views are timed on the way. Peaks of
memory are those of a whole process.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a file, it finds the other benchmarks

import protokernels
from benchmarks.measure import describe_run
from benchmarks.results_file import json_of, target
from protokernels import backend
from protokernels.data import ImageDataset, Split, load_segmentation
from protokernels.nn import RandomViews
from protokernels.papers import contrastive_autoencoder, local_contrast, optimized_views, optiml, vaesim
from protokernels.training import Session, self_supervised

WAYS = ("ours", "plain", "compiled", "released")
UNCOUNTED = 3
"""First steps of a run: they allocate, choose algorithms and compile."""

Places = list[tuple[Any, str]]
"""Functions, as what holds them and their name."""


class Line:
    """One row: a paper as it is trained, what torch.compile gets of it, and which functions make its views."""

    def __init__(self, paper: Any, data: str, compiled: Places, views: Places, **changes: Any) -> None:
        self.paper, self.data, self.compiled, self.views, self.changes = paper, data, compiled, views, changes

    def config(self, preset: str, **changes: Any) -> Any:
        return self.paper.CONFIG.preset(preset, data=self.data, **self.changes, **changes)

    def dataset(self, config: Any, images: int) -> Any:
        if self.paper is local_contrast:
            return load_segmentation("phantoms", image_size=config.image_size, fold=0, split=config.split)
        size = config.image_size if self.data != "pneumoniamnist" else 28
        pixels = np.random.default_rng(0).integers(0, 256, (images, size, size), dtype=np.uint8)
        split = Split(pixels, np.arange(images) % 2)
        return ImageDataset(self.data, split, split, split, ("absent", "present"))


_LOCAL: tuple[Places, Places] = (
    [(local_contrast.LocalContrast, "forward"), (local_contrast.GlobalContrast, "forward")],
    [(local_contrast, "view_pair")],
)
_VIEWS = (RandomViews, "make")
LINES = {
    "vaesim": Line(vaesim, "pneumoniamnist", [(vaesim.VAESim, "forward"), (vaesim, "vaesim_loss")], []),
    "contrastive_autoencoder": Line(
        contrastive_autoencoder,
        "pneumoniamnist",
        [
            (contrastive_autoencoder.ContrastiveAutoencoder, "forward"),
            (contrastive_autoencoder, "contrastive_autoencoder_loss"),
            _VIEWS,
        ],
        [(contrastive_autoencoder, "two_views")],
    ),
    "optiml": Line(optiml, "chest_nih", [(optiml.OPTiML, "forward"), _VIEWS], [(self_supervised, "two_views")]),
    "optimized_views": Line(
        optimized_views,
        "brain_tumor",
        [
            (optimized_views.OptimizedViews, "embed"),
            (optimized_views, "losses_of_M"),
            (optimized_views, "encoder_losses"),
            (protokernels, "transform"),
        ],
        [(optimized_views, "to_tensor"), (optimized_views, "drawn")],
        strategy="self-supervised+supervision",
    ),
    "local_contrast, global": Line(local_contrast, "hippocampus", *_LOCAL, method="global"),
    "local_contrast, block": Line(local_contrast, "hippocampus", *_LOCAL, method="local-block"),
    "local_contrast, stride": Line(local_contrast, "hippocampus", *_LOCAL, method="local-stride"),
}


class Enough(Exception):
    """As many steps as are wanted."""


def counted_steps(limit: int, times: list[float], profile: Any = None) -> Callable[[Session], Iterator[Any]]:
    """``Session.steps`` that ends training after ``limit`` steps and writes down the processor time of each."""
    original = Session.steps

    def steps(self: Session) -> Iterator[Any]:
        for step in original(self):
            if len(times) == UNCOUNTED and profile is not None:
                profile.start()
            start = time.process_time()
            yield step
            times.append(1e3 * (time.process_time() - start))
            if len(times) == limit:
                raise Enough

    return steps


def timed(function: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    def wrapped(*arguments: Any, **more: Any) -> Any:
        start = time.process_time()
        try:
            return function(*arguments, **more)
        finally:
            times.append(1e3 * (time.process_time() - start))

    return wrapped


class ReleasedPrototypes(vaesim.Prototypes):
    """Prototypes as the released code has them, in our words: a loop over the images that copies out each one's prototype, and for every
    cluster the mean of its members, chosen anew each time it is needed."""

    def forward(self, z: Tensor) -> Tensor:  # [B, D] -> [B, K]
        if not self.initialized:
            self.initialize(z)
        c = torch.softmax(z @ self.prototypes.T.clone(), dim=1)
        if not self.training:
            return c
        with torch.no_grad():
            z, kept, labels = z.detach(), self.prototypes, c.argmax(dim=1)
            reference = torch.zeros_like(z)  # which that code makes and does not use
            for row in range(len(z)):
                reference[row] = kept[labels[row]]
            for k in range(len(kept)):
                if not z[labels == k].mean(dim=0).isnan().any():
                    kept[k] = self.new_weight * z[labels == k].mean(dim=0) + (1 - self.new_weight) * kept[k]
        return c


def measure(name: str, way: str, preset: str, steps: int, profiled: bool = False, **changes: Any) -> dict[str, Any]:
    """One line: trains ``steps`` steps."""
    torch.set_num_threads(1)
    line = LINES[name]
    config = line.config(preset, **changes)
    batch = getattr(config, "batch_size", 0)
    times: list[float] = []
    views: list[float] = []
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) if profiled else None
    with ExitStack() as stack:
        use = stack.enter_context
        use(mock.patch.object(Session, "steps", counted_steps(steps, times, profile)))
        if way != "ours":
            use(backend.use("reference"))
        for owner, function in line.compiled if way == "compiled" else []:
            use(mock.patch.object(owner, function, torch.compile(getattr(owner, function))))
        if way == "released":
            use(mock.patch.object(vaesim, "Prototypes", ReleasedPrototypes))
        for owner, function in line.views if way != "compiled" else []:
            use(mock.patch.object(owner, function, timed(getattr(owner, function), views)))
        folder = use(tempfile.TemporaryDirectory())
        dataset = line.dataset(config, max(200, batch * steps))  # hold-out sets need some of every class
        try:
            line.paper.train(config, Path(folder) / "run", figures=False, dataset=dataset, quiet=True, device="cpu")
        except Enough:
            pass
        else:
            raise RuntimeError(f"{name} ended after {len(times)} steps; {steps} were wanted")
    stage = "global" if name.endswith("global") else "local"
    images = batch or config.stage(stage).batch_size
    result = {"line": name, "way": way, "images": images, "preset": preset}
    if profile is not None:
        profile.stop()
        spent = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
        ours = sum(us for key, us in spent.items() if key.startswith("protokernels::"))
        return {**result, "share_of_kernels": ours / sum(spent.values())}
    counted = times[UNCOUNTED:]
    return {
        **result,
        "least_ms": min(counted),
        "median_ms": statistics.median(counted),
        "views_ms": statistics.median(views[UNCOUNTED:]) * len(views) / len(times) if views else None,
        "steps": len(counted),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Milliseconds per step of every line, and how much longer the other ways take than ours."""
    ways = [way for way in WAYS if any(row["way"] == way for row in rows)]
    titles = {"ours": "ours, ms", "plain": "plain PyTorch", "compiled": "torch.compile", "released": "as released"}
    made = [
        ["step", "images", *(titles[way] for way in ways), "kernels", "views", *(f"peak MiB: {way}" for way in ways)]
    ]
    for name in LINES:
        found = {row["way"]: row for row in rows if row["line"] == name}
        if "ours" not in found:
            continue
        ours = found["ours"]
        times = [
            "" if way not in found else f"{found[way]['least_ms']:.0f}" + f" ({ratio:.2f}x)" * (way != "ours")
            for way in ways
            for ratio in [found.get(way, ours)["least_ms"] / ours["least_ms"]]
        ]
        share = ours.get("share_of_kernels")
        made.append([
            name,
            str(ours["images"]),
            *times,
            "" if share is None else f"{share:.1%}",
            "" if ours["views_ms"] is None else f"{ours['views_ms'] / ours['median_ms']:.1%}",
            *("" if way not in found else str(found[way]["peak_mib"]) for way in ways),
        ])  # fmt: skip
    return made


def alone(words: list[str]) -> dict[str, Any]:
    """A line in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--alone", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="fair", choices=("paper", "fair"))
    parser.add_argument("--lines", nargs="+", default=list(LINES), choices=list(LINES))
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--steps", type=int, default=8, help=f"with the {UNCOUNTED} that are not counted")
    parser.add_argument("--out", type=target)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--profiled", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.steps <= UNCOUNTED:
        parser.error(f"--steps must be more than the {UNCOUNTED} that are not counted; got {given.steps}")
    if given.alone:
        print(json.dumps(measure(given.lines[0], given.ways[0], given.preset, given.steps, given.profiled)))
        return 0
    held = {} if given.out is None else json_of(given.out) or {}
    if given.preset in held and ({*given.lines}, {*given.ways}) != ({*LINES}, {*WAYS}):
        parser.error(
            f"{given.out} holds {given.preset!r}, and a part would take the place of the whole; name another file"
        )
    rows: list[dict[str, Any]] = []
    for name in given.lines:
        for way in given.ways:
            if way == "released" and name != "vaesim":
                continue
            words = ["--lines", name, "--ways", way, "--preset", given.preset, "--steps", str(given.steps)]
            rows.append(alone(words))
            if way == "ours":
                rows[-1]["share_of_kernels"] = alone([*words, "--profiled"])["share_of_kernels"]
            print(json.dumps(rows[-1]), flush=True)
    print("\n".join(" | ".join(line) for line in cells(rows)))
    if given.out is not None:
        held[given.preset] = {"run": describe_run(), "rows": rows}
        given.out.write_text(json.dumps(held, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
