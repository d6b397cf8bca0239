"""Every error memplan raises on purpose.

* MemplanError          exit code 3: memplan itself is wrong
  + MeasurementError    exit code 3: a measuring process died or failed
  + InputError          exit code 2: says the field, the value and the way out
    - UnknownNameError  a name that is in no catalog or registry; lists the near ones
    - HubError          the hub, its cache or its answer
    - MissingExtraError a part that is not installed; names the extra
    - UntracedError     an estimate that would take a trace, where none may be made
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable


class MemplanError(Exception):
    """The root of memplan's errors; `exit_code` is what the command line returns."""

    exit_code = 3


class InputError(MemplanError):
    """What the user gave cannot be used: the message names field, value and way out."""

    exit_code = 2

    def __init__(self, field: str, value: object, problem: str, remedy: str) -> None:
        self.field = field
        self.value = value
        super().__init__(f"{field}: {shown(value)} {problem}; {remedy}")

    @classmethod
    def from_message(cls, message: str) -> InputError:
        """An error that another process raised, by its whole message."""
        error = cls.__new__(cls)
        error.field, error.value = "", ""
        Exception.__init__(error, message)
        return error


class MeasurementError(MemplanError):
    """A process that measured died or failed; the message says of what."""


class UnknownNameError(InputError):
    """A name that nothing known carries; the message lists the near ones."""

    def __init__(
        self, field: str, value: object, known: Iterable[str], remedy: str = ""
    ) -> None:
        near = near_names(value, known) if isinstance(value, str) else []
        listed = f"near: {', '.join(near)}" if near else "nothing known is near it"
        super().__init__(
            field, value, "is unknown", f"{listed}; {remedy}" if remedy else listed
        )


class HubError(InputError):
    """The hub did not give a usable configuration."""


class MissingExtraError(InputError):
    """A part of memplan that needs packages which are not installed."""

    def __init__(self, needed_for: str, package: str, extra: str) -> None:
        super().__init__(
            needed_for,
            package,
            "is not installed",
            f"install it with: pip install 'memplan[{extra}]'",
        )


class UntracedError(InputError):
    """An estimate that would take a trace first, where none may be made."""


def shown(value: object) -> str:
    """A value as a message shows it: in quotes, on one line, cut where it is long."""
    return _SHORT.repr(value)


def _short() -> reprlib.Repr:
    """Shows any value in a line, however large or nested it is."""
    short = reprlib.Repr()
    short.maxlevel = 1
    short.maxstring = short.maxlong = short.maxother = 80
    return short


_SHORT = _short()


def near_names(value: str, known: Iterable[str]) -> list[str]:
    """At most six of the known names that resemble the value, nearest first."""
    import difflib

    by_key = {name.casefold(): name for name in known}
    key = value.casefold()
    near = difflib.get_close_matches(key, by_key, n=6, cutoff=0.5)
    if not near:
        near = [k for k in by_key if key and (key in k or k in key)][:6]
    if not near and len(by_key) <= 16:
        near = list(by_key)
    return [by_key[k] for k in near]
