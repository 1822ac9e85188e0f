"""Local correlation distillation (LKD) from a teacher to a table.

The program trains a teacher, then class-aware attention (CAAT) on its frozen features, one module per stage, then
students with

    loss = (1 - alpha) * CE + alpha * KD + beta * LKD                     (Eq. 11)

with only cross-entropy (CE), with KD, with LKD, and with LKD on masked and cropped features (LKD+CAAT), over several
seeds. It writes a table of accuracies, every number of every epoch as JSON, and figures. Every epoch ends with a
checkpoint: after an interruption, the same command continues from there.

With torchrun --nproc-per-node N examples/train_lkd.py ..., each process takes its share of every batch, and patches are
compared across all processes. The batch size counts the images of all processes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from common import figures, networks, options, parallel, results, training
from common.data import Dataset
from common.experiment import Experiment, conduct
from common.networks import StagedNetwork
from common.training import History, Losses, Schedule
from torch import Tensor, nn

import kdkernels
from kdkernels.nn import (
    AttentionTransferLoss,
    ClassAwareAttention,
    CorrelationCongruenceLoss,
    KDLoss,
    LocalCorrelationLoss,
    SimilarityPreservingLoss,
)


@dataclass(frozen=True)
class Recipe:
    teacher: str
    student: str
    teacher_schedule: Schedule
    caat_schedule: Schedule
    student_schedule: Schedule
    share: float  # of the training images for the students; teacher and CAAT see all
    k: int
    alpha: float
    temperature: float
    scale: bool  # whether KD has the factor T², which Eq. 1 of the paper does not have
    beta: float
    reduction: str  # of the sum over all pairs of patches in a batch, see LocalCorrelationLoss
    partition: str
    threshold: float
    last_stage: bool  # compare only the patches of the last stage
    at: float  # weights of the methods that are compared with LKD
    sp: float
    cc: float
    seeds: int


# The demo's beta and threshold are the best of 1e-7 ... 1e-3 times 64² and of 0, 0.5, 0.7, 0.8 with --validate and four
# seeds. This beta is a fifth above the paper's range [0.001, 0.1].
RECIPES = {
    "demo": Recipe(
        teacher="resnet14-half",
        student="resnet8-half",
        teacher_schedule=Schedule(epochs=30, lr=0.1, milestones=(12, 18, 24)),
        caat_schedule=Schedule(epochs=20, lr=0.05, milestones=(10, 13, 17)),
        student_schedule=Schedule(epochs=60, lr=0.1, milestones=(24, 36, 48)),
        share=0.25,
        k=4,
        alpha=1.0,
        temperature=4.0,
        scale=True,
        beta=3e-5 * 64**2,
        reduction="batchmean",
        partition="resize",
        threshold=0.8,
        last_stage=False,
        at=1.0,
        sp=1000.0,
        cc=10.0,
        seeds=5,
    ),
    "paper": Recipe(
        teacher="resnet110",
        student="resnet20",
        teacher_schedule=Schedule(epochs=200, lr=0.1, milestones=(80, 120, 160)),
        caat_schedule=Schedule(epochs=60, lr=0.05, milestones=(30, 40, 50)),
        student_schedule=Schedule(epochs=200, lr=0.1, milestones=(80, 120, 160)),
        share=1.0,
        k=4,
        alpha=1.0,
        temperature=4.0,
        scale=False,
        beta=0.001,
        reduction="batchmean",
        partition="split",
        threshold=0.0,
        last_stage=False,
        at=1000.0,
        sp=3000.0,
        cc=0.003,
        seeds=3,
    ),
}

RECIPES["imagenet"] = replace(
    RECIPES["paper"],
    teacher="resnet34-224",
    student="resnet18-224",
    teacher_schedule=Schedule(120, 0.4, (40, 72, 96), batch_size=1024, weight_decay=4e-4),
    caat_schedule=Schedule(48, 0.8, (36, 44), batch_size=1024, weight_decay=4e-4),
    student_schedule=Schedule(120, 0.4, (40, 72, 96), batch_size=1024, weight_decay=4e-4),
    k=3,
    last_stage=True,
    temperature=2.0,
    beta=0.5,
    threshold=0.1,
    seeds=1,
)


class Method(NamedTuple):
    """The terms of Eq. 11 that a method has."""

    kd: bool = True
    lkd: tuple[float, float, float] | None = None  # the weights of Eqs. 4 to 6
    mask: str | None = None
    other: str | None = None  # in place of LKD


ALL = (1.0, 1.0, 1.0)
METHODS = {
    "CE": Method(kd=False),
    "KD": Method(),
    "LKD": Method(lkd=ALL),
    "LKD+CAAT": Method(lkd=ALL, mask="caat"),
    "intra": Method(lkd=(1.0, 0.0, 0.0)),
    "inter-same": Method(lkd=(0.0, 1.0, 0.0)),
    "inter-diff": Method(lkd=(0.0, 0.0, 1.0)),
    "LKD+AT": Method(lkd=ALL, mask="attention"),
    "LKD+Grad-CAM": Method(lkd=ALL, mask="grad-cam"),
    "AT": Method(other="at"),
    "SP": Method(other="sp"),
    "CC": Method(other="cc"),
}
DEFAULT_METHODS = ["CE", "KD", "LKD", "LKD+CAAT"]


class Trained(NamedTuple):
    """All networks, and the students with their histories by method and seed."""

    teacher: StagedNetwork
    caat: nn.ModuleList | None
    students: dict[str, list[StagedNetwork]]
    histories: dict[str, list[History]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    arguments = options.parse(parser, argv)
    conduct(parser, arguments, partial(LocalCorrelation, arguments, recipe_of(arguments)))


class LocalCorrelation(Experiment):
    """One data set, one teacher, its masks, and all students."""

    def __init__(self, arguments: argparse.Namespace, recipe: Recipe, dataset: Dataset) -> None:
        super().__init__(arguments, dataset)
        self.recipe = recipe
        self.methods = {name: METHODS[name] for name in arguments.methods}

    def run(self) -> None:
        few = self.dataset.only(self.recipe.share)
        self.introduce(few)
        teacher = self.teacher()
        caat = self.caat(teacher) if any(method.mask == "caat" for method in self.methods.values()) else None
        students: dict[str, list[StagedNetwork]] = {name: [] for name in self.methods}
        histories: dict[str, list[History]] = {name: [] for name in self.methods}
        runs = [(name, seed) for seed in range(self.recipe.seeds) for name in self.methods]
        trained = self.train_all(self.student, student_checkpoint, runs, few, teacher, caat)
        for (name, _), (student, history) in zip(runs, trained, strict=True):
            students[name].append(student)
            histories[name].append(history)
        if parallel.rank() == 0:
            self.report(Trained(teacher, caat, students, histories))

    def teacher(self) -> StagedNetwork:
        """Return the trained, frozen teacher."""
        return self.taught_by(self.recipe.teacher, self.recipe.teacher_schedule)

    def caat(self, teacher: StagedNetwork) -> nn.ModuleList:
        """Return one trained, frozen mask generator per stage of the teacher (Eqs. 8-9)."""
        torch.manual_seed(0)
        classes = self.dataset.num_classes
        caat = nn.ModuleList(ClassAwareAttention(channels, classes) for channels in teacher.channels).to(self.device)

        def loss(images: Tensor, labels: Tensor) -> Losses:
            _, stages = teacher(images)
            return {"loss": sum(module.loss(stage, labels) for module, stage in zip(caat, stages, strict=True))}

        def evaluate() -> dict[str, float]:
            """Return the accuracy of each auxiliary classifier on the masked features."""
            measured = self.measure(
                lambda images: torch.stack(
                    [module.logits(stage) for module, stage in zip(caat, teacher(images)[1], strict=True)]
                )
            )
            return {f"test_accuracy_stage_{n}": accuracy for n, accuracy in enumerate(measured["test_accuracy"], 1)}

        settings = {"teacher": training.fingerprint(teacher)}
        self.fit("CAAT", caat, loss, self.dataset, self.recipe.caat_schedule, 0, "caat", settings, evaluate=evaluate)
        for module in caat:
            module.freeze()
        return caat

    def student(
        self, name: str, seed: int, dataset: Dataset, teacher: StagedNetwork, caat: nn.ModuleList | None
    ) -> tuple[StagedNetwork, History]:
        """Return a student trained with a method, and its history."""
        torch.manual_seed(seed)
        student = self.network(self.recipe.student)
        method, schedule = METHODS[name], self.recipe.student_schedule
        loss = self.student_loss(method, student, teacher, caat)
        settings = self.student_settings(method, teacher, caat) | {"seed": seed}
        checkpoint = student_checkpoint(name, seed)
        return student, self.fit(f"{name} seed {seed}", student, loss, dataset, schedule, seed, checkpoint, settings)

    def student_loss(
        self, method: Method, student: StagedNetwork, teacher: StagedNetwork, caat: nn.ModuleList | None
    ) -> Callable[[Tensor, Tensor], Losses]:
        """Return Eq. 11 with the terms of the method."""
        recipe = self.recipe
        kd = KDLoss(recipe.temperature, scale=recipe.scale, backend=self.backend)
        lkd = LocalCorrelationLoss(
            recipe.k,
            weights=method.lkd or ALL,
            partition=recipe.partition,
            reduction=recipe.reduction,
            backend=self.backend,
            group=parallel.group(),
        )
        other = self.other_loss(method.other) if method.other else None
        kept = slice(-1 if recipe.last_stage else 0, None)

        def loss(images: Tensor, labels: Tensor) -> Losses:
            logits, stages = student(images)
            losses = {"ce": F.cross_entropy(logits, labels)}
            if not method.kd:
                return losses | {"loss": losses["ce"]}
            with torch.no_grad():
                teacher_logits, teacher_stages = teacher(images)
            losses["kd"] = kd(logits, teacher_logits)
            total = (1 - recipe.alpha) * losses["ce"] + recipe.alpha * losses["kd"]
            if method.lkd:
                masks = self.masks(method, images, labels, teacher, teacher_stages, caat)
                crop = (masks[kept], recipe.threshold) if masks else ()
                losses["lkd"] = lkd(stages[kept], teacher_stages[kept], *crop)
                total = total + recipe.beta * losses["lkd"]
            if other is not None:
                losses[method.other] = other(stages, teacher_stages)
                total = total + getattr(recipe, method.other) * losses[method.other]
            return losses | {"loss": total}

        return loss

    def other_loss(self, name: str) -> Callable[[list[Tensor], list[Tensor]], Tensor]:
        """Return the loss of all stages (AT), of the last stage (SP), or of its average over positions (CC)."""
        if name == "at":
            return AttentionTransferLoss()
        if name == "sp":
            sp = SimilarityPreservingLoss(backend=self.backend, group=parallel.group())
            return lambda own, theirs: sp(own[-1], theirs[-1])
        cc = CorrelationCongruenceLoss(backend=self.backend, group=parallel.group())
        return lambda own, theirs: cc(own[-1].mean((2, 3)), theirs[-1].mean((2, 3)))

    def masks(
        self,
        method: Method,
        images: Tensor,
        labels: Tensor,
        teacher: StagedNetwork,
        stages: list[Tensor],
        caat: nn.ModuleList | None,
    ) -> list[Tensor] | None:
        """Return masks in [0, 1] for the features of both networks. They come from CAAT, from the sum of the teacher's
        squares, or from each position's contribution to the logit of the class (Table 5, which applies a sigmoid to the
        latter two).
        """
        if method.mask is None:
            return None
        if method.mask == "caat":
            with torch.no_grad():
                return [mask(stage) for mask, stage in zip(caat, stages, strict=True)]
        if method.mask == "attention":
            return [stage.square().sum(1).sigmoid() for stage in stages]
        with torch.enable_grad():
            logits, stages = teacher(images.detach().requires_grad_())
            gradients = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), stages)
        weighted = (
            (gradient.mean((2, 3), keepdim=True) * stage).sum(1)
            for gradient, stage in zip(gradients, stages, strict=True)
        )
        return [total.relu().sigmoid().detach() for total in weighted]

    def student_settings(self, method: Method, teacher: StagedNetwork, caat: nn.ModuleList | None) -> dict[str, object]:
        """Return only the settings that a student depends on, so that runs of other methods stay valid when a setting
        changes.
        """
        recipe = self.recipe
        settings = {"network": recipe.student, "share": recipe.share}
        if method.kd:
            settings |= {
                "teacher": training.fingerprint(teacher),
                "alpha": recipe.alpha,
                "temperature": recipe.temperature,
                "scale": recipe.scale,
                "backend": self.backend,
            }
        if method.lkd:
            for name in ("beta", "k", "reduction", "partition", "last_stage"):
                settings[name] = getattr(recipe, name)
            settings["weights"] = method.lkd
        if method.mask:
            settings |= {"mask": method.mask, "threshold": recipe.threshold}
        if method.mask == "caat":
            settings["caat"] = training.fingerprint(caat)
        if method.other:
            settings[method.other] = getattr(recipe, method.other)
        return settings

    def report(self, trained: Trained) -> None:
        """Write the table, results.json and the figures, and print the table."""
        recipe = self.recipe
        teacher_accuracy = self.measure(lambda images: trained.teacher(images)[0])["test_accuracy"]
        accuracies = {
            name: [history[-1]["test_accuracy"] for history in runs] for name, runs in trained.histories.items()
        }
        cosines = self.cosines(trained)
        tables = [results.table((recipe.teacher, teacher_accuracy), accuracies, baseline="KD")]
        content = {
            "recipe": asdict(recipe),
            "data": self.data_settings,
            "parameters": {
                "teacher": networks.parameter_count(trained.teacher),
                "student": networks.parameter_count(self.network(recipe.student)),
            },
            "test_accuracy": {"teacher": teacher_accuracy, **accuracies},
            "overlap of the patch cosines' histogram with the teacher's": {
                f"stage {number}": {name: overlap(density, stage["teacher"]) for name, density in stage.items()}
                for number, stage in enumerate(cosines, 1)
            },
        }
        self.draw(trained, cosines, teacher_accuracy)
        self.write(
            content, tables, f"Students: {recipe.student}, accuracy after the last epoch, mean ± standard deviation."
        )

    def draw(self, trained: Trained, cosines: list[dict[str, np.ndarray]], teacher_accuracy: float) -> None:
        folder = self.out / "figures"
        figures.curves(
            folder / "curves.png",
            trained.histories,
            [
                ("loss", "training loss (Eq. 11)"),
                ("lkd", "its local correlation term"),
                ("test_accuracy", "test accuracy, %"),
            ],
            log=("loss",),
            zoom=("test_accuracy",),
            level=("test_accuracy", "teacher", teacher_accuracy),
        )
        panels = {
            f"stage {number}": {
                name if name == "teacher" else f"{name}, overlap {overlap(density, stage['teacher']):.2f}": density
                for name, density in stage.items()
            }
            for number, stage in enumerate(cosines, 1)
        }
        figures.histograms(folder / "cosines.png", panels, EDGES, "cosine between two patches")
        if trained.caat is not None:
            self.draw_masks(folder / "masks.png", trained.teacher, trained.caat)

    @torch.no_grad()
    def draw_masks(self, path: Path, teacher: StagedNetwork, caat: nn.ModuleList) -> None:
        """Draw the first test image of each of the first ten classes (the paper's Fig. 3)."""
        test = self.dataset.test
        shown = [int((test.labels == label).nonzero()[0]) for label in test.labels.unique()[:10]]
        pixels = self.dataset.pixels(test[torch.tensor(shown)])
        _, stages = teacher(self.dataset.normalise(pixels.to(self.device)))
        figures.masks(
            path,
            pixels.permute(0, 2, 3, 1).numpy() / 255,
            [self.dataset.class_names[label] for label in test.labels[shown]],
            [
                (stage.mean(1).cpu().numpy(), mask(stage).cpu().numpy())
                for stage, mask in zip(stages, caat, strict=True)
            ],
            self.recipe.threshold,
        )

    @torch.no_grad()
    def cosines(self, trained: Trained) -> list[dict[str, np.ndarray]]:
        """Return the distribution of cosines between patches over ``EDGES`` for every stage and method (the paper's
        Fig. 1). The patches belong to a batch of test images, and the distribution is averaged over the seeds.
        """
        images = self.dataset.normalise(self.dataset.pixels(self.dataset.test[:64]).to(self.device))
        densities = {
            name: np.mean([[density(stage, self.recipe.k) for stage in network(images)[1]] for network in runs], axis=0)
            for name, runs in {"teacher": [trained.teacher], **trained.students}.items()
        }
        return [dict(zip(densities, stage, strict=True)) for stage in zip(*densities.values(), strict=True)]


def student_checkpoint(method: str, seed: int) -> str:
    return f"{method.lower()}-seed{seed}"


EDGES = np.linspace(-1, 1, 101)


def density(features: Tensor, k: int) -> np.ndarray:
    cosines = kdkernels.local_correlation(features, k, partition="resize")
    different = ~torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)
    counts = torch.histc(cosines[different], len(EDGES) - 1, EDGES[0], EDGES[-1])
    return (counts / counts.sum()).cpu().numpy() / np.diff(EDGES)


def overlap(density: np.ndarray, other: np.ndarray) -> float:
    """Return the area that two densities share, which is 1 if they are equal."""
    return float((np.minimum(density, other) * np.diff(EDGES)).sum())


def build_parser() -> argparse.ArgumentParser:
    parser, group = options.new_parser(__doc__, Path("runs/lkd"), RECIPES)
    add = partial(options.add_recipe_flag, group, RECIPES)
    count = options.positive_int
    options.add_shared_flags(group, RECIPES, networks.NETWORKS, foreign=True)
    add("--caat-epochs", count, "epochs of CAAT", lambda r: r.caat_schedule.epochs, metavar="N")
    add("--k", count, "patches per side of a feature map", lambda r: r.k)
    add("--alpha", float, "weight of KD against CE", lambda r: r.alpha)
    add("--beta", float, "factor of LKD", lambda r: r.beta)
    add("--threshold", float, "features are cropped to where the mask exceeds this", lambda r: r.threshold)
    for other in ("at", "sp", "cc"):
        add(f"--{other}", float, f"weight of {other.upper()} in LKD's place", lambda r, o=other: getattr(r, o))
    group.add_argument(
        "--methods", nargs="+", choices=METHODS, default=DEFAULT_METHODS, help=f"default: {' '.join(DEFAULT_METHODS)}"
    )
    return parser


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """Return the requested recipe, with the values of the given flags."""
    return options.recipe_of(arguments, RECIPES)


if __name__ == "__main__":
    main()
