"""Command-line options that every example has."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import kdkernels

from . import data, networks, parallel, photographs
from .training import Engine, Schedule


def new_parser(
    description: str | None, out: Path, recipes: Mapping[str, Any], *, sets: Sequence[str] = data.SETS
) -> tuple[argparse.ArgumentParser, argparse._ArgumentGroup]:
    """Return a training program's parser, and the group for flags that replace values of a recipe."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"networks: {', '.join(networks.NETWORKS)}",
    )
    add_options(parser, out, sets=sets)
    group = parser.add_argument_group("recipe", "what is not given is the recipe's")
    group.add_argument("--recipe", choices=recipes, help="default: the recipe of the data")
    return parser, group


def add_options(parser: argparse.ArgumentParser, out: Path, *, sets: Sequence[str] = data.SETS) -> None:
    group = parser.add_argument_group("data and output")
    group.add_argument("--data", choices=sets, default="digits", help="default: %(default)s")
    group.add_argument("--root", type=Path, metavar="DIR", help="folder of the data's official files")
    group.add_argument("--unchecked", action="store_true", help="read files that do not have the published MD5 sums")
    group.add_argument(
        "--validate",
        action="store_true",
        help="to choose settings: hold out a fifth of the training images and measure on them, not on test images",
    )
    group.add_argument(
        "--out",
        "--run",
        type=Path,
        default=out,
        metavar="DIR",
        help="the folder of the run: config.json, log.jsonl, checkpoints, tables and figures; default: %(default)s",
    )
    group.add_argument(
        "--resume",
        type=Path,
        metavar="DIR",
        help="continue the run in DIR with the options in its config.json. Options that are given too replace these. "
        "The command of a run continues it as well.",
    )
    group.add_argument("--fresh", action="store_true", help="start again, without the checkpoints in --out")
    group.add_argument("--device", default="auto", help="auto (CUDA if there is a device), cpu, cuda, cuda:1, ...")
    group.add_argument(
        "--backend",
        choices=["auto", "reference", "native", "triton", "library"],
        default="auto",
        help="backend of kdkernels' losses; default: %(default)s",
    )
    group.add_argument(
        "--threads",
        type=positive_int,
        metavar="N",
        help="CPU threads; default: 1 for digits, otherwise PyTorch's default",
    )
    add_engine(parser)


def add_engine(parser: argparse.ArgumentParser) -> None:
    default = Engine()
    group = parser.add_argument_group("computation", "no recipe depends on these")
    group.add_argument(
        "--jobs",
        type=positive_int,
        default=1,
        metavar="N",
        help="students trained side by side, each in its own process; default: %(default)s",
    )
    group.add_argument(
        "--amp",
        choices=["off", "bf16", "fp16"],
        default=default.amp,
        help="train under autocast; fp16 scales the loss. Networks are measured in float32. default: %(default)s",
    )
    group.add_argument(
        "--accumulate",
        type=positive_int,
        default=default.accumulate,
        metavar="N",
        help="compute a batch in N parts, one after the other, and add their gradients. This needs less memory. Losses "
        "that compare samples, and batch norms, see only the samples of a part. default: %(default)s",
    )
    group.add_argument("--compile", action="store_true", help="compile the networks by torch.compile")
    group.add_argument(
        "--cuda-graphs", action="store_true", help="also record the compiled networks as CUDA graphs (reduce-overhead)"
    )
    group.add_argument("--channels-last", action="store_true", help="keep images and weights in channels_last")
    group.add_argument(
        "--tf32",
        action="store_true",
        help="round the inputs of matrix products on a GPU to TF32. PyTorch does so for convolutions by default.",
    )
    group.add_argument(
        "--workers",
        type=int,
        default=default.workers,
        metavar="N",
        help=f"processes that read images from files; default: {photographs.WORKERS}. Small data sets are in memory.",
    )


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments. With --resume, the arguments of that run come first. ``command`` has all of them."""
    command = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(command)
    if arguments.resume is not None:
        given, folder = arguments, arguments.resume
        command = recorded(parser, folder) + command
        arguments = parser.parse_args(command)
        arguments.out, arguments.fresh = folder, given.fresh
    arguments.command = command
    if arguments.jobs > 1 and parallel.started() > 1:
        parser.error("--jobs must be 1 under torchrun, whose processes train each student together")
    return arguments


def recorded(parser: argparse.ArgumentParser, folder: Path) -> list[str]:
    """Return the arguments in the config.json of a run."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
        program, command = config["program"], list(map(str, config["arguments"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"--resume: {path} cannot be read as the configuration of a run: {error}")
    if program != parser.prog:
        parser.error(f"--resume: {path} must be of {parser.prog}, got one of {program}")
    return command


CONFIG = "config.json"


def engine_of(arguments: argparse.Namespace) -> Engine:
    return Engine(**{field.name: getattr(arguments, field.name) for field in fields(Engine)})


def add_recipe_flag(
    group: argparse._ArgumentGroup,
    recipes: Mapping[str, Any],
    flag: str,
    type: Callable[[str], object],
    what: str,
    value: Callable[[Any], object],
    **more: Any,
) -> None:
    """Add a flag that replaces a value of a recipe. Its help names the value in each recipe."""
    defaults = ", ".join(f"{name}: {value(recipe)}" for name, recipe in recipes.items())
    group.add_argument(flag, type=type, help=f"{what} ({defaults})", **more)


def add_shared_flags(
    group: argparse._ArgumentGroup, recipes: Mapping[str, Any], known: Collection[str], *, foreign: bool = False
) -> None:
    """Add the flags of a program that trains one teacher and its students.

    Args:
        known: the names of networks.
        foreign: whether the teacher may be another library's.
    """
    add, count = partial(add_recipe_flag, group, recipes), positive_int
    name = {"choices": known, "metavar": "NAME"}
    if foreign:
        theirs = "teacher network, also timm:NAME or torchvision:NAME; FILE is short for --teacher-weights FILE"
        given = {"metavar": "NAME|FILE", "action": _StoreNetworkOrFile}
        add("--teacher", _network_or_file, theirs, lambda r: r.teacher, **given)
        group.add_argument(
            "--teacher-weights", type=Path, metavar="FILE", help="load the teacher instead of training it"
        )
    else:
        add("--teacher", str, "teacher network", lambda r: r.teacher, **name)
    add("--student", str, "student network", lambda r: r.student, **name)
    add("--seeds", count, "number of students of each kind, with seeds 0, 1, ...", lambda r: r.seeds, metavar="N")
    add("--epochs", count, "epochs of a student", lambda r: r.student_schedule.epochs, metavar="N")
    add("--teacher-epochs", count, "epochs of the teacher", lambda r: r.teacher_schedule.epochs, metavar="N")
    add("--batch-size", count, "images per batch", lambda r: r.student_schedule.batch_size, metavar="N")
    add("--lr", positive, "first learning rate of teacher and students", lambda r: r.student_schedule.lr)
    add("--share", share, "share of the training images that students see", lambda r: r.share)
    add("--temperature", positive, "temperature of KD", lambda r: r.temperature)


def _network_or_file(text: str) -> str | Path:
    return Path(text) if Path(text).is_file() else networks.checked_name(text)


class _StoreNetworkOrFile(argparse.Action):
    """Store the name of a network as ``teacher``, and a file as ``teacher_weights``."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        setattr(namespace, "teacher_weights" if isinstance(values, Path) else "teacher", values)


def recipe_of(arguments: argparse.Namespace, recipes: Mapping[str, Any]) -> Any:
    """Return the requested recipe, with the values of the given flags."""
    own = data.RECIPES.get(arguments.data)
    recipe = recipes[arguments.recipe or (own if own in recipes else "paper")]
    given = {
        field.name: tuple(value) if isinstance(value, list) else value
        for field in fields(recipe)
        if (value := getattr(arguments, field.name, None)) is not None
    }
    schedules = {
        field.name: rescheduled(getattr(recipe, field.name), arguments, field.name.removesuffix("schedule"))
        for field in fields(recipe)
        if isinstance(getattr(recipe, field.name), Schedule)
    }
    return replace(recipe, **given, **schedules)


def rescheduled(schedule: Schedule, arguments: argparse.Namespace, role: str) -> Schedule:
    """Return a schedule with the epochs, the batch size and the learning rate of the command line. --epochs are the
    student's; a flag with the prefix ``role``, such as teacher_, counts for another network.
    """
    prefix = "" if role in ("student_", "") else role
    schedule = schedule.lasting(getattr(arguments, f"{prefix}epochs", None) or schedule.epochs)
    given = {
        "lr": None if role == "caat_" else getattr(arguments, "lr", None),
        "batch_size": arguments.batch_size,
    }
    return replace(schedule, **{name: value for name, value in given.items() if value is not None})


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {value:g}")
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in [0, 1], got {value:g}")
    return value


def load_data(parser: argparse.ArgumentParser, options: argparse.Namespace) -> data.Dataset:
    """Return the requested dataset. Errors in its files are printed without a traceback, and missing devices or
    backends before anything is trained.
    """
    if options.root and options.data == "digits":
        parser.error("--root is of no use to --data digits: name the data in that folder by --data")
    check_machine(parser, options)
    try:
        dataset = data.load(options.data, options.root, checked=not options.unchecked)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return dataset.hold_out() if options.validate else dataset


def check_machine(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Check that the device exists, and that the backend runs there."""
    try:
        logits = torch.zeros(1, 1, device=pick_device(options))
    except (AssertionError, RuntimeError) as error:  # PyTorch without CUDA raises an AssertionError here
        parser.error(f"argument --device: {str(error).splitlines()[0]}")
    if options.cuda_graphs and logits.device.type != "cuda":
        parser.error(f"argument --cuda-graphs: needs a GPU, got --device {logits.device}")
    try:
        kdkernels.explain("kd_loss", logits, logits, backend=options.backend)
    except RuntimeError as error:
        parser.error(f"argument --backend: {error}")


def pick_device(options: argparse.Namespace) -> torch.device:
    # Work as small as on digits gains little from a second thread, and loses more if this thread waits for a core.
    torch.set_num_threads(options.threads or (1 if options.data == "digits" else torch.get_num_threads()))
    if options.device != "auto":
        return torch.device(options.device)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def forget(out: Path) -> None:
    """Delete the checkpoints under ``out``."""
    if parallel.rank() == 0:
        for path in (out / "checkpoints").glob("*"):
            path.unlink()
    parallel.wait()
