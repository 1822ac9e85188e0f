"""Errors of every loss and its gradient against float64, for inputs of each dtype: ``python bench/precision.py``.

``--json bench/results/precision-cpu-DATE.json`` keeps them. ``bench/report.py`` writes them to docs/precision.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import torch
from measure import provenance, table
from report import error_table
from torch import Tensor

import kdkernels

MAPS, ROWS, LOGITS = (64, 32, 8, 8), (256, 128), (64, 100)
DRAWS = 5  # the largest error of these is reported
NEAR = 0.03  # relative difference of a student that nearly equals its teacher

Errors = dict[str, dict[str, float]]
Loss = Callable[..., Tensor]


def lkd(form: str) -> Loss:
    return lambda s, t, backend: kdkernels.local_correlation_loss(
        s, t, 4, reduction="mean", form=form, backend=backend, weights=(1.0, 2.0, 0.5)
    )


def cckd(kernel: str, form: str = "auto") -> Loss:
    return lambda s, t, backend: kdkernels.correlation_congruence_loss(s, t, kernel=kernel, form=form, backend=backend)


def sp(form: str) -> Loss:
    return lambda s, t, backend: kdkernels.similarity_preserving_loss(s, t, form=form, backend=backend)


def icct(per_sample: bool) -> Loss:
    return lambda s, t, backend: kdkernels.inter_class_correlation_loss(s, t, per_sample=per_sample, backend=backend)


def similarities(student: Tensor, teacher: Tensor, backend: str) -> Tensor:
    student, teacher = kdkernels.similarity_matrices([student, teacher], backend=backend)
    return (student - teacher).square().mean()


def semckd(student: Tensor, teacher: Tensor, backend: str) -> Tensor:
    weights = torch.linspace(0, 1, len(student), dtype=torch.float64).view(-1, 1, 1)
    weights = weights if student.dtype == torch.float64 else weights.float()
    return kdkernels.cross_layer_mse([[student]], [[teacher]], weights, backend=backend)


def of_pytorch(loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    return lambda s, t, backend: loss(s, t)


CASES: dict[str, tuple[Loss, tuple[int, ...]]] = {
    "LKD, Gram form": (lkd("gram"), MAPS),
    "LKD, feature form": (lkd("feature"), MAPS),
    "CCKD Taylor": (cckd("taylor_rbf"), ROWS),
    "CCKD RBF": (cckd("rbf"), ROWS),
    "CCKD bilinear, Gram form": (cckd("bilinear", "gram"), ROWS),
    "CCKD bilinear, feature form": (cckd("bilinear", "feature"), ROWS),
    "CCKD MMD": (cckd("mmd"), ROWS),
    "SP, Gram form": (sp("gram"), MAPS),
    "SP, feature form": (sp("feature"), ROWS),
    "ICCT": (icct(False), LOGITS),
    "ICCT per sample": (icct(True), LOGITS),
    "SemCKD similarities": (similarities, MAPS),
    "SemCKD MSE": (semckd, MAPS),
    "KD": (lambda s, t, backend: kdkernels.kd_loss(s, t, backend=backend), LOGITS),
    "RKD": (lambda s, t, backend: kdkernels.relational_kd_loss(s, t, backend=backend), LOGITS),
    "PKT": (of_pytorch(kdkernels.probabilistic_transfer_loss), ROWS),
    "AT": (of_pytorch(kdkernels.attention_transfer_loss), MAPS),
    "logit MSE": (of_pytorch(kdkernels.logit_mse_loss), LOGITS),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    results = measured_in_child("1")
    if "amx_int8" in Path("/proc/cpuinfo").read_text():
        results += [case | {"case": f"{case['case']}, without AMX"} for case in measured_in_child("0")]
    print(table(*error_table(results)))
    if arguments.json:
        arguments.json.write_text(json.dumps({**provenance(), "results": results}, indent=1) + "\n")


def measured_in_child(amx: str) -> list[dict[str, object]]:
    """Measure every case with or without AMX in a child process, because a process decides this once."""
    os.environ["KDKERNELS_AMX"] = amx
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure)


def measure() -> list[dict[str, object]]:
    results = []
    for name, (loss, shape) in CASES.items():
        errors: Errors = {}
        for draw in range(DRAWS):
            generator = torch.Generator().manual_seed(draw)
            student, teacher = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
            near = teacher + NEAR * student
            for kind, values, dtype, backend in (
                ("float32", student, torch.float32, "auto"),
                ("near", near, torch.float32, "auto"),
                ("near, eager", near, torch.float32, "reference"),
                ("bfloat16", student, torch.bfloat16, "auto"),
                ("float16", student, torch.float16, "auto"),
            ):
                found = errors_of(loss, values.to(dtype), teacher.to(dtype), backend)
                kept = errors.setdefault(kind, found)
                errors[kind] = {what: max(kept[what], found[what]) for what in found}
        results.append({"case": name, "errors": errors})
    return results


def errors_of(loss: Loss, student: Tensor, teacher: Tensor, backend: str) -> dict[str, float]:
    """Return the relative errors of the loss, of its gradient, and of the exact gradient rounded to the dtype of the
    inputs.

    Like a GradScaler, this scales the loss so that the largest number of the gradient is near 1.
    """
    exact, correct = value_and_gradient(loss, student.double(), teacher.double(), "reference")
    scale = 2.0 ** -correct.abs().max().log2().ceil().item()
    value, gradient = value_and_gradient(loss, student, teacher, backend, scale)
    correct = scale * correct
    return {
        "loss": relative_error(value, exact),
        "gradient": relative_error(gradient, correct),
        "rounded": relative_error(correct.to(gradient.dtype), correct),
    }


def value_and_gradient(
    loss: Loss, student: Tensor, teacher: Tensor, backend: str, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    value = loss(student, teacher, backend=backend)
    (scale * value).backward()
    return value.detach(), student.grad


def relative_error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


if __name__ == "__main__":
    main()
