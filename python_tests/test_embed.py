# SPDX-License-Identifier: MIT
"""`protokernels embed`: the embeddings that a run is scored with, for any number of images, with a batch in memory."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("accelerate", reason="training needs the extra protokernels[train]")

import torch

from protokernels.baselines import byol, resnet_transfer, supervised, vade
from protokernels.cli import main
from protokernels.data import DataError, load_dataset
from protokernels.embedding import embed_files, open_images
from protokernels.evaluation import knn_predict
from protokernels.papers import contrastive_autoencoder, optimized_views, vaesim
from protokernels.training import CheckpointError, RunFolder
from protokernels.training.runs import load_runs

SHORT: dict[str, Any] = {"epochs": 1, "batch_size": 300}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "digits.npy"
    np.save(path, load_dataset("digits").test.images)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "vaesim"
    config = vaesim.VAESimConfig.preset("fair", data="digits", num_prototypes=4, latent_dim=3, **SHORT)
    vaesim.train(config, folder, figures=False, quiet=True)
    return folder


def test_the_file_holds_what_is_scored(run: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clusters = images.with_name("clusters.npy")
    assert main(["embed", str(run), str(images), "--clusters", str(clusters), "--batch-size", "100"]) == 0
    assert "digits-embeddings.npy [" in capsys.readouterr().out
    dataset = load_dataset("digits")
    config = vaesim.EXPERIMENT.config_of(load_runs(run)[0])
    model = vaesim.EXPERIMENT.load_model(load_runs(run)[0], config, dataset)
    expected = vaesim.represent(model, dataset.test, config, name="test", seed=0)
    found = np.load(images.with_name("digits-embeddings.npy"))
    assert found.dtype == np.float32 and found.shape == (len(dataset.test), 3)
    np.testing.assert_allclose(found, expected.embeddings.numpy(), rtol=1e-5, atol=1e-6)
    assert np.load(clusters).tolist() == expected.clusters.tolist()
    mapped = torch.from_numpy(
        np.load(images.with_name("digits-embeddings.npy"), mmap_mode="c")
    )  # what the README does with it
    labels = torch.as_tensor(dataset.test.labels)
    assert (knn_predict(mapped, labels, mapped, k=1, num_classes=10) == labels).all()


@pytest.mark.usefixtures("few_digits")
def test_every_method_with_embeddings(images: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.npy"
    np.save(small, np.load(images)[:7])
    runs = {
        "cae": (
            contrastive_autoencoder,
            contrastive_autoencoder.CONFIG.preset(
                "fair", data="digits", batch_size=300, epochs=2, warmup_epochs=1, ramp_epochs=1, most_clusters=9
            ),
        ),
        "views": (
            optimized_views,
            optimized_views.CONFIG.preset("fair", data="digits", strategy="simclr", epochs=1, width=2),
        ),
        "vade": (vade.BASELINE, vade.BASELINE.CONFIG.preset("fair", data="digits", pretraining_epochs=1, **SHORT)),
        **{
            name: (method, method.CONFIG.preset("fair", data="digits", width=2, warmup_epochs=0, **SHORT))
            for name, method in {"byol": byol.BASELINE, "supervised": supervised.BASELINE}.items()
        },
    }
    changes = {"depth": 18, "image_size": 32, **SHORT}
    runs["resnet"] = (
        resnet_transfer.BASELINE,
        resnet_transfer.BASELINE.CONFIG.preset("fair", data="digits", **changes),
    )
    for name, (paper, config) in runs.items():
        paper.train(config, tmp_path / name, figures=False, quiet=True)
        (shape,) = embed_files(tmp_path / name, small, tmp_path / f"{name}.npy").values()
        found = np.load(tmp_path / f"{name}.npy")
        assert found.shape == shape and len(found) == 7 and np.isfinite(found).all() and found.std() > 0


def test_files_of_a_folder_are_one_array(run: Path, images: Path, tmp_path: Path) -> None:
    whole = np.load(images)
    for name, part in zip("abcd", np.split(whole, [1, 130, 130]), strict=True):
        np.save(tmp_path / f"{name}.npy", part)
    embed_files(run, tmp_path, tmp_path.with_suffix(".npy"), batch_size=64)
    embed_files(run, images, tmp_path / "whole.npy", batch_size=64)
    assert (np.load(tmp_path.with_suffix(".npy")) == np.load(tmp_path / "whole.npy")).all()


def test_a_folder_may_be_the_one_that_one_is_in(
    run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "scans" / "sub"
    folder.mkdir(parents=True)
    for path in (folder / "a.npy", folder.parent / "a.npy"):
        np.save(path, np.load(images)[:3])
    monkeypatch.chdir(folder)
    assert main(["embed", str(run), ".."]) == main(["embed", str(run), "."]) == 0
    for path in (folder.parent / "sub-embeddings.npy", tmp_path / "scans-embeddings.npy"):
        assert np.load(path).shape == (3, 3)


def test_any_number_of_files_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """More than a process may have open; 9 comes before 10."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    for number in range(120):
        np.save(tmp_path / f"part-{number}.npy", np.full((2, 4, 4), number, np.uint8))
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
    try:
        found = open_images(tmp_path)[:]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert (found[:, 0, 0] == np.arange(240) // 2).all()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 8, 8)), "images must be uint8"),
        (np.zeros((2, 8, 8, 2), np.uint8), "images must be uint8"),
        (np.zeros((0, 8, 8), np.uint8), "has no images"),
        (np.zeros((2, 0, 8), np.uint8), "has no images"),
        (np.array([{"a": 1}]), "pickled Python objects"),
    ],
)
def test_wrong_images_are_named(array: np.ndarray, message: str, run: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        embed_files(run, tmp_path / "x.npy", tmp_path / "out.npy")
    assert not (tmp_path / "out.npy").exists()


def test_other_mistakes_are_named(run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = tmp_path / "cut.npy"
    cut.write_bytes(images.read_bytes()[:1000])
    np.save(tmp_path / "colour.npy", np.zeros((2, 8, 8, 3), np.uint8))
    out = str(tmp_path / "out.npy")
    for words, message in (
        ([cut, "--out", out], "the file holds 872 bytes"),
        ([tmp_path / "none.npy", "--out", out], "expected a .npy file of images or a folder"),
        ([images, "--out", cut], "exists; pass --overwrite"),
        ([images, "--out", tmp_path / "out.txt"], "end in .npy"),
        ([images, "--out", tmp_path], "is a folder; pass the name of a file"),
        ([images, "--out", tmp_path / "out" / "e.npy"], "there is no folder"),
        ([images, "--out", out, "--clusters", cut / "c.npy"], "is a file; pass a name in a folder"),
        ([images, "--out", images, "--overwrite"], "holds the images"),
        ([tmp_path, "--out", out], "holds the images"),
        ([images, "--out", out, "--clusters", out], "need different files"),
        ([images, "--out", out, "--batch-size", "0"], "batch_size must be at least 1"),
        ([tmp_path / "colour.npy", "--out", out], "the images have 3 channels and the model of"),
    ):
        assert main(["embed", str(run), *map(str, words)]) == 1
        assert message in capsys.readouterr().err.replace("\n", " ")
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_an_interrupted_write_leaves_the_old_file(
    run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.npy"
    out.write_bytes(b"before")
    embed = vaesim.EXPERIMENT.embed
    calls = []

    def fails_later(model: Any, images: torch.Tensor) -> Any:
        calls.append(len(images))
        return embed(model, images * (torch.nan if len(calls) == 2 else 1))

    monkeypatch.setattr(vaesim.EXPERIMENT, "embed", fails_later)
    with pytest.raises(ValueError, match="NaN or infinity"):
        embed_files(run, images, out, overwrite=True, batch_size=100)
    assert out.read_bytes() == b"before" and list(tmp_path.iterdir()) == [out]


def test_the_number_of_channels_is_named_where_nothing_else_is_wrong(run: Path, tmp_path: Path) -> None:
    config = vaesim.VAESimConfig.preset("fair", data="digits", num_prototypes=4, latent_dim=3, **SHORT)
    colour = RunFolder.create(tmp_path / "colour", {"paper": "vaesim", "config": config.record(), "seed": 0})
    colour.checkpoints.save({"model": vaesim.VAESim(config, channels=3).state_dict()}, epoch=1)
    for channels, path, message in (
        (3, run, r"the images have 3 channels and the model of .* takes 1; pass images \[N, H, W\]"),
        (1, colour.path, r"the images have 1 channel and the model of .* takes 3; pass images \[N, H, W, 3\]"),
    ):
        np.save(tmp_path / "x.npy", np.zeros((2, 8, 8, 3) if channels == 3 else (2, 8, 8), np.uint8))
        with pytest.raises(DataError, match=message):
            embed_files(path, tmp_path / "x.npy", tmp_path / "out.npy")
    colour.checkpoints.save({"model": {}}, epoch=2)
    with pytest.raises(CheckpointError, match="does not fit this run"):  # whatever the images
        embed_files(colour.path, tmp_path / "x.npy", tmp_path / "out.npy")


def test_a_damaged_checkpoint_is_one_line(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = RunFolder(shutil.copytree(run, tmp_path / "copy"))
    copy.checkpoints.save(copy.checkpoint(), epoch=2).write_bytes(b"damaged")
    with warnings.catch_warnings():  # puts back how they are shown
        warnings.simplefilter("always")
        assert main(["embed", str(copy.path), str(images), "--out", str(tmp_path / "out.npy")]) == 0
    error = capsys.readouterr().err
    assert error.startswith("warning: checkpoint ") and "is damaged" in error and error.count("\n") == 1


def test_two_names_of_one_file_are_refused_and_the_file_stays(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "folder").mkdir()
    keep, link, there = tmp_path / "keep.npy", tmp_path / "link.npy", tmp_path / "sub" / ".." / "keep.npy"
    keep.write_bytes(b"before")
    link.symlink_to(keep)
    source = tmp_path / "source.npy"
    source.write_bytes(images.read_bytes())
    (tmp_path / "folder" / "a.npy").symlink_to(source)  # a folder of images that lie elsewhere
    other = tmp_path / "other.npy"
    other.symlink_to(source)
    for words, message in (
        ([source, "--out", there, "--clusters", keep], "need different files"),
        ([source, "--out", keep, "--clusters", link], "need different files"),
        ([source, "--out", link, "--clusters", there], "need different files"),
        ([source, "--out", tmp_path / "sub" / ".." / "source.npy"], "holds the images"),
        ([source, "--out", other], "holds the images"),
        ([other, "--out", source], "holds the images"),
        ([tmp_path / "folder", "--out", source], "holds the images"),
        ([tmp_path / "folder", "--out", tmp_path / "folder" / "new.npy"], "holds the images"),
    ):
        assert main(["embed", str(run), *map(str, words), "--overwrite"]) == 1
        assert message in capsys.readouterr().err.replace("\n", " ")
    assert keep.read_bytes() == b"before" and source.read_bytes() == images.read_bytes()
    assert link.is_symlink() and other.is_symlink()


def test_memory_does_not_grow_with_the_images(run: Path, tmp_path: Path) -> None:
    """10 times as many images, 60 MB more of them: less than 5 MB more memory that is not a file's, at any batch.

    The heap gives what is freed back at once (glibc's ``MALLOC_MMAP_THRESHOLD_``): what it would keep for later, a batch more or
    less, would hide what is counted here.
    """
    program = """
import sys
from protokernels import embedding

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

def watched(*arguments, **size):
    for batch in batches(*arguments, **size):
        yield batch
        used.append(anonymous())

used, batches, embedding.tensor_batches = [], embedding.tensor_batches, watched
embedding.embed_files(*sys.argv[1:4], batch_size=64)
print(max(used))
"""
    used = []
    for count in (200, 2000):
        images = np.lib.format.open_memmap(tmp_path / f"{count}.npy", "w+", np.uint8, (count, 184, 184))
        images[:, ::7] = 255
        images.flush()
        files = [str(tmp_path / f"{name}.npy") for name in (count, f"out{count}")]
        words = [sys.executable, "-c", program, str(run), *files]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        result = subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
        used.append(int(result.stdout))
    assert used[1] - used[0] < 5_000, used
