"""20,000 training steps with changing sizes through every loss. They must leave no memory and no file behind.

    python tests/soak.py [--steps N]

``make soak`` runs it. It fails if the process grows after the first tenth of the steps.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from losses import LOSSES
from torch import Tensor
from tqdm import tqdm

import kdkernels
from kdkernels import nn as losses

ALLOWED = 2**23  # bytes by which the fragmentation of the allocator may change between two samples

calibration, semckd = losses.SemanticCalibration((4, 6), (5,), batch_size=24).eval(), losses.SemCKDLoss()

# Beside the losses of the table: maps of any sides, and layers of a network.
OF_MAPS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda s, t: kdkernels.local_correlation_loss(s, t, random.randint(1, 3), partition="resize"),
    lambda s, t: kdkernels.local_correlation_loss(s, t, 2, partition="resize", mask=t.sigmoid().mean(1), threshold=0.4),
    kdkernels.similarity_preserving_loss,
    kdkernels.attention_transfer_loss,
    lambda s, t: kdkernels.hint_loss(s, t[:, :4]),
    lambda s, t: kdkernels.similarity_matrices([s, t]).square().mean(),
    lambda s, t: semckd(*calibration([s.float(), torch.cat([s, s[:, 2:]], 1).float()], [t.float()])),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    torch.backends.mkldnn.set_flags(False)  # oneDNN keeps a compiled kernel per shape
    samples = []
    for number in tqdm(range(steps), disable=None):
        step()
        if (number + 1) % (steps // 10) == 0:
            samples.append(resources())
            memory, files = samples[-1]
            tqdm.write(f"{number + 1} steps: {memory / 2**20:.1f} MiB resident, {files} files open")
    (before, opened), *rest = samples
    grown = max(memory for memory, _ in rest) - before
    if grown > ALLOWED or any(files > opened for _, files in rest):
        sys.exit(f"grown by {grown / 2**20:.1f} MiB since the first tenth, or by open files")


def step() -> None:
    """Run one loss at one size, forward and backward."""
    dtype = random.choice((torch.float32, torch.float32, torch.bfloat16, torch.float64))
    batch = random.randint(1, 24)
    if random.random() < 0.3:
        student = torch.randn(batch, 4, random.randint(1, 12), random.randint(1, 12), dtype=dtype)
        teacher = torch.randn(batch, 5, random.randint(1, 12), random.randint(1, 12), dtype=dtype)
        loss = random.choice(OF_MAPS)
    else:
        loss, *_ = entry = random.choice(list(LOSSES.values()))
        student, teacher = entry.draw(batch, random.randint(1, 64), dtype)
    loss(student.requires_grad_(), teacher).backward()
    assert student.grad.isfinite().all()


def resources() -> tuple[int, int]:
    """Return the resident bytes and the open files of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return 4096 * pages, len(list(Path("/proc/self/fd").iterdir()))


if __name__ == "__main__":
    main()
