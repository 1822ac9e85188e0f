"""The pages of the hosts are true: their code runs where the host is installed."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from mktestdocs import check_md_file

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted(ROOT.glob("docs/hosts/*.md"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec(page.stem) is None:
        pytest.skip(f"{page.stem} is not installed: make test-hosts")
    monkeypatch.chdir(tmp_path)
    check_md_file(page, memory=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert not [target for target in targets if "://" not in target and not (page.parent / target).exists()]
