"""Rows of published benchmarks: `published.json`, and the table that it was drawn from.

The table tells knobs in its sources' own words. A row of it is taken where
`published.json` has the recipe that these words stand for, with the same reading.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from memplan.footprint import Footprint, Moment
from memplan.gpu import find_gpu
from memplan.importers import Unusable
from memplan.model_source import read_catalog
from memplan.profile import Profile, slug
from memplan.recipe import Recipe
from memplan.store import profiles_path, read_json
from memplan.units import parse_size

TRAINING = "training"
"""The moment that stands for all steps of a training."""


def from_row(number: int, row: Mapping[str, Any]) -> Profile:
    """The run of an entry of published.json, by the recipe whose memory is its own.

    That is the stand-in where the run's libraries were older than today's.
    """
    older = row.get("stand_in", {})
    recipe = Recipe.from_mapping(row["recipe"] | older)
    after = row.get("after_training")
    moment = Moment(
        label=TRAINING,
        allocated_bytes=parse_size(row["allocated"], "allocated"),
        reserved_bytes=0,
        end_allocated_bytes=parse_size(after, "after_training") if after else 0,
    )
    what = row.get("configuration", recipe.method)
    parts = (row["model"].rpartition("/")[2], what, f"b{recipe.batch_size}")
    return Profile(
        id=f"published-{number:02d}-{slug('-'.join(parts))}",
        source=row["source"],
        device="cuda",
        model=row["architecture"],
        config=_config(row),
        recipe=recipe,
        gpu=find_gpu(row["gpu"]),
        footprint=Footprint(moments=(moment,)),
        environment=dict(row["versions"]),
        weights="checkpoint",
        notes=tuple(_notes(row, older)),
    )


def from_csv(number: int, row: Mapping[str, str]) -> Profile:
    """The run of a row of the table; raises Unusable with the reason."""
    if row.get("core") != "1":
        raise Unusable("measured again later, or not one plain run on one card")
    entry = _known().get((_source(row["source_repo"]), _reading(row)))
    if entry is None:
        raise Unusable(
            f"{row['source_repo']}, {row['method']}: no recipe is known that does what "
            "the source's code does"
        )
    return from_row(*entry)


@functools.cache
def _known() -> dict[tuple[str, int], tuple[int, Mapping[str, Any]]]:
    rows = read_json(profiles_path() / "ground_truth" / "published.json")
    return {
        (row["source"], parse_size(row["allocated"], "allocated")): (number, row)
        for number, row in enumerate(rows)
    }


def _source(repository: str) -> str:
    return repository.rpartition("/")[2]


def _reading(row: Mapping[str, str]) -> int:
    try:
        number = float(row["value_in_source"])
    except ValueError as error:
        raise Unusable(f"{row['source_repo']}: a reading that is no number") from error
    if row["unit_in_source"] == "B":
        return int(number)
    return int(number * 2**30) if row["unit_in_source"] == "GiB" else 0


def _config(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config where it is not the catalog's."""
    changes = row.get("config")
    if not changes:
        return None
    return {**read_catalog(row["architecture"]).config, **changes}


def _notes(row: Mapping[str, Any], older: Mapping[str, Any]) -> list[str]:
    notes = [f"Trained {row['model']}; commit {row['commit']} of the source."]
    if older:
        keys = ", ".join(f"{key} {value}" for key, value in older.items())
        notes.append(f"Stands in for what its older libraries did: {keys}.")
    return notes
