# SPDX-License-Identifier: MIT
"""What ``protokernels train``, ``evaluate`` and ``figures`` do for a paper or a baseline.

:class:`Experiment` has the steps that all of them take. A paper inherits it, says what differs, and offers its three functions
under its own name:

    class _VAESim(Experiment[VAESimConfig]):
        def new_model(self, config, dataset): ...
        def optimizer(self, model, config): ...
        def fit_split(self, model, split, session, config): ...  # the loop over epochs and steps: the paper's algorithm
        def score_model(self, model, dataset, config, seed): ...
        def draw(self, folder, run, config, dataset): ...

    EXPERIMENT = _VAESim("vaesim", VAESimConfig)
    train, evaluate, draw_figures = EXPERIMENT.train, EXPERIMENT.evaluate, EXPERIMENT.draw_figures
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..data import ImageDataset, Split, load_dataset, to_tensor
from ..data.content import content_md5
from ..data.datasets import data_title
from ..data.mapped import Images, prepared
from .checkpoints import fitting
from .configuration import Config
from .randomness import own_settings, seed_everything
from .run_folder import RunFolder, RunFolderError
from .runs import RunSettings, Trial, check_same_data, load_runs, train_runs, update_results, write_summary
from .scoring import check_neighbours, evaluation_splits, unknown_classes_warning
from .session import Plan, Session, batch_warning, in_layout, preferred_layout


class Experiment(Generic[Config]):
    """One paper or baseline as the command line sees it.

    Args:
        name: of its module.
        config: its dataclass.
    """

    dataset_type: type = ImageDataset  # what it is trained on
    drop_last = False  # leave out a last batch that is smaller than the others
    no_download = ""  # why data cannot be fetched, where it cannot

    def __init__(self, name: str, config: type[Config]) -> None:
        self.name, self.CONFIG = name, config

    @own_settings()
    def train(
        self,
        config: Config,
        out: str | Path | None = None,
        *,
        data_root: str | Path | None = None,
        download: bool = False,
        figures: bool = True,
        settings: RunSettings | None = None,
        dataset: Any = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Trains, evaluates and draws; one run or several with different seeds.

        Args:
            config: usually from ``CONFIG.preset``.
            out: folder of the run; default: a new one of ``runs/<name>-<data>-<preset>``, ``...-2`` and so on. Local contrast
                puts its method before the preset, optimised views their strategy; a network without weights is called random.
            data_root: where the data lies; default: ``PROTOKERNELS_DATA``.
            download: fetch data that is not there.
            figures: draw pictures of the first run.
            settings: seed, runs, resume, precision, device, quiet; or give these as keywords.
            dataset: the data of ``config``, to save loading it again, or your own: a :class:`protokernels.data.ImageDataset`, or for
                local contrast a :class:`protokernels.data.SegmentationDataset`.

        Returns:
            The results, every score as ``mean``, ``std`` and number of ``runs`` (see :func:`protokernels.training.summarize_runs`), and
            the folder as ``"folder"``; on processes other than the main one an empty dictionary. ``results.json`` in the folder holds the
            same of several runs; of one run it has the scores as numbers.

        Raises:
            TypeError: a configuration, settings or a data set of another class.
            ValueError: what does not go together; the subclass ``RunFolderError`` where ``out`` holds another run.
            FloatingPointError: training diverged.
        """
        if download and self.no_download:
            raise ValueError(f"{self.name}: {self.no_download}")
        for value, kind in ((config, self.CONFIG), (settings := settings or RunSettings(), RunSettings)):
            if not isinstance(value, kind):
                raise TypeError(f"{self.name}: expected a {kind.__name__}; got {type(value).__name__}")
        settings = replace(settings, **more)
        dataset = self._data(config, dataset, data_root, download=download)
        self.check(config, dataset)
        results = train_runs(
            self.folder_name(config),
            {"paper": self.name, "config": config.record()},
            lambda trial: self.run(trial, config, dataset),
            out=out,
            settings=settings,
            provenance=self._provenance(config, dataset),
            epochs=self.epochs(config, dataset),
        )
        if figures and results:
            self.draw_figures(results["folder"], data_root=data_root, dataset=dataset)
        return results

    @own_settings()
    def evaluate(
        self, folder: str | Path, *, data_root: str | Path | None = None, dataset: Any = None
    ) -> dict[str, Any]:
        """Scores the newest checkpoints of a run, or of each of its seeds that has one, again and rewrites its ``results.json``.
        ``dataset``: see :meth:`train`.

        Raises:
            RunFolderError: the data are not those of the run, or its results are of a later epoch than the checkpoints that can be read.
        """
        runs = load_runs(folder)
        for run in [run for run in runs if run.metrics() or run.results()] or runs:
            config = self.config_of(run)
            data = self._data(config, dataset, data_root)
            provenance = self._provenance(config, data)
            check_same_data(run, provenance)
            scores = self.score_again(run, config, data)
            done = ((run.results() or {}).get("last_epoch") or {}).get("epoch")
            if run.loaded_epoch is not None and done is not None and run.loaded_epoch < done:
                raise RunFolderError(
                    f"{run.path}: its results are of epoch {done}, and the newest checkpoint that can be read is of epoch "
                    f"{run.loaded_epoch}; the results stay as they are"
                )
            epochs = self.epochs(config, data)
            update_results(run, scores, provenance, epochs=epochs, trained=run.loaded_epoch)
        return write_summary(folder)

    @own_settings()
    def draw_figures(
        self, folder: str | Path, *, data_root: str | Path | None = None, dataset: Any = None
    ) -> list[Path]:
        """Draws the pictures of the first seed of a run into ``figures`` and returns their paths. ``RunFolderError`` where the data
        are not those of the run."""
        run = load_runs(folder)[0]
        config = self.config_of(run)
        dataset = self._data(config, dataset, data_root)
        check_same_data(run, self._provenance(config, dataset))
        return self.draw(Path(folder), run, config, dataset)

    def check_data(self, folder: str | Path, config: Any, dataset: Any) -> None:
        """``RunFolderError`` where the runs in a folder were begun with other data."""
        provenance = self._provenance(config, dataset)
        for run in load_runs(folder):
            check_same_data(run, provenance)

    def _data(self, config: Any, dataset: Any, data_root: str | Path | None, *, download: bool = False) -> Any:
        """``dataset``, or what the configuration names."""
        if dataset is None:
            return self.load(config, data_root, download=download)
        if not isinstance(dataset, self.dataset_type):
            raise TypeError(
                f"{self.name}: dataset must be a protokernels.data.{self.dataset_type.__name__}; got {type(dataset).__name__}"
            )
        return dataset

    def _provenance(self, config: Any, dataset: Any) -> dict[str, Any]:
        return {**self.provenance(config, dataset), "content_md5": content_md5(dataset)}

    # What a paper says of itself. These have to be given:

    def new_model(self, config: Any, dataset: Any) -> Any:
        """The model before training; all random numbers come from torch's global generator."""
        raise NotImplementedError

    def optimizer(self, model: Any, config: Any) -> tuple[Optimizer, LRScheduler]:
        """The optimiser, and the schedule that is stepped after every epoch."""
        raise NotImplementedError

    def fit_split(self, model: Any, split: Split, session: Session, config: Any) -> None:
        """The loop over epochs and steps."""
        raise NotImplementedError

    def score_model(self, model: Any, dataset: Any, config: Any, seed: int) -> dict[str, Any]:
        """What goes into ``results.json``: ``"splits"``, ``"images"``, ``"protocol"`` and whatever else."""
        raise NotImplementedError

    def embed(self, model: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embeddings [B, D] and clusters [B] int64 (None without any) of images [B, C, H, W], without randomness, in evaluation mode."""
        raise ValueError(f"{self.name} has no embeddings of images to write")

    def draw(self, folder: Path, run: RunFolder, config: Any, dataset: Any) -> list[Path]:
        """Draws into ``folder / "figures"`` and returns the paths."""
        raise NotImplementedError

    # These hold for most:

    def load(self, config: Any, data_root: str | Path | None = None, *, download: bool = False) -> Any:
        """The data of a configuration."""
        return load_dataset(config.data, data_root, download=download)

    def data_key(self, config: Any) -> Hashable:
        """What :meth:`load` looks at: configurations with one key have the same data."""
        return str(config.data)

    def check(self, config: Any, dataset: Any) -> None:
        """Raises for what does not fit or is missing (a file of weights), before a folder is made: what a run starts
        with is built once for that alone."""
        self.optimizer(self.new_model(config, dataset), config)
        Plan(len(self.training_split(dataset, config)), self.epochs(config, dataset), config.batch_size, seed=0)
        if hasattr(config, "knn_k"):
            check_neighbours(config.knn_k, self.bank_size(dataset, config))

    def bank_size(self, dataset: Any, config: Any) -> int:
        """How many training images the nearest neighbours are looked for among."""
        return len(evaluation_splits(dataset, config.selection)[0])

    def title(self, config: Any) -> str:
        """The method's name in folders and figures."""
        return self.name

    def folder_name(self, config: Any) -> str:
        """Of the default folder."""
        return f"{self.title(config)}-{data_title(config.data)}-{config.preset_name}"

    def epochs(self, config: Any, dataset: Any) -> int:
        """How many a finished run has."""
        count: int = config.epochs
        return count

    def provenance(self, config: Any, dataset: Any) -> dict[str, Any]:
        """Where the data came from, and ``"warnings"``: also of classes that no training image has, and of a batch that the training
        images cannot fill."""
        found: dict[str, Any] = dataset.provenance
        split = self.training_split(dataset, config)
        messages = [unknown_classes_warning(dataset, split)]
        if self.epochs(config, dataset):
            messages.append(batch_warning(config.batch_size, len(split)))
        more = [message for message in messages if message is not None]
        return {**found, "warnings": [*found.get("warnings", []), *more]} if more else found

    def training_split(self, dataset: Any, config: Any) -> Split:
        """The images that are trained on."""
        return evaluation_splits(dataset, config.selection)[0]

    def start(self, trial: Trial, config: Any, dataset: Any) -> Any:
        """The model that a run begins with, in the layout that its convolutions prefer."""
        return in_layout(self.new_model(config, dataset), trial.accelerator)

    def run(self, trial: Trial, config: Any, dataset: Any) -> dict[str, Any]:
        """Trains and scores one seed. What it returns counts on the main process."""
        seed_everything(trial.seed)
        model = self.start(trial, config, dataset)
        split = self.training_split(dataset, config)
        epochs = self.epochs(config, dataset)
        plan = Plan(len(split), epochs, config.batch_size, trial.seed, drop_last=self.drop_last)
        session = trial.session(model, *self.optimizer(model, config), plan)
        self.fit_split(model, split, session, config)
        return self.score_model(model, dataset, config, trial.seed) if trial.is_main_process else {}

    def config_of(self, run: RunFolder) -> Any:
        """The configuration in a run folder; ``RunFolderError`` where it is incomplete or broken."""
        return run.config_as(self.CONFIG)

    def load_model(self, run: RunFolder, config: Any, dataset: Any) -> Any:
        """The model of the newest sound checkpoint of a run, in evaluation mode."""
        state = run.checkpoint()
        model: nn.Module = self.new_model(config, dataset)
        with fitting(run.checkpoints):
            model.load_state_dict(state["model"])
        return model.eval()

    def score_again(self, run: RunFolder, config: Any, dataset: Any) -> dict[str, Any]:
        """:meth:`score_model` for the newest checkpoint of a run."""
        model = self.load_model(run, config, dataset)
        return self.score_model(model, dataset, config, run.config()["seed"])


def training_images(split: Split, size: int, session: Session) -> Images:  # [N, C, S, S] in [0, 1]
    """All images of a split, resized, on the device and in the layout of the model."""
    layout = preferred_layout(session.accelerator)
    return prepared(split.images, lambda rows: to_tensor(rows, size=size).to(session.device, memory_format=layout))
