"""Correlation congruence distillation (CCKD) from a teacher to tables.

Teacher and student end in an embedding of 128 features and a classifier. Students are trained with

    loss = alpha * CE + (1 - alpha) * KD + beta * CC                      (Eq. 7)

and compared over several seeds in four studies: methods (CE, KD, SP, CCKD), samplers (uniform, class-uniform,
superclass-uniform; the paper's Table 7), orders of the Taylor series (1, 2, 3; Table 6) and correlation metrics (MMD,
bilinear, Gaussian; Table 5). A fifth study, compared, has DML, AT and Adv.

With --task retrieval, the networks learn some of the classes. Then their embeddings retrieve images of unseen classes:
rank-1, rank-5 and mean average precision. On Market-1501 and MSMT17 they find persons, by the protocol of Market-1501
(Table 3). With --task identification, they find one image of an identity among distractors, by the protocol of MegaFace
(Table 4). The recipe of faces has ArcFace in place of CE, and the L2 mimic (Eq. 2) in place of KD.

The program writes a table per study, every number of every epoch as JSON, and figures. Every epoch ends with a
checkpoint: after an interruption, the same command continues from there. On digits, everything takes four minutes on
one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import data, figures, networks, options, parallel, results, training
from common.data import DataError, Dataset, Images
from common.experiment import Experiment, conduct
from common.heads import CosineClassifier, arcface_loss, mimic_loss, polynomial_congruence, triplet_loss
from common.people import Faces, Persons
from common.ranking import identification, powers_of_ten, re_identification, retrieval
from common.training import History, Losses, Schedule
from torch import Tensor, nn

from kdkernels.nn import (
    AdversarialLoss,
    AttentionTransferLoss,
    CorrelationCongruenceLoss,
    DMLLoss,
    KDLoss,
    SimilarityPreservingLoss,
)
from kdkernels.samplers import ClassUniformSampler, SuperclassUniformSampler


@dataclass(frozen=True)
class Recipe:
    teacher: str
    student: str
    teacher_schedule: Schedule
    student_schedule: Schedule
    features: int  # width of the embeddings
    share: float  # of the training images for the students; the teacher sees all
    seen: float  # of the classes, in the retrieval task
    alpha: float
    temperature: float
    beta: float
    reduction: str  # of the squared differences over all pairs of a batch, see CorrelationCongruenceLoss
    normalize: bool  # whether embeddings are divided by their norm
    gamma: float
    sp: float  # weight of SP in place of CC
    at: float  # of AT
    samples: int  # k, of each class in a batch
    superclasses: int
    seeds: int
    head: str = "linear"  # or "arcface"
    scale: float = 64.0  # s and m of ArcFace
    margin: float = 0.5
    triplet: float = 0.0  # weight of the triplet loss beside CE
    triplet_margin: float = 0.3
    instance: str = "kd"  # what makes instances congruent, or "mimic"
    adv: float = 1.0  # weight of Adv
    coefficients: tuple[float, ...] = ()  # of Eq. 8; Taylor's if there are none


# The demo's beta and sp are the best in 1 ... 100 and in 100 ... 3000, with --validate and eight seeds. The
# paper's beta acts on unit rows only if the squared differences are summed; docs/cckd.md has the measurement.
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
        reduction="mean",
        normalize=True,
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
        reduction="sum",
        normalize=True,
        gamma=0.4,
        sp=3000.0,
        at=1000.0,
        samples=4,
        superclasses=200,
        seeds=3,
    ),
}
RECIPES["imagenet"] = replace(
    RECIPES["paper"],
    teacher="resnet50-224",
    student="mobilenetv2-224",
    teacher_schedule=Schedule(150, 0.4, (50, 80, 120), batch_size=1024),
    student_schedule=Schedule(150, 0.4, (50, 80, 120), batch_size=1024),
    seeds=1,
)
RECIPES["persons"] = replace(
    RECIPES["paper"],
    teacher="resnet50-224",
    student="resnet18-224",
    teacher_schedule=Schedule(90, 0.0003, (45, 60), batch_size=40),
    student_schedule=Schedule(90, 0.0003, (45, 60), batch_size=40),
    features=256,
    superclasses=1000,
    seeds=1,
)
RECIPES["faces"] = replace(
    RECIPES["paper"],
    teacher="resnet50-224",
    student="mobilenetv2-224",
    teacher_schedule=Schedule(120, 0.1, (50, 80, 100), batch_size=1024),
    student_schedule=Schedule(120, 0.1, (50, 80, 100), batch_size=1024),
    head="arcface",
    instance="mimic",
    seeds=1,
)


@dataclass(frozen=True)
class Variant:
    """The training of a student. The defaults are the main experiments of CCKD."""

    loss: str = "cc"  # with KD: "cc", "sp", "at", "adv" or none; without KD: "ce" or "dml"
    sampler: str = "cur"
    kernel: str = "taylor_rbf"
    order: int = 2
    pretrained: bool = False  # whether student and DML's large network start from given weights

    @property
    def name(self) -> str:
        """Return the name of the checkpoints. Two studies with the same student train it once."""
        how = [self.kernel, f"order{self.order}"] if self.loss == "cc" else []
        return "-".join([self.loss, self.sampler, *how, *(["pretrained"] if self.pretrained else [])])


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
    "compared": {"DML": Variant("dml"), "AT": Variant("at"), "Adv": Variant("adv")},
}
DEFAULT_STUDIES = ("methods", "samplers", "orders", "metrics")
TASKS = ("classification", "retrieval", "identification")
TASK_OF = {"market1501": "retrieval", "msmt17": "retrieval", "faces": "identification"}

Runs = dict[str, list[tuple["Embedder", History]]]


class Embedder(nn.Module):
    """A network with an embedding layer of ``features`` outputs between the pooled maps and the classifier."""

    def __init__(self, network: networks.StagedNetwork, features: int, scale: float | None = None) -> None:
        """``scale`` is ArcFace's. Without it, the classifier is linear."""
        super().__init__()
        self.network = network
        self.embedding = nn.Linear(network.classifier.in_features, features)
        classes = network.classifier.out_features
        self.classifier = nn.Linear(features, classes) if scale is None else CosineClassifier(features, classes, scale)
        network.classifier = nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the logits, the embedding, and the maps of the stages."""
        pooled, stages = self.network(images)
        embedding = self.embedding(pooled)
        return self.classifier(embedding), embedding, stages


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    arguments = options.parse(parser, argv)
    conduct(parser, arguments, partial(CorrelationCongruence, arguments, recipe_of(arguments)))


class CorrelationCongruence(Experiment):
    """One data set, one teacher, and the students of every study."""

    def __init__(self, arguments: argparse.Namespace, recipe: Recipe, dataset: Dataset) -> None:
        self.task: str = arguments.task or TASK_OF.get(arguments.data, TASKS[0])
        self.weights: dict[str, str] = dict(getattr(arguments, "weights", ()))  # by the name of the network
        self.unseen: Dataset | None = None
        self.distractors: Images | None = None
        if isinstance(dataset, (Persons, Faces)):
            if self.task != TASK_OF[arguments.data]:
                raise DataError(f"--task must be {TASK_OF[arguments.data]} for {arguments.data}, got {self.task}")
            self.unseen = dataset
            self.distractors = getattr(dataset, "distractors", None)
        elif self.task != "classification":
            split = round(recipe.seen * dataset.num_classes)
            self.unseen = dataset.of_classes(range(split, dataset.num_classes))
            if self.task == "identification":
                self.distractors = dataset.of_classes(
                    range((split + dataset.num_classes) // 2, dataset.num_classes)
                ).test
                self.unseen = dataset.of_classes(range(split, (split + dataset.num_classes) // 2))
            dataset = dataset.of_classes(range(split))
        super().__init__(arguments, dataset)
        self.data_settings |= {"task": self.task}
        self.studies = DEFAULT_STUDIES if arguments.study == "all" else (arguments.study,)
        self.few = dataset.only(recipe.share)
        # Few classes make smaller batches for every sampler, because methods and samplers are compared at one batch
        # size.
        self.groups = min(max(1, recipe.student_schedule.batch_size // recipe.samples), dataset.num_classes)
        schedule = replace(recipe.student_schedule, batch_size=self.groups * recipe.samples)
        self.recipe = replace(recipe, student_schedule=schedule)

    @property
    def measures(self) -> dict[str, str]:
        """Return the titles of the measures of the task, by their names in the histories."""
        if self.task == "identification":
            counts = powers_of_ten(len(self.distractors))
            return {f"rank_1_of_{count}": f"rank-1 of {count}, %" for count in counts}
        if self.task == "retrieval":
            return {"rank_1": "rank-1, %", "rank_5": "rank-5, %", "map": "mAP, %"}
        return {"test_accuracy": "test accuracy, %"}

    def run(self) -> None:
        self.introduce(self.few)
        teacher, teacher_history = self.teacher()
        variants = dict.fromkeys(variant for study in self.studies for variant in STUDIES[study].values())
        calls = [(variant, seed) for variant in variants for seed in range(self.recipe.seeds)]
        runs: Runs = {}
        for (variant, _), trained in zip(calls, self.train_all(self.student, checkpoint, calls, teacher), strict=True):
            runs.setdefault(variant.name, []).append(trained)
        if parallel.rank() == 0:
            self.report(teacher, teacher_history[-1], runs)

    def teacher(self) -> tuple[Embedder, History]:
        """Return the trained, frozen teacher, and its history."""
        torch.manual_seed(0)
        teacher = self.embedder(self.recipe.teacher)

        def loss(images: Tensor, labels: Tensor) -> Losses:
            logits, embedding, _ = teacher(images)
            return {"loss": self.task_loss(logits, embedding, labels)}

        history = self.fit(
            f"teacher {self.recipe.teacher}",
            teacher,
            loss,
            self.dataset,
            self.recipe.teacher_schedule,
            0,
            "teacher",
            {"network": self.recipe.teacher, "features": self.recipe.features} | self.head_settings(),
            evaluate=partial(self.evaluate, teacher),
        )
        return teacher.requires_grad_(False).eval(), history

    def student(self, variant: Variant, seed: int, teacher: Embedder) -> tuple[Embedder, History]:
        """Return a student trained according to a variant, and its history."""
        torch.manual_seed(seed)
        recipe = self.recipe
        student = self.embedder(recipe.student, variant.pretrained)
        partner = self.partner(variant)
        module = student if partner is None else nn.ModuleDict({"student": student, "partner": partner})
        settings = self.settings(variant, teacher) | {"seed": seed}
        if variant.pretrained:
            settings["start"] = training.fingerprint(module)
        history = self.fit(
            f"{variant.name} seed {seed}",
            module,
            self.loss(variant, student, teacher, partner),
            self.few,
            recipe.student_schedule,
            seed,
            checkpoint(variant, seed),
            settings,
            evaluate=partial(self.evaluate, student),
            sampler=self.sampler(variant.sampler, seed, teacher),
        )
        return student, history

    def partner(self, variant: Variant) -> nn.Module | None:
        """Return what is trained beside the student: DML's large network, or the discriminator of Adv."""
        if variant.loss == "dml":
            return self.embedder(self.recipe.teacher, variant.pretrained)
        return AdversarialLoss(self.recipe.features).to(self.device) if variant.loss == "adv" else None

    def task_loss(self, logits: Tensor, embedding: Tensor, labels: Tensor) -> Tensor:
        """Return CE or ArcFace, and the weighted triplet loss."""
        recipe = self.recipe
        if recipe.head == "arcface":
            loss = arcface_loss(logits, labels, recipe.scale, recipe.margin)
        else:
            loss = F.cross_entropy(logits, labels)
        if recipe.triplet:
            loss = loss + recipe.triplet * triplet_loss(embedding, labels, recipe.triplet_margin)
        return loss

    def congruence(self, variant: Variant) -> Callable[[Tensor, Tensor], Tensor]:
        """Return Eq. 6 with the variant's kernel."""
        recipe = self.recipe
        if recipe.coefficients and variant.kernel == "taylor_rbf":
            return partial(
                polynomial_congruence,
                coefficients=recipe.coefficients,
                normalize=recipe.normalize,
                reduction=recipe.reduction,
            )
        return CorrelationCongruenceLoss(
            kernel=variant.kernel,
            gamma=recipe.gamma,
            order=variant.order,
            normalize=recipe.normalize,
            reduction=recipe.reduction,
            backend=self.backend,
            group=parallel.group(),
        )

    def loss(
        self, variant: Variant, student: Embedder, teacher: Embedder, partner: nn.Module | None = None
    ) -> Callable[[Tensor, Tensor], Losses]:
        """Return Eq. 7 with the variant's correlation term. ``partner`` is trained with it."""
        recipe = self.recipe
        kd = KDLoss(recipe.temperature, backend=self.backend)
        cc = self.congruence(variant)
        sp = SimilarityPreservingLoss(backend=self.backend, group=parallel.group())
        at, dml = AttentionTransferLoss(), DMLLoss(backend=self.backend)

        def loss(images: Tensor, labels: Tensor) -> Losses:
            logits, embedding, stages = student(images)
            if variant.loss == "dml":
                losses = dml([logits, partner(images)[0]], labels)
                return {"loss": losses.sum(), "dml": losses[0]}
            losses = {"ce": self.task_loss(logits, embedding, labels)}
            if variant.loss == "ce":
                return losses | {"loss": losses["ce"]}
            with torch.no_grad():
                teacher_logits, teacher_embedding, teacher_stages = teacher(images)
            if recipe.instance == "mimic":
                losses["mimic"] = mimic_loss(embedding, teacher_embedding)
            else:
                losses["kd"] = kd(logits, teacher_logits)
            total = recipe.alpha * losses["ce"] + (1 - recipe.alpha) * losses[recipe.instance]
            # Recorded for every student, as in Fig. 3 of the paper. Only students of CCKD learn from it.
            losses["cc"] = cc(embedding, teacher_embedding)
            if variant.loss == "cc":
                total = total + recipe.beta * losses["cc"]
            if variant.loss == "sp":
                losses["sp"] = sp(stages[-1], teacher_stages[-1])
                total = total + recipe.sp * losses["sp"]
            if variant.loss == "at":
                losses["at"] = at(stages[-2:], teacher_stages[-2:])
                total = total + recipe.at * losses["at"]
            if variant.loss == "adv":  # its two losses train different weights, so one step serves both
                losses["adv"] = parallel.over_all(partner, embedding, teacher_embedding)
                everyone = parallel.rows_of_all(embedding, teacher_embedding)
                total = total + recipe.adv * losses["adv"] + partner.discriminator_loss(*everyone)
            return losses | {"loss": total}

        return loss

    def head_settings(self) -> dict[str, object]:
        """Return the settings of the task's loss that CE does not have."""
        recipe = self.recipe
        settings: dict[str, object] = {}
        if recipe.head == "arcface":
            settings |= {"head": "arcface", "scale": recipe.scale, "margin": recipe.margin}
        if recipe.triplet:
            settings |= {"triplet": recipe.triplet, "triplet_margin": recipe.triplet_margin}
        return settings

    def settings(self, variant: Variant, teacher: Embedder) -> dict[str, object]:
        """Return only the settings that a student depends on, so that runs of other variants stay valid when a setting
        changes.
        """
        recipe = self.recipe
        settings = {
            "network": recipe.student,
            "features": recipe.features,
            "share": recipe.share,
            "sampler": variant.sampler,
        } | self.head_settings()
        if variant.sampler != "uniform":
            settings["samples"] = recipe.samples
        if variant.sampler == "sur":
            settings["superclasses"] = recipe.superclasses
        if variant.loss == "dml":
            return settings | {"loss": "dml", "peer": recipe.teacher, "backend": self.backend}
        if variant.loss != "ce":
            settings |= {
                "teacher": training.fingerprint(teacher),
                "alpha": recipe.alpha,
                "temperature": recipe.temperature,
                "backend": self.backend,
                "gamma": recipe.gamma,
                "reduction": recipe.reduction,
                "normalize": recipe.normalize,
            }
        if variant.loss == "cc":
            settings |= {"beta": recipe.beta, "kernel": variant.kernel, "order": variant.order}
        if variant.loss != "ce" and recipe.coefficients:
            settings["coefficients"] = recipe.coefficients
        if variant.loss != "ce" and recipe.instance == "mimic":
            settings["instance"] = "mimic"
        if variant.loss in ("sp", "at", "adv"):
            settings[variant.loss] = getattr(recipe, variant.loss)
        return settings

    def sampler(self, name: str, seed: int, teacher: Embedder) -> ClassUniformSampler | None:
        """Return a sampler of batches with ``samples`` images per class or superclass. None draws as many images
        uniformly.
        """
        recipe = self.recipe
        whole = {"rank": 0, "world_size": 1}  # processes share each batch
        if name == "uniform":
            return None
        if name == "sur":
            superclasses = min(recipe.superclasses, len(self.few.train))
            groups = min(self.groups, superclasses)
            embeddings = self.embeddings(teacher, self.few.train)
            return SuperclassUniformSampler(embeddings, superclasses, groups, recipe.samples, seed=seed, **whole)
        return ClassUniformSampler(self.few.train.labels, self.groups, recipe.samples, seed=seed, **whole)

    def embedder(self, name: str, pretrained: bool = False) -> Embedder:
        scale = self.recipe.scale if self.recipe.head == "arcface" else None
        network = self.network(name)
        if pretrained:
            try:
                training.load_trunk(network, networks.weights_file(self.weights[name]))
            except ValueError as error:
                raise DataError(str(error)) from error
        return Embedder(network, self.recipe.features, scale).to(self.device)

    @torch.no_grad()
    def embeddings(self, network: Embedder, images: Images) -> Tensor:
        """Return the embeddings of images without augmentation, on the CPU."""
        return torch.cat([network(batch)[1].cpu() for batch in self.dataset.views(images, self.device)])

    def evaluate(self, network: Embedder) -> dict[str, float]:
        """Return the accuracy, or how well the embeddings find images of unseen classes, persons or faces."""
        if self.unseen is None:
            return self.measure(lambda images: network(images)[0])
        accuracy = {}
        if not isinstance(self.dataset, (Persons, Faces)):  # they have no test images of the classes they learn
            accuracy["test_accuracy"] = self.measure(lambda images: network(images)[0])["test_accuracy"]
        test = self.unseen.test
        embeddings = self.embeddings(network, test)
        if isinstance(self.unseen, Persons):
            gallery = self.unseen.gallery
            found = self.embeddings(network, gallery)
            return re_identification((embeddings, test.labels, test.cameras), (found, gallery.labels, gallery.cameras))
        if self.distractors is None:
            return retrieval(embeddings, test.labels) | accuracy
        others = self.embeddings(network, self.distractors)
        return identification(embeddings, test.labels, others, powers_of_ten(len(others))) | accuracy

    def report(self, teacher: Embedder, of_teacher: Mapping[str, float], runs: Runs) -> None:
        """Write tables, results.json and figures, and print the tables."""
        measures = self.measures
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
        self.draw(teacher, of_teacher, runs)
        recipe = self.recipe
        self.write(
            content,
            tables,
            f"Teacher: {recipe.teacher}. Students: {recipe.student}, after the last epoch,\nmean ± standard deviation "
            f"over {recipe.seeds} seeds. Batches are class-uniform unless said otherwise.",
        )

    def draw(self, teacher: Embedder, of_teacher: Mapping[str, float], runs: Runs) -> None:
        """Draw loss curves (the paper's Fig. 3) and cosines within and between classes (Fig. 4)."""
        shown = {label: runs[variant.name] for label, variant in STUDIES["methods"].items() if variant.name in runs}
        if not shown:
            return
        measure, title = next(iter(self.measures.items()))
        instance = {"kd": "KL divergence (KD)", "mimic": "squared distance (L2 mimic)"}[self.recipe.instance]
        figures.curves(
            self.out / "figures" / "curves.png",
            {label: [history for _, history in of_method] for label, of_method in shown.items()},
            [(self.recipe.instance, instance), ("cc", "correlation congruence (Eq. 6)"), (measure, title)],
            log=(self.recipe.instance, "cc"),
            zoom=(measure,),
            level=(measure, "teacher", of_teacher[measure]),
        )
        self.draw_cosines({"teacher": teacher, **{label: of_method[0][0] for label, of_method in shown.items()}})

    def draw_cosines(self, shown: Mapping[str, Embedder], classes: int = 10, images: int = 8) -> None:
        """Draw cosines between the embeddings of some test images per class, sorted by class (the paper's Fig. 4). The
        means within and between classes are over all test images. Only the first seed is drawn.
        """
        dataset = self.unseen or self.dataset
        test, labels = dataset.test, dataset.test.labels.unique()[:classes].tolist()
        some = torch.cat([(test.labels == label).nonzero()[:images, 0] for label in labels])
        names = [str(n) if isinstance(dataset, (Persons, Faces)) else dataset.class_names[n] for n in labels]
        panels = {}
        for name, network in shown.items():
            embeddings = self.embeddings(network, test)
            within, between = mean_cosines(embeddings, test.labels)
            unit = F.normalize(embeddings[some])
            panels[f"{name}: {within:.2f} within, {between:.2f} between"] = (unit @ unit.T).numpy()
        figures.matrices(self.out / "figures" / "cosines.png", panels, names, "cosine of embeddings")


def checkpoint(variant: Variant, seed: int) -> str:
    return f"{variant.name}-seed{seed}"


def mean_cosines(embeddings: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the mean cosine between different images of one class, and between images of different classes."""
    unit = F.normalize(embeddings)
    cosines = unit @ unit.T
    same = labels[:, None] == labels
    different_image = ~torch.eye(len(labels), dtype=torch.bool)
    return cosines[same & different_image].mean().item(), cosines[~same].mean().item()


def build_parser() -> argparse.ArgumentParser:
    parser, group = options.new_parser(__doc__, Path("runs/cckd"), RECIPES, sets=(*data.SETS, *data.PEOPLE))
    parser.add_argument("--task", choices=TASKS, help="default: the task of the data, mostly classification")
    parser.add_argument("--study", choices=["all", *STUDIES], default="all", help="default: %(default)s")
    add = partial(options.add_recipe_flag, group, RECIPES)
    count = options.positive_int
    options.add_shared_flags(group, RECIPES, networks.NETWORKS)
    add("--features", count, "features of the embeddings", lambda r: r.features, metavar="N")
    add("--seen", options.share, "share of the classes that are seen in the retrieval task", lambda r: r.seen)
    add("--alpha", float, "weight of CE against KD", lambda r: r.alpha)
    add("--beta", float, "weight of CC", lambda r: r.beta)
    add("--gamma", options.positive, "of the Gaussian", lambda r: r.gamma)
    add("--sp", float, "weight of SP", lambda r: r.sp)
    add("--at", float, "weight of AT", lambda r: r.at)
    add("--adv", float, "weight of Adv", lambda r: r.adv)
    add("--head", str, "CE of a linear layer, or ArcFace", lambda r: r.head, choices=["linear", "arcface"])
    add("--scale", options.positive, "s of ArcFace", lambda r: r.scale)
    add("--margin", float, "m of ArcFace, in radians", lambda r: r.margin)
    add("--triplet", float, "weight of the batch-hard triplet loss beside CE or ArcFace", lambda r: r.triplet)
    add("--triplet-margin", float, "margin of the triplet loss", lambda r: r.triplet_margin)
    add("--instance", str, "KD of logits, or L2 mimic of embeddings", lambda r: r.instance, choices=["kd", "mimic"])
    add("--coefficients", float, "of Eq. 8, in place of Taylor's", lambda r: r.coefficients, nargs="+", metavar="A")
    add("--samples", count, "images of each class in a class-uniform batch", lambda r: r.samples, metavar="N")
    add("--superclasses", count, "clusters of the teacher's embeddings", lambda r: r.superclasses, metavar="N")
    return parser


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """Return the requested recipe, with the values of the given flags."""
    return options.recipe_of(arguments, RECIPES)


if __name__ == "__main__":
    main()
