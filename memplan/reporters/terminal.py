"""Tables for people: drawn on a terminal, plain columns when piped, NO_COLOR heeded."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 240
"""Characters of a line when nobody's screen wraps it, so that no cell is cut."""


def console(*, stderr: bool = False) -> Console:
    """A console that draws for a terminal and writes plain text elsewhere."""
    stream = sys.stderr if stderr else sys.stdout
    if stream.isatty():
        return Console(file=stream, highlight=False)
    return Console(file=stream, highlight=False, no_color=True, width=PIPED_WIDTH)


def say(text: str, style: str = "") -> None:
    """One line, or a paragraph that wraps at the screen's width."""
    console().print(Text(text, style=style))


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[str] = (),
    title: str = "",
    caption: str = "",
) -> None:
    """A table whose first column may wrap and whose `right` columns are numbers."""
    drawn = Table(
        box=SIMPLE_HEAD if sys.stdout.isatty() else None,
        title=title or None,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        header_style="bold",
    )
    for index, name in enumerate(columns):
        drawn.add_column(
            name,
            justify="right" if name in right else "left",
            no_wrap=index > 0,
            overflow="fold",
        )
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    out = console()
    out.print(drawn)
    if caption:
        out.print(Text(caption, style="dim"))
