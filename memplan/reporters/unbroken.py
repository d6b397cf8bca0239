"""A console that lets the command line deal with a reader that has gone."""

from __future__ import annotations

from typing import NoReturn

from rich.console import Console


class UnbrokenConsole(Console):
    """One whose broken pipe is an error of Python's, and no exit with 1."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError
