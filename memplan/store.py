"""Reading and writing the project's JSON data; the only place that knows where it lies.

A write is atomic: readers see the old file or the new one, never half of either.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from memplan.errors import InputError, MemplanError

RUNS_FOLDER = Path("profiles") / "runs"
"""Where measured runs are kept, seen from the working folder."""

_PACKAGE = Path(__file__).resolve().parent


def profiles_path() -> Path:
    """The folder of the catalog and the measured runs.

    An installed package carries it as `memplan/profiles`; in a checkout it lies beside
    the package, at the top of the repository.
    """
    for folder in (_PACKAGE / "profiles", _PACKAGE.parent / "profiles"):
        if folder.is_dir():
            return folder
    raise MemplanError(f"the folder profiles/ is neither in nor beside {_PACKAGE}")


def read_json(path: Path) -> Any:
    """What a JSON file holds; raises InputError if it is missing or malformed."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(
            "file",
            str(path),
            f"cannot be read ({_reason(error)})",
            "give a file that exists and may be read",
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            "file", str(path), f"is not JSON ({error})", "give a JSON file"
        ) from error


def write_json(path: Path, obj: object) -> None:
    """Writes an object as indented JSON, replacing the file at once or not at all.

    Raises InputError where the file cannot be written.
    """
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text)


def write_text(path: Path, text: str, field: str = "file") -> None:
    """Writes a text, replacing the file at once or not at all.

    Raises InputError, which names the field, where the file cannot be written.
    """
    write_bytes(path, text.encode(), field)


def write_bytes(path: Path, content: bytes, field: str = "file") -> None:
    """Writes bytes, replacing the file at once or not at all; errors likewise."""
    # os.replace would put a file in the place of a link; what it points to is meant.
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.urandom(6).hex()}.tmp")
    try:
        try:
            temporary.write_bytes(content)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            field,
            str(path),
            f"cannot be written ({_reason(error)})",
            "name a file in a folder that exists and may be written",
        ) from error


def _reason(error: OSError) -> str:
    """Why the system refused, without the path that the message already shows."""
    return error.strerror or type(error).__name__
