"""Simulations that were run before, kept in the user's cache.

What is kept is found by everything that it depends on: the model's config, the recipe,
the card, the allocator's settings, memplan's own files and the versions of the packages
whose code is run. Files are written at once or not at all, so that two processes may
write, and one that is broken counts as missing. MEMPLAN_CACHE names the folder; `off`
keeps nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memplan.errors import InputError
from memplan.store import read_json, write_json

if TYPE_CHECKING:
    from memplan.simulation import Simulation

ENVIRONMENT = "MEMPLAN_CACHE"

_PACKAGE = Path(__file__).resolve().parent


def key(inputs: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """The name under which what comes of these inputs is kept."""
    told = {"inputs": inputs, "versions": versions, "code": code_digest()}
    text = json.dumps(told, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def load(name: str) -> Simulation | None:
    """The simulation kept under a name; None where there is none that can be read."""
    folder = cache_folder("simulations")
    file = None if folder is None else folder / f"{name}.json"
    if file is None or not file.is_file():
        return None
    from memplan.simulation import Simulation

    try:
        return Simulation.from_json(read_json(file))
    except (InputError, KeyError, TypeError):
        return None


def keep(name: str, simulation: Simulation) -> None:
    """Keeps a simulation; a cache that cannot be written is done without."""
    folder = cache_folder("simulations")
    if folder is None:
        return
    with contextlib.suppress(OSError, InputError):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{name}.json", simulation.to_json())


def cache_folder(kind: str) -> Path | None:
    """The folder of the user's cache for what is kept; None where nothing is."""
    told = os.environ.get(ENVIRONMENT, "")
    if told.lower() == "off":
        return None
    if told:
        return Path(told).expanduser() / kind
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "memplan" / kind


@functools.cache
def code_digest() -> str:
    """A digest of memplan's own files: another rule gives another result."""
    digest = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
