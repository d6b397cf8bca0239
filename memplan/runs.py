"""Measured runs on disk: one JSON file a run, in a folder for each card.

Files are written at once or not at all, so that whatever is killed at whatever moment
leaves every finished record whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from memplan.errors import InputError, UnknownNameError
from memplan.profile import Profile, slug
from memplan.store import profiles_path, read_json, write_json

_FIELD = "--out"


def shipped_path() -> Path:
    """The folder of the runs that memplan itself carries."""
    return profiles_path() / "runs"


def path_of(profile: Profile, folder: Path) -> Path:
    """The file that a run is kept in."""
    return folder / slug(profile.card) / f"{profile.id}.json"


def save(profile: Profile, folder: Path) -> Path:
    """Writes a run, replacing the one of the same name; its file.

    Raises InputError where the disk is full or the folder cannot be written.
    """
    file = path_of(profile, folder)
    _make_folder(file.parent)
    write_json(file, profile.to_json())
    return file


def prepare(folder: Path) -> None:
    """Makes sure that runs can be written there, before anything is measured.

    What a killed process had half written is swept away.
    """
    _make_folder(folder)
    for left in folder.glob("*/.*.json.*.tmp"):
        with contextlib.suppress(OSError):
            left.unlink()
    probe = folder / ".writable"
    write_json(probe, {})
    probe.unlink(missing_ok=True)


def load(folder: Path) -> tuple[Profile, ...]:
    """Every run of a folder, by card and name; none where there is no folder."""
    return tuple(read(file) for file in sorted(_files(folder)))


def read(file: Path) -> Profile:
    """The run in a file; raises InputError where it holds no whole record."""
    return Profile.from_json(read_json(file), str(file))


def find(runs: Iterable[Profile], name: str) -> Profile:
    """The run of that name, or the only one whose name begins so."""
    known = {run.id: run for run in runs}
    if name in known:
        return known[name]
    begun = [run for one, run in known.items() if one.startswith(name)]
    if len(begun) == 1 and name:
        return begun[0]
    if begun:
        listed = ", ".join(run.id for run in begun[:6])
        raise InputError("run", name, "begins several names", f"give one of {listed}")
    raise UnknownNameError("run", name, known, "see `memplan runs`")


def _files(folder: Path) -> Iterator[Path]:
    for file in folder.glob("**/*.json"):
        if not file.name.startswith("."):
            yield file


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            _FIELD,
            str(folder),
            f"cannot be made ({error.strerror})",
            "name a folder that may be written",
        ) from error
