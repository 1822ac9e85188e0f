"""The documentation is true: its code runs, its tables are the measurements, its links lead somewhere.

The Python blocks of a page run in one namespace. The examples of a docstring run as doctests.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest
from mktestdocs import check_md_file

import kdkernels

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
WITH_EXAMPLES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in ROOT.glob("kdkernels/**/*.py")
    if ">>> " in file.read_text()
)
DOCUMENTED = ("", ".functional", ".metrics", ".nn", ".samplers")  # whose every docstring has all parts


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_md_file(page, memory=True)


def test_tables_are_those_of_the_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    report = importlib.import_module("report")
    for page in PAGES:
        assert report.filled(page.read_text()) == page.read_text(), f"run python bench/report.py: {page.name}"


def test_readme_is_read_in_two_minutes() -> None:
    """The state of GPU support stands above the first figure, and the whole page has under 900 words."""
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) < 900
    assert "GPU" in text.split("](docs/figures/")[0]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


def test_index_has_every_page() -> None:
    linked = set(re.findall(r"\]\((\S+\.md)\)", (ROOT / "docs" / "index.md").read_text()))
    pages = {str(page.relative_to(ROOT / "docs")) for page in (*ROOT.glob("docs/*.md"), *ROOT.glob("docs/hosts/*.md"))}
    assert pages - linked == {"index.md"}


@pytest.mark.parametrize("name", ["", ".functional", ".metrics", ".nn", ".samplers", ".integrations.repdistiller"])
def test_public_names_have_docstrings(name: str) -> None:
    module = importlib.import_module(f"kdkernels{name}")
    own = {public: vars(module)[public].__doc__ for public in module.__all__}  # not what a class inherits
    assert {public for public, text in own.items() if not text} == set()
    methods = [vars(value) for value in map(vars(module).get, module.__all__) if inspect.isclass(value)]
    public = {name: m for found in methods for name, m in found.items() if inspect.isfunction(m) and name[0] != "_"}
    assert {name for name, method in public.items() if name != "forward" and not inspect.getdoc(method)} == set()


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_docstring_examples_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted
    assert not result.failed


def public_names() -> dict[str, object]:
    modules = [importlib.import_module(f"kdkernels{name}") for name in DOCUMENTED]
    found = {name: vars(module)[name] for module in modules for name in module.__all__}
    return {name: value for name, value in found.items() if callable(value)}


@pytest.mark.parametrize("name", public_names())
def test_docstring_has_every_part(name: str) -> None:
    """A module that holds the settings of a function leaves all parts but the example to this function."""
    value = public_names()[name]
    text = inspect.getdoc(value)
    parts = set(re.findall(r"^(\w+):$", text, re.MULTILINE)) | set(re.findall(r"^    (\w+): ", text, re.MULTILINE))
    wanted = {"Examples"}
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        wanted |= set(signature.parameters)
        wanted |= {"Returns", "Raises"} if signature.return_annotation not in ("None", "Iterator[None]") else set()
        wanted |= {"Memory"} if signature.return_annotation == "Tensor" else set()
    if name == "Calibration":
        wanted = {"Attributes", "projected", "targets", "attention"}
    assert wanted <= parts


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
