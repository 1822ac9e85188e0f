"""Token relations from a large vision transformer to a small one, to a table.

The program trains a teacher, then students with

    loss = (1 - alpha) * CE + alpha * KD + beta * relation

with only cross-entropy (CE), with KD, and with KD and a relation between the tokens of the last blocks. The relation is
the cosines of all tokens of an image. It is compared by MSE (DINOv3's Gram anchoring), by a hinge (VA-VAE, VideoREPA),
or by the KL divergence of the softmax of its rows (LightlyTrain). The program writes a table of accuracies, every
number of every epoch as JSON, and figures of the similarities of tokens before and after. After an interruption, the
same command continues.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import figures, networks, options, parallel, results, training
from common.data import Dataset
from common.experiment import Experiment, conduct
from common.networks.vit import VITS, VisionTransformer, vit
from common.training import History, Losses, Schedule
from torch import Tensor

from kdkernels.nn import KDLoss, TokenRelationLoss


@dataclass(frozen=True)
class Recipe:
    teacher: str
    student: str
    teacher_schedule: Schedule
    student_schedule: Schedule
    share: float  # of the training images for the students; the teacher sees all
    alpha: float
    temperature: float
    mse: float  # the weights of the relations
    hinge: float
    kl: float
    margin: float  # of the hinge
    relation_temperature: float  # of KL
    seeds: int


ADAM = Schedule(epochs=80, lr=2e-3, milestones=(), optimizer="adam", cosine=True, weight_decay=0.0)
# The weights of the relations are the best of 0.1 and 1 with --validate and two seeds.
DEMO = Recipe(
    teacher="vit-small",
    student="vit-tiny",
    teacher_schedule=ADAM,
    student_schedule=ADAM,
    share=0.5,
    alpha=0.9,
    temperature=4.0,
    mse=1.0,
    hinge=1.0,
    kl=0.1,
    margin=0.1,
    relation_temperature=0.1,
    seeds=5,
)
# No paper trains transformers of this size. "paper", for data sets other than the digits, is the demo with all images.
RECIPES = {"demo": DEMO, "paper": replace(DEMO, share=1.0, seeds=3)}
RELATIONS = {"KD + MSE": "mse", "KD + hinge": "hinge", "KD + KL": "kl"}
METHODS = ("CE", "KD", *RELATIONS)


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    arguments = options.parse(parser, argv)
    conduct(parser, arguments, partial(TokenRelations, arguments, recipe_of(arguments)))


class TokenRelations(Experiment):
    """One data set, one teacher, and all students."""

    def __init__(self, arguments: argparse.Namespace, recipe: Recipe, dataset: Dataset) -> None:
        super().__init__(arguments, dataset)
        self.recipe = recipe
        self.methods: list[str] = arguments.methods

    def run(self) -> None:
        few = self.dataset.only(self.recipe.share)
        self.introduce(few)
        teacher = self.teacher()
        students: dict[str, list[VisionTransformer]] = {name: [] for name in self.methods}
        histories: dict[str, list[History]] = {name: [] for name in self.methods}
        runs = [(name, seed) for seed in range(self.recipe.seeds) for name in self.methods]
        trained = self.train_all(self.student, checkpoint, runs, few, teacher)
        for (name, _), (student, history) in zip(runs, trained, strict=True):
            students[name].append(student)
            histories[name].append(history)
        if parallel.rank() == 0:
            self.report(teacher, students, histories)

    def transformer(self, name: str) -> VisionTransformer:
        return self.placed(vit(name, self.dataset.shape, self.dataset.num_classes))

    def teacher(self) -> VisionTransformer:
        """Return the trained, frozen teacher."""
        torch.manual_seed(0)
        name, schedule = self.recipe.teacher, self.recipe.teacher_schedule
        teacher = self.transformer(name)

        def loss(images: Tensor, labels: Tensor) -> Losses:
            return {"loss": F.cross_entropy(teacher(images)[0], labels)}

        self.fit(f"teacher {name}", teacher, loss, self.dataset, schedule, 0, "teacher", {"network": name})
        return teacher.requires_grad_(False).eval()

    def student(
        self, name: str, seed: int, dataset: Dataset, teacher: VisionTransformer
    ) -> tuple[VisionTransformer, History]:
        """Return a student trained with a method, and its history."""
        torch.manual_seed(seed)
        student, schedule = self.transformer(self.recipe.student), self.recipe.student_schedule
        settings = self.student_settings(name, teacher) | {"seed": seed}
        loss, file = self.student_loss(name, student, teacher), checkpoint(name, seed)
        return student, self.fit(f"{name} seed {seed}", student, loss, dataset, schedule, seed, file, settings)

    def student_loss(
        self, name: str, student: VisionTransformer, teacher: VisionTransformer
    ) -> Callable[[Tensor, Tensor], Losses]:
        recipe = self.recipe
        kd = KDLoss(recipe.temperature, backend=self.backend)
        kind = RELATIONS.get(name)
        relation = TokenRelationLoss(
            comparison=kind or "mse",
            margin=recipe.margin if kind == "hinge" else 0.0,
            temperature=recipe.relation_temperature if kind == "kl" else 1.0,
            backend=self.backend,
        )

        def loss(images: Tensor, labels: Tensor) -> Losses:
            logits, tokens = student(images)
            losses = {"ce": F.cross_entropy(logits, labels)}
            if name == "CE":
                return losses | {"loss": losses["ce"]}
            with torch.no_grad():
                teacher_logits, teacher_tokens = teacher(images)
            losses["kd"] = kd(logits, teacher_logits)
            total = (1 - recipe.alpha) * losses["ce"] + recipe.alpha * losses["kd"]
            if kind:
                losses["relation"] = relation(tokens[-1], teacher_tokens[-1])
                total = total + getattr(recipe, kind) * losses["relation"]
            return losses | {"loss": total}

        return loss

    def student_settings(self, name: str, teacher: VisionTransformer) -> dict[str, object]:
        """Return only the settings that a student depends on."""
        recipe = self.recipe
        settings: dict[str, object] = {"network": recipe.student, "share": recipe.share}
        if name != "CE":
            settings |= {"teacher": training.fingerprint(teacher), "backend": self.backend}
            settings |= {key: getattr(recipe, key) for key in ("alpha", "temperature")}
        if kind := RELATIONS.get(name):
            settings["beta"] = getattr(recipe, kind)
            settings |= {"hinge": {"margin": recipe.margin}, "kl": {"at": recipe.relation_temperature}}.get(kind, {})
        return settings

    def report(
        self,
        teacher: VisionTransformer,
        students: dict[str, list[VisionTransformer]],
        histories: dict[str, list[History]],
    ) -> None:
        """Write the table, results.json and the figures, and print the table."""
        recipe = self.recipe
        accuracy = self.measure(lambda images: teacher(images)[0])["test_accuracy"]
        accuracies = {name: [history[-1]["test_accuracy"] for history in runs] for name, runs in histories.items()}
        torch.manual_seed(0)
        before = self.transformer(recipe.student).eval()
        similar = {"teacher": self.similarities([teacher]), "student, before": self.similarities([before])}
        similar |= {name: self.similarities(runs) for name, runs in students.items()}
        errors = {name: float(np.abs(matrix - similar["teacher"]).mean()) for name, matrix in similar.items()}
        tables = [results.table((recipe.teacher, accuracy), accuracies, baseline="KD")]
        content = {
            "recipe": asdict(recipe),
            "data": self.data_settings,
            "parameters": {
                "teacher": networks.parameter_count(teacher),
                "student": networks.parameter_count(before),
            },
            "test_accuracy": {"teacher": accuracy, **accuracies},
            "mean difference of token similarities to the teacher's": errors,
        }
        self.draw(similar, errors, histories, accuracy)
        self.write(
            content, tables, f"Students: {recipe.student}, accuracy after the last epoch, mean ± standard deviation."
        )

    def draw(
        self,
        similar: dict[str, np.ndarray],
        errors: dict[str, float],
        histories: dict[str, list[History]],
        accuracy: float,
    ) -> None:
        folder = self.out / "figures"
        side = round(len(similar["teacher"]) ** 0.5)
        panels = {
            name if name == "teacher" else f"{name}\n{errors[name]:.2f} from the teacher": matrix
            for name, matrix in similar.items()
        }
        figures.matrices(folder / "tokens.png", panels, [f"row {i}" for i in range(1, side + 1)], "mean cosine")
        figures.curves(
            folder / "curves.png",
            histories,
            [("loss", "training loss"), ("relation", "its token relation"), ("test_accuracy", "test accuracy, %")],
            log=("loss",),
            zoom=("test_accuracy",),
            level=("test_accuracy", "teacher", accuracy),
        )

    @torch.no_grad()
    def similarities(self, runs: Sequence[VisionTransformer]) -> np.ndarray:
        """Return the cosines between the tokens of the last block, averaged over test images and networks."""
        images = self.dataset.normalise(self.dataset.pixels(self.dataset.test[:256]).to(self.device))
        units = [F.normalize(network(images)[1][-1], dim=2) for network in runs]
        return torch.stack([(u @ u.mT).mean(0) for u in units]).mean(0).cpu().numpy()


def checkpoint(name: str, seed: int) -> str:
    return f"{name.lower().replace(' + ', '+')}-seed{seed}"


def build_parser() -> argparse.ArgumentParser:
    parser, group = options.new_parser(__doc__, Path("runs/tokens"), RECIPES)
    parser.epilog = f"networks: {', '.join(VITS)}"
    add = partial(options.add_recipe_flag, group, RECIPES)
    options.add_shared_flags(group, RECIPES, VITS)
    add("--alpha", float, "weight of KD against CE", lambda r: r.alpha)
    for kind in RELATIONS.values():
        add(f"--{kind}", float, f"weight of the relation compared by {kind}", lambda r, k=kind: getattr(r, k))
    add("--margin", float, "margin of the hinge", lambda r: r.margin)
    add(
        "--relation-temperature", options.positive, "temperature of the relations' KL", lambda r: r.relation_temperature
    )
    group.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help=f"default: {' '.join(METHODS)}"
    )
    return parser


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """Return the requested recipe, with the values of the given flags."""
    return options.recipe_of(arguments, RECIPES)


if __name__ == "__main__":
    main()
