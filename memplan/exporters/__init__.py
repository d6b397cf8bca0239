"""A recipe as the files that a trainer takes, one file a trainer.

What is written was checked first, as far as the libraries are here to check with, and
says of itself what was and what was not. A folder gets all of its files or none.
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from memplan import registry
from memplan.architecture import Architecture
from memplan.errors import InputError
from memplan.recipe import Recipe

_FOLDER = "exporters"


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What is exported: a recipe for a model, and what is predicted of it."""

    model: str
    """What the trainer loads: a hub id or a folder."""
    architecture: Architecture
    recipe: Recipe
    hash: str
    """Of the decision (memplan.plan)."""
    predicted: Mapping[str, Any] | None = None
    """`peak` of a printed object, None where a bare recipe is exported."""
    predicted_by: str = ""
    """The kind of that object: plan, simulation, estimate, ..."""
    card: str | None = None
    """The name of the card that the prediction is for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Statement:
    """What was checked of an export before it was written, a sentence each."""

    verified: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()

    def __add__(self, other: Statement) -> Statement:
        return Statement(
            verified=self.verified + other.verified,
            unverified=self.unverified + other.unverified,
        )


class Exporter(ABC):
    """A trainer's files."""

    summary: ClassVar[str]
    """One line for lists of exporters."""

    @abstractmethod
    def check(self, task: Task) -> Statement:
        """What was verified; raises InputError for what cannot be exported as it is."""

    @abstractmethod
    def files(self, task: Task, statement: Statement) -> Mapping[str, str]:
        """The texts of the files, by name."""

    def add_weights(self, task: Task, folder: Path) -> None:
        """Writes what else the trainer takes, besides texts."""
        return


def names() -> tuple[str, ...]:
    """The names of the exporters."""
    return registry.names(_FOLDER)


def find(name: str) -> Exporter:
    """The exporter of that name; raises UnknownNameError."""
    exporter: Exporter = registry.load(_FOLDER, name, "--to")
    return exporter


def export(task: Task, name: str, out: Path) -> tuple[tuple[Path, ...], Statement]:
    """Writes the files of an exporter into a folder, all of them or none.

    Raises InputError for a recipe that the trainer cannot run as it is, and where the
    folder cannot be written.
    """
    exporter = find(name)
    statement = exporter.check(task)
    texts = exporter.files(task, statement)
    with _staged(out) as folder:
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
        exporter.add_weights(task, folder)
        written = tuple(sorted(out / one.name for one in folder.iterdir()))
    return written, statement


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A folder beside `out` whose content takes its place there when all is well."""
    target = Path(os.path.realpath(out))
    stage = target.with_name(f".{target.name}.{os.urandom(6).hex()}.tmp")
    try:
        try:
            stage.mkdir(parents=True)
            yield stage
            _move(stage, target)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        raise InputError(
            "--out",
            str(out),
            f"cannot be written ({error.strerror or error})",
            "name a folder that may be made or written",
        ) from error


def _move(stage: Path, target: Path) -> None:
    """Puts a folder in place: at once where nothing is there, else file by file."""
    if not target.exists():
        stage.rename(target)
        return
    for one in sorted(stage.iterdir()):
        there = target / one.name
        if there.is_dir():
            shutil.rmtree(there)
        one.replace(there)
