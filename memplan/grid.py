"""A grid: many runs to be measured, written in one file of JSON or YAML.

`{"model": ..., "recipe": {...}, "runs": [{"model": ..., "recipe": {...}, "vary":
{"rank": [1, 4]}, "inference": false}]}`: what stands above holds for every run that
does not say otherwise; `vary` stands for a run of each combination of its values.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memplan.errors import InputError, UnknownNameError
from memplan.generation import CACHES, SAMPLINGS
from memplan.inference import ADAPTERS, Inference
from memplan.recipe import Recipe, parse_json_or_yaml

FIELD = "--grid"

_KEYS = ("model", "recipe", "vary", "inference")


@dataclass(frozen=True, kw_only=True, slots=True)
class GridRun:
    """One of a grid's runs."""

    model: str
    recipe: Recipe
    inference: Inference | None = None
    """The answers that are made in the place of training, if any are."""


def read_grid(file: str, given: Mapping[str, Any] | None = None) -> tuple[GridRun, ...]:
    """The runs of a grid, in their order; keys that are `given` win.

    Raises InputError, which names the run, for what is no run.
    """
    parsed = parse_json_or_yaml(_text(file), FIELD, file)
    if not isinstance(parsed, Mapping) or not isinstance(parsed.get("runs"), list):
        raise InputError(FIELD, file, "has no list of runs", "write `runs: [...]`")
    _check_keys(parsed, ("model", "recipe", "inference", "runs", "description"), file)
    found: list[GridRun] = []
    for number, run in enumerate(parsed["runs"]):
        where = f"{file}, run {number}"
        if not isinstance(run, Mapping):
            raise InputError(FIELD, where, "is not a mapping", "write `recipe: {...}`")
        _check_keys(run, _KEYS, where)
        found.extend(_expand(parsed, run, given or {}, where))
    return tuple(found)


def _expand(
    above: Mapping[str, Any],
    run: Mapping[str, Any],
    given: Mapping[str, Any],
    where: str,
) -> Iterator[GridRun]:
    model = run.get("model", above.get("model"))
    if not isinstance(model, str):
        raise InputError(FIELD, where, "names no model", "write `model: NAME`")
    varied: Mapping[str, list[Any]] = run.get("vary", {})
    for values in itertools.product(*varied.values()):
        keys = {
            **above.get("recipe", {}),
            **run.get("recipe", {}),
            **dict(zip(varied, values, strict=True)),
            **given,
        }
        yield GridRun(
            model=model,
            recipe=Recipe.from_mapping(keys),
            inference=_inference(
                run.get("inference", above.get("inference", False)), where
            ),
        )


_INFERENCE_NAMES = {"adapters": ADAPTERS, "sampling": SAMPLINGS, "cache": CACHES}
"""What keys of inference may be."""


def _inference(told: Any, where: str) -> Inference | None:
    """What `inference` stands for: true, false, or what is given of it."""
    if not told:
        return None
    given = {} if told is True else told
    if not isinstance(given, Mapping):
        raise InputError(
            f"{FIELD} {where}",
            told,
            "is no inference",
            "write `inference: {adapters: none, new_tokens: 64}`, or true",
        )
    _check_keys(given, ("new_tokens", "adapters", "sampling", "cache"), where)
    whole = {**Inference().to_json(), **given}
    for key, known in _INFERENCE_NAMES.items():
        if whole[key] not in known:
            raise UnknownNameError(key, str(whole[key]), known)
    tokens = whole["new_tokens"]
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise InputError("new_tokens", tokens, "is no count", "give 1 or more")
    return Inference.from_json(whole)


def _check_keys(found: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in found:
        if key not in known:
            raise UnknownNameError(f"{FIELD} {where}", key, known)


def _text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            FIELD, file, f"cannot be read ({reason})", "give a readable grid file"
        ) from error
