"""`Document`: a report's content, which HTML and Markdown are two forms of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from memplan.reporters.figures import Figure


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows under the names of columns; cells are text."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Sequence[str] = ()
    """Columns that hold numbers."""
    colours: Sequence[str] = ()
    """For each row the role of a colour (memplan.reporters.palette), or nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Code:
    """A text to copy."""

    name: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Words, a picture, a table and texts to copy, in this order."""

    title: str
    words: Sequence[str] = ()
    figure: Figure | None = None
    table: Table | None = None
    code: Sequence[Code] = ()

    @property
    def anchor(self) -> str:
        """What links to the section point to."""
        return "-".join(self.title.casefold().split())


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A report, whatever it is about."""

    name: str
    """The name of its files, without an ending."""
    title: str
    verdict: str
    """One sentence."""
    fits: bool | None = None
    lead: Sequence[str] = ()
    """Lines below the verdict."""
    sections: Sequence[Section] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """What the report shows, as JSON."""

    @property
    def figures(self) -> Iterator[Figure]:
        for section in self.sections:
            if section.figure is not None:
                yield section.figure
