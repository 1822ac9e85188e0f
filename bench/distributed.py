"""Time and traffic of LKD's loss over several processes, in both forms, as Markdown for docs/distributed.md.

    torchrun --nproc-per-node 2 bench/distributed.py

Measures messages and the loss itself, from which docs/distributed.md reckons what 4096 ranks would need.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

import kdkernels
from kdkernels.distributed import Ranks
from kdkernels.ops.congruence.distributed import numbers_moved

CASES = (("64 x 8 x 8", 64, 8), ("16 x 32 x 32", 16, 32))  # channels and side of the maps, in 4 x 4 patches
IMAGES, K = 64, 4


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    say(f"{world} processes, {IMAGES} images each, k = {K}, float32, gloo\n")
    for size in (2, 2**20):
        message = torch.zeros(size)
        say(f"all-reduce of {size} numbers: {1e3 * seconds(lambda: dist.all_reduce(message)):.2f} ms")  # noqa: B023
    say("\n| maps | form | numbers sent per rank and step | forward + backward, ms |\n|---|---|---:|---:|")
    for name, channels, side in CASES:
        student = torch.randn(IMAGES, channels, side, side, requires_grad=True)
        teacher = torch.randn(IMAGES, channels, side, side)
        ranks = Ranks(dist.group.WORLD, dist.get_rank(), (IMAGES,) * world)
        width = channels * (side // K) ** 2
        moved = numbers_moved(ranks, K * K, width, width, by_position=False)
        for form in ("feature", "gram"):

            def step() -> None:
                kdkernels.local_correlation_loss(student, teacher, K, form=form, group=dist.group.WORLD).backward()  # noqa: B023

            say(f"| {name} | {form} | {moved[form]:,.0f} | {1e3 * seconds(step):.1f} |")
    dist.destroy_process_group()


def seconds(run: Callable[[], object], repeats: int = 15) -> float:
    """The median over repeats of the slowest rank's time."""
    times = []
    for _ in range(repeats):
        dist.barrier()
        begin = time.perf_counter()
        run()
        elapsed = torch.tensor(time.perf_counter() - begin)
        dist.all_reduce(elapsed, dist.ReduceOp.MAX)
        times.append(elapsed.item())
    return statistics.median(times)


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
