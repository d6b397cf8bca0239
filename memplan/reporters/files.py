"""A report's files: HTML, Markdown, and a folder of the figures of the latter."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from memplan.errors import InputError
from memplan.profile import slug
from memplan.reporters import html, markdown
from memplan.reporters.document import Document
from memplan.store import write_text

FIELD = "--out"


def write(
    document: Document, folder: Path, name: str | None = None
) -> tuple[Path, ...]:
    """Writes the files, each at once or not at all; the HTML's path comes first.

    Everything is drawn before anything is written. Raises InputError where the folder
    cannot be made or written.
    """
    if name is not None:
        document = dataclasses.replace(document, name=slug(name))
    texts = {
        f"{document.name}.html": html.render(document),
        f"{document.name}.md": markdown.render(document),
        **{
            f"{document.name}/{file}": svg
            for file, svg in markdown.pictures(document).items()
        },
    }
    for file, text in texts.items():
        _make_folder((folder / file).parent)
        write_text(folder / file, text, FIELD)
    return tuple(folder / file for file in texts)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"cannot be made ({error.strerror or error})"
        remedy = "name a folder that may be made or written"
        raise InputError(FIELD, str(folder), problem, remedy) from error
