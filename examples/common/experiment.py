"""What the examples' experiments share: a data set, networks trained on it, and their files in one folder."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdkernels.samplers import ClassUniformSampler

from . import networks, options, parallel, training
from .data import DataError, Dataset
from .networks import StagedNetwork
from .training import History, Losses, Schedule


class Experiment:
    """Networks trained on one data set; every file lies under ``out``."""

    def __init__(self, arguments: argparse.Namespace, dataset: Dataset) -> None:
        self.dataset = dataset
        self.backend: str = arguments.backend
        self.out: Path = arguments.out
        self.device = options.pick_device(arguments)
        self.data_settings = {
            "data": arguments.data,
            "validate": arguments.validate,
            "images": (len(dataset.train), len(dataset.test)),
        }

    def run(self) -> None:
        """Train what is not trained yet, print the table, write the files."""
        raise NotImplementedError

    def introduce(self, students_see: Dataset) -> None:
        """Print what is trained on what."""
        print(
            f"{len(self.dataset.train)} training and {len(self.dataset.test)} test images of "
            f"{' x '.join(map(str, self.dataset.shape))} in {self.dataset.num_classes} classes; "
            f"students see {len(students_see.train)} training images; on {self.device}; files in {self.out}"
        )

    def network(self, name: str) -> StagedNetwork:
        return networks.build(name, self.dataset.channels, self.dataset.num_classes).to(self.device)

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
    ) -> History:
        """``training.fit`` with batches of ``dataset`` and the checkpoint called ``name``. By default it measures the
        accuracy of a network, and batches are drawn uniformly but for the last, smaller one."""
        return training.fit(
            title,
            module,
            loss,
            dataset.batches(schedule.batch_size, seed, self.device, drop_last=drop_last, sampler=sampler),
            schedule,
            evaluate or (lambda: self.measure(lambda images: module(images)[0])),
            self.checkpoint(name),
            self.data_settings | settings,
        )

    def classifier(
        self, title: str, network: str, dataset: Dataset, schedule: Schedule, seed: int, name: str
    ) -> tuple[StagedNetwork, History]:
        """A network trained with cross-entropy alone, and its history."""
        torch.manual_seed(seed)
        module = self.network(network)

        def loss(images: Tensor, labels: Tensor) -> Losses:
            return {"loss": F.cross_entropy(module(images)[0], labels)}

        return module, self.fit(title, module, loss, dataset, schedule, seed, name, {"network": network})

    def measure(self, classify: Callable[[Tensor], Tensor]) -> dict:
        return training.measure(classify, self.dataset, self.device)

    def checkpoint(self, name: str) -> Path:
        return self.out / "checkpoints" / f"{name}.pt"


def conduct(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, experiment: Callable[[Dataset], Experiment]
) -> None:
    """Load the data and run the experiment on it, on all processes that torchrun started; what is wrong with its files
    is said without a traceback."""
    dataset = options.load_data(parser, arguments)
    try:
        with parallel.processes():
            if arguments.fresh:
                options.forget(arguments.out)
            experiment(dataset).run()
    except (training.CheckpointError, DataError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted. The same command goes on after the last finished epoch.") from None
