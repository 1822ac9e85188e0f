"""Cross-layer distillation with semantic calibration (SemCKD) between different architectures, from a teacher to
tables.

The program trains a teacher, then students with

    loss = CE + KD + beta * L                                             (Eq. 3)

where L compares feature maps: a hint on one pair of layers (FitNet), attention maps layer by layer (AT), similarities
of the last layer (SP), channels that match (MGD), affinities at every layer of an auxiliary network (HKD), or all pairs
of layers, weighted by a learned attention (SemCKD, and SemCKD-tau with a softened attention). PKT, RKD, IRG, CC and CRD
compare embeddings, and SemCKD+CRD adds both losses. Only cross-entropy (CE), and cross-entropy with KD, are trained
too. Hooks capture the maps, so the networks do not change. Studies, each over several seeds:

    methods     accuracy of every method, how well associated layers match (Tables 2 and 5), SemCKD's improvement
                (Fig. 2) and Grad-CAM (Fig. 4)
    pairs       accuracy with one pair of layers, for all pairs (Fig. 3)
    tau         accuracy of SemCKD-tau against the softness of its attention (Fig. 5)
    transfer    accuracy of linear classifiers on the students' features of --transfer-data (Fig. 6)
    beta        accuracy of SemCKD and of CRD against beta (Fig. 7)
    few-shot    accuracy with fewer training images (Table 7)
    noisy       accuracy with wrong labels among the training images (Table 8)

The program writes tables, every number of every epoch as JSON, and figures. Every epoch ends with a checkpoint: after
an interruption, the same command continues from there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from common import data, figures, networks, options, parallel, results, training
from common.data import DataError, Dataset
from common.experiment import Experiment, conduct
from common.networks import StagedNetwork
from common.probing import linear_accuracy, views_like
from common.training import History, Losses, Schedule
from torch import Tensor, nn

import kdkernels
from kdkernels.metrics import average_relative_improvement, linear_cka, semantic_mismatch_score
from kdkernels.nn import (
    AttentionTransferLoss,
    CorrelationCongruenceLoss,
    CRDLoss,
    FeatureCapture,
    HintLoss,
    HKDLoss,
    IRGLoss,
    KDLoss,
    MGDLoss,
    ProbabilisticTransferLoss,
    RelationalKDLoss,
    SemanticCalibration,
    SemCKDLoss,
    SimilarityPreservingLoss,
    VIDLoss,
)


@dataclass(frozen=True)
class Recipe:
    teacher: str
    student: str
    teacher_schedule: Schedule
    student_schedule: Schedule
    share: float  # of the training images for the students; the teacher sees all
    temperature: float  # of KD
    tau: float  # of the attention of SemCKD-tau
    beta_fitnet: float
    beta_at: float
    beta_sp: float
    beta_vid: float
    beta_pkt: float
    beta_rkd: float
    beta_cc: float
    beta: float  # of SemCKD
    reduction: str  # of the errors over samples and layers, see SemCKDLoss
    seeds: int
    betas: tuple[float, ...]
    taus: tuple[float, ...]
    shares: tuple[float, ...]
    noises: tuple[float, ...]
    # As in the authors' programs. SemCKD's paper and program have no factor for MGD: here MGD's own, for 224 pixels.
    beta_hkd: float = 1.0
    beta_mgd: float = 1e-4
    beta_irg: float = 0.005
    beta_crd: float = 0.8  # also in SemCKD+CRD
    betas_crd: tuple[float, ...] = ()
    negatives: int = 16384  # of CRD, for each image


# The demo's betas were chosen from a few values with --validate and one or two seeds. With the paper's betas for wide
# networks, these networks do not learn.
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
        beta_vid=1.0,
        beta_pkt=1000.0,
        beta_rkd=1.0,
        beta_cc=10.0,
        beta=50.0,
        reduction="mean",
        seeds=3,
        betas=(0.0, 5.0, 50.0, 200.0),
        taus=(0.5, 1.0, 2.0, 4.0, 8.0),
        shares=(0.1, 0.25, 0.5, 1.0),
        noises=(0.0, 0.1, 0.3, 0.5),
        negatives=128,
    ),
    # The paper names Nesterov momentum. Its published program and this example use plain momentum.
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
        beta_vid=1.0,
        beta_pkt=30000.0,
        beta_rkd=1.0,
        beta_cc=0.02,
        beta=400.0,
        reduction="mean",
        seeds=4,
        betas=(0.0, *(100.0 * step for step in range(1, 12))),
        betas_crd=tuple(step / 10 for step in range(5, 16)),
        taus=(0.5, 1.0, 2.0, 4.0, 8.0),
        shares=(0.25, 0.5, 0.75, 1.0),
        noises=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
    ),
}
RECIPES["imagenet"] = replace(
    RECIPES["paper"],
    teacher="resnet34-224",
    student="shufflenetv2-half-224",
    teacher_schedule=Schedule(90, 0.1, (30, 60), batch_size=256, weight_decay=1e-4),
    student_schedule=Schedule(90, 0.1, (30, 60), batch_size=256, weight_decay=1e-4),
    seeds=1,
)
LOW_LR = ("mobilenetv2", "shufflenetv1", "shufflenetv2")  # with an initial learning rate of 0.01 in the paper


class Method(NamedTuple):
    """The terms of Eq. 3 that a method has: KD, a transfer of feature maps, and CRD. ``beta`` is the factor of the
    transfer, or of CRD where no maps are transferred.
    """

    kd: bool = True
    transfer: str | None = None
    beta: str = ""
    softened: bool = False
    before_relu: bool = False
    without: tuple[tuple[str, object], ...] = ()  # settings of SemanticCalibration that remove a part of it
    contrast: bool = False  # CRD


METHODS = {
    "CE": Method(kd=False),
    "KD": Method(),
    "FitNet": Method(transfer="hint", beta="beta_fitnet"),
    "AT": Method(transfer="attention maps", beta="beta_at"),
    "SP": Method(transfer="similarities", beta="beta_sp"),
    "VID": Method(transfer="variational", beta="beta_vid"),
    "HKD": Method(transfer="affinities", beta="beta_hkd"),
    "MGD": Method(transfer="matched channels", beta="beta_mgd"),
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
    "IRG": Method(transfer="embeddings", beta="beta_irg"),
    "CC": Method(transfer="embeddings", beta="beta_cc"),
    "CRD": Method(beta="beta_crd", contrast=True),
    "SemCKD+CRD": Method(transfer="all pairs", beta="beta", contrast=True),
}
SOFTENED = ("SemCKD-tau", "SemCKD-tau+pre")
DEFAULT_METHODS = ["CE", "KD", "FitNet", "AT", "SP", "SemCKD", "SemCKD-tau"]
STUDIES = ("methods", "pairs", "tau", "transfer", "beta", "few-shot", "noisy")
HINT_LAYER = 1
MATCH_EVERY = 2  # epochs between two assignments of channels, as in MGD's program
IMPROVEMENT = "relative improvement of SemCKD, %"  # in results.json


class Setting(NamedTuple):
    """The method and the data of a student."""

    method: str
    share: float
    noise: float = 0.0
    beta: float | None = None  # None is the recipe's value
    tau: float | None = None
    pair: tuple[int, int] | None = None  # the student layer and the teacher layer that are compared; None is all


class Transfer(NamedTuple):
    """A loss on feature maps, the modules it trains beside the student, and the layers it associates."""

    module: nn.Module
    loss: Callable[[list[Tensor], list[Tensor]], Tensor]
    pairs: list[tuple[int, int]]


class NoMatchError(DataError):
    """No layers of student and teacher have the shapes that a method needs."""


class Contrast(nn.Module):
    """CRD of the inputs of both classifiers, against images of other classes, as in the authors' program."""

    def __init__(self, student: StagedNetwork, teacher: StagedNetwork, labels: Tensor, negatives: int) -> None:
        """``labels`` are the classes of the training images. Each image is compared with ``negatives`` others."""
        super().__init__()
        widths = [network.classifier.in_features for network in (student, teacher)]
        self.inputs = [FeatureCapture(network, "classifier", of="input") for network in (student, teacher)]
        self.labels = labels
        self.crd = CRDLoss(*widths, len(labels), negatives=negatives, group=parallel.group())
        fewest = len(labels) - labels.bincount().max().item()  # images of other classes
        self.repeated = negatives > fewest

    def forward(self, numbers: Tensor) -> Tensor:
        """Return the loss of the last forward pass, which saw the training images with these numbers."""
        student, teacher = (capture.features[0] for capture in self.inputs)
        # Every process draws for the whole batch, so that any number of processes draws the same.
        (everyone,) = parallel.rows_of_all(numbers)
        others = self.labels != self.labels[everyone, None]
        drawn = others.float().multinomial(self.crd.negatives, replacement=self.repeated)
        return self.crd(student, teacher, numbers, parallel.share(drawn))


class Runs(NamedTuple):
    """The histories of all seeds of a setting."""

    setting: Setting
    histories: list[History]

    @property
    def accuracies(self) -> list[float]:
        return [history[-1]["test_accuracy"] for history in self.histories]

    def late(self, key: str, epochs: int = 10) -> list[float]:
        """Return each seed's mean over the last epochs (Table 5)."""
        return [mean(record[key] for record in history[-epochs:]) for history in self.histories]


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    arguments = options.parse(parser, argv)
    target = None
    if "transfer" in arguments.studies:
        if arguments.transfer_data is None:
            parser.error("--studies transfer needs --transfer-data, for example stl10 with --transfer-root DIR")
        given = {"data": arguments.transfer_data, "root": arguments.transfer_root, "validate": False}
        target = options.load_data(parser, argparse.Namespace(**vars(arguments) | given))
    conduct(parser, arguments, partial(CrossLayer, arguments, recipe_of(arguments), target=target))


class CrossLayer(Experiment):
    """One data set, one teacher, and the students of every study."""

    def __init__(
        self, arguments: argparse.Namespace, recipe: Recipe, dataset: Dataset, target: Dataset | None = None
    ) -> None:
        """``target`` is the data set that the study transfer transfers to."""
        super().__init__(arguments, dataset)
        self.recipe = recipe
        self.methods: list[str] = arguments.methods
        self.studies: list[str] = arguments.studies
        self.other_runs: list[Path] = arguments.runs
        self.target = target

    def run(self) -> None:
        self.introduce(self.dataset.only(self.recipe.share))
        teacher = self.teacher()
        settings = {study: self.settings(study) for study in self.studies}
        wanted = dict.fromkeys(setting for study in settings.values() for setting in study)
        runs = [(setting, seed) for seed in range(self.recipe.seeds) for setting in wanted]
        histories: dict[Setting, list[History]] = {}
        for (setting, _), history in zip(runs, self.train_all(self.student, self.name, runs, teacher), strict=True):
            histories.setdefault(setting, []).append(history)
        if parallel.rank() == 0:
            self.report(teacher, {study: [Runs(s, histories[s]) for s in chosen] for study, chosen in settings.items()})

    def settings(self, study: str) -> list[Setting]:
        """Return the settings of a study."""
        recipe = self.recipe
        base = Setting("SemCKD", recipe.share)
        if study in ("methods", "transfer"):
            return [base._replace(method=name) for name in self.methods]
        if study == "pairs":
            own, theirs = (len(self.network(name).channels) for name in (recipe.student, recipe.teacher))
            pairs = [(i, j) for i in range(own) for j in range(theirs)]
            return [base._replace(method="KD"), base, *(base._replace(pair=pair) for pair in pairs)]
        if study == "tau":
            soft = [
                base._replace(method=name, tau=None if tau == recipe.tau else tau)
                for name in SOFTENED
                for tau in recipe.taus
            ]
            return [base, *soft]
        if study == "beta":
            choices = [("SemCKD", beta) for beta in recipe.betas] + [("CRD", beta) for beta in recipe.betas_crd]
            return list(dict.fromkeys(self.weighted(base, name, beta) for name, beta in choices))
        if study == "few-shot":
            return [Setting(name, share) for name in self.methods for share in recipe.shares]
        return [Setting(name, recipe.share, noise) for name in self.methods for noise in recipe.noises]

    def weighted(self, setting: Setting, method: str, beta: float) -> Setting:
        """Return the setting with a method and its factor. Without its loss, the method is KD."""
        if beta == 0:
            return setting._replace(method="KD")
        own = getattr(self.recipe, METHODS[method].beta)
        return setting._replace(method=method, beta=None if beta == own else beta)

    def teacher(self) -> StagedNetwork:
        """Return the trained, frozen teacher."""
        return self.taught_by(self.recipe.teacher, self.recipe.teacher_schedule)

    def name(self, setting: Setting, seed: int) -> str:
        """Return the name of a student's checkpoint."""
        return f"{title(setting, self.recipe).lower().replace(' ', '-')}-seed{seed}"

    def student(self, setting: Setting, seed: int, teacher: StagedNetwork) -> History:
        """Return the history of a student. HKD's student learns from an auxiliary network."""
        name = self.name(setting, seed)
        if setting.method == "HKD":
            wide = networks.DOUBLES.get(self.recipe.student)
            if wide is None:
                known = ", ".join(networks.DOUBLES)
                raise DataError(f"HKD needs a student with a network of twice the width, {known}: give --student")
            by_pkt = setting._replace(method="PKT")
            auxiliary, _ = self.taught(by_pkt, seed, teacher, wide, f"{name}-auxiliary")
            teacher = auxiliary.requires_grad_(False).eval()
        return self.taught(setting, seed, teacher, self.recipe.student, name)[1]

    def taught(
        self, setting: Setting, seed: int, teacher: StagedNetwork, network: str, name: str
    ) -> tuple[StagedNetwork, History]:
        """Return a network trained by a method, and its history. ``name`` is its checkpoint."""
        torch.manual_seed(seed)
        recipe, method = self.recipe, METHODS[setting.method]
        student = self.network(network)
        dataset = self.dataset.only(setting.share).mislabelled(setting.noise)
        with capture(student, method) as own, capture(teacher, method) as theirs:
            transfer = self.transfer(method, student, teacher, own, theirs, setting) if method.transfer else None
            contrast = self.contrast(student, teacher, dataset) if method.contrast else None
            modules = {"student": student, "transfer": transfer and transfer.module, "contrast": contrast}
            history = self.fit(
                f"{title(setting, recipe)} seed {seed}" + (f", {network}" if network != recipe.student else ""),
                nn.ModuleDict({key: module for key, module in modules.items() if module is not None}),
                self.student_loss(setting, student, teacher, own, theirs, transfer, contrast),
                dataset.numbered() if contrast else dataset,
                recipe.student_schedule,
                seed,
                name,
                self.student_settings(setting, teacher) | {"network": network, "seed": seed},
                evaluate=lambda: self.evaluate(student, teacher, own, theirs, transfer),
                drop_last=False,
                before_epoch=(
                    partial(self.match_channels, transfer, student, teacher, own, theirs, dataset)
                    if transfer and isinstance(transfer.module, MGDLoss)
                    else None
                ),
            )
        return student, history

    def contrast(self, student: StagedNetwork, teacher: StagedNetwork, dataset: Dataset) -> Contrast:
        labels = dataset.train.labels.to(self.device)
        return Contrast(student, teacher, labels, self.recipe.negatives).to(self.device)

    @torch.no_grad()
    def match_channels(
        self,
        transfer: Transfer,
        student: StagedNetwork,
        teacher: StagedNetwork,
        own: FeatureCapture,
        theirs: FeatureCapture,
        dataset: Dataset,
        epoch: int,
    ) -> None:
        """Assign the teacher's channels by all training images, before every second epoch."""
        if epoch % MATCH_EVERY:
            return
        student.eval()
        for images in dataset.views(dataset.train, self.device, self.recipe.student_schedule.batch_size):
            some = parallel.share(images)
            if len(some):
                student(some), teacher(some)
                transfer.module.track(*paired(own.features, theirs.features, transfer.pairs))
        transfer.module.assign()

    def student_loss(
        self,
        setting: Setting,
        student: StagedNetwork,
        teacher: StagedNetwork,
        own: FeatureCapture,
        theirs: FeatureCapture,
        transfer: Transfer | None,
        contrast: Contrast | None = None,
    ) -> Callable[[Tensor, Tensor], Losses]:
        """Return Eq. 3 with the terms of the method. With ``contrast``, it takes the numbers of the images in the
        training set in place of their labels.
        """
        kd = KDLoss(self.recipe.temperature, backend=self.backend)
        beta = self.beta(setting)

        def loss(images: Tensor, labels: Tensor) -> Losses:
            logits, _ = student(images)
            numbers = labels
            if contrast is not None:
                labels = contrast.labels[numbers]
            losses = {"ce": F.cross_entropy(logits, labels)}
            if METHODS[setting.method].kd:
                with torch.no_grad():
                    teacher_logits, _ = teacher(images)
                losses["kd"] = kd(logits, teacher_logits)
            total = sum(losses.values())
            if transfer is not None:
                losses["transfer"] = transfer.loss(own.features, theirs.features)
                total = total + beta * losses["transfer"]
            if contrast is not None:
                losses["contrast"] = contrast(numbers)
                total = total + self.beta_crd(setting) * losses["contrast"]
            return losses | {"loss": total}

        return loss

    def beta(self, setting: Setting) -> float:
        return setting.beta if setting.beta is not None else getattr(self.recipe, METHODS[setting.method].beta, 0.0)

    def beta_crd(self, setting: Setting) -> float:
        return self.recipe.beta_crd if METHODS[setting.method].transfer else self.beta(setting)

    def transfer(
        self,
        method: Method,
        student: StagedNetwork,
        teacher: StagedNetwork,
        own: FeatureCapture,
        theirs: FeatureCapture,
        setting: Setting | None = None,
    ) -> Transfer:
        """Return the loss on feature maps that a method adds, with the layers it associates. ``setting`` may name one
        pair of layers, or a softness.
        """
        layers, targets = len(student.channels), len(teacher.channels)
        if method.transfer == "variational":
            count = min(layers, targets)
            channels = zip(student.channels[:count], teacher.channels[:count], strict=True)
            vid = nn.ModuleList(VIDLoss(*pair) for pair in channels).to(self.device)
            return Transfer(
                vid,
                lambda s, t: sum(loss(a, b) for loss, a, b in zip(vid, s[:count], t[:count], strict=True)),
                [(i, i) for i in range(count)],
            )
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
        if method.transfer == "affinities":
            count = min(layers, targets)
            hkd = HKDLoss(weights=(100.0, *[1.0] * (count - 1)), group=parallel.group())  # SemCKD's program
            return Transfer(hkd, lambda s, t: hkd(s[:count], t[:count]), [(i, i) for i in range(count)])
        if method.transfer == "matched channels":
            pairs = matching(self.map_shapes(student, own), self.map_shapes(teacher, theirs))
            channels = [student.channels[i] for i, _ in pairs], [teacher.channels[j] for _, j in pairs]
            mgd = MGDLoss(*channels, group=parallel.group()).to(self.device)
            return Transfer(mgd, lambda s, t: mgd(*paired(s, t, pairs)), pairs)
        if method.transfer == "embeddings":
            compare = self.embedding_loss(method)
            return Transfer(compare, lambda s, t: compare(s[0].mean((2, 3)), t[0].mean((2, 3))), [(0, 0)])
        shapes = student.channels, teacher.channels
        if setting is not None and setting.pair is not None:  # the attention to a single layer is 1
            (i, j) = setting.pair
            one = SemanticCalibration(
                (student.channels[i],),
                (teacher.channels[j],),
                self.recipe.student_schedule.batch_size,
                backend=self.backend,
            ).to(self.device)
            mse = SemCKDLoss(reduction=self.recipe.reduction, backend=self.backend, group=parallel.group())
            return Transfer(one, lambda s, t: mse(*one([s[i]], [t[j]])), [setting.pair])
        if ("similarity", False) in method.without:
            shapes = self.map_shapes(student, own), self.map_shapes(teacher, theirs)
        without = dict(method.without)
        if without.get("allocation") == "shared" and parallel.world_size() > 1:
            raise DataError("shared-allocation needs one process: start it without torchrun")
        module = SemanticCalibration(
            *shapes,
            self.recipe.student_schedule.batch_size,
            temperature=((setting and setting.tau) or self.recipe.tau) if method.softened else 1.0,
            backend=self.backend,
            group=parallel.group(),
            **without,
        )
        calibration = module.to(self.device)
        compare = SemCKDLoss(reduction=self.recipe.reduction, backend=self.backend, group=parallel.group())
        pairs = [(i, j) for i in range(layers) for j in range(targets)]
        return Transfer(calibration, lambda s, t: compare(*calibration(s, t)), pairs)

    def embedding_loss(self, method: Method) -> nn.Module:
        """Return the loss of the inputs of both classifiers."""
        if method.beta == "beta_pkt":
            return ProbabilisticTransferLoss(group=parallel.group())
        if method.beta == "beta_rkd":
            return RelationalKDLoss(backend=self.backend, group=parallel.group())
        if method.beta == "beta_irg":
            return IRGLoss(group=parallel.group())
        return CorrelationCongruenceLoss(backend=self.backend, group=parallel.group())

    @torch.no_grad()
    def map_shapes(self, network: StagedNetwork, maps: FeatureCapture) -> list[tuple[int, ...]]:
        """Return channels, height and width of each captured map."""
        mode = network.training
        network.eval()(torch.zeros(1, *self.dataset.shape, device=self.device))
        network.train(mode)
        return [tuple(layer.shape[1:]) for layer in maps.features]

    def student_settings(self, setting: Setting, teacher: StagedNetwork) -> dict[str, object]:
        """Return only the settings that a student depends on, so that runs of other methods stay valid when a setting
        changes.
        """
        recipe, method = self.recipe, METHODS[setting.method]
        settings: dict[str, object] = {"share": setting.share, "noise": setting.noise}
        if method.kd:
            settings |= {
                "teacher": training.fingerprint(teacher),
                "temperature": recipe.temperature,
                "backend": self.backend,
            }
        if method.transfer:
            settings |= {"transfer": method.transfer, "beta": self.beta(setting), "before_relu": method.before_relu}
        if method.transfer == "all pairs":
            settings |= {"reduction": recipe.reduction}
        if method.softened:
            settings |= {"tau": setting.tau or recipe.tau}
        if setting.pair is not None:
            settings |= {"pair": setting.pair}
        if method.contrast:
            settings |= {"beta_crd": self.beta_crd(setting), "negatives": recipe.negatives}
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
        """Return the accuracy, and for a batch of test images the attention and the match of associated layers (Table
        5).
        """
        measured = self.measure(lambda images: student(images)[0])
        if transfer is None:
            return measured
        some = self.dataset.test[: self.recipe.student_schedule.batch_size]
        images = self.dataset.normalise(self.dataset.pixels(some).to(self.device))
        student(images), teacher(images)
        features = own.features, theirs.features
        similarities = [kdkernels.similarity_matrices(maps, backend=self.backend) for maps in features]
        attention = None
        if isinstance(transfer.module, SemanticCalibration) and len(transfer.pairs) > 1:
            group, transfer.module.group = transfer.module.group, None  # every process has the whole batch
            attention = transfer.module(*features).attention
            transfer.module.group = group
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
                self.draw_grad_cam(teacher, runs)
            elif study == "pairs":
                tables.append(self.report_pairs(runs))
            elif study == "tau":
                tables.append(self.report_tau(runs))
            elif study == "transfer":
                tables.append(self.report_transfer(teacher, runs, content))
            elif study == "beta":
                tables += self.report_betas(runs)
            else:
                few = study == "few-shot"
                values = recipe.shares if few else recipe.noises
                rows = {name: [r.accuracies for r in runs if r.setting.method == name] for name in self.methods}
                head = "share of the training images" if few else "share of wrong labels"
                tables.append(results.grid(head, rows, [f"{100 * value:g} %" for value in values]))
        below = f"Students: {recipe.student}, accuracy after the last epoch in percent, mean ± deviation."
        self.write(content, tables, below)

    def report_methods(self, runs: list[Runs], teacher_accuracy: float, content: dict) -> list[results.Table]:
        """Write Tables 2 and 5, and draw the training curves and the attention. More numbers go into ``content``."""
        accuracies = {r.setting.method: r.accuracies for r in runs}
        transferring = {r.setting.method: r for r in runs if METHODS[r.setting.method].transfer}
        match = {name: [r.late("log_sm_score"), r.late("cka")] for name, r in transferring.items()}
        content["layer match"] = {name: dict(zip(("log_sm_score", "cka"), m, strict=True)) for name, m in match.items()}
        if {"SemCKD", "CE"} <= accuracies.keys():
            content[IMPROVEMENT] = {
                name: average_relative_improvement(*([mean(accuracies[key])] for key in ("SemCKD", name, "CE")))
                for name in accuracies.keys() - {"SemCKD", "CE"}
            }
        self.draw_methods(runs, teacher_accuracy)
        self.draw_improvements(content.get(IMPROVEMENT, {}))
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

    def draw_improvements(self, own: dict[str, float]) -> None:
        """Draw SemCKD's relative improvement over each method, a point per run: this one and --runs (Fig. 2)."""
        found = [own, *map(improvements, self.other_runs)]
        names = [name for name in self.methods if any(name in run for run in found)]
        values = {name: [run[name] for run in found if np.isfinite(run.get(name, np.nan))] for name in names}
        values = {name: numbers for name, numbers in values.items() if numbers}
        if values:
            figures.points(self.out / "figures" / "improvement.png", values, "relative improvement of SemCKD, %")

    @torch.no_grad()
    def trained(self, setting: Setting, seed: int = 0) -> StagedNetwork:
        """Return a student from the checkpoint of this run."""
        weights = training.read(self.checkpoint(self.name(setting, seed)))["module"]
        student = self.network(self.recipe.student)
        student.load_state_dict(
            {key.removeprefix("student."): value for key, value in weights.items() if key.startswith("student.")}
        )
        return student.requires_grad_(False).eval()

    def draw_grad_cam(self, teacher: StagedNetwork, runs: list[Runs]) -> None:
        """Draw where each network sees the class, on the first test image of each of ten classes (Fig. 4). Students
        have the first seed.
        """
        test = self.dataset.test
        labels = test.labels.unique()[:10]
        shown = test[torch.stack([(test.labels == label).nonzero()[0, 0] for label in labels])]
        pixels = self.dataset.pixels(shown)
        images, labels = self.dataset.normalise(pixels.to(self.device)), labels.to(self.device)
        seen = {"teacher": teacher} | {r.setting.method: self.trained(r.setting) for r in runs}
        figures.heatmaps(
            self.out / "figures" / "grad-cam.png",
            pixels.permute(0, 2, 3, 1).numpy() / 255,
            [self.dataset.class_names[label] for label in labels.tolist()],
            {name: grad_cam(network, images, labels).cpu().numpy() for name, network in seen.items()},
        )

    def report_pairs(self, runs: list[Runs]) -> results.Table:
        """Return the accuracies with one pair of layers, and draw them (Fig. 3)."""
        by_pair = {r.setting.pair: r.accuracies for r in runs if r.setting.pair is not None}
        levels = {r.setting.method: mean(r.accuracies) for r in runs if r.setting.pair is None}
        layers, targets = ([*dict.fromkeys(pair[side] for pair in by_pair)] for side in (0, 1))
        figures.bars(
            self.out / "figures" / "pairs.png",
            [str(layer + 1) for layer in layers],
            {f"target layer {j + 1}": [by_pair[i, j] for i in layers] for j in targets},
            "student layer",
            "test accuracy, %",
            levels,
        )
        rows = {f"student layer {i + 1}": [by_pair[i, j] for j in targets] for i in layers}
        return results.grid("one pair of layers", rows, [f"target layer {j + 1}" for j in targets])

    def report_tau(self, runs: list[Runs]) -> results.Table:
        """Return the accuracies against the softness, and draw them (Fig. 5)."""
        taus = self.recipe.taus
        lines = {name: [r.accuracies for r in runs if r.setting.method == name] for name in SOFTENED}
        figures.against(
            self.out / "figures" / "tau.png",
            taus,
            lines,
            "softness tau of the attention",
            "test accuracy, %",
            level=("SemCKD", mean(runs[0].accuracies)),
        )
        return results.grid("tau", lines, [f"{tau:g}" for tau in taus])

    def report_transfer(self, teacher: StagedNetwork, runs: list[Runs], content: dict) -> results.Table:
        """Return the accuracies of linear classifiers on the features of another data set, and draw them (Fig. 6)."""
        target = views_like(self.dataset, self.target, self.device)
        reached = {
            r.setting.method: [
                linear_accuracy(self.trained(r.setting, seed), target) for seed in range(self.recipe.seeds)
            ]
            for r in runs
        }
        of_teacher = linear_accuracy(teacher, target)
        content["transfer"] = {"teacher": of_teacher, **reached}
        head = f"accuracy on {len(self.target.test)} images of the other data, %"
        figures.bars(
            self.out / "figures" / "transfer.png",
            list(reached),
            {"student": list(reached.values())},
            "",
            "accuracy of a linear classifier, %",
            {"teacher": of_teacher},
        )
        return results.grid("transfer", {"teacher": [[of_teacher]]} | {n: [v] for n, v in reached.items()}, [head])

    def report_betas(self, runs: list[Runs]) -> list[results.Table]:
        """Return the accuracies of SemCKD and of CRD against beta, and draw them (Fig. 7). KD stands at 0."""
        kd = [r for r in runs if r.setting.method == "KD"]
        tables = []
        for name, file in (("SemCKD", "beta.png"), ("CRD", "beta-crd.png")):
            own = [r for r in runs if r.setting.method == name]
            if not own:
                continue
            heads = [f"{self.beta(r.setting):g}" for r in kd + own]
            tables.append(results.grid("beta", {name: [r.accuracies for r in kd + own]}, heads))
            figures.against(
                self.out / "figures" / file,
                [self.beta(r.setting) for r in own],
                {name: [r.accuracies for r in own]},
                "beta",
                "test accuracy, %",
                level=("KD", mean(kd[0].accuracies)) if kd else None,
            )
        return tables


def capture(network: StagedNetwork, method: Method) -> FeatureCapture:
    """Capture the map at the end of each named stage, or the map that is averaged to the embedding."""
    names = ["tail"] if method.transfer == "embeddings" else network.layers
    return FeatureCapture(network, names, before_relu=method.before_relu)


def matching(own: list[tuple[int, ...]], theirs: list[tuple[int, ...]]) -> list[tuple[int, int]]:
    """Return pairs of layers of equal height and width, in their order, the student's with at most the teacher's
    channels. The arguments are the shapes c x h x w of the maps.
    """
    pairs: list[tuple[int, int]] = []
    for i, (channels, *size) in enumerate(own):
        later = range(pairs[-1][1] + 1 if pairs else 0, len(theirs))
        found = [j for j in later if list(theirs[j][1:]) == size and theirs[j][0] >= channels]
        pairs += [(i, found[0])] if found else []
    if not pairs:
        raise NoMatchError(
            "MGD needs a layer of the student with the size and at most the channels of a teacher's layer, got "
            f"student maps {own} and teacher maps {theirs}: leave MGD out of --methods, or give another --student"
        )
    return pairs


def paired(own: list[Tensor], theirs: list[Tensor], pairs: list[tuple[int, int]]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the maps of pairs of layers."""
    return [own[i] for i, _ in pairs], [theirs[j] for _, j in pairs]


def improvements(run: Path) -> dict[str, float]:
    """Return SemCKD's relative improvements in the folder of another run."""
    try:
        return json.loads((run / "results.json").read_text())[IMPROVEMENT]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"--runs: {run} has no {IMPROVEMENT} in its results.json: {error!r}") from error


def grad_cam(network: StagedNetwork, images: Tensor, labels: Tensor) -> Tensor:
    """Return Grad-CAM of the last stage for the classes in ``labels`` (Selvaraju et al. 2017), n x h x w in [0, 1]."""
    with torch.enable_grad():
        logits, stages = network(images.detach().requires_grad_())
        (gradient,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), stages[-1])
    seen = (gradient.mean((2, 3), keepdim=True) * stages[-1]).sum(1).relu().detach()
    return seen / seen.amax((1, 2), keepdim=True).clamp(min=1e-12)


def title(setting: Setting, recipe: Recipe) -> str:
    """Return the method, and the differences from the recipe."""
    parts = [setting.method]
    if setting.pair is not None:
        parts.append("layers {}-{}".format(*(layer + 1 for layer in setting.pair)))
    if setting.tau is not None:
        parts.append(f"tau {setting.tau:g}")
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
    options.add_shared_flags(group, RECIPES, networks.NETWORKS, foreign=True)
    add("--tau", options.positive, "temperature of SemCKD-tau's attention", lambda r: r.tau)
    add("--beta", float, "factor of SemCKD", lambda r: r.beta)
    add("--beta-fitnet", float, "factor of FitNet's hint", lambda r: r.beta_fitnet)
    add("--beta-at", float, "factor of AT", lambda r: r.beta_at)
    add("--beta-sp", float, "factor of SP", lambda r: r.beta_sp)
    add("--beta-vid", float, "factor of VID", lambda r: r.beta_vid)
    add("--beta-pkt", float, "factor of PKT", lambda r: r.beta_pkt)
    add("--beta-rkd", float, "factor of RKD", lambda r: r.beta_rkd)
    add("--beta-cc", float, "factor of CC", lambda r: r.beta_cc)
    add("--beta-hkd", float, "factor of HKD", lambda r: r.beta_hkd)
    add("--beta-mgd", float, "factor of MGD", lambda r: r.beta_mgd)
    add("--beta-irg", float, "factor of IRG", lambda r: r.beta_irg)
    add("--beta-crd", float, "factor of CRD, also in SemCKD+CRD", lambda r: r.beta_crd)
    add("--negatives", options.positive_int, "images that CRD compares each image with", lambda r: r.negatives)
    several = {"nargs": "+", "metavar": "X"}
    add("--taus", options.positive, "of the study tau", lambda r: values(r.taus), **several)
    add("--betas", float, "SemCKD's factors in the study beta; 0 is KD", lambda r: values(r.betas), **several)
    add("--betas-crd", float, "CRD's factors in the study beta", lambda r: values(r.betas_crd) or "none", **several)
    add("--shares", options.share, "of the study few-shot", lambda r: values(r.shares), **several)
    add("--noises", options.share, "of the study noisy", lambda r: values(r.noises), **several)
    group.add_argument(
        "--methods", nargs="+", choices=METHODS, default=DEFAULT_METHODS, help=f"default: {' '.join(DEFAULT_METHODS)}"
    )
    group.add_argument(
        "--studies", nargs="+", choices=STUDIES, default=["methods", "beta"], help="default: methods and beta"
    )
    parser.add_argument("--transfer-data", choices=data.SETS, help="the data that the study transfer transfers to")
    parser.add_argument("--transfer-root", type=Path, metavar="DIR", help="folder of its official files")
    parser.add_argument(
        "--runs", nargs="+", type=Path, default=[], metavar="DIR", help="other runs, of other networks, shown in Fig. 2"
    )
    return parser


def values(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """Return the requested recipe, with the values of the given flags."""
    recipe = options.recipe_of(arguments, RECIPES)
    if arguments.lr is not None:
        return recipe
    return replace(
        recipe,
        teacher_schedule=started(recipe.teacher_schedule, recipe.teacher),
        student_schedule=started(recipe.student_schedule, recipe.student),
    )


def started(schedule: Schedule, network: str) -> Schedule:
    """Return the schedule with the paper's learning rate for the network."""
    return replace(schedule, lr=0.01) if network in LOW_LR else schedule


if __name__ == "__main__":
    main()
