"""The Python blocks of the documentation run as they are written, one page in one namespace."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
from mktestdocs import check_md_file

import kdkernels

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_md_file(page, memory=True)


def test_tables_are_those_of_the_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    report = importlib.import_module("report")
    for page in PAGES:
        assert report.filled(page.read_text()) == page.read_text(), f"run python bench/report.py: {page.name}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


def test_index_has_every_page() -> None:
    linked = set(re.findall(r"\]\((\S+\.md)\)", (ROOT / "docs" / "index.md").read_text()))
    assert {page.name for page in ROOT.glob("docs/*.md")} - linked == {"index.md"}


@pytest.mark.parametrize("name", ["", ".functional", ".metrics", ".nn", ".samplers", ".integrations.repdistiller"])
def test_public_names_have_docstrings(name: str) -> None:
    module = importlib.import_module(f"kdkernels{name}")
    own = {public: vars(module)[public].__doc__ for public in module.__all__}  # not what a class inherits
    assert {public for public, text in own.items() if not text} == set()
    methods = [vars(value) for value in map(vars(module).get, module.__all__) if inspect.isclass(value)]
    public = {name: m for found in methods for name, m in found.items() if inspect.isfunction(m) and name[0] != "_"}
    assert {name for name, method in public.items() if name != "forward" and not inspect.getdoc(method)} == set()


def test_type_checkers_see_every_function() -> None:
    """What a star imports they take from a list of names that is written out, not from a computed one."""
    package = ast.parse(Path(kdkernels.__file__).read_text()).body
    stars = [node.module for node in package if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"]
    names = []
    for module in stars:
        file = importlib.import_module(f"kdkernels.{module}").__file__
        assigned = [node for node in ast.parse(Path(file).read_text()).body if isinstance(node, ast.Assign)]
        names += ast.literal_eval(next(node.value for node in assigned if ast.unparse(node.targets) == "__all__"))
    assert sorted(names) == kdkernels.functional.__all__
