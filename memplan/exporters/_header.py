"""What every exported file says of itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from memplan import __version__
from memplan.exporters import Statement, Task
from memplan.units import format_bytes


def header(task: Task, statement: Statement, notes: Iterable[str] = ()) -> list[str]:
    """The lines: who made it, of what, what is predicted, and what was checked."""
    return [
        f"Made by memplan {__version__} from plan {task.hash} for {task.model}.",
        *_prediction(task),
        *(f"Verified: {sentence}" for sentence in statement.verified),
        *(f"NOT verified: {sentence}" for sentence in statement.unverified),
        *(f"Note: {sentence}" for sentence in notes),
    ]


def commented(lines: Iterable[str]) -> str:
    """The lines as comments of Python and YAML."""
    return "".join(f"# {line}\n" for line in lines)


def _prediction(task: Task) -> Iterator[str]:
    if task.predicted is None:
        yield "Predicted peak: none, as a recipe alone was exported."
        return
    reserved = format_bytes(task.predicted["reserved_bytes"])
    allocated = format_bytes(task.predicted["allocated_bytes"])
    device = task.predicted.get("device_bytes")
    on_card = "" if device is None else f"{format_bytes(device)} on the device, "
    card = f" ({task.card})" if task.card else ""
    yield (
        f"Predicted peak{card}: {on_card}{reserved} reserved, {allocated} allocated, "
        f"by {task.predicted_by} of a {task.recipe.trainer} loop."
    )
