"""Correlation congruence distillation (CCKD) from a teacher to tables.

Teacher and student end in an embedding of 128 features, on which the classifier sits. Students are trained by

    loss = alpha * CE + (1 - alpha) * KD + beta * CC                      (Eq. 7)

and compared over several seeds in four studies: methods (CE, KD, SP, CCKD), samplers of the batches (uniform,
class-uniform, superclass-uniform; the paper's Table 7), orders of the Taylor series (1, 2, 3; Table 6) and metrics of
correlation (MMD, bilinear, Gaussian; Table 5). With --task retrieval the networks learn some of the classes, and their
embeddings are to find images of each other's class among classes never seen: rank-1, rank-5 and mean average precision.
Writes a table per study, every number of every epoch as JSON, and figures. Every epoch ends with a checkpoint: however
a run was interrupted, the same command goes on from there. On digits all of it takes four minutes of one
processor's time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import figures, networks, options, parallel, results, training
from common.data import Dataset
from common.experiment import Experiment, conduct
from common.training import History, Losses, Schedule
from torch import Tensor, nn

from kdkernels.nn import AttentionTransferLoss, CorrelationCongruenceLoss, KDLoss, SimilarityPreservingLoss
from kdkernels.samplers import ClassUniformSampler, SuperclassUniformSampler


@dataclass(frozen=True)
class Recipe:
    teacher: str
    student: str
    teacher_schedule: Schedule
    student_schedule: Schedule
    features: int  # of the embeddings
    share: float  # of the training images, for the students; the teacher sees all
    seen: float  # of the classes, in the retrieval task
    alpha: float
    temperature: float
    beta: float
    gamma: float
    sp: float  # weight of SP in the place of CC
    at: float  # of AT
    samples: int  # k, of each class in a batch
    superclasses: int
    seeds: int


# The demo's beta and sp are the best of 1 ... 100 and of 100 ... 3000 with --validate and eight seeds; any beta in that
# range does about as well.
RECIPES = {
    "demo": Recipe(
        teacher="resnet14-half",
        student="resnet8-half",
        teacher_schedule=Schedule(epochs=30, lr=0.1, milestones=(12, 18, 24)),
        student_schedule=Schedule(epochs=60, lr=0.05, milestones=(24, 36, 48), batch_size=40),
        features=128,
        share=0.25,
        seen=0.6,
        alpha=0.0,
        temperature=4.0,
        beta=10.0,
        gamma=0.4,
        sp=1000.0,
        at=1.0,
        samples=4,
        superclasses=20,
        seeds=3,
    ),
    "paper": Recipe(
        teacher="resnet110",
        student="resnet20",
        teacher_schedule=Schedule(epochs=200, lr=0.1, milestones=(80, 120, 160)),
        student_schedule=Schedule(epochs=200, lr=0.1, milestones=(80, 120, 160)),
        features=128,
        share=1.0,
        seen=0.5,
        alpha=0.0,
        temperature=4.0,
        beta=0.003,
        gamma=0.4,
        sp=3000.0,
        at=1000.0,
        samples=4,
        superclasses=200,
        seeds=3,
    ),
}


@dataclass(frozen=True)
class Variant:
    """What a student is trained by. The defaults are CCKD's main experiments."""

    loss: str = "cc"  # beside KD: "cc", "sp", "at" or none of them, or "ce" without KD
    sampler: str = "cur"
    kernel: str = "taylor_rbf"
    order: int = 2

    @property
    def name(self) -> str:
        """Of its checkpoints: a student that two studies show is trained once."""
        how = [self.kernel, f"order{self.order}"] if self.loss == "cc" else []
        return "-".join([self.loss, self.sampler, *how])


STUDIES: dict[str, dict[str, Variant]] = {
    "methods": {"CE": Variant("ce"), "KD": Variant("kd"), "SP": Variant("sp"), "CCKD": Variant()},
    "samplers": {
        "uniform": Variant(sampler="uniform"),
        "class-uniform": Variant(sampler="cur"),
        "superclass-uniform": Variant(sampler="sur"),
    },
    "orders": {f"P = {order}": Variant(order=order) for order in (1, 2, 3)},
    "metrics": {
        "MMD": Variant(kernel="mmd"),
        "bilinear": Variant(kernel="bilinear"),
        "Gaussian, exact": Variant(kernel="rbf"),
        "Gaussian, P = 2": Variant(),
    },
}
MEASURES = {
    "classification": {"test_accuracy": "test accuracy, %"},
    "retrieval": {"rank_1": "rank-1, %", "rank_5": "rank-5, %", "map": "mAP, %"},
}

Runs = dict[str, list[tuple["Embedder", History]]]


class Embedder(nn.Module):
    """A network with a layer of ``features`` outputs, its embedding, between the pooled maps and the classifier."""

    def __init__(self, network: networks.StagedNetwork, features: int) -> None:
        super().__init__()
        self.network = network
        self.embedding = nn.Linear(network.classifier.in_features, features)
        self.classifier = nn.Linear(features, network.classifier.out_features)
        network.classifier = nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits, embedding, and the stages' maps."""
        pooled, stages = self.network(images)
        embedding = self.embedding(pooled)
        return self.classifier(embedding), embedding, stages


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    conduct(parser, arguments, partial(CorrelationCongruence, arguments, recipe_of(arguments)))


class CorrelationCongruence(Experiment):
    """One data set, one teacher, and the students of every study."""

    def __init__(self, arguments: argparse.Namespace, recipe: Recipe, dataset: Dataset) -> None:
        self.unseen: Dataset | None = None
        if arguments.task == "retrieval":
            split = round(recipe.seen * dataset.num_classes)
            self.unseen = dataset.of_classes(range(split, dataset.num_classes))
            dataset = dataset.of_classes(range(split))
        super().__init__(arguments, dataset)
        self.data_settings |= {"task": arguments.task}
        self.task: str = arguments.task
        self.studies = list(STUDIES) if arguments.study == "all" else [arguments.study]
        self.few = dataset.only(recipe.share)
        # Few classes make smaller batches, whatever composes them: methods and samplers are compared at one size.
        self.groups = min(max(1, recipe.student_schedule.batch_size // recipe.samples), dataset.num_classes)
        schedule = replace(recipe.student_schedule, batch_size=self.groups * recipe.samples)
        self.recipe = replace(recipe, student_schedule=schedule)

    def run(self) -> None:
        self.introduce(self.few)
        teacher, teacher_history = self.teacher()
        runs: Runs = {}
        for study in self.studies:
            for variant in STUDIES[study].values():
                if variant.name not in runs:
                    seeds = range(self.recipe.seeds)
                    runs[variant.name] = [self.student(variant, seed, teacher) for seed in seeds]
        if parallel.rank() == 0:
            self.report(teacher, teacher_history[-1], runs)

    def teacher(self) -> tuple[Embedder, History]:
        """The trained, frozen teacher, and its history."""
        torch.manual_seed(0)
        teacher = self.embedder(self.recipe.teacher)

        def loss(images: Tensor, labels: Tensor) -> Losses:
            return {"loss": F.cross_entropy(teacher(images)[0], labels)}

        history = self.fit(
            f"teacher {self.recipe.teacher}",
            teacher,
            loss,
            self.dataset,
            self.recipe.teacher_schedule,
            0,
            "teacher",
            {"network": self.recipe.teacher, "features": self.recipe.features},
            evaluate=partial(self.evaluate, teacher),
        )
        return teacher.requires_grad_(False).eval(), history

    def student(self, variant: Variant, seed: int, teacher: Embedder) -> tuple[Embedder, History]:
        """A student trained as a variant says, with its history."""
        torch.manual_seed(seed)
        recipe = self.recipe
        student = self.embedder(recipe.student)
        history = self.fit(
            f"{variant.name} seed {seed}",
            student,
            self.loss(variant, student, teacher),
            self.few,
            recipe.student_schedule,
            seed,
            f"{variant.name}-seed{seed}",
            self.settings(variant, teacher) | {"seed": seed},
            evaluate=partial(self.evaluate, student),
            sampler=self.sampler(variant.sampler, seed, teacher),
        )
        return student, history

    def loss(self, variant: Variant, student: Embedder, teacher: Embedder) -> Callable[[Tensor, Tensor], Losses]:
        """Eq. 7 with the variant's correlation term."""
        recipe = self.recipe
        kd = KDLoss(recipe.temperature, backend=self.backend)
        cc = CorrelationCongruenceLoss(
            kernel=variant.kernel,
            gamma=recipe.gamma,
            order=variant.order,
            backend=self.backend,
            group=parallel.group(),
        )
        sp = SimilarityPreservingLoss(backend=self.backend, group=parallel.group())
        at = AttentionTransferLoss()

        def loss(images: Tensor, labels: Tensor) -> Losses:
            logits, embedding, stages = student(images)
            losses = {"ce": F.cross_entropy(logits, labels)}
            if variant.loss == "ce":
                return losses | {"loss": losses["ce"]}
            with torch.no_grad():
                teacher_logits, teacher_embedding, teacher_stages = teacher(images)
            losses["kd"] = kd(logits, teacher_logits)
            total = recipe.alpha * losses["ce"] + (1 - recipe.alpha) * losses["kd"]
            # Recorded for every student, as the paper's Fig. 3 does; only CCKD's learn from it.
            losses["cc"] = cc(embedding, teacher_embedding)
            if variant.loss == "cc":
                total = total + recipe.beta * losses["cc"]
            if variant.loss == "sp":
                losses["sp"] = sp(stages[-1], teacher_stages[-1])
                total = total + recipe.sp * losses["sp"]
            if variant.loss == "at":
                losses["at"] = at(stages[-2:], teacher_stages[-2:])
                total = total + recipe.at * losses["at"]
            return losses | {"loss": total}

        return loss

    def settings(self, variant: Variant, teacher: Embedder) -> dict[str, object]:
        """What a student depends on, and nothing else: runs of other variants stay valid when a setting changes."""
        recipe = self.recipe
        settings = {
            "network": recipe.student,
            "features": recipe.features,
            "share": recipe.share,
            "sampler": variant.sampler,
        }
        if variant.sampler != "uniform":
            settings["samples"] = recipe.samples
        if variant.sampler == "sur":
            settings["superclasses"] = recipe.superclasses
        if variant.loss != "ce":
            settings |= {
                "teacher": training.fingerprint(teacher),
                "alpha": recipe.alpha,
                "temperature": recipe.temperature,
                "backend": self.backend,
                "gamma": recipe.gamma,
            }
        if variant.loss == "cc":
            settings |= {"beta": recipe.beta, "kernel": variant.kernel, "order": variant.order}
        if variant.loss in ("sp", "at"):
            settings[variant.loss] = getattr(recipe, variant.loss)
        return settings

    def sampler(self, name: str, seed: int, teacher: Embedder) -> ClassUniformSampler | None:
        """Batches of ``samples`` images of each class or superclass in them; None draws as many images uniformly."""
        recipe = self.recipe
        if name == "uniform":
            return None
        if name == "sur":
            superclasses = min(recipe.superclasses, len(self.few.train))
            groups = min(self.groups, superclasses)
            embeddings = self.embeddings(teacher, self.few.train.pixels)
            return SuperclassUniformSampler(embeddings, superclasses, groups, recipe.samples, seed=seed)
        return ClassUniformSampler(self.few.train.labels, self.groups, recipe.samples, seed=seed)

    def embedder(self, name: str) -> Embedder:
        return Embedder(self.network(name), self.recipe.features).to(self.device)

    @torch.no_grad()
    def embeddings(self, network: Embedder, pixels: Tensor) -> Tensor:
        """Embeddings of images, on the CPU."""
        parts = pixels.split(1000)
        return torch.cat([network(self.dataset.normalise(part.to(self.device)))[1].cpu() for part in parts])

    def evaluate(self, network: Embedder) -> dict[str, float]:
        """Accuracy, or how well the embeddings retrieve classes never seen."""
        if self.unseen is None:
            return self.measure(lambda images: network(images)[0])
        found = retrieval(self.embeddings(network, self.unseen.test.pixels), self.unseen.test.labels)
        return found | {"test_accuracy": self.measure(lambda images: network(images)[0])["test_accuracy"]}

    def report(self, teacher: Embedder, of_teacher: Mapping[str, float], runs: Runs) -> None:
        """Write tables, results.json and figures, and print the tables."""
        measures = MEASURES[self.task]
        content: dict[str, object] = {"recipe": asdict(self.recipe), "data": self.data_settings}
        content["teacher"] = {measure: of_teacher[measure] for measure in measures}
        tables = []
        for study in self.studies:
            measured = {
                label: {measure: [history[-1][measure] for _, history in runs[variant.name]] for measure in measures}
                for label, variant in STUDIES[study].items()
            }
            content[study] = measured
            rows = {label: list(values.values()) for label, values in measured.items()}
            tables.append(results.grid(study, rows, list(measures.values())))
        tables[0]["rows"].insert(0, ["teacher", *([value] for value in content["teacher"].values())])
        text = results.report(tables)
        training.write_json(self.out / "results.json", content | {"tables": tables})
        training.replace_file(self.out / "table.md", lambda path: path.write_text(text + "\n"))
        self.draw(teacher, of_teacher, runs)
        recipe = self.recipe
        print(f"\n{text}\n\nTeacher: {recipe.teacher}. Students: {recipe.student}, after the last epoch,")
        print(f"mean ± standard deviation over {recipe.seeds} seeds. Batches are class-uniform unless said otherwise.")
        print(f"Tables, numbers and figures are in {self.out}; the same command prints this again without training.")

    def draw(self, teacher: Embedder, of_teacher: Mapping[str, float], runs: Runs) -> None:
        """Loss curves (the paper's Fig. 3) and cosines within and between classes (Fig. 4)."""
        shown = {label: runs[variant.name] for label, variant in STUDIES["methods"].items() if variant.name in runs}
        if not shown:
            return
        measure, title = next(iter(MEASURES[self.task].items()))
        figures.curves(
            self.out / "figures" / "curves.png",
            {label: [history for _, history in of_method] for label, of_method in shown.items()},
            [("kd", "KL divergence (KD)"), ("cc", "correlation congruence (Eq. 6)"), (measure, title)],
            log=("kd", "cc"),
            zoom=(measure,),
            level=(measure, "teacher", of_teacher[measure]),
        )
        self.draw_cosines({"teacher": teacher, **{label: of_method[0][0] for label, of_method in shown.items()}})

    def draw_cosines(self, shown: Mapping[str, Embedder], classes: int = 10, images: int = 8) -> None:
        """Cosines between the embeddings of some test images of each class, sorted by class (the paper's Fig. 4), with
        their means within classes and between them over all test images; first seeds."""
        dataset = self.unseen or self.dataset
        test, classes = dataset.test, min(classes, dataset.num_classes)
        some = torch.cat([(test.labels == label).nonzero()[:images, 0] for label in range(classes)])
        panels = {}
        for name, network in shown.items():
            embeddings = self.embeddings(network, test.pixels)
            within, between = mean_cosines(embeddings, test.labels)
            unit = F.normalize(embeddings[some])
            panels[f"{name}: {within:.2f} within, {between:.2f} between"] = (unit @ unit.T).numpy()
        figures.matrices(
            self.out / "figures" / "cosines.png", panels, dataset.class_names[:classes], "cosine of embeddings"
        )


def retrieval(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    """Every image asks for its class among all others, by cosine: rank-1, rank-5 and mean average precision, percent.

    Rank-k is the share of images with one of their class among the k nearest. An image without another of its class
    asks for nothing.
    """
    unit = F.normalize(embeddings)
    cosines = (unit @ unit.T).fill_diagonal_(-torch.inf)
    order = cosines.argsort(dim=1, descending=True, stable=True)[:, :-1]
    hits = labels[order] == labels[:, None]
    hits = hits[hits.any(1)].double()
    precision = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1)
    average = (precision * hits).sum(1) / hits.sum(1)
    return {
        "rank_1": 100 * hits[:, 0].mean().item(),
        "rank_5": 100 * hits[:, :5].amax(1).mean().item(),
        "map": 100 * average.mean().item(),
    }


def mean_cosines(embeddings: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cosine between different images of one class, and between images of different classes."""
    unit = F.normalize(embeddings)
    cosines = unit @ unit.T
    same = labels[:, None] == labels
    different_image = ~torch.eye(len(labels), dtype=torch.bool)
    return cosines[same & different_image].mean().item(), cosines[~same].mean().item()


def build_parser() -> argparse.ArgumentParser:
    parser, group = options.new_parser(__doc__, Path("runs/cckd"), RECIPES)
    parser.add_argument("--task", choices=MEASURES, default="classification", help="default: %(default)s")
    parser.add_argument("--study", choices=["all", *STUDIES], default="all", help="default: %(default)s")
    add = partial(options.add_recipe_flag, group, RECIPES)
    count, name = options.positive_int, {"choices": networks.NETWORKS, "metavar": "NAME"}
    add("--teacher", str, "teacher network", lambda r: r.teacher, **name)
    add("--student", str, "student network", lambda r: r.student, **name)
    add("--seeds", count, "number of students per variant, with seeds 0, 1, ...", lambda r: r.seeds, metavar="N")
    add("--epochs", count, "epochs of a student", lambda r: r.student_schedule.epochs, metavar="N")
    add("--teacher-epochs", count, "epochs of the teacher", lambda r: r.teacher_schedule.epochs, metavar="N")
    add("--batch-size", count, "images per batch of a student", lambda r: r.student_schedule.batch_size, metavar="N")
    add("--features", count, "features of the embeddings", lambda r: r.features, metavar="N")
    add("--share", options.share, "share of the training images that students see", lambda r: r.share)
    add("--seen", options.share, "share of the classes that are seen in the retrieval task", lambda r: r.seen)
    add("--alpha", float, "weight of CE against KD", lambda r: r.alpha)
    add("--temperature", options.positive, "temperature of KD", lambda r: r.temperature)
    add("--beta", float, "weight of CC", lambda r: r.beta)
    add("--gamma", options.positive, "of the Gaussian", lambda r: r.gamma)
    add("--sp", float, "weight of SP", lambda r: r.sp)
    add("--at", float, "weight of AT", lambda r: r.at)
    add("--samples", count, "images of each class in a class-uniform batch", lambda r: r.samples, metavar="N")
    add("--superclasses", count, "clusters of the teacher's embeddings", lambda r: r.superclasses, metavar="N")
    return parser


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The recipe asked for with the flags that were given in place of its values."""
    recipe = options.recipe_of(arguments, RECIPES)
    students, teachers = recipe.student_schedule, recipe.teacher_schedule
    students = students.lasting(arguments.epochs or students.epochs)
    return replace(
        recipe,
        teacher_schedule=teachers.lasting(arguments.teacher_epochs or teachers.epochs),
        student_schedule=replace(students, batch_size=arguments.batch_size or students.batch_size),
    )


if __name__ == "__main__":
    main()
