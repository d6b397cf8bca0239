"""Memory over a fine-tune's life as a file: CSV, or JSON of one event a line."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from memplan.errors import InputError
from memplan.reporters.json import SCHEMA
from memplan.simulation import Sample
from memplan.store import write_text

FIELD = "--timeline"

COLUMNS = tuple(field.name for field in dataclasses.fields(Sample))


def writer_of(file: str) -> Callable[[Iterable[Sample]], None]:
    """What writes samples into a file, at once or not at all.

    Raises InputError for a file of another ending, or in a folder that does not exist.
    """
    path = Path(file)
    form = FORMS.get(path.suffix.lower())
    if form is None:
        raise InputError(
            FIELD, file, "ends in neither .csv nor .json", "name the file so"
        )
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(
            FIELD, file, "cannot be written", "name a file in a folder that exists"
        )
    return lambda samples: write_text(path, form(samples), FIELD)


def as_csv(samples: Iterable[Sample]) -> str:
    """A line of names, then one a sample."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(map(dataclasses.astuple, samples))
    return text.getvalue()


def as_json(samples: Iterable[Sample]) -> str:
    """An object whose `events` are the samples, one a line."""
    events = ",\n".join(json.dumps(dataclasses.asdict(sample)) for sample in samples)
    return f'{{"schema": {SCHEMA}, "kind": "timeline", "events": [\n{events}\n]}}\n'


FORMS = {".csv": as_csv, ".json": as_json}
