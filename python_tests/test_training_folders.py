# SPDX-License-Identifier: MIT
"""What a run leaves on the disk: files that are whole or not there, checkpoints, one folder per run, the environment."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="training needs the extra protokernels[train]")

from protokernels import backend
from protokernels.training import (
    CheckpointError,
    CheckpointStore,
    RunFolder,
    RunFolderError,
    next_free_folder,
    run_folder,
)
from protokernels.training.files import append_json_line, check_target, read_json_lines, write_bytes, write_json


class TestFiles:
    def test_kill_leaves_the_old_or_the_new_file(self, tmp_path: Path) -> None:
        target = tmp_path / "file.bin"
        code = (
            "import itertools, pathlib, sys\n"
            "from protokernels.training.files import write_bytes\n"
            "for n in itertools.count():\n"
            f"    write_bytes(pathlib.Path({str(target)!r}), bytes([n % 251]) * 4_000_000)\n"
        )
        for delay in (0.0, 0.013, 0.031, 0.05):
            process = subprocess.Popen([sys.executable, "-c", code])
            while not target.exists():
                assert process.poll() is None
                time.sleep(0.01)
            time.sleep(delay)
            process.kill()
            process.wait()
            content = target.read_bytes()
            assert len(content) == 4_000_000 and len(set(content)) == 1

    def test_failed_write_leaves_nothing_behind(self, tmp_path: Path) -> None:
        write_json(tmp_path / "a.json", {"kept": 1})
        with pytest.raises(ValueError, match="JSON"):
            write_json(tmp_path / "a.json", {"broken": float("nan")})
        with pytest.raises(TypeError):
            write_bytes(tmp_path / "b.bin", "not bytes")  # type: ignore[arg-type]
        assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
        assert json.loads((tmp_path / "a.json").read_text()) == {"kept": 1}

    def test_json_lines_forgive_a_last_line_cut_short_and_nothing_else(self, tmp_path: Path) -> None:
        path = tmp_path / "lines.jsonl"
        append_json_line(path, {"epoch": 1})
        with path.open("a") as file:
            file.write('{"epoch": 2, "lo')
        assert read_json_lines(path) == [{"epoch": 1}]
        path.write_text('{"epo\n{"epoch": 2}\n')
        with pytest.raises(ValueError, match="line 1"):
            read_json_lines(path)

    def test_where_no_file_can_be_made(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "sub").mkdir()
        (tmp_path / "file").touch()
        for path, makes_folder, message in (
            ("sub", True, "sub is a folder"),
            ("file/a/b.json", True, "file is a file; pass a name in a folder"),
            ("sub/none/b.json", False, "there is no folder .*none; make it"),
        ):
            with pytest.raises(ValueError, match=message):
                check_target(tmp_path / path, makes_folder=makes_folder)
        for path in ("sub/b.json", "file", "sub/../new"):
            check_target(tmp_path / path)
        check_target(tmp_path / "none" / "none" / "b.json", makes_folder=True)
        monkeypatch.chdir(tmp_path)
        check_target(Path("b.json"))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "sub"]


class TestCheckpoints:
    def test_keeps_the_newest_and_loads_the_last(self, tmp_path: Path) -> None:
        store = CheckpointStore(tmp_path / "checkpoints", keep=2)
        assert store.load() is None
        for epoch in range(1, 5):
            store.save({"epoch": epoch, "weights": torch.full((3,), float(epoch))}, epoch=epoch)
        store.save({"epoch": 4, "weights": torch.zeros(3)}, epoch=4, step=2)
        assert [(file.epoch, file.step) for file in store.files()] == [(4, 0), (4, 2)]
        state = store.load()
        assert state is not None and torch.equal(state["weights"], torch.zeros(3))

    @pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
    def test_damaged_newest_falls_back_with_a_warning(self, tmp_path: Path, damage: str) -> None:
        store = CheckpointStore(tmp_path)
        store.save({"epoch": 1, "weights": torch.ones(1000)}, epoch=1)
        newest = store.save({"epoch": 2, "weights": torch.ones(1000)}, epoch=2)
        content = bytearray(newest.read_bytes())
        if damage == "truncate":
            content = content[: len(content) // 2]
        elif damage == "flip":
            content[len(content) // 2] ^= 1  # inside the weights: the archive still opens
        else:
            content.clear()
        newest.write_bytes(bytes(content))
        with pytest.warns(RuntimeWarning, match=newest.name):
            state = store.load()
        assert state is not None and state["epoch"] == 1

    def test_all_damaged_is_an_error(self, tmp_path: Path) -> None:
        store = CheckpointStore(tmp_path)
        store.save({"epoch": 1}, epoch=1).write_bytes(b"")
        with warnings.catch_warnings(), pytest.raises(CheckpointError, match="remove the folder"):
            warnings.simplefilter("ignore")
            store.load()

    def test_a_checkpoint_cannot_run_code(self, tmp_path: Path) -> None:
        import hashlib

        class Hostile:
            def __reduce__(self) -> Any:
                return (Path(tmp_path / "owned").touch, ())

        content = pickle.dumps(Hostile(), protocol=2)
        digest = hashlib.sha256(content).hexdigest()[:16]
        (tmp_path / f"epoch-0001-step-00000-{digest}.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match="could run any code"):
            CheckpointStore(tmp_path).load()
        assert not (tmp_path / "owned").exists()

    def test_leftovers_of_a_killed_write_are_removed(self, tmp_path: Path) -> None:
        (tmp_path / "epoch-0001-step-00000-0123456789abcdef.pt.77.partial").write_bytes(b"half")
        store = CheckpointStore(tmp_path)
        assert store.load() is None
        store.save({}, epoch=1)
        assert [path.suffix for path in tmp_path.iterdir()] == [".pt"]


class TestRunFolder:
    def test_refuses_to_mix_runs(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        RunFolder.create(folder, {"a": 1})
        with pytest.raises(RunFolderError, match="--resume"):
            RunFolder.create(folder, {"a": 1})
        with pytest.raises(RunFolderError, match="a: 1 there, 2 now"):
            RunFolder.create(folder, {"a": 2}, resume=True)
        assert RunFolder.create(folder, {"a": 1}, resume=True).config() == {"a": 1}
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "thesis.tex").touch()
        with pytest.raises(RunFolderError, match="not empty"):
            RunFolder.create(tmp_path / "other", {})
        with pytest.raises(RunFolderError, match="holds no run"):
            RunFolder.open(tmp_path / "other")

    def test_a_file_in_the_way_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "run").write_text("")
        with pytest.raises(OSError, match="a file of that name is in the way"), run_folder.sole_user(tmp_path / "run"):
            pass

    def test_next_free_folder(self, tmp_path: Path) -> None:
        assert next_free_folder(tmp_path / "a") == tmp_path / "a"
        (tmp_path / "a").mkdir()
        (tmp_path / "a-2").mkdir()
        assert next_free_folder(tmp_path / "a") == tmp_path / "a-3"
        assert next_free_folder(tmp_path / "a", resume=True) == tmp_path / "a-2"
        assert next_free_folder(tmp_path / "b", resume=True) == tmp_path / "b"


class TestEnvironment:
    def test_names_the_code_that_ran(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A checkout is named by its commit and marked where it differs; an installed package has none to name."""
        checkout = tmp_path / "checkout"
        package = checkout / "protokernels" / "training"
        package.mkdir(parents=True)
        module = package / "run_folder.py"
        module.write_text("")
        monkeypatch.setattr(run_folder, "__file__", str(module))
        assert run_folder.source_commit() is None
        git = ["git", "-C", str(checkout), "-c", "user.name=t", "-c", "user.email=t@t"]
        for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
            subprocess.run([*git, *words], check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
        assert run_folder.source_commit() == head
        module.write_text("# changed")
        assert run_folder.source_commit() == head + "+changes"
        environment = run_folder.environment()
        assert environment["backend"] == backend.get() and environment["native_code"]
