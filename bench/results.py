"""Files of results: the measurements of one machine, each case with its commit and date."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Result = dict[str, Any]
SAME_MACHINE = ("processor", "PyTorch")


def read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is truncated or corrupt: {error}") from error


def add(file: Path, provenance: dict[str, Any], measured: Iterable[Result]) -> None:
    """Replace a file's results of the same cases. Drop all results of another machine or another PyTorch version."""
    own = {key: provenance[key] for key in ("commit", "date")}
    machine = {key: value for key, value in provenance.items() if key not in own}
    before = read(file) if file.exists() else {}
    kept = before.get("results", []) if all(before.get(key) == machine[key] for key in SAME_MACHINE) else []
    results = {result["case"]: result for result in kept} | {result["case"]: result | own for result in measured}
    write(file, {**machine, "results": list(results.values())})


def write(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
