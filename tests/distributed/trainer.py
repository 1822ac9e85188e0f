"""torchrun runs this with any number of processes: one step of every method of the examples, in float64.

The first argument is a file for the weights after the step. The batch is the same for any number of processes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))

import pytest
import torch
import train_cckd
import train_icct
import train_lkd
import train_semckd
import train_tokens
from common import data, parallel, training
from common.experiment import Experiment
from torch import Tensor, nn

FLAGS = ["--out", "unused", "--threads", "1", "--batch-size", "8"]
Parts = tuple[str, nn.Module, Callable[[Tensor, Tensor], training.Losses]]


def lkd(dataset: data.Dataset) -> Iterator[Parts]:
    arguments = train_lkd.build_parser().parse_args(FLAGS)
    run = train_lkd.LocalCorrelation(arguments, train_lkd.recipe_of(arguments), dataset)
    teacher = frozen(run.network("resnet8-half"))
    caat = nn.ModuleList(train_lkd.ClassAwareAttention(c, 10).freeze() for c in teacher.channels)
    for name, method in train_lkd.METHODS.items():
        student = run.network("resnet8-quarter")
        yield name, student, run.student_loss(method, student, teacher, caat)


def cckd(dataset: data.Dataset) -> Iterator[Parts]:
    arguments = train_cckd.build_parser().parse_args(FLAGS)
    run = train_cckd.CorrelationCongruence(arguments, train_cckd.recipe_of(arguments), dataset)
    teacher = frozen(run.embedder("resnet8-half"))
    variants = {variant for study in train_cckd.STUDIES.values() for variant in study.values()}
    for variant in sorted(variants, key=str):
        student, partner = run.embedder("resnet8-quarter"), run.partner(variant)
        module = nn.ModuleList([student, *([partner] if partner is not None else [])])
        yield variant.name, module, run.loss(variant, student, teacher, partner)


def icct(dataset: data.Dataset) -> Iterator[Parts]:
    arguments = train_icct.build_parser().parse_args(FLAGS)
    run = train_icct.InterClassCorrelation(arguments, train_icct.recipe_of(arguments), dataset)
    teacher = frozen(run.network("resnet8-half"))
    for name, transfers in train_icct.METHODS.items():
        student = run.network("cnn5-quarter")
        yield name, student, run.loss(transfers, student, teacher)


def semckd(dataset: data.Dataset) -> Iterator[Parts]:
    arguments = train_semckd.build_parser().parse_args(FLAGS)
    run = train_semckd.CrossLayer(arguments, train_semckd.recipe_of(arguments), dataset)
    teacher = frozen(run.network("resnet8-half"))
    for name, method in train_semckd.METHODS.items():
        if name == "shared-allocation":  # which needs one process
            continue
        student = run.network("resnet8-quarter")
        with train_semckd.capture(student, method) as own, train_semckd.capture(teacher, method) as theirs:
            setting = train_semckd.Setting(name, 1.0)
            transfer = run.transfer(method, student, teacher, own, theirs, setting) if method.transfer else None
            contrast = run.contrast(student, teacher, dataset) if method.contrast else None
            modules = [student, *([transfer.module] if transfer else []), *([contrast] if contrast else [])]
            loss = run.student_loss(setting, student, teacher, own, theirs, transfer, contrast)
            yield name, nn.ModuleList(modules), numbered(loss) if contrast else loss
            if name == "SemCKD":  # every process measures the whole batch
                with torch.no_grad():
                    measured = run.evaluate(student, teacher, own, theirs, transfer)
                assert [sum(row) for row in measured["attention"]] == pytest.approx([1] * 3)


def numbered(loss: Callable[[Tensor, Tensor], training.Losses]) -> Callable[[Tensor, Tensor], training.Losses]:
    """Return a loss that takes the first images of the training set with their numbers in place of their labels."""
    return lambda images, _: loss(images, parallel.share(torch.arange(8)))


def tokens(dataset: data.Dataset) -> Iterator[Parts]:
    arguments = train_tokens.build_parser().parse_args(FLAGS)
    run: Experiment = train_tokens.TokenRelations(arguments, train_tokens.recipe_of(arguments), dataset)
    teacher = frozen(run.transformer("vit-tiny"))
    for name in train_tokens.METHODS:
        student = run.transformer("vit-tiny")
        yield name, student, run.student_loss(name, student, teacher)


def frozen(network: nn.Module) -> nn.Module:
    return network.requires_grad_(False).eval()


class OneStep:
    """A batch of the digits in float64. Each process has its share."""

    def __init__(self, dataset: data.Dataset) -> None:
        self.images = dataset.normalise(dataset.train.pixels[:8])
        self.labels = dataset.train.labels[:8]

    def __len__(self) -> int:
        return 1

    def epoch(self, _: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield parallel.share(self.images), parallel.share(self.labels)


def main(file: Path) -> None:
    # Batch norms use their running statistics, because every process would have its own statistics of a batch.
    nn.modules.batchnorm._BatchNorm.train = lambda self, mode=True: nn.Module.train(self, False)
    torch.set_default_dtype(torch.float64)
    dataset, weights = data.load("digits"), {}
    dataset = replace(dataset, mean=dataset.mean.double(), std=dataset.std.double())  # images in float64
    schedule = training.Schedule(epochs=1, lr=0.01, milestones=())
    with parallel.processes():
        for example in (lkd, cckd, icct, semckd, tokens):
            torch.manual_seed(int(sys.argv[2]))
            for name, module, loss in example(dataset):
                title = f"{example.__name__} {name}"
                before = torch.cat([p.detach().flatten() for p in module.parameters()])
                checkpoint = file.with_suffix("") / f"{title}.pt"
                training.fit(title, module, loss, OneStep(dataset), schedule, dict, checkpoint, {})
                weights[title] = torch.cat([p.detach().flatten() for p in module.parameters()]) - before
        if parallel.rank() == 0:
            torch.save(weights, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
