"""Triton's interpreter, quicker."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(autouse=True, scope="session")
def language_patched_once_per_launch() -> Iterator[None]:
    """A launch replaces the functions of triton.language by the interpreter's, and puts them back when it is over.

    Each call of one device function by another replaces them all again: a third of the interpreter's time.
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
