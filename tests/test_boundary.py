"""What registered operators do with calls that no Python code has checked: every malformed one raises, in words that
name the operator and the argument; none crashes; and the fakes say the same.
"""

from __future__ import annotations

import os
import pickle
import re
import select
import signal
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from calls import CALLS, Call, usual
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from kdkernels import native
from kdkernels.ops.operator import KERNELS, OPERATORS, load

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))
CPU = torch.device("cpu")
REASON = native.why_not(CPU)

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
every_operator = pytest.mark.parametrize("op", CALLS)

t = torch.randn
NAN, INF = float("nan"), float("inf")


def run(op: str, call: Call) -> Any:
    return getattr(torch.ops.kdkernels, op)(**call)


def run_fake(op: str, call: Call) -> Any:
    """Return the operator's fake, which torch.compile and torch.export ask for shapes."""
    with FakeTensorMode() as mode:
        return run(op, tree_map(lambda value: mode.from_tensor(value) if isinstance(value, Tensor) else value, call))


def outcome(function: Callable[[], Any]) -> str | None:
    """Return the message of a RuntimeError, or None if there is none."""
    try:
        function()
    except RuntimeError as error:
        return str(error)
    return None


def in_child(function: Callable[[], Any]) -> Any:
    """Return what the function returns in a process of its own. A crash, or a minute, fails the test."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # threads do not survive a fork
        with os.fdopen(writer, "wb") as pipe:
            try:
                pickle.dump(function(), pipe)
            finally:
                pipe.flush()
                os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        ready, _, _ = select.select([pipe], [], [], 60)
        if not ready:
            os.kill(child, signal.SIGKILL)
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    assert ready, "the call does not end"
    assert status == 0, f"the call ended its process: {os.waitstatus_to_exitcode(status)}"
    return pickle.loads(answer)


def freed(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor whose memory has been given back, as sharded training does."""
    tensor = torch.zeros(shape, dtype=dtype)
    tensor.untyped_storage().resize_(0)
    return tensor


def features(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [t(shape) for shape in shapes]


def changed(values: list, index: int, value: object) -> list:
    return [*values[:index], value, *values[index + 1 :]]


HUGE = 2**62
LAST = torch.channels_last
SHAPE = [3, 4, 4, 0]

# Changes to a valid call, and what the operator says of them.
MALFORMED: list[tuple[str, dict[str, Any], str]] = [
    ("kd", {"teacher": t(4, 9)}, "teacher must have shape (4, 10), got (4, 9)"),
    ("kd", {"teacher": t(3, 10)}, "teacher must have shape (4, 10), got (3, 10)"),
    ("kd", {"student": t(10)}, "student must have shape (b, K), got (10,)"),
    ("kd", {"student": t(4, 10, 1)}, "student must have shape (b, K), got (4, 10, 1)"),
    ("kd", {"student": t(0, 10), "teacher": t(0, 10)}, "student must not be empty, got shape (0, 10)"),
    ("kd", {"student": t(4, 0), "teacher": t(4, 0)}, "student must not be empty, got shape (4, 0)"),
    (
        "kd",
        {"student": torch.ones(4, 10, dtype=torch.int64)},
        "student must be float32, float64, bfloat16 or float16, got int64",
    ),
    (
        "kd",
        {"teacher": t(4, 10, dtype=torch.complex64)},
        "teacher must be float32, float64, bfloat16 or float16, got complex64",
    ),
    ("kd", {"teacher": t(4, 10, device="meta")}, "teacher must be on student's device cpu, got meta"),
    ("kd", {"temperature": 0.0}, "temperature must be a positive number, got 0"),
    ("kd", {"temperature": -0.25}, "temperature must be a positive number, got -0.25"),
    ("kd", {"temperature": NAN}, "temperature must be a positive number, got nan"),
    ("kd", {"temperature": INF}, "temperature must be a positive number, got inf"),
    ("kd", {"scale": NAN}, "scale must be a finite number, got nan"),
    ("kd", {"scale": -INF}, "scale must be a finite number, got -inf"),
    ("divergence", {"teacher": t(2, 3, 9)}, "teacher must have shape (2, 3, 10), got (2, 3, 9)"),
    ("divergence", {"student": t(3, 10)}, "student must have shape (outer, inner, K), got (3, 10)"),
    ("divergence", {"temperatures": t(2, 2)}, "temperatures must have shape (2, 3), got (2, 2)"),
    ("divergence", {"temperatures": t(2, 3).half()}, "temperatures must be float32 or float64, got float16"),
    ("divergence", {"kind": 3}, "kind must be 0 (forward), 1 (reverse) or 2 (jsd), got 3"),
    ("divergence", {"kind": -1}, "kind must be 0 (forward), 1 (reverse) or 2 (jsd), got -1"),
    ("divergence", {"beta": 1.5}, "beta must be a number in [0, 1], got 1.5"),
    ("divergence", {"beta": NAN}, "beta must be a number in [0, 1], got nan"),
    ("divergence_backward", {"grad_losses": t(6)}, "grad_losses must have shape (2, 3), got (6,)"),
    ("divergence_backward", {"saved": t(2, 3, 5)}, "saved must have shape (2, 3, 16), got (2, 3, 5)"),
    ("divergence_backward", {"moments": False}, "moments must be true for these gradients, got false"),
    (
        "divergence_backward",
        {"moments": False, "grad_teacher": False, "to_temperatures": False},
        "saved must have shape (2, 3, 5), got (2, 3, 16)",
    ),
    (
        "divergence_backward",
        {"saved": t(2, 3, 16).double()},
        "saved must have student's compute type float32, got float64",
    ),
    ("token_relation", {"student": t(2, 4)}, "student must have shape (b, n, c), got (2, 4)"),
    ("token_relation", {"student": t(3, 6, 4)}, "teacher must have shape (3, c, h, w), got (2, 6, 6, 1)"),
    ("token_relation", {"student": t(2, 7, 4)}, "teacher must have student's 7 tokens, got 6"),
    ("token_relation", {"channels": True}, "teacher must have student's 4 channels, got 6"),
    ("token_relation", {"heads": 0}, "heads must be a positive integer, got 0"),
    ("token_relation", {"heads": 3}, "student must have a multiple of 3 channels, got 4"),
    ("token_relation", {"heads": -1}, "heads must be a positive integer, got -1"),
    ("token_relation", {"mask": t(2, 5)}, "mask must have shape (2, 6), got (2, 5)"),
    (
        "token_relation",
        {"mask": t(2, 6).bool()},
        "mask must be float32, float64, bfloat16 or float16, got bool",
    ),
    (
        "token_relation",
        {"comparison": 4},
        "comparison must be 0 (mse), 1 (hinge), 2 (kl) or 3 (cross_entropy), got 4",
    ),
    ("token_relation", {"clip": -1}, "clip must be 0 (none), 1 (both), 2 (teacher) or 3 (teacher_only), got -1"),
    ("token_relation", {"form": 2}, "form must be 0 (gram), 1 (mixed) or 7 (feature), got 2"),
    ("token_relation", {"form": 7, "clip": 1}, "form must be 0 (gram) unless comparison and clip are 0, got 7"),
    ("token_relation", {"form": 1}, "form must be 0 (gram) or 7 (feature) for the second gradient, got 1"),
    ("token_relation", {"student_temperature": 0.0}, "student_temperature must be a positive number, got 0"),
    ("token_relation", {"teacher_temperature": NAN}, "teacher_temperature must be a positive number, got nan"),
    ("token_relation", {"margin": -1.0}, "margin must be a number >= 0, got -1"),
    (
        "token_relation_pairs",
        {"student_keys": t(2, 5, 3)},
        "student_keys must have student's 4 channels, got 3",
    ),
    ("token_relation_pairs", {"teacher_keys": t(2, 4, 6)}, "teacher_keys must have student_keys's 5 tokens, got 4"),
    ("token_relation_pairs", {"teacher_keys": t(2, 5, 7)}, "teacher_keys must have teacher's 6 channels, got 7"),
    ("token_relation_pairs", {"key_mask": t(2, 6)}, "key_mask must have shape (2, 5), got (2, 6)"),
    ("token_relation_pairs", {"heads": 5}, "student must have a multiple of 5 channels, got 4"),
    ("token_relation_pairs", {"margin": float("inf")}, "margin must be a number >= 0, got inf"),
    ("icc_map", {"logits": t(10)}, "logits must have shape (b, K), got (10,)"),
    ("icc_map", {"logits": t(0, 3)}, "logits must not be empty, got shape (0, 3)"),
    (
        "icc_map",
        {"logits": t(1, 1).expand(1, 2**31)},
        "logits must have sizes whose product is at most 2^60, got (2147483648, 2147483648)",
    ),
    (
        "icc_map",
        {"logits": t(1, 1).expand(2, 2**60)},
        "logits must have at most 2^60 elements, got shape (2, 1152921504606846976)",
    ),
    ("icc_map_backward", {"grad_map": t(9, 10)}, "grad_map must have shape (10, 10), got (9, 10)"),
    ("icc_map_backward", {"grad_map": t(100)}, "grad_map must have shape (10, 10), got (100,)"),
    (
        "icc_map_backward",
        {"grad_map": t(10, 10).half()},
        "grad_map must have logits's compute type float32, got float16",
    ),
    (
        "icc_map_backward",
        {"grad_map": t(10, 10).double()},
        "grad_map must have logits's compute type float32, got float64",
    ),
    (
        "icc_map_backward",
        {"logits": t(4, 10).double()},
        "grad_map must have logits's compute type float64, got float32",
    ),
    ("icc_loss", {"teacher": t(4, 2)}, "teacher must have shape (4, 10), got (4, 2)"),
    ("icc_loss", {"scale": NAN}, "scale must be a finite number, got nan"),
    ("patches", {"k": 0}, "k must be a positive integer, got 0"),
    ("patches", {"k": -2}, "k must be a positive integer, got -2"),
    ("patches", {"k": 3}, "k must divide the height and width of features unless resize is true, got k=3 for 4 x 4"),
    (
        "patches",
        {"k": HUGE, "resize": True},
        f"features must have sizes whose product is at most 2^60, got (2, {HUGE}, {HUGE}, 3, 1, 1)",
    ),
    ("patches", {"features": t(2, 3, 16)}, "features must have shape (n, c, h, w), got (2, 3, 16)"),
    ("patches", {"mask": t(1, 4, 4)}, "mask must have shape (2, h, w), got (1, 4, 4)"),
    ("patches", {"mask": t(2, 1, 4, 4)}, "mask must have shape (2, h, w), got (2, 1, 4, 4)"),
    ("patches", {"mask": t(2, 0, 4)}, "mask must not be empty, got shape (2, 0, 4)"),
    (
        "patches",
        {"mask": torch.ones(2, 4, 4, dtype=torch.bool)},
        "mask must be float32, float64, bfloat16 or float16, got bool",
    ),
    (
        "patches",
        {"mask": t(2, 1, 4).expand(2, 2**57, 4)},
        f"mask must have sizes whose product is at most 2^60, got (4, {2**57}, 4)",
    ),
    ("patches", {"mask": None}, "threshold must be None without mask, got 0.5"),
    ("patches", {"threshold": NAN}, "threshold must be a finite number, got nan"),
    ("patches", {"eps": -1.0}, "eps must be a number >= 0, got -1"),
    ("patches", {"eps": NAN}, "eps must be a number >= 0, got nan"),
    ("patches_backward", {"shape": [3, 4, 4]}, "shape must hold 4 numbers, got 3"),
    ("patches_backward", {"shape": []}, "shape must hold 4 numbers, got 0"),
    ("patches_backward", {"shape": [3, 0, 4, 0]}, "shape[1] must be a positive integer, got 0"),
    ("patches_backward", {"shape": [-3, 4, 4, 0]}, "shape[0] must be a positive integer, got -3"),
    ("patches_backward", {"shape": [3, 4, 4, 2]}, "shape[3] must be 0 or 1, got 2"),
    ("patches_backward", {"shape": [4, 4, 4, 0]}, "rows must have shape (N, 16), got (8, 12)"),
    (
        "patches_backward",
        {"shape": [3, 5, 4, 0]},
        "k must divide the height and width of rows unless resize is true, got k=2 for 5 x 4",
    ),
    (
        "patches_backward",
        {"shape": [HUGE, 4, 4, 0]},
        f"rows must have sizes whose product is at most 2^60, got (1, 2, 2, {HUGE}, 2, 2)",
    ),
    ("patches_backward", {"k": 0}, "k must be a positive integer, got 0"),
    ("patches_backward", {"k": HUGE}, f"k must have sizes whose product is at most 2^60, got ({HUGE}, {HUGE})"),
    ("patches_backward", {"rows": t(7, 12)}, "rows must hold k² = 4 rows for each image, got 7"),
    ("patches_backward", {"rows": t(8, 12).half()}, "rows must be float32 or float64, got float16"),
    ("patches_backward", {"grad_rows": t(8, 11)}, "grad_rows must have shape (8, 12), got (8, 11)"),
    ("patches_backward", {"grad_rows": t(8, 12).double()}, "grad_rows must have rows's type float32, got float64"),
    ("patches_backward", {"norms": t(7)}, "norms must have shape (8,), got (7,)"),
    ("patches_backward", {"norms": t(8, 1)}, "norms must have shape (8,), got (8, 1)"),
    ("patches_backward", {"mask": t(3, 4, 4)}, "mask must have shape (2, h, w), got (3, 4, 4)"),
    ("congruence", {"y": t(2, 6)}, "y must have shape (6, d_T), got (2, 6)"),
    ("congruence", {"x": t(6, 5).half()}, "x must be float32 or float64, got float16"),
    ("congruence", {"y": t(6, 6).double()}, "y must have x's type float32, got float64"),
    ("congruence", {"positions": 0}, "positions must be a positive integer, got 0"),
    ("congruence", {"positions": 4}, "positions must divide the number of rows 6, got 4"),
    ("congruence", {"positions": HUGE}, f"positions must divide the number of rows 6, got {HUGE}"),
    ("congruence", {"coefficients": [1.0]}, "coefficients must hold 4 factors, got 1"),
    ("congruence", {"coefficients": [1.0, NAN, 0.0, 0.0]}, "coefficients[1] must be a finite number, got nan"),
    ("congruence", {"plan": []}, "plan must hold 3 form codes, got 0"),
    ("congruence", {"plan": [0, 0, 0, 0]}, "plan must hold 3 form codes, got 4"),
    ("congruence", {"plan": [2, 0, 0]}, "plan[0] must be 0 (gram), 1 (mixed) or 7 (feature), got 2"),
    ("congruence", {"plan": [-1, 0, 0]}, "plan[0] must be 0 (gram), 1 (mixed) or 7 (feature), got -1"),
    ("congruence", {"plan": [1, 0, 0]}, "plan[0] must be 0 (gram) or 7 (feature) for the second gradient, got 1"),
    ("congruence", {"plan": [0, 1, 0]}, "plan[1] must be 0 (gram) or 7 (feature), got 1"),
    ("congruence", {"plan": [0, 0, 8]}, "plan[2] must be 0 (gram) or 7 (feature), got 8"),
    ("correlation_congruence", {"teacher": t(5, 6)}, "teacher must have shape (6, d_T), got (5, 6)"),
    ("correlation_congruence", {"kernel": 4}, "kernel must be 0 (taylor_rbf), 1 (rbf), 2 (bilinear) or 3 (mmd), got 4"),
    (
        "correlation_congruence",
        {"kernel": -1},
        "kernel must be 0 (taylor_rbf), 1 (rbf), 2 (bilinear) or 3 (mmd), got -1",
    ),
    ("correlation_congruence", {"gamma": 0.0}, "gamma must be a positive number, got 0"),
    ("correlation_congruence", {"gamma": NAN}, "gamma must be a positive number, got nan"),
    ("correlation_congruence", {"order": -1}, "order must be an integer >= 0, got -1"),
    ("correlation_congruence", {"plan": [7]}, "plan must hold 3 form codes, got 1"),
    ("correlation_congruence", {"kernel": 0}, "plan[0] must be 0 (gram) for every kernel but the bilinear one, got 7"),
    ("similarity_preserving", {"teacher": t(3, 4)}, "teacher must have shape (4, ...), got (3, 4)"),
    ("similarity_preserving", {"student": t(4)}, "student must have shape (n, ...), got (4,)"),
    ("similarity_preserving", {"scale": NAN}, "scale must be a finite number, got nan"),
    (
        "similarity_preserving",
        {"feature": True, "student": t(4, 1).expand(4, 2**31)},
        f"student must have sizes whose product is at most 2^60, got ({2**31}, {2**31})",
    ),
    ("gram", {"features": features((4, 3), (5, 3))}, "features[1] must have shape (4, ...), got (5, 3)"),
    ("gram", {"features": features((4,))}, "features[0] must have shape (b, ...), got (4,)"),
    ("gram", {"features": features((4, 3), (4, 0))}, "features[1] must not be empty, got shape (4, 0)"),
    (
        "gram",
        {"features": [t(1, 1).expand(2**31, 1)]},
        f"features[0] must have sizes whose product is at most 2^60, got (1, {2**31}, {2**31})",
    ),
    ("gram_backward", {"features": []}, "features must hold at least one entry, got none"),
    ("gram_backward", {"grad_matrices": t(2, 4, 4)}, "grad_matrices must have shape (3, 4, 4), got (2, 4, 4)"),
    (
        "gram_backward",
        {"grad_matrices": t(3, 4, 4).bfloat16()},
        "grad_matrices must be float32 or float64, got bfloat16",
    ),
    (
        "gram_backward",
        {"features": [t(4, 3), t(4, 3).double(), t(4, 3)]},
        "grad_matrices must have features[1]'s type float64, got float32",
    ),
    ("feature_mse", {"projected": []}, "projected must hold 4 maps, one for each of a sample's weights, got 0"),
    (
        "feature_mse",
        {"targets": features((2, 3, 2, 2))},
        "targets must hold 4 maps, one for each of a sample's weights, got 1",
    ),
    ("feature_mse", {"weights": t(2, 4)}, "weights must have shape (b, s_L, t_L), got (2, 4)"),
    ("feature_mse", {"weights": t(2, 3, 2)}, "projected must hold 6 maps, one for each of a sample's weights, got 4"),
    ("feature_mse", {"weights": t(3, 2, 2)}, "projected[0] must have shape (3, c, h_S, w_S), got (2, 3, 4, 4)"),
    (
        "feature_mse",
        {"targets": features(*[(2, 3, 2, 2)] * 3, (2, 4, 2, 2))},
        "targets[3] must have shape (2, 3, h_T, w_T), got (2, 4, 2, 2)",
    ),
    (
        "feature_mse",
        {"projected": features(*[(2, 3, 2, 2)] * 3, (2, 3, 4))},
        "projected[3] must have shape (2, c, h_S, w_S), got (2, 3, 4)",
    ),
    ("feature_mse", {"scale": INF}, "scale must be a finite number, got inf"),
    ("feature_mse_backward", {"wanted": [1]}, "wanted must hold 8 flags, got 1"),
    ("feature_mse_backward", {"wanted": [1] * 7 + [2]}, "wanted[7] must be 0 or 1, got 2"),
    ("feature_mse_backward", {"grad_loss": t(1)}, "grad_loss must have shape (), got (1,)"),
    ("feature_mse_backward", {"grad_loss": torch.tensor(1)}, "grad_loss must be float32 or float64, got int64"),
    (
        "convolution",
        {"maps": t(2, 32, 4, 3)},
        "maps must be channels_last, with stride 1 between channels, got strides (384, 12, 3, 1)",
    ),
    (
        "convolution",
        {"maps": t(2, 31, 4, 3).contiguous(memory_format=LAST)},
        "maps must have a multiple of 32 channels, got 31",
    ),
    ("convolution", {"weight": t(32, 32, 3, 2)}, "weight must have shape (k, 32, 3, 3), got (32, 32, 3, 2)"),
    ("convolution", {"weight": t(32, 64, 3, 3)}, "weight must have shape (k, 32, 3, 3), got (32, 64, 3, 3)"),
    ("convolution", {"weight": t(40, 32, 3, 3)}, "weight must have a multiple of 32 channels, got 40"),
    ("convolution", {"weight": t(32, 32, 3, 3).double()}, "weight must have maps's type float32, got float64"),
    (
        "convolution",
        {"maps": t(2, 32, 4, 3).half().contiguous(memory_format=LAST)},
        "maps must be float32 or float64, got float16",
    ),
    (
        "convolution_weight",
        {"grad": t(2, 32, 4, 4).contiguous(memory_format=LAST)},
        "grad must have shape (2, k, 4, 3), got (2, 32, 4, 4)",
    ),
    (
        "convolution_weight",
        {"grad": t(2, 32, 4, 3)},
        "grad must be channels_last, with stride 1 between channels, got strides (384, 12, 3, 1)",
    ),
    ("dkd", {"teacher": t(4, 9)}, "teacher must have shape (4, 10), got (4, 9)"),
    ("dkd", {"student": t(4, 10).int()}, "student must be float32, float64, bfloat16 or float16, got int32"),
    ("dkd", {"labels": torch.arange(5)}, "labels must have shape (4,), got (5,)"),
    ("dkd", {"labels": torch.arange(4, dtype=torch.int32)}, "labels must be int64, got int32"),
    ("dkd", {"labels": t(4)}, "labels must be int64, got float32"),
    ("dkd", {"alpha": NAN}, "alpha must be a finite number, got nan"),
    ("dkd", {"beta": -INF}, "beta must be a finite number, got -inf"),
    ("dkd", {"temperature": 0.0}, "temperature must be a positive number, got 0"),
    ("dkd", {"reduction": 3}, "reduction must be 0 (mean), 1 (sum) or 2 (none), got 3"),
    ("top_k", {"indices": torch.arange(4)[:, None].int()}, "indices must be int64, got int32"),
    ("top_k", {"student": t(4, 2)}, "indices must have at most 2 columns, got 3"),
    ("top_k_backward", {"grad_exponents": t(4, 3)}, "grad_exponents must have shape (4, 4), got (4, 3)"),
    ("dist", {"teacher": t(5, 10)}, "teacher must have shape (4, 10), got (5, 10)"),
    ("dist", {"student": t(4, 0), "teacher": t(4, 0)}, "student must not be empty, got shape (4, 0)"),
    ("dist", {"mask": torch.ones(4)}, "mask must be bool, got float32"),
    ("dist", {"mask": torch.ones(3).bool()}, "mask must have shape (4,), got (3,)"),
    ("dist", {"beta": INF}, "beta must be a finite number, got inf"),
    ("dist", {"gamma": NAN}, "gamma must be a finite number, got nan"),
    ("dist", {"temperature": -1.0}, "temperature must be a positive number, got -1"),
    ("rkd", {"student": t(256, 8), "teacher": t(2, 8)}, "teacher must have shape (256, d_T), got (2, 8)"),
    ("rkd", {"student": t(5, 0)}, "student must not be empty, got shape (5, 0)"),
    ("rkd", {"distance_weight": -1.0}, "distance_weight must be a number >= 0, got -1"),
    ("rkd", {"angle_weight": NAN}, "angle_weight must be a number >= 0, got nan"),
    (
        "rkd",
        {"student": t(1, 1).expand(2**31, 1), "teacher": t(1, 1).expand(2**31, 1)},
        f"student must have sizes whose product is at most 2^60, got ({2**31}, {2**31})",
    ),
    ("local_correlation", {"students": [], "teachers": []}, "students must hold at least one entry, got none"),
    (
        "local_correlation",
        {"teachers": features((2, 4, 4, 4))},
        "teachers must hold 2 entries, one for each stage, got 1",
    ),
    (
        "local_correlation",
        {"masks": features((2, 4, 4))},
        "masks must hold 2 entries, one for each stage, or none, got 1",
    ),
    ("local_correlation", {"k": [2]}, "k must hold 2 entries, one for each stage, got 1"),
    ("local_correlation", {"k": [2, 0]}, "k[1] must be a positive integer, got 0"),
    (
        "local_correlation",
        {"k": [2, 3]},
        "k[1] must divide the height and width of students[1] unless resize is true, got k[1]=3 for 4 x 4",
    ),
    (
        "local_correlation",
        {"k": [2, 2**30], "resize": True},
        f"students[1] must have sizes whose product is at most 2^60, got (2, {2**30}, {2**30}, 3, 1, 1)",
    ),
    ("local_correlation", {"weights": [1.0, 1.0]}, "weights must hold 3 factors, got 2"),
    ("local_correlation", {"weights": [1.0, INF, 1.0]}, "weights[1] must be a finite number, got inf"),
    ("local_correlation", {"plans": [0, 0, 0]}, "plans must hold 6 form codes, three for each stage, got 3"),
    ("local_correlation", {"plans": [0, 0, 0, 5, 0, 0]}, "plans[3] must be 0 (gram), 1 (mixed) or 7 (feature), got 5"),
    (
        "local_correlation",
        {"plans": [0, 0, 0, 1, 0, 0]},
        "plans[3] must be 0 (gram) or 7 (feature) for the second gradient, got 1",
    ),
    ("local_correlation", {"wanted": [1, 1]}, "wanted must hold 4 flags, got 2"),
    ("local_correlation", {"wanted": [1, 1, -1, 1]}, "wanted[2] must be 0 or 1, got -1"),
    (
        "local_correlation",
        {"students": features((2, 3, 4, 4), (3, 3, 4, 4))},
        "teachers[1] must have shape (3, c_T, h_T, w_T), got (2, 4, 4, 4)",
    ),
    (
        "local_correlation",
        {"masks": features((2, 4, 4), (3, 4, 4))},
        "masks[1] must have shape (2, h, w), got (3, 4, 4)",
    ),
    ("local_correlation", {"masks": []}, "threshold must be None without masks, got 0.5"),
    ("local_correlation", {"eps": -INF}, "eps must be a number >= 0, got -inf"),
    ("local_correlation_backward", {"k": []}, "k must hold at least one entry, got none"),
    ("local_correlation_backward", {"k": [2]}, "grad_rows must hold 2 entries, two for each stage, got 4"),
    (
        "local_correlation_backward",
        {"k": [2, 5]},
        "k[1] must divide the height and width of grad_rows[1] unless resize is true, got k[1]=5 for 4 x 4",
    ),
    ("local_correlation_backward", {"shapes": SHAPE}, "shapes must hold 16 numbers, eight for each stage, got 4"),
    (
        "local_correlation_backward",
        {"shapes": [*SHAPE, *SHAPE, *SHAPE, 4, 4, 4, 0]},
        "grad_rows[2] must have shape (N, 12), got (8, 16)",
    ),
    (
        "local_correlation_backward",
        {"shapes": [*SHAPE, 3, HUGE, 4, 0] * 2, "resize": True},
        f"grad_rows[1] must have sizes whose product is at most 2^60, got (1, 2, 2, 3, {HUGE // 2}, 2)",
    ),
    ("local_correlation_backward", {"grad_rows": []}, "grad_rows must hold 4 entries, two for each stage, got 0"),
    (
        "local_correlation_backward",
        {"grad_rows": features((8, 12), (7, 12), (8, 16), (8, 16))},
        "grad_rows[1] must hold k[1]² = 4 rows for each image, got 7",
    ),
    (
        "local_correlation_backward",
        {"grad_rows": features((8, 12), (8, 12), (8, 16), (16,))},
        "grad_rows[3] must have shape (N, 16), got (16,)",
    ),
    ("local_correlation_backward", {"grad_loss": t(2)}, "grad_loss must have shape (), got (2,)"),
    (
        "local_correlation_backward",
        {"masks": features((2, 4, 4), (1, 4, 4))},
        "masks[1] must have shape (2, h, w), got (1, 4, 4)",
    ),
]


def registered() -> list[str]:
    schemas = torch._C._jit_get_all_schemas()
    return sorted(
        schema.name.removeprefix("kdkernels::") for schema in schemas if schema.name.startswith("kdkernels::")
    )


def test_every_operator_has_a_valid_call_and_malformed_ones():
    assert sorted(CALLS) == registered()
    assert {op for op, _, _ in MALFORMED} == set(CALLS)


@every_operator
def test_a_valid_call_passes(op):
    call = CALLS[op](usual)
    for found, promised in zip(tree_leaves(run(op, call)), tree_leaves(run_fake(op, call)), strict=True):
        assert found.isfinite().all()
        assert (found.shape, found.dtype, found.stride()) == (promised.shape, promised.dtype, promised.stride())


@pytest.mark.parametrize(("op", "changes", "words"), MALFORMED)
def test_a_malformed_call_raises_and_the_fake_says_the_same(op, changes, words):
    call = CALLS[op](usual) | changes
    assert in_child(lambda: outcome(lambda: run(op, call))) == f"{op}: {words}"
    assert outcome(lambda: run_fake(op, call)) == f"{op}: {words}"


@pytest.mark.parametrize(("op", "changes", "words"), MALFORMED)
def test_a_triton_kernel_says_the_same(op, changes, words):
    """Before it is launched: this needs neither a GPU nor the interpreter."""
    (room,) = (operator.name for operator in OPERATORS.values() if KERNELS[op] in operator.kernels)
    if find_spec(f"kdkernels.ops.{room}.triton") is None:
        pytest.skip("Triton has no such kernel")
    pytest.importorskip("triton")
    load(room, "triton")
    call = CALLS[op](usual) | changes
    assert outcome(lambda: getattr(torch.ops.kdkernels_triton, op)(**call)) == f"{op}: {words}"


def test_a_call_without_a_tensor_raises():
    """PyTorch does not know which kernel to call."""
    with pytest.raises(RuntimeError, match=r"no tensor arguments.*kdkernels::gram"):
        run("gram", {"features": []})


def tensor_arguments(op: str) -> list[str]:
    return [name for name, value in CALLS[op](usual).items() if tensors_of(value)]


def tensors_of(value: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


TENSOR_ARGUMENTS = [(op, name) for op in CALLS for name in tensor_arguments(op)]
every_tensor = pytest.mark.parametrize(("op", "name"), TENSOR_ARGUMENTS)


def with_first_tensor(op: str, name: str, change: Callable[[Tensor], object]) -> Call:
    call = CALLS[op](usual)
    value = call[name]
    call[name] = [change(value[0]), *value[1:]] if isinstance(value, list) else change(value)
    return call


@every_tensor
def test_memory_that_was_freed_is_not_read(op, name):
    call = with_first_tensor(op, name, lambda tensor: freed(*tensor.shape, dtype=tensor.dtype))
    message = in_child(lambda: outcome(lambda: run(op, call)))
    assert re.match(rf"{op}: {name}(\[0\])? must lie within its storage of 0 bytes, got shape", message)


@every_tensor
def test_a_sparse_tensor_is_refused(op, name):
    """By the dispatcher, which knows of no such kernel; by the fake, which sees one."""
    if name in ("grad_loss", "norms"):
        pytest.skip("a sparse tensor has dimensions, or a layout of its own")
    call = with_first_tensor(op, name, lambda tensor: tensor.to_sparse())
    assert f"kdkernels::{op}" in in_child(lambda: outcome(lambda: run(op, call)))


@every_tensor
def test_no_tensor_may_be_missing(op, name):
    if name in ("mask", "key_mask"):
        pytest.skip("it may")
    call = with_first_tensor(op, name, lambda tensor: None)
    assert op in in_child(lambda: outcome(lambda: run(op, call)))


# Calls that hypothesis breaks ---------------------------------------------------------------------------------------

INTS = (0, 1, 2, 3, 7, 8, -1, -2, 2**31, 2**62, 2**63 - 1, -(2**63))
FLOATS = (0.0, 1.0, -1.0, 1e-300, 1e300, NAN, INF, -INF)
DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    *(torch.int64, torch.bool, torch.uint8, torch.complex64),
)

BREAKS = (
    *("size", "size", "more dimensions", "fewer dimensions", "dtype", "dtype", "strided", "transposed", "expanded"),
    *("overlapping", "empty", "huge", "freed", "meta", "sparse", "none", "nan", "scalar", "negated"),
)


@st.composite
def broken_tensors(draw, tensor: Tensor) -> Tensor | None:
    """Return the tensor, or one that differs in one way."""
    kind = draw(st.sampled_from(BREAKS))
    d = draw(st.integers(0, tensor.dim() - 1)) if tensor.dim() else None
    note(f"a tensor of shape {tuple(tensor.shape)} is made {kind}, in dimension {d}")
    if kind == "dtype":
        return tensor.to(draw(st.sampled_from(DTYPES)))
    if kind == "more dimensions":
        return tensor[None] if draw(st.booleans()) else tensor[..., None]
    if kind == "meta":
        return tensor.to("meta")
    if kind == "freed":
        return freed(*tensor.shape, dtype=tensor.dtype)
    if kind == "scalar":
        return torch.tensor(1.0)
    if kind == "none":
        return None
    if kind == "negated" and tensor.is_floating_point():
        return torch._neg_view(tensor)
    if d is None or not tensor.numel():
        return tensor
    if kind == "size":
        size = draw(st.sampled_from((1, tensor.shape[d] + 1, max(tensor.shape[d] - 1, 1), 2 * tensor.shape[d])))
        return torch.randn([size if i == d else other for i, other in enumerate(tensor.shape)]).to(tensor.dtype)
    if kind == "fewer dimensions":
        return tensor.select(d, 0)
    if kind == "strided":
        return torch.stack([tensor, tensor], d + 1).flatten(d, d + 1)[(slice(None),) * d + (slice(None, None, 2),)]
    if kind == "transposed":
        return tensor.transpose(d, draw(st.integers(0, tensor.dim() - 1)))
    if kind == "expanded":
        return tensor.narrow(d, 0, 1).expand(tensor.shape)
    if kind == "overlapping":
        strides = [draw(st.integers(0, 2)) for _ in tensor.shape]
        reach = 1 + sum(stride * (size - 1) for stride, size in zip(strides, tensor.shape, strict=True))
        return torch.randn(reach).to(tensor.dtype).as_strided(tensor.shape, strides)
    if kind == "empty":
        return tensor.narrow(d, 0, 0)
    if kind == "huge":
        return (
            tensor.flatten()[:1].view([1] * tensor.dim()).expand([2**61 if i == d else 1 for i in range(tensor.dim())])
        )
    if kind == "sparse":
        return tensor.to_sparse()
    if kind == "nan" and tensor.is_floating_point():
        tensor = tensor.clone()
        tensor.select(d, 0).fill_(NAN)
    return tensor


@st.composite
def broken(draw, value: object) -> object:
    """Return an argument, or one that differs in one way."""
    if isinstance(value, Tensor):
        return draw(broken_tensors(value))
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw(st.sampled_from((*INTS, value + 1, value - 1)))
    if isinstance(value, float):
        return draw(st.sampled_from((*FLOATS, 2 * value, -value)))
    if isinstance(value, list) and value:
        i = draw(st.integers(0, len(value) - 1))
        how = draw(st.sampled_from(("entry", "entry", "entry", "dropped", "repeated", "none left", "swapped")))
        note(f"entry {i} of a list: {how}")
        if how == "entry":
            return changed(value, i, draw(broken(value[i])))
        if how == "dropped":
            return value[:i] + value[i + 1 :]
        if how == "repeated":
            return [*value, value[i]]
        return [] if how == "none left" else value[::-1]
    return value


@st.composite
def calls(draw, op: str) -> Call:
    """Return a call with none to three of its arguments broken."""
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    call = CALLS[op](lambda _, least, most: draw(st.integers(least, most)))
    optional = {"mask": None, "threshold": draw(st.sampled_from((None, 0.5, -1.0, NAN)))}
    for name in draw(st.lists(st.sampled_from(sorted(call)), max_size=3, unique=True)):
        note(f"{name} is broken")
        if name in optional and draw(st.booleans()):
            call[name] = optional[name]
        else:
            call[name] = draw(broken(call[name]))
    return call


def tame(call: Call) -> bool:
    """Return whether no value is so large, or small, that floats overflow on the way, or means nothing."""
    temperatures = call.get("temperatures", torch.ones(()))
    if "saved" in call or temperatures.is_meta or not (temperatures > 0).all():
        return False  # random numbers in place of those that the forward pass saves; logits over zero
    leaves = tree_leaves(call)
    numbers = [leaf for leaf in leaves if isinstance(leaf, float)]
    return all(1e-9 < abs(number) < 1e3 or number == 0 for number in numbers) and all(
        leaf.is_meta or leaf.isfinite().all() for leaf in leaves if isinstance(leaf, Tensor)
    )


# What PyTorch says before or after the operator has its turn.
BY_PYTORCH = re.compile(
    "Could not run .kdkernels::|Expected a value of type|no tensor arguments to this function"
    "|not enough memory|can't allocate memory|bad_alloc|vector::|Storage size calculation overflowed|invalid argument"
)
OF_VALUES = re.compile(r"must lie within its storage|(labels|indices) must be class indices")  # fakes have no values


@every_operator
def test_no_call_crashes(op):
    """Whatever is wrong with a call: it raises and names the operator, or its results are what the fake promises."""

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False
    )
    @given(calls(op))
    def check(call: Call) -> None:
        error = result = None
        try:
            result = run(op, call)
        except (RuntimeError, TypeError) as raised:
            error = str(raised)
        if error is not None:
            assert error.startswith(f"{op}: ") or BY_PYTORCH.search(error), error
        if error is None or (error.startswith(f"{op}: ") and not OF_VALUES.search(error)):
            compare_with_fake(op, call, result, error)

    check()


def compare_with_fake(op: str, call: Call, result: Any, error: str | None) -> None:
    promised = None
    try:
        promised = run_fake(op, call)
        said = None
    except RuntimeError as raised:
        said = str(raised)
    assert said == error
    if error is not None:
        return
    finite = tame(call)  # such values stay finite
    for found, expected in zip(tree_leaves(result), tree_leaves(promised), strict=True):
        assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)
        assert found.is_meta or not finite or found.isfinite().all()
