"""What tests on a GPU share."""

from __future__ import annotations

import os

# cuBLAS, with which the references compute, repeats its results only with a fixed workspace.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
