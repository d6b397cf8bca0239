"""`per_process_memory_fraction`: a budget beside the card's own."""

from __future__ import annotations

from memplan.allocator import AllocatorSettings
from memplan.footprint import Footprint
from memplan.gpu import find_gpu
from memplan.recipe import Recipe
from memplan.simulator import run
from tests.small_llama import architecture

H100 = find_gpu("H100")
RECIPE = Recipe(method="full", batch_size=4, sequence_length=1024)


def on_share(share: float) -> Footprint:
    settings = AllocatorSettings(per_process_memory_fraction=share)
    return run(architecture(), RECIPE, H100, settings).footprint


def test_a_share_that_suffices_changes_nothing() -> None:
    assert on_share(0.5).peak == run(architecture(), RECIPE, H100).footprint.peak


def test_a_share_that_is_too_small_fails_and_says_by_how_much() -> None:
    peak = run(architecture(), RECIPE, H100).footprint.peak
    share = peak.allocated_bytes / H100.capacity_bytes / 2

    found = on_share(share)

    assert found.fits is False
    assert found.failed_moment is not None
    allowed = int(share * H100.capacity_bytes)
    assert peak.allocated_bytes <= allowed + found.missing_bytes
    assert allowed + found.missing_bytes <= 1.01 * peak.reserved_bytes
    assert found.peak == peak
