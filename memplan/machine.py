"""What `memplan doctor` measured of this machine's cards, kept in the user's folder.

A context differs between drivers and builds of torch, so a reading holds for one card,
driver and torch alone. MEMPLAN_MACHINE names the folder; `off` keeps and finds nothing.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memplan.errors import InputError
from memplan.store import read_json, write_json

ENVIRONMENT = "MEMPLAN_MACHINE"

_FIELD = "MEMPLAN_MACHINE"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """A card as it was measured."""

    card: str
    """The name that torch and the driver call it."""
    driver: str
    """The driver's version; empty where NVML did not tell it."""
    torch: str
    """The version of torch, with the CUDA it was built for."""
    capacity_bytes: int
    """The total that torch sees."""
    context_bytes: int
    """What the driver counted beyond torch's allocator after real steps."""
    measured_at: str
    """When, as ISO 8601 in UTC."""

    def sentence(self) -> str:
        """Where the figures are from."""
        driver = f", driver {self.driver}" if self.driver else ""
        return (
            "Capacity and CUDA context are those that `memplan doctor` measured of the "
            f"{self.card} on this machine on {self.measured_at[:10]} (torch "
            f"{self.torch}{driver})."
        )


def keep(reading: Reading) -> Path:
    """Keeps a reading in the user's folder, in the place of one of the same kind.

    Raises InputError where nothing is kept, or the folder cannot be written.
    """
    folder = _folder()
    if folder is None:
        raise InputError(_FIELD, "off", "keeps nothing", "name a folder, or unset it")
    told = f"{reading.card} {reading.driver} {reading.torch}"
    file = folder / f"{re.sub('[^a-z0-9.]+', '-', told.casefold()).strip('-')}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"cannot be made ({error.strerror})"
        raise InputError(_FIELD, str(folder), problem, "name another folder") from error
    write_json(file, dataclasses.asdict(reading))
    return file


def find(card: str) -> Reading | None:
    """The newest reading of a card under the installed torch; None without one."""
    of_card = [one for one in _readings() if _key(one.card) == _key(card)]
    if not of_card:
        return None
    torch_version = _torch_version()
    found = [reading for reading in of_card if reading.torch == torch_version]
    return max(found, key=lambda reading: reading.measured_at, default=None)


def _readings() -> Iterator[Reading]:
    """Every reading that is kept; a broken file counts as missing."""
    folder = _folder()
    if folder is None or not folder.is_dir():
        return
    for file in sorted(folder.glob("*.json")):
        try:
            kept: Mapping[str, Any] = read_json(file)
            yield Reading(**kept)
        except (InputError, TypeError):
            continue


def _folder() -> Path | None:
    told = os.environ.get(ENVIRONMENT, "")
    if told.casefold() == "off":
        return None
    if told:
        return Path(told).expanduser()
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "memplan" / "machine"


def _torch_version() -> str:
    from importlib import metadata

    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def _key(card: str) -> str:
    """A name without case, spaces and the vendor's words."""
    return re.sub(r"[\s\-_/()]+|nvidia|geforce|tesla", "", card.casefold())
