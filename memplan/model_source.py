"""`read_config`: where the config of the model that a user names comes from.

A path that exists comes first, then the catalog, then the hub. What looks like a path
never reaches the hub, and a single word never does either.
"""

from __future__ import annotations

import dataclasses
import os
import stat
from pathlib import Path
from typing import Any, Literal

from memplan.errors import HubError, InputError, UnknownNameError
from memplan.hub import CONFIG_NAME, fetch_config, parse_config, read_content
from memplan.store import profiles_path, read_json

_GIVE = "give a catalog name, a hub id (owner/name), a folder or a config.json"

_VERY_NEAR = 0.85
"""The difflib ratio from which a name is offered: one wrong or missing part at most."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """A model's config and where it was found."""

    name: str
    """What finds the same config again when it is given as the model."""

    origin: Literal["catalog", "hub", "folder", "file"]

    config: dict[str, Any]
    """The config.json as it is written, without the library's defaults."""

    path: Path | None = None
    """The config file of a folder or file."""

    architecture: dict[str, Any] | None = None
    """What a model of the catalog is made of, as it was inspected ahead."""

    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the catalog knows besides: counts, sources, confidence."""

    notes: tuple[str, ...] = ()

    @property
    def needs_remote_code(self) -> bool:
        """Whether the config names classes in Python files of its own repository."""
        return "auto_map" in self.config


def read_config(model: str, *, trust_remote_code: bool = False) -> ModelSource:
    """The config of a catalog name, a hub id, a folder or a config.json.

    Whether transformers can build it is not asked. Raises InputError.
    """
    source = _find(model)
    return dataclasses.replace(source, notes=_notes(source, trust_remote_code))


def catalog_names() -> list[str]:
    """The models of the catalog, sorted; no file is opened."""
    files = (profiles_path() / "architectures").glob("*.json")
    return sorted(file.stem.replace("--", "/", 1) for file in files)


def read_catalog(name: str) -> ModelSource:
    """The config of a model of the catalog, by the name that `catalog_names` gives."""
    file = profiles_path() / "architectures" / f"{name.replace('/', '--')}.json"
    # Of a file of the catalog's own it need not be asked how deep it is nested.
    entry = read_json(file)
    config = entry.get("config")
    if not isinstance(config, dict):
        raise InputError("model", str(file), "holds no config", "mend the catalog")
    return ModelSource(
        name=name,
        origin="catalog",
        config=config,
        architecture=entry.get("architecture"),
        facts=entry.get("facts", {}),
    )


def _find(model: str) -> ModelSource:
    if not model.strip():
        raise InputError("model", model, "is empty", _GIVE)
    path = os.path.expanduser(model)
    if _is_path(model) or _has_config(path):
        return _read_local(model, Path(path))
    name = _catalog_name(model)
    if name is not None:
        return read_catalog(name)
    if os.path.lexists(path):
        return _read_local(model, Path(path))
    if "/" not in model:
        remedy = "a hub id has the form owner/name"
        raise UnknownNameError("model", model, _short_names(), remedy)
    return _read_hub(model)


def _is_path(model: str) -> bool:
    """Whether a name can be nothing but a path: no hub id looks like it."""
    return (
        model.startswith((".", "~", "/"))
        or model.endswith((".json", "/"))
        or model.count("/") > 1
        or "\\" in model
    )


def _has_config(path: str) -> bool:
    """Whether a path holds a config; a folder without one may share a model's name.

    os.path answers False where pathlib raises: for a name too long or a null byte.
    """
    if os.path.isdir(path):
        return os.path.lexists(os.path.join(path, CONFIG_NAME))
    return os.path.lexists(path)


def _read_local(model: str, path: Path) -> ModelSource:
    is_folder = os.path.isdir(path)
    file = path / CONFIG_NAME if is_folder else path
    if is_folder and not os.path.lexists(file) and os.access(path, os.X_OK):
        raise InputError("model", model, f"is a folder without {CONFIG_NAME}", _GIVE)
    return ModelSource(
        name=model,
        origin="folder" if is_folder else "file",
        config=_read_object(file),
        path=file,
    )


def _read_object(file: Path) -> dict[str, Any]:
    try:
        # Opening a pipe would wait for its writer.
        if not stat.S_ISREG(file.stat().st_mode):
            raise InputError("model", str(file), "is not a regular file", _GIVE)
        content = read_content(file)
    except FileNotFoundError as error:
        raise InputError("model", str(file), "does not exist", _GIVE) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            "model", str(file), f"cannot be read ({reason})", _GIVE
        ) from error
    try:
        return parse_config(content)
    except ValueError as error:
        raise InputError(
            "model", str(file), str(error), "give the config.json of a model"
        ) from error


def _catalog_name(model: str) -> str | None:
    """The catalog's spelling of a name or of a last part that only one name has."""
    key = model.casefold()
    keys = {name.casefold(): name for name in catalog_names()}
    if key in keys:
        return keys[key]
    found = [name for folded, name in keys.items() if folded.endswith(f"/{key}")]
    if len(found) > 1:
        raise InputError(
            "model", model, "names several models", f"give one of {', '.join(found)}"
        )
    return found[0] if found else None


def _short_names() -> list[str]:
    """Each catalog name by its last part, or whole where another has the same one."""
    names = catalog_names()
    lasts = [name.rpartition("/")[2] for name in names]
    folded = [last.casefold() for last in lasts]
    return [
        last if folded.count(last.casefold()) == 1 else name
        for name, last in zip(names, lasts, strict=True)
    ]


def _read_hub(model: str) -> ModelSource:
    try:
        return ModelSource(name=model, origin="hub", config=fetch_config(model))
    except HubError as error:
        near = _very_near_names(model)
        if near:
            error.args = (f"{error}; the catalog has {', '.join(near)}",)
        raise


def _very_near_names(model: str) -> list[str]:
    """Catalog names with the same last part, which owners share, or almost the same."""
    import difflib

    key = model.casefold()
    keys = {name.casefold(): name for name in catalog_names()}
    last = f"/{key.rpartition('/')[2]}"
    same = [folded for folded in keys if folded.endswith(last)]
    near = same + difflib.get_close_matches(key, keys, n=3, cutoff=_VERY_NEAR)
    return [keys[folded] for folded in dict.fromkeys(near)]


def _notes(source: ModelSource, trust_remote_code: bool) -> tuple[str, ...]:
    notes = []
    if not isinstance(source.config.get("model_type"), str):
        notes.append("the config has no model_type: its family is not known")
    if source.needs_remote_code and not trust_remote_code:
        notes.append("the config names code of its own (auto_map), which was not run")
    return tuple(notes)
