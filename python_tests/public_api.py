# SPDX-License-Identifier: MIT
"""The public interface as text: what `public_api.txt` holds, and what a change of it shows in review.

python python_tests/public_api.py          # prints it
python python_tests/public_api.py --write  # after a change that is meant, named in CHANGELOG.md

Public is: what `__all__` of `protokernels`, its `nn`, `cluster` and `memory` and the functions of `backend` say, with parameters,
annotations and defaults; fields of what they return; commands, and the options, values and presets of every paper and baseline (their
defaults belong to the preset, and may improve). What is not here may change without notice.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

FILE = Path(__file__).with_name("public_api.txt")
INHERITED = frozenset({"forward", "extra_repr"})
"""Methods of torch.nn.Module that a module defines for itself."""


def functions_and_classes() -> Iterator[str]:
    import protokernels
    from protokernels import backend, cluster, memory, nn

    backend_names = [name for name, value in vars(backend).items() if is_function_of(backend, name, value)]
    for module, names in (
        (protokernels, protokernels.__all__),
        (nn, nn.__all__),
        (cluster, cluster.__all__),
        (memory, memory.__all__),
        (backend, backend_names),
    ):
        for name in sorted(names):
            value = getattr(module, name)
            if not isinstance(value, (ModuleType, str)):
                yield from described(f"{module.__name__}.{name}", value)


def is_function_of(module: ModuleType, name: str, value: object) -> bool:
    return not name.startswith("_") and getattr(value, "__module__", None) == module.__name__


def described(name: str, value: Any) -> Iterator[str]:
    """A function is a line; a class is one with what it holds under it."""
    if not inspect.isclass(value):
        yield f"{name}{signature(value)}"
        return
    yield f"class {name}{'' if issubclass(value, Exception) else signature(value)}"
    for base in reversed(inspect.getmro(value)):
        if base.__module__.split(".")[0] == "protokernels":
            yield from sorted(members(base))


def members(kind: type) -> Iterator[str]:
    for name, value in vars(kind).items():
        if name.startswith("_") or name in INHERITED:
            continue
        if isinstance(value, property):
            yield f"    {name}: {value.fget and value.fget.__annotations__.get('return')}"
        elif inspect.isfunction(value) or isinstance(value, (classmethod, staticmethod)):
            yield f"    {name}{signature(getattr(kind, name))}"


def signature(value: Any) -> str:
    """Annotations as they are written, without the quotes that Python gives them."""
    found = inspect.signature(value)
    public = [p for p in found.parameters.values() if not p.name.startswith("_")]
    parameters = [p.replace(annotation=as_written(p.annotation)) for p in public]
    return str(found.replace(parameters=parameters, return_annotation=as_written(found.return_annotation)))


class Written(str):
    """A text that is its own repr."""

    def __repr__(self) -> str:
        return str(self)


def as_written(annotation: Any) -> Any:
    if annotation is inspect.Parameter.empty:
        return annotation
    return Written(getattr(annotation, "__forward_arg__", annotation))


def named_values() -> Iterator[str]:
    """What the names of choices in the signatures stand for."""
    found = {
        f"values of {name}: {', '.join(map(repr, typing.get_args(value)))}"
        for path, module in sys.modules.items()
        if path.startswith(("protokernels.ops", "protokernels.nn", "protokernels.cluster"))
        for name, value in vars(module).items()
        if typing.get_origin(value) is Literal and not name.startswith("_")
    }
    yield from sorted(found)


def command_line() -> Iterator[str]:
    """Commands with their options; papers and baselines with theirs and their presets."""
    from protokernels import cli, commands, embedding, prediction, sweeps, tables
    from protokernels.baselines import BASELINES, CLUSTERING_BASELINES, RESNET18_BASELINES
    from protokernels.papers import PAPERS
    from protokernels.training.runs import RunSettings

    yield f"commands: {', '.join([*cli._COMMANDS, 'doctor'])}"
    for name, options in (
        ("train", commands.TrainOptions),
        ("train, ablate, sweep", RunSettings),
        ("ablate", commands._AblateOptions),
        ("sweep", sweeps.SweepOptions),
        ("table", tables.TableOptions),
        ("evaluate, figures", commands._RunOptions),
        ("predict", prediction.PredictOptions),
        ("embed", embedding.EmbedOptions),
    ):
        yield f"options of {name}"
        yield from fields(options)
    for kind, names in (("paper", PAPERS), ("baseline", (*BASELINES, *CLUSTERING_BASELINES, *RESNET18_BASELINES))):
        for name in sorted(names):
            config = commands.find_paper(name).CONFIG
            yield f"{kind} {name}: presets {', '.join(presets(config))}"
            yield from fields(config)


def fields(options: Any) -> Iterator[str]:
    for field in sorted(dataclasses.fields(options), key=lambda field: field.name):
        yield f"    {field.name}: {field.type}"


def presets(config: Any) -> tuple[str, ...]:
    """The names that the annotation of `preset`'s first parameter allows."""
    method = inspect.unwrap(config.preset.__func__)
    first = next(name for name in inspect.signature(method).parameters if name != "cls")
    return typing.get_args(typing.get_type_hints(method)[first])


def public_api() -> str:
    return "\n".join([*functions_and_classes(), *named_values(), *command_line()]) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        FILE.write_text(public_api())
    else:
        print(public_api(), end="")
