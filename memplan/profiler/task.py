"""What a measuring process is told, and what it tells: both as lines of JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memplan import methods
from memplan.inference import Inference
from memplan.recipe import Recipe

WARM_UP_STEPS = 1
"""Steps before the measured ones: they make the optimizer's state."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A run to be measured."""

    model: str
    """What finds the weights and the tokenizer, where these are asked for."""
    config: Mapping[str, Any]
    recipe: Recipe
    device: str
    """`cuda` or `cpu`."""
    steps: int = 3
    """Steps of the optimizer, the warm-up step among them; a method that does something
    between steps, such as relora, does it after them and runs one step more."""
    seed: int = 0
    weights: str = "random"
    """`random`, or `checkpoint` to load them by from_pretrained."""
    data: str = ""
    """A file of texts to train on; random tokens where there is none."""
    inference: Inference | None = None
    """The answers that are made in the place of steps, if any are."""
    generate: int = 0
    """Tokens that the tuned model is asked for after it was saved and loaded; 0 where
    it is not."""
    trace: str = ""
    """The file for the allocator's event history, where it is asked for."""
    seconds: float | None = None
    """After so many, no further step is begun once there are measured ones."""
    folder: str = ""
    """A folder of the run's own, for what trainers write."""

    @property
    def milestone(self) -> str | None:
        """What the method does between steps, if it does anything."""
        return methods.find(self.recipe.method).milestone(self.recipe)

    @property
    def total_steps(self) -> int:
        """All steps, with the one after the milestone."""
        return self.steps if self.milestone is None else self.steps + 1

    def to_line(self) -> str:
        """The task as one line."""
        keys = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {
            "config": dict(self.config),
            "recipe": self.recipe.to_json(),
            "inference": self.inference and self.inference.to_json(),
        }
        return json.dumps(keys | plain) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Task:
        """The task that `to_line` wrote."""
        keys = json.loads(line)
        told = keys["inference"]
        made = {
            "recipe": Recipe.from_mapping(keys["recipe"]),
            "inference": Inference.from_json(told) if told else None,
        }
        return cls(**keys | made)


class Journal:
    """The file into which a measuring process writes what it has finished.

    Each event is one line, written at once, so that whoever kills the process finds
    all that came before.
    """

    def __init__(self, file: Path) -> None:
        self._opened = file.open("a", encoding="utf-8")

    def write(self, event: str, **values: Any) -> None:
        """Adds an event."""
        self._opened.write(json.dumps({"event": event, **values}) + "\n")
        self._opened.flush()


def read_events(file: Path) -> Iterator[Mapping[str, Any]]:
    """The whole events of a journal; a line that was cut short is none."""
    if not file.exists():
        return
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)
