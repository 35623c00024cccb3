# SPDX-License-Identifier: MIT
"""The command ``embed``: what a trained model makes of any number of images, file to file, a batch in memory at a time."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import numpy as np
import torch
import tyro

from .commands import experiment_of, plain_warnings
from .data import DataError, ImageDataset, Split
from .data.array_folder import header_of, shard_files, sharded
from .data.mapped import tensor_batches
from .data.npy import Header
from .data.sharded import ShardedArray
from .training import CheckpointError, RunFolder
from .training.files import TEMPORARY_SUFFIX, check_target, explained, remove
from .training.runs import load_runs
from .training.screen import print_line


@dataclass(frozen=True)
class EmbedOptions:
    """What to embed, and with what."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder written by `protokernels train`; of several seeds the first counts."""
    images: Annotated[Path, tyro.conf.Positional]
    """A .npy file of images, uint8 [N, H, W] or [N, H, W, 3], or a folder of such files, which are taken in the order
    of their names, numbers in them by value."""
    out: Path | None = None
    """File of the embeddings, float32 [N, D]; default: IMAGES with -embeddings.npy in place of .npy.
    Means, also where a preset scores samples."""
    clusters: Path | None = None
    """File of the clusters, int64 [N], where the model has any: those of the embeddings written."""
    overwrite: bool = False
    """Replace files that exist."""
    batch_size: int = 256
    """Images at a time."""
    device: Literal["auto", "cpu"] = "auto"
    """Where to compute; auto: the GPU where there is one."""


def embed(words: list[str]) -> int:
    """``protokernels embed RUN IMAGES [options]``."""
    options = tyro.cli(
        EmbedOptions,
        args=words,
        prog="protokernels embed",
        description="Writes the embeddings of images, row by row as they come; memory does not grow with their number.",
    )
    plain_warnings()
    out = options.out or default_file(options.images)
    device = "cuda" if options.device == "auto" and torch.cuda.is_available() else "cpu"
    written = embed_files(
        options.run,
        options.images,
        out,
        options.clusters,
        overwrite=options.overwrite,
        batch_size=options.batch_size,
        device=device,
    )
    for path, shape in written.items():
        print_line(f"written  {path} {list(shape)}")
    return 0


def default_file(images: Path) -> Path:
    """``chest-embeddings.npy`` beside ``chest.npy`` or the folder ``chest``, also where that is called ``.`` or ``..``."""
    named = Path(os.path.abspath(images)) if images.name in ("", "..") else images
    return named.parent / f"{named.name.removesuffix('.npy')}-embeddings.npy"


def embed_files(
    run: str | Path,
    images: str | Path,
    out: str | Path,
    clusters: str | Path | None = None,
    *,
    overwrite: bool = False,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> dict[Path, tuple[int, ...]]:
    """Embeds all images of a file or a folder; a batch of them and of embeddings is in memory at a time.

    Args:
        run: folder of a run of a paper or a baseline that has embeddings.
        images: a ``.npy`` file, uint8 [N, H, W] or [N, H, W, 3], or a folder of such files. They are mapped, not read.
        out: ``.npy`` file for the embeddings, float32 [N, D]: means where z is a random variable. It appears when it is complete.
        clusters: ``.npy`` file for the clusters, int64 [N].
        overwrite: replace files that exist.
        batch_size: images at a time.
        device: where the model computes.

    Returns:
        The shapes of the files that were written.

    Raises:
        DataError: the images are not as above, of several shapes, or have other channels than those of the training.
        ValueError: a file exists, the method has no embeddings or no clusters, NaN came out.
        WriteError: there is no room; the files are as they were.
        CheckpointError: the run has no checkpoint, or its network does not fit the images.
    """
    targets = [Path(path) for path in (out, clusters) if path is not None]
    if batch_size < 1:
        raise ValueError(f"embed: batch_size must be at least 1; got {batch_size}")
    for index, target in enumerate(targets):
        check_target(target)
        if target.suffix != ".npy" or any(_same(target, other) for other in targets[:index]):
            raise ValueError(f"embed: embeddings and clusters need different files that end in .npy; got {target}")
        if target.exists() and not overwrite:
            raise ValueError(f"embed: {target} exists; pass --overwrite to replace it, or another name")
    source = Path(images)
    read = {path.resolve() for path in (source, *shard_files(source))}
    if any(not read.isdisjoint((*_places(target), target.parent.resolve())) for target in targets):
        raise ValueError(f"embed: {source} holds the images; pass --out and --clusters that lie elsewhere")
    shown = open_images(source)
    first = load_runs(run)[0]
    experiment = experiment_of(first.path)
    config = experiment.config_of(first)
    model = _load_model(experiment, first, config, shown[:1]).to(device)
    files: list[_Rows] = []
    with ExitStack() as stack, torch.no_grad():
        for batch in tensor_batches(shown, batch_size, size=config.image_size):
            z, assigned = experiment.embed(model, batch.to(device))
            if not bool(z.isfinite().all()):
                raise ValueError(
                    f"embed: the embeddings hold NaN or infinity; {first.path} did not learn a usable model"
                )
            if clusters is not None and assigned is None:
                raise ValueError(f"embed: {experiment.name} has no clusters here; leave out --clusters")
            values = [z.float().cpu().numpy(), assigned.cpu().numpy() if clusters is not None else None]
            if not files:
                files = [
                    stack.enter_context(_Rows(target, len(shown), value))
                    for target, value in zip(targets, values, strict=False)
                ]
            for file, value in zip(files, values, strict=False):
                file.append(value)
    return {file.path: file.shape for file in files}


def open_images(path: Path) -> ShardedArray:  # [N, H, W] or [N, H, W, 3] uint8
    """The images of a file or a folder, which stay there.

    Raises:
        DataError: there is none, one is no such array or cut short, or they differ in size.
    """
    files = shard_files(path)
    if not files:
        raise DataError(
            f"{path} has no .npy files; write images with numpy.save(file, images), uint8 [N, H, W] or [N, H, W, 3]"
        )
    headers: list[Header] = []
    for file in files:
        if file.suffix != ".npy" or not file.is_file():
            raise DataError(
                f"{file}: expected a .npy file of images or a folder of them; write them with numpy.save(file, images), "
                "uint8 [N, H, W] or [N, H, W, 3]"
            )
        shape, dtype, *_ = header = header_of(file)
        if dtype != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))):
            raise DataError(f"{file}: images must be uint8 [N, H, W] or [N, H, W, 3]; got {dtype} {list(shape)}")
        if headers and shape[1:] != headers[0].shape[1:]:
            raise DataError(
                f"{file}: images must all have the size of those in {files[0]}, {list(headers[0].shape[1:])}; got "
                f"{list(shape[1:])}"
            )
        headers.append(header)
    images = sharded(headers, files)
    if 0 in images.shape:
        raise DataError(f"{path} has no images")
    return images.squeeze(3) if images.shape[3:] == (1,) else images


class _Rows:
    """A .npy file that grows row by row and takes its name when all are there."""

    def __init__(self, path: Path, count: int, example: np.ndarray) -> None:
        self.path, self.shape, self.dtype = path, (count, *example.shape[1:]), example.dtype
        self.temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
        self.file: IO[bytes] | None = None

    def __enter__(self) -> _Rows:
        description = {"descr": self.dtype.str, "fortran_order": False, "shape": self.shape}
        with explained(self.path):
            self.file = self.temporary.open("wb")
            np.lib.format.write_array_header_1_0(self.file, description)
        return self

    def append(self, rows: np.ndarray) -> None:
        assert self.file is not None
        with explained(self.path):
            self.file.write(np.ascontiguousarray(rows).tobytes())

    def __exit__(self, kind: Any, *_: object) -> None:
        assert self.file is not None
        try:
            with explained(self.path):
                if kind is None:
                    self.file.flush()
                    os.fsync(self.file.fileno())
                self.file.close()
                if kind is None:
                    os.replace(self.temporary, self.path)
        finally:
            remove(self.temporary)


def _places(path: Path) -> set[Path]:
    """Where a name lies, and the file that it leads to: two where it is a link."""
    return {path.parent.resolve() / path.name, path.resolve()}


def _same(path: Path, other: Path) -> bool:
    """Whether two names are those of one file, however they are spelt and whether or not it exists."""
    return not _places(path).isdisjoint(_places(other))


def _load_model(experiment: Any, run: RunFolder, config: Any, images: np.ndarray) -> Any:
    """The model of a run for such images; ``DataError`` where it is one for images with another number of channels."""
    try:
        return experiment.load_model(run, config, _standing_for(images))
    except CheckpointError as error:
        colour = images.ndim == 4
        other = images[..., 0] if colour else np.stack([images] * 3, axis=3)
        try:
            experiment.load_model(run, config, _standing_for(other))
        except CheckpointError:
            raise error from None  # it fits neither
        has, needs = (3, 1) if colour else (1, 3)
        raise DataError(
            f"embed: the images have {has} channel{'s' * colour} and the model of {run.path} takes {needs}; pass images "
            f"{'[N, H, W]' if colour else '[N, H, W, 3]'}"
        ) from None


def _standing_for(images: np.ndarray) -> ImageDataset:
    """A data set for what asks only how many channels images have."""
    split = Split(np.ascontiguousarray(images), np.zeros(len(images), np.int64))
    return ImageDataset("images", split, None, split, ("image",))
