"""Inter-class correlation transfer (ICCT) between networks of any capacity.

Students are trained with ``CE + λ · transfer`` in the paper's three scenarios, over several seeds:

    strong-to-weak   a large teacher, a small student
    born-again       the student of one generation teaches the next, a network of the same kind, for four generations
    weak-to-strong   a small teacher, a large student

The transfer is nothing (CE), the softened divergence (KD), the error of the logits (LT), or the divergence of the
inter-class correlation maps (ICCT). With --methods, ICCT+AT and ICCT+SP add attention transfer at every stage or
similarity preserving at the last stage. The program writes a table per scenario, every number of every epoch as JSON,
and figures. Every epoch ends with a checkpoint: after an interruption, the same command continues from there. On
digits, everything takes five minutes on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

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
    InterClassCorrelationLoss,
    KDLoss,
    LogitMSELoss,
    SimilarityPreservingLoss,
    TeacherFreeKDLoss,
)


@dataclass(frozen=True)
class Recipe:
    strong: str
    weak: str
    again: str  # the network that is born again
    schedule: Schedule
    schedules: Mapping[str, Schedule]  # for networks with their own schedule
    share: float  # of the training images for the students; teachers of another capacity see all
    temperature: float
    kd: float  # weights λ of the transfers
    lt: float
    icct: float
    reduction: str  # of ICCT's divergence over the rows of the map, see InterClassCorrelationLoss
    at: float
    sp: float
    tfkd: float  # α of Tf-KD; cross-entropy has the weight 1 - α
    generations: int
    seeds: int
    median: bool = False  # whether tables have medians over the seeds, as the paper's, in place of means


# The paper trains CNN-5 with Adam and the other networks with SGD. It found its weights λ by validation and does not
# print them.
_PAPER_SCHEDULE = Schedule(
    epochs=200, lr=0.1, milestones=(60, 120, 160), batch_size=128, weight_decay=1e-4, nesterov=True, decay=0.2
)
_PAPER_CNN5 = Schedule(
    epochs=140, lr=1e-3, milestones=(40, 80, 120), batch_size=256, weight_decay=0.0, decay=0.2, optimizer="adam"
)

# The demo's weights are the best of 0.1, 0.3, 1 and 3 (LT: 0.03 to 1) in the first scenario, with --validate and four
# seeds.
RECIPES = {
    "demo": Recipe(
        strong="resnet14-half",
        weak="cnn5-quarter",
        again="cnn5-quarter",
        schedule=Schedule(epochs=60, lr=0.1, milestones=(24, 36, 48)),
        schedules={"cnn5-quarter": Schedule(epochs=100, lr=0.05, milestones=(40, 60, 80))},
        share=0.25,
        temperature=4.0,
        kd=0.3,
        lt=0.1,
        icct=0.1,
        reduction="mean",
        at=1000.0,
        sp=3000.0,
        tfkd=0.9,
        generations=4,
        seeds=3,
    ),
    "paper": Recipe(
        strong="wrn-28-10",
        weak="cnn5",
        again="resnet18",
        schedule=_PAPER_SCHEDULE,
        schedules={"cnn5": _PAPER_CNN5},
        share=1.0,
        temperature=4.0,
        kd=1.0,
        lt=1.0,
        icct=1.0,
        reduction="mean",
        at=1000.0,
        sp=3000.0,
        tfkd=0.9,
        generations=4,
        seeds=10,
        median=True,
    ),
}

# On one seed, because ImageNet is large.
RECIPES["imagenet"] = replace(
    RECIPES["paper"],
    strong="resnet50-224",
    weak="resnet18-224",
    again="resnet18-224",
    schedule=Schedule(epochs=90, lr=0.1, milestones=(), batch_size=256, weight_decay=1e-4, nesterov=True, cosine=True),
    schedules={},
    seeds=1,
)

# The transfers that each method adds to cross-entropy.
METHODS: dict[str, tuple[str, ...]] = {
    "CE": (),
    "KD": ("kd",),
    "LT": ("lt",),
    "ICCT": ("icct",),
    "ICCT+AT": ("icct", "at"),
    "ICCT+SP": ("icct", "sp"),
    "AT": ("at",),
    "SP": ("sp",),
    "Tf-KD": ("tfkd",),
}
SCENARIOS = ("strong-to-weak", "born-again", "weak-to-strong")

Runs = dict[str, list[tuple[StagedNetwork, History]]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    arguments = options.parse(parser, argv)
    conduct(parser, arguments, partial(InterClassCorrelation, arguments, recipe_of(arguments)))


class InterClassCorrelation(Experiment):
    """One data set, and the networks of every scenario."""

    def __init__(self, arguments: argparse.Namespace, recipe: Recipe, dataset: Dataset) -> None:
        super().__init__(arguments, dataset)
        self.recipe = recipe
        self.few = dataset.only(recipe.share)
        self.methods: list[str] = arguments.methods
        self.scenarios: list[str] = SCENARIOS if arguments.scenario == "all" else (arguments.scenario,)

    def run(self) -> None:
        self.introduce(self.few)
        recipe = self.recipe
        content: dict[str, object] = {"recipe": asdict(recipe), "data": self.data_settings}
        tables = []
        for scenario in self.scenarios:
            if scenario == "born-again":
                table, content[scenario] = self.born_again()
            elif scenario == "strong-to-weak":
                table, content[scenario] = self.taught(scenario, recipe.strong, recipe.weak)
            else:
                table, content[scenario] = self.taught(scenario, recipe.weak, recipe.strong)
            tables.append(table)
        if parallel.rank() == 0:
            what = "median over seeds, lowest and highest" if recipe.median else "mean ± standard deviation over seeds"
            self.write(content, tables, f"Accuracy after the last epoch, {what}.")

    def taught(self, scenario: str, teacher_name: str, student_name: str) -> tuple[results.Table, dict]:
        """Return table and accuracies of students with one architecture, taught with every method by a teacher of
        another architecture.
        """
        teacher, history = self.teacher(teacher_name)
        runs: Runs = {name: [] for name in self.methods}
        calls = [(name, student_name, seed) for seed in range(self.recipe.seeds) for name in self.methods]
        file = partial(checkpoint, scenario)
        for (name, *_), trained in zip(
            calls, self.train_all(self.student, file, calls, teacher, scenario), strict=True
        ):
            runs[name].append(trained)
        accuracies = {name: [final(run) for run in of_method] for name, of_method in runs.items()}
        if parallel.rank() == 0:
            self.draw_curves(scenario, teacher_name, student_name, runs, history[-1]["test_accuracy"])
            self.draw_networks(scenario, {"teacher": teacher, **{name: runs[name][0][0] for name in runs}})
        title = f"{scenario}, students: {student_name}"
        table = results.table(
            (teacher_name, history[-1]["test_accuracy"]), accuracies, "CE", title, median=self.recipe.median
        )
        return table, {"teacher": history[-1]["test_accuracy"], **accuracies}

    def born_again(self) -> tuple[results.Table, dict]:
        """Return table and accuracies of generations of one network per method. Each generation teaches the next."""
        network, generations = self.recipe.again, range(1, self.recipe.generations + 1)
        methods = [name for name in self.methods if name != "CE"]
        accuracies: dict[str, list[list[float]]] = {name: [] for name in methods}
        first: list[float] = []
        last: dict[str, StagedNetwork] = {}
        for seed in range(self.recipe.seeds):
            start, history = self.student("CE", network, seed, None, "")
            first.append(history[-1]["test_accuracy"])
            last.setdefault("generation 0", start)
            for name in methods:
                descent = self.descent(name, network, seed, start, generations)
                accuracies[name].append([final(run) for run in descent])
                last.setdefault(f"{name}, generation {generations[-1]}", descent[-1][0])
        rows = {"0 (CE)": [first] * len(methods)}
        for index, generation in enumerate(generations):
            rows[str(generation)] = [[run[index] for run in accuracies[name]] for name in methods]
        if parallel.rank() == 0:
            self.draw_networks("born-again", last)
        table = results.grid("generation", rows, methods, f"born-again, network: {network}", median=self.recipe.median)
        return table, {"generation 0": first, **accuracies}

    def teacher(self, name: str) -> tuple[StagedNetwork, History]:
        """Return the trained, frozen teacher, and its history."""
        teacher, history = self.classifier(
            f"teacher {name}", name, self.dataset, self.schedule(name), 0, f"teacher-{name}"
        )
        return teacher.requires_grad_(False).eval(), history

    def descent(
        self, method: str, network: str, seed: int, teacher: StagedNetwork, generations: range
    ) -> list[tuple[StagedNetwork, History]]:
        """Return the generations. Each teaches the next, and ``teacher`` teaches the first."""
        runs = []
        for generation in generations:
            teacher.requires_grad_(False).eval()
            # Not the initial weights of its teacher.
            runs.append(
                self.student(
                    method, network, seed, teacher, f"generation{generation}", first_seed=100 * generation + seed
                )
            )
            teacher = runs[-1][0]
        return runs

    def student(
        self,
        method: str,
        network: str,
        seed: int,
        teacher: StagedNetwork | None,
        scenario: str,
        *,
        first_seed: int | None = None,
    ) -> tuple[StagedNetwork, History]:
        """Return a network trained with a method on the students' images, and its history."""
        schedule, file = self.schedule(network), checkpoint(scenario, method, network, seed)
        transfers = METHODS[method]
        if not transfers:  # equal in every scenario
            return self.classifier(
                f"CE {network} seed {seed}",
                network,
                self.few,
                schedule,
                seed,
                checkpoint(scenario, method, network, seed),
            )
        torch.manual_seed(seed if first_seed is None else first_seed)
        student = self.network(network)
        settings = {
            "network": network,
            "seed": seed,
            "share": self.recipe.share,
            "teacher": training.fingerprint(teacher),
            "backend": self.backend,
        }
        settings |= {name: getattr(self.recipe, name) for name in transfers}
        if "at" in transfers:
            settings["at_stages"] = "all"
        if "icct" in transfers:
            settings["reduction"] = self.recipe.reduction
        if {"kd", "tfkd"} & set(transfers):
            settings["temperature"] = self.recipe.temperature
        history = self.fit(
            f"{scenario} {method} seed {seed}",
            student,
            self.loss(transfers, student, teacher),
            self.few,
            schedule,
            seed,
            file,
            settings,
        )
        return student, history

    def loss(
        self, transfers: Sequence[str], student: StagedNetwork, teacher: StagedNetwork
    ) -> Callable[[Tensor, Tensor], Losses]:
        """Return cross-entropy plus the weighted transfers (the paper's Eqs. 4 and 7), or Tf-KD, which has its own
        weights.
        """
        teacher_free = TeacherFreeKDLoss(self.recipe.tfkd, self.recipe.temperature, backend=self.backend)
        modules: dict[str, nn.Module] = {
            "kd": KDLoss(self.recipe.temperature, backend=self.backend),
            "lt": LogitMSELoss(),
            "icct": InterClassCorrelationLoss(
                reduction=self.recipe.reduction, backend=self.backend, group=parallel.group()
            ),
            "at": AttentionTransferLoss(),
            "sp": SimilarityPreservingLoss(backend=self.backend, group=parallel.group()),
        }

        def loss(images: Tensor, labels: Tensor) -> Losses:
            logits, stages = student(images)
            with torch.no_grad():
                teacher_logits, teacher_stages = teacher(images)
            losses = {"ce": F.cross_entropy(logits, labels)}
            if "tfkd" in transfers:
                return losses | {"loss": teacher_free(logits, teacher_logits, labels)}
            for name in transfers:
                if name == "at":  # at the end of each stage; the deepest stages if one network has more
                    count = min(len(stages), len(teacher_stages))
                    pair = stages[-count:], teacher_stages[-count:]
                elif name == "sp":
                    pair = stages[-1], teacher_stages[-1]
                else:
                    pair = logits, teacher_logits
                losses[name] = modules[name](*pair)
            return losses | {"loss": losses["ce"] + sum(getattr(self.recipe, n) * losses[n] for n in transfers)}

        return loss

    def schedule(self, network: str) -> Schedule:
        return self.recipe.schedules.get(network, self.recipe.schedule)

    def draw_curves(
        self, scenario: str, teacher_name: str, student_name: str, runs: Runs, teacher_accuracy: float
    ) -> None:
        figures.curves(
            self.out / "figures" / f"{scenario}-curves.png",
            {name: [history for _, history in of_method] for name, of_method in runs.items()},
            [("loss", "training loss"), ("test_accuracy", f"test accuracy of {student_name}, %")],
            log=("loss",),
            zoom=("test_accuracy",),
            level=("test_accuracy", f"teacher {teacher_name}", teacher_accuracy),
        )

    def draw_networks(self, scenario: str, shown: Mapping[str, StagedNetwork]) -> None:
        self.draw_maps(scenario, shown)
        self.draw_embeddings(scenario, shown)

    @torch.no_grad()
    def draw_maps(self, scenario: str, shown: Mapping[str, StagedNetwork]) -> None:
        """Draw the inter-class correlation maps over all test images (the paper's Fig. 3), with ICCT's divergence of
        each map from the first. Only the first seed is drawn.
        """
        logits = {name: self.outputs(network, lambda net, images: net(images)[0]) for name, network in shown.items()}
        first, reference = next(iter(logits.items()))
        panels = {}
        for name, own in logits.items():
            distance = kdkernels.inter_class_correlation_loss(own, reference).item()
            title = name if name == first else f"{name}, divergence {distance:.2g}"
            panels[title] = kdkernels.inter_class_correlation(own).cpu().numpy()
        figures.matrices(
            self.out / "figures" / f"{scenario}-maps.png", panels, self.dataset.class_names, "correlation of classes"
        )

    @torch.no_grad()
    def draw_embeddings(self, scenario: str, shown: Mapping[str, StagedNetwork]) -> None:
        """Draw t-SNE of the last layer's inputs for the test images (Fig. 5), by networks of the first seed."""
        from sklearn.manifold import TSNE

        count = 1000
        points = {}
        for name, network in shown.items():
            seen = self.outputs(network, lambda net, images: net.pool(net(images)[1][-1]))[:count].cpu().numpy()
            points[name] = TSNE(init="pca", random_state=0, perplexity=min(30, len(seen) - 1)).fit_transform(seen)
        figures.embeddings(
            self.out / "figures" / f"{scenario}-features.png",
            points,
            np.asarray(self.dataset.test.labels[:count]),
            self.dataset.class_names,
        )

    def outputs(self, network: StagedNetwork, function: Callable[[StagedNetwork, Tensor], Tensor]) -> Tensor:
        """Return ``function`` of the network for every test image."""
        views = self.dataset.views(self.dataset.test, self.device)
        return torch.cat([function(network, images).clone() for images in views])  # a CUDA graph overwrites its output


def checkpoint(scenario: str, method: str, network: str, seed: int) -> str:
    return f"{scenario if METHODS[method] else 'ce'}-{method.lower() if METHODS[method] else network}-seed{seed}"


def final(run: tuple[StagedNetwork, History]) -> float:
    return run[1][-1]["test_accuracy"]


def build_parser() -> argparse.ArgumentParser:
    parser, group = options.new_parser(__doc__, Path("runs/icct"), RECIPES)
    parser.add_argument("--scenario", choices=["all", *SCENARIOS], default="all", help="default: %(default)s")
    add = partial(options.add_recipe_flag, group, RECIPES)
    count, name = options.positive_int, {"choices": networks.NETWORKS, "metavar": "NAME"}
    add("--strong", str, "the large network", lambda r: r.strong, **name)
    add("--weak", str, "the small network", lambda r: r.weak, **name)
    add("--again", str, "the network that is born again", lambda r: r.again, **name)
    add("--seeds", count, "number of students per method, with seeds 0, 1, ...", lambda r: r.seeds, metavar="N")
    add("--generations", count, "generations after the first", lambda r: r.generations, metavar="N")
    group.add_argument("--epochs", type=count, metavar="N", help="epochs of every network")
    group.add_argument("--batch-size", type=count, metavar="N", help="images per batch")
    add("--share", options.share, "share of the training images that students see", lambda r: r.share)
    add("--temperature", options.positive, "temperature of KD", lambda r: r.temperature)
    add("--tfkd", options.share, "Tf-KD's share of the teacher", lambda r: r.tfkd)
    for transfer in ("kd", "lt", "icct", "at", "sp"):
        add(f"--{transfer}", float, f"weight of {transfer.upper()}", lambda r, t=transfer: getattr(r, t))
    group.add_argument(
        "--methods", nargs="+", choices=METHODS, default=["CE", "KD", "LT", "ICCT"], help="default: CE KD LT ICCT"
    )
    return parser


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """Return the requested recipe, with the values of the given flags."""
    recipe = options.recipe_of(arguments, RECIPES)

    return replace(
        recipe,
        schedules={name: options.rescheduled(own, arguments, "") for name, own in recipe.schedules.items()},
    )


if __name__ == "__main__":
    main()
