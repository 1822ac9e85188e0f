"""Every native operator on small odd shapes, for compute-sanitizer: ``python tests/gpu/small_grid.py``."""

from __future__ import annotations

import os

import torch
from torch import Tensor

import kdkernels

DEVICE = "cpu" if os.environ.get("KDKERNELS_PRETENDED_GPU") else "cuda"


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, device=DEVICE)).requires_grad_()


def main() -> None:
    for rows, classes in ((1, 1), (3, 37), (2, 1000)):
        kdkernels.kd_loss(draw(rows, classes), draw(rows, classes), backend="native").backward()
    for rows, classes in ((1, 1), (7, 10), (3, 37), (2, 1030)):
        for scale in (1, 20):
            logits = [draw(rows, classes, scale=scale) for _ in range(2)]
            for per_sample in (False, True):
                settings = {"per_sample": per_sample, "backend": "native"}
                kdkernels.inter_class_correlation_loss(*logits, **settings).backward()
            kdkernels.inter_class_correlation(logits[0], backend="native").square().sum().backward()
    for kernel in ("taylor_rbf", "rbf", "bilinear", "mmd"):
        for normalize in (True, False):
            settings = {"kernel": kernel, "normalize": normalize, "backend": "native"}
            kdkernels.correlation_congruence_loss(draw(70, 9), draw(70, 20), **settings).backward()
    layers = [draw(70, 9), draw(70, 40, 4, 4), draw(70, 3, 5, 5).to(torch.float16), draw(70, 8, 6, 6)[..., 1:]]
    kdkernels.similarity_matrices(layers, backend="native").sum().backward()
    student, teacher = [draw(5, 3, 6, 6), draw(5, 7, 4, 4)], [draw(5, 3, 4, 9), draw(5, 7, 4, 4)[:, :, 1:]]
    weights = torch.rand(5, 2, 1, device=DEVICE, requires_grad=True)
    pairs = [[[own] for own in maps] for maps in (student, teacher)]
    kdkernels.cross_layer_mse(*pairs, weights, backend="native").backward()
    for form in ("gram", "feature"):
        student, teacher = [draw(5, 3, 6, 6), draw(5, 7, 4, 4)], [draw(5, 4, 6, 3), draw(5, 2, 5, 7)]
        masks = [torch.rand(5, *maps.shape[-2:], device=DEVICE) for maps in teacher]
        settings = {"weights": (1.0, 0.5, 0.3), "partition": "resize", "form": form, "backend": "native"}
        kdkernels.local_correlation_loss(student, teacher, [2, 3], **settings).backward()
        kdkernels.local_correlation_loss(student, teacher, 2, mask=masks, threshold=0.5, **settings).backward()
        many = draw(20, 8, 8, 8)
        kdkernels.local_correlation_loss(many, draw(20, 8, 8, 8), 2, form=form, backend="native").backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        assert many.grad.isfinite().all()


if __name__ == "__main__":
    main()
