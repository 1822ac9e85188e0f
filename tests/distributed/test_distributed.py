"""Losses over several processes, started as a user starts them. What is tested is in cases.py."""

from __future__ import annotations

import json
import os
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

FOLDER = Path(__file__).parent


def torchrun_command(processes: int, *command: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *command]


def torchrun(processes: int, *command: str) -> str:
    """What the processes wrote; fails if one of them does."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        torchrun_command(processes, *command), capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_every_loss_over_several_processes(processes, seed):
    torchrun(processes, str(FOLDER / "cases.py"), str(seed))


def example(out: Path) -> list[str]:
    """Students trained by LKD for a few epochs on two processes."""
    epochs = ["--teacher-epochs=1", "--epochs=4", "--seeds=1", "--methods", "LKD"]
    return [str(FOLDER.parent.parent / "examples" / "train_lkd.py"), f"--out={out}", *epochs]


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
