# SPDX-License-Identifier: MIT
"""What a training step of Hu et al. 2021 costs: views, network and loss of every stage, and stage 2 with the loss computed as the
released code does.

python benchmarks/local_contrast_steps.py [--preset fair] [--data hippocampus] [--out benchmarks/results/local_contrast_steps.json]

Times are processor time of one thread, in ms per step, the least of several: what the machine's other users do disturbs them less
than the clock. The slices are random numbers, the labels ellipses of two classes on about a tenth of the pixels; nothing depends on
what they show. The peak of memory is that of a process of its own for each line.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a file, it finds the other benchmarks

from benchmarks.measure import describe_run
from benchmarks.results_file import json_of, target
from protokernels.data.segmentation_views import IntensityConfig, SpatialConfig, spatial_views, view_pair
from protokernels.papers import local_contrast as paper
from protokernels.papers.local_contrast import LocalContrastConfig

LINES = ("global", "local-block", "local-stride", "local-self", "segmentation", "released-block", "released-stride")


def released_loss(f: Tensor, y: Tensor, *, temperature: float, block_size: int | None, stride: int | None) -> Tensor:
    """The supcon form as the released code computes it, in our words: block after block, all rows, S x S matrices."""
    if stride is not None:
        f, y = f[..., ::stride, ::stride], y[..., ::stride, ::stride]
    edge = block_size or max(f.shape[2:])
    losses = []
    for top in range(0, f.shape[2], edge):
        for left in range(0, f.shape[3], edge):
            labels = y[:, top : top + edge, left : left + edge].reshape(-1)
            if not labels.any():
                continue
            vectors = F.normalize(f[..., top : top + edge, left : left + edge].movedim(1, -1).flatten(0, 2), dim=1)
            logits = vectors @ vectors.T / temperature
            others = 1 - torch.eye(len(labels))
            positive = (labels[:, None] == labels).float() * others
            log_share = logits - (logits.exp() * others).sum(dim=1, keepdim=True).log()
            anchors = (labels != 0).float()
            losses.append((-(positive * log_share).sum(dim=1) / positive.sum(dim=1) * anchors).sum() / anchors.sum())
    return torch.stack(losses).mean()


def ellipses(count: int, side: int) -> Tensor:  # [count, side, side] int64
    rows, columns = torch.meshgrid(*(torch.linspace(-1, 1, side),) * 2, indexing="ij")
    inside = (rows / 0.25).square() + (columns / 0.5).square() < 1
    return torch.where(inside, 1 + (columns > 0).long(), 0).expand(count, side, side).clone()


def least(function: Callable[[], object], rounds: int) -> float:
    """Processor milliseconds."""
    times = []
    for _ in range(rounds + 1):  # the first is not counted
        start = time.process_time()
        function()
        times.append(1e3 * (time.process_time() - start))
    return min(times[1:])


def measure(line: str, config: LocalContrastConfig, rounds: int) -> dict[str, Any]:
    """One line: milliseconds of a whole step, of its views and of its loss with the gradient to the features."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    stage = {"global": "global", "segmentation": "fine_tune"}.get(line, "local")
    settings = config.stage(stage)  # type: ignore[arg-type]
    x = torch.rand(settings.batch_size, 1, config.image_size, config.image_size, generator=generator)
    y = ellipses(len(x), config.image_size)
    backbone = paper.UNet(1, width=config.width, depth=config.depth)
    spatial, intensity = SpatialConfig.preset("global"), IntensityConfig()
    if line == "global":
        model: Any = paper.GlobalContrast(backbone.encoder, config)
        views: Callable[[], Any] = lambda: view_pair(x, None, intensity, spatial, generator)  # noqa: E731
        loss_of = lambda pair: model(pair[0].images, pair[1].images)[0]  # noqa: E731
        z = torch.randn(2 * len(x), backbone.encoder.dim // 2, requires_grad=True)
        bare = lambda: paper.protokernels.nt_xent_loss(z[: len(x)], z[len(x) :]).backward()  # noqa: E731
    elif line == "segmentation":
        model = paper.Segmenter(backbone, 3)
        views = lambda: spatial_views(x, y, SpatialConfig.preset("segmentation"), generator)  # noqa: E731
        loss_of = lambda view: paper.segmentation_losses(model(view.images), view.labels)["loss"]  # noqa: E731
        logits = torch.randn(len(x), 3, *x.shape[2:], requires_grad=True)
        bare = lambda: paper.segmentation_losses(logits, y)["loss"].backward()  # noqa: E731
    else:
        kind = {"local-block": "local-block", "released-block": "local-block", "local-self": "global+local-self"}
        config = LocalContrastConfig.from_dict({**config.record(), "method": kind.get(line, "local-stride")})
        labels = None if line == "local-self" else y
        model = paper.LocalContrast(backbone, config)
        views = lambda: view_pair(x, labels, intensity, None, generator)  # noqa: E731
        loss_of = lambda pair: model(pair[0].images, pair[1].images, pair[0].labels, pair[1].labels)  # noqa: E731
        f = torch.randn(2 * len(x), 2 * config.width, *x.shape[2:], requires_grad=True)
        both = None if labels is None else torch.cat([y, y])
        bare = lambda: paper.local_loss(f, both, config).backward()  # noqa: E731
    optimizer = settings.optimizer(model)

    def step() -> None:
        loss = loss_of(views())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    with mock.patch.object(paper, "local_loss", _released if line.startswith("released") else paper.local_loss):
        total = least(step, rounds)
        loss = least(bare, rounds)
    return {
        "line": line,
        "images": len(x),
        "step_ms": total,
        "views_ms": least(views, rounds),
        "loss_ms": loss,
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def _released(f: Tensor, y: Tensor, config: LocalContrastConfig) -> Tensor:
    block = config.block_size if config.recipe.local_contrast == "block" else None
    return released_loss(
        f, y, temperature=config.temperature, block_size=block, stride=None if block else config.stride
    )


def table(lines: list[dict[str, Any]]) -> str:
    text = ["| step | images | ms | views | loss | peak MiB |", "|---|---|---|---|---|---|"]
    for line in lines:
        shares = (f"{line[key]:.1f} ({100 * line[key] / line['step_ms']:.0f} %)" for key in ("views_ms", "loss_ms"))
        text.append(
            f"| {line['line']} | {line['images']} | {line['step_ms']:.0f} | {' | '.join(shares)} | {line['peak_mib']} |"
        )
    by_name = {line["line"]: line["step_ms"] for line in lines}
    for kind in ("block", "stride"):
        if {f"local-{kind}", f"released-{kind}"} <= by_name.keys():
            ratio = by_name[f"released-{kind}"] / by_name[f"local-{kind}"]
            text.append(f"\nA step of stage 2 ({kind}) with the released code's loss takes {ratio:.2f} times as long.")
    return "\n".join(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="fair", choices=("paper", "official", "fair"))
    parser.add_argument("--data", default="hippocampus")
    parser.add_argument("--lines", nargs="+", default=LINES, choices=LINES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=target)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    config = LocalContrastConfig.preset(arguments.preset, data=arguments.data)
    if arguments.alone:
        print(json.dumps(measure(arguments.lines[0], config, arguments.rounds)))
        return 0
    rows = {} if arguments.out is None else json_of(arguments.out) or {}
    kind = f"{arguments.preset}, {arguments.data}"
    if kind in rows and {*arguments.lines} != {*LINES}:
        parser.error(f"{arguments.out} holds {kind!r}, and a part would take the place of the whole; name another file")
    lines = []
    for line in arguments.lines:  # a process each, for its memory
        words = [sys.executable, __file__, "--alone", "--lines", line, "--preset", arguments.preset]
        words += ["--data", arguments.data, "--rounds", str(arguments.rounds)]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        lines.append(json.loads(done.stdout.splitlines()[-1]))
    print(table(lines))
    if arguments.out is not None:
        run = {"run": describe_run(), "config": config.record(), "lines": lines}
        rows[kind] = run
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
