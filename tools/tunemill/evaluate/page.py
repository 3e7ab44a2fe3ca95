"""One self-contained HTML page: no network, no script, light and dark, readable on a phone and on paper.

A page is a headline and sections, a section is blocks; the template knows only these. Every text that
comes from data is escaped by Jinja.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from markupsafe import Markup

from tunemill import __version__
from tunemill.evaluate.tables import Table, spread, written


@dataclass(frozen=True)
class Words:
    """A paragraph."""

    text: str
    soft: bool = False
    """It is said in passing."""
    kind: str = "words"


@dataclass(frozen=True)
class Heading:
    """A title within a section."""

    text: str
    kind: str = "heading"


@dataclass(frozen=True)
class Quote:
    """A text from the data, with where it comes from."""

    text: str
    source: str
    kind: str = "quote"


@dataclass(frozen=True)
class Code:
    """A command or a listing, as it is."""

    text: str
    summary: str = ""
    """It is folded under this line."""
    kind: str = "code"


@dataclass(frozen=True)
class Picture:
    """A plot, what its marks mean, and what to know about it."""

    svg: Markup
    caption: str = ""
    legend: tuple[tuple[str, str], ...] = ()
    """Colour of the style and its meaning."""
    kind: str = "picture"


@dataclass(frozen=True)
class Listing:
    """A table within a section."""

    table: Table
    kind: str = "table"


Block = Words | Heading | Quote | Code | Picture | Listing


@dataclass(frozen=True)
class Section:
    """Blocks under a title that can be linked to."""

    identifier: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Tile:
    """One further figure beside the headline."""

    title: str
    value: str
    spread: str = ""


@dataclass(frozen=True)
class Page:
    """Everything on a page."""

    subject: str
    """What it is about, such as a run's name."""
    headline: str
    """The figure in large letters."""
    what: str
    """What the figure is, with its range."""
    summary: str
    tiles: tuple[Tile, ...]
    sections: tuple[Section, ...] = field(default=())

    def tables(self) -> list[Table]:
        """Return every table on it, in order."""
        blocks = (block for section in self.sections for block in section.blocks)
        return [block.table for block in blocks if isinstance(block, Listing)]


def html(page: Page) -> str:
    """Return the page as one file."""
    return str(_template().render(page=page, version=__version__))


@lru_cache(maxsize=1)
def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tunemill.evaluate", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["written"] = lambda value, kind: written(kind, value)
    environment.filters["spread"] = lambda value, kind: spread(kind, value)
    return environment.get_template("page.html.jinja")
