"""Process groups as settings of modules: the name "world", copies and pickles, and the check of ``group=``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final, NamedTuple

import torch.distributed as dist

from .types import Group

WORLD: Final = "world"
NOT_A_MEMBER = dist.GroupMember.NON_GROUP_MEMBER


class Named(NamedTuple):
    """A process group by its name in torch.distributed, as a module is saved with it."""

    name: str


def resolve(group: Group | Named) -> dist.ProcessGroup | None:
    """Return the process group that ``group`` stands for when a loss is called, or None for one process.

    "world" is the default group. It can be named before ``torch.distributed.init_process_group``, when
    ``dist.group.WORLD`` is still None, and in a program that runs as one process without a group it stands for none.
    """
    if isinstance(group, Named):
        return _by_name(group)
    if group != WORLD:
        return group
    if dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise ValueError(
            f"group='world' has no process group yet, and WORLD_SIZE says that there are {processes} processes: "
            "call torch.distributed.init_process_group before the loss"
        )
    return None


def _by_name(named: Named) -> dist.ProcessGroup:
    if not dist.is_initialized():
        raise ValueError(
            f"group {named.name!r} was saved with the module: call torch.distributed.init_process_group first"
        )
    if named.name == WORLD and dist.group.WORLD is not None:
        return dist.group.WORLD
    from torch.distributed import distributed_c10d  # which builds of PyTorch without process groups do not have

    resolve_name: Callable[[str], dist.ProcessGroup] = vars(distributed_c10d)["_resolve_process_group"]
    try:
        return resolve_name(named.name)
    except (LookupError, RuntimeError, ValueError):
        raise ValueError(
            f"group {named.name!r} was saved with the module and does not exist in this process: "
            "set the module's group attribute"
        ) from None


def name_of(group: Group | Named) -> Group | Named:
    """Return what a copy of a module holds in place of ``group``. Process groups can be neither copied nor pickled."""
    if isinstance(group, dist.ProcessGroup):
        return Named(WORLD if group is dist.group.WORLD else group.group_name)
    return group


def looked_up(group: Group | Named) -> Group | Named:
    """Return the group that ``name_of`` named. Before a process has groups, return the name."""
    return _by_name(group) if isinstance(group, Named) and dist.is_initialized() else group


def check(group: object) -> None:
    """Check the type of ``group``. A process may build a loss for a group that it does not belong to."""
    if not isinstance(group, (dist.ProcessGroup, Named)) and group not in (None, WORLD, NOT_A_MEMBER):
        raise TypeError(
            f"group must be a torch.distributed process group, got {type(group).__name__}; "
            "'world' stands for the default group"
        )
