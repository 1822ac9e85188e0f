"""Loads the native library on first use, and says in words why when it cannot."""

from __future__ import annotations

import torch


def why_not(device: torch.device) -> str | None:
    return "the native library was not built"
