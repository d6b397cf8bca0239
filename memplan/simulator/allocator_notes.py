"""What the allocator's settings do here, said by replaying the same log without them.

Where none are given, expandable segments are tried if there is much to be saved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from memplan.allocator import AllocatorSettings, environment_variable
from memplan.footprint import Moment
from memplan.gpu import Gpu
from memplan.simulator.events import EventLog
from memplan.simulator.replay import Replay, replay
from memplan.units import format_bytes

LARGE_CACHE = 0.1
"""The share of what is reserved from which on a cache is worth another replay."""

LARGE_SAVING = 0.05
"""The share of what is reserved that is worth a note to those who asked for nothing."""

EXPANDABLE = "expandable_segments:True"


def notes(
    log: EventLog, settings: AllocatorSettings, gpu: Gpu | None, found: Replay
) -> Iterator[str]:
    """Sentences on the settings that `found` was replayed with, or on better ones."""
    if settings.expandable_segments and settings.on_windows:
        yield "torch ignores expandable_segments on Windows."
    if settings.expands and settings.max_split_size_bytes is not None:
        yield (
            "Give expandable_segments without max_split_size_mb, which keeps requests "
            "out of large free blocks: the segment grows instead."
        )
    heeded = dataclasses.replace(settings, expandable_segments=settings.expands)
    if text := heeded.to_text():
        yield f"Set {_assignment(text)} for the run."
        yield _compare(log, gpu, found)
    elif not settings.on_windows and _may_save(found):
        yield from _suggest(log, gpu, found)


def _compare(log: EventLog, gpu: Gpu | None, found: Replay) -> str:
    """What the settings do beside the defaults."""
    default = _replay(log, AllocatorSettings(), gpu)
    if default.failed_moment is not None and found.failed_moment is None:
        return (
            "It fits only with these allocator settings: with the defaults it runs out "
            f"of memory in {default.failed_moment}."
        )
    if found.failed_moment is not None:
        return (
            "It fits with the allocator's defaults, not with these settings."
            if default.failed_moment is None
            else "The allocator settings do not make it fit."
        )
    saved_bytes = _most_reserved(default.moments) - _most_reserved(found.moments)
    if not saved_bytes:
        return "These allocator settings change nothing in the reserved peak here."
    verb = "save" if saved_bytes > 0 else "cost"
    return (
        f"These allocator settings {verb} {format_bytes(abs(saved_bytes))} of the "
        "reserved peak here, beside the defaults."
    )


def _suggest(log: EventLog, gpu: Gpu | None, found: Replay) -> Iterator[str]:
    """What expandable segments would do here, where it is worth saying."""
    expandable = _replay(log, AllocatorSettings(expandable_segments=True), gpu)
    if expandable.failed_moment is not None:
        return
    assignment = _assignment(EXPANDABLE)
    if found.failed_moment is not None:
        yield f"It would fit with {assignment}."
        return
    if found.num_alloc_retries > expandable.num_alloc_retries == 0:
        yield f"With {assignment} it would fit without giving the cache back."
        return
    reserved_bytes = _most_reserved(found.moments)
    saved_bytes = reserved_bytes - _most_reserved(expandable.moments)
    if saved_bytes >= LARGE_SAVING * reserved_bytes:
        saved = format_bytes(saved_bytes)
        yield f"{assignment} would save {saved} of the reserved peak."


def _may_save(found: Replay) -> bool:
    """Whether a smaller cache could help."""
    if found.failed_moment is not None or found.num_alloc_retries:
        return True
    worst = max(found.moments, key=lambda moment: moment.reserved_bytes)
    cache_bytes = worst.reserved_bytes - worst.allocated_bytes
    return cache_bytes >= LARGE_CACHE * worst.reserved_bytes


def _replay(log: EventLog, settings: AllocatorSettings, gpu: Gpu | None) -> Replay:
    return replay(log, settings, None if gpu is None else gpu.budget_bytes)


def _most_reserved(moments: list[Moment]) -> int:
    return max(moment.reserved_bytes for moment in moments)


def _assignment(text: str) -> str:
    """The settings as a shell sets them for the installed torch."""
    return f"{environment_variable(torch.__version__)}={text}"
