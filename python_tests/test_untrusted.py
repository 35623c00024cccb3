# SPDX-License-Identifier: MIT
"""Files that nobody vouches for: no reader of the package can run code from them, unpack beside a target, or fail without a word."""

from __future__ import annotations

import ast
import io
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import protokernels
from protokernels.models.weights import load_untrusted, read_weights

SOURCES = sorted(Path(protokernels.__file__).parent.rglob("*.py"))
UNPICKLING = {"pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "marshal.load", "marshal.loads"}
UNPACKING = {"extract", "extractall", "unpack_archive"}


def calls() -> Iterator[tuple[Path, ast.Call]]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield path, node


class TestNoReaderRunsCode:
    def test_torch_load_takes_weights_only(self) -> None:
        found = [(path, node) for path, node in calls() if ast.unparse(node.func) == "torch.load"]
        assert found, "the test looks for something else than what is there"
        for path, node in found:
            options = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert options.get("weights_only") == "True", f"{path}:{node.lineno}"

    def test_numpy_never_unpickles_and_nothing_else_does(self) -> None:
        for path, node in calls():
            name = ast.unparse(node.func)
            assert name not in UNPICKLING, f"{path}:{node.lineno} unpickles"
            if name in ("np.load", "numpy.load"):
                options = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert options.get("allow_pickle") == "False", f"{path}:{node.lineno}"

    def test_no_archive_is_unpacked(self) -> None:
        """Members are read by their names in memory, so that none can land beside a target."""
        for path, node in calls():
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
            assert called not in UNPACKING, f"{path}:{node.lineno} unpacks an archive: keep its paths inside the target"


class Hostile:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


class TestWeights:
    @pytest.mark.parametrize("packed", [True, False])
    def test_a_hostile_pickle_is_refused(self, tmp_path: Path, packed: bool) -> None:
        """As the file itself and inside of what torch.save writes; the message does not say how to run it."""
        path, hostile = tmp_path / "x.pth", {"weight": Hostile(tmp_path / "trace")}
        torch.save(hostile, path) if packed else path.write_bytes(pickle.dumps(hostile, protocol=2))
        with pytest.raises(
            ValueError, match=r"x\.pth cannot be read as a file of weights .*could run any code"
        ) as caught:
            read_weights(path, "ResNet18", "x")
        assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)
        assert not (tmp_path / "trace").exists()
        torch.load(path, weights_only=False) if packed else pickle.loads(path.read_bytes())
        assert (tmp_path / "trace").exists()  # so it would have been left

    def test_random_damage_is_refused_or_harmless(self, tmp_path: Path) -> None:
        """Whatever byte is wrong: a ValueError of one line that names the file, or a dictionary."""
        buffer, generator, refused = io.BytesIO(), random.Random(0), 0
        torch.save({"weight": torch.arange(6.0), "config": {"name": "x", "sizes": [1, 2]}}, buffer)
        for _ in range(400):
            content = bytearray(buffer.getvalue())
            for _ in range(generator.choice((1, 1, 3))):
                content[generator.randrange(len(content))] = generator.randrange(256)
            if generator.random() < 0.1:
                content = content[: generator.randrange(len(content))]
            try:
                load_untrusted(io.BytesIO(content), "the file")
            except ValueError as error:
                assert str(error).startswith("the file cannot be read") and "\n" not in str(error)
                refused += 1
        assert 100 < refused < 400

    def test_an_empty_file(self, tmp_path: Path) -> None:
        (tmp_path / "x.pth").touch()
        with pytest.raises(ValueError, match="cannot be read as a file of weights"):
            read_weights(tmp_path / "x.pth", "ResNet18", "x")


class TestPrediction:
    """``predict --checkpoint FILE``."""

    def state(self, **changes: Any) -> dict[str, Any]:
        from protokernels.papers._local_contrast_segmenter import LocalContrastConfig, new_segmenter

        config = LocalContrastConfig.preset("fair", "phantoms", width=2, depth=2)
        state = {
            "model": new_segmenter(config, 3).state_dict(),
            "config": config.record(),
            "class_names": ["a", "b", "c"],
        }
        return {**state, **changes}

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"config": 3}, "holds no segmentation network"),
            ({"class_names": 5}, "holds no segmentation network"),
            ({"config": {"width": 10**6, "depth": 2}}, "must have shape"),
            ({"config": {"wings": 2}}, "unknown fields wings"),
            ({"model": {}}, "tensors are missing"),
        ],
    )
    def test_what_is_no_network_is_refused_before_one_is_made(
        self, tmp_path: Path, changes: dict[str, Any], reason: str
    ) -> None:
        pytest.importorskip("accelerate", reason="training needs the extra protokernels[train]")
        from protokernels.papers.local_contrast import load_segmenter

        path = tmp_path / "epoch.pt"
        torch.save(self.state(), path)
        assert load_segmenter(path)[1].width == 2
        torch.save(self.state(**changes), path)
        with pytest.raises(ValueError, match=reason):
            load_segmenter(path)

    def test_a_hostile_pickle_on_the_command_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("tyro", reason="the commands need the extra protokernels[train]")
        import numpy as np

        from protokernels.cli import main
        from python_tests.nifti_files import write_nifti

        volume = write_nifti(tmp_path / "v.nii", np.zeros((4, 4, 4), np.float32))
        torch.save({"model": Hostile(tmp_path / "trace")}, tmp_path / "x.pt")
        assert main(["predict", "local-contrast", "--checkpoint", str(tmp_path / "x.pt"), str(volume)]) == 1
        said = capsys.readouterr().err
        assert "could run any code" in said and "Traceback" not in said and not (tmp_path / "trace").exists()
