"""Measured runs on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memplan.footprint import Footprint
from memplan.importers import Imported
from memplan.profile import Profile
from memplan.reporters import terminal
from memplan.units import format_bytes

UNREAD = "-"
"""What stands for a reading that was not taken."""


def summary(run: Profile) -> dict[str, Any]:
    """A run as a list shows it."""
    footprint = run.footprint
    peak = None if footprint is None else footprint.peak_json(footprint.peak)
    return {
        "id": run.id,
        "source": run.source,
        "device": run.device,
        "card": run.card,
        "model": run.model,
        "method": run.recipe.method,
        "quantization": run.recipe.quantization,
        "rank": run.recipe.rank,
        "batch_size": run.recipe.batch_size,
        "sequence_length": run.recipe.sequence_length,
        "outcome": run.outcome,
        "peak": peak,
    }


def report_header() -> None:
    """Prints the titles over lines that come one after the other."""
    terminal.say(_line(_COLUMNS), style="bold")


def report_row(run: Profile) -> None:
    """Prints a run's line, below `report_header`."""
    terminal.say(_line(row_of(run)))


def report_runs(runs: Sequence[Profile]) -> None:
    """Prints a line for each run."""
    terminal.table(
        _COLUMNS,
        [row_of(run) for run in runs],
        right=("tokens", *_PEAKS),
    )
    terminal.say(f"\nRuns: {len(runs)}.")


def row_of(run: Profile) -> tuple[str, ...]:
    """A run's line in a table."""
    recipe = run.recipe
    return (
        run.id,
        run.card,
        recipe.method,
        recipe.quantization,
        f"{recipe.batch_size} x {recipe.sequence_length}",
        *_peaks(run.footprint),
        run.outcome,
    )


def report_run(run: Profile) -> None:
    """Prints a run whole: what it was, its moments, what the driver said."""
    terminal.say(f"{run.id}: {run.model} on {run.card}, {run.outcome}", style="bold")
    asked = {
        key: value
        for key, value in run.recipe.to_json().items()
        if value not in (None, {}, [])
    }
    terminal.say(", ".join(f"{key} {value}" for key, value in asked.items()))
    if run.message:
        terminal.say(run.message)
    if run.footprint is not None:
        _report_moments(run, run.footprint)
    for title, readings in (("segments", run.segments), ("driver", run.driver)):
        if readings:
            terminal.say(f"{title}: {_listed(readings)}")
    if run.step_seconds:
        steps = ", ".join(f"{seconds:.3f}" for seconds in run.step_seconds)
        terminal.say(f"Seconds a step: {steps}")
    if run.inference is not None:
        told = run.inference
        terminal.say(f"Answers of {told.num_tokens} tokens, adapters {told.adapters}")
    if run.answer:
        terminal.say(_answered(run.answer))
    versions = ", ".join(f"{key} {value}" for key, value in run.environment.items())
    terminal.say(f"Measured by {run.source}; weights {run.weights}; {versions}")
    for note in run.notes:
        terminal.say(f"Note: {note}", style="dim")


def _answered(answer: Mapping[str, Any]) -> str:
    if answer["problem"]:
        return f"What was tuned cannot be used as it was saved: {answer['problem']}"
    return (
        f"Saved in {format_bytes(answer['saved_bytes'])}, loaded anew, and "
        f"{answer['new_tokens']} tokens answered as before"
    )


def report_import(found: Imported, folder: Path) -> None:
    """Prints how many runs were taken, and why others were not."""
    terminal.say(f"Runs taken: {len(found.runs)}, into {folder}.")
    for reason, count in found.left_out.items():
        terminal.say(f"Left out: {count}, {reason}.")


_PEAKS = ("allocated", "reserved", "device")
_COLUMNS = ("run", "card", "method", "quantization", "tokens", *_PEAKS, "outcome")
_WIDTHS = (52, 24, 12, 12, 10, 10, 10, 10, 13)
"""Characters of each column, where lines come one by one."""


def _line(cells: Sequence[str]) -> str:
    padded = (cell.ljust(width) for cell, width in zip(cells, _WIDTHS, strict=True))
    return " ".join(padded).rstrip()


def _peaks(footprint: Footprint | None) -> tuple[str, ...]:
    if footprint is None:
        return (UNREAD,) * len(_PEAKS)
    peak = footprint.peak
    device_bytes = footprint.device_bytes(peak) if peak.reserved_bytes else 0
    return tuple(map(_size, (peak.allocated_bytes, peak.reserved_bytes, device_bytes)))


def _report_moments(run: Profile, footprint: Footprint) -> None:
    terminal.table(
        ("moment", "allocated", "reserved", "at its end"),
        [
            (
                moment.label,
                _size(moment.allocated_bytes),
                _size(moment.reserved_bytes),
                _size(moment.end_allocated_bytes),
            )
            for moment in footprint.moments
        ],
        right=("allocated", "reserved", "at its end"),
    )
    if footprint.context_bytes is not None:
        terminal.say(f"Context: {format_bytes(footprint.context_bytes)}")


def _size(num_bytes: int | None) -> str:
    return format_bytes(num_bytes) if num_bytes else UNREAD


def _listed(readings: Any) -> str:
    return ", ".join(
        f"{name.removesuffix('_bytes')} "
        + (format_bytes(value) if name.endswith("_bytes") else str(value))
        for name, value in readings.items()
    )
