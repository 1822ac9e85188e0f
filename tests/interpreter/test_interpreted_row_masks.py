"""Masks of rows with Triton's kernels, in Triton's interpreter."""

from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("test_row_masks")

from test_row_masks import (  # noqa: E402, F401
    test_compiled_once_for_all_masks,
    test_no_sample_counts,
    test_padding_may_hold_anything,
)

import kdkernels  # noqa: E402

WITHOUT_KERNELS = ("PKT", "AT", "AT, stages", "logit MSE", "CKA, feature form", "CKA, Gram form")


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.node.callspec.params["name"] in WITHOUT_KERNELS:
        pytest.skip("it has no Triton kernels")
    with kdkernels.use_backend("triton"):
        yield "triton"
