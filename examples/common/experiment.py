"""Shared by the experiments of the examples: a data set, networks trained on it, and their files in one folder."""

from __future__ import annotations

import argparse
import contextlib
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdkernels
from kdkernels.samplers import ClassUniformSampler

from . import networks, options, parallel, results, side_by_side, training
from .data import DataError, Dataset
from .networks import StagedNetwork
from .training import History, Losses, Schedule

Module = TypeVar("Module", bound=nn.Module)
Result = TypeVar("Result")


class Experiment:
    """Networks trained on one data set. All files are under ``out``."""

    def __init__(self, arguments: argparse.Namespace, dataset: Dataset) -> None:
        self.dataset = dataset
        self.backend: str = arguments.backend
        self.out: Path = arguments.out
        self.device = options.pick_device(arguments)
        self.jobs: int = arguments.jobs
        self.teacher_weights: Path | None = getattr(arguments, "teacher_weights", None)
        self.engine = options.engine_of(arguments)
        self.engine.begin()
        self.data_settings = {
            "data": arguments.data,
            "validate": arguments.validate,
            "images": (len(dataset.train), len(dataset.test)),
        }

    recipe: Any

    def run(self) -> None:
        """Train what is not trained yet, print the table, and write the files."""
        raise NotImplementedError

    def introduce(self, students_see: Dataset) -> None:
        """Print the networks and the data."""
        print(
            f"{len(self.dataset.train)} training and {len(self.dataset.test)} test images of "
            f"{' x '.join(map(str, self.dataset.shape))} in {self.dataset.num_classes} classes; "
            f"students see {len(students_see.train)} training images; on {self.device}; files in {self.out}"
        )

    def network(self, name: str) -> StagedNetwork:
        try:
            network = networks.build(name, self.dataset.channels, self.dataset.num_classes, self.dataset.shape[-1])
        except ValueError as error:  # a network of another library
            raise DataError(str(error)) from error
        return self.placed(network)

    def placed(self, module: Module) -> Module:
        """Return the module on the device, prepared for training."""
        self.engine.prepare(module)
        return module.to(self.device)

    def fit(
        self,
        title: str,
        module: nn.Module,
        loss: Callable[[Tensor, Tensor], Losses],
        dataset: Dataset,
        schedule: Schedule,
        seed: int,
        name: str,
        settings: dict[str, object],
        *,
        evaluate: Callable[[], dict[str, float]] | None = None,
        drop_last: bool = True,
        sampler: ClassUniformSampler | None = None,
        before_epoch: Callable[[int], None] | None = None,
    ) -> History:
        """Call ``training.fit`` with batches of ``dataset`` and the checkpoint ``name``. By default it measures the
        accuracy of a network, draws batches uniformly, and drops the last, smaller batch.
        """
        return training.fit(
            title,
            module,
            loss,
            dataset.batches(schedule.batch_size, seed, self.device, drop_last=drop_last, sampler=sampler),
            schedule,
            evaluate or (lambda: self.measure(lambda images: module(images)[0])),
            self.checkpoint(name),
            self.data_settings | settings,
            engine=self.engine,
            log=self.out / "log.jsonl",
            before_epoch=before_epoch,
        )

    def classifier(
        self, title: str, network: str, dataset: Dataset, schedule: Schedule, seed: int, name: str
    ) -> tuple[StagedNetwork, History]:
        """Return a network trained with only cross-entropy, and its history."""
        torch.manual_seed(seed)
        module = self.network(network)

        def loss(images: Tensor, labels: Tensor) -> Losses:
            return {"loss": F.cross_entropy(module(images)[0], labels)}

        return module, self.fit(title, module, loss, dataset, schedule, seed, name, {"network": network})

    def taught_by(self, name: str, schedule: Schedule) -> StagedNetwork:
        """Return the trained, frozen teacher, or the one of --teacher-weights."""
        if self.teacher_weights is not None:
            teacher = self.network(name)
            training.load_weights(teacher, self.teacher_weights)
        else:
            teacher, _ = self.classifier(f"teacher {name}", name, self.dataset, schedule, 0, "teacher")
        return teacher.requires_grad_(False).eval()

    def train_all(
        self, train: Callable[..., Result], checkpoint: Callable[..., str], calls: Sequence[tuple], *shared: object
    ) -> list[Result]:
        """Return ``train(*call, *shared)`` for every call. With --jobs, new ones are trained side by side first.

        Args:
            checkpoint: returns the name of the checkpoint of a call.
        """
        new = set()
        if self.jobs > 1:
            new = {n for n, call in enumerate(calls) if not self.checkpoint(checkpoint(*call)).exists()}
            side_by_side.run(self.jobs, train, [(*calls[n], *shared) for n in sorted(new)], self.engine.begin)
        trained = []
        for number, call in enumerate(calls):
            # The process that trained a new student has printed its accuracy.
            with contextlib.redirect_stdout(None) if number in new else contextlib.nullcontext():
                trained.append(train(*call, *shared))
        return trained

    def write(self, content: Mapping[str, object], tables: Sequence[results.Table], below: str) -> None:
        """Write results.json and table.md, and print the tables with the text ``below`` them."""
        text = results.report(tables)
        training.write_json(self.out / "results.json", dict(content) | {"tables": tables})
        training.replace_file(self.out / "table.md", lambda path: path.write_text(text + "\n"))
        print(f"\n{text}\n\n{below}")
        print(f"Tables, numbers and figures are in {self.out}; the same command prints this again without training.")

    def measure(self, classify: Callable[[Tensor], Tensor]) -> dict:
        return training.measure(classify, self.dataset, self.device)

    def checkpoint(self, name: str) -> Path:
        return self.out / "checkpoints" / f"{name}.pt"


def conduct(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, experiment: Callable[[Dataset], Experiment]
) -> None:
    """Load the data and run the experiment on all processes that torchrun started."""
    dataset = options.load_data(parser, arguments)
    with supervised(parser):
        if arguments.fresh:
            options.forget(arguments.out)
        run = experiment(dataset)
        write_config(parser.prog, arguments, run.recipe)
        run.run()


@contextlib.contextmanager
def supervised(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Connect the processes of torchrun for the block. Errors in the files are printed without a traceback."""
    try:
        with parallel.processes():
            yield
    except (training.CheckpointError, DataError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted. The same command goes on after the last finished epoch.") from None


def write_config(program: str, arguments: argparse.Namespace, recipe: Any = None) -> None:
    """Write the configuration of a run, from which --resume continues it."""
    if parallel.rank():
        return
    config = {
        "program": program,
        "arguments": arguments.command,
        "recipe": asdict(recipe) if recipe is not None else None,
        "computation": asdict(options.engine_of(arguments)),
        "processes": parallel.world_size(),
        "device": str(options.pick_device(arguments)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kdkernels": kdkernels.__version__,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    training.write_json(arguments.out / options.CONFIG, config)
