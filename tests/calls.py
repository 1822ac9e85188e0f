"""A valid call of every registered operator, which tests take as it is or break on purpose.

A call is a function of sizes: it asks for each with a usual value and the smallest and largest that fuzzing may take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Size = Callable[[int, int, int], int]
Call = dict[str, Any]


def usual(size: int, least: int, most: int) -> int:
    return size


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def maps(*shape: int) -> Tensor:
    return tensor(*shape).contiguous(memory_format=torch.channels_last)


def kd(size: Size) -> Call:
    b, K = size(4, 1, 7), size(10, 1, 40)
    return {
        "student": tensor(b, K),
        "teacher": tensor(b, K),
        "temperature": 4.0,
        "scale": 16.0,
        "grad_student": True,
        "grad_teacher": True,
    }


def dkd(size: Size) -> Call:
    N, K = size(4, 1, 7), size(10, 1, 40)
    return {
        "student": tensor(N, K),
        "teacher": tensor(N, K),
        "labels": torch.arange(N) % K,
        "alpha": 1.0,
        "beta": 8.0,
        "temperature": 4.0,
        "reduction": size(0, 0, 2),
        "ignore_index": size(0, 0, 1) - 1,
        "grad_student": True,
        "grad_teacher": True,
    }


def dist(size: Size) -> Call:
    N, K = size(4, 1, 7), size(10, 1, 40)
    return {
        "student": tensor(N, K),
        "teacher": tensor(N, K),
        "mask": torch.arange(N) != 1 if size(1, 0, 1) else None,
        "beta": 1.0,
        "gamma": 0.5,
        "temperature": 2.0,
        "grad_student": True,
        "grad_teacher": True,
    }


def divergence(size: Size) -> Call:
    outer, inner, K = size(2, 1, 4), size(3, 1, 4), size(10, 1, 40)
    return {
        "student": tensor(outer, inner, K),
        "teacher": tensor(outer, K, inner).transpose(1, 2),
        "temperatures": 1 + torch.rand(outer, inner),
        "kind": size(0, 0, 2),
        "beta": 0.5,
        "standardize": bool(size(0, 0, 1)),
        "moments": bool(size(1, 0, 1)),
    }


def divergence_backward(size: Size) -> Call:
    forward = divergence(size)
    forward["moments"] = True
    outer, inner, _ = forward["student"].shape
    return {
        "grad_losses": tensor(outer, inner),
        **{name: forward.pop(name) for name in ("student", "teacher", "temperatures")},
        "saved": 1 + torch.rand(outer, inner, 16),
        **forward,
        "grad_student": True,
        "grad_teacher": True,
        "to_temperatures": True,
    }


def top_k(size: Size) -> Call:
    N, K = size(4, 1, 7), size(10, 2, 40)
    k = min(size(3, 1, 5), K - 1)  # with all K classes, the log-sum-exp of the others is -inf
    indices = torch.stack([torch.randperm(K)[:k] for _ in range(N)])
    return {"student": tensor(N, K), "indices": indices, "temperatures": 1 + torch.rand(N)}


def top_k_backward(size: Size) -> Call:
    forward = top_k(size)
    N, k = forward["indices"].shape
    return {"grad_exponents": tensor(N, k + 1), **forward, "grad_student": True, "to_temperatures": True}


def icc_map(size: Size) -> Call:
    return {"logits": tensor(size(4, 1, 9), size(10, 1, 40))}


def icc_map_backward(size: Size) -> Call:
    K = size(10, 1, 40)
    return {"grad_map": tensor(K, K), "logits": tensor(size(4, 1, 9), K)}


def icc_loss(size: Size) -> Call:
    b, K = size(4, 1, 9), size(10, 1, 40)
    return {
        "student": tensor(b, K),
        "teacher": tensor(b, K),
        "per_sample": bool(size(0, 0, 1)),
        "scale": 0.1,
        "grad_student": True,
        "grad_teacher": True,
    }


def patches(size: Size) -> Call:
    n, k, h, w = size(2, 1, 3), size(2, 1, 3), size(4, 1, 7), size(4, 1, 7)
    masked = bool(size(1, 0, 1))
    return {
        "features": tensor(n, size(3, 1, 5), h, w),
        "k": k,
        "mask": torch.rand(n, size(4, 1, 6), size(4, 1, 6)) if masked else None,
        "threshold": 0.5 if masked else None,
        "resize": h % k != 0 or w % k != 0,
        "eps": 1e-8,
    }


def patches_backward(size: Size) -> Call:
    call = patches(size)
    features, k = call.pop("features"), call["k"]
    del call["eps"]
    n, c, h, w = features.shape
    rows = tensor(n * k * k, c * -(-h // k) * -(-w // k))
    shape = [c, h, w, size(0, 0, 1)]
    return {
        "grad_rows": torch.randn_like(rows),
        "rows": rows,
        "norms": 1 + torch.rand(len(rows)),
        "shape": shape,
    } | call


def congruence(size: Size) -> Call:
    positions = size(2, 1, 3)
    rows = positions * size(3, 1, 5)
    mixed = size(0, 0, 1)
    return {
        "x": tensor(rows, size(5, 1, 9)),
        "y": tensor(rows, size(6, 1, 9)),
        "positions": positions,
        "coefficients": [1.0, -0.5, 0.25, 2.0],
        "plan": [mixed, 7 * size(0, 0, 1), 7 * size(0, 0, 1)],
        "grad_x": True,
        "grad_y": not mixed,
        "tf32": False,
    }


def correlation_congruence(size: Size) -> Call:
    n, kernel = size(6, 1, 12), size(2, 0, 3)
    return {
        "student": tensor(n, size(5, 1, 9)),
        "teacher": tensor(n, size(6, 1, 9)),
        "kernel": kernel,
        "gamma": 0.4,
        "order": size(2, 0, 4),
        "normalize": bool(size(1, 0, 1)),
        "scale": 0.1,
        "plan": [7 * size(1, 0, 1) if kernel == 2 else 0, 0, 0],
        "grad_student": True,
        "grad_teacher": True,
        "tf32": False,
    }


def similarity_preserving(size: Size) -> Call:
    n = size(4, 1, 9)
    return {
        "student": tensor(n, size(3, 1, 5), size(2, 1, 4), size(2, 1, 4)),
        "teacher": maps(n, size(4, 1, 5), size(2, 1, 4), size(2, 1, 4)),
        "scale": 0.1,
        "feature": bool(size(0, 0, 1)),
        "grad_student": True,
        "grad_teacher": True,
    }


def local_correlation(size: Size) -> Call:
    stages = size(2, 1, 3)
    students, teachers, masks, sides = [], [], [], []
    for _ in range(stages):
        n, k = size(2, 1, 3), size(2, 1, 3)
        students.append(tensor(n, size(3, 1, 4), k * size(2, 1, 3), k * size(2, 1, 3)))
        teachers.append(maps(n, size(4, 1, 4), k * size(2, 1, 3), k * size(2, 1, 3)))
        masks.append(torch.rand(n, size(4, 1, 6), size(4, 1, 6)))
        sides.append(k)
    masked = bool(size(1, 0, 1))
    return {
        "students": students,
        "teachers": teachers,
        "masks": masks if masked else [],
        "k": sides,
        "weights": [1.0, 0.5, 2.0],
        "mean": bool(size(0, 0, 1)),
        "plans": [7 * size(0, 0, 1) for _ in range(3 * stages)],
        "threshold": 0.5 if masked else None,
        "resize": bool(size(0, 0, 1)),
        "eps": 1e-8,
        "wanted": [size(1, 0, 1) for _ in range(2 * stages)],
        "tf32": False,
    }


def local_correlation_backward(size: Size) -> Call:
    forward = local_correlation(size)
    sides, wanted = forward["k"], forward["wanted"]
    grad_rows, shapes = [], []
    for i, features in enumerate([*forward["students"], *forward["teachers"]]):
        (n, c, h, w), k = features.shape, sides[i % len(sides)]
        grad_rows.append(tensor(n * k * k, c * -(-h // k) * -(-w // k)) if wanted[i] else torch.empty(0))
        shapes += [c, h, w, size(0, 0, 1)]
    kept = {name: forward[name] for name in ("masks", "k", "threshold", "resize")}
    return {"grad_loss": torch.tensor(1.5), "grad_rows": grad_rows, "shapes": shapes} | kept


def gram(size: Size) -> Call:
    b = size(4, 1, 9)
    return {"features": [tensor(b, 3, size(2, 1, 9), 2) for _ in range(size(3, 1, 3))], "tf32": False}


def gram_backward(size: Size) -> Call:
    forward = gram(size)
    layers, b = len(forward["features"]), len(forward["features"][0])
    return {"grad_matrices": tensor(layers, b, b)} | forward


def feature_mse(size: Size) -> Call:
    b, students, teachers = size(2, 1, 4), size(2, 1, 2), size(2, 1, 2)
    projected, targets = [], []
    for _ in range(students * teachers):
        c = size(3, 1, 5)
        projected.append(tensor(b, c, size(4, 1, 5), size(4, 1, 5)))
        targets.append(maps(b, c, size(2, 1, 5), size(2, 1, 5)))
    return {"projected": projected, "targets": targets, "weights": torch.rand(b, students, teachers), "scale": 0.5}


def feature_mse_backward(size: Size) -> Call:
    forward = feature_mse(size)
    wanted = [size(1, 0, 1) for _ in range(2 * len(forward["projected"]))]
    return {"grad_loss": torch.tensor(1.5)} | forward | {"wanted": wanted}


def convolution(size: Size) -> Call:
    c, k = 32 * size(1, 1, 2), 32 * size(1, 1, 2)
    transposed = bool(size(0, 0, 1))
    weight = tensor(*((c, k) if transposed else (k, c)), 3, 3)
    return {"maps": maps(size(2, 1, 3), c, size(4, 1, 5), size(3, 1, 5)), "weight": weight, "transposed": transposed}


def convolution_weight(size: Size) -> Call:
    n, h, w = size(2, 1, 3), size(4, 1, 5), size(3, 1, 5)
    return {
        "maps": maps(n, 32 * size(1, 1, 2), h, w),
        "grad": maps(n, 32 * size(1, 1, 2), h, w),
        "channels_last": bool(size(0, 0, 1)),
    }


def rkd(size: Size) -> Call:
    b = size(5, 1, 9)
    return {
        "student": tensor(b, size(4, 1, 9)),
        "teacher": tensor(b, size(6, 1, 9)),
        "distance_weight": 1.0,
        "angle_weight": 2.0,
        "grad_student": True,
        "grad_teacher": True,
    }


def token_relation(size: Size) -> Call:
    b, n, comparison = size(2, 1, 3), size(6, 1, 9), size(0, 0, 3)
    clip = size(0, 0, 3)
    heads = size(1, 1, 2)
    return {
        "student": tensor(b, n, 4),
        "teacher": maps(b, 6, n, 1),
        "mask": (torch.rand(b, n) < 0.8).float() if size(1, 0, 1) else None,
        "comparison": comparison,
        "clip": clip,
        "heads": heads,
        "batch": bool(size(0, 0, 1)),
        "channels": False,
        "normalize": bool(size(1, 0, 1)),
        "mean": bool(size(1, 0, 1)),
        "form": 0 if comparison or clip else 7 * size(0, 0, 1),
        "student_temperature": 0.5,
        "teacher_temperature": 0.25,
        "margin": 0.1,
        "grad_student": True,
        "grad_teacher": True,
    }


def token_relation_pairs(size: Size) -> Call:
    call = token_relation(size)
    del call["form"]
    b, n = call["student"].shape[:2]
    m = size(5, 1, 9)
    return {
        "student": call["student"],
        "student_keys": maps(b, 4, m, 1),
        "teacher": call["teacher"],
        "teacher_keys": tensor(b, m, 6),
        "key_mask": (torch.rand(b, m) < 0.8).float() if size(1, 0, 1) else None,
        "grad_student_keys": True,
        "grad_teacher_keys": True,
    } | call


CALLS: dict[str, Callable[[Size], Call]] = {
    call.__name__: call
    for call in (
        *(
            kd,
            dkd,
            dist,
            divergence,
            divergence_backward,
            top_k,
            top_k_backward,
            icc_map,
            icc_map_backward,
            icc_loss,
            patches,
            patches_backward,
            congruence,
            correlation_congruence,
        ),
        *(similarity_preserving, local_correlation, local_correlation_backward, gram, gram_backward, feature_mse),
        *(feature_mse_backward, convolution, convolution_weight, rkd, token_relation, token_relation_pairs),
    )
}
