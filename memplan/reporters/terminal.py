"""Tables for people: drawn on a terminal, plain columns when piped, NO_COLOR heeded.

What draws is imported when something is drawn, so that `--json` does without it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 240
"""Characters of a line where no screen wraps it, so that no cell is cut."""


def console(*, stderr: bool = False) -> Console:
    """A console that draws for a terminal and writes plain text elsewhere."""
    from memplan.reporters.unbroken import UnbrokenConsole

    stream = sys.stderr if stderr else sys.stdout
    if stream.isatty():
        return UnbrokenConsole(file=stream, highlight=False)
    return UnbrokenConsole(
        file=stream, highlight=False, no_color=True, width=PIPED_WIDTH
    )


def say(text: str, style: str = "") -> None:
    """One line, or a paragraph that wraps at the screen's width."""
    from rich.text import Text

    console().print(Text(text, style=style))


def plus(counts: Iterable[int]) -> str:
    """Counts that lie apart, as a sum: `27 + 32`; 0 where there are none."""
    return " + ".join(map(str, counts)) or "0"


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[str] = (),
    wraps: Sequence[str] = (),
    title: str = "",
) -> None:
    """A table whose `right` columns are numbers.

    Its first column may wrap, and so may those in `wraps`.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    is_terminal = sys.stdout.isatty()
    drawn = Table(
        box=SIMPLE_HEAD if is_terminal else None,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1 if is_terminal else 2, 0, 0),
        header_style="bold",
    )
    for index, name in enumerate(columns):
        drawn.add_column(
            name,
            justify="right" if name in right else "left",
            no_wrap=index > 0 and name not in wraps,
            overflow="fold",
        )
    for row in rows:
        drawn.add_row(*map(Text, row))
    if title:
        say(title, style="bold")
    console().print(drawn)


@contextmanager
def progress(title: str, *, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Shows on a terminal's stderr what is going on; yields what is told of it."""
    if quiet or not sys.stderr.isatty():
        yield lambda label: None
        return
    with console(stderr=True).status(title) as status:
        yield lambda label: status.update(f"{title}: {label}")
