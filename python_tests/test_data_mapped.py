# SPDX-License-Identifier: MIT
"""Images that stay in an uncompressed ``.npz``: the same values and the same results, without their memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from protokernels.data import DataError, load_dataset, npy
from protokernels.data.content import content_md5
from protokernels.data.mapped import MappedImages
from protokernels.data.npz import NpzFile
from protokernels.data.tensors import to_tensor
from python_tests.data_files import make_arrays, save

SHAPE = (6, 28, 28)  # of the training images


@pytest.fixture
def mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every array that may be mapped is, however small."""
    monkeypatch.setattr(npy, "MAP_FROM", 1)


def stored(path: Path, arrays: dict[str, np.ndarray] | None = None) -> Path:
    np.savez(path, **(arrays or make_arrays()))  # type: ignore[arg-type]
    return path


@pytest.mark.usefixtures("mapping")
class TestWhatIsMapped:
    @pytest.mark.parametrize("channels", [0, 1, 3])
    def test_the_values_are_those_of_the_file(self, tmp_path: Path, channels: int) -> None:
        arrays = make_arrays(channels=max(channels, 1))
        if channels == 1:
            arrays = {key: value[..., None] if "images" in key else value for key, value in arrays.items()}
        dataset = load_dataset(stored(tmp_path / "x.npz", arrays))
        for name, split in dataset.splits.items():
            assert isinstance(split.images, np.memmap) and not split.images.flags.writeable
            assert not isinstance(split.labels, np.memmap)
            np.testing.assert_array_equal(split.images, arrays[f"{name}_images"].reshape(split.images.shape))
        assert content_md5(dataset) == content_md5(load_dataset(save(tmp_path / "packed.npz", arrays)))

    def test_compressed_and_fortran_arrays_are_read(self, tmp_path: Path) -> None:
        arrays = make_arrays(channels=3)
        turned = {key: np.asfortranarray(value) for key, value in arrays.items()}
        for path in (save(tmp_path / "x.npz", arrays), stored(tmp_path / "y.npz", turned)):
            images = load_dataset(path).train.images
            assert not isinstance(images, np.memmap) and images.flags.writeable
            np.testing.assert_array_equal(images, arrays["train_images"])

    def test_only_what_may_be_is_mapped(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = NpzFile(stored(tmp_path / "x.npz"))
        assert not isinstance(file.read("train_images"), np.memmap)
        monkeypatch.setattr(npy, "MAP_FROM", 6 * 28 * 28)
        assert isinstance(file.read_or_map("train_images"), np.memmap)
        assert not isinstance(file.read_or_map("test_images"), np.memmap)  # 4 images

    def test_behind_other_bytes_and_beside_long_names(self, tmp_path: Path) -> None:
        """A zip archive may begin late, and a member may have an extra field of any length."""
        arrays = make_arrays()
        inner = tmp_path / "inner.npz"
        with zipfile.ZipFile(inner, "w") as archive:
            for key, value in arrays.items():
                info = zipfile.ZipInfo(f"{key}.npy")
                info.extra = b"\xfe\xca" + (300).to_bytes(2, "little") + bytes(300)
                with archive.open(info, "w", force_zip64=True) as file:
                    np.save(file, value)
        (tmp_path / "x.npz").write_bytes(b"in front" * 5 + inner.read_bytes())
        np.testing.assert_array_equal(load_dataset(tmp_path / "x.npz").val.images, arrays["val_images"])  # type: ignore[union-attr]

    def test_memory_sets_no_limit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(npy, "system_memory", lambda: 2000)
        monkeypatch.setattr(npy, "LIMIT", 3000)
        path = stored(tmp_path / "x.npz")
        assert load_dataset(path).train.images.nbytes == 4704
        monkeypatch.setattr(npy, "MAP_FROM", 5000)
        with pytest.raises(DataError, match=r"train_images claims .* at most 2,000 are loaded on this machine"):
            load_dataset(path)
        with pytest.raises(DataError, match=r"at most 2,000 .*saved with numpy\.savez, not numpy\.savez_compressed"):
            load_dataset(save(tmp_path / "packed.npz", make_arrays()))


@pytest.mark.usefixtures("mapping")
class TestHostileArchives:
    """Every number of a stored member that a file can lie about."""

    def lying(self, path: Path, change: Any) -> Path:
        """``change`` (content, of the directory's entry of ``train_images``, of its member) alters the bytes in place."""
        content = bytearray(stored(path).read_bytes())
        entry = content.index(b"PK\x01\x02")
        while b"train_images" not in content[entry + 46 : entry + 66]:
            entry = content.index(b"PK\x01\x02", entry + 1)
        change(content, entry, content.index(b"train_images") - 30)
        path.write_bytes(content)
        return path

    @staticmethod
    def put(content: bytearray, place: int, value: int, length: int = 4) -> None:
        content[place : place + length] = value.to_bytes(length, "little")

    @pytest.mark.parametrize("sizes", [(20, 24), (20,), (24,)])  # in the file and unpacked; fields of the directory
    @pytest.mark.parametrize("value", [100, 4831, 4833, 6000, 10**6, 2**32 - 2])  # for 4832
    def test_sizes(self, tmp_path: Path, sizes: tuple[int, ...], value: int) -> None:
        path = self.lying(
            tmp_path / "x.npz",
            lambda content, entry, _: [self.put(content, entry + place, value) for place in sizes],
        )
        with pytest.raises(DataError, match=r"x\.npz: train_images is (truncated or )?damaged"):
            load_dataset(path)

    @pytest.mark.parametrize("value", [1, 200, 10_000, 2**31])
    def test_offsets(self, tmp_path: Path, value: int) -> None:
        path = self.lying(tmp_path / "x.npz", lambda content, entry, _: self.put(content, entry + 42, value))
        with pytest.raises(DataError, match=r"x\.npz: train_images is truncated or damaged"):
            load_dataset(path)

    @pytest.mark.parametrize("place", [26, 28])  # lengths of name and extra field in front of the member
    @pytest.mark.parametrize("value", [0, 40, 65535])
    def test_lengths_in_front_of_the_member(self, tmp_path: Path, place: int, value: int) -> None:
        path = self.lying(
            tmp_path / "x.npz", lambda content, _, member: self.put(content, member + place, value, length=2)
        )
        with pytest.raises(DataError, match=r"x\.npz: train_images is truncated or damaged"):
            load_dataset(path)

    def test_a_changed_pixel(self, tmp_path: Path) -> None:
        def change(content: bytearray, entry: int, member: int) -> None:
            content[member + 30 + 20 + 20 + 128 + 4000] ^= 1

        with pytest.raises(DataError, match=r"train_images is truncated or damaged .*CRC"):
            load_dataset(self.lying(tmp_path / "x.npz", change))

    def test_overlapping_members(self, tmp_path: Path) -> None:
        """``val_labels`` is said to lie in the pixels of ``train_images``, and its header does."""
        arrays, inner = make_arrays(), tmp_path / "labels.npy"
        path = tmp_path / "x.npz"
        np.save(inner, arrays["val_labels"])
        with zipfile.ZipFile(tmp_path / "one.npz", "w") as archive:
            archive.write(inner, "val_labels.npy")
        member = (tmp_path / "one.npz").read_bytes()
        member = member[: member.index(b"PK\x01\x02")]
        arrays["train_images"].reshape(-1)[: len(member)] = np.frombuffer(member, np.uint8)
        content = bytearray(stored(path, arrays).read_bytes())
        entry = content.index(b"val_labels", content.index(b"PK\x01\x02")) - 46
        self.put(content, entry + 42, content.index(member))
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"x\.npz: train_images is .*(Overlapped entries|overlaps what follows)"):
            load_dataset(path)

    @pytest.mark.parametrize("share", [0.2, 0.6, 0.99])
    def test_truncated_files(self, tmp_path: Path, share: float) -> None:
        path = stored(tmp_path / "x.npz")
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(DataError, match="truncated"):
            load_dataset(path)
        directory = content.index(b"PK\x01\x02")  # with its end put back, as if the middle had been lost
        path.write_bytes(content[: int(share * directory)] + content[directory:])
        with pytest.raises(DataError, match="truncated or damaged"):
            load_dataset(path)

    def test_random_damage_is_refused_or_harmless(self, tmp_path: Path) -> None:
        arrays = make_arrays(side=4)
        content, generator, refused = stored(tmp_path / "x.npz", arrays).read_bytes(), np.random.default_rng(0), 0
        for _ in range(300):
            damaged = bytearray(content)
            for place in generator.integers(len(content), size=generator.choice([1, 1, 3])):
                damaged[place] = generator.integers(256)
            (tmp_path / "x.npz").write_bytes(damaged)
            try:
                dataset = load_dataset(tmp_path / "x.npz")
            except DataError as error:
                assert str(tmp_path / "x.npz") in str(error)
                refused += 1
                continue
            for name, split in dataset.splits.items():
                np.testing.assert_array_equal(split.images, arrays[f"{name}_images"])
        assert 150 < refused < 300


class TestMappedImages:
    @pytest.mark.parametrize("colour", [False, True])
    def test_rows_are_those_of_the_tensor(self, tmp_path: Path, colour: bool) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (50, 9, 7, 3) if colour else (50, 9, 7), dtype=np.uint8)
        np.save(tmp_path / "x.npy", pixels)
        for layout in (torch.contiguous_format, torch.channels_last):

            def prepare(images: np.ndarray, layout: torch.memory_format = layout) -> torch.Tensor:
                return to_tensor(images, size=8).to(memory_format=layout)

            mapped = MappedImages(np.load(tmp_path / "x.npy", mmap_mode="r"), prepare)
            whole = prepare(pixels)
            assert (mapped.shape, mapped.ndim, len(mapped)) == (whole.shape, whole.ndim, len(whole))
            assert mapped.device == whole.device
            chosen = torch.randint(50, (20,))
            for one, other in (
                (mapped[chosen], whole[chosen]),
                (mapped[::7], whole[::7]),
                (mapped.subset(chosen)[2:5], whole[chosen][2:5]),
                (mapped.subset(chosen).subset(torch.tensor([3, 1]))[torch.tensor([1])], whole[chosen[[1]]]),
                (torch.cat(list(mapped.subset(chosen).split(8))), whole[chosen]),
            ):
                assert torch.equal(one, other)
            assert mapped[chosen].stride() == whole[chosen].stride()


def arrays_to_train_on() -> dict[str, np.ndarray]:
    generator, arrays = np.random.default_rng(0), {}
    for split, count in (("train", 90), ("val", 30), ("test", 36)):
        labels = np.arange(count) % 2
        pixels = generator.integers(0, 200, (count, 12, 12)) + 50 * labels[:, None, None]
        arrays |= {f"{split}_images": pixels.astype(np.uint8), f"{split}_labels": labels}
    return arrays


SMALL: dict[str, dict[str, Any]] = {
    "vaesim": {"num_prototypes": 4, "latent_dim": 4, "image_size": 16},
    "contrastive_autoencoder": {
        "image_size": 16,
        "epochs": 2,
        "warmup_epochs": 1,
        "ramp_epochs": 1,
        "most_clusters": 5,
    },
    "optiml": {"image_size": 16, "width": 2, "num_iters": 5},
    "optimized_views": {"image_size": 16, "width": 2},
    "supervised": {"image_size": 16, "width": 2, "transfer": "probe"},
    "vade": {"image_size": 8, "hidden": (32, 16), "latent_dim": 5, "num_clusters": 4, "pretraining_epochs": 1},
    "resnet_transfer": {"image_size": 32, "depth": 18},
    "resnet18_kmeans": {"image_size": 32},
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.filterwarnings("error:The given NumPy array is not writable")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # of what so short a training is worth
def test_training_gives_the_same_bits(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate", reason="training needs the extra protokernels[train]")
    from protokernels.commands import find_paper
    from protokernels.training import RunFolder

    paper = find_paper(name)
    experiment = getattr(paper, "EXPERIMENT", paper)
    path, states, scores = stored(tmp_path / "mine.npz", arrays_to_train_on()), [], []
    fields = {"epochs": 1, "warmup_epochs": 0, "batch_size": 40, **SMALL[name]}
    known = {key: value for key, value in fields.items() if key in experiment.CONFIG.__dataclass_fields__}
    config = experiment.CONFIG.preset("fair", data=str(path), **known)
    for limit in (1 << 28, 1):
        monkeypatch.setattr(npy, "MAP_FROM", limit)
        dataset = load_dataset(path)
        assert isinstance(dataset.train.images, np.memmap) == (limit == 1)
        folder, settings = tmp_path / str(limit), {"quiet": True, "device": "cpu"}
        results = experiment.train(config, folder, dataset=dataset, figures=limit == 1, **settings)
        scores.append(json.dumps(results["splits"], sort_keys=True))
        states.append((RunFolder(folder).checkpoints.load() or {}).get("model", {}))
    assert scores[0] == scores[1] and states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


PROGRAM = """
import sys, threading, time
from protokernels.data import load_dataset, npy
from protokernels.data.mapped import tensor_batches
from python_tests.test_experiment import Brightness, Config

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

def look():
    while True:
        seen.append(anonymous())
        time.sleep(0.002)

def train(path):
    dataset = load_dataset(path)
    Brightness().train(Config(path, batch_size=100), path + "-run", dataset=dataset, figures=False, quiet=True, device="cpu")
    for images in tensor_batches(dataset.train.images, 100, size=64):
        images.mean()

npy.MAP_FROM = int(sys.argv[3])
seen, peaks = [], []
threading.Thread(target=look, daemon=True).start()
for path in sys.argv[1:3]:
    seen.clear()
    train(path)
    peaks.append(max(seen))
print(peaks[1] - peaks[0])
"""


@pytest.mark.parametrize("mapped", [True, False])
def test_memory_does_not_grow_with_the_images(tmp_path: Path, mapped: bool) -> None:
    """A small data set is loaded and trained on, and then one of 33 MB: mapped it takes a small part of that more, read all of it.

    The heap gives what is freed back at once, as in ``test_embed``.
    """
    pytest.importorskip("accelerate", reason="training needs the extra protokernels[train]")
    for name, count in (("small", 600), ("larger", 8000)):
        arrays = {"test_images": np.zeros((50, 64, 64), np.uint8), "test_labels": np.arange(50) % 2}
        pixels = np.random.default_rng(0).integers(0, 256, (count, 64, 64), dtype=np.uint8)
        stored(tmp_path / f"{name}.npz", {**arrays, "train_images": pixels, "train_labels": np.arange(count) % 2})
    words = [str(tmp_path / "small.npz"), str(tmp_path / "larger.npz"), str(1 if mapped else 1 << 40)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], check=True, capture_output=True, text=True, env=environment
    )
    grown = int(result.stdout) / (8000 * 64 * 64)
    assert grown < 0.2 if mapped else grown > 0.8, grown
