"""The parts that a folder holds, one file each, found by their file's name.

A part is named after its file (`nf4_double.py` is `nf4-double`) and is the module's
`PART`. A file whose name starts with an underscore is what several parts share. Listing
names imports no part.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any

from memplan.errors import UnknownNameError


@functools.cache
def names(folder: str) -> tuple[str, ...]:
    """The names of the parts in a folder of the package, sorted."""
    package = importlib.import_module(f"memplan.{folder}")
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return tuple(sorted(n.replace("_", "-") for n in found if not n.startswith("_")))


def load(folder: str, name: str, field: str) -> Any:
    """The part of that name; `field` is what an error calls the unknown name."""
    if name not in names(folder):
        raise UnknownNameError(field, name, names(folder))
    return _part(folder, name)


@functools.cache
def _part(folder: str, name: str) -> Any:
    module = importlib.import_module(f"memplan.{folder}.{name.replace('-', '_')}")
    return module.PART
