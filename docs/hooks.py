"""Hooks of the site, see mkdocs.yml: pages from other folders, figures for light and dark pages, formulas as MathML."""

from __future__ import annotations

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md")  # pages of the repository's root that the site shows too
FIGURE = re.compile(r"!\[(?P<text>[^]]*)\]\((?P<figure>figures/[\w-]+)\.svg\)")
LINK = re.compile(rf"\]\(\.\./(?P<up>(?:\.\./)*)(?P<page>{'|'.join(OUTSIDE)})\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(?P<formula>.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add a page per host, docs/hosts/*.md, to the navigation."""
    hosts = next(entry["Hosts"] for entry in config.nav if "Hosts" in entry)
    hosts += [f"hosts/{file.name}" for file in sorted(Path(config.docs_dir).glob("hosts/*.md"))]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name in OUTSIDE:
        files.append(File.generated(config, name, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    if page.file.src_uri in OUTSIDE:
        markdown = markdown.replace("](docs/", "](")
    markdown = LINK.sub(r"](\g<up>\g<page>)", markdown)
    return FIGURE.sub(
        r"![\g<text>](\g<figure>.svg#only-light){ width=100% }![\g<text>](\g<figure>-dark.svg#only-dark){ width=100% }",
        markdown,
    )


def on_page_content(content: str, **_) -> str:
    """Browsers draw MathML without a script."""

    def mathml(match: re.Match) -> str:
        display = "block" if match[2] == "[" else "inline"
        return convert(html.unescape(match["formula"]).strip(), display=display)

    return FORMULA.sub(mathml, content)
