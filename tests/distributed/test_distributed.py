"""Losses over several processes, started as a user starts them. cases.py has the tests."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad

import kdkernels
from kdkernels import groups

FOLDER = Path(__file__).parent


def torchrun_command(processes: int, *command: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *command]


def torchrun(processes: int, *command: str) -> str:
    """Return the output of the processes. Fail if one of them fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        torchrun_command(processes, *command), capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("processes", [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (3, 4))])
def test_every_loss_over_several_processes(processes, seed):
    torchrun(processes, str(FOLDER / "cases.py"), str(seed))


def test_two_processes_train_as_one_with_every_method_of_the_examples(tmp_path, seed):
    """The change of the weights by a step is equal. A loss that compares only a process's images would change it."""
    for processes in (1, 2):
        torchrun(processes, str(FOLDER / "trainer.py"), str(tmp_path / f"{processes}.pt"), str(seed))
    one, two = (torch.load(tmp_path / f"{processes}.pt") for processes in (1, 2))
    assert one.keys() == two.keys()
    assert len(one) >= 50
    errors = {name: ((two[name] - change).norm() / change.norm()).item() for name, change in one.items()}
    assert {name: error for name, error in errors.items() if not error < 1e-7} == {}


def example(out: Path) -> list[str]:
    """Train students with LKD for a few epochs on two processes."""
    epochs = ["--teacher-epochs=1", "--epochs=4", "--seeds=1", "--methods", "LKD"]
    return [str(FOLDER.parent.parent / "examples" / "train_lkd.py"), f"--out={out}", *epochs]


@pytest.mark.slow
def test_an_example_goes_on_after_a_process_was_killed(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert "LKD seed 0: test accuracy" in torchrun(2, *example(whole))
    history = parts / "checkpoints" / "lkd-seed0.json"
    launcher = subprocess.Popen(torchrun_command(2, *example(parts)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while not history.exists():
            assert launcher.poll() is None
            time.sleep(0.01)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert launcher.wait(60) != 0
    finally:
        launcher.kill()
    assert len(json.loads(history.read_text())["history"]) < 4, "it was over before it was killed"
    torchrun(2, *example(parts))
    assert history.read_bytes() == (whole / "checkpoints" / "lkd-seed0.json").read_bytes()
    assert (parts / "table.md").read_bytes() == (whole / "table.md").read_bytes()


@pytest.mark.parametrize("group", ["gloo", 3, object()])
def test_something_else_than_a_group(group):
    rows = torch.randn(2, 3)
    with pytest.raises(TypeError, match=r"group must be a torch\.distributed process group, got"):
        kdkernels.correlation_congruence_loss(rows, rows, group=group)


@pytest.mark.parametrize("where", ["nowhere", "in time", "too late"])
def test_the_default_group_named_before_it_exists(where, monkeypatch):
    rows = torch.randn(4, 3)
    loss = kdkernels.nn.CorrelationCongruenceLoss(group="world")
    expected = kdkernels.correlation_congruence_loss(rows, rows.flip(0))
    if where == "in time":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if where == "too late":
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(
            ValueError, match=r"group='world' has no process group yet, and WORLD_SIZE says .* 2 processes"
        ):
            loss(rows, rows.flip(0))
        return
    torch.testing.assert_close(loss(rows, rows.flip(0)), expected)
    if where == "in time":
        dist.destroy_process_group()


def test_a_module_that_is_loaded_where_its_group_does_not_exist():
    rows = torch.randn(4, 3)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world, other = (
        pickle.dumps(kdkernels.nn.CorrelationCongruenceLoss(group=group))
        for group in (dist.group.WORLD, dist.new_group([0]))
    )
    dist.destroy_process_group()
    for saved in (world, other):
        loss = pickle.loads(saved)
        with pytest.raises(ValueError, match=r"was saved with the module: call torch\.distributed\.init_process_group"):
            loss(rows, rows)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    loss, lost = (pickle.loads(saved) for saved in (world, world))
    assert loss.group is dist.group.WORLD
    loss(rows, rows)
    lost.group = groups.Named("of old")
    with pytest.raises(ValueError, match="group 'of old' was saved with the module and does not exist in this process"):
        lost(rows, rows)
    dist.destroy_process_group()


def test_a_group_of_an_earlier_life():
    rows = torch.randn(2, 3)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    alone = kdkernels.correlation_congruence_loss(rows, rows.flip(0), group=group)
    torch.testing.assert_close(alone, kdkernels.correlation_congruence_loss(rows, rows.flip(0)))
    with pytest.raises(RuntimeError, match=r"group must be None under the transforms of torch\.func"):
        torch.func.grad(lambda x: kdkernels.correlation_congruence_loss(x, rows, group=group))(rows)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="and forward mode: neither sees through messages"):
        kdkernels.correlation_congruence_loss(forward_ad.make_dual(rows, rows), rows, group=group)
    dist.destroy_process_group()
    with pytest.raises(ValueError, match="group must be an initialised process group"):
        kdkernels.correlation_congruence_loss(rows, rows, group=group)
