"""The recipe as text to copy: a recipe file, and the files of trainers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from memplan import exporters
from memplan.architecture import Architecture
from memplan.errors import InputError
from memplan.exporters import Statement, Task
from memplan.footprint import Footprint
from memplan.gpu import Gpu
from memplan.plan import decision_hash
from memplan.recipe import Recipe

UNCHECKED = Statement(
    unverified=("what PEFT makes of it, which `memplan export` checks with torch.",)
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """A file of a trainer."""

    trainer: str
    file: str
    text: str


def exports(
    architecture: Architecture,
    recipe: Recipe,
    gpu: Gpu | None,
    footprint: Footprint,
    kind: str,
) -> tuple[Export, ...]:
    """The files of every trainer that can run the recipe."""
    card = None if gpu is None else gpu.to_json()
    task = Task(
        model=architecture.name,
        architecture=architecture,
        recipe=recipe,
        hash=decision_hash(architecture.name, recipe, card),
        predicted=footprint.peak_json(footprint.peak),
        predicted_by=kind,
        card=None if gpu is None else gpu.name,
    )
    return tuple(
        export for name in exporters.names() for export in _exports(task, name)
    )


def _exports(task: Task, name: str) -> Iterator[Export]:
    """A trainer's files; none where it cannot run the recipe."""
    try:
        texts = exporters.find(name).files(task, UNCHECKED)
    except InputError:
        return
    for file, text in texts.items():
        yield Export(trainer=name, file=file, text=text)
