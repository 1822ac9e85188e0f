"""Cross-layer distillation with semantic calibration (SemCKD) between unlike networks, from a teacher to tables.

Trains a teacher, then students by

    loss = CE + KD + beta * L                                             (Eq. 3)

where L compares feature maps: a hint on one pair of layers (FitNet), attention maps layer by layer (AT), similarities
of the last layer (SP), or all pairs of layers as far as a learned attention associates them (SemCKD, and SemCKD-tau
with a softened attention); beside cross-entropy alone (CE) and with KD. The maps are captured by hooks: the networks do
not know of the losses. Studies, each over several seeds:

    methods     accuracy of every method, and how well associated layers match (Tables 2 and 5)
    beta        accuracy of SemCKD against beta (Fig. 7)
    few-shot    accuracy with fewer training images (Table 7)
    noisy       accuracy with wrong labels among the training images (Table 8)

Writes tables, every number of every epoch as JSON, and figures. Every epoch ends with a checkpoint: however a run was
interrupted, the same command goes on from there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
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
from kdkernels.metrics import average_relative_improvement, linear_cka, semantic_mismatch_score
from kdkernels.nn import (
    AttentionTransferLoss,
    CorrelationCongruenceLoss,
    FeatureCapture,
    HintLoss,
    KDLoss,
    ProbabilisticTransferLoss,
    RelationalKDLoss,
    SemanticCalibration,
    SemCKDLoss,
    SimilarityPreservingLoss,
)


@dataclass(frozen=True)
class Recipe:
    teacher: str
    student: str
    teacher_schedule: Schedule
    student_schedule: Schedule
    share: float  # of the training images, for the students; the teacher sees all
    temperature: float  # of KD
    tau: float  # of SemCKD-tau's attention
    beta_fitnet: float
    beta_at: float
    beta_sp: float
    beta_pkt: float
    beta_rkd: float
    beta_cc: float
    beta: float  # of SemCKD
    seeds: int
    betas: tuple[float, ...]
    shares: tuple[float, ...]
    noises: tuple[float, ...]


# The demo's betas were chosen from a few values with --validate and one or two seeds; the paper's, for wide networks,
# stop these from learning.
RECIPES = {
    "demo": Recipe(
        teacher="resnet14-half",
        student="vgg8-eighth",
        teacher_schedule=Schedule(epochs=30, lr=0.1, milestones=(12, 18, 24)),
        student_schedule=Schedule(epochs=40, lr=0.05, milestones=(25, 30, 35)),
        share=0.25,
        temperature=4.0,
        tau=4.0,
        beta_fitnet=10.0,
        beta_at=0.1,
        beta_sp=100.0,
        beta_pkt=1000.0,
        beta_rkd=1.0,
        beta_cc=10.0,
        beta=50.0,
        seeds=3,
        betas=(0.0, 5.0, 50.0, 200.0),
        shares=(0.1, 0.25, 0.5, 1.0),
        noises=(0.0, 0.1, 0.3, 0.5),
    ),
    # The paper names Nesterov's momentum; its published program has the plain one, as here.
    "paper": Recipe(
        teacher="resnet32x4",
        student="vgg8",
        teacher_schedule=Schedule(epochs=240, lr=0.05, milestones=(150, 180, 210)),
        student_schedule=Schedule(epochs=240, lr=0.05, milestones=(150, 180, 210)),
        share=1.0,
        temperature=4.0,
        tau=4.0,
        beta_fitnet=100.0,
        beta_at=1000.0,
        beta_sp=3000.0,
        beta_pkt=30000.0,
        beta_rkd=1.0,
        beta_cc=0.02,
        beta=400.0,
        seeds=4,
        betas=(0.0, *(100.0 * step for step in range(1, 12))),
        shares=(0.25, 0.5, 0.75, 1.0),
        noises=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
    ),
}
LOW_LR = ("mobilenetv2", "shufflenetv1", "shufflenetv2")  # start at a learning rate of 0.01 in the paper


class Method(NamedTuple):
    """Which terms of Eq. 3 a method has: KD, and a transfer of feature maps whose factor is called ``beta``."""

    kd: bool = True
    transfer: str | None = None
    beta: str = ""
    softened: bool = False
    before_relu: bool = False
    without: tuple[tuple[str, object], ...] = ()  # settings of SemanticCalibration that take a part of it away


METHODS = {
    "CE": Method(kd=False),
    "KD": Method(),
    "FitNet": Method(transfer="hint", beta="beta_fitnet"),
    "AT": Method(transfer="attention maps", beta="beta_at"),
    "SP": Method(transfer="similarities", beta="beta_sp"),
    "SemCKD": Method(transfer="all pairs", beta="beta"),
    "SemCKD-tau": Method(transfer="all pairs", beta="beta", softened=True),
    "SemCKD-tau+pre": Method(transfer="all pairs", beta="beta", softened=True, before_relu=True),
    # Table 6
    "equal-allocation": Method(transfer="all pairs", beta="beta", without=(("allocation", "equal"),)),
    "shared-allocation": Method(transfer="all pairs", beta="beta", without=(("allocation", "shared"),)),
    "no-projection": Method(transfer="all pairs", beta="beta", without=(("projection", False),)),
    "no-mlp": Method(transfer="all pairs", beta="beta", without=(("mlp", False),)),
    "no-similarity": Method(transfer="all pairs", beta="beta", without=(("similarity", False),)),
    # Table 9
    "PKT": Method(transfer="embeddings", beta="beta_pkt"),
    "RKD": Method(transfer="embeddings", beta="beta_rkd"),
    "CC": Method(transfer="embeddings", beta="beta_cc"),
}
DEFAULT_METHODS = ["CE", "KD", "FitNet", "AT", "SP", "SemCKD", "SemCKD-tau"]
STUDIES = ("methods", "beta", "few-shot", "noisy")
HINT_LAYER = 1


class Setting(NamedTuple):
    """What a student is trained by and on."""

    method: str
    share: float
    noise: float = 0.0
    beta: float | None = None  # the recipe's


class Transfer(NamedTuple):
    """A loss on feature maps, what it trains beside the student, and the layers it associates."""

    module: nn.Module
    loss: Callable[[list[Tensor], list[Tensor]], Tensor]
    pairs: list[tuple[int, int]]


class Runs(NamedTuple):
    """The histories of a setting's seeds."""

    setting: Setting
    histories: list[History]

    @property
    def accuracies(self) -> list[float]:
        return [history[-1]["test_accuracy"] for history in self.histories]

    def late(self, key: str, epochs: int = 10) -> list[float]:
        """Each seed's mean over the last epochs (Table 5)."""
        return [mean(record[key] for record in history[-epochs:]) for history in self.histories]


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    conduct(parser, arguments, partial(CrossLayer, arguments, recipe_of(arguments)))


class CrossLayer(Experiment):
    """One data set, one teacher, and the students of every study."""

    def __init__(self, arguments: argparse.Namespace, recipe: Recipe, dataset: Dataset) -> None:
        super().__init__(arguments, dataset)
        self.recipe = recipe
        self.methods: list[str] = arguments.methods
        self.studies: list[str] = arguments.studies
        self.teacher_weights: Path | None = arguments.teacher_weights

    def run(self) -> None:
        self.introduce(self.dataset.only(self.recipe.share))
        teacher = self.teacher()
        settings = {study: self.settings(study) for study in self.studies}
        histories: dict[Setting, list[History]] = {}
        for seed in range(self.recipe.seeds):
            for setting in dict.fromkeys(setting for study in settings.values() for setting in study):
                histories.setdefault(setting, []).append(self.student(setting, seed, teacher))
        if parallel.rank() == 0:
            self.report(teacher, {study: [Runs(s, histories[s]) for s in chosen] for study, chosen in settings.items()})

    def settings(self, study: str) -> list[Setting]:
        """The students of a study."""
        recipe = self.recipe
        base = Setting("SemCKD", recipe.share)
        if study == "methods":
            return [base._replace(method=name) for name in self.methods]
        if study == "beta":
            # Without its loss, SemCKD is KD.
            choices = [base._replace(beta=beta) if beta else base._replace(method="KD") for beta in recipe.betas]
            return [s._replace(beta=None) if s.beta == recipe.beta else s for s in choices]
        if study == "few-shot":
            return [Setting(name, share) for name in self.methods for share in recipe.shares]
        return [Setting(name, recipe.share, noise) for name in self.methods for noise in recipe.noises]

    def teacher(self) -> StagedNetwork:
        """The trained, frozen teacher."""
        recipe = self.recipe
        if self.teacher_weights is not None:
            teacher = self.network(recipe.teacher)
            training.load_weights(teacher, self.teacher_weights)
        else:
            teacher, _ = self.classifier(
                f"teacher {recipe.teacher}", recipe.teacher, self.dataset, recipe.teacher_schedule, 0, "teacher"
            )
        return teacher.requires_grad_(False).eval()

    def student(self, setting: Setting, seed: int, teacher: StagedNetwork) -> History:
        """The history of a student."""
        torch.manual_seed(seed)
        recipe, method = self.recipe, METHODS[setting.method]
        student = self.network(recipe.student)
        dataset = self.dataset.only(setting.share).mislabelled(setting.noise)
        with capture(student, method) as own, capture(teacher, method) as theirs:
            transfer = self.transfer(method, student, teacher, own, theirs) if method.transfer else None
            trained = nn.ModuleDict({"student": student} | ({"transfer": transfer.module} if transfer else {}))
            return self.fit(
                f"{title(setting, recipe)} seed {seed}",
                trained,
                self.student_loss(setting, student, teacher, own, theirs, transfer),
                dataset,
                recipe.student_schedule,
                seed,
                f"{title(setting, recipe).lower().replace(' ', '-')}-seed{seed}",
                self.student_settings(setting, teacher) | {"seed": seed},
                evaluate=lambda: self.evaluate(student, teacher, own, theirs, transfer),
                drop_last=False,
            )

    def student_loss(
        self,
        setting: Setting,
        student: StagedNetwork,
        teacher: StagedNetwork,
        own: FeatureCapture,
        theirs: FeatureCapture,
        transfer: Transfer | None,
    ) -> Callable[[Tensor, Tensor], Losses]:
        """Eq. 3 with the method's terms."""
        kd = KDLoss(self.recipe.temperature, backend=self.backend)
        beta = self.beta(setting)

        def loss(images: Tensor, labels: Tensor) -> Losses:
            logits, _ = student(images)
            losses = {"ce": F.cross_entropy(logits, labels)}
            if METHODS[setting.method].kd:
                with torch.no_grad():
                    teacher_logits, _ = teacher(images)
                losses["kd"] = kd(logits, teacher_logits)
            total = sum(losses.values())
            if transfer is not None:
                losses["transfer"] = transfer.loss(own.features, theirs.features)
                total = total + beta * losses["transfer"]
            return losses | {"loss": total}

        return loss

    def beta(self, setting: Setting) -> float:
        return setting.beta if setting.beta is not None else getattr(self.recipe, METHODS[setting.method].beta, 0.0)

    def transfer(
        self,
        method: Method,
        student: StagedNetwork,
        teacher: StagedNetwork,
        own: FeatureCapture,
        theirs: FeatureCapture,
    ) -> Transfer:
        """The loss on feature maps that a method adds, with the layers it associates."""
        layers, targets = len(student.channels), len(teacher.channels)
        if method.transfer == "hint":
            hint = HintLoss(student.channels[HINT_LAYER], teacher.channels[HINT_LAYER], backend=self.backend)
            pairs = [(HINT_LAYER, HINT_LAYER)]
            return Transfer(hint.to(self.device), lambda s, t: hint(s[HINT_LAYER], t[HINT_LAYER]), pairs)
        if method.transfer == "attention maps":
            at, count = AttentionTransferLoss(), min(layers, targets)
            return Transfer(at, lambda s, t: at(s[:count], t[:count]), [(i, i) for i in range(count)])
        if method.transfer == "similarities":
            sp = SimilarityPreservingLoss(backend=self.backend, group=parallel.group())
            return Transfer(sp, lambda s, t: sp(s[-1], t[-1]), [(layers - 1, targets - 1)])
        if method.transfer == "embeddings":
            compare = self.embedding_loss(method)
            return Transfer(compare, lambda s, t: compare(s[0].mean((2, 3)), t[0].mean((2, 3))), [(0, 0)])
        shapes = student.channels, teacher.channels
        if ("similarity", False) in method.without:
            shapes = self.map_shapes(student, own), self.map_shapes(teacher, theirs)
        calibration = SemanticCalibration(
            *shapes,
            self.recipe.student_schedule.batch_size,
            temperature=self.recipe.tau if method.softened else 1.0,
            backend=self.backend,
            **dict(method.without),
        ).to(self.device)
        compare = SemCKDLoss(backend=self.backend, group=parallel.group())
        pairs = [(i, j) for i in range(layers) for j in range(targets)]
        return Transfer(calibration, lambda s, t: compare(*calibration(s, t)), pairs)

    def embedding_loss(self, method: Method) -> nn.Module:
        """Of what both classifiers see."""
        if method.beta == "beta_pkt":
            return ProbabilisticTransferLoss()
        if method.beta == "beta_rkd":
            return RelationalKDLoss(backend=self.backend)
        return CorrelationCongruenceLoss(backend=self.backend)

    @torch.no_grad()
    def map_shapes(self, network: StagedNetwork, maps: FeatureCapture) -> list[tuple[int, ...]]:
        """Channels, height and width of each captured map."""
        mode = network.training
        network.eval()(torch.zeros(1, *self.dataset.shape, device=self.device))
        network.train(mode)
        return [tuple(layer.shape[1:]) for layer in maps.features]

    def student_settings(self, setting: Setting, teacher: StagedNetwork) -> dict[str, object]:
        """What a student depends on, and nothing else: runs of other methods stay valid when a setting changes."""
        recipe, method = self.recipe, METHODS[setting.method]
        settings = {"network": recipe.student, "share": setting.share, "noise": setting.noise}
        if method.kd:
            settings |= {
                "teacher": training.fingerprint(teacher),
                "temperature": recipe.temperature,
                "backend": self.backend,
            }
        if method.transfer:
            settings |= {"transfer": method.transfer, "beta": self.beta(setting), "before_relu": method.before_relu}
        if method.softened:
            settings |= {"tau": recipe.tau}
        if method.without or method.transfer == "embeddings":
            settings |= {"method": setting.method}
        return settings

    def evaluate(
        self,
        student: StagedNetwork,
        teacher: StagedNetwork,
        own: FeatureCapture,
        theirs: FeatureCapture,
        transfer: Transfer | None,
    ) -> dict:
        """Accuracy; and of a batch of test images the attention, and how well the associated layers match (Table 5)."""
        measured = self.measure(lambda images: student(images)[0])
        if transfer is None:
            return measured
        pixels = self.dataset.test.pixels[: self.recipe.student_schedule.batch_size]
        images = self.dataset.normalise(pixels.to(self.device))
        student(images), teacher(images)
        features = own.features, theirs.features
        similarities = [kdkernels.similarity_matrices(maps, backend=self.backend) for maps in features]
        attention = None
        if isinstance(transfer.module, SemanticCalibration):
            attention = transfer.module(*features).attention
            measured["attention"] = attention.mean(0).tolist()
        mismatch = semantic_mismatch_score(*similarities, attention, pairs=transfer.pairs)
        weights = [1.0 if attention is None else measured["attention"][i][j] for i, j in transfer.pairs]
        alike = [linear_cka(features[0][i], features[1][j]).item() for i, j in transfer.pairs]
        return measured | {"log_sm_score": mismatch.log().item(), "cka": float(np.average(alike, weights=weights))}

    def report(self, teacher: StagedNetwork, studies: dict[str, list[Runs]]) -> None:
        """Write the tables, results.json and the figures, and print the tables."""
        recipe = self.recipe
        accuracy = self.measure(lambda images: teacher(images)[0])["test_accuracy"]
        content = {
            "recipe": asdict(recipe),
            "data": self.data_settings,
            "parameters": {
                "teacher": networks.parameter_count(teacher),
                "student": networks.parameter_count(self.network(recipe.student)),
            },
            "test_accuracy": {"teacher": accuracy},
        }
        tables = []
        for study, runs in studies.items():
            content["test_accuracy"][study] = {title(r.setting, recipe): r.accuracies for r in runs}
            if study == "methods":
                tables += self.report_methods(runs, accuracy, content)
            elif study == "beta":
                heads = [f"{self.beta(r.setting):g}" for r in runs]
                tables.append(results.grid("beta", {"SemCKD": [r.accuracies for r in runs]}, heads))
                self.draw_beta(runs)
            else:
                few = study == "few-shot"
                values = recipe.shares if few else recipe.noises
                rows = {name: [r.accuracies for r in runs if r.setting.method == name] for name in self.methods}
                head = "share of the training images" if few else "share of wrong labels"
                tables.append(results.grid(head, rows, [f"{100 * value:g} %" for value in values]))
        text = results.report(tables)
        training.write_json(self.out / "results.json", content | {"tables": tables})
        training.replace_file(self.out / "tables.md", lambda path: path.write_text(text + "\n"))
        print(f"\n{text}\n\nStudents: {recipe.student}, accuracy after the last epoch in percent, mean ± deviation.")
        print(f"Tables, numbers and figures are in {self.out}; the same command prints this again without training.")

    def report_methods(self, runs: list[Runs], teacher_accuracy: float, content: dict) -> list[results.Table]:
        """Tables 2 and 5, the figures of training and of the attention; further numbers go into ``content``."""
        accuracies = {r.setting.method: r.accuracies for r in runs}
        transferring = {r.setting.method: r for r in runs if METHODS[r.setting.method].transfer}
        match = {name: [r.late("log_sm_score"), r.late("cka")] for name, r in transferring.items()}
        content["layer match"] = {name: dict(zip(("log_sm_score", "cka"), m, strict=True)) for name, m in match.items()}
        if {"SemCKD", "CE"} <= accuracies.keys():
            content["relative improvement of SemCKD, %"] = {
                name: average_relative_improvement(*([mean(accuracies[key])] for key in ("SemCKD", name, "CE")))
                for name in accuracies.keys() - {"SemCKD", "CE"}
            }
        self.draw_methods(runs, teacher_accuracy)
        tables = [results.table((self.recipe.teacher, teacher_accuracy), accuracies, baseline="KD")]
        if match:
            tables.append(results.grid("match of associated layers", match, ["log SM-score (low)", "CKA (high)"]))
        return tables

    def draw_methods(self, runs: list[Runs], teacher_accuracy: float) -> None:
        folder = self.out / "figures"
        histories = {r.setting.method: r.histories for r in runs}
        figures.curves(
            folder / "curves.png",
            histories,
            [
                ("test_accuracy", "test accuracy, %"),
                ("log_sm_score", "mismatch of associated layers, log SM-score"),
                ("cka", "their likeness, CKA"),
            ],
            zoom=("test_accuracy",),
            level=("test_accuracy", "teacher", teacher_accuracy),
        )
        attention = {
            name: np.array([[record["attention"] for record in history] for history in run])
            for name, run in histories.items()
            if "attention" in run[0][0]
        }
        if attention:
            figures.attention(folder / "attention.png", attention)

    def draw_beta(self, runs: list[Runs]) -> None:
        level = next((r.accuracies for r in runs if r.setting.method == "KD"), None)
        figures.against(
            self.out / "figures" / "beta.png",
            [self.beta(r.setting) for r in runs if r.setting.method != "KD"],
            {"SemCKD": [r.accuracies for r in runs if r.setting.method != "KD"]},
            "beta",
            "test accuracy, %",
            level=("KD", mean(level)) if level else None,
        )


def capture(network: StagedNetwork, method: Method) -> FeatureCapture:
    """The maps at the end of each stage, by the stages' names, or the one that is averaged to the embedding."""
    names = [f"stages.{index}" for index in range(len(network.channels))]
    if method.transfer == "embeddings":
        names = ["tail"]
    return FeatureCapture(network, names, before_relu=method.before_relu)


def title(setting: Setting, recipe: Recipe) -> str:
    """The method, and what differs from the recipe."""
    parts = [setting.method]
    if setting.beta is not None:
        parts.append(f"beta {setting.beta:g}")
    if setting.share != recipe.share:
        parts.append(f"share {setting.share:g}")
    if setting.noise:
        parts.append(f"noise {setting.noise:g}")
    return " ".join(parts)


def build_parser() -> argparse.ArgumentParser:
    parser, group = options.new_parser(__doc__, Path("runs/semckd"), RECIPES)
    add = partial(options.add_recipe_flag, group, RECIPES)
    count, name = options.positive_int, {"choices": networks.NETWORKS, "metavar": "NAME"}
    add("--teacher", str, "teacher network", lambda r: r.teacher, **name)
    add("--student", str, "student network", lambda r: r.student, **name)
    add("--seeds", count, "number of students per setting, with seeds 0, 1, ...", lambda r: r.seeds, metavar="N")
    add("--epochs", count, "epochs of a student", lambda r: r.student_schedule.epochs, metavar="N")
    add("--teacher-epochs", count, "epochs of the teacher", lambda r: r.teacher_schedule.epochs, metavar="N")
    add("--batch-size", count, "images per batch", lambda r: r.student_schedule.batch_size, metavar="N")
    add("--lr", options.positive, "first learning rate of teacher and students", lambda r: r.student_schedule.lr)
    add("--share", options.share, "share of the training images that students see", lambda r: r.share)
    add("--temperature", options.positive, "temperature of KD", lambda r: r.temperature)
    add("--tau", options.positive, "temperature of SemCKD-tau's attention", lambda r: r.tau)
    add("--beta", float, "factor of SemCKD", lambda r: r.beta)
    add("--beta-fitnet", float, "factor of FitNet's hint", lambda r: r.beta_fitnet)
    add("--beta-at", float, "factor of AT", lambda r: r.beta_at)
    add("--beta-sp", float, "factor of SP", lambda r: r.beta_sp)
    add("--beta-pkt", float, "factor of PKT", lambda r: r.beta_pkt)
    add("--beta-rkd", float, "factor of RKD", lambda r: r.beta_rkd)
    add("--beta-cc", float, "factor of CC", lambda r: r.beta_cc)
    several = {"nargs": "+", "metavar": "X"}
    add("--betas", float, "of the study beta; 0 is KD", lambda r: values(r.betas), **several)
    add("--shares", options.share, "of the study few-shot", lambda r: values(r.shares), **several)
    add("--noises", options.share, "of the study noisy", lambda r: values(r.noises), **several)
    group.add_argument(
        "--methods", nargs="+", choices=METHODS, default=DEFAULT_METHODS, help=f"default: {' '.join(DEFAULT_METHODS)}"
    )
    group.add_argument(
        "--studies", nargs="+", choices=STUDIES, default=["methods", "beta"], help="default: methods and beta"
    )
    group.add_argument("--teacher-weights", type=Path, metavar="FILE", help="load the teacher instead of training it")
    return parser


def values(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The recipe asked for with the flags that were given in place of its values."""
    recipe = options.recipe_of(arguments, RECIPES)

    def schedule(of_recipe: Schedule, network: str, epochs: int | None) -> Schedule:
        shape = of_recipe.lasting(epochs or of_recipe.epochs)
        lr = arguments.lr or (0.01 if network in LOW_LR else shape.lr)
        return replace(shape, lr=lr, batch_size=arguments.batch_size or shape.batch_size)

    return replace(
        recipe,
        teacher_schedule=schedule(recipe.teacher_schedule, recipe.teacher, arguments.teacher_epochs),
        student_schedule=schedule(recipe.student_schedule, recipe.student, arguments.epochs),
    )


if __name__ == "__main__":
    main()
