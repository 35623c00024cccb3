# SPDX-License-Identifier: MIT
"""The commands that need the extra ``protokernels[train]``: train, ablate, evaluate, figures. Options come from the
dataclasses, through tyro."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import torch.distributed as dist
import tyro

from .ablations import SUMMARY, ablation_tables, run_ablations
from .baselines import BASELINES as SELF_SUPERVISED
from .baselines import CLUSTERING_BASELINES, RESNET18_BASELINES
from .papers import PAPERS
from .training import RunFolder
from .training.files import WriteError
from .training.report import results_table
from .training.runs import RunSettings
from .training.screen import print_line, print_table

BASELINES = (*SELF_SUPERVISED, *CLUSTERING_BASELINES, *RESNET18_BASELINES)


@dataclass(frozen=True)
class TrainOptions:
    """Where a run goes and what it starts from."""

    out: Path | None = None
    """Folder of the run; default: a new one of runs/PAPER-DATA-PRESET, ...-2 and so on."""
    data_root: Path | None = None
    """Folder of the data; default: the environment variable PROTOKERNELS_DATA."""
    download: bool = False
    """Fetch data that is not there."""
    figures: bool = True
    """Draw pictures of the first run."""


@dataclass(frozen=True)
class _AblateOptions(TrainOptions):
    only: tuple[str, ...] = ()
    """Ablations to run; default: all."""


@dataclass(frozen=True)
class _RunOptions:
    run: Annotated[Path, tyro.conf.Positional]
    """Folder written by `protokernels train`."""
    data_root: Path | None = None
    """Folder of the data; default: the environment variable PROTOKERNELS_DATA."""


def train(words: list[str]) -> int:
    """``protokernels train PAPER [options]``; a baseline's name instead of a paper's trains the baseline."""
    words = with_underscores(words)
    if not words or words[0] in ("-h", "--help") or words[0] not in (*PAPERS, *BASELINES):
        name_unknown("train", words, "paper or baseline", (*PAPERS, *BASELINES))
        print(
            f"protokernels train PAPER [options]\n\npapers: {', '.join(PAPERS)}\nbaselines: {', '.join(BASELINES)}\n"
            "`protokernels train PAPER --help` lists the options."
        )
        return 0 if words and words[0] in ("-h", "--help") else 2
    paper = find_paper(words[0])
    options, settings, config = parse_options(words, paper, "train", TrainOptions())
    try:
        results = paper.train(
            config,
            options.out,
            data_root=options.data_root,
            download=options.download,
            figures=options.figures,
            settings=settings,
        )
    except WriteError as error:
        more = (
            "then the same command with --resume goes on from the last checkpoint"
            if error.begun
            else "or pass another --out"
        )
        raise WriteError(f"{error}; {more}") from error
    finally:
        leave_processes()
    if results:  # the main process
        _show(paper, results, Path(results["folder"]))
    return 0


def ablate(words: list[str]) -> int:
    """``protokernels ablate PAPER [options]``."""
    words = with_underscores(words)
    papers = [name for name in PAPERS if hasattr(find_paper(name), "ABLATIONS")]
    if not words or words[0] in ("-h", "--help") or words[0] not in papers:
        name_unknown("ablate", words, "paper with ablations", papers)
        print(
            f"protokernels ablate PAPER [--only ABLATION ...] [options]\n\npapers: {', '.join(papers)}\n"
            "`protokernels ablate PAPER --help` lists the options and the ablations."
        )
        return 0 if words and words[0] in ("-h", "--help") else 2
    paper = find_paper(words[0])
    options, settings, config = parse_options(
        words, paper, "ablate", _AblateOptions(), f"Ablations: {', '.join(paper.ABLATIONS)}."
    )
    try:
        results, folder, outcome = run_ablations(
            paper,
            words[0],
            config,
            options.out,
            only=options.only,
            data_root=options.data_root,
            download=options.download,
            figures=options.figures,
            settings=settings,
        )
    finally:
        leave_processes()
    if results:
        for table in getattr(paper, "ablation_tables", ablation_tables)(results):
            print_table(table)
        list_files(folder, SUMMARY)
    outcome.report()
    return 1 if outcome.failed else 0


def parse_options(
    words: list[str], paper: Any, command: str, files: TrainOptions, more: str = ""
) -> tuple[Any, RunSettings, Any]:
    """Options of the command, how to run, and the paper's configuration, from the words behind ``command``.

    Args:
        words: the paper's name, and options.
        paper: its module.
        command: as it was called.
        files: the command's own options with their defaults.
        more: a sentence for --help.
    """
    name = words[0]
    chooser = argparse.ArgumentParser(f"protokernels {command} {name}", add_help=False, allow_abbrev=False)
    chooser.add_argument("--preset", default="fair")
    chooser.add_argument("--data", default=getattr(paper, "DEFAULT_DATA", "digits"))
    chosen, rest = chooser.parse_known_args(words[1:])
    defaults = paper.CONFIG.preset(chosen.preset, data=chosen.data)

    parts = (
        ("files", type(files), files),
        ("run", RunSettings, RunSettings()),
        (name, paper.CONFIG, defaults),
    )
    all_options = make_dataclass(
        "AllOptions", [(part, kind, field(default=default)) for part, kind, default in parts], frozen=True
    )
    parsed: Any = tyro.cli(
        all_options,
        args=with_repeats_joined(rest, *(kind for _, kind, _ in parts)),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        prog=f"protokernels {command} {name}",
        description=(
            f"{(paper.__doc__ or '').splitlines()[0]}{' ' * bool(more)}{more} First choose --preset NAME and --data NAME: "
            f"they set the defaults of the options below, now those of --preset {chosen.preset} --data "
            f"{chosen.data}."
        ),
    )
    plain_warnings()
    return parsed.files, parsed.run, getattr(parsed, name)


def with_underscores(words: list[str]) -> list[str]:
    """``local-contrast`` as well as ``local_contrast``."""
    return [words[0].replace("-", "_"), *words[1:]] if words and not words[0].startswith("-") else words


def with_repeats_joined(words: list[str], *kinds: type) -> list[str]:
    """``--over a --over b`` as ``--over a b``, for every field of the dataclasses ``kinds`` that takes any number of values: the
    parser would keep the last one alone."""
    hints = [hint for kind in kinds for hint in get_type_hints(kind).items()]
    many = {name.replace("_", "-") for name, hint in hints if get_origin(hint) is tuple and Ellipsis in get_args(hint)}
    lists: dict[str, list[str]] = {}
    rest: list[str] = []
    values = rest  # where the next word belongs
    for word in words:
        option, equals, value = word.partition("=")
        name = option.removeprefix("--").replace("_", "-")
        if word.startswith("--") and name in many:
            values = lists.setdefault(f"--{name}", [])
            values += [value] if equals else []
        else:
            values = rest if word.startswith("--") else values
            values.append(word)
    return [*rest, *(word for option, each in lists.items() for word in (option, *each))]


def name_unknown(command: str, words: list[str], kind: str, known: Sequence[str]) -> None:
    """Says on stderr which word behind ``command`` it is that nothing has as its name."""
    if words and words[0] not in ("-h", "--help"):
        print(
            f"protokernels {command}: unknown {kind} {words[0]!r}; expected one of {', '.join(known)}", file=sys.stderr
        )


def leave_processes() -> None:
    """Ends the group of processes that train together, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def evaluate(words: list[str]) -> int:
    """``protokernels evaluate RUN``."""
    command = tyro.cli(
        _RunOptions,
        args=words,
        prog="protokernels evaluate",
        description="Scores a run again from its newest checkpoint.",
    )
    plain_warnings()
    paper = _paper_of(command.run)
    _show(paper, paper.evaluate(command.run, data_root=command.data_root), command.run)
    return 0


def figures(words: list[str]) -> int:
    """``protokernels figures RUN``."""
    command = tyro.cli(
        _RunOptions, args=words, prog="protokernels figures", description="Draws a run's pictures again."
    )
    plain_warnings()
    for path in _paper_of(command.run).draw_figures(command.run, data_root=command.data_root):
        print(path)
    return 0


def find_paper(name: str) -> Any:
    """The module of a paper, or the baseline of that name."""
    if name in BASELINES:
        return importlib.import_module(f"protokernels.baselines.{name}").BASELINE
    return importlib.import_module(f"protokernels.papers.{name}")


def _paper_of(run: Path) -> Any:
    name = RunFolder.open(run).config().get("paper")
    if name not in (*PAPERS, *BASELINES):
        known = ", ".join((*PAPERS, *BASELINES))
        raise ValueError(f"{run / 'config.json'} names the paper {name!r}; this version knows {known}")
    return find_paper(name)


def experiment_of(run: Path) -> Any:
    """The :class:`Experiment` that wrote a run."""
    paper = _paper_of(run)
    return getattr(paper, "EXPERIMENT", paper)


def _show(paper: Any, results: dict[str, Any], folder: Path) -> None:
    table = getattr(paper, "results_table", results_table)  # a paper may be judged by other scores
    print_table(table(results, paper.PAPER_RESULTS))
    for warning in results.get("data_warnings", []):
        print_line(f"data: {warning}", "yellow")
    list_files(folder, "results.json")


def list_files(folder: Path, results: str) -> None:
    """Where results and pictures of a folder lie."""
    print_line(f"results  {folder / results}")
    for path in sorted((folder / "figures").glob("*.png")):
        print_line(f"figure   {path}")


def plain_warnings() -> None:
    """Warnings on the command line are one line each, without the source line that raised them."""

    def show(message: Warning | str, category: type[Warning], *_rest: Any, **_more: Any) -> None:
        print_line(f"warning: {message}", "yellow", stderr=True)

    warnings.showwarning = show
