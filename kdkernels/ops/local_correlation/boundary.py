"""What ``local_correlation`` and ``local_correlation_backward`` expect of their arguments."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...boundary import FULL_FLOATS, Check
from ..patches.boundary import check_maps, check_mask, check_rows, check_threshold


def check_local_correlation(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    masks: Sequence[Tensor],
    k: Sequence[int],
    weights: Sequence[float],
    plans: Sequence[int],
    threshold: float | None,
    resize: bool,
    eps: float,
    wanted: Sequence[int],
) -> None:
    check = Check("local_correlation")
    check.not_empty("students", students)
    stages = len(students)
    check.holds("teachers", teachers, stages, "entries, one for each stage")
    check.holds("k", k, stages, "entries, one for each stage")
    if masks:
        check.holds("masks", masks, stages, "entries, one for each stage, or none")
    check.all_finite("weights", weights, 3, "factors")
    check.holds("plans", plans, 3 * stages, "form codes, three for each stage")
    check.flags("wanted", wanted, 2 * stages)
    for s, (student, teacher, side) in enumerate(zip(students, teachers, k, strict=True)):
        check.forget()
        check.tensor(f"students[{s}]", student, "n c_S h_S w_S")
        check.tensor(f"teachers[{s}]", teacher, "n c_T h_T w_T")
        check_maps(check, f"students[{s}]", student, f"k[{s}]", side, resize)
        check_maps(check, f"teachers[{s}]", teacher, f"k[{s}]", side, resize)
        for maps in (student, teacher):
            rows = maps.shape[0] * side**2
            check.fits(f"students[{s}]", rows, rows)
            check.fits_gpu(f"students[{s}]", "rows", rows)
            if masks:
                check_mask(check, f"masks[{s}]", masks[s], maps.shape[0], *maps.shape[2:])
        check.plan("plans", plans, 3 * s, bool(wanted[stages + s]))
    check_threshold(check, threshold, "masks", len(masks) > 0)
    check.non_negative("eps", eps)


def check_local_correlation_backward(
    grad_loss: Tensor,
    grad_rows: Sequence[Tensor],
    shapes: Sequence[int],
    masks: Sequence[Tensor],
    k: Sequence[int],
    threshold: float | None,
    resize: bool,
) -> None:
    check = Check("local_correlation_backward")
    check.not_empty("k", k)
    stages = len(k)
    check.tensor("grad_loss", grad_loss, "", FULL_FLOATS)
    check.holds("grad_rows", grad_rows, 2 * stages, "entries, two for each stage")
    check.holds("shapes", shapes, 8 * stages, "numbers, eight for each stage")
    if masks:
        check.holds("masks", masks, stages, "entries, one for each stage, or none")
    for i, rows in enumerate(grad_rows):
        name, s = f"grad_rows[{i}]", i % stages
        if check.unwanted(name, rows):
            continue
        images = check_rows(check, name, rows, "shapes", shapes, 4 * i, f"k[{s}]", k[s], resize)
        if masks:
            check_mask(check, f"masks[{s}]", masks[s], images, *shapes[4 * i + 1 : 4 * i + 3])
    check_threshold(check, threshold, "masks", len(masks) > 0)
