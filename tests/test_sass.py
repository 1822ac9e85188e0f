"""The count of instructions per tensor-core instruction."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

SASS = """
		Function : without_products
        /*0000*/                   IMAD R1, R2, R3, R4 ;
        /*0010*/                   BRA 0x0 ;
		Function : nested
        /*0000*/                   MOV R1, RZ ;
        /*0010*/                   LDS R2, [R3] ;
        /*0020*/              @!P0 BRA 0x40 ;
        /*0030*/                   HMMA.1688.F32.TF32 R4, R4, R2, R4 ;
        /*0040*/                   HMMA.1688.F32.TF32 R8, R8, R2, R8 ;
        /*0050*/               @P1 BRA 0x10 ;
        /*0060*/                   FADD R1, R1, R4 ;
        /*0070*/               @P2 BRA 0x0 ;
        /*0080*/                   EXIT ;
"""


def test_the_innermost_loop_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench")
    (loop,) = importlib.import_module("sass").loops(SASS)
    assert loop.kernel == "nested"
    assert (loop.instructions, loop.products, loop.ratio) == (5, 2, 2.5)
    assert loop.counts == {"LDS": 1, "BRA": 2, "HMMA": 2}
