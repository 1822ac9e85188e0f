"""The CUDA operators refuse malformed calls in the same words as those of the CPU."""

from __future__ import annotations

import pytest
import torch
from calls import CALLS, usual
from test_boundary import MALFORMED, outcome

from kdkernels.ops.operator import OPERATORS

ON_CUDA = {kernel.name for operator in OPERATORS.values() if "cuda" in operator.native for kernel in operator.kernels}


def test_every_kernel_has_malformed_calls():
    assert {op for op, _, _ in MALFORMED} >= ON_CUDA


@pytest.mark.parametrize(("op", "changes", "words"), [case for case in MALFORMED if case[0] in ON_CUDA])
def test_a_malformed_call_raises(op, changes, words):
    if any(isinstance(value, torch.Tensor) and value.is_meta for value in changes.values()):
        pytest.skip("the emulated operators have no fakes for meta tensors")
    call = CALLS[op](usual) | changes
    assert outcome(lambda: getattr(torch.ops.kdkernels_emulated, op)(**call)) == f"{op}: {words}"
