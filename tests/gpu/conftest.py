"""Shared by the tests on a GPU."""

from __future__ import annotations

import os

# The references use cuBLAS, which repeats its results only with a fixed workspace.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
