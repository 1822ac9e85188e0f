"""Masks of samples and of classes with Triton's kernels of ICCT, in Triton's interpreter."""

from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("test_icc_masks")

from test_icc_masks import test_masked_equals_shortened, test_masked_maps, test_nothing_counts  # noqa: E402, F401

import kdkernels  # noqa: E402


@pytest.fixture
def backend() -> Iterator[str]:
    with kdkernels.use_backend("triton"):
        yield "triton"
