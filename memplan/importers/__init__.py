"""Other people's measurements as runs, one file for each of their forms.

A form is told by content. Rows that no recipe can express are left out, each with the
reason; nothing is guessed.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memplan import runs
from memplan.errors import InputError
from memplan.profile import KIND, Profile

Row = Mapping[str, Any]

_FIELD = "FILE"


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """The runs that were read, and why other rows were not."""

    runs: tuple[Profile, ...]
    left_out: Mapping[str, int]
    """Rows by the reason for which they are left out."""


class Unusable(Exception):  # noqa: N818 - it says what a row is
    """A row that cannot be taken, and why."""


def read(path: Path) -> Imported:
    """The runs of a folder, a record, or a file of one of the known forms.

    Raises InputError for a file of another form.
    """
    if path.is_dir():
        return Imported(runs=runs.load(path), left_out={})
    text = _text(path)
    if path.suffix.lower() == ".csv":
        from memplan.importers import published

        return _convert(csv.DictReader(io.StringIO(text)), published.from_csv)
    rows = _json_rows(text, path)
    return _convert(rows, _form(rows, path))


def _form(rows: list[Row], path: Path) -> Callable[[int, Row], Profile]:
    """What makes a run of such a row."""
    from memplan.importers import measure_grid, published, t4_runs

    first = rows[0] if rows and isinstance(rows[0], Mapping) else {}
    if first.get("kind") == KIND:
        return lambda number, row: Profile.from_json(row, str(path))
    for keys, form in (
        ({"case", "phases", "environment"}, measure_grid.from_record),
        ({"measured", "model_config", "source_file"}, t4_runs.from_row),
        ({"source", "recipe", "allocated"}, published.from_row),
    ):
        if keys <= first.keys():
            return form
    raise InputError(
        _FIELD,
        str(path),
        "holds no measurements of a known form",
        "give records of memplan or of measure_grid.py, t4_runs.json, or "
        "published.json or .csv",
    )


def _convert(rows: Iterable[Row], form: Callable[[int, Row], Profile]) -> Imported:
    found: list[Profile] = []
    left_out: Counter[str] = Counter()
    for number, row in enumerate(rows):
        try:
            found.append(form(number, row))
        except (Unusable, InputError) as error:
            left_out[str(error)] += 1
        except (KeyError, TypeError, AttributeError) as error:
            left_out[f"not a whole row ({type(error).__name__}: {error})"] += 1
    return Imported(runs=tuple(found), left_out=dict(left_out))


def _json_rows(text: str, path: Path) -> list[Row]:
    """The rows of a list, of an object, or of one object a line."""
    try:
        parsed = json.loads(text)
    except ValueError:
        try:
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as error:
            problem = f"is neither JSON nor one JSON object a line ({error})"
            raise InputError(_FIELD, str(path), problem, "give such a file") from error
    return parsed if isinstance(parsed, list) else [parsed]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            _FIELD,
            str(path),
            f"cannot be read ({reason})",
            "give a file or folder that exists and may be read",
        ) from error
