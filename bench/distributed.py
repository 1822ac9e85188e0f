"""Time and traffic of LKD's loss over several processes, in both forms, for docs/distributed.md.

    torchrun --nproc-per-node 2 bench/distributed.py && python bench/report.py

The program measures messages and the loss, in one process and in all of them. From the formulas it calculates what many
more processes would send and compute. It writes the tables with machine, versions, commit and date.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import results
import torch
import torch.distributed as dist
from measure import provenance
from torch import Tensor

import kdkernels
from kdkernels.distributed import Ranks
from kdkernels.ops.congruence.distributed import MOVED, costs, numbers_moved

FILE = Path(__file__).resolve().parent / "results" / "distributed-cpu.json"
CASES = (("64 x 8 x 8", 64, 8), ("16 x 32 x 32", 16, 32))  # (name, channels, side) of the maps, in 4 x 4 patches
IMAGES, K = 64, 4  # images per process
MANY, BYTES_PER_SECOND = 4096, 25e9  # of the calculation


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    single, together = [dist.new_group([rank]) for rank in range(dist.get_world_size())], dist.group.WORLD
    tables = [messages(), losses(single[dist.get_rank()], together), reckoned()]
    if dist.get_rank() == 0:
        results.write(FILE, provenance() | {"tables": tables})
        print(f"wrote {FILE}")
    dist.destroy_process_group()


def messages() -> dict:
    rows = []
    for size in (2, 2**20):
        message = torch.zeros(size)
        rows.append([f"{size:,} numbers", [1e3 * seconds(lambda: dist.all_reduce(message))]])  # noqa: B023
    return {"title": "", "header": [f"all-reduce over {dist.get_world_size()} processes", "ms"], "rows": rows}


def losses(single: dist.ProcessGroup, together: dist.ProcessGroup) -> dict:
    """Return the loss, forward and backward, of only the first process, and of all processes."""
    header = ["maps", "form", "numbers sent", "1 process, ms", f"{together.size()} processes, ms"]
    rows = []
    for name, channels, side in CASES:
        student = torch.randn(IMAGES, channels, side, side, requires_grad=True)
        teacher = torch.randn(IMAGES, channels, side, side)
        moved = numbers_moved(*problem(together.size(), channels, side))
        for form in moved:
            own = 1e3 * seconds(lambda: step(student, teacher, form, single), only_first=True)  # noqa: B023
            whole = 1e3 * seconds(lambda: step(student, teacher, form, together))  # noqa: B023
            rows.append([case(name, channels, side), form, f"{moved[form]:,.0f}", [own], [whole]])
    return {"title": "", "header": header, "rows": rows}


def step(student: Tensor, teacher: Tensor, form: str, group: dist.ProcessGroup) -> None:
    kdkernels.local_correlation_loss(student, teacher, K, form=form, group=group).backward()


def reckoned() -> dict:
    header = ["maps", "form", "sent per process and step", f"at {BYTES_PER_SECOND / 1e9:g} GB/s", "multiply-adds"]
    rows = []
    for name, channels, side in CASES:
        moved, cost = (reckon(*problem(MANY, channels, side)) for reckon in (numbers_moved, costs))
        for form, numbers in moved.items():
            sent, products = 4 * numbers, cost[form] - MOVED * numbers
            took = f"{1e3 * sent / BYTES_PER_SECOND:,.2f} ms"
            rows.append([case(name, channels, side), form, f"{sent / 1e6:,.1f} MB", took, f"{products:.0e}"])
    return {"title": f"Calculated for {MANY} processes of {IMAGES} images each:", "header": header, "rows": rows}


def case(name: str, channels: int, side: int) -> str:
    return f"{name} (d = {width(channels, side)})"


def width(channels: int, side: int) -> int:
    """Of a patch."""
    return channels * (side // K) ** 2


def problem(processes: int, channels: int, side: int) -> tuple[Ranks, int, int, int, bool]:
    """Return the problem that the formulas need."""
    ranks = Ranks(dist.group.WORLD, dist.get_rank(), (IMAGES,) * processes)
    return ranks, K * K, width(channels, side), width(channels, side), False


def seconds(run: Callable[[], object], repeats: int = 15, only_first: bool = False) -> float:
    """Return the median over repeats of the slowest rank's time. ``only_first``: the other ranks wait."""
    times = []
    for _ in range(repeats):
        dist.barrier()
        begin = time.perf_counter()
        if dist.get_rank() == 0 or not only_first:
            run()
        elapsed = torch.tensor(time.perf_counter() - begin)
        dist.all_reduce(elapsed, dist.ReduceOp.MAX)
        times.append(elapsed.item())
    return statistics.median(times)


if __name__ == "__main__":
    main()
