# SPDX-License-Identifier: MIT
"""What the README and the docstrings show is what happens: every Python block and every example runs.

A ```python block runs in a namespace of its own, in an empty folder. Where an assignment ends in a shape, such as
`c = soft_assign(z, q, temperature=0.1)  # [8, 4]`, the value must have it when the block is done. A block with `>>>` is
compared with its printed output. `<!-- not run: why -->` on the line above a block leaves it out, by name.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import io
import pkgutil
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import protokernels
from protokernels import backend

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
TEST_COMMAND = 'pip install -c constraints.txt ".[test]" && pytest'


@dataclass(frozen=True)
class Block:
    """One ```python block: its first line in the file, its text and why it is not run, if so."""

    line: int
    text: str
    not_run: str | None


def blocks(text: str) -> list[Block]:
    """The Python blocks of a Markdown text, also those indented in a list."""
    found = []
    mark = r"(?:[ \t]*<!-- not run(?:: *(?P<why>.*?))? *-->\n)?"
    pattern = rf"^{mark}(?P<indent>[ \t]*)```python\n(?P<text>.*?)^(?P=indent)```[ \t]*$"
    for match in re.finditer(pattern, text, flags=re.M | re.S):
        body = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.M)
        marked = "<!-- not run" in match[0].split("```", 1)[0]
        line = text.count("\n", 0, match.start("text")) + 1
        found.append(Block(line, body, (match["why"] or "no reason given") if marked else None))
    return found


def promised_shapes(code: str) -> dict[str, list[int]]:
    """Names whose last assignment ends in a comment that is a shape, such as `# [8, 4]` -> that shape."""
    comments = {
        token.start[0]: [int(size) for size in re.findall(r"\d+", token.string)]
        for token in tokenize.generate_tokens(io.StringIO(code).readline)
        if token.type == tokenize.COMMENT and re.fullmatch(r"#\s*\[[\d, ]*\]", token.string.strip())
    }
    promised: dict[str, list[int]] = {}
    for node in ast.parse(code).body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            promised.pop(node.targets[0].id, None)
            if node.end_lineno in comments:
                promised[node.targets[0].id] = comments[node.end_lineno]
    return promised


def run_block(block: Block, name: str) -> None:
    """Runs one block; an exception, another output or another shape than shown is an error."""
    namespace: dict[str, Any] = {"__name__": "__readme__"}
    if ">>> " in block.text:
        run_examples(doctest.DocTestParser().get_doctest(block.text, namespace, name, str(README), block.line - 1))
        return
    exec(compile("\n" * (block.line - 1) + block.text, str(README), "exec"), namespace)
    for variable, shape in promised_shapes(block.text).items():
        assert list(namespace[variable].shape) == shape, f"README.md, block at line {block.line}: shape of {variable}"


def run_examples(test: doctest.DocTest) -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    output: list[str] = []
    runner.run(test, out=output.append)
    assert runner.failures == 0, "".join(output)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a snippet writes goes to a temporary folder, and the backend it selects ends with it."""
    monkeypatch.chdir(tmp_path)
    previous = backend.get()
    yield
    backend.set(previous)


BLOCKS = blocks(README.read_text()) if README.is_file() else []


def anchors(path: Path) -> set[str]:
    """The headings of a Markdown file, by the names that GitHub gives them."""
    headings = [
        re.sub(r"[^\w -]", "", heading.lower()) for heading in re.findall(r"^#+ (.+)$", path.read_text(), flags=re.M)
    ]
    return {heading.replace(" ", "-") for heading in headings}


class TestReadme:
    def test_there_are_snippets(self) -> None:
        assert README.is_file(), "README.md is missing"
        assert BLOCKS, "README.md shows no ```python block; give at least one snippet that runs"
        assert any(block.not_run is None for block in BLOCKS), "every ```python block of README.md is marked `not run`"

    @pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"line {block.line}")
    def test_a_snippet_runs(self, block: Block) -> None:
        if block.not_run is not None:
            compile(block.text, str(README), "exec")
            pytest.skip(f"README.md line {block.line} is marked as not run: {block.not_run}")
        run_block(block, f"README.md line {block.line}")

    def test_gives_the_test_command_that_ci_runs(self) -> None:
        assert TEST_COMMAND in README.read_text()
        assert f"command='{TEST_COMMAND}'" in (ROOT / ".ci" / "run").read_text()

    @pytest.mark.parametrize(
        "file", ["README.md", "benchmarks/README.md", "benchmarks/results/README.md", "csrc/README.md"]
    )
    def test_its_links_lead_somewhere(self, file: str) -> None:
        """To a heading, by the name that GitHub gives it, or to a file, and there too."""
        path = ROOT / file
        for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
            if not link.startswith("https://"):
                other, _, anchor = link.partition("#")
                target = path.parent / other if other else path
                assert target.exists(), link
                assert not anchor or anchor in anchors(target), link

    def test_has_a_row_for_every_environment_variable(self) -> None:
        files = [ROOT / "setup.py", *ROOT.glob("protokernels/**/*.py"), *ROOT.glob("csrc/common/*.cpp")]
        read = r"""(?:environ(?:\.get\(|\[)|getenv\()\s*["'](PROTOKERNELS_\w+)["']"""
        switches = {name for path in files for name in re.findall(read, path.read_text())}
        assert {"PROTOKERNELS_CUDA", "PROTOKERNELS_BACKEND", "PROTOKERNELS_CPU_LEVEL"} <= switches
        rows = "\n".join(line for line in README.read_text().splitlines() if line.lstrip().startswith("|"))
        missing = {name for name in switches if not re.search(rf"\b{name}\b(?!_)", rows)}
        assert missing == set(), f"README.md has no table row for {', '.join(sorted(missing))}"


class TestTheseTests:
    """A snippet that is wrong must be seen."""

    def test_blocks_are_found_with_their_marks(self) -> None:
        text = (
            "# t\n```python\na = 1\n```\n<!-- not run: needs a GPU -->\n```python\nb\n```\n"
            "- x\n  ```python\n  c\n  ```\n```bash\nd\n```\n"
        )
        assert blocks(text) == [Block(3, "a = 1\n", None), Block(7, "b\n", "needs a GPU"), Block(11, "c\n", None)]
        assert blocks("<!-- not run -->\n```python\nx\n```\n") == [Block(3, "x\n", "no reason given")]

    @pytest.mark.parametrize(
        ("code", "error"),
        [
            ("import torch\nx = torch.zeros(2, 3)  # [2, 3]\n", None),
            ("import torch\nx = torch.zeros(2, 3)  # [3, 2]\n", AssertionError),
            ("import torch\nx = torch.zeros(\n    2, 3\n)  # [3, 2]\n", AssertionError),
            ("raise ValueError\n", ValueError),
            (">>> 1 + 1\n2\n", None),
            (">>> 1 + 1\n3\n", AssertionError),
        ],
    )
    def test_a_wrong_block_fails(self, code: str, error: type[Exception] | None) -> None:
        if error is None:
            run_block(Block(1, code, None), "block")
        else:
            with pytest.raises(error):
                run_block(Block(1, code, None), "block")


def modules() -> list[str]:
    return ["protokernels", *(module.name for module in pkgutil.walk_packages(protokernels.__path__, "protokernels."))]


SHOWN = (
    "protokernels",
    "protokernels.backend",
    *(f"protokernels.{part}.{op}" for part in ("nn", "ops") for op in ("prototypes", "sinkhorn")),
)
"""Modules that show examples; a test that finds none there would prove nothing."""


@pytest.mark.parametrize("name", [name for name in modules() if not name.endswith(("__main__", "._C"))])
def test_the_examples_of_a_module_run(name: str) -> None:
    tests = [test for test in doctest.DocTestFinder().find(importlib.import_module(name)) if test.examples]
    assert tests or name not in SHOWN
    for test in tests:
        run_examples(test)


@pytest.mark.parametrize("name", [name for name in modules() if not name.endswith(("__main__", "._C"))])
def test_the_examples_of_public_names_run_as_copied(name: str) -> None:
    """Without the names that the module around them happens to know."""
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", ()):
        for test in doctest.DocTestFinder().find(getattr(module, public), public, globs={}):
            run_examples(test)
