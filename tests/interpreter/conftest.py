"""Makes Triton's interpreter faster, and marks the contracts that take long in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import triton.language as tl
from losses import Loss
from triton.runtime import interpreter

# Contracts and losses for every day. The others repeat code paths of these, at seconds each.
QUICK = re.compile(
    r"test_(strides.*sliced|not_a_number.*nan|gradients_where_wanted.*True, False|a_second|compiled|no_gradient"
    r"|opcheck|every_kernel|the_table)"
)
VARIANTS = re.compile(
    r"teacher_free|raw rows|hint|stages|local_correlation, |token_relation,|token_relation hinge|patches-"
    r"|opcheck\[(divergence|token_relation_pairs)"
)
# The largest batch and width. A resampled pixel reads 16 pixels, and an image has 18 rows of them. The feature form of
# similarities multiplies all pairs of 48 numbers per channel.
LARGEST = {"local_correlation masked": (2, 40), "similarity_preserving, feature form": (80, 6)}
MASKED = re.compile(r"interpreted_row_masks.*(compiled_once|padding)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        contract = "contracts" in item.nodeid and (not QUICK.search(item.name) or VARIANTS.search(item.name))
        if contract or MASKED.search(item.nodeid):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def loss(loss: Loss, name: str) -> Loss:
    """Return each loss of the table, with smaller inputs where many programs repeat one code path."""
    if name not in LARGEST:
        return loss
    batches, widths = LARGEST[name]
    return loss._replace(shapes=lambda batch, width: loss.shapes(min(batch, batches), min(width, widths)))


@pytest.fixture(autouse=True, scope="session")
def language_patched_once_per_launch() -> Iterator[None]:
    """A launch replaces the functions of triton.language by the interpreter's, and restores them at the end.

    Each call between device functions replaces all of them again, which takes a third of the interpreter's time.
    """
    replace = interpreter._patch_lang

    def replace_once(function: Callable) -> interpreter._LangPatchScope:
        modules = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if all(module.range.__module__ == interpreter.__name__ for module in modules):
            return interpreter._LangPatchScope()
        return replace(function)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_once)
        yield
