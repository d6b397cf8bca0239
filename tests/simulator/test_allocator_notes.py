"""What is said of the allocator's settings, on logs whose memory is known by hand."""

from __future__ import annotations

from unittest import mock

import pytest

from memplan.allocator import AllocatorSettings, environment_variable
from memplan.gpu import Gpu, find_gpu
from memplan.simulator import allocator_notes
from memplan.simulator.events import EventLog
from memplan.simulator.replay import replay
from memplan.units import MIB

EXPANDABLE = "expandable_segments:True"
NAME = "PYTORCH_ALLOC_CONF"


def one_after_another(*sizes_mib: float) -> EventLog:
    """A step that holds one block after another, but never two."""
    log = EventLog()
    log.begin("1.forward")
    for size in sizes_mib:
        log.free(log.allocate(int(size * MIB), "op"))
    return log


GROWING = one_after_another(15, 30)
"""Segments of 16 and 30 MiB; in one that grows by pages of 20 MiB, 40 MiB."""

STEADY = one_after_another(38, 38)
"""One segment of 38 MiB; as pages, 40 MiB."""


def card(budget_mib: int) -> Gpu:
    return find_gpu(f"{budget_mib + 100}MiB", context_bytes=100 * MIB)


def notes(log: EventLog, text: str, gpu: Gpu | None = None, *, windows: bool = False):
    settings = AllocatorSettings.parse(text, on_windows=windows)
    budget = None if gpu is None else gpu.budget_bytes
    found = replay(log, settings, budget)
    with mock.patch("torch.__version__", "2.13.0+cpu"):
        return list(allocator_notes.notes(log, settings, gpu, found))


def test_what_settings_save_is_said_beside_how_to_set_them() -> None:
    assert notes(GROWING, EXPANDABLE) == [
        f"Set {NAME}={EXPANDABLE} for the run.",
        "These allocator settings save 6.0 MiB of the reserved peak here, beside the "
        "defaults.",
    ]


def test_what_settings_cost_is_said_too() -> None:
    said = notes(STEADY, EXPANDABLE)

    assert said[1].startswith("These allocator settings cost 2.0 MiB of the reserved")


def test_settings_without_effect_are_named() -> None:
    said = notes(STEADY, "garbage_collection_threshold:0.8")

    assert said[1].startswith("These allocator settings change nothing")


def test_settings_that_make_it_fit_are_named() -> None:
    # 9 and 31 MiB at once: segments of 20 and 32 MiB, or two pages of 20 MiB.
    log = one_after_another(15, 30)
    log.allocate(9 * MIB, "op")
    log.allocate(31 * MIB, "op")
    gpu = card(44)

    assert notes(log, EXPANDABLE, gpu)[1] == (
        "It fits only with these allocator settings: with the defaults it runs out of "
        "memory in 1.forward."
    )
    assert notes(log, "", gpu) == [f"It would fit with {NAME}={EXPANDABLE}."]


def test_settings_that_make_it_fail_are_named() -> None:
    # 38 MiB fit in 39, but not as two pages.
    said = notes(STEADY, EXPANDABLE, card(39))

    assert said[1] == "It fits with the allocator's defaults, not with these settings."


def test_hopeless_settings_are_named() -> None:
    said = notes(STEADY, EXPANDABLE, card(30))

    assert said[1] == "The allocator settings do not make it fit."


def test_expandable_segments_are_suggested_where_they_save_much() -> None:
    assert notes(GROWING, "") == [
        f"{NAME}={EXPANDABLE} would save 6.0 MiB of the reserved peak."
    ]
    assert notes(STEADY, "") == []


def test_expandable_segments_are_suggested_where_the_cache_is_given_back() -> None:
    # 46 MiB of segments do not fit in 42, so the first is returned; 40 of pages do.
    assert notes(GROWING, "", card(42)) == [
        f"With {NAME}={EXPANDABLE} it would fit without giving the cache back."
    ]


def test_windows_has_no_expandable_segments() -> None:
    assert notes(GROWING, EXPANDABLE, windows=True) == [
        "torch ignores expandable_segments on Windows."
    ]
    assert notes(GROWING, "", windows=True) == []
    settings = AllocatorSettings.parse(EXPANDABLE, on_windows=True)
    assert replay(GROWING, settings, None).moments[0].reserved_bytes == 46 * MIB


def test_split_limits_and_expandable_segments_do_not_go_together() -> None:
    # A free page of 40 MiB is kept from requests below the limit: 5 MiB get their own.
    log = one_after_another(38, 5)
    said = notes(log, f"{EXPANDABLE},max_split_size_mb:20")

    assert said[0].startswith("Give expandable_segments without max_split_size_mb")
    assert "cost" in said[2]
    alone = AllocatorSettings.parse(EXPANDABLE)
    assert replay(log, alone, None).moments[0].reserved_bytes == 40 * MIB


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("2.4.1", "PYTORCH_CUDA_ALLOC_CONF"),
        ("2.9.1+cu128", "PYTORCH_CUDA_ALLOC_CONF"),
        ("2.13.0+cpu", "PYTORCH_ALLOC_CONF"),
        ("3.0.0a0", "PYTORCH_ALLOC_CONF"),
    ],
)
def test_variable_has_the_name_that_torch_reads(version: str, name: str) -> None:
    assert environment_variable(version) == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        EXPANDABLE,
        "max_split_size_mb:128,max_non_split_rounding_mb:64,large_segment_size_mb:40",
        "roundup_power2_divisions:[256:1,512:2,>:8],throw_on_cudamalloc_oom:True",
        "roundup_power2_divisions:4,garbage_collection_threshold:0.8",
        "per_process_memory_fraction:0.5",
    ],
)
def test_settings_are_said_as_they_are_read(text: str) -> None:
    settings = AllocatorSettings.parse(text)

    assert AllocatorSettings.parse(settings.to_text()) == settings
    assert len(settings.to_text()) == len(text)
