"""Command-line options that every example has."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

import kdkernels

from . import data, networks, parallel


def new_parser(
    description: str | None, out: Path, recipes: Mapping[str, Any]
) -> tuple[argparse.ArgumentParser, argparse._ArgumentGroup]:
    """A training program's parser, and the group for the flags that take the place of a recipe's values."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"networks: {', '.join(networks.NETWORKS)}",
    )
    add_options(parser, out)
    group = parser.add_argument_group("recipe", "what is not given is the recipe's")
    group.add_argument("--recipe", choices=recipes, help="default: demo for digits, paper for cifar100")
    return parser, group


def add_options(parser: argparse.ArgumentParser, out: Path, *, imagenet: bool = False) -> None:
    group = parser.add_argument_group("data and output")
    choices, root = ["digits", "cifar100"], "folder of CIFAR-100's train.bin and test.bin"
    if imagenet:
        choices.append("imagenet")
        root += ", or of ImageNet's folders train and val"
    group.add_argument("--data", choices=choices, default="digits", help="default: %(default)s")
    group.add_argument("--root", type=Path, metavar="DIR", help=root)
    group.add_argument(
        "--validate",
        action="store_true",
        help="to choose settings: hold out a fifth of the training images and measure on them, not on test images",
    )
    group.add_argument("--out", type=Path, default=out, metavar="DIR", help="default: %(default)s")
    group.add_argument(
        "--fresh", action="store_true", help="start over instead of going on from the checkpoints in --out"
    )
    group.add_argument("--device", default="auto", help="auto (CUDA if there is a device), cpu, cuda, cuda:1, ...")
    group.add_argument(
        "--backend",
        choices=["auto", "reference", "native", "triton"],
        default="auto",
        help="what computes kdkernels' losses; default: %(default)s",
    )
    group.add_argument(
        "--threads", type=positive_int, metavar="N", help="CPU threads; default: 1 for digits, else PyTorch's"
    )


def add_recipe_flag(
    group: argparse._ArgumentGroup,
    recipes: Mapping[str, Any],
    flag: str,
    type: Callable[[str], object],
    what: str,
    value: Callable[[Any], object],
    **more: Any,
) -> None:
    """A flag in place of a recipe's value; its help tells what that is in each."""
    defaults = ", ".join(f"{name}: {value(recipe)}" for name, recipe in recipes.items())
    group.add_argument(flag, type=type, help=f"{what} ({defaults})", **more)


def recipe_of(arguments: argparse.Namespace, recipes: Mapping[str, Any]) -> Any:
    """The recipe asked for, with the flags that were given in place of its values."""
    recipe = recipes[arguments.recipe or ("demo" if arguments.data == "digits" else "paper")]
    given = {
        field.name: tuple(value) if isinstance(value, list) else value
        for field in fields(recipe)
        if (value := getattr(arguments, field.name, None)) is not None
    }
    return replace(recipe, **given)


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
    """The dataset asked for; what is wrong with its files is said without a traceback, and what this machine cannot do
    before anything is trained."""
    if options.root and options.data == "digits":
        parser.error("--root is of no use to --data digits: name the data in that folder by --data")
    check_machine(parser, options)
    try:
        dataset = data.load(options.data, options.root)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return dataset.hold_out() if options.validate else dataset


def check_machine(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """The device exists, and the backend runs there."""
    try:
        logits = torch.zeros(1, 1, device=pick_device(options))
    except (AssertionError, RuntimeError) as error:  # a PyTorch without CUDA asserts that it has it
        parser.error(f"argument --device: {str(error).splitlines()[0]}")
    try:
        kdkernels.explain("kd_loss", logits, logits, backend=options.backend)
    except RuntimeError as error:
        parser.error(f"argument --backend: {error}")


def pick_device(options: argparse.Namespace) -> torch.device:
    # Convolutions on a GPU then give the same numbers in every run, as they do on a CPU.
    torch.backends.cudnn.deterministic = True
    # Work as small as on digits gains little from a second thread, and loses far more when it must wait for a core.
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
